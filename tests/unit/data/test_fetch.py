"""Data that is there, whole and of the version that was named, by DVC and by COCO files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from locvlm.cli import main
from locvlm.data.fetch import fetch_coco, fetch_dvc, fetch_remote
from locvlm.errors import DataError

DVC = str(Path(sys.executable).with_name("dvc"))


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The md5 of a data folder that was added to DVC, and the remote that holds it."""
    folder = tmp_path_factory.mktemp("pinned")
    repository, remote = folder / "repository", folder / "remote"
    (repository / "data").mkdir(parents=True)
    (repository / "data" / "a.txt").write_text("a\n")
    (repository / "data" / "b.txt").write_text("b\n")
    for command in (
        ["init", "--no-scm", "-q"],
        ["remote", "add", "-d", "local", str(remote), "-q"],
        ["add", "data", "-q"],
        ["push", "-q"],
    ):
        subprocess.run([DVC, *command], cwd=repository, check=True)
    pin = repository / "data.dvc"
    return str(yaml.safe_load(pin.read_text())["outs"][0]["md5"]), remote


def test_a_version_is_pulled_without_git_and_its_pin_then_holds(tmp_path: Path, pinned: tuple[str, Path]) -> None:
    md5, remote = pinned
    target = tmp_path / "coco"
    assert fetch_remote(md5, str(remote), target) == {"path": str(target), "md5": md5, "pulled": True}
    assert (target / "a.txt").read_text() == "a\n"
    assert fetch_dvc(tmp_path / "coco.dvc") == {"path": str(target), "md5": md5, "pulled": False}
    (target / "a.txt").unlink()  # as an interrupted pull leaves it
    assert fetch_dvc(tmp_path / "coco.dvc")["pulled"] is True
    assert (target / "a.txt").read_text() == "a\n"
    (target / "a.txt").unlink()
    (target / "a.txt").write_text("mine\n")
    with pytest.raises(DataError, match="unsaved files"):
        fetch_dvc(tmp_path / "coco.dvc")
    assert (target / "a.txt").read_text() == "mine\n"


def test_a_version_that_the_remote_has_not_got_is_named(tmp_path: Path, pinned: tuple[str, Path]) -> None:
    with pytest.raises(DataError, match=r"pulling 0{32}\.dir.* from .*remote into .*coco: dvc pull failed") as caught:
        fetch_remote("0" * 32 + ".dir", str(pinned[1]), tmp_path / "coco")
    assert "AWS_ENDPOINT_URL" in str(caught.value)


def test_somebodys_dvc_workspace_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    remote = mine\n")
    with pytest.raises(DataError, match="settings of its own"):
        fetch_remote("0" * 32, "/remote", tmp_path / "data")
    assert (tmp_path / ".dvc" / "config").read_text() == "[core]\n    remote = mine\n"


@pytest.mark.parametrize("text", ["", "outs: []\n", "outs: 3\n", "- [", "outs:\n- path: data\n"])
def test_a_file_that_dvc_did_not_write_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.dvc").write_text(text)
    with pytest.raises(DataError, match=r"data\.dvc.*one entry under outs"):
        fetch_dvc(tmp_path / "data.dvc")


def write_coco(folder: Path, names: list[str]) -> Path:
    images = [{"id": i, "file_name": name, "width": 4, "height": 4} for i, name in enumerate(names, 1)]
    value = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (folder / "instances.json").write_text(json.dumps(value))
    (folder / "images").mkdir(exist_ok=True)
    for name in names:
        (folder / "images" / name).write_bytes(b"1234")
    return folder / "instances.json"


def test_coco_files_and_their_images_have_one_fingerprint(tmp_path: Path) -> None:
    file, images = write_coco(tmp_path, ["a.png", "b.png"]), tmp_path / "images"
    first = fetch_coco([file], images)
    assert first["images"] == 2
    assert fetch_coco([file], images) == first
    (images / "unused.png").write_bytes(b"not named by the annotations")
    assert fetch_coco([file], images) == first
    (images / "a.png").write_bytes(b"12345")
    assert fetch_coco([file], images)["md5"] != first["md5"]
    (images / "a.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 are not there, for example a\.png"):
        fetch_coco([file], images)


def test_the_verb_writes_a_receipt_and_refuses_another_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_coco(tmp_path, ["a.png"])
    receipt = tmp_path / "receipt.json"
    given = ["fetch", "--annotations", str(file), "--images", str(tmp_path / "images"), "--output", str(receipt)]
    assert main(given) == 0
    md5 = json.loads(receipt.read_text())["md5"]
    assert main([*given, "--md5", md5]) == 0
    receipt.unlink()
    assert main([*given, "--md5", "0" * 32]) == 2
    assert f"is version {md5}, wanted was {'0' * 32}" in capsys.readouterr().err
    assert not receipt.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --dvc, --remote and --annotations"),
        (["--dvc", "a.dvc", "--remote", "r"], "give one of"),
        (["--remote", "r"], "--md5 .* and --into"),
        (["--annotations", "a.json"], "--images"),
    ],
)
def test_a_half_told_source_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["fetch", *options, "--output", str(tmp_path / "r.json")]) == 2
    assert re.search(message, capsys.readouterr().err)
