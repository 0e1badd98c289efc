"""Localize-Instruct: which turns an image gives, what they say, and that nothing depends on the order of the work."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from locvlm.config import CoordinateConfig, InstructConfig, PromptConfig
from locvlm.coordinates import make_location_format
from locvlm.data import instruct
from locvlm.data.coco import CrowdRule, Instances, absent_categories, read_instances, usable_objects
from locvlm.data.instruct import (
    Renderer,
    build_localize_instruct,
    draw,
    draws,
    frozen,
    read_object_captions,
    template_draws,
)
from locvlm.errors import DataError
from locvlm.geometry import ImageGeometry
from locvlm.prompts import LOC_PROMPTS, REV_PROMPTS
from locvlm.records import Conversation, ImageRecord, ObjectRecord, Turn

CATEGORIES = [f"thing {k}" for k in range(12)]


def thing(key: int, category: int, box: Any = (10.0, 20.0, 30.0, 60.0), crowd: bool = False) -> ObjectRecord:
    return ObjectRecord(key, CATEGORIES[category], box, crowd)


def picture(key: int, *things: ObjectRecord) -> ImageRecord:
    return ImageRecord(key, f"{key}.jpg", 100, 80, things)


def instances(*images: ImageRecord) -> Instances:
    return Instances(list(images), CATEGORIES)


def many(n: int) -> Instances:
    """Images with three usable objects, a pair and a crowd."""
    return instances(
        *[
            picture(
                k, thing(9 * k, 0), thing(9 * k + 1, k % 4 + 1), thing(9 * k + 2, 6), thing(9 * k + 3, 6),
                thing(9 * k + 4, 7, crowd=True), thing(9 * k + 5, 8),
            )
            for k in range(1, n + 1)
        ]
    )  # fmt: skip


def test_an_image_gives_one_locpred_and_one_revloc_conversation() -> None:
    image = picture(5, thing(1, 0), thing(2, 1, (1.0, 2.0, 3.0, 4.0)), thing(3, 2), thing(4, 2))
    located, reverse = build_localize_instruct(
        instances(image, picture(6, thing(8, 2), thing(9, 2))), InstructConfig(), 0
    )
    assert (located.id, located.objective, located.image, located.width, located.height) == (
        "5-loc_pred", "loc_pred", "5.jpg", 100, 80,
    )  # fmt: skip
    assert (reverse.id, reverse.objective) == ("5-rev_loc", "rev_loc")
    assert Counter(turn.objective for turn in located.turns) == {"loc_pred": 2, "neg_pred": 1}
    assert [turn for turn in located.turns if turn.objective == "loc_pred"] == [
        Turn("loc_pred", "thing 0", "", (10.0, 20.0, 30.0, 60.0)),
        Turn("loc_pred", "thing 1", "", (1.0, 2.0, 3.0, 4.0)),
    ]
    assert reverse.turns == (
        Turn("rev_loc", "thing 0", "", (10.0, 20.0, 30.0, 60.0)),
        Turn("rev_loc", "thing 1", "", (1.0, 2.0, 3.0, 4.0)),
    )


def test_qa_grouping_gives_the_same_turns_one_a_conversation() -> None:
    source = many(20)
    together = list(build_localize_instruct(source, InstructConfig(), 3))
    apart = list(build_localize_instruct(source, InstructConfig(grouping="qa"), 3))
    assert [turn for c in together for turn in c.turns] == [turn for c in apart for turn in c.turns]
    assert all(len(c.turns) == 1 and c.objective == c.turns[0].objective for c in apart)
    assert len({c.id for c in apart}) == len(apart)


def test_an_image_without_a_usable_object_gives_nothing_and_is_counted() -> None:
    built = build_localize_instruct(instances(picture(1), picture(2, thing(1, 0, crowd=True))), InstructConfig(), 0)
    assert list(built) == []
    assert built.skipped == {instruct.NO_OBJECT: 2}


def test_negatives_never_name_a_present_category_nor_one_twice_and_cover_all_absent_ones() -> None:
    source = many(400)
    drawn: Counter[str] = Counter()
    for conversation in build_localize_instruct(source, InstructConfig(neg_per_image=3), 0):
        image = source.images[int(conversation.image.removesuffix(".jpg")) - 1]
        negatives = [turn.category for turn in conversation.turns if turn.objective == "neg_pred"]
        assert set(negatives) <= set(absent_categories(image, CATEGORIES))
        assert len(set(negatives)) == len(negatives) == (3 if conversation.objective == "loc_pred" else 0)
        drawn.update(negatives)
    # 3 of 7 absent categories an image: 1, 2, 3 and 4 absent in 3 of 4 images, the others in all
    assert set(drawn) == {CATEGORIES[k] for k in (1, 2, 3, 4, 5, 9, 10, 11)}
    for k in (5, 9, 10, 11):
        assert 130 < drawn[CATEGORIES[k]] < 215  # 171 expected, 4 standard errors


def test_negative_turns_stand_at_every_place() -> None:
    places = Counter(
        next(k for k, turn in enumerate(c.turns) if turn.objective == "neg_pred")
        for c in build_localize_instruct(many(400), InstructConfig(), 0)
        if c.objective == "loc_pred"
    )
    assert set(places) == {0, 1, 2, 3}
    assert min(places.values()) > 65  # 100 expected


def test_an_image_with_every_category_has_no_negative_and_is_noted() -> None:
    full = picture(1, *[thing(k, k) for k in range(12)])
    nearly = picture(2, *[thing(20 + k, k) for k in range(11)])
    built = build_localize_instruct(instances(full, nearly), InstructConfig(neg_per_image=2), 0)
    counts = [sum(turn.objective == "neg_pred" for turn in c.turns) for c in built if c.objective == "loc_pred"]
    assert counts == [0, 1]
    assert built.notes == {instruct.ALL_PRESENT: 2}
    none = build_localize_instruct(instances(full), InstructConfig(neg_per_image=0), 0)
    assert not any(turn.objective == "neg_pred" for c in none for turn in c.turns)
    assert not none.notes


def test_the_result_depends_on_seed_and_image_id_and_not_on_the_other_images() -> None:
    source = many(60)
    whole = list(build_localize_instruct(source, InstructConfig(), 1))
    assert whole == list(build_localize_instruct(source, InstructConfig(), 1))
    assert whole != list(build_localize_instruct(source, InstructConfig(), 2))
    part = Instances(source.images[40:10:-3], CATEGORIES)
    assert set(build_localize_instruct(part, InstructConfig(), 1)) <= set(whole)


def test_the_crowd_rule_reaches_the_filter() -> None:
    source = instances(picture(1, thing(1, 0), thing(2, 0, crowd=True), thing(3, 1, crowd=True)))
    rules: tuple[CrowdRule, ...] = ("counts", "ignored", "singleton_ok", "ignored_singleton_ok")
    turns = {}
    for rule in rules:
        built = build_localize_instruct(source, InstructConfig(crowd=rule), 0)
        turns[rule] = [turn.category for c in built for turn in c.turns if turn.objective == "rev_loc"]
    assert turns == {
        "counts": [],
        "ignored": ["thing 0"],
        "singleton_ok": ["thing 1"],
        "ignored_singleton_ok": ["thing 0", "thing 1"],
    }


def test_captions_take_the_place_of_names_and_negatives_borrow_them_from_other_images() -> None:
    source = many(30)
    captions = {
        o.id: f"{o.category} of image {i.id}" for i in source.images for o in i.objects if o.category != "thing 8"
    }
    built = build_localize_instruct(source, InstructConfig(neg_per_image=5), 0, captions)
    borrowed = Counter[bool]()
    for conversation in built:
        for turn in conversation.turns:
            number = int(conversation.image.removesuffix(".jpg"))
            if turn.objective != "neg_pred":
                expected = "" if turn.category == "thing 8" else f"{turn.category} of image {number}"
                assert turn.description == expected
            else:
                captioned = turn.category in CATEGORIES[1:5]
                assert turn.description.startswith(f"{turn.category} of image ") == captioned
                assert turn.description != f"{turn.category} of image {number}"
                borrowed[captioned] += 1
    assert borrowed[True] > 20
    assert borrowed[False] > 20
    assert built.notes == {instruct.NO_CAPTION: 30, instruct.NO_CAPTION_TO_BORROW: borrowed[False]}


def test_objects_that_a_crop_loses_are_left_out_and_counted() -> None:
    image = ImageRecord(
        1, "1.jpg", 200, 100, (thing(1, 0, (0.0, 0.0, 40.0, 50.0)), thing(2, 1, (90.0, 0.0, 120.0, 50.0)))
    )
    source = instances(image)
    crop = ImageGeometry("crop", 100)
    built = build_localize_instruct(source, InstructConfig(neg_per_image=0), 0, None, crop)
    assert [[t.category for t in c.turns] for c in built] == [["thing 1"], ["thing 1"]]
    assert built.skipped == {instruct.LOST_BY_CROP: 1}
    squash = build_localize_instruct(source, InstructConfig(neg_per_image=0), 0, None, ImageGeometry("squash", 100))
    assert [len(c.turns) for c in squash] == [2, 2]
    renderer = Renderer(make_location_format(CoordinateConfig(n_bins=100), crop), PromptConfig(), 0)
    assert all(renderer.turns(c) for c in build_localize_instruct(source, InstructConfig(), 0, None, crop))


@pytest.mark.parametrize("seed", range(5))
def test_negatives_of_real_files_never_name_a_present_category_crowd_included(realdata: Path, seed: int) -> None:
    folder = realdata / "coco_annotations"
    n_crowds = 0
    for name in json.loads((folder / "expected_counts.json").read_text()):
        source = read_instances(folder / name)
        present = {image.file_name: {thing.category for thing in image.objects} for image in source.images}
        n_crowds += sum(thing.is_crowd for image in source.images for thing in image.objects)
        captions = {t.id: f"{t.category} {t.id}" for image in source.images for t in image.objects if t.id % 2}
        for given in (None, captions):
            for conversation in build_localize_instruct(source, InstructConfig(neg_per_image=4), seed, given):
                negatives = [turn for turn in conversation.turns if turn.objective == "neg_pred"]
                assert len(negatives) == (4 if conversation.objective == "loc_pred" else 0)
                for turn in negatives:
                    assert turn.category not in present[conversation.image]
                    assert turn.description.startswith(turn.category if turn.description else "")
    assert n_crowds == 27


def test_many_draws_at_once_are_the_draws_of_each() -> None:
    sizes = np.array([1, 2, 79, 2**40, 5])
    found = draws(sizes, 3, [9, -4, 0, 2**62, 9], "category", 1)
    keys = zip(sizes.tolist(), (9, -4, 0, 2**62, 9), strict=True)
    assert found.tolist() == [draw(n, 3, key, "category", 1) for n, key in keys]


def test_the_parts_in_which_images_are_worked_out_do_not_show() -> None:
    source = many(4200)
    whole = list(build_localize_instruct(source, InstructConfig(neg_per_image=2), 0))
    assert [c.id for c in whole[-2:]] == ["4200-loc_pred", "4200-rev_loc"]
    last = build_localize_instruct(Instances(source.images[4090:], CATEGORIES), InstructConfig(neg_per_image=2), 0)
    assert list(last) == whole[2 * 4090 :]


def test_reading_the_conversations_twice_counts_once() -> None:
    source = instances(picture(1, thing(1, 0)), picture(2))
    built = build_localize_instruct(source, InstructConfig(), 0)
    assert list(built) == list(built)
    assert built.skipped == {instruct.NO_OBJECT: 1}


def test_real_files_give_exactly_the_turns_that_their_objects_allow(realdata: Path) -> None:
    folder = realdata / "coco_annotations"
    for name, expected in json.loads((folder / "expected_counts.json").read_text()).items():
        source = read_instances(folder / name)
        built = build_localize_instruct(source, InstructConfig(), 0)
        conversations = list(built)
        turns = Counter(turn.objective for c in conversations for turn in c.turns)
        # no crowd region is the only annotation of its category in these files, so every counted pair is usable
        pairs = expected["image_category_pairs_with_exactly_one_annotation"]
        images = sum(bool(usable_objects(image)) for image in source.images)
        assert turns == {"loc_pred": pairs, "rev_loc": pairs, "neg_pred": images}
        assert len(conversations) == 2 * images
        assert built.skipped == {instruct.NO_OBJECT: len(source.images) - images}
        present = {i.file_name: {o.category for o in i.objects} for i in source.images}
        for c in conversations:
            assert not any(t.objective == "neg_pred" and t.category in present[c.image] for t in c.turns)


PAPER = Conversation(
    "c",
    "1.jpg",
    512,
    512,
    "loc_pred",
    (
        Turn("loc_pred", "cat", "", (10.0, 120.0, 30.0, 145.0)),
        Turn("neg_pred", "dog"),
        Turn("rev_loc", "cat", "cat that is asleep", (10.0, 120.0, 30.0, 145.0)),
        Turn("caption", question="Is it <so>?", answer="Yes."),
    ),
)


def renderer(seed: int = 0, **prompts: Any) -> Renderer:
    return Renderer(make_location_format(CoordinateConfig()), PromptConfig(**prompts), seed)


def test_structured_turns_are_worded_by_the_templates_of_the_paper() -> None:
    located, negative, reverse, literal = renderer().turns(PAPER)
    reprs = {"repr": "(x1,y1,x2,y2) bbox"}
    assert located[0] in [prompt.format(category="cat", **reprs) for prompt in LOC_PROMPTS]
    assert located[1] == "It is located at (4,52,13,63)"
    assert negative[0] in [prompt.format(category="dog", **reprs) for prompt in LOC_PROMPTS]
    assert negative[1] == "There is no such object in the image"
    assert reverse[0] in [prompt.format(loc="(4,52,13,63)") for prompt in REV_PROMPTS]
    assert reverse[1] == "There is a cat that is asleep."
    assert literal == ("Is it <so>?", "Yes.")


def test_the_point_form_and_other_codecs_reach_the_text() -> None:
    for config, place, names in (
        (CoordinateConfig(location="point"), "(9,58)", "(cx,cy) point"),
        (CoordinateConfig(representation="nfp"), "(0.0195,0.2344,0.0586,0.2832)", "(x1,y1,x2,y2) bbox"),
        (CoordinateConfig(representation="diga"), "(0,4,-3,-11,6,0)", "(p,q,dx1,dy1,dx2,dy2) bbox"),
    ):
        (question, answer), *_ = Renderer(make_location_format(config), PromptConfig(), 0).turns(PAPER)
        assert answer == f"It is located at {place}"
        assert names in question


def test_templates_are_drawn_uniformly_anew_each_epoch_and_alike_on_every_rank() -> None:
    texts = Counter(renderer().turns(PAPER, epoch)[0][0] for epoch in range(500))
    assert len(texts) == 5
    assert min(texts.values()) > 65  # 100 expected
    assert len({renderer().turns(PAPER, epoch)[2][0] for epoch in range(40)}) == 3
    assert renderer().turns(PAPER, 7) == renderer().turns(PAPER, 7)
    others = {tuple(renderer(seed).turns(PAPER, 7)) for seed in range(10)}
    assert len(others) > 1
    twin = Conversation("d", *[getattr(PAPER, n) for n in ("image", "width", "height", "objective", "turns")])
    assert any(renderer().turns(PAPER, e) != renderer().turns(twin, e) for e in range(5))


def test_a_frozen_set_is_worded_once_for_all_epochs_and_seeds() -> None:
    (kept,) = frozen([PAPER], renderer(4))
    assert renderer(9).turns(kept, 3) == renderer(4).turns(PAPER, 0)
    assert [(t.objective, t.category, t.box_xyxy) for t in kept.turns] == [
        (t.objective, t.category, t.box_xyxy) for t in PAPER.turns
    ]
    assert list(frozen([kept], renderer(9))) == [kept]


def test_template_draws_are_counted_by_objective() -> None:
    counts = template_draws([PAPER, PAPER], 4)
    texts = [text for text, _ in renderer(4).turns(PAPER)]
    expected = {kind: [0] * n for kind, n in (("loc_pred", 5), ("neg_pred", 5), ("rev_loc", 3))}
    for kind, text, prompts in zip(expected, texts, (LOC_PROMPTS, LOC_PROMPTS, REV_PROMPTS), strict=False):
        begins = [prompt.partition("{")[0] for prompt in prompts]
        expected[kind][next(n for n, begin in enumerate(begins) if text.startswith(begin))] = 2
    assert counts == expected


def test_clean_templates_mend_the_wording() -> None:
    conversation = Conversation("c", "a.jpg", 10, 10, "rev_loc", (Turn("rev_loc", "apple", "", (0.0, 0.0, 5.0, 5.0)),))
    assert renderer().turns(conversation)[0][1] == "There is a apple."
    assert renderer(clean_templates=True).turns(conversation)[0][1] == "There is an apple."
    texts = [renderer(clean_templates=True).turns(PAPER, epoch)[0][0] for epoch in range(60)]
    assert not any("the the" in text for text in texts)


def test_a_structured_turn_without_a_box_is_refused_by_its_conversation() -> None:
    broken = Conversation("17-loc_pred", "a.jpg", 10, 10, "loc_pred", (Turn("loc_pred", "dog"),))
    with pytest.raises(DataError, match=r"'17-loc_pred'.*'dog' has no box"):
        renderer().turns(broken)


def test_draws_are_fixed_numbers_of_their_keys() -> None:
    # these values are part of every data set that was built: a change here makes old manifests lie
    assert [draw(1000, 0, image, "category", 0) for image in range(5)] == [66, 358, 637, 288, 736]
    assert draw(10**6, "a", "b") != draw(10**6, "ab")
    assert {draw(3, k) for k in range(30)} == {0, 1, 2}


def test_object_captions_come_as_a_json_object_or_as_json_lines(tmp_path: Path) -> None:
    table, lines = tmp_path / "c.json", tmp_path / "c.jsonl"
    table.write_text(json.dumps({"3": "cat that\n sleeps ", "4": "dog", "x": "no", "5": 7, "6": " ", "7": "a </s>"}))
    rows = [{"id": 3, "caption": "cat that sleeps"}, {"annotation_id": 4, "text": "dog"}, {"id": 3, "caption": "b"}, 5]
    lines.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert read_object_captions(table) == (
        {3: "cat that sleeps", 4: "dog"},
        {
            "caption row without a whole-number annotation id or without text": 2,
            "caption that is empty": 1,
            "caption that holds <image>, </s> or broken Unicode": 1,
        },
    )
    captions, skipped = read_object_captions(lines)
    assert captions == {3: "cat that sleeps", 4: "dog"}
    assert sorted(skipped.values()) == [1, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", "[]", "found a list at the top"),
        ("c.json", "{", "not valid JSON"),
        ("c.json", "{}", "it is empty"),
        ("c.json", '{"a": "b"}', "without a whole-number annotation id or without text: 1"),
        ("c.jsonl", '{"id": 1, "caption": "a"}\n{"id', "line 2 is not valid JSON"),
        ("c.jsonl", "", "it is empty"),
        ("c.jsonl", "[" * 100_000, "line 1 is not valid JSON"),
        ("c.jsonl", '{"id": ' + "9" * 5000 + "}", "line 1 is not valid JSON"),
        ("c.json", '{"' + "9" * 5000 + '": "b"}', "without a whole-number annotation id or without text: 1"),
    ],
)
def test_a_file_without_usable_captions_gives_one_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message) as fault:
        read_object_captions(path)
    assert str(path) in str(fault.value)
