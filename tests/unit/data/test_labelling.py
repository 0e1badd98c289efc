"""Pseudo-ActNet: which videos, which boxes, and that a run may be killed at any moment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from locvlm.data.actnet import VideoLabels
from locvlm.data.labelling import (
    BAD_LABELS,
    BAD_NAME,
    DAMAGED,
    MISSING,
    NO_LABELS,
    SAME_STEM,
    UNREADABLE,
    FromPanoptic,
    FromSegmenter,
    Journal,
    LabelSource,
    find_videos,
    label_videos,
    read_activitynet,
    write_labels,
)
from locvlm.data.panoptic import CATEGORIES, IdMap, Segment, read_id_map, read_panoptic, segment_boxes
from locvlm.errors import CheckpointError, DataError, LocVLMError


@dataclass
class Bright:
    """A segmenter that finds a cat where the frame is bright, and sky in the corner pixel."""

    label_names: Sequence[str] = CATEGORIES

    def segment(self, images: Sequence[Image.Image]) -> list[tuple[IdMap, Mapping[int, str]]]:
        return [self._one(np.asarray(image.convert("L"))) for image in images]

    def _one(self, grey: Any) -> tuple[IdMap, Mapping[int, str]]:
        ids = np.where(grey > 128, 7, 0).astype(np.int32)
        ids[0, 0] = 3
        return ids, {3: "sky-other-merged", 7: "cat"}


@dataclass(frozen=True)
class MakeBright:
    """Travels to a worker process; notes beside the journal which process loaded one."""

    notes: Path | None = None

    def __call__(self, worker: int) -> Bright:
        if self.notes is not None:
            (self.notes / str(worker)).write_text(str(os.getpid()))
        return Bright()


def source(folder: Path, **options: Any) -> FromSegmenter:
    return FromSegmenter(folder, options.pop("load", MakeBright()), "bright", **options)


def labelled(
    videos: Sequence[str], source: LabelSource, journal: Path, **options: Any
) -> tuple[list[VideoLabels], dict[str, int], bytes]:
    with Journal(journal) as open_journal:
        skipped = label_videos(videos, source, open_journal, **options)
        found = [open_journal.entry(video).labels for video in sorted(videos) if open_journal.stamp(video)]
        folder = journal.with_suffix(".out")
        write_labels(folder, videos, open_journal)
    return [one for one in found if one is not None], dict(skipped), (folder / "videos.jsonl").read_bytes()


def test_real_videos_get_eight_frames_their_boxes_and_the_absent_categories(realdata: Path, tmp_path: Path) -> None:
    videos = ["arm_wrestling.mp4", "flipping_a_pancake.mkv", "video_0.mov"]
    found, skipped, _ = labelled(videos, source(realdata / "videos"), tmp_path / "j")
    assert not skipped
    # Video-ChatGPT's places of three frames are 0, 1, 1
    assert [(one.width, one.height, len(one.frames)) for one in found] == [(340, 256, 8), (426, 240, 8), (568, 320, 2)]
    assert found[0].indices == (17, 52, 87, 122, 157, 191, 226, 261)
    for one in found:
        assert {s.category for frame in one.frames for s in frame} == {"cat"}  # sky is one pixel, too small
        assert set(CATEGORIES) - set(one.absent) == {"cat", "sky"}
        for frame in one.frames:
            for segment in frame:
                x1, y1, x2, y2 = segment.box_xyxy
                assert 0 <= x1 < x2 <= one.width
                assert 0 <= y1 < y2 <= one.height


def test_an_upright_frame_is_segmented_and_damage_is_noted(realdata: Path, tmp_path: Path) -> None:
    found, _, _ = labelled(["corrupted.mp4", "video_90.mov"], source(realdata / "videos"), tmp_path / "j")
    assert (found[1].width, found[1].height) == (320, 568)
    assert "28 can be read" in found[0].notes[0]
    with Journal(tmp_path / "j") as journal:
        counts, notes = write_labels(tmp_path / "out", ["corrupted.mp4", "video_90.mov"], journal)
    assert notes == {DAMAGED: 1}
    assert counts == {"videos": 2, "frames": 10, "segments": 10, "categories": 1}


def test_the_number_of_workers_and_the_order_do_not_change_a_byte(realdata: Path, tmp_path: Path) -> None:
    videos = ["nasa_13013.mp4", "playing_guitar.mp4", "var_fps_video.mp4", "video_90.mov", "corrupted.mp4"]
    one = labelled(videos, source(realdata / "videos"), tmp_path / "a")[2]
    notes = tmp_path / "notes"
    notes.mkdir()
    load = MakeBright(notes)
    two = labelled(videos[::-1], source(realdata / "videos", load=load), tmp_path / "b", n_workers=2)[2]
    assert one == two
    assert one.count(b"\n") == 5
    assert str(os.getpid()) not in [path.read_text() for path in notes.iterdir()]


class Counting:
    """A source whose labelling is counted, and stops at one video as a bug or a full disk would."""

    fault, lacking = UNREADABLE, MISSING

    def __init__(self, stop_at: str = "") -> None:
        self.stop_at = stop_at
        self.labelled: list[str] = []
        self.stamps: dict[str, str] = {}

    def stamp(self, video: str) -> str | None:
        return self.stamps.get(video, "1") if video != "gone" else None

    def start(self, worker: int) -> Callable[[str], VideoLabels]:
        return self.label

    def label(self, video: str) -> VideoLabels:
        if video == self.stop_at:
            raise KeyboardInterrupt
        self.labelled.append(video)
        if video.startswith("bad"):
            raise DataError(f"reading {video}: no")
        frame = (Segment("cat", True, (0.0, 0.0, 2.0, 2.0), 4),)
        return VideoLabels(video, 9, 9, (0,), (frame,), CATEGORIES[1:])


def test_an_interrupted_run_goes_on_where_it_was_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    videos = ["a", "b", "bad", "c", "d", "gone"]
    first = Counting(stop_at="d")
    with pytest.raises(KeyboardInterrupt):
        labelled(videos, first, tmp_path / "j")
    assert first.labelled == ["a", "b", "bad", "c"]
    second = Counting()
    _, skipped, resumed = labelled(videos, second, tmp_path / "j")
    assert second.labelled == ["bad", "d"]  # what failed is tried again
    assert skipped == {UNREADABLE: 1, MISSING: 1}
    assert resumed == labelled(videos, Counting(), tmp_path / "k")[2]
    assert resumed.count(b"\n") == 4


def test_a_file_that_changed_is_labelled_anew(tmp_path: Path) -> None:
    labelled(["a", "b"], Counting(), tmp_path / "j")
    again = Counting()
    again.stamps["b"] = "2"
    labelled(["a", "b"], again, tmp_path / "j")
    assert again.labelled == ["b"]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_was_being_written_is_lost_and_no_other(tmp_path: Path, cut: int) -> None:
    labelled(["a", "b", "c"], Counting(), tmp_path / "j")
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole[:-cut])
    again = Counting()
    labelled(["a", "b", "c"], again, tmp_path / "j")
    assert again.labelled == ["c"]
    assert (tmp_path / "j").read_bytes() == whole


def test_a_second_process_is_told_to_wait(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(DataError, match="another process is at it"):
        Journal(tmp_path / "j")
    with Journal(tmp_path / "j"):
        pass
    assert list(tmp_path.iterdir()) == []  # nothing was finished


def test_progress_counts_every_video_once(tmp_path: Path) -> None:
    videos, steps = ["a", "bad", "gone"], []
    with Journal(tmp_path / "j") as journal:
        label_videos(videos, Counting(), journal, on_done=lambda: steps.append(1))
        assert len(steps) == 3
        label_videos(videos, Counting(), journal, on_done=lambda: steps.append(1))
    assert len(steps) == 6


SLOW = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from locvlm.data.labelling import Journal, label_videos, write_labels
    sys.path.insert(0, {here!r})
    from test_labelling import Counting

    class Slow(Counting):
        def label(self, video):
            if {slow}:
                time.sleep(0.2)
                (Path({folder!r}) / "pids" / str(os.getpid())).touch()
            return super().label(video)

    if __name__ == "__main__":
        videos = [f"v{{k:02}}" for k in range(20)]
        with Journal(Path({folder!r}) / "j") as journal:
            label_videos(videos, Slow(), journal, n_workers={workers})
            write_labels(Path({folder!r}), videos, journal)
    """
)


def script(folder: Path, name: str, slow: bool, workers: int) -> list[str]:
    path = folder / name
    path.write_text(SLOW.format(here=str(Path(__file__).parent), folder=str(folder), slow=slow, workers=workers))
    return [sys.executable, str(path)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_outright_it_leaves_no_worker_behind_and_a_rerun_finishes(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    process = subprocess.Popen(script(tmp_path, "slow.py", slow=True, workers=2))
    deadline = time.monotonic() + 60
    while (not (tmp_path / "j").exists() or (tmp_path / "j").read_bytes().count(b"\n") < 2) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = (tmp_path / "j").read_bytes().count(b"\n")
    assert 2 <= done < 20
    assert not (tmp_path / "videos.jsonl").exists()
    workers = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    subprocess.run(script(tmp_path, "quick.py", slow=False, workers=1), check=True)
    lines = (tmp_path / "videos.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["video"] for line in lines] == [f"v{k:02}" for k in range(20)]


@dataclass(frozen=True)
class Vanish:
    """A worker that dies, as one does for lack of memory."""

    def __call__(self, worker: int) -> Bright:
        os._exit(9)


def refuse(worker: int) -> Bright:
    raise CheckpointError("loading the segmenter x: it is cut short")


def test_the_end_of_a_worker_and_its_error_arrive_as_one_message(realdata: Path, tmp_path: Path) -> None:
    videos = ["video_0.mov", "video_90.mov"]
    with Journal(tmp_path / "j") as journal:
        with pytest.raises(LocVLMError, match="a worker process died"):
            label_videos(videos, source(realdata / "videos", load=Vanish()), journal, n_workers=2)
        with pytest.raises(CheckpointError, match="cut short"):
            label_videos(videos, source(realdata / "videos", load=refuse), journal, n_workers=2)


def test_a_segmenter_of_other_labels_or_of_another_size_is_refused(realdata: Path, tmp_path: Path) -> None:
    class Small(Bright):
        def _one(self, grey: Any) -> tuple[IdMap, Mapping[int, str]]:
            return super()._one(grey[:-1])

    with Journal(tmp_path / "j") as journal:
        for make, kind, message in (
            (lambda worker: Bright(["cat"]), CheckpointError, "using the segmenter bright"),
            (lambda worker: Small(), LocVLMError, "the frame is 320 x 568"),
        ):
            with pytest.raises(kind, match=message):
                label_videos(["video_0.mov"], source(realdata / "videos", load=make), journal)


def test_a_video_that_cannot_be_read_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.webm").touch()
    found, skipped, data = labelled(["text.mp4", "empty.webm", "gone.mp4"], source(tmp_path), tmp_path / "j")
    assert (found, skipped, data) == ([], {UNREADABLE: 2, MISSING: 1}, b"")
    assert "text.mp4" in caplog.text
    assert "empty.webm" in caplog.text


@pytest.fixture
def sequence(realdata: Path, tmp_path: Path) -> Path:
    """Eight frames of panoptic labels: a real image eight times, its ids in the order of time."""
    origin = realdata / "coco_panoptic"
    value = json.loads((origin / "panoptic_train2017.json").read_text())
    annotation = max(value["annotations"], key=lambda record: len(record["segments_info"]))
    (image,) = (record for record in value["images"] if record["id"] == annotation["image_id"])
    folder = tmp_path / "labels"
    (folder / "v_a").mkdir(parents=True)
    for number in range(8):
        shutil.copy(origin / "panoptic_train2017" / annotation["file_name"], folder / "v_a" / f"{number}.png")
    frames = {
        "images": [{**image, "id": number} for number in range(8)],
        "annotations": [{**annotation, "image_id": n, "file_name": f"{n}.png"} for n in range(8)],
        "categories": value["categories"],
    }
    (folder / "v_a.json").write_text(json.dumps(frames))
    return folder


def test_ready_panoptic_files_take_the_place_of_a_segmenter(sequence: Path, tmp_path: Path) -> None:
    ready = FromPanoptic(sequence, min_share=0)
    ((labels,), skipped, _) = labelled(["v_a.mp4", "v_b.mp4"], ready, tmp_path / "j")
    assert skipped == {NO_LABELS: 1}
    (image, *_) = read_panoptic(sequence / "v_a.json")
    segments = tuple(segment_boxes(read_id_map(image, sequence / "v_a"), image.labels))
    assert labels.frames == (segments,) * 8
    assert len(segments) > 10
    assert set(labels.absent) == set(CATEGORIES) - {s.category for s in segments}
    assert labels.indices == tuple(range(8))
    ((fewer,), _, _) = labelled(["v_a.mp4"], FromPanoptic(sequence, n_frames=2), tmp_path / "k")
    assert fewer.indices == (2, 5)
    assert 0 < len(fewer.frames[0]) < len(segments)


def test_panoptic_files_that_are_no_video_are_counted(realdata: Path, sequence: Path, tmp_path: Path) -> None:
    origin = realdata / "coco_panoptic"
    shutil.copy(origin / "panoptic_train2017.json", sequence / "sizes.json")  # 100 images of many sizes
    (sequence / "text.json").write_text("{}")
    (sequence / "v_a" / "3.png").unlink()
    _, skipped, _ = labelled(["v_a.mp4", "sizes.mp4", "text.mp4"], FromPanoptic(sequence), tmp_path / "j")
    assert skipped == {BAD_LABELS: 3}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_videos_are_found_below_the_folder_by_extension(tmp_path: Path) -> None:
    touch(tmp_path, "b.MP4", "x/a.webm", "x/a.mkv", "x/.hidden/c.mp4", ".d.mp4", "e.txt", "f.json")
    (tmp_path / os.fsdecode(b"\xff.mp4")).touch()
    assert find_videos(tmp_path) == (["b.MP4", "x/a.mkv"], {SAME_STEM: 1, BAD_NAME: 1})


def test_the_list_of_activitynet_picks_v_id_files_and_counts_the_missing(tmp_path: Path) -> None:
    touch(tmp_path, "v_-a_b.mp4", "v_CD.mkv", "ef.webm", "v_other.mp4")
    videos, skipped = find_videos(tmp_path, ["-a_b", "CD", "cd", "ef", "gone", "gone2"])
    assert videos == ["ef.webm", "v_-a_b.mp4", "v_CD.mkv"]
    assert skipped == {MISSING: 3}
    with pytest.raises(DataError, match="found none of the 1 in the list"):
        find_videos(tmp_path, ["zz"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found none; needed are files ending in"):
        find_videos(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        find_videos(tmp_path / "nowhere")


def test_an_activitynet_file_gives_the_ids_of_a_subset(tmp_path: Path) -> None:
    path = tmp_path / "activity_net.json"
    rows = {"b": {"subset": "training", "duration": 9.5}, "a": {"subset": "validation"}, "c": {"subset": "training"}}
    path.write_text(json.dumps({"version": "1.3", "database": rows}))
    assert read_activitynet(path, "training") == ["b", "c"]
    assert read_activitynet(path) == ["b", "a", "c"]
    with pytest.raises(DataError, match="no video of the subset train; it has training, validation"):
        read_activitynet(path, "train")
    for text in ("[]", '{"database": []}', '{"database": {"a": 1}}', '{"videos": {}}'):
        path.write_text(text)
        with pytest.raises(DataError, match="not an ActivityNet file"):
            read_activitynet(path)
