"""Presence questions with known answers (the paper's Hal sets, section 4.4): is there a dog in the image?

Hal-COCO asks about COCO objects, Hal-ADE about classes that COCO does not have, Hal-Act about what a video shows.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from locvlm.data.coco import Instances, absent_categories
from locvlm.errors import DataError
from locvlm.prompts import hallucination_question
from locvlm.records import Medium, medium_of

FEW_PRESENT = "fewer categories present than questions asked about present ones"
FEW_ABSENT = "fewer categories absent than questions asked about absent ones"


@dataclass(frozen=True, slots=True)
class Shown:
    """What one image or video shows: `present` and `absent` names of one class list. `key` begins the ids of its
    questions and keys its draws; `size`: (width, height) in pixels where it is known."""

    key: str
    file_name: str
    present: Sequence[str]
    absent: Sequence[str]
    size: tuple[int, int] | None = None
    medium: Medium = "image"


@dataclass(frozen=True, slots=True)
class PresenceSet:
    """`rows`: the lines of questions.jsonl. `counts`: images (or videos), questions, yes, no. `skipped`: reason ->
    images (or videos)."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]
    skipped: Counter[str] = field(default_factory=Counter)


def build_presence(instances: Instances, seed: int, per_image: int = 2) -> PresenceSet:
    """Hal-COCO: `ask_presence` of annotated images, or of videos by their file names. A crowd region makes its category
    present."""
    return ask_presence(_shown(instances), seed, per_image)


def ask_presence(shown: Iterable[Shown], seed: int, per_image: int = 2) -> PresenceSet:
    """`per_image` present and as many absent categories asked for in every image or video, so that chance is one half.

    Both are drawn without replacement, absent ones uniformly from the class list. What has too few of either is
    skipped. Draws are keyed by (seed, key). Raises DataError when `per_image` is below 1.
    """
    if per_image < 1:
        raise DataError(
            f"building presence questions: {per_image} an image and answer were asked for, at least 1 is needed"
        )
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for one in shown:
        if min(len(one.present), len(one.absent)) < per_image:
            skipped[FEW_PRESENT if len(one.present) < per_image else FEW_ABSENT] += 1
            continue
        counts[f"{one.medium}s"] += 1
        rng = random.Random(f"{seed}/presence/{one.key}")
        asked = [(name, "yes") for name in rng.sample(sorted(one.present), per_image)]
        asked += [(name, "no") for name in rng.sample(list(one.absent), per_image)]
        rows += [_row(one, number, name, reference) for number, (name, reference) in enumerate(asked)]
    half = counts.total() * per_image
    return PresenceSet(rows, {**(counts or {"images": 0}), "questions": 2 * half, "yes": half, "no": half}, skipped)


def _row(one: Shown, number: int, name: str, reference: str) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"{one.key}-presence-{number}", "task": "presence", "image": one.file_name}
    if one.medium != "image":
        row["medium"] = one.medium
    if one.size is not None:
        row["width"], row["height"] = one.size
    return {**row, "prompt": hallucination_question(name, one.medium), "reference": reference, "category": name}


def _shown(instances: Instances) -> Iterator[Shown]:
    for image in instances.images:
        present = sorted({thing.category for thing in image.objects})
        absent = absent_categories(image, instances.categories)
        size = (image.width, image.height)
        yield Shown(str(image.id), image.file_name, present, absent, size, medium_of(image.file_name))
