"""Requests for pseudo-captions, what becomes of the answers, and PRefCOCO."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locvlm.config import InstructConfig
from locvlm.data.captions import (
    LOST_BY_CROP,
    NO_CAPTION_LEFT,
    NO_OBJECT,
    NORMALISED,
    UNCAPTIONED,
    build_prefcoco,
    caption_requests,
    crowd_variants,
    normalise_caption,
    normalise_captions,
)
from locvlm.data.coco import Instances, read_instances
from locvlm.geometry import ImageGeometry
from locvlm.records import ImageRecord, ObjectRecord, Turn, read_json

CATEGORIES = ["dog", "hot dog", "traffic light", "tv", "skis", "person", "c++ (old)"]


def thing(key: int, category: str, crowd: bool = False, x: float = 10) -> ObjectRecord:
    return ObjectRecord(key, category, (x, 10, x + 20, 30), crowd)


def instances(*images: tuple[ObjectRecord, ...]) -> Instances:
    records = [ImageRecord(n, f"{n}.jpg", 100, 50, objects) for n, objects in enumerate(images, 1)]
    return Instances(records, ["dog", "cat", "cup"])


PARK = instances(
    (thing(1, "dog"), thing(2, "cat"), thing(3, "cup"), thing(4, "cup")),
    (thing(5, "dog"), thing(6, "dog", crowd=True)),
    (thing(7, "cat", crowd=True),),
    (),
)


@pytest.mark.parametrize(
    ("raw", "category", "expected"),
    [
        ("The dog is brown.", "dog", "dog that is brown"),
        ("A cow is lying down in a field.\n", "cow", "cow that is lying down in a field"),
        ("An apple is on the table.", "apple", "apple that is on the table"),
        ("The skis are on the snow.", "skis", "skis that is on the snow"),
        ("The dog in the image is a brown and white dog, and it is tired.", "dog", None),
        ("the hot dog in this image is in a bun", "hot dog", "hot dog that is in a bun"),
        ("The TV is on. It shows a film.", "tv", "tv that is on"),
        ("  The  dog\tis\nbrown . ", "dog", "dog that is brown"),
        ("The dog is 1.5 m from the door.", "dog", "dog that is 1.5 m from the door"),
        ("The dog is asleep! Do not wake it.", "dog", "dog that is asleep!"),
        ("The dog is next to Mr. Smith. He smiles.", "dog", "dog that is next to Mr. Smith"),
        ("The dog sits on a couch.", "dog", "dog sits on a couch"),
        ("A dog, which is brown, sits.", "dog", "dog, which is brown, sits"),
        ("The dog in the image.", "dog", "dog"),
        ("A brown dog is sitting.", "dog", "A brown dog is sitting"),
        ("The dogs are here.", "dog", "The dogs are here"),
        ("The hot dog is hot.", "dog", "The hot dog is hot"),
        ("dog that is brown", "dog", "dog that is brown"),
        ("In the image, the dog is brown.", "dog", "In the image, the dog is brown"),
        ("The x.y is red.", "x.y", "x.y that is red"),
        ("The xay is red.", "x.y", "The xay is red"),
        ("", "dog", ""),
        (" ... ", "dog", ""),
    ],
)
def test_an_answer_becomes_a_description(raw: str, category: str, expected: str | None) -> None:
    wanted = "dog that is a brown and white dog, and it is tired" if expected is None else expected
    assert normalise_caption(raw, category) == wanted


words = st.sampled_from(
    ["The", "a", "An", "in the image", "is", "are", "dog", "hot dog", "brown.", "Mr.", "?", "...", "B."]
)
texts = st.one_of(st.text(max_size=60), st.lists(words, max_size=12).map(" ".join))


@given(texts, st.sampled_from(CATEGORIES))
def test_normalising_twice_is_normalising_once(raw: str, category: str) -> None:
    once = normalise_caption(raw, category)
    assert normalise_caption(once, category) == once


@given(texts, st.sampled_from(CATEGORIES))
def test_a_description_is_one_line_without_a_full_stop(raw: str, category: str) -> None:
    caption = normalise_caption(raw, category)
    assert caption == " ".join(caption.split())
    assert not caption.endswith(".")
    assert bool(caption) <= any(character.isalnum() for character in raw)


@given(
    st.sampled_from(["The", "A", "an"]),
    st.sampled_from(["", " in the image", " in this image"]),
    st.sampled_from(CATEGORIES),
)
def test_the_form_of_the_paper_is_always_reached(article: str, where: str, category: str) -> None:
    for verb in ("is", "are"):
        raw = f"{article} {category}{where} {verb} lying down, left of a tree."
        assert normalise_caption(raw, category) == f"{category} that is lying down, left of a tree"


def test_there_is_one_request_for_each_unique_object_image_by_image() -> None:
    requests = caption_requests(PARK)
    assert [(r.id, r.image_id, r.image, r.category) for r in requests] == [
        (1, 1, "1.jpg", "dog"),
        (2, 1, "1.jpg", "cat"),
    ]
    assert (requests[0].width, requests[0].height, requests[0].box_xyxy) == (100, 50, (10, 10, 30, 30))
    assert requests[0].prompt == (
        "Describe the dog in this image using one short sentence, referring to its visual features and spatial "
        "position relative to other objects in image."
    )
    assert [r.id for r in caption_requests(PARK, "ignored_singleton_ok")] == [1, 2, 5, 7]


def test_the_four_rules_for_crowd_regions_are_counted() -> None:
    assert crowd_variants(PARK) == {
        "counts": {"images": 1, "objects": 2},
        "ignored": {"images": 2, "objects": 3},
        "singleton_ok": {"images": 2, "objects": 3},
        "ignored_singleton_ok": {"images": 3, "objects": 4},
    }


def test_captions_of_a_file_are_normalised_by_the_category_of_their_object() -> None:
    captions = {1: "The dog is brown.", 2: "cat that is black", 3: "...", 99: "of nothing"}
    assert normalise_captions(captions, PARK) == ({1: "dog that is brown", 2: "cat that is black"}, 1)


def test_every_captioned_object_gives_a_pair_of_turns() -> None:
    captions = {1: "The dog is brown.", 2: "cat that is black", 3: "A cup", 99: "of nothing"}
    built = build_prefcoco(PARK, InstructConfig(), captions)
    (conversation,) = list(built)
    assert (conversation.id, conversation.image, conversation.objective) == ("1-prefcoco", "1.jpg", "prefcoco")
    box = (10, 10, 30, 30)
    assert conversation.turns == (
        Turn("loc_pred", "dog", "dog that is brown", box),
        Turn("rev_loc", "dog", "dog that is brown", box),
        Turn("loc_pred", "cat", "cat that is black", box),
        Turn("rev_loc", "cat", "cat that is black", box),
    )
    assert built.skipped == {NO_OBJECT: 3}
    assert built.notes == {NORMALISED: 1}


def test_objects_without_a_caption_are_counted_and_left_out() -> None:
    park = instances((thing(1, "dog"), thing(2, "cat")), (thing(3, "cup"),))
    built = build_prefcoco(park, InstructConfig(), {2: "cat that is black", 3: " . "})
    assert [[turn.category for turn in c.turns] for c in built] == [["cat", "cat"]]
    assert built.skipped == {UNCAPTIONED: 2, NO_CAPTION_LEFT: 1}


def test_a_pair_can_be_a_conversation_of_its_own() -> None:
    built = build_prefcoco(PARK, InstructConfig(grouping="qa"), {1: "dog", 2: "cat"})
    found = [(c.id, c.objective, len(c.turns)) for c in built]
    assert found == [(f"1-prefcoco-{n}", ("loc_pred", "rev_loc")[n % 2], 1) for n in range(4)]


def test_objects_that_the_crop_loses_are_left_out() -> None:
    park = instances((thing(1, "dog", x=0), thing(2, "cat", x=40)))
    built = build_prefcoco(park, InstructConfig(), {1: "dog", 2: "cat"}, ImageGeometry("crop", 48))
    assert [turn.category for turn in next(built).turns] == ["cat", "cat"]
    assert list(built) == []
    assert built.skipped == {LOST_BY_CROP: 1}


@pytest.mark.parametrize("name", ["coco128_instances_train2017.json", "coco_mini_instances_train2017.json"])
def test_real_annotations_give_the_expected_requests(realdata: Path, name: str) -> None:
    folder = realdata / "coco_annotations"
    expected = read_json(folder / "expected_counts.json")[name]["image_category_pairs_with_exactly_one_annotation"]
    found = read_instances(folder / name)
    requests = caption_requests(found)
    crowd = {thing.id for image in found.images for thing in image.objects if thing.is_crowd}
    assert len(caption_requests(found, "singleton_ok")) == expected
    assert not crowd & {request.id for request in requests}
    assert [request.image_id for request in requests] == sorted(request.image_id for request in requests)
    variants = crowd_variants(found)
    assert variants["counts"] == {"images": len({r.image_id for r in requests}), "objects": len(requests)}
    captions = {request.id: f"The {request.category} is here." for request in requests}
    turns = [turn for conversation in build_prefcoco(found, InstructConfig(), captions) for turn in conversation.turns]
    assert len(turns) == 2 * len(requests)
    assert all(turn.description == f"{turn.category} that is here" for turn in turns)
