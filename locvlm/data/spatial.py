"""COCO-Spatial: which side of X is Y? Two rule sets, the paper's (section 4.2, appendix E) and its code release's."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from locvlm.data.coco import Instances, usable_objects
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
RELEASED_QUESTION = "Which side of the {left} is the {right}?"

FEW_OBJECTS = "fewer than three unique objects"
NO_OPPOSITE_PAIR = "no two unique objects on opposite sides of the middle fifth"
NO_THIRD = "two unique objects on opposite sides of the middle fifth, but no third one outside it"
NO_TWO_OBJECTS = "fewer than two unique objects"
NO_GAP = "no unique object wholly to the left of another"

_WORDS: dict[str, tuple[str, str]] = {"horizontal": ("left", "right"), "vertical": ("above", "below")}


@dataclass(frozen=True, slots=True)
class SpatialSet:
    """`rows`: the lines of questions.jsonl. `counts`: images, questions, and questions by answer (left and right, or
    above and below). `skipped`: reason -> images without a question."""

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

    `released` (meant for val2014, horizontal only). The rule of the authors' code: unique objects (a lone crowd region
    is one), every pair in which one box ends before the other begins, asked once: the answer is always right. The
    release balances that with mirrored images; here `both_orders` asks each pair the other way round as well. No
    third object, no in-context prompt.

    A row has `subject` (the object whose place is asked for) and `object` (from where it is seen), each with category
    and box (x1, y1, x2, y2) in pixels. `reference` is the side of the subject, read naturally, or the opposite word
    with `answer_convention` icl_example. `icl_reference` follows the solved examples, whose answers say where the
    first named object is. Raises DataError for unknown rules or axis and for `released` with the vertical axis.
    """
    if rules not in ("paper", "released") or axis not in _WORDS:
        raise DataError(
            f"building COCO-Spatial: the rules are {rules!r} and the axis is {axis!r}; needed are the rules paper or "
            "released and the axis horizontal or vertical"
        )
    if rules == "released" and axis == "vertical":
        raise DataError(
            "building COCO-Spatial: the released rules know left and right only; take --axis horizontal, or "
            "--rules paper for above and below"
        )
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    n_images = 0
    for image in instances.images:
        if rules == "paper":
            found = _paper_rows(image, axis, answer_convention)
        else:
            found = _released_rows(image, answer_convention, both_orders)
        if isinstance(found, str):
            skipped[found] += 1
            continue
        n_images += 1
        rows.extend(found)
    words = Counter(row["reference"] for row in rows)
    counts = {"images": n_images, "questions": len(rows), **{word: words[word] for word in _WORDS[axis]}}
    return SpatialSet(rows, counts, skipped)


def _paper_rows(image: ImageRecord, axis: str, convention: Convention) -> list[dict[str, Any]] | str:
    """The two rows of an image, or why it has none."""
    objects = usable_objects(image)
    if len(objects) < 3:
        return FEW_OBJECTS
    sides = {thing.id: side for thing in objects if (side := _side(thing, image, axis))}
    placed = [thing for thing in objects if thing.id in sides]
    pairs = [(a, b) for a, b in combinations(placed, 2) if sides[a.id] != sides[b.id]]
    if not pairs:
        return NO_OPPOSITE_PAIR
    if len(placed) < 3:
        return NO_THIRD
    # objects ascend by annotation id, and max() and min() keep the first of equals
    pair = max(pairs, key=lambda pair: _area(pair[0]) + _area(pair[1]))
    third = max((thing for thing in placed if thing not in pair), key=_area)
    first, second = pair if sides[pair[0].id] != sides[third.id] else pair[::-1]
    word = sides[first.id]
    names = (first.category, second.category, third.category)
    icl = spatial_icl_question(*names, word)
    question = spatial_direct_question(third.category, first.category)
    turned = icl.removesuffix(question) + spatial_direct_question(first.category, third.category)
    asked = (
        # seen from, located, side of the located one; in-context: prompt, side of the one it asks for
        (first, second, OPPOSITE[word], icl, word),
        (second, first, word, turned, OPPOSITE[word]),
    )
    return [
        {
            "id": f"{image.id}-{axis}-{number}",
            "task": "coco-spatial",
            "image": image.file_name,
            "width": image.width,
            "height": image.height,
            "prompt": spatial_direct_question(seen_from.category, located.category),
            "reference": spatial_word(side, convention),
            "icl_prompt": icl_prompt,
            "icl_reference": spatial_word(icl_side, "icl_example"),
            "subject": _place(located),
            "object": _place(seen_from),
            "third": _place(third),
        }
        for number, (seen_from, located, side, icl_prompt, icl_side) in enumerate(asked)
    ]


def _released_rows(image: ImageRecord, convention: Convention, both_orders: bool) -> list[dict[str, Any]] | str:
    objects = usable_objects(image, "singleton_ok")
    if len(objects) < 2:
        return NO_TWO_OBJECTS
    asked = list(_released_pairs(objects, both_orders))
    if not asked:
        return NO_GAP
    return [
        {
            "id": f"{image.id}-horizontal-{number}",
            "task": "coco-spatial",
            "image": image.file_name,
            "width": image.width,
            "height": image.height,
            "prompt": RELEASED_QUESTION.format(left=seen_from.category, right=located.category),
            "reference": spatial_word(side, convention),
            "icl_prompt": None,
            "icl_reference": None,
            "subject": _place(located),
            "object": _place(seen_from),
            "third": None,
        }
        for number, (seen_from, located, side) in enumerate(asked)
    ]


def _released_pairs(
    objects: Sequence[ObjectRecord], both_orders: bool
) -> Iterator[tuple[ObjectRecord, ObjectRecord, str]]:
    """(seen from, located, side of the located one), objects by their left edge as in the release."""
    ordered = sorted(objects, key=lambda thing: (thing.box_xyxy[0], thing.id))
    for left, right in combinations(ordered, 2):
        if left.box_xyxy[2] < right.box_xyxy[0]:
            yield left, right, "right"
            if both_orders:
                yield right, left, "left"


def _side(thing: ObjectRecord, image: ImageRecord, axis: str) -> str | None:
    """The side of the middle fifth on which the box centre lies, None inside it."""
    near, far = _WORDS[axis]
    start, end, length = (0, 2, image.width) if axis == "horizontal" else (1, 3, image.height)
    tenfold = 5 * (thing.box_xyxy[start] + thing.box_xyxy[end])  # 10 x centre: whole pixels stay exact
    if tenfold < 4 * length:
        return near
    return far if tenfold > 6 * length else None


def _area(thing: ObjectRecord) -> float:
    x1, y1, x2, y2 = thing.box_xyxy
    return (x2 - x1) * (y2 - y1)


def _place(thing: ObjectRecord) -> dict[str, Any]:
    return {"category": thing.category, "box": list(thing.box_xyxy)}
