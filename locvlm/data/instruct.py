"""Localize-Instruct (paper, sections 3.3 and 4.1): LocPred, NegPred and RevLoc turns from annotated objects, and the
renderer that turns stored conversations into the words of the paper's templates.

Boxes are stored in pixels and the text is rendered when a conversation is read, so one data set serves every
coordinate representation. Every draw is keyed, never taken from a running generator: the result does not depend on the
order of the images, on the number of workers, or on what was drawn before.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from locvlm.config import InstructConfig, PromptConfig
from locvlm.coordinates import LocationFormat
from locvlm.data.coco import Instances, absent_categories, decode_json, encodable, read_bytes, usable_objects, whole
from locvlm.errors import DataError
from locvlm.geometry import ImageGeometry
from locvlm.prompts import (
    IMAGE,
    LOC_PROMPTS,
    REV_PROMPTS,
    STOP,
    loc_answer,
    loc_question,
    neg_answer,
    rev_answer,
    rev_question,
)
from locvlm.records import Conversation, ImageRecord, ObjectRecord, Turn

NO_OBJECT = "image without an object that its category name alone picks out"
ALL_PRESENT = "image with too few absent categories for its NegPred turns"
LOST_BY_CROP = "object that the crop to the central square loses"
NO_CAPTION = "object without a caption: described by its category name"

_CAPTION_KEYS = ("caption", "description", "text")
_ID_KEYS = ("id", "annotation_id")


def draw(n: int, *key: object) -> int:
    """A number in 0..n-1, uniform and independent for different keys; the same on every machine."""
    digest = blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n  # the bias of the remainder is below n / 2**64


class Renderer:
    """Stored turns -> (question, answer) text, with the templates of appendix B.

    The template of a structured turn is drawn by (seed, epoch, conversation id, turn number): the same conversation is
    worded anew every epoch and alike on every rank. Literal turns pass through.
    """

    def __init__(self, location: LocationFormat, prompts: PromptConfig, seed: int) -> None:
        self.location = location
        self.prompts = prompts
        self.seed = seed

    def turns(self, conversation: Conversation, epoch: int = 0) -> list[tuple[str, str]]:
        """The (question, answer) pairs of a conversation. Raises DataError for a structured turn without a box."""
        return [
            self._turn(conversation, turn, (self.seed, epoch, conversation.id, number))
            for number, turn in enumerate(conversation.turns)
        ]

    def _turn(self, conversation: Conversation, turn: Turn, key: tuple[object, ...]) -> tuple[str, str]:
        clean = self.prompts.clean_templates
        description = turn.description or turn.category
        if turn.objective == "loc_pred":
            question = loc_question(draw(len(LOC_PROMPTS), *key), description, self.location.repr_text, clean)
            return question, loc_answer(self._place(conversation, turn))
        if turn.objective == "neg_pred":
            question = loc_question(draw(len(LOC_PROMPTS), *key), description, self.location.repr_text, clean)
            return question, neg_answer()
        if turn.objective == "rev_loc":
            question = rev_question(draw(len(REV_PROMPTS), *key), self._place(conversation, turn))
            return question, rev_answer(description, clean)
        return turn.question, turn.answer

    def _place(self, conversation: Conversation, turn: Turn) -> str:
        if turn.box_xyxy is None:
            raise DataError(
                f"rendering the conversation {conversation.id!r}: its {turn.objective} turn about {turn.category!r} "
                "has no box; build the data set again"
            )
        return self.location.encode(turn.box_xyxy, conversation.width, conversation.height)


class LocalizeInstruct(Iterator[Conversation]):
    """The conversations, in the order of the image ids. `skipped` and `notes` fill up while it is read through:
    reason -> number of images or objects that gave nothing, or gave something else than asked."""

    def __init__(
        self,
        instances: Instances,
        config: InstructConfig,
        seed: int,
        captions: Mapping[int, str] | None,
        geometry: ImageGeometry | None,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._instances = instances
        self._config = config
        self._seed = seed
        self._captions = captions
        self._crop = geometry if geometry is not None and geometry.kind == "crop" else None
        self._by_category = _captions_by_category(instances, captions or {})
        self._conversations = self._build()

    def __next__(self) -> Conversation:
        return next(self._conversations)

    def _build(self) -> Iterator[Conversation]:
        for image in self._instances.images:
            things = self._usable(image)
            if not things:
                self.skipped[NO_OBJECT] += 1
                continue
            described = [(thing, self._description(thing)) for thing in things]
            located = [Turn("loc_pred", thing.category, text, thing.box_xyxy) for thing, text in described]
            for number, negative in enumerate(self._negatives(image)):
                located.insert(draw(len(located) + 1, self._seed, image.id, "place", number), negative)
            reverse = [Turn("rev_loc", thing.category, text, thing.box_xyxy) for thing, text in described]
            yield from self._group(image, "loc_pred", located)
            yield from self._group(image, "rev_loc", reverse)

    def _group(self, image: ImageRecord, objective: str, turns: Sequence[Turn]) -> Iterator[Conversation]:
        name, size = f"{image.id}-{objective}", (image.file_name, image.width, image.height)
        if self._config.grouping == "conversation":
            yield Conversation(name, *size, objective, tuple(turns))
            return
        for number, turn in enumerate(turns):
            yield Conversation(f"{name}-{number}", *size, turn.objective, (turn,))

    def _usable(self, image: ImageRecord) -> list[ObjectRecord]:
        things = usable_objects(image, self._config.crowd)
        if self._crop is None:
            return things
        seen = [t for t in things if self._crop.map_box(t.box_xyxy, image.width, image.height) is not None]
        if len(seen) < len(things):
            self.skipped[LOST_BY_CROP] += len(things) - len(seen)
        return seen

    def _description(self, thing: ObjectRecord) -> str:
        if self._captions is None:
            return ""
        text = self._captions.get(thing.id, "")
        if not text:
            self.notes[NO_CAPTION] += 1
        return text

    def _negatives(self, image: ImageRecord) -> Iterator[Turn]:
        wanted = self._config.neg_per_image
        absent = absent_categories(image, self._instances.categories) if wanted else []
        if len(absent) < wanted:
            self.notes[ALL_PRESENT] += 1
        for number in range(min(wanted, len(absent))):
            category = absent.pop(draw(len(absent), self._seed, image.id, "category", number))
            texts = self._by_category.get(category, ())  # of other images: here the category is absent
            text = texts[draw(len(texts), self._seed, image.id, "caption", number)] if texts else ""
            yield Turn("neg_pred", category, text)


def build_localize_instruct(
    instances: Instances,
    config: InstructConfig,
    seed: int,
    captions: Mapping[int, str] | None = None,
    geometry: ImageGeometry | None = None,
) -> LocalizeInstruct:
    """Localize-Instruct-200K (section 4.1) from annotated images; iterate to get the conversations.

    `config.grouping == "conversation"`: for every image with a usable object one LocPred conversation, a turn an object
    (ascending annotation id) with `neg_per_image` NegPred turns at random places, and one RevLoc conversation.
    `"qa"`: one conversation a turn, its objective the turn's. NegPred categories are drawn uniformly, without
    repetition, from those of which the image has no annotation of any kind.
    `captions` (annotation id -> text) take the place of the class name where there is one; a NegPred turn then gets a
    caption that was made for its category in another image. With a `crop` geometry objects that the crop loses are left
    out. Draws are keyed by (seed, image id).
    """
    return LocalizeInstruct(instances, config, seed, captions, geometry)


def read_object_captions(path: Path) -> tuple[dict[int, str], Counter[str]]:
    """Captions of objects: annotation id -> one line of text, and what was skipped, by reason.

    A JSON object `{"<annotation id>": "text"}`, or JSON lines `{"id" | "annotation_id": n, "caption" | "description" |
    "text": "..."}`. Raises DataError when the file is neither, or holds no usable caption.
    """
    data = read_bytes(path)
    skipped: Counter[str] = Counter()
    captions: dict[int, str] = {}
    for key, text in _caption_pairs(path, data):
        if key is None or not isinstance(text, str):
            skipped["caption row without a whole-number annotation id or without text"] += 1
            continue
        line = " ".join(text.split())
        if not line:
            skipped["caption that is empty"] += 1
        elif IMAGE in line or STOP in line or not encodable(line):
            skipped[f"caption that holds {IMAGE}, {STOP} or broken Unicode"] += 1
        elif key in captions:
            skipped["caption of an annotation id that occurred before"] += 1
        else:
            captions[key] = line
    if not captions:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(skipped.items())) or "it is empty"
        raise DataError(
            f"reading the captions {path}: not one can be used ({reasons}); needed is a JSON object "
            '{"<annotation id>": "text"} or JSON lines {"id": <annotation id>, "caption": "text"}'
        )
    return captions, skipped


def _caption_pairs(path: Path, data: bytes) -> Iterator[tuple[int | None, Any]]:
    lines = data.splitlines()
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _caption_row(path, number, line)
        return
    value = decode_json(path, data)
    if not isinstance(value, dict):
        raise DataError(
            f"reading the captions {path}: found a {type(value).__name__} at the top; needed is a JSON object "
            '{"<annotation id>": "text"}, or JSON lines in a file named .jsonl'
        )
    for key, text in value.items():
        yield (int(key) if key.isascii() and key.isdigit() else None), text


def _caption_row(path: Path, number: int, line: bytes) -> tuple[int | None, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise DataError(f"reading the captions {path}: line {number} is not valid JSON ({fault})") from None
    if not isinstance(row, dict):
        return None, None
    key = next((whole(row[name]) for name in _ID_KEYS if name in row), None)
    return key, next((row[name] for name in _CAPTION_KEYS if name in row), None)


def _captions_by_category(instances: Instances, captions: Mapping[int, str]) -> dict[str, list[str]]:
    """Every caption of a category, ascending by image and annotation id."""
    pools: dict[str, list[str]] = {}
    if captions:
        for image in instances.images:
            for thing in image.objects:
                if text := captions.get(thing.id):
                    pools.setdefault(thing.category, []).append(text)
    return pools
