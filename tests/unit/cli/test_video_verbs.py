"""`locvlm data pseudo-actnet` and `localize-activitynet` end to end, on real videos and on ready labels."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from locvlm.cli import main
from locvlm.data.actnet import present_and_absent, read_labels
from locvlm.data.conversations import open_conversations
from locvlm.data.panoptic import CATEGORIES, THINGS
from tests.segmenters import save_segmenter

IDS = {"dog": (18, (0, 200, 0)), "cat": (17, (1, 2, 3)), "cup": (47, (9, 0, 0)), "sky-other-merged": (187, (0, 0, 7))}


def data(*words: object) -> int:
    return main(["data", *map(str, words)])


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def refused(capsys: pytest.CaptureFixture[str], output: Path, *words: object) -> str:
    """The one message of a command that must fail as the user's mistake and leave no data set."""
    capsys.readouterr()
    assert data(*words, "--output", output) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("locvlm: ") == 1
    assert "Traceback" not in err
    assert not output.exists()
    return err


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_segmenter("mask2former", tmp_path_factory.mktemp("tiny-mask2former"))


def paint(labels: Path, video: str, *frames: dict[str, tuple[int, int, int, int]]) -> None:
    """COCO panoptic files of a 224 x 224 video: for every frame the boxes of the categories in it."""
    (labels / video).mkdir(parents=True)
    images, annotations = [], []
    for number, boxes in enumerate(frames):
        pixels = np.zeros((224, 224, 3), np.uint8)
        segments = []
        for name, (x1, y1, x2, y2) in boxes.items():
            category, colour = IDS[name]
            pixels[y1:y2, x1:x2] = colour
            red, green, blue = colour
            segments.append({"id": red + 256 * green + 65536 * blue, "category_id": category, "iscrowd": 0})
        Image.fromarray(pixels).save(labels / video / f"{number}.png")
        images.append({"id": number, "width": 224, "height": 224})
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    categories = [{"id": number, "name": name} for name, (number, _) in IDS.items()]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (labels / f"{video}.json").write_text(text)


@pytest.fixture
def painted(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of video files (empty: they are not opened) and labels. In v_a the dog stays, the cat walks, the cup is
    in one frame; in v_b only the cat walks."""
    videos, labels = tmp_path / "videos", tmp_path / "labels"
    sky, stays = (0, 0, 224, 40), (100, 100, 140, 140)
    walk = [{"cat": (10 + 20 * k, 160, 40 + 20 * k, 200)} for k in range(8)]
    first = [{"sky-other-merged": sky, "dog": stays, **step} for step in walk]
    first[5]["dog"] = (104, 100, 144, 140)
    first[6]["cup"] = (10, 60, 30, 90)
    paint(labels, "v_a", *first)
    paint(labels, "v_b", *walk)
    videos.mkdir()
    for name in ("v_a.mp4", "v_b.mkv", "v_c.webm"):
        (videos / name).touch()
    return videos, labels


def test_ready_labels_become_conversations_about_what_stays(tmp_path: Path, painted: Any, capsys: Any) -> None:
    videos, labels = painted
    pseudo, output = tmp_path / "pseudo", tmp_path / "out"
    assert data("pseudo-actnet", "--videos", videos, "--panoptic", labels, "--output", pseudo) == 0
    found = manifest(pseudo)
    assert found["counts"] == {"videos": 2, "frames": 16, "segments": 8 + 8 + 8 + 1 + 8, "categories": 4}
    assert found["skipped"] == {"video without a panoptic file": 1}
    assert [source["path"] for source in found["sources"]] == ["videos", "labels"]
    (_, present, absent), (_, cats, _) = present_and_absent(pseudo)
    assert (present, cats) == (["cat", "dog", "cup", "sky"], ["cat"])
    assert absent == [name for name in CATEGORIES if name not in present]

    command = ["localize-activitynet", "--pseudo-labels", pseudo, "--format", "llava-json", "--seed", 2]
    assert data(*command, "--output", output) == 0
    found = manifest(output)
    assert found["counts"] == {"images": 1, "conversations": 2, "loc_pred": 2, "neg_pred": 1, "rev_loc": 2}
    assert found["skipped"] == {"object that moves": 2, "video without an object that stays in place": 1}
    assert found["labels"]["n_frames"] == 8
    assert "object that moves 2" in capsys.readouterr().out
    (loc, rev) = open_conversations(output)
    assert (loc.image, loc.medium, loc.width) == ("v_a.mp4", "video", 224)
    # the dog is seven frames at 100 and one at 104
    assert {t.category: t.box_xyxy for t in rev.turns} == {"dog": (100.5, 100, 140.5, 140), "cup": (10, 60, 30, 90)}
    (negative,) = (t.category for t in loc.turns if t.objective == "neg_pred")
    assert negative in set(THINGS) - {"cat", "dog", "cup"}
    records = json.loads((output / "conversations.json").read_text())
    assert [(r["id"], r["video"], "image" in r) for r in records] == [
        ("v_a-loc_pred", "v_a.mp4", False),
        ("v_a-rev_loc", "v_a.mp4", False),
    ]
    assert records[0]["conversations"][0]["value"].startswith("<video>\n")
    assert open_conversations(output / "conversations.json")[0].medium == "video"


def test_tolerance_classes_absence_and_wording_are_options(tmp_path: Path, painted: Any) -> None:
    videos, labels = painted
    pseudo = tmp_path / "pseudo"
    assert data("pseudo-actnet", "--videos", videos, "--panoptic", labels, "--output", pseudo) == 0
    command = ["localize-activitynet", "--pseudo-labels", pseudo]
    assert data(*command, "--output", tmp_path / "strict", "--tolerance", 3.4) == 0
    assert manifest(tmp_path / "strict")["counts"]["loc_pred"] == 1
    everything = ["--classes", "all", "--absent", "all", "--tolerance", 70, "--set", "prompts.video_word=video"]
    assert data(*command, "--output", tmp_path / "wide", *everything, "--format", "llava-json") == 0
    assert manifest(tmp_path / "wide")["counts"] == {
        "images": 2,
        "conversations": 4,
        "loc_pred": 5,
        "neg_pred": 2,
        "rev_loc": 5,
    }
    assert "There is no such object in the video" in (tmp_path / "wide" / "conversations.json").read_text()


def test_real_videos_pass_through_a_real_segmenter(tmp_path: Path, realdata: Path, segmenter: Path) -> None:
    command = ["pseudo-actnet", "--videos", realdata / "videos", "--segmenter", segmenter, "--n-frames", 2]
    assert data(*command, "--output", tmp_path / "a") == 0
    found = manifest(tmp_path / "a")
    assert found["counts"]["videos"] == 10
    assert found["options"]["segmenter"] == segmenter.name
    assert sum(found["notes"].values()) == 1
    assert [labels.video for labels in read_labels(tmp_path / "a")] == sorted(
        path.name for path in (realdata / "videos").iterdir() if path.suffix != ".json"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert data("localize-activitynet", "--pseudo-labels", tmp_path / "a", "--output", tmp_path / "b") == 0


def test_the_number_of_workers_changes_no_byte(tmp_path: Path, realdata: Path, segmenter: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("video_0.mov", "video_90.mov"):
        shutil.copy(realdata / "videos" / name, videos)
    command = ["pseudo-actnet", "--videos", videos, "--segmenter", segmenter]
    for name, workers in (("a", 1), ("b", 2)):
        assert data(*command, "--output", tmp_path / name, "--workers", workers) == 0
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    assert manifest(tmp_path / "a")["counts"]["videos"] == 2


def test_a_killed_run_leaves_no_data_set_and_its_rerun_does_not_begin_again(
    tmp_path: Path, realdata: Path, segmenter: Path
) -> None:
    words = ["pseudo-actnet", "--videos", realdata / "videos", "--segmenter", segmenter, "--n-frames", 2]
    words += ["--output", tmp_path / "a"]
    process = subprocess.Popen([sys.executable, "-m", "locvlm", "data", *map(str, words)])
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.read_bytes().count(b"\n") for path in tmp_path.glob(".a.journal-*")):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a").exists()
    (journal,) = tmp_path.glob(".a.journal-*")
    before = journal.read_bytes()
    kept = before[: before.rindex(b"\n") + 1]
    assert kept
    # a mark in the finished part that survives only if it is not made again
    journal.write_bytes(kept.replace(b'"notes":[]', b'"notes":["x"]', 1))
    assert data(*words) == 0
    assert sum(labels.notes == ("x",) for labels in read_labels(tmp_path / "a")) == 1
    assert manifest(tmp_path / "a")["counts"]["videos"] == 10
    assert not journal.exists()


def test_the_same_command_again_finds_the_labels_built(tmp_path: Path, painted: Any, capsys: Any) -> None:
    videos, labels = painted
    command = ["pseudo-actnet", "--videos", videos, "--panoptic", labels, "--output", tmp_path / "p"]
    assert data(*command) == 0
    assert data(*command) == 0
    assert "already built" in capsys.readouterr().out
    assert data(*command, "--n-frames", 2) == 2
    assert "differs in options" in capsys.readouterr().err
    assert data(*command, "--n-frames", 2, "--force") == 0
    assert manifest(tmp_path / "p")["counts"]["frames"] == 4


def test_the_activitynet_list_chooses_the_videos(tmp_path: Path, painted: Any, capsys: Any) -> None:
    videos, labels = painted
    listed = {"a": {"subset": "training"}, "b": {"subset": "validation"}, "gone": {"subset": "training"}}
    (tmp_path / "list.json").write_text(json.dumps({"database": listed}))
    command = ["pseudo-actnet", "--videos", videos, "--panoptic", labels, "--activitynet", tmp_path / "list.json"]
    assert data(*command, "--subset", "training", "--output", tmp_path / "p") == 0
    found = manifest(tmp_path / "p")
    assert found["counts"]["videos"] == 1
    assert found["skipped"] == {"video of the list whose file is missing": 1}
    assert "list.json" in [source["path"] for source in found["sources"]]
    assert "testing" in refused(capsys, tmp_path / "q", *command, "--subset", "testing")


def test_what_does_not_go_together_is_one_message(tmp_path: Path, painted: Any, segmenter: Path, capsys: Any) -> None:
    videos, _ = painted
    output, command = tmp_path / "q", ["pseudo-actnet", "--videos", videos]
    message = refused(capsys, output, *command, "--segmenter", "seem", "--subset", "x")
    assert "--subset needs --activitynet; --segmenter seem and --weights belong together" in message
    assert "no such folder" in refused(capsys, output, *command, "--panoptic", tmp_path / "none")
    message = refused(capsys, output, *command, "--segmenter", tmp_path / "none")
    assert "loading the segmenter" in message
    (tmp_path / "weights").mkdir()
    message = refused(capsys, output, *command, "--segmenter", "seem", "--weights", tmp_path / "weights")
    assert "SEEM" in message
    (tmp_path / "nolabels").mkdir()
    message = refused(capsys, output, *command, "--panoptic", tmp_path / "nolabels")
    assert "none of the 3 videos has labels (video without a panoptic file: 3)" in message
    message = refused(capsys, output, *command, "--segmenter", segmenter)  # the files are empty
    assert "3 of 3 videos cannot be used" in message
    message = refused(capsys, output, "localize-activitynet", "--pseudo-labels", tmp_path / "none")
    assert "reading --pseudo-labels" in message


@pytest.mark.parametrize("words", [["--tolerance", "nan"], ["--tolerance", "-1"], ["--classes", "stuff"], []])
def test_an_illegal_value_is_refused_before_anything_is_read(tmp_path: Path, words: list[str]) -> None:
    given = ["--pseudo-labels", str(tmp_path)] if words else []
    with pytest.raises(SystemExit) as stop:
        data("localize-activitynet", *given, "--output", tmp_path / "x", *words)
    assert stop.value.code == 2
