"""A data set as one DVC artefact on an S3 server: pushed, killed midway, pushed again, pulled by a clean clone."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
import yaml
from PIL import Image

from locvlm.cli import main
from locvlm.data.conversations import open_conversations
from locvlm.data.fetch import fetch_remote
from locvlm.pixels import open_images

pytestmark = pytest.mark.slow

DVC = str(Path(sys.executable).with_name("dvc"))
BUCKET = "data-sets"
N_IMAGES = 30
IDENTITY = ["-c", "user.name=test", "-c", "user.email=test@example.org"]


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def build(data: Path) -> None:
    """Noise that no compression makes small, as shards of 1 MiB, and a data set of captions about it."""
    noise, listed = data.parent / "noise", data.parent / "chat.json"
    noise.mkdir()
    for number in range(N_IMAGES):
        Image.frombytes("L", (800, 800), os.urandom(640_000)).save(noise / f"{number}.png", compress_level=1)
    records = ",".join(
        f'{{"id": "{k}", "image": "{k}.png", "conversations": [{{"from": "human", "value": "<image>"}}, '
        f'{{"from": "gpt", "value": "noise number {k}"}}]}}'
        for k in range(N_IMAGES)
    )
    listed.write_text(f"[{records}]")
    assert main(["data", "shard", "--images", str(noise), "--output", str(data / "images"), "--shard-mib", "1"]) == 0
    command = ["data", "captions", "--source", str(listed), "--images", str(data / "images")]
    assert main([*command, "--output", str(data / "captions")]) == 0


def test_an_interrupted_push_is_finished_by_the_next_and_a_clone_gets_every_byte(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)

    def stored() -> dict[str, object]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {entry["Key"]: entry["LastModified"] for page in pages for entry in page.get("Contents", ())}

    repository = tmp_path / "repository"
    (repository / "data").mkdir(parents=True)
    build(repository / "data")
    run(repository, "git", "init", "--quiet")
    run(repository, DVC, "init", "--quiet")
    run(repository, DVC, "remote", "add", "--quiet", "--default", "s3", f"s3://{BUCKET}/data")
    run(repository, DVC, "add", "--quiet", "data")
    run(repository, "git", "add", "data.dvc", ".gitignore", ".dvc/config", ".dvcignore")
    run(repository, "git", *IDENTITY, "commit", "--quiet", "-m", "data")
    original = files(repository / "data")
    assert "test" not in (repository / ".dvc" / "config").read_text()  # no credentials in what is committed
    n_objects = len(set(original.values())) + 1  # and the list of the folder

    push = subprocess.Popen(
        [DVC, "push", "--jobs", "1"], cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(stored()) < 5 and push.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(push.pid, signal.SIGKILL)
    push.wait()
    before = stored()
    assert 5 <= len(before) < n_objects
    assert not any(key.endswith(".dir") for key in before)  # the list comes last: nothing half-pushed looks whole

    said = run(repository, DVC, "push")
    after = stored()
    assert re.search(rf"\b{n_objects - len(before)} files pushed", said)
    assert len(after) == n_objects
    assert all(after[key] == changed for key, changed in before.items())
    assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")

    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(repository), str(clone))
    assert not (clone / "data").exists()
    run(clone, DVC, "pull", "--quiet")
    assert files(clone / "data") == original
    pin = yaml.safe_load((clone / "data.dvc").read_text())["outs"][0]["md5"]
    fetched = tmp_path / "cluster" / "data"
    assert (
        fetch_remote(pin, f"s3://{BUCKET}/data", fetched)["pulled"] is True
    )  # as a pipeline step gets it, without Git
    assert files(fetched) == original
    images = open_images(clone / "data" / "images")
    assert images.open(open_conversations(clone / "data" / "captions")[7].image).size == (800, 800)
