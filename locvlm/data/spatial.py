"""COCO-Spatial: which side of X is Y? Two rule sets, the paper's (section 4.2, appendix E) and its code release's."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from locvlm.data.coco import Instances, collector_paused
from locvlm.data.columns import Bools, ImageTable, Ints
from locvlm.errors import DataError
from locvlm.prompts import (
    OPPOSITE,
    Convention,
    spatial_direct_question,
    spatial_icl_question,
    spatial_word,
)
from locvlm.records import ImageRecord, ObjectRecord

Rules = Literal["paper", "released"]
Axis = Literal["horizontal", "vertical"]

# The question of the code release; unlike the paper's it names the objects with "the".
RELEASED_QUESTION = "Which side of the {seen_from} is the {located}?"

PAPER_QUESTIONS = 26_716  # of COCO-Spatial-27K, left and right; the paper gives no count for above and below
MIRRORED = "-mirrored"  # ends the id of a question about the mirrored image, after the id of its twin

FEW_OBJECTS = "fewer than three unique objects"
NO_OPPOSITE_PAIR = "no two unique objects on opposite sides of the middle fifth"
NO_THIRD = "two unique objects on opposite sides of the middle fifth, but no third one outside it"
NO_TWO_OBJECTS = "fewer than two unique objects"
NO_GAP = "no unique object wholly to the left of another"
NO_VERTICAL_GAP = "no unique object wholly above another"

_WORDS: dict[str, tuple[str, str]] = {"horizontal": ("left", "right"), "vertical": ("above", "below")}
_ENDS = {"horizontal": (0, 2), "vertical": (1, 3)}  # places in a box


@dataclass(frozen=True, slots=True)
class SpatialSet:
    """`rows`: the lines of questions.jsonl. `counts`: images, questions, questions by answer (left and right, or above
    and below), and of all these the mirrored ones where they were asked for. `skipped`: reason -> images without a
    question."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]
    skipped: Counter[str] = field(default_factory=Counter)


def build_coco_spatial(
    instances: Instances,
    rules: Rules = "paper",
    axis: Axis = "horizontal",
    *,
    answer_convention: Convention = "natural",
    both_orders: bool = False,
    mirrored: bool = False,
) -> SpatialSet:
    """The questions of COCO-Spatial about every image that has any; nothing is drawn at random.

    `paper` (meant for train2017). An object is unique when it is the only annotation of its category (crowd regions
    counted) and no crowd region; it has a side when its centre lies below 0.4 or above 0.6 of the axis (exactly 0.4 or
    0.6 is the middle). An image needs three unique objects that have a side, not all on the same one. Whatever else
    is in the image, in the middle or more than once, does not matter: the rules are about the three objects. (Two
    other readings can be counted: a third object that may lie in the middle gives `images` + `skipped[NO_THIRD]`.)
    Of all pairs on opposite sides that with the largest sum of box areas is taken (ties: the smaller annotation ids)
    and asked in both orders; the third object is the largest of the rest. Of the pair, obj_1 is the one across from
    the third, obj_3. The in-context prompt gives both orders of obj_1 and obj_2 solved, then asks where obj_1 is with
    respect to obj_3 (first row, the paper's text) or where obj_3 is with respect to obj_1 (second row).

    `released` (meant for val2014). The rule of the authors' code: unique objects (a lone crowd region is one), every
    pair in which one box ends before the other begins, asked once: the answer is always right, or below. The release
    balances left and right with mirrored images (`mirrored`); `both_orders` asks each pair the other way round as
    well. No third object, no in-context prompt. The release has a filter for up and down, but words only the question
    about left and right; above and below are asked in the same words.

    `mirrored` adds after every question its twin about the image mirrored left to right: `mirror` is true in its row,
    boxes are where they are in the mirrored image, left and right are exchanged (above and below are not), and its id
    is that of the question with `MIRRORED` behind. Whoever shows the image mirrors its pixels. A model that knows left
    from right answers both; one that goes by what usually stands where does not.

    With `paper` both orders of a pair balance the two answers. The paper's own figures for above and below are not the
    mean of the two classes, so its set was unbalanced in a way that it does not describe.

    A row has `subject` (the object whose place is asked for) and `object` (from where it is seen), each with category
    and box (x1, y1, x2, y2) in pixels. `reference` is the side of the subject, read naturally, or the opposite word
    with `answer_convention` icl_example. `icl_reference` follows the solved examples, whose answers say where the
    first named object is. Raises DataError for unknown rules or axis.
    """
    if rules not in ("paper", "released") or axis not in _WORDS:
        raise DataError(
            f"building COCO-Spatial: the rules are {rules!r} and the axis is {axis!r}; needed are the rules paper or "
            "released and the axis horizontal or vertical"
        )
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    n_images = 0
    with collector_paused():
        for part in ImageTable.of(instances.images).parts():
            images, faults = _paper_images(part, axis) if rules == "paper" else _released_images(part, axis)
            skipped.update(fault for fault in faults if fault)
            n_images += len(images)
            for image in images:
                views = [
                    _paper_rows(image, axis, answer_convention, mirror)
                    if rules == "paper"
                    else _released_rows(image, axis, answer_convention, both_orders, mirror)
                    for mirror in ((False, True) if mirrored else (False,))
                ]
                rows.extend(chain.from_iterable(zip(*views, strict=True)))
    words = Counter(row["reference"] for row in rows)
    counts = {"images": n_images, "questions": len(rows), **{word: words[word] for word in _WORDS[axis]}}
    if mirrored:
        counts["mirrored"] = len(rows) // 2
    return SpatialSet(rows, counts, skipped)


def _paper_images(images: ImageTable, axis: str) -> tuple[ImageTable, list[str]]:
    """The images to ask about, with those objects alone that are unique and have a side; and why an image is not
    asked about (empty: it is)."""
    unique = images.only(images.usable())
    n_unique = np.diff(unique.starts)
    lengths = unique.widths if axis == "horizontal" else unique.heights
    before, behind = _sides(unique.boxes, lengths[unique.rows], axis)
    n_before = np.bincount(unique.rows[before], minlength=len(images))
    n_behind = np.bincount(unique.rows[behind], minlength=len(images))
    faults = np.select(
        [n_unique < 3, (n_before == 0) | (n_behind == 0), n_before + n_behind < 3],
        [FEW_OBJECTS, NO_OPPOSITE_PAIR, NO_THIRD],
        "",
    )
    return unique.only(before | behind).take(np.flatnonzero(faults == "")), faults.tolist()


def _sides(boxes: npt.NDArray[np.float64], lengths: Ints, axis: str) -> tuple[Bools, Bools]:
    """Whether each box has its centre before the middle fifth of the axis, and whether it has it behind."""
    start, end = _ENDS[axis]
    tenfold = 5 * (boxes[:, start] + boxes[:, end])  # 10 x centre: whole pixels stay exact
    return tenfold < 4 * lengths, tenfold > 6 * lengths


def _released_images(images: ImageTable, axis: str) -> tuple[ImageTable, list[str]]:
    """As `_paper_images`, by the rule of the release."""
    unique = images.only(images.usable("singleton_ok"))
    start, end = _ENDS[axis]
    first_end, last_start = np.full(len(images), np.inf), np.full(len(images), -np.inf)
    np.minimum.at(first_end, unique.rows, unique.boxes[:, end])
    np.maximum.at(last_start, unique.rows, unique.boxes[:, start])
    no_gap = NO_GAP if axis == "horizontal" else NO_VERTICAL_GAP
    faults = np.select([np.diff(unique.starts) < 2, first_end >= last_start], [NO_TWO_OBJECTS, no_gap], "")
    return unique.take(np.flatnonzero(faults == "")), faults.tolist()


def _paper_rows(image: ImageRecord, axis: str, convention: Convention, mirror: bool) -> list[dict[str, Any]]:
    """The two rows of an image of `_paper_images`."""
    sides: tuple[list[ObjectRecord], list[ObjectRecord]] = ([], [])
    for thing in sorted(image.objects, key=_area, reverse=True):  # stable: of equals the smaller annotation id is first
        sides[_half(thing, image, axis)].append(thing)
    (near, *more_near), (far, *more_far) = sides  # the pair with the largest sum is the largest of each side
    third = max((*more_near[:1], *more_far[:1]), key=lambda thing: (_area(thing), -thing.id))
    word, opposite = _WORDS[axis]
    first, second = near, far
    if third in more_near:
        first, second, word, opposite = far, near, opposite, word
    if mirror and axis == "horizontal":
        word, opposite = opposite, word
    places = {thing.id: _place(thing, image, mirror) for thing in (first, second, third)}
    names = (first.category, second.category, third.category)
    icl = spatial_icl_question(*names, word)
    question = spatial_direct_question(third.category, first.category)
    turned = icl.removesuffix(question) + spatial_direct_question(first.category, third.category)
    asked = (
        # seen from, located, side of the located one; in-context: prompt, side of the one it asks for
        (first, second, opposite, icl, word),
        (second, first, word, turned, opposite),
    )
    return [
        {
            **_head(image, axis, number, mirror),
            "prompt": spatial_direct_question(seen_from.category, located.category),
            "reference": spatial_word(side, convention),
            "icl_prompt": icl_prompt,
            "icl_reference": spatial_word(icl_side, "icl_example"),
            "subject": places[located.id],
            "object": places[seen_from.id],
            "third": places[third.id],
        }
        for number, (seen_from, located, side, icl_prompt, icl_side) in enumerate(asked)
    ]


def _released_rows(
    image: ImageRecord, axis: str, convention: Convention, both_orders: bool, mirror: bool
) -> list[dict[str, Any]]:
    turn = mirror and axis == "horizontal"
    asked = _released_pairs(image.objects, axis, both_orders)
    return [
        {
            **_head(image, axis, number, mirror),
            "prompt": RELEASED_QUESTION.format(seen_from=seen_from.category, located=located.category),
            "reference": spatial_word(OPPOSITE[side] if turn else side, convention),
            "icl_prompt": None,
            "icl_reference": None,
            "subject": _place(located, image, mirror),
            "object": _place(seen_from, image, mirror),
            "third": None,
        }
        for number, (seen_from, located, side) in enumerate(asked)
    ]


def _released_pairs(
    objects: Sequence[ObjectRecord], axis: str, both_orders: bool
) -> Iterator[tuple[ObjectRecord, ObjectRecord, str]]:
    """(seen from, located, side of the located one), objects by their left (or upper) edge as in the release."""
    (start, end), (near, far) = _ENDS[axis], _WORDS[axis]
    ordered = sorted(objects, key=lambda thing: (thing.box_xyxy[start], thing.id))
    for first, second in combinations(ordered, 2):
        if first.box_xyxy[end] < second.box_xyxy[start]:
            yield first, second, far
            if both_orders:
                yield second, first, near


def _half(thing: ObjectRecord, image: ImageRecord, axis: str) -> bool:
    """Whether the box centre lies in the right (or lower) half of the image."""
    start, end = _ENDS[axis]
    return thing.box_xyxy[start] + thing.box_xyxy[end] > (image.width if axis == "horizontal" else image.height)


def _area(thing: ObjectRecord) -> float:
    x1, y1, x2, y2 = thing.box_xyxy
    return (x2 - x1) * (y2 - y1)


def _head(image: ImageRecord, axis: str, number: int, mirror: bool) -> dict[str, Any]:
    head = {
        "id": f"{image.id}-{axis}-{number}{MIRRORED if mirror else ''}",
        "task": "coco-spatial",
        "image": image.file_name,
        "width": image.width,
        "height": image.height,
    }
    return {**head, "mirror": True} if mirror else head


def _place(thing: ObjectRecord, image: ImageRecord, mirror: bool) -> dict[str, Any]:
    x1, y1, x2, y2 = thing.box_xyxy
    box = [image.width - x2, y1, image.width - x1, y2] if mirror else [x1, y1, x2, y2]
    return {"category": thing.category, "box": box}
