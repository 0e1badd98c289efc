"""Localize-ActivityNet: what stays in place at the exact threshold, what may be named absent, what is written."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from locvlm.config import CoordinateConfig, InstructConfig, PromptConfig
from locvlm.coordinates import make_location_format
from locvlm.data.actnet import (
    DATASET,
    MOVING,
    NO_STATIC,
    SEVERAL,
    VIDEOS_NAME,
    VideoLabels,
    build_localize_activitynet,
    present_and_absent,
    read_labels,
    static_objects,
)
from locvlm.data.instruct import LOST_BY_CROP, Renderer
from locvlm.data.panoptic import CATEGORIES, STUFF, THINGS, Segment
from locvlm.errors import DataError
from locvlm.geometry import ImageGeometry
from locvlm.records import BoxXYXY, Manifest, write_manifest

SQUASH = ImageGeometry()  # 224 x 224
WIDTH, HEIGHT = 448, 112  # a network pixel is two pixels wide and half a pixel high


def segment(category: str, box: BoxXYXY, is_crowd: bool = False) -> Segment:
    return Segment(category, category in THINGS, box, 900, is_crowd)


def video(*frames: list[Segment], name: str = "v_a.mp4", also_present: tuple[str, ...] = ()) -> VideoLabels:
    seen = {s.category for frame in frames for s in frame} | set(also_present)
    absent = tuple(category for category in CATEGORIES if category not in seen)
    return VideoLabels(name, WIDTH, HEIGHT, tuple(range(len(frames))), tuple(map(tuple, frames)), absent)


def at(x: float, y: float) -> list[Segment]:
    """A dog of 20 x 8 pixels around this point of the network's input."""
    return [segment("dog", (2 * x - 10, y / 2 - 4, 2 * x + 10, y / 2 + 4))]


@pytest.mark.parametrize(
    ("shift", "stays"),
    [((5.0, 0.0), True), ((0.0, 5.0), True), ((5.0, 5.0), True), ((5.01, 0.0), False), ((0.0, 5.01), False)],
)
def test_an_object_stays_up_to_five_network_pixels_from_its_mean_on_each_axis(
    shift: tuple[float, float], stays: bool
) -> None:
    (dx, dy), (x, y) = shift, (101.3, 67.7)  # numbers that are not exact in binary
    labels = video(at(x - dx, y - dy), [], at(x + dx, y + dy))
    kept, skipped = static_objects(labels, SQUASH)
    if stays:
        assert kept["dog"] == pytest.approx((2 * x - 10, y / 2 - 4, 2 * x + 10, y / 2 + 4))
        assert not skipped
    else:
        assert (kept, skipped) == ({}, {MOVING: 1})
    assert list(static_objects(labels, SQUASH, tolerance=math.hypot(*shift))[0]) == ["dog"]


def test_the_mean_is_over_the_frames_where_the_object_occurs() -> None:
    """Two frames at 100 and one at 106: the last is 4 from the mean of 102, the first 2."""
    labels = video(at(100, 80), at(100, 80), [], at(106, 80))
    kept, _ = static_objects(labels, SQUASH)
    assert kept == {"dog": (194, 36, 214, 44)}
    assert static_objects(labels, SQUASH, tolerance=3.99)[0] == {}


def test_an_object_of_one_frame_is_kept_as_it_is_and_a_moving_one_in_two_is_not() -> None:
    assert static_objects(video([], at(30, 30), []), SQUASH)[0] == {"dog": (50, 11, 70, 19)}
    assert static_objects(video(at(30, 30), at(130, 30)), SQUASH) == ({}, {MOVING: 1})


def test_a_category_with_two_instances_or_a_crowd_in_any_frame_is_no_object() -> None:
    two = [*at(30, 30), *at(130, 30)]
    crowd = [segment("dog", (50, 11, 70, 19), is_crowd=True)]
    for frame in (two, crowd):
        assert static_objects(video(at(30, 30), frame, at(30, 30)), SQUASH) == ({}, {SEVERAL: 1})


def test_things_alone_are_objects_unless_all_categories_are_asked_for() -> None:
    labels = video([segment("sky", (0, 0, 448, 40)), *at(100, 80)])
    assert list(static_objects(labels, SQUASH)[0]) == ["dog"]
    assert list(static_objects(labels, SQUASH, categories=CATEGORIES)[0]) == ["dog", "sky"]


def test_a_crop_counts_only_what_it_shows() -> None:
    crop = ImageGeometry("crop")  # of 448 x 112 the middle 112 columns, enlarged twice
    assert static_objects(video(at(20, 80)), crop) == ({}, {LOST_BY_CROP: 1})
    inside, outside = segment("cat", (200, 40, 220, 60)), segment("cat", (0, 40, 20, 60))
    assert static_objects(video([inside], [outside]), crop)[0] == {"cat": (200, 40, 220, 60)}


def build(*labels: VideoLabels, **options: Any) -> Any:
    config = InstructConfig(neg_per_image=options.pop("neg_per_image", 1))
    return build_localize_activitynet(labels, config, 3, SQUASH, **options)


def test_conversations_are_about_the_video_with_three_objectives() -> None:
    cup = segment("cup", (300, 40, 320, 60))
    moving = build(video(at(10, 80), at(100, 80), name="v_c.webm"))
    built = build(video([*at(100, 80), cup], [*at(102, 80), cup], name="train/v_b.mp4"))
    loc, rev = list(built)
    assert (loc.id, rev.id) == ("v_b-loc_pred", "v_b-rev_loc")
    for conversation in (loc, rev):
        assert (conversation.image, conversation.medium) == ("train/v_b.mp4", "video")
        assert (conversation.width, conversation.height) == (WIDTH, HEIGHT)
    assert sorted((t.objective, t.category) for t in loc.turns if t.objective == "loc_pred") == [
        ("loc_pred", "cup"),
        ("loc_pred", "dog"),
    ]
    assert [t.objective for t in loc.turns].count("neg_pred") == 1
    assert {t.category: t.box_xyxy for t in rev.turns} == {"dog": (192, 36, 212, 44), "cup": (300, 40, 320, 60)}
    assert list(moving) == []
    assert moving.skipped == {MOVING: 1, NO_STATIC: 1}


def test_neg_pred_names_what_no_frame_shows_whatever_its_size_place_or_number() -> None:
    """All things but two are there: moving, in a crowd, too small for a box; NegPred has two to choose from."""
    walking = [segment("person", (0, 0, 20, 20))], [segment("person", (200, 0, 220, 20))]
    crowd = segment("cow", (0, 0, 40, 40), is_crowd=True)
    tiny = tuple(name for name in THINGS if name not in ("kite", "zebra", "person", "cow", "dog"))
    labels = video([*at(100, 80), *walking[0], crowd], walking[1], also_present=tiny)
    named = set()
    for number in range(40):
        for conversation in build(replace(labels, video=f"v_{number}.mp4")):
            named |= {turn.category for turn in conversation.turns if turn.objective == "neg_pred"}
    assert named == {"kite", "zebra"}
    with_stuff = [c for number in range(200) for c in build(replace(labels, video=f"{number}.mp4"), absent=CATEGORIES)]
    asked = {t.category for c in with_stuff for t in c.turns if t.objective == "neg_pred"}
    assert asked - {"kite", "zebra"}
    assert asked <= {"kite", "zebra", *STUFF}


def test_the_draws_of_a_video_do_not_depend_on_the_others() -> None:
    videos = [video(at(100, 80), name=f"v_{k}.mp4") for k in range(12)]
    assert list(build(*videos))[8:10] == list(build(videos[4]))
    assert [c.id for c in build(*videos)] == [f"v_{k}-{kind}" for k in range(12) for kind in ("loc_pred", "rev_loc")]
    assert len({c.turns for c in build(*videos)}) > 2  # different negatives


def test_the_templates_say_image_by_default_and_video_on_request() -> None:
    (loc, rev) = build(video(at(100, 80)))
    for word in ("image", "video"):
        renderer = Renderer(make_location_format(CoordinateConfig()), PromptConfig(video_word=word), 0)
        texts = [text for epoch in range(40) for c in (loc, rev) for pair in renderer.turns(c, epoch) for text in pair]
        told = {text for text in texts if "image" in text or "video" in text}
        assert f"There is no such object in the {word}" in told
        assert f"What is at location (95,72,105,88) in {word}?" in told
        assert f"Where is the object described dog located in {word} in terms of (x1,y1,x2,y2) bbox?" in told
        assert all(word in text for text in told)
        about_images = renderer.turns(replace(loc, medium="image"))
        assert not any("video" in text for pair in about_images for text in pair)


def stored(folder: Path, *labels: VideoLabels, dataset: str = DATASET) -> Path:
    folder.mkdir()
    (folder / VIDEOS_NAME).write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in labels))
    write_manifest(folder, Manifest(dataset, {"videos": len(labels)}))
    return folder


def test_labels_are_read_back_equal_with_what_is_present_and_absent(tmp_path: Path) -> None:
    labels = [video(at(1, 2), [segment("sky", (0, 0, 9, 9.5))], name="v_ü.mp4", also_present=("cat",)), video([])]
    folder = stored(tmp_path / "x", *labels)
    assert list(read_labels(folder)) == labels
    (first, present, absent), (_, none, everything) = present_and_absent(folder)
    assert (first, present) == ("v_ü.mp4", ["dog", "sky"])
    assert absent == [name for name in CATEGORIES if name not in ("dog", "sky", "cat")]
    assert (none, everything) == ([], list(CATEGORIES))


def test_a_folder_that_is_not_pseudo_actnet_gives_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        read_labels(tmp_path)
    with pytest.raises(DataError, match="holds the data set 'localize-instruct'"):
        read_labels(stored(tmp_path / "other", dataset="localize-instruct"))
    folder = stored(tmp_path / "lost")
    (folder / VIDEOS_NAME).unlink()
    with pytest.raises(DataError, match="No such file"):
        list(read_labels(folder))


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff", b'{"video": 3}', json.dumps({"video": "a"}).encode()])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    folder = stored(tmp_path / "x", video(at(1, 2)))
    with open(folder / VIDEOS_NAME, "ab") as file:
        file.write(line)
    with pytest.raises(DataError, match=r"line 2 is not the labels of a video"):
        list(read_labels(folder))
