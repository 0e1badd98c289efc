"""PRefCOCO (paper, section 4.1): a pseudo-caption for every object that its category name alone picks out.

The captions themselves come from a model (`locvlm caption`) or from a file; here is what is asked, how an answer
becomes a description, and how descriptions become conversations.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from locvlm.config import InstructConfig
from locvlm.data.coco import Instances, usable_objects
from locvlm.data.columns import CrowdRule, ImageTable
from locvlm.data.instruct import LOST_BY_CROP, NO_OBJECT
from locvlm.geometry import ImageGeometry
from locvlm.prompts import caption_question
from locvlm.records import BoxXYXY, Conversation, ImageRecord, ObjectRecord, Turn

OBJECTIVE = "prefcoco"
PAPER = {"images": 95_899, "objects": 201_343, "qa_pairs": 402_686}  # of COCO train2017
UNCAPTIONED = "object without a caption: left out"
NO_CAPTION_LEFT = "image with no captioned object"
NORMALISED = "caption changed by normalisation"

# a full stop after these, or after a single capital, does not end a sentence
_ABBREVIATIONS = ("st", "mr", "mrs", "ms", "dr", "no", "vs", "e.g", "i.e", "approx")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s)")


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    """One object to be described. `id`: of the annotation; `image`: file name; `box_xyxy`, `width`, `height`: pixels of
    the original image."""

    id: int
    image_id: int
    image: str
    width: int
    height: int
    category: str
    box_xyxy: BoxXYXY

    @property
    def prompt(self) -> str:
        """The paper's request for a pseudo-caption."""
        return caption_question(self.category)


def caption_requests(instances: Instances, crowd: CrowdRule = "counts") -> list[CaptionRequest]:
    """One request for each of the `usable_objects` of every image, by image id and then annotation id: requests about
    one image follow each other."""
    return [
        CaptionRequest(thing.id, image.id, image.file_name, image.width, image.height, thing.category, thing.box_xyxy)
        for image in instances.images
        for thing in usable_objects(image, crowd)
    ]


def normalise_caption(raw: str, category: str) -> str:
    """The answer of a captioner as a description that stands in the templates in place of the category name.

    White space is collapsed, the first sentence kept, its full stop dropped. Then, whatever the case of the letters:

    - "(The|A|An) <category> [in the|this image] is|are <rest>" -> "<category> that is <rest>";
    - "(The|A|An) <category> [in the|this image] <rest>" -> "<category> <rest>";
    - anything else stays as it is.

    Applied to its own result it changes nothing, unless the category itself begins with an article. An answer without a
    word gives "".
    """
    text = _first_sentence(raw)
    if not any(character.isalnum() for character in text):
        return ""
    name = re.escape(" ".join(category.split()))
    found = re.fullmatch(rf"(?:the|an?) {name}(?: in (?:the|this) image)?(?P<rest>(?!\w).*)", text, re.IGNORECASE)
    if found is None:
        return text
    rest = found["rest"]
    said = re.fullmatch(r" (?:is|are) (?P<what>.+)", rest, re.IGNORECASE)
    return f"{category} that is {said['what']}" if said else f"{category}{rest}"


def normalise_captions(captions: Mapping[int, str], instances: Instances) -> tuple[dict[int, str], int]:
    """The captions (annotation id -> text) of the objects of `instances`, each as `normalise_caption` has it, without
    those of which nothing is left; and how many of them it changed."""
    table = ImageTable.of(instances.images)
    found: dict[int, str] = {}
    changed = 0
    for key, code in zip(table.object_ids.tolist(), table.codes.tolist(), strict=True):
        if (raw := captions.get(key)) and (text := normalise_caption(raw, table.vocabulary[code])):
            found[key] = text
            changed += text != raw
    return found, changed


def crowd_variants(instances: Instances) -> dict[str, dict[str, int]]:
    """Images with a usable object and usable objects, for each of the four ways to treat crowd regions (the paper does
    not say which one it took)."""
    table = ImageTable.of(instances.images)
    owners = {rule: table.rows[table.usable(rule)] for rule in get_args(CrowdRule)}
    return {rule: {"images": len(set(rows.tolist())), "objects": len(rows)} for rule, rows in owners.items()}


class PRefCOCO(Iterator[Conversation]):
    """The conversations, in the order of the image ids. `skipped` and `notes` fill up while it is read through, as
    those of `LocalizeInstruct`."""

    def __init__(
        self,
        instances: Instances,
        config: InstructConfig,
        captions: Mapping[int, str],
        geometry: ImageGeometry | None,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._images = instances.images
        self._config = config
        self._captions = captions
        self._crop = geometry if geometry is not None and geometry.kind == "crop" else None
        self._conversations = self._build()

    def __next__(self) -> Conversation:
        return next(self._conversations)

    def _build(self) -> Iterator[Conversation]:
        for image in self._images:
            things = usable_objects(image, self._config.crowd)
            if not things:
                self.skipped[NO_OBJECT] += 1
                continue
            turns = [turn for thing in things for turn in self._pairs(image, thing)]
            if not turns:
                self.skipped[NO_CAPTION_LEFT] += 1
                continue
            size = (image.file_name, image.width, image.height)
            if self._config.grouping == "conversation":
                yield Conversation(f"{image.id}-{OBJECTIVE}", *size, OBJECTIVE, tuple(turns))
                continue
            for number, turn in enumerate(turns):
                yield Conversation(f"{image.id}-{OBJECTIVE}-{number}", *size, turn.objective, (turn,))

    def _pairs(self, image: ImageRecord, thing: ObjectRecord) -> list[Turn]:
        if self._crop is not None and self._crop.map_box(thing.box_xyxy, image.width, image.height) is None:
            self.skipped[LOST_BY_CROP] += 1
            return []
        raw = self._captions.get(thing.id, "")
        text = normalise_caption(raw, thing.category)
        if not text:
            self.skipped[UNCAPTIONED] += 1
            return []
        if text != raw:
            self.notes[NORMALISED] += 1
        return [Turn(objective, thing.category, text, thing.box_xyxy) for objective in ("loc_pred", "rev_loc")]


def build_prefcoco(
    instances: Instances,
    config: InstructConfig,
    captions: Mapping[int, str],
    geometry: ImageGeometry | None = None,
) -> PRefCOCO:
    """PRefCOCO-100K (section 4.1) from annotated images and captions (annotation id -> text, normalised here where they
    are not yet); iterate to get the conversations.

    Every captioned usable object gives one LocPred and one RevLoc pair. `config.grouping == "conversation"`: one
    conversation an image, its pairs in the order of the annotation ids; the answer of a pair then stands in the context
    of the next, which Localize-Instruct avoids by its two conversations an image. `"qa"`: one conversation a pair.
    With a `crop` geometry objects that the crop loses are left out.
    """
    return PRefCOCO(instances, config, captions, geometry)


def _first_sentence(raw: str) -> str:
    text = " ".join(raw.split())
    for end in _SENTENCE_END.finditer(text):
        before = text[: end.start()]
        word = before.rpartition(" ")[2].lstrip("\"'([")
        initial = len(word) == 1 and word.isupper()
        if any(character.isalnum() for character in before) and not initial and word.lower() not in _ABBREVIATIONS:
            text = text[: end.end()]
            break
    return text.rstrip(". ")
