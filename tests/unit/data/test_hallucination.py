from collections import Counter
from pathlib import Path

import pytest

from locvlm.data.coco import Instances, absent_categories, read_instances
from locvlm.data.hallucination import FEW_ABSENT, FEW_PRESENT, Shown, ask_presence, build_presence
from locvlm.errors import DataError
from locvlm.evaluation.presence import question
from locvlm.records import ImageRecord, ObjectRecord

NAMES = ["apple", "book", "cat", "dog", "tie"]


def _image(number: int, *names: str, crowd: str = "") -> ImageRecord:
    things = tuple(ObjectRecord(i, name, (0, 0, 5, 5), name == crowd) for i, name in enumerate(names))
    return ImageRecord(number, f"{number}.jpg", 64, 48, things)


def test_every_image_is_asked_for_two_present_and_two_absent_categories() -> None:
    found = build_presence(Instances([_image(1, "cat", "dog", "dog"), _image(2, "tie", "cat")], NAMES), 0)
    assert found.counts == {"images": 2, "questions": 8, "yes": 4, "no": 4}
    assert not found.skipped
    first = [row for row in found.rows if row["image"] == "1.jpg"]
    assert {row["category"] for row in first if row["reference"] == "yes"} == {"cat", "dog"}
    assert {row["category"] for row in first if row["reference"] == "no"} < {"apple", "book", "tie"}
    assert [row["id"] for row in first] == ["1-presence-0", "1-presence-1", "1-presence-2", "1-presence-3"]


def test_a_row_asks_in_the_papers_words_and_evaluation_reads_it() -> None:
    (row, _) = build_presence(Instances([_image(1, "cat")], ["cat", "tie"]), 0, per_image=1).rows
    assert row == {
        "id": "1-presence-0",
        "task": "presence",
        "image": "1.jpg",
        "width": 64,
        "height": 48,
        "prompt": "Is there cat in image?",
        "reference": "yes",
        "category": "cat",
    }
    assert question(row).reference == "yes"


def test_images_with_too_few_categories_are_counted_by_reason() -> None:
    images = [_image(1, "cat"), _image(2), _image(3, "apple", "book", "cat", "dog"), _image(4, "cat", "cat")]
    found = build_presence(Instances(images, NAMES), 0)
    assert found.rows == []
    assert found.counts == {"images": 0, "questions": 0, "yes": 0, "no": 0}
    assert found.skipped == {FEW_PRESENT: 3, FEW_ABSENT: 1}


def test_a_crowd_region_is_present_and_never_asked_as_absent() -> None:
    instances = Instances([_image(1, "cat", "dog", crowd="dog")], NAMES)
    for seed in range(30):
        rows = build_presence(instances, seed).rows
        assert {row["category"] for row in rows if row["reference"] == "yes"} == {"cat", "dog"}
        assert "dog" not in {row["category"] for row in rows if row["reference"] == "no"}


def test_absent_categories_are_drawn_uniformly() -> None:
    images = [_image(number, "cat", "dog") for number in range(600)]
    rows = build_presence(Instances(images, NAMES), 0).rows
    drawn = Counter(row["category"] for row in rows if row["reference"] == "no")
    assert drawn.total() == 1200
    assert all(abs(drawn[name] - 400) < 60 for name in ("apple", "book", "tie"))


def test_draws_depend_on_seed_and_image_id_alone() -> None:
    images = [_image(number, "cat", "dog", "tie") for number in range(20)]
    whole = build_presence(Instances(images, NAMES), 1).rows
    assert whole == build_presence(Instances(images, NAMES), 1).rows
    assert whole != build_presence(Instances(images, NAMES), 2).rows
    assert build_presence(Instances(images[5:6], NAMES), 1).rows == whole[20:24]


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(DataError, match="at least 1"):
        build_presence(Instances([_image(1, "cat")], NAMES), 0, per_image=0)


@pytest.mark.parametrize(
    "name", ["coco_mini_instances_train2017", "coco128_instances_train2017", "instances_val2014_100"]
)
def test_on_real_annotations_no_absent_category_is_in_the_image(realdata: Path, name: str) -> None:
    instances = read_instances(realdata / "coco_annotations" / f"{name}.json")
    images = {image.file_name: image for image in instances.images}
    found = build_presence(instances, 0)
    enough = sum(len({thing.category for thing in image.objects}) >= 2 for image in instances.images)
    assert found.counts == {"images": enough, "questions": 4 * enough, "yes": 2 * enough, "no": 2 * enough}
    assert found.counts["images"] + found.skipped[FEW_PRESENT] == len(instances.images)
    assert len({row["id"] for row in found.rows}) == len(found.rows)
    for row in found.rows:
        absent = row["category"] in absent_categories(images[row["image"]], instances.categories)
        assert row["reference"] == ("no" if absent else "yes")
        assert row["category"] in instances.categories


def test_questions_about_a_video_say_so_and_have_no_size() -> None:
    (row, other) = ask_presence([Shown("v_a.mp4", "v_a.mp4", ["cat"], ["sky-other"], medium="video")], 0, 1).rows
    assert row == {
        "id": "v_a.mp4-presence-0",
        "task": "presence",
        "image": "v_a.mp4",
        "medium": "video",
        "prompt": "Is there cat in video?",
        "reference": "yes",
        "category": "cat",
    }
    assert (question(row).reference, question(other).reference) == ("yes", "no")
    assert ask_presence([], 0, 2).counts == {"images": 0, "questions": 0, "yes": 0, "no": 0}


def test_the_order_in_which_present_categories_are_listed_changes_nothing() -> None:
    first = ask_presence([Shown("a", "a.jpg", ["cat", "dog", "tie"], ["book", "apple"])], 3).rows
    assert first == ask_presence([Shown("a", "a.jpg", ["tie", "cat", "dog"], ["book", "apple"])], 3).rows
