"""`locvlm data shard|captions|llava|video-instruct` and `locvlm train --images`: files in, folders out, one message."""

import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.cli import main
from locvlm.cli.training import _image_folders
from locvlm.data.conversations import open_conversations
from locvlm.data.pretraining import tar_captions
from locvlm.errors import ConfigError
from locvlm.pixels import open_images
from locvlm.training.stage import Job


def data(*words: object) -> int:
    return main(["data", *map(str, words)])


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def refused(capsys: pytest.CaptureFixture[str], output: Path, *words: object) -> str:
    """The one message of a command that must fail as the user's mistake and leave nothing."""
    before = sorted(output.parent.iterdir())
    capsys.readouterr()
    assert data(*words, "--output", output) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("locvlm: ")
    assert "Traceback" not in err
    assert sorted(output.parent.iterdir()) == before
    return err


def draw_images(folder: Path, n: int = 6) -> Path:
    (folder / "train").mkdir(parents=True)
    for key in range(n):
        Image.effect_noise((60 + key, 40), 50).save(folder / "train" / f"{key}.png")
    return folder


def record(key: int, caption: str) -> dict[str, Any]:
    messages = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": caption}]
    return {"id": str(key), "image": f"train/{key}.png", "conversations": messages}


def write_list(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


def write_tar(path: Path, keys: range) -> Path:
    with tarfile.open(path, "w") as tar:
        for key in keys:
            buffer = io.BytesIO()
            Image.new("RGB", (50, 40), (key % 250, 9, 9)).save(buffer, "JPEG")
            for kind, content in (("jpg", buffer.getvalue()), ("txt", f"caption {key}".encode())):
                info = tarfile.TarInfo(f"{key:09d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_a_folder_of_images_becomes_shards_that_every_verb_takes(tmp_path: Path, capsys: Any) -> None:
    images = draw_images(tmp_path / "images", 40)
    (images / "readme.txt").write_text("hello")
    shards = tmp_path / "shards"
    assert data("shard", "--images", images, "--output", shards) == 0
    assert "images 40, shards 1" in capsys.readouterr().out
    found = manifest(shards)
    assert found["counts"]["images"] == 40
    assert found["skipped"] == {"file that is not an image by its name": 1}
    assert found["shards"].startswith("sha256:")
    assert sorted(path.name for path in shards.iterdir()) == ["images-00000.tar", "images.arrow", "manifest.json"]
    assert data("shard", "--images", images, "--output", tmp_path / "again") == 0
    assert listing(shards) == listing(tmp_path / "again")
    boxes = [{"id": k + 1, "image_id": k, "category_id": 1, "bbox": [1, 2, 9, 9], "iscrowd": 0} for k in range(40)]
    rows = [{"id": k, "file_name": f"train/{k}.png", "width": 60 + k, "height": 40} for k in range(40)]
    coco = {"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    for name, source in (("loose", images), ("packed", shards)):
        command = ["localize-instruct", "--annotations", tmp_path / "coco.json", "--images", source]
        assert data(*command, "--output", tmp_path / name) == 0
    assert manifest(tmp_path / "packed")["skipped"] == {}
    assert listing(tmp_path / "loose")["conversations.arrow"] == listing(tmp_path / "packed")["conversations.arrow"]
    receipt = ["fetch", "--annotations", str(tmp_path / "coco.json"), "--output", str(tmp_path / "receipt.json")]
    md5 = []
    for source in (images, shards):
        assert main([*receipt, "--images", str(source)]) == 0
        md5.append(json.loads((tmp_path / "receipt.json").read_text())["md5"])
    assert md5[0] == md5[1]


def test_tar_files_are_indexed_and_moved_together_with_the_index(tmp_path: Path) -> None:
    (tmp_path / "all" / "cc3m").mkdir(parents=True)
    for number in range(3):
        write_tar(tmp_path / "all" / "cc3m" / f"{number:05d}.tar", range(4 * number, 4 * number + 4))
    output = tmp_path / "all" / "index"
    assert data("shard", "--tars", tmp_path / "all" / "cc3m" / "*.tar", "--output", output) == 0
    assert manifest(output)["counts"] == {"images": 12, "shards": 3}
    (tmp_path / "all").rename(tmp_path / "moved")
    assert open_images(tmp_path / "moved" / "index").open("000000007.jpg").size == (50, 40)


def test_shard_refuses_what_gives_no_image(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    assert "there is no image in it" in refused(capsys, output, "shard", "--images", tmp_path / "empty")
    assert "no such folder" in refused(capsys, output, "shard", "--images", tmp_path / "none")
    assert "there is no such file" in refused(capsys, output, "shard", "--tars", tmp_path / "*.tar")
    (tmp_path / "x.tar").write_bytes(b"hello")
    assert "not a tar file" in refused(capsys, output, "shard", "--tars", tmp_path / "x.tar")


def test_a_caption_list_becomes_a_data_set_with_what_was_left_out(tmp_path: Path, capsys: Any) -> None:
    images = draw_images(tmp_path / "images")
    (images / "train" / "3.png").write_bytes((images / "train" / "3.png").read_bytes()[:90])
    rows = [record(key, f"caption {key}") for key in (0, 1, 2, 3, 4, 77, 1)]
    source = write_list(tmp_path / "chat.json", *rows, {**record(5, "text"), "image": None})
    output = tmp_path / "captions"
    command = ["captions", "--source", source, "--images", images, "--output", output]
    assert data(*command) == 0
    found = manifest(output)
    assert found["counts"] == {
        "images": 4,
        "conversations": 4,
        "loc_pred": 0,
        "neg_pred": 0,
        "rev_loc": 0,
        "caption": 4,
    }
    assert sorted(found["skipped"].values()) == [1, 1, 1, 1]
    assert {entry["path"] for entry in found["sources"]} == {"chat.json", "images"}
    stored = open_conversations(output)
    assert [(c.image, c.width, c.height) for c in stored] == [(f"train/{k}.png", 60 + k, 40) for k in (0, 1, 2, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions", "chat.json", "images"]
    capsys.readouterr()
    assert data(*command) == 0
    assert "already built" in capsys.readouterr().out
    command[-1] = tmp_path / "again"
    assert data(*command) == 0
    assert listing(output) == listing(tmp_path / "again")


def test_tar_files_give_captions_and_are_the_images_too(tmp_path: Path) -> None:
    (tmp_path / "cc3m").mkdir()
    for number in range(3):
        write_tar(tmp_path / "cc3m" / f"{number:05d}.tar", range(5 * number, 5 * number + 6))  # one name twice
    (tmp_path / "cc3m" / "00000_stats.json").write_text('{"failed_to_download": 4, "failed_to_resize": 0}')
    output = tmp_path / "out"
    assert data("captions", "--source", tmp_path / "cc3m", "--output", output, "--seed", 3) == 0
    found = manifest(output)
    assert found["counts"]["conversations"] == found["counts"]["images"] == 16
    assert found["skipped"] == {"image of a tar file whose name occurred before": 2}
    assert list(found["notes"].values()) == [4]
    assert sorted(path.name for path in output.iterdir()) == ["conversations.arrow", "images.arrow", "manifest.json"]
    images = open_images(output)
    assert [c.image for c in open_conversations(output)] == list(images.names())
    assert images.open("000000015.jpg").size == (50, 40)


def test_a_killed_build_goes_on_with_its_parts_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cc3m").mkdir()
    for number in range(20):
        write_tar(tmp_path / "cc3m" / f"{number:05d}.tar", range(120 * number, 120 * number + 120))
    output, parts = tmp_path / "out", tmp_path / ".out.parts"
    command = ["captions", "--source", tmp_path / "cc3m" / "*.tar", "--output", output]
    process = subprocess.Popen([sys.executable, "-m", "locvlm", "data", *map(str, command)])
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*/manifest.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    n_done = len(list(parts.glob("*/manifest.json")))
    assert 2 <= n_done < 20
    assert not output.exists()
    made: list[str] = []

    def counted(path: Path, *rest: Any) -> Any:
        made.append(path.name)
        return tar_captions(path, *rest)

    monkeypatch.setattr("locvlm.data.pretraining.tar_captions", counted)
    assert data(*command) == 0
    assert len(made) == 20 - n_done
    assert not parts.exists()
    command[-1] = tmp_path / "whole"
    assert data(*command) == 0
    assert len(made) == 20 - n_done + 20
    assert listing(output) == listing(tmp_path / "whole")


def test_captions_refuse_sources_that_give_none(tmp_path: Path, capsys: Any) -> None:
    output, images = tmp_path / "out", draw_images(tmp_path / "images")
    good = write_list(tmp_path / "good.json", *(record(key, "text") for key in range(80, 90)))
    error = refused(capsys, output, "captions", "--source", good, "--images", images)
    assert "good.json can be used (image file that is missing: 10)" in error
    error = refused(capsys, output, "captions", "--source", write_list(tmp_path / "bad.json", record(1, "x"), 2, 3))
    assert "2 of 3 records cannot be used" in error
    error = refused(capsys, output, "captions", "--source", write_list(tmp_path / "none.json"))
    assert "it is empty" in error
    tar = write_tar(tmp_path / "x.tar", range(2))
    assert "two data sets" in refused(capsys, output, "captions", "--source", good, tar)
    assert "leave --images out" in refused(capsys, output, "captions", "--source", tar, "--images", images)
    (tmp_path / "cut.json").write_text('[{"id": "1"}, {"id"')
    assert "breaks off" in refused(capsys, output, "captions", "--source", tmp_path / "cut.json")
    error = refused(capsys, output, "captions", "--source", tmp_path / "nothing.json")
    assert "there is no such file" in error


def test_llava_instruct_is_read_once_and_text_only_records_are_counted_with_the_reason(
    tmp_path: Path, capsys: Any
) -> None:
    rows = [record(key, f"answer {key}") for key in range(4)]
    rows[1]["id"] = rows[0]["id"]  # as in the 665K mixture: several conversations about one image
    text_only = [{"id": f"t{k}", "conversations": rows[0]["conversations"]} for k in range(9)]
    videochat = {"image": "train/9.png", "QA": [{"q": "Why?", "a": "So."}, {"q": "How?", "a": "Thus."}]}
    source = write_list(tmp_path / "mix.json", *rows, *text_only, videochat, rows[2])
    output = tmp_path / "llava"
    assert data("llava", "--source", source, "--output", output, "--format", "llava-json") == 0
    assert "text only): the model is always shown one 9" in capsys.readouterr().out
    found = manifest(output)
    assert (found["counts"]["conversations"], found["counts"]["text"]) == (5, 6)
    assert len(found["skipped"]) == 2
    assert list(open_conversations(output / "conversations.json").images) == open_conversations(output).images


def test_video_instruct_finds_the_videos_whatever_their_ending(tmp_path: Path, capsys: Any) -> None:
    rows = [{"q": f"Q{k}?", "a": f"A{k}", "video_id": f"v_{k % 3}"} for k in range(6)]
    source = write_list(tmp_path / "VideoInstruct.json", *rows)
    (tmp_path / "videos").mkdir()
    for name in ("v_0.mkv", "v_1.mp4"):
        (tmp_path / "videos" / name).write_bytes(b"video")
    command = ["video-instruct", "--source", source]
    assert data(*command, "--output", tmp_path / "all") == 0
    assert manifest(tmp_path / "all")["counts"]["conversations"] == 6
    assert open_conversations(tmp_path / "all")[5].image == "v_2.mp4"
    command += ["--videos", tmp_path / "videos", "--group", "video"]
    assert data(*command, "--output", tmp_path / "some") == 0
    found = manifest(tmp_path / "some")
    assert (found["counts"]["conversations"], found["counts"]["images"]) == (2, 2)
    assert found["skipped"] == {"question about a video that is missing": 2}
    assert found["notes"] == {"video that is missing": 1}
    assert [(c.image, c.medium) for c in open_conversations(tmp_path / "some")] == [
        ("v_0.mkv", "video"),
        ("v_1.mp4", "video"),
    ]
    for pattern in ("video.mp4", "{video}.mp4", "{", "{}.mp4"):
        assert "--file-name" in refused(capsys, tmp_path / "x", *command, "--file-name", pattern)
    (tmp_path / "none").mkdir()
    command[4] = tmp_path / "none"
    assert "gave no conversation" in refused(capsys, tmp_path / "x", *command)


def test_each_source_of_a_training_has_its_images(tmp_path: Path) -> None:
    sources = {"localize": tmp_path / "a", "llava": tmp_path / "b"}
    shared, own = tmp_path / "coco", tmp_path / "odd=name"
    own.mkdir()
    assert _image_folders([str(shared)], sources) == dict.fromkeys(sources, shared)
    assert _image_folders([f"llava={own}", str(shared)], sources) == {"localize": shared, "llava": own}
    assert _image_folders([str(own)], sources) == dict.fromkeys(sources, own)
    for values, message in (
        ([f"other={own}"], "--data and --validate gave no 'other'; they gave llava, localize"),
        ([f"llava={own}"] * 2, "'llava' are given twice"),
        ([str(shared)] * 2, "for all sources are given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            _image_folders(values, sources)
    job = Job("align", None, sources, {"llava": own}, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no images for the source localize; add --images localize=DIR"):
        _ = job.image_folders
