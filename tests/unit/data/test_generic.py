import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from locvlm.data.coco import Instances, absent_categories, read_instances, usable_objects
from locvlm.data.generic import build_generic, joined_names, read_captions
from locvlm.errors import DataError
from locvlm.prompts import BRIEF_REQUESTS
from locvlm.records import Conversation, ImageRecord, ObjectRecord

NAMES = ["apple", "book", "cat", "dog", "fir tree"]


def _scene(*objects: tuple[str, tuple[float, float, float, float]], crowd: str = "") -> Instances:
    """One image of 100 x 200 pixels."""
    things = tuple(
        ObjectRecord(number, name, box, is_crowd=name == crowd) for number, (name, box) in enumerate(objects, 1)
    )
    return Instances([ImageRecord(7, "7.png", 100, 200, things)], NAMES)


def _of(conversations: list[Conversation], objective: str) -> list[tuple[str, str]]:
    return [(c.turns[0].question, c.turns[0].answer) for c in conversations if c.objective == objective]


PAIR = _scene(("dog", (0, 0, 20, 20)), ("cat", (40, 5, 60, 25)))  # centres (10, 10) and (50, 15)


def test_left_right_asks_every_ordered_pair_in_the_papers_words() -> None:
    assert _of(list(build_generic(PAIR, None, 0)), "left_right") == [
        ("Which side of dog is cat located?", "The cat is located to the right of dog."),
        ("Which side of cat is dog located?", "The dog is located to the left of cat."),
    ]


def test_above_below_needs_15_percent_of_the_height() -> None:
    assert _of(list(build_generic(PAIR, None, 0)), "above_below") == []  # 5 of 200 pixels apart
    lower = _scene(("dog", (0, 0, 20, 20)), ("cat", (40, 30, 60, 50)))  # exactly 30 of 200
    assert _of(list(build_generic(lower, None, 0)), "above_below") == [
        ("Which side of dog is cat located?", "The cat is located below dog."),
        ("Which side of cat is dog located?", "The dog is located above cat."),
    ]


@pytest.mark.parametrize(("shift", "n"), [(14.0, 0), (15.0, 2), (16.0, 2)])
def test_left_right_needs_15_percent_of_the_width(shift: float, n: int) -> None:
    scene = _scene(("dog", (0, 0, 20, 20)), ("cat", (shift, 100, 20 + shift, 120)))
    assert len(_of(list(build_generic(scene, None, 0)), "left_right")) == n


def test_only_unique_objects_are_asked_for_their_side() -> None:
    scene = _scene(
        ("dog", (0, 0, 9, 9)), ("cat", (40, 0, 60, 9)), ("cat", (80, 0, 99, 9)), ("book", (60, 9, 70, 19)), crowd="book"
    )
    assert _of(list(build_generic(scene, None, 0)), "left_right") == []


def test_presence_asks_for_as_many_present_as_absent_categories() -> None:
    turns = _of(list(build_generic(PAIR, None, 0)), "presence")
    assert Counter(answer for _, answer in turns) == {"Yes": 2, "No": 2}
    assert {question for question, answer in turns if answer == "Yes"} == {
        "Is there dog in image?",
        "Is there cat in image?",
    }
    one = _scene(("dog", (0, 0, 20, 20)), ("dog", (30, 0, 50, 20)))
    assert Counter(answer for _, answer in _of(list(build_generic(one, None, 0)), "presence")) == {"Yes": 1, "No": 1}


def test_a_crowd_region_is_present() -> None:
    scene = _scene(("dog", (0, 0, 20, 20)), ("book", (30, 0, 50, 20)), crowd="book")
    for seed in range(20):
        turns = _of(list(build_generic(scene, None, seed)), "presence")
        assert ("Is there book in image?", "Yes") in turns


def test_a_caption_is_one_of_those_given_and_its_request_one_of_llavas() -> None:
    given = {7: ["Two pets.", "A dog and a cat on grey."]}
    seen = set()
    for seed in range(40):
        ((question, answer),) = _of(list(build_generic(PAIR, given, seed)), "caption")
        assert question in BRIEF_REQUESTS
        seen.add((question, answer))
    assert {answer for _, answer in seen} == set(given[7])
    assert len({question for question, _ in seen}) > 5


def test_without_captions_the_answer_names_every_category_once() -> None:
    scene = _scene(
        ("dog", (0, 0, 9, 9)), ("apple", (20, 0, 29, 9)), ("dog", (40, 0, 49, 9)), ("fir tree", (60, 0, 69, 9))
    )
    ((_, answer),) = _of(list(build_generic(scene, {}, 0)), "caption")
    assert answer == "A photo of an apple, a dog and a fir tree."


def test_an_image_without_annotations_gives_a_caption_at_most() -> None:
    assert list(build_generic(_scene(), None, 0)) == []
    (only,) = build_generic(_scene(), {7: ["Nothing at all."]}, 0)
    assert only.objective == "caption"


def test_ids_are_stable_and_records_complete() -> None:
    conversations = list(build_generic(PAIR, None, 0))
    assert [c.id for c in conversations] == [
        "7-caption-0",
        "7-presence-0",
        "7-presence-1",
        "7-presence-2",
        "7-presence-3",
        "7-left_right-0",
        "7-left_right-1",
    ]
    assert all((c.image, c.width, c.height) == ("7.png", 100, 200) for c in conversations)
    assert all(len(c.turns) == 1 and c.turns[0].objective == c.objective for c in conversations)


def test_scenes_in_words_come_behind_and_change_nothing_else() -> None:
    plain, with_words = (list(build_generic(PAIR, None, 0, stated_bins=n_bins)) for n_bins in (0, 48))
    assert with_words[: len(plain)] == plain
    assert [c.id for c in with_words[len(plain) :]] == [
        "7-stated_left_right-0",
        "7-stated_above_below-0",
        "7-stated_left_right-1",
        "7-stated_above_below-1",
    ]
    assert not any(name in c.turns[0].question.split() for c in with_words[len(plain) :] for name in NAMES)


def test_draws_depend_on_seed_and_image_id_alone(realdata: Path) -> None:
    instances = read_instances(realdata / "coco_annotations" / "coco128_instances_train2017.json")
    whole = list(build_generic(instances, None, 5))
    assert whole == list(build_generic(instances, None, 5))
    assert whole != list(build_generic(instances, None, 6))
    last = Instances(instances.images[-1:], instances.categories)
    part = list(build_generic(last, None, 5))
    assert part == whole[-len(part) :]


def test_on_real_annotations_answers_agree_with_the_boxes(realdata: Path) -> None:
    instances = read_instances(realdata / "coco_annotations" / "coco_mini_instances_train2017.json")
    captions = read_captions(realdata / "coco_annotations" / "coco_mini_captions_train2017.json")
    images = {image.file_name: image for image in instances.images}
    sides: Counter[str] = Counter()
    presence: Counter[str] = Counter()
    ids = set()
    for conversation in build_generic(instances, captions, 0):
        image, turn = images[conversation.image], conversation.turns[0]
        ids.add(conversation.id)
        if turn.objective == "presence":
            presence[turn.answer] += 1
            absent = turn.category in absent_categories(image, instances.categories)
            assert turn.answer == ("No" if absent else "Yes")
        elif turn.objective in ("left_right", "above_below"):
            axis = 0 if turn.objective == "left_right" else 1
            boxes = {thing.category: thing.box_xyxy for thing in usable_objects(image)}
            located, _, rest = turn.answer.removeprefix("The ").partition(" is located ")
            side = next(word for word in ("left", "right", "above", "below") if word in rest.split())
            other = rest.removesuffix(".").split(f"{side} of " if axis == 0 else f"{side} ", 1)[1]
            assert turn.question == f"Which side of {other} is {located} located?"
            first, second = boxes[located], boxes[other]
            before = first[axis] + first[axis + 2] < second[axis] + second[axis + 2]
            assert side == ("left", "right", "above", "below")[2 * axis + (not before)]
            sides[side] += 1
        else:
            assert turn.answer in captions[image.id]
    assert sides["left"] == sides["right"] > 50
    assert sides["above"] == sides["below"] > 20
    assert presence["Yes"] == presence["No"] > 100
    assert len(ids) == sum(sides.values()) + sum(presence.values()) + 80


def test_captions_are_read_by_image_in_the_order_of_their_ids(tmp_path: Path) -> None:
    rows = [
        {"id": 9, "image_id": 1, "caption": "Second. "},
        {"id": 4, "image_id": 1, "caption": "First."},
        {"id": 5, "image_id": 2, "caption": "  "},
    ]
    random.Random(0).shuffle(rows)
    path = tmp_path / "captions.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"annotations": rows}).encode()))
    assert read_captions(path) == {1: ["First.", "Second."]}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ([], "no list 'annotations'"),
        ({"images": []}, "no list 'annotations'"),
        ({"annotations": [{"id": 1, "image_id": 1, "caption": "ok"}, {"id": 2, "bbox": []}]}, "annotation 1 needs"),
        ({"annotations": ["text"]}, "annotation 0 needs"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_place(tmp_path: Path, value: object, fault: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=fault):
        read_captions(path)


def test_names_are_joined_with_their_articles() -> None:
    assert joined_names(["book"]) == "a book"
    assert joined_names(["owl", "book"]) == "a book and an owl"
    assert joined_names(["traffic cone", "frog", "apple", "frog"]) == "an apple, a frog and a traffic cone"
    assert joined_names([]) == ""
