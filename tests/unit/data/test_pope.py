import json
import re
from collections import Counter
from pathlib import Path

import pytest

from locvlm.data.coco import Instances, read_instances
from locvlm.data.names import coco_image_id
from locvlm.data.pope import FEW_ABSENT, FEW_OBJECTS, NOT_DRAWN, STRATEGIES, PopeSet, build_pope, pope_question
from locvlm.errors import DataError
from locvlm.evaluation.presence import question
from locvlm.records import ImageRecord, ObjectRecord

NAMES = ["apple", "book", "cat", "dog", "elephant", "fork", "tie", "zebra"]


def _image(number: int, *names: str) -> ImageRecord:
    return ImageRecord(
        number, f"{number}.jpg", 64, 48, tuple(ObjectRecord(i, n, (0, 0, 5, 5)) for i, n in enumerate(names))
    )


def _no(found: PopeSet, image: str) -> list[str]:
    texts = [row["text"] for row in found.rows if row["image"] == image and row["label"] == "no"]
    return [re.fullmatch(r"Is there an? (.+) in the image\?", text)[1] for text in texts]  # type: ignore[index]


@pytest.fixture(scope="module")
def official(realdata: Path) -> list[dict[str, str]]:
    lines = (realdata / "pope" / "coco_pope_random.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows_have_the_form_of_the_official_files_and_evaluation_reads_them() -> None:
    found = build_pope(Instances([_image(7, "cat", "dog", "tie")], NAMES), "random", 0, 1)
    assert [row["label"] for row in found.rows] == ["yes", "no"] * 3
    assert [row["question_id"] for row in found.rows] == [1, 2, 3, 4, 5, 6]
    assert all(list(row) == ["question_id", "image", "text", "label"] for row in found.rows)
    assert found.counts == {"images": 1, "questions": 6, "yes": 3, "no": 3}
    read = question(found.rows[0])
    assert (read.id, read.image, read.reference) == ("1", "7.jpg", "yes")


def test_articles_are_those_of_the_released_file(official: list[dict[str, str]]) -> None:
    pattern = re.compile(r"Is there an? (.+) in the ima(?:ge|nge)\?")
    for row in official:
        name = pattern.fullmatch(row["text"])[1]  # type: ignore[index]
        assert pope_question(name) == row["text"].replace("imange", "image")  # this old file has the typo
    assert pope_question("umbrella") == "Is there an umbrella in the image?"
    assert pope_question("skis") == "Is there a skis in the image?"


def test_an_image_of_the_released_file_has_no_more_than_three_objects(
    realdata: Path, official: list[dict[str, str]]
) -> None:
    """So three objects are enough, as in the generator's code, and its three are the three that are asked for."""
    instances = read_instances(realdata / "coco_annotations" / "instances_val2014_100.json")
    (image,) = [image for image in instances.images if image.id == 1171]
    asked = [row for row in official if coco_image_id(row["image"]) == 1171]
    ours = build_pope(Instances([image], instances.categories), "random", 0, 1)
    assert {row["text"] for row in ours.rows if row["label"] == "yes"} == {
        row["text"] for row in asked if row["label"] == "yes"
    }
    assert len({thing.category for thing in image.objects}) == 3


def test_popular_asks_for_what_most_images_of_the_file_show() -> None:
    images = [_image(1, "cat", "dog", "tie")] + [_image(n, "fork", "fork", "fork", "zebra") for n in range(2, 5)]
    images += [_image(5, "zebra"), _image(6, "book"), _image(7, "apple")]
    found = build_pope(Instances(images, NAMES), "popular", 0, 1)
    assert _no(found, "1.jpg") == [
        "zebra",
        "fork",
        "apple",
    ]  # images 4, 3, 1; a tie goes by the order of the categories


def test_adversarial_asks_for_what_goes_with_the_object_just_asked_about() -> None:
    images = [_image(1, "cat", "dog", "tie")]
    images += [_image(n, "cat", "fork") for n in range(2, 5)]
    images += [
        _image(5, "dog", "zebra"),
        _image(6, "dog", "zebra"),
        _image(7, "dog", "fork"),
        _image(8, "tie", "apple"),
    ]
    for seed in range(10):
        texts = [row["text"] for row in build_pope(Instances(images, NAMES), "adversarial", seed, 1).rows]
        assert dict(zip(texts[::2], texts[1::2], strict=True)) == {
            "Is there a cat in the image?": "Is there a fork in the image?",
            "Is there a dog in the image?": "Is there a zebra in the image?",
            "Is there a tie in the image?": "Is there an apple in the image?",
        }


def test_adversarial_draws_where_nothing_goes_with_an_object() -> None:
    drawn = {
        tuple(
            sorted(_no(build_pope(Instances([_image(1, "cat", "dog", "tie")], NAMES), "adversarial", seed, 1), "1.jpg"))
        )
        for seed in range(40)
    }
    assert len(drawn) > 3


def test_the_strategies_share_images_and_present_objects(realdata: Path) -> None:
    instances = read_instances(realdata / "coco_annotations" / "instances_val2014_100.json")
    sets = [build_pope(instances, strategy, 5, 40) for strategy in STRATEGIES]
    present = [[(row["image"], row["text"]) for row in found.rows if row["label"] == "yes"] for found in sets]
    assert present[0] == present[1] == present[2]
    absent = [[row["text"] for row in found.rows if row["label"] == "no"] for found in sets]
    assert absent[0] != absent[1] != absent[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "name", ["coco_mini_instances_train2017", "coco128_instances_train2017", "instances_val2014_100"]
)
def test_on_real_annotations_every_label_is_true(realdata: Path, name: str, strategy: str) -> None:
    instances = read_instances(realdata / "coco_annotations" / f"{name}.json")
    present = {image.file_name: {thing.category for thing in image.objects} for image in instances.images}
    enough = sum(len(names) >= 3 for names in present.values())
    found = build_pope(instances, strategy, 0, enough)  # type: ignore[arg-type]
    assert found.counts == {"images": enough, "questions": 6 * enough, "yes": 3 * enough, "no": 3 * enough}
    assert found.skipped == {FEW_OBJECTS: len(instances.images) - enough}
    assert not found.notes
    for row in found.rows:
        asked = re.fullmatch(r"Is there an? (.+) in the image\?", row["text"])[1]  # type: ignore[index]
        assert asked in instances.categories
        assert (asked in present[row["image"]]) == (row["label"] == "yes")
    assert max(Counter((row["image"], row["text"]) for row in found.rows).values()) == 1


def test_a_seed_decides_images_and_objects() -> None:
    images = [_image(n, "cat", "dog", "tie", "fork") for n in range(30)]
    first = build_pope(Instances(images, NAMES), "random", 1, 10)
    assert first.rows == build_pope(Instances(images[::-1], NAMES), "random", 1, 10).rows
    assert first.rows != build_pope(Instances(images, NAMES), "random", 2, 10).rows
    assert first.notes == {NOT_DRAWN: 20}


def test_too_few_images_and_odd_numbers_are_refused() -> None:
    images = [_image(1, "cat", "dog", "tie"), _image(2, "cat"), _image(3, *NAMES)]
    assert build_pope(Instances(images, NAMES), "random", 0, 1).skipped == {FEW_OBJECTS: 1, FEW_ABSENT: 1}
    with pytest.raises(DataError, match="the annotations have 1; ask for fewer with --images-n"):
        build_pope(Instances(images, NAMES), "random", 0, 2)
    for per_image in (0, 1, 5):
        with pytest.raises(DataError, match="even number"):
            build_pope(Instances(images, NAMES), "random", 0, 1, per_image)
