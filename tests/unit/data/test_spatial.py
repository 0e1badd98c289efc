import json
from pathlib import Path
from typing import Any

import pytest

from locvlm.data import spatial
from locvlm.data.coco import Instances, read_instances, usable_objects
from locvlm.data.spatial import SpatialSet, build_coco_spatial
from locvlm.errors import DataError
from locvlm.evaluation.spatial import direct_question, icl_question
from locvlm.prompts import OPPOSITE
from locvlm.records import ImageRecord, ObjectRecord

FILES = ("coco_mini_instances_train2017", "coco128_instances_train2017", "instances_val2014_100")


def _thing(number: int, name: str, centre: float, size: float = 10, crowd: bool = False, y: float = 50) -> ObjectRecord:
    return ObjectRecord(number, name, (centre - size / 2, y - size / 2, centre + size / 2, y + size / 2), crowd)


def _build(*things: ObjectRecord, rules: Any = "paper", axis: Any = "horizontal", **options: Any) -> SpatialSet:
    """One image of 100 x 100 pixels."""
    image = ImageRecord(3, "3.jpg", 100, 100, things)
    return build_coco_spatial(Instances([image], []), rules, axis, **options)


def _asked(found: SpatialSet) -> list[tuple[str, str]]:
    return [(row["prompt"], row["reference"]) for row in found.rows]


# a cat on the left, a dog (larger) and a tie on the right
CAT, DOG, TIE = _thing(1, "cat", 20), _thing(2, "dog", 80, 20), _thing(3, "tie", 90, 4)


def test_the_paper_rules_ask_the_largest_opposite_pair_in_both_orders() -> None:
    found = _build(CAT, DOG, TIE)
    assert _asked(found) == [
        ("Which side of cat is dog located?", "right"),
        ("Which side of dog is cat located?", "left"),
    ]
    assert found.counts == {"images": 1, "questions": 2, "left": 1, "right": 1}
    assert not found.skipped


def test_the_in_context_prompt_is_the_papers_and_answers_as_its_examples_do() -> None:
    first, second = _build(CAT, DOG, TIE).rows
    examples = (
        "Q: Which side of cat is dog located? A: The cat is located to the left of dog. "
        "Q: Which side of dog is cat located? A: The dog is located to the right of cat. "
    )
    assert first["icl_prompt"] == examples + "Q: Which side of tie is cat located?"
    assert first["icl_reference"] == "right"  # "The tie is located to the right of cat."
    assert second["icl_prompt"] == examples + "Q: Which side of cat is tie located?"
    assert second["icl_reference"] == "left"  # "The cat is located to the left of tie."


def test_obj_1_is_the_object_across_from_the_third() -> None:
    owl = _thing(4, "owl", 10, 4)  # the third lies with the cat, so the dog is obj_1
    first, _ = _build(CAT, DOG, owl).rows
    assert first["icl_prompt"].startswith("Q: Which side of dog is cat located? A: The dog is located to the right of")
    assert first["icl_prompt"].endswith("Q: Which side of owl is dog located?")
    assert first["icl_reference"] == "left"


def test_a_row_holds_what_evaluation_reads() -> None:
    found = _build(CAT, DOG, TIE)
    row = found.rows[0]
    assert {key: row[key] for key in ("id", "task", "image", "width", "height")} == {
        "id": "3-horizontal-0",
        "task": "coco-spatial",
        "image": "3.jpg",
        "width": 100,
        "height": 100,
    }
    assert row["subject"] == {"category": "dog", "box": [70.0, 40.0, 90.0, 60.0]}
    assert row["object"] == {"category": "cat", "box": [15.0, 45.0, 25.0, 55.0]}
    assert row["third"] == {"category": "tie", "box": [88.0, 48.0, 92.0, 52.0]}
    stored = json.loads(json.dumps(row))
    question = direct_question(stored)
    assert (question.id, question.prompt, question.reference) == (row["id"], row["prompt"], "right")
    assert (question.boxes["dog"], question.boxes["cat"]) == ((70, 40, 90, 60), (15, 45, 25, 55))
    assert icl_question(stored).reference == "right"


@pytest.mark.parametrize(("centre", "asked"), [(39.5, True), (40, False), (50, False), (60, False), (60.5, True)])
def test_a_centre_at_04_or_06_of_the_width_is_in_the_middle(centre: float, asked: bool) -> None:
    found = _build(CAT, DOG, _thing(3, "tie", centre))
    assert bool(found.rows) is asked
    assert found.skipped == ({} if asked else {spatial.NO_THIRD: 1})


def test_further_objects_in_the_middle_or_in_numbers_do_not_matter() -> None:
    extra = (_thing(4, "bed", 50, 60), _thing(5, "cup", 10), _thing(6, "cup", 30), _thing(7, "sky", 95, crowd=True))
    assert _build(CAT, DOG, TIE, *extra).rows == _build(CAT, DOG, TIE).rows


@pytest.mark.parametrize(
    ("things", "reason"),
    [
        ((CAT, DOG), spatial.FEW_OBJECTS),
        ((CAT, DOG, TIE, _thing(4, "tie", 10)), spatial.FEW_OBJECTS),
        ((CAT, DOG, TIE, _thing(4, "tie", 10, crowd=True)), spatial.FEW_OBJECTS),
        ((CAT, DOG, _thing(3, "tie", 90, crowd=True)), spatial.FEW_OBJECTS),
        ((CAT, _thing(2, "dog", 30), _thing(3, "tie", 10)), spatial.NO_OPPOSITE_PAIR),
        ((CAT, _thing(2, "dog", 50), _thing(3, "tie", 10)), spatial.NO_OPPOSITE_PAIR),
    ],
)
def test_an_image_that_breaks_a_rule_is_counted_by_reason(things: tuple[ObjectRecord, ...], reason: str) -> None:
    found = _build(*things)
    assert found.rows == []
    assert found.counts == {"images": 0, "questions": 0, "left": 0, "right": 0}
    assert found.skipped == {reason: 1}


def test_equal_areas_are_settled_by_annotation_id() -> None:
    owl, dog, cat, tie = (
        _thing(n, name, c) for n, name, c in [(1, "owl", 90), (2, "dog", 80), (5, "cat", 20), (6, "tie", 10)]
    )
    rows = _build(owl, dog, cat, tie).rows  # pairs (1, 5) (1, 6) (2, 5) (2, 6); then the third is object 2
    assert {rows[0]["subject"]["category"], rows[0]["object"]["category"]} == {"owl", "cat"}
    assert rows[0]["third"]["category"] == "dog"


def test_above_and_below_go_by_the_height() -> None:
    things = (_thing(1, "cat", 50, y=20), _thing(2, "dog", 50, 20, y=80), _thing(3, "tie", 50, 4, y=90))
    found = _build(*things, axis="vertical")
    assert _asked(found) == [
        ("Which side of cat is dog located?", "below"),
        ("Which side of dog is cat located?", "above"),
    ]
    assert found.counts == {"images": 1, "questions": 2, "above": 1, "below": 1}
    assert found.rows[0]["icl_prompt"].startswith(
        "Q: Which side of cat is dog located? A: The cat is located above dog."
    )
    assert found.rows[0]["icl_reference"] == "below"
    assert _build(*things).skipped == {spatial.NO_OPPOSITE_PAIR: 1}


def test_the_other_convention_turns_the_direct_answer_only() -> None:
    natural, turned = _build(CAT, DOG, TIE), _build(CAT, DOG, TIE, answer_convention="icl_example")
    assert [row["reference"] for row in turned.rows] == ["left", "right"]
    assert [row["icl_reference"] for row in turned.rows] == [row["icl_reference"] for row in natural.rows]
    assert turned.counts == natural.counts


def test_the_released_rules_ask_every_pair_with_a_gap_once_and_the_answer_is_right() -> None:
    # cat 15..25, dog 70..90, tie 88..92: dog and tie overlap
    found = _build(TIE, DOG, CAT, rules="released")
    assert _asked(found) == [
        ("Which side of the cat is the dog?", "right"),
        ("Which side of the cat is the tie?", "right"),
    ]
    assert found.counts == {"images": 1, "questions": 2, "left": 0, "right": 2}
    assert [row["subject"]["category"] for row in found.rows] == ["dog", "tie"]
    assert {row["third"] for row in found.rows} == {row["icl_prompt"] for row in found.rows} == {None}
    assert direct_question(found.rows[0]).reference == "right"


def test_the_released_rules_want_a_real_gap_and_know_no_middle() -> None:
    touching = (_thing(1, "cat", 45, 10), _thing(2, "dog", 55, 10))
    assert _build(*touching, rules="released").skipped == {spatial.NO_GAP: 1}
    apart = (_thing(1, "cat", 45, 10), _thing(2, "dog", 56, 10))
    assert _build(*apart, rules="released").counts["questions"] == 1
    assert _build(CAT, rules="released").skipped == {spatial.NO_TWO_OBJECTS: 1}


def test_the_released_rules_ignore_the_crowd_mark() -> None:
    crowd = _thing(2, "dog", 80, crowd=True)
    assert _build(CAT, crowd, rules="released").counts["questions"] == 1
    assert _build(CAT, crowd, DOG, rules="released").skipped == {spatial.NO_TWO_OBJECTS: 1}


def test_both_orders_balance_the_released_rules() -> None:
    found = _build(CAT, DOG, TIE, rules="released", both_orders=True)
    assert _asked(found)[:2] == [
        ("Which side of the cat is the dog?", "right"),
        ("Which side of the dog is the cat?", "left"),
    ]
    assert found.counts == {"images": 1, "questions": 4, "left": 2, "right": 2}


def test_the_released_rules_for_above_and_below_go_by_the_gap_in_height() -> None:
    things = (_thing(1, "cat", 50, y=20), _thing(2, "dog", 50, 20, y=80), _thing(3, "tie", 50, 4, y=85))
    found = _build(*things, rules="released", axis="vertical")
    assert _asked(found) == [
        ("Which side of the cat is the dog?", "below"),
        ("Which side of the cat is the tie?", "below"),
    ]
    assert found.counts == {"images": 1, "questions": 2, "above": 0, "below": 2}
    both = _build(*things, rules="released", axis="vertical", both_orders=True)
    assert both.counts == {"images": 1, "questions": 4, "above": 2, "below": 2}
    assert _build(*things, rules="released").skipped == {spatial.NO_GAP: 1}
    assert _build(CAT, DOG, rules="released", axis="vertical").skipped == {spatial.NO_VERTICAL_GAP: 1}


def test_every_question_has_a_twin_about_the_mirrored_image() -> None:
    plain = _build(CAT, DOG, TIE)
    found = _build(CAT, DOG, TIE, mirrored=True)
    assert found.rows[::2] == plain.rows
    assert found.counts == {"images": 1, "questions": 4, "left": 2, "right": 2, "mirrored": 2}
    for row, twin in zip(found.rows[::2], found.rows[1::2], strict=True):
        assert "mirror" not in row
        assert (twin["id"], twin["mirror"]) == (f"{row['id']}-mirrored", True)
        assert twin["prompt"] == row["prompt"]
        assert twin["reference"] == OPPOSITE[row["reference"]]
        assert twin["icl_reference"] == OPPOSITE[row["icl_reference"]]
        for role in ("subject", "object", "third"):
            x1, y1, x2, y2 = row[role]["box"]
            assert twin[role] == {"category": row[role]["category"], "box": [100 - x2, y1, 100 - x1, y2]}
        # the solved examples tell the truth about the mirrored image
        words = [OPPOSITE.get(word, word) for word in row["icl_prompt"].split()]
        assert twin["icl_prompt"].split() == words
    assert direct_question(found.rows[1]).mirror
    assert not direct_question(found.rows[0]).mirror


def test_a_mirrored_image_is_what_the_rules_would_ask_about_if_it_were_a_photograph() -> None:
    twins = _build(CAT, DOG, TIE, mirrored=True).rows[1::2]
    turned = [
        ObjectRecord(t.id, t.category, (100 - t.box_xyxy[2], t.box_xyxy[1], 100 - t.box_xyxy[0], t.box_xyxy[3]))
        for t in (CAT, DOG, TIE)
    ]
    for row, twin in zip(_build(*turned).rows, twins, strict=True):
        assert {key: twin[key] for key in row if key != "id"} == {key: row[key] for key in row if key != "id"}


def test_the_mirror_exchanges_left_and_right_but_not_above_and_below() -> None:
    things = (_thing(1, "cat", 50, y=20), _thing(2, "dog", 50, 20, y=80), _thing(3, "tie", 50, 4, y=90))
    for rules in ("paper", "released"):
        rows = _build(*things, rules=rules, axis="vertical", mirrored=True).rows
        assert [row["reference"] for row in rows[::2]] == [row["reference"] for row in rows[1::2]]
    released = _build(CAT, DOG, rules="released", mirrored=True)
    assert _asked(released) == [
        ("Which side of the cat is the dog?", "right"),
        ("Which side of the cat is the dog?", "left"),
    ]
    assert released.counts == {"images": 1, "questions": 2, "left": 1, "right": 1, "mirrored": 1}


@pytest.mark.parametrize(("rules", "axis"), [("official", "horizontal"), ("paper", "diagonal")])
def test_unknown_rules_or_axes_are_refused(rules: str, axis: str) -> None:
    with pytest.raises(DataError, match="needed are the rules paper or released"):
        _build(CAT, DOG, TIE, rules=rules, axis=axis)


def _real(realdata: Path, name: str) -> Instances:
    return read_instances(realdata / "coco_annotations" / f"{name}.json")


def test_image_133030_of_coco_mini_gives_the_umbrella_and_the_teddy_bear(realdata: Path) -> None:
    rows = [row for row in build_coco_spatial(_real(realdata, FILES[0])).rows if row["image"] == "000000133030.jpg"]
    assert [(row["id"], row["prompt"], row["reference"]) for row in rows] == [
        ("133030-horizontal-0", "Which side of teddy bear is umbrella located?", "right"),
        ("133030-horizontal-1", "Which side of umbrella is teddy bear located?", "left"),
    ]
    assert [(row["icl_prompt"].rpartition("Q: ")[2], row["icl_reference"]) for row in rows] == [
        ("Which side of bed is teddy bear located?", "right"),
        ("Which side of teddy bear is bed located?", "left"),
    ]


@pytest.mark.parametrize(
    ("name", "n_images", "n_without_third"), [(FILES[0], 11, 7), (FILES[1], 9, 2), (FILES[2], 10, 3)]
)
def test_counts_on_real_annotations(realdata: Path, name: str, n_images: int, n_without_third: int) -> None:
    """Counted with a separate script from the raw JSON; images + without third is the checksum row of the paper."""
    instances = _real(realdata, name)
    expected = json.loads((realdata / "coco_annotations" / "expected_counts.json").read_text())[f"{name}.json"]
    found = build_coco_spatial(instances)
    assert found.counts == {"images": n_images, "questions": 2 * n_images, "left": n_images, "right": n_images}
    assert found.skipped[spatial.NO_THIRD] == n_without_third
    assert n_images + found.skipped.total() == expected["images"]
    asked = {int(row["id"].split("-")[0]) for row in found.rows}
    strictest = set(expected["of_these_all_centres_outside_40_60_and_both_sides"])
    assert strictest <= asked, "images that pass under every reading"
    # a pair on opposite sides, and nothing else asked of the image
    n_two = sum(len(usable_objects(image)) == 2 and _has_pair(image) for image in instances.images)
    assert n_images + n_without_third + n_two == expected["images_with_unique_objects_on_both_sides"]


def _has_pair(image: ImageRecord) -> bool:
    centres = [(thing.box_xyxy[0] + thing.box_xyxy[2]) / 2 / image.width for thing in usable_objects(image)]
    return min(centres) < 0.4 and max(centres) > 0.6


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_every_answer_on_real_annotations_agrees_with_the_boxes(realdata: Path, name: str, axis: Any) -> None:
    found = build_coco_spatial(_real(realdata, name), "paper", axis)
    start, length, near, far = (
        (0, "width", "left", "right") if axis == "horizontal" else (1, "height", "above", "below")
    )
    assert found.counts[near] == found.counts[far] == found.counts["images"] > 0
    assert len({row["id"] for row in found.rows}) == len(found.rows)
    for row in found.rows:
        centre = {
            row[role]["category"]: (row[role]["box"][start] + row[role]["box"][start + 2]) / 2 / row[length]
            for role in ("subject", "object", "third")
        }
        assert len(centre) == 3
        assert all(not 0.4 <= value <= 0.6 for value in centre.values())
        subject, other = row["subject"]["category"], row["object"]["category"]
        assert row["prompt"] == f"Which side of {other} is {subject} located?"
        assert row["reference"] == (near if centre[subject] < centre[other] else far)
        first, second = row["icl_prompt"].rpartition("Q: Which side of ")[2].removesuffix(" located?").split(" is ")
        # as in the examples, the answer tells where the first named object is
        assert row["icl_reference"] == (near if centre[first] < centre[second] else far)
        assert (centre[first] < 0.4) != (centre[second] < 0.4)


@pytest.mark.parametrize("name", FILES)
def test_released_pairs_on_real_annotations_are_all_pairs_with_a_gap(realdata: Path, name: str) -> None:
    instances = _real(realdata, name)
    found = build_coco_spatial(instances, "released")
    expected = 0
    for image in instances.images:
        things = usable_objects(image, "singleton_ok")
        expected += sum(a.box_xyxy[2] < b.box_xyxy[0] for a in things for b in things)
    assert found.counts["questions"] == found.counts["right"] == expected > 50
    for row in found.rows:
        assert row["object"]["box"][2] < row["subject"]["box"][0]
