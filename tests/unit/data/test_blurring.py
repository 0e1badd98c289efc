"""Folders whose faces are blurred: what is there at the end, and that interruptions and reruns change nothing of it."""

import fcntl
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from locvlm.data.blurring import ROWS_NAME, BlurTask, Medium, blur_folder
from locvlm.data.faces import RECORD, Blur, Face
from locvlm.errors import DataError

SIZE = (48, 32)


class BrightFaces:
    """Takes a lone white pixel for the centre of a face; counts its calls, and can end the program at one of them."""

    def __init__(self, ends_at: int | None = None) -> None:
        self.calls, self.ends_at = 0, ends_at

    def __call__(self, image: Image.Image) -> Sequence[Face]:
        self.calls += 1
        if self.calls == self.ends_at:
            raise KeyboardInterrupt
        ys, xs = np.nonzero((np.asarray(image) > 250).all(axis=-1))
        if len(xs) > 1:
            return []
        return [Face((x - 5.0, y - 5.0, x + 5.0, y + 5.0), 0.5) for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]

    def describe(self) -> dict[str, Any]:
        return {"detector": "BrightFaces", "version": "1", "threshold": 0.5}


def picture(path: Path, seed: int, has_face: bool) -> None:
    pixels = np.random.default_rng(seed).integers(0, 200, (SIZE[1], SIZE[0], 3), np.uint8)
    if has_face:
        pixels[10 + seed, 20] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


NAMES = [f"{sub}{i}.png" for sub in ("", "train/", "train/deep/") for i in range(4)]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """12 images in three folders, every second with a face, and two files that are no images by their names."""
    folder = tmp_path / "photographs"
    for i, name in enumerate(NAMES):
        picture(folder / name, i, i % 2 == 0)
    (folder / "train" / "notes.txt").write_text("no image")
    (folder / "manifest.json").write_text("{}")
    return folder


def run(
    folder: Path,
    output: Path,
    detector: BrightFaces | None = None,
    force: bool = False,
    medium: Medium = "images",
    blur: Blur | None = None,
) -> tuple[dict[str, Any], bool]:
    task = BlurTask(folder, medium, lambda: detector or BrightFaces(), blur or Blur())
    return blur_folder(task, output, 1, force)


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(output: Path) -> dict[str, dict[str, Any]]:
    return {row["file"]: row for row in map(json.loads, (output / ROWS_NAME).read_text().splitlines())}


def test_a_folder_keeps_its_structure_and_the_manifest_tells_what_was_done(tmp_path: Path, photographs: Path) -> None:
    output = tmp_path / "new" / "blurred"
    manifest, is_new = run(photographs, output)
    assert is_new
    assert set(listing(output)) == {*NAMES, ROWS_NAME, "manifest.json"}
    for i, name in enumerate(NAMES):
        same = (output / name).read_bytes() == (photographs / name).read_bytes()
        assert same == (i % 2 == 1), name
        with Image.open(output / name) as image:
            assert image.size == SIZE
    assert json.loads((output / "manifest.json").read_text()) == manifest
    assert manifest["counts"] == {"images": 12, "with_faces": 6, "faces": 6}
    assert manifest["skipped"] == {}
    assert manifest[RECORD] == {"detector": "BrightFaces", "version": "1", "threshold": 0.5}
    assert manifest["options"]["blur"] == {"margin": 0.15, "sigma": 0.15, "feather": 0.15}
    assert manifest["notes"] == {"file left out, which is something else by its name": 2}
    found = rows(output)
    assert list(found) == sorted(NAMES)
    assert found["0.png"]["faces"] == [[15.0, 5.0, 25.0, 15.0, 0.5]]
    assert found["1.png"]["faces"] == []
    assert found["1.png"]["bytes"] == (output / "1.png").stat().st_size
    assert sorted(p.name for p in output.parent.iterdir()) == ["blurred"]


def test_a_second_run_does_nothing(tmp_path: Path, photographs: Path) -> None:
    output, detector = tmp_path / "blurred", BrightFaces()
    run(photographs, output)
    before = {p: p.stat() for p in output.rglob("*")}
    manifest, is_new = run(photographs, output, detector)
    assert (is_new, detector.calls) == (False, 0)
    assert manifest["counts"]["images"] == 12
    assert {p: p.stat() for p in output.rglob("*") if p.is_dir()}.keys() == {p for p in before if p.is_dir()}
    assert all(p.stat().st_ino == s.st_ino and p.stat().st_mtime_ns == s.st_mtime_ns for p, s in before.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blurred", "photographs"]


def test_a_rerun_searches_new_and_changed_files_alone(tmp_path: Path, photographs: Path) -> None:
    output, detector = tmp_path / "blurred", BrightFaces()
    run(photographs, output)
    picture(photographs / "train" / "new.png", 13, True)
    picture(photographs / "1.png", 14, True)  # had no face
    (photographs / "2.png").rename(photographs / "moved.png")
    (photographs / "train" / "deep" / "3.png").unlink()
    shutil.copystat(photographs / "0.png", photographs / "1.png")
    _, is_new = run(photographs, output, detector)
    assert (is_new, detector.calls) == (True, 3)
    run(photographs, tmp_path / "fresh")
    assert listing(output) == listing(tmp_path / "fresh")
    assert "2.png" not in listing(output)


def test_a_file_missing_from_the_output_is_made_again(tmp_path: Path, photographs: Path) -> None:
    output, detector = tmp_path / "blurred", BrightFaces()
    run(photographs, output)
    before = listing(output)
    (output / "0.png").unlink()
    (output / "train" / "1.png").write_bytes(b"cut")
    assert run(photographs, output, detector)[1]
    assert detector.calls == 2
    assert listing(output) == before


@pytest.mark.parametrize("at", [1, 5, 12])
def test_an_interrupted_run_leaves_no_output_and_the_next_goes_on(tmp_path: Path, photographs: Path, at: int) -> None:
    output, detector = tmp_path / "blurred", BrightFaces()
    with pytest.raises(KeyboardInterrupt):
        run(photographs, output, BrightFaces(ends_at=at))
    assert not output.exists()
    run(photographs, output, detector)
    assert detector.calls == 12 - (at - 1)
    run(photographs, tmp_path / "fresh")
    assert listing(output) == listing(tmp_path / "fresh")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blurred", "fresh", "photographs"]


def test_what_a_kill_leaves_behind_does_no_harm(tmp_path: Path, photographs: Path) -> None:
    output, detector = tmp_path / "blurred", BrightFaces()
    with pytest.raises(KeyboardInterrupt):
        run(photographs, output, BrightFaces(ends_at=7))
    staging = tmp_path / ".blurred.partial"
    with open(staging / "journal.jsonl", "ab") as journal:
        journal.write(b'{"file": "train/2.p')  # the line that was being written
    (staging / "data" / ".0.png.x1").write_bytes(b"half")
    (staging / "data" / "gone").mkdir()
    (staging / "data" / "gone" / "old.png").write_bytes(b"of an input that is gone")
    (staging / "data" / "0.png").write_bytes(b"cut")
    run(photographs, output, detector)
    assert detector.calls == 6 + 1
    run(photographs, tmp_path / "fresh")
    assert listing(output) == listing(tmp_path / "fresh")
    assert not (output / "gone").exists()


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path, photographs: Path) -> None:
    output, detector = tmp_path / "blurred", BrightFaces()
    run(photographs, output)
    before = listing(output)
    picture(photographs / "new.png", 13, True)
    with pytest.raises(KeyboardInterrupt):
        run(photographs, output, BrightFaces(ends_at=1))
    assert listing(output) == before  # the old one stays until the new one is whole
    output.rename(tmp_path / ".blurred.partial" / "old")
    run(photographs, output, detector)
    run(photographs, tmp_path / "fresh")
    assert listing(output) == listing(tmp_path / "fresh")
    assert not (tmp_path / ".blurred.partial").exists()


def test_other_options_need_force_and_start_anew(tmp_path: Path, photographs: Path) -> None:
    output, detector = tmp_path / "blurred", BrightFaces()
    run(photographs, output)
    before = listing(output)
    with pytest.raises(DataError, match=r"other options.*--force"):
        run(photographs, output, blur=Blur(sigma=0.3))
    assert listing(output) == before
    with pytest.raises(KeyboardInterrupt):
        run(photographs, output, BrightFaces(ends_at=5), force=True, blur=Blur(sigma=0.2))
    run(photographs, output, detector, force=True, blur=Blur(sigma=0.3))
    assert detector.calls == 12
    assert listing(output)["0.png"] != before["0.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blurred", "photographs"]


def test_unreadable_files_are_left_out_and_counted_by_reason(tmp_path: Path, photographs: Path) -> None:
    (photographs / "cut.png").write_bytes((photographs / "0.png").read_bytes()[:200])
    (photographs / "text.jpg").write_text("no image")
    (photographs / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (photographs / "folder.png").mkdir()
    (photographs / "odd\udcff.png").write_bytes(b"")
    output = tmp_path / "blurred"
    manifest, _ = run(photographs, output)
    assert manifest["skipped"] == {
        "file that cannot be opened": 1,
        "file whose name is not UTF-8": 1,
        "image that does not decode": 2,
    }
    assert set(listing(output)) == {*NAMES, ROWS_NAME, "manifest.json"}
    assert rows(output)["cut.png"] == {"file": "cut.png", "skipped": "image that does not decode"}
    assert not run(photographs, output)[1]
    shutil.copy(photographs / "0.png", photographs / "cut.png")
    assert run(photographs, output)[0]["counts"]["images"] == 13


def test_when_more_than_half_cannot_be_read_nothing_is_built(tmp_path: Path, photographs: Path) -> None:
    for i in range(13):
        (photographs / f"bad{i}.jpg").write_text("no image")
    output, detector = tmp_path / "blurred", BrightFaces()
    with pytest.raises(DataError, match=r"13 of 25 files cannot be used \(image that does not decode: 13\)"):
        run(photographs, output)
    assert not output.exists()
    (photographs / "bad0.jpg").unlink()
    run(photographs, output, detector)
    assert detector.calls == 0  # what was done is kept


def test_what_cannot_be_blurred_or_written_gives_one_message(tmp_path: Path, photographs: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "manifest.json").write_text('{"dataset": "coco"}')
    for folder, output, words in [
        (tmp_path / "nowhere", tmp_path / "x", "no such folder"),
        (photographs / "0.png", tmp_path / "x", "no such folder"),
        (other, tmp_path / "x", "no file below it is one by its name"),
        (photographs, other, "not a finished data set"),
        (photographs, dataset, "finished data set .coco. made with other options"),
        (photographs, photographs, "another folder"),
        (photographs, photographs / "train" / "blurred", "another folder"),
        (photographs / "train", photographs, "another folder"),
    ]:
        before = listing(tmp_path)
        with pytest.raises(DataError, match=words):
            run(folder, output)
        assert listing(tmp_path) == before


def test_two_runs_do_not_work_at_one_output(tmp_path: Path, photographs: Path) -> None:
    staging = tmp_path / ".blurred.partial"
    staging.mkdir()
    with open(staging / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run works at it"):
            run(photographs, tmp_path / "blurred")
    assert run(photographs, tmp_path / "blurred")[1]


def test_progress_counts_every_file(tmp_path: Path, photographs: Path) -> None:
    from collections.abc import Callable, Iterator
    from contextlib import contextmanager

    steps: list[str] = []

    @contextmanager
    def progress(text: str, total: int) -> Iterator[Callable[[], None]]:
        steps.append(f"{text} {total}")
        yield lambda: steps.append("step")

    task = BlurTask(photographs, "images", BrightFaces, Blur())
    blur_folder(task, tmp_path / "blurred", 1, progress=progress)
    assert steps == ["blurring faces in images 12"] + ["step"] * 12


def test_videos_go_the_same_way(tmp_path: Path, realdata: Path) -> None:
    folder, output = tmp_path / "videos", tmp_path / "blurred"
    (folder / "sub").mkdir(parents=True)
    for name in ("video_0.mov", "var_fps_video.mp4"):
        shutil.copyfile(realdata / "videos" / name, folder / "sub" / name)
    (folder / "text.mp4").write_text("no video")
    manifest, _ = run(folder, output, medium="videos")
    assert manifest["counts"]["videos"] == 2
    assert manifest["counts"]["frames"] == 303
    assert manifest["skipped"] == {"video that cannot be opened or has no video stream": 1}
    assert rows(output)["sub/video_0.mov"]["frames"] == 3
    assert not run(folder, output, medium="videos")[1]
