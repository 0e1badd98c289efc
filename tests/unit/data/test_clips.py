"""Drawn clips, and what the verbs for annotated images make of videos."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from locvlm.cli import main
from locvlm.data.clips import N_FRAMES, draw_clips
from locvlm.data.coco import Instances, read_instances, usable_objects
from locvlm.data.conversations import open_conversations
from locvlm.data.scenes import CATEGORIES
from locvlm.errors import DataError

N_TRAIN, N_TEST = 40, 6
COLOURS = {category.name: np.array(category.colour, np.int32) for category in CATEGORIES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "clips"
    draw_clips(path, 0, N_TRAIN, N_TEST)
    return path


@pytest.fixture(scope="module")
def train(folder: Path) -> Instances:
    return read_instances(folder / "instances_train.json")


def _frames(path: Path) -> "list[np.ndarray[tuple[int, ...], np.dtype[np.int32]]]":
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24").astype(np.int32) for frame in file.decode(video=0)]


def test_what_stays_is_in_its_box_in_every_frame_and_what_moves_is_not_in_one_place(
    folder: Path, train: Instances
) -> None:
    n_stay, n_move = 0, 0
    for image in train.images:
        frames = _frames(folder / "videos" / image.file_name)
        assert len(frames) == N_FRAMES
        assert frames[0].shape == (image.height, image.width, 3)
        usable = {thing.category for thing in usable_objects(image)}
        for thing in image.objects:
            if sum(other.category == thing.category for other in image.objects) > 1:
                continue
            extents = [_extent(frame, COLOURS[thing.category]) for frame in frames]
            if thing.category in usable:
                n_stay += 1
                assert np.abs(np.array(extents) - np.array(thing.box_xyxy)).max() <= 1  # the codec blurs edges
            elif len(set(extents)) > 1:
                n_move += 1
                assert thing.is_crowd
                hull = (*np.min(extents, axis=0)[:2], *np.max(extents, axis=0)[2:])
                assert np.abs(np.array(hull) - np.array(thing.box_xyxy)).max() <= 1
                assert np.abs(np.subtract(extents[0], extents[-1])).max() >= 13
    assert n_stay > 60
    assert n_move > 20


def _extent(
    frame: "np.ndarray[tuple[int, ...], np.dtype[np.int32]]", colour: "np.ndarray[tuple[int], np.dtype[np.int32]]"
) -> tuple[int, ...]:
    rows, columns = np.nonzero(np.abs(frame - colour).max(axis=2) < 40)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_the_same_seed_gives_the_same_clips_and_a_larger_set_begins_with_the_smaller(
    folder: Path, tmp_path: Path
) -> None:
    draw_clips(tmp_path / "again", 0, N_TRAIN + 5, N_TEST)
    again = read_instances(tmp_path / "again" / "instances_train.json")
    first = read_instances(folder / "instances_train.json")
    assert again.images[:N_TRAIN] == first.images
    name = first.images[0].file_name
    assert np.array_equal(_frames(folder / "videos" / name), _frames(tmp_path / "again" / "videos" / name))


def test_another_size_is_refused_and_a_finished_folder_is_left(folder: Path) -> None:
    before = (folder / "manifest.json").stat().st_mtime_ns
    draw_clips(folder, 0, N_TRAIN, N_TEST)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="it holds the clips"):
        draw_clips(folder, 1, N_TRAIN, N_TEST)
    with pytest.raises(DataError, match="must lie between 1"):
        draw_clips(folder, 1, 0, N_TEST)


def test_the_verbs_make_conversations_and_questions_about_videos(folder: Path, tmp_path: Path) -> None:
    about = ["--annotations", str(folder / "instances_train.json"), "--preset", "tiny"]
    captions = ["--captions", str(folder / "captions_train.json")]
    for verb, more in (("generic", captions), ("localize-instruct", [])):
        assert main(["data", verb, *about, *more, "--output", str(tmp_path / verb)]) == 0
        stored = list(open_conversations(tmp_path / verb))
        assert {one.medium for one in stored} == {"video"}
        if verb == "generic":
            told = {one.objective: one.turns[0] for one in stored}
            assert told["caption"].answer.startswith("A video of ")
            assert told["presence"].question.endswith(" in video?")
    assert main(["data", "hallucination", *about, "--output", str(tmp_path / "presence")]) == 0
    row = json.loads((tmp_path / "presence" / "questions.jsonl").read_text().splitlines()[0])
    assert (row["medium"], row["prompt"].endswith(" in video?")) == ("video", True)
    assert main(["data", "coco-spatial", *about, "--output", str(tmp_path / "sides")]) == 0
    row = json.loads((tmp_path / "sides" / "questions.jsonl").read_text().splitlines()[0])
    assert row["image"].endswith(".mp4")
