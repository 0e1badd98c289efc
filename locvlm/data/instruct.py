"""Localize-Instruct (paper, sections 3.3 and 4.1): LocPred, NegPred and RevLoc turns from annotated objects, and the
renderer that turns stored conversations into the words of the paper's templates.

Boxes are stored in pixels and the text is rendered when a conversation is read, so one data set serves every
coordinate representation. Every draw is keyed, never taken from a running generator: the result does not depend on the
order of the images, on the number of workers, or on what was drawn before.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from locvlm.config import InstructConfig, PromptConfig
from locvlm.coordinates import LocationFormat
from locvlm.data.coco import Instances, decode_json, read_bytes, whole
from locvlm.data.columns import ImageTable, Ints
from locvlm.data.conversations import STRUCTURED, ConversationBatches, box_column, record_batch
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
from locvlm.records import Conversation, Turn, encodable

NO_OBJECT = "image without an object that its category name alone picks out"
ALL_PRESENT = "image with too few absent categories for its NegPred turns"
LOST_BY_CROP = "object that the crop to the central square loses"
NO_CAPTION = "object without a caption: described by its category name"
NO_CAPTION_TO_BORROW = "NegPred turn about a category without a caption: asked for by its name"

N_TEMPLATES = {"loc_pred": len(LOC_PROMPTS), "neg_pred": len(LOC_PROMPTS), "rev_loc": len(REV_PROMPTS)}

# places in STRUCTURED
_LOC_PRED, _NEG_PRED, _REV_LOC = 0, 1, 2
_GROUPS = np.array([_LOC_PRED, _REV_LOC])

_CAPTION_KEYS = ("caption", "description", "text")
_ID_KEYS = ("id", "annotation_id")
_ID_DIGITS = 19  # of a 64-bit number; int() refuses thousands of them


def draw(n: int, *key: object) -> int:
    """A number in 0..n-1, uniform and independent for different keys; the same on every machine."""
    digest = blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n  # the bias of the remainder is below n / 2**64


def draws(sizes: Ints, seed: int, ids: Sequence[int], *purpose: object) -> Ints:
    """`draw(n, seed, id, *purpose)` for every n of `sizes` and id of `ids`, in half the time."""
    head, tail = f"{seed}\x1f", "\x1f".join(("", *map(str, purpose)))
    digests = b"".join([blake2b(f"{head}{key}{tail}".encode(), digest_size=8).digest() for key in ids])
    return (np.frombuffer(digests, ">u8") % sizes.astype(np.uint64)).astype(np.int64)


def template(objective: str, seed: int, epoch: int, conversation: str, turn: int) -> int:
    """The number of the template in which a structured turn of this objective is worded."""
    return draw(N_TEMPLATES[objective], seed, epoch, conversation, turn)


class Renderer:
    """Stored turns -> (question, answer) text, with the templates of appendix B.

    The template of a structured turn is drawn by (seed, epoch, conversation id, turn number): the same conversation is
    worded anew every epoch and alike on every rank. Literal turns and turns of a frozen set pass through.
    """

    def __init__(self, location: LocationFormat, prompts: PromptConfig, seed: int) -> None:
        self.location = location
        self.prompts = prompts
        self.seed = seed

    def turns(self, conversation: Conversation, epoch: int = 0) -> list[tuple[str, str]]:
        """The (question, answer) pairs of a conversation. Raises DataError for a structured turn without a box."""
        return [
            (turn.question, turn.answer)
            if turn.question or turn.objective not in N_TEMPLATES
            else self._turn(conversation, turn, template(turn.objective, self.seed, epoch, conversation.id, number))
            for number, turn in enumerate(conversation.turns)
        ]

    def _turn(self, conversation: Conversation, turn: Turn, index: int) -> tuple[str, str]:
        clean = self.prompts.clean_templates
        word = self.prompts.video_word if conversation.medium == "video" else "image"
        description = turn.description or turn.category
        if turn.objective == "rev_loc":
            return rev_question(index, self._place(conversation, turn), word), rev_answer(description, clean)
        question = loc_question(index, description, self.location.repr_text, clean, word)
        if turn.objective == "neg_pred":
            return question, neg_answer(word)
        return question, loc_answer(self._place(conversation, turn))

    def _place(self, conversation: Conversation, turn: Turn) -> str:
        if turn.box_xyxy is None:
            raise DataError(
                f"rendering the conversation {conversation.id!r}: its {turn.objective} turn about {turn.category!r} "
                "has no box; build the data set again"
            )
        return self.location.encode(turn.box_xyxy, conversation.width, conversation.height)


def turn_alone(conversation: Conversation, number: int) -> Conversation:
    """One turn as a conversation of its own, to ask a model that must not read the turns before. Its id, which draws
    the template, is the conversation's and the number."""
    return replace(conversation, id=f"{conversation.id}#{number}", turns=(conversation.turns[number],))


@dataclass(frozen=True, slots=True)
class _Turns:
    """Turns of some images as columns; `source` is the object that a turn is about, -1 for a NegPred turn."""

    row: Ints  # place of the image among those that have conversations
    group: Ints  # 0: of the LocPred conversation, 1: of the RevLoc one
    place: Ints  # in the conversation
    objective: Ints  # in STRUCTURED
    category: Ints
    source: Ints
    description: list[str] | None

    def __add__(self, other: "_Turns") -> "_Turns":
        return _Turns(
            np.concatenate((self.row, other.row)),
            np.concatenate((self.group, other.group)),
            np.concatenate((self.place, other.place)),
            np.concatenate((self.objective, other.objective)),
            np.concatenate((self.category, other.category)),
            np.concatenate((self.source, other.source)),
            None if self.description is None else [*self.description, *(other.description or ())],
        )

    def sorted(self) -> "_Turns":
        """In the order of images, conversations and places."""
        order = np.lexsort((self.place, self.group, self.row))
        texts = self.description
        return _Turns(
            self.row[order],
            self.group[order],
            self.place[order],
            self.objective[order],
            self.category[order],
            self.source[order],
            None if texts is None else [texts[number] for number in order.tolist()],
        )


class LocalizeInstruct(ConversationBatches):
    """The conversations, in the order of the images. `skipped` and `notes` fill up while it is read through:
    reason -> number of images or objects that gave nothing, or gave something else than asked.

    Worked out for a few thousand images at a time, column by column, and never held whole.
    """

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
        self._images = ImageTable.of(instances.images)
        self._config = config
        self._seed = seed
        self._captions = captions
        self._crop = geometry if geometry is not None and geometry.kind == "crop" else None
        names = dict.fromkeys(instances.categories)
        self._n_categories = len(names)  # those that can be absent; a record may name another
        self._names = list(names | dict.fromkeys(self._images.vocabulary))
        codes = {name: code for code, name in enumerate(self._names)}
        self._codes = np.array([codes[name] for name in self._images.vocabulary], np.int64)
        self._by_category = _captions_by_category(self._images, captions or {})

    def batches(self) -> Iterator[pa.RecordBatch]:
        """See ConversationBatches. Starts the counters anew."""
        self.skipped.clear()
        self.notes.clear()
        for images in self._images.parts():
            chosen = self._usable(images)
            kept, rows = np.unique(images.rows[chosen], return_inverse=True)
            _count(self.skipped, NO_OBJECT, len(images) - len(kept))
            if len(kept):
                yield self._batch(images, kept, self._turns(images, kept, chosen, rows))

    def _usable(self, images: ImageTable) -> Ints:
        """The numbers of the usable objects."""
        chosen = np.flatnonzero(images.usable(self._config.crowd))
        if self._crop is None:
            return chosen
        sizes = list(zip(images.widths.tolist(), images.heights.tolist(), strict=True))
        boxes = images.boxes[chosen].tolist()
        rows = images.rows[chosen].tolist()
        seen = [self._crop.map_box(tuple(box), *sizes[row]) is not None for box, row in zip(boxes, rows, strict=True)]
        _count(self.skipped, LOST_BY_CROP, len(seen) - sum(seen))
        return chosen[np.array(seen, np.bool_)]

    def _turns(self, images: ImageTable, kept: Ints, chosen: Ints, rows: Ints) -> _Turns:
        """All turns about the images `kept`: of their usable objects `chosen`, each of the image `kept[rows]`."""
        codes = self._codes[images.codes]
        n_turns = np.bincount(rows)
        place = np.arange(len(rows)) - np.repeat(np.cumsum(n_turns) - n_turns, n_turns)
        described = self._descriptions(images.object_ids[chosen])
        zeros = np.zeros(len(rows), np.int64)
        reverse = _Turns(rows, zeros + 1, place, zeros + _REV_LOC, codes[chosen], chosen, described)
        located = _Turns(rows, zeros, place, zeros + _LOC_PRED, codes[chosen], chosen, described)
        for negative in self._negatives(images, kept, codes, n_turns):
            # insert: what stood there and behind moves on by one
            inserted = np.full(len(kept), np.iinfo(np.int64).max)
            inserted[negative.row] = negative.place
            located = replace(located, place=located.place + (located.place >= inserted[located.row])) + negative
        return (located + reverse).sorted()

    def _negatives(self, images: ImageTable, kept: Ints, codes: Ints, n_turns: Ints) -> Iterator[_Turns]:
        """The first NegPred turn of every image that can have one, then the second, and so on."""
        wanted = self._config.neg_per_image
        present = np.zeros((len(images), len(self._names)), np.bool_)
        present[images.rows, codes] = True
        absent = ~present[kept, : self._n_categories]
        _count(self.notes, ALL_PRESENT, int(np.count_nonzero(absent.sum(axis=1) < wanted)))
        ids = images.ids[kept]
        for number in range(wanted):
            n_absent = absent.sum(axis=1)
            rows = np.flatnonzero(n_absent)
            keys = ids[rows].tolist()
            nth = draws(n_absent[rows], self._seed, keys, "category", number)
            place = draws(n_turns[rows] + number + 1, self._seed, keys, "place", number)
            category = (np.cumsum(absent[rows], axis=1) == nth[:, None] + 1).argmax(axis=1)
            absent[rows, category] = False
            described = self._borrowed(keys, category, number)
            zeros = np.zeros(len(rows), np.int64)
            yield _Turns(rows, zeros, place, zeros + _NEG_PRED, category, zeros - 1, described)

    def _descriptions(self, object_ids: Ints) -> list[str] | None:
        if self._captions is None:
            return None
        texts = [self._captions.get(key, "") for key in object_ids.tolist()]
        _count(self.notes, NO_CAPTION, texts.count(""))
        return texts

    def _borrowed(self, image_ids: Sequence[int], categories: Ints, number: int) -> list[str] | None:
        """A caption of each category, made for another image: in this one the category is absent."""
        if self._captions is None:
            return None
        texts = []
        for image_id, category in zip(image_ids, categories.tolist(), strict=True):
            pool = self._by_category.get(self._names[category], ())
            texts.append(pool[draw(len(pool), self._seed, image_id, "caption", number)] if pool else "")
        _count(self.notes, NO_CAPTION_TO_BORROW, texts.count(""))
        return texts

    def _batch(self, images: ImageTable, kept: Ints, turns: _Turns) -> pa.RecordBatch:
        by_question = self._config.grouping == "qa"
        key = 2 * turns.row + turns.group
        rows, groups, kinds = turns.row, turns.group, turns.objective
        offsets = np.arange(len(key) + 1)
        if not by_question:
            offsets = np.searchsorted(key, np.arange(2 * len(kept) + 1))
            rows, groups = np.divmod(np.arange(2 * len(kept)), 2)
            kinds = _GROUPS[groups]
        objectives = pa.array(STRUCTURED)
        names = [pc.cast(pa.array(images.ids[kept][rows]), pa.string()), objectives.take(_GROUPS[groups])]
        if by_question:
            names.append(pc.cast(pa.array(turns.place), pa.string()))
        conversations = {
            "id": pc.binary_join_element_wise(*names, "-"),
            "image": pa.array([images.file_names[number] for number in kept.tolist()], pa.string()).take(rows),
            "width": pa.array(images.widths[kept][rows]),
            "height": pa.array(images.heights[kept][rows]),
            "objective": objectives.take(kinds),
        }
        columns = {
            "objective": objectives.take(turns.objective),
            "category": pa.array(self._names, pa.string()).take(turns.category),
            "box_xyxy": box_column(images.boxes[turns.source], turns.source < 0),
        }
        if turns.description is not None:
            columns["description"] = pa.array(turns.description, pa.string())
        return record_batch(conversations, pa.array(offsets, pa.int32()), columns)


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


def frozen(conversations: Iterable[Conversation], renderer: Renderer) -> Iterator[Conversation]:
    """The conversations with the text of the first epoch in their structured turns, which no epoch then words anew."""
    for conversation in conversations:
        texts = renderer.turns(conversation)
        turns = [replace(turn, question=q, answer=a) for turn, (q, a) in zip(conversation.turns, texts, strict=True)]
        yield replace(conversation, turns=tuple(turns))


def template_draws(conversations: Iterable[Conversation], seed: int, epoch: int = 0) -> dict[str, list[int]]:
    """By objective, how many of the structured turns are worded in each of its templates."""
    counts = {objective: [0] * n for objective, n in N_TEMPLATES.items()}
    for conversation in conversations:
        for number, turn in enumerate(conversation.turns):
            if turn.objective in counts:
                counts[turn.objective][template(turn.objective, seed, epoch, conversation.id, number)] += 1
    return counts


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
        yield (int(key) if key.isascii() and key.isdigit() and len(key) <= _ID_DIGITS else None), text


def _caption_row(path: Path, number: int, line: bytes) -> tuple[int | None, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"reading the captions {path}: line {number} is not valid JSON ({fault})") from None
    if not isinstance(row, dict):
        return None, None
    key = next((whole(row[name]) for name in _ID_KEYS if name in row), None)
    return key, next((row[name] for name in _CAPTION_KEYS if name in row), None)


def _captions_by_category(images: ImageTable, captions: Mapping[int, str]) -> dict[str, list[str]]:
    """Every caption of a category, in the order of the images and their objects."""
    pools: dict[str, list[str]] = {}
    if captions:
        for key, code in zip(images.object_ids.tolist(), images.codes.tolist(), strict=True):
            if text := captions.get(key):
                pools.setdefault(images.vocabulary[code], []).append(text)
    return pools


def _count(counter: Counter[str], reason: str, n: int) -> None:
    """Reasons that do not occur stay out of the counter."""
    if n:
        counter[reason] += n
