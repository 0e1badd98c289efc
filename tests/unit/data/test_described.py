"""What a captioner is taught: an object by the side of another."""

from pathlib import Path

from locvlm.data.captions import normalise_caption
from locvlm.data.coco import Instances, read_instances
from locvlm.data.described import build_described
from locvlm.prompts import caption_question
from locvlm.records import ImageRecord, ObjectRecord


def _described(*objects: ObjectRecord, width: int = 100) -> dict[str, str]:
    image = ImageRecord(7, "7.png", width, 50, objects)
    found = list(build_described(Instances([image], ["tent", "book", "plum"])))
    assert all(one.turns[0].question == caption_question(one.turns[0].category) for one in found)
    assert [one.id for one in found] == [f"7-described-{thing.id}" for thing in objects if not thing.is_crowd]
    return {one.turns[0].category: one.turns[0].answer for one in found}


def _thing(key: int, category: str, centre: float) -> ObjectRecord:
    return ObjectRecord(key, category, (centre - 5, 0, centre + 5, 10))


def test_it_is_told_by_the_object_that_is_farthest_away_sideways() -> None:
    found = _described(_thing(1, "tent", 10), _thing(2, "book", 40), _thing(3, "plum", 90))
    assert found == {
        "tent": "The tent is located to the left of plum.",
        "book": "The book is located to the left of plum.",
        "plum": "The plum is located to the right of tent.",
    }


def test_what_is_not_clearly_apart_is_with_the_other() -> None:
    assert _described(_thing(1, "tent", 10), _thing(2, "book", 24.9)) == {
        "tent": "The tent is with the book.",
        "book": "The book is with the tent.",
    }
    assert _described(_thing(1, "tent", 10), _thing(2, "book", 25))["book"] == (
        "The book is located to the right of tent."
    )


def test_alone_it_is_the_one_object() -> None:
    crowd = ObjectRecord(2, "plum", (50, 0, 60, 10), is_crowd=True)
    assert _described(_thing(1, "tent", 10), crowd) == {"tent": "The tent is the one object in this image."}


def test_the_answer_reads_as_a_description_in_place_of_a_name() -> None:
    found = _described(_thing(1, "tent", 10), _thing(2, "book", 40))
    assert normalise_caption(found["tent"], "tent") == "tent that is located to the left of book"


def test_real_annotations(realdata: Path) -> None:
    instances = read_instances(realdata / "coco_annotations" / "coco128_instances_train2017.json")
    found = list(build_described(instances))
    assert len(found) > 100
    assert len({one.id for one in found}) == len(found)
    assert all(turn.answer.startswith(f"The {turn.category} is ") for one in found for turn in one.turns)
