"""`locvlm predict` really killed in the middle, alone and on Ray Data: the rest is done, and the bytes are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from locvlm.pixels import open_images
from locvlm.records import write_jsonl
from tests.tiny import World, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def questions(world: World) -> Path:
    """Three questions about each of sixteen images, one of which is cut short."""
    images = open_images(world.images)
    names = [name for name in images.names() if name.startswith("train")][:16]
    (world.images / names[5]).write_bytes((world.images / names[5]).read_bytes()[:60])
    words = ("Is there apple in image?", "Is there bee?", "Is there cat in the image, or is it gone?")
    rows = [
        {"id": f"{k}-{name}", "image": name, "prompt": words[k], "reference": "yes"} for k in range(3) for name in names
    ]
    path = world.images.parent / "presence.jsonl"
    write_jsonl(path, rows)
    return path


@pytest.fixture(scope="module")
def straight(world: World, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of a run that nothing disturbed, in one process."""
    output = tmp_path_factory.mktemp("straight") / "answers.jsonl"
    run = start(world, questions, output)
    assert run.wait(120) == 0, log_of(output)
    return output


def start(world: World, questions: Path, output: Path, workers: int = 1) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "locvlm", "predict", "--task", "presence", "--data", str(questions)]
    command += ["--images", str(world.images), "--model", str(world.foundation), "--output", str(output)]
    # an untrained model never says the stop token: long answers leave time to kill it
    command += ["--temperature", "0.2", "--batch-size", "6", "--max-new-tokens", "150", "--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def log_of(output: Path) -> str:
    return output.with_suffix(".log").read_text()[-3000:]


def kill_in_the_middle(run: "subprocess.Popen[bytes]", output: Path) -> int:
    """Kill the process when two batches are on the disk; the number of answers that are finished."""
    partial = output.with_name(f"{output.name}.partial.jsonl")
    deadline = time.monotonic() + 120
    while not partial.is_file() or partial.read_bytes().count(b"\n") < 1 + 12:
        assert run.poll() is None, f"the run ended before the kill: {log_of(output)}"
        assert time.monotonic() < deadline, f"nothing was finished in time: {log_of(output)}"
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not output.exists()
    return partial.read_bytes().count(b"\n") - 1


def same_files(output: Path, straight: Path) -> None:
    assert output.read_bytes() == straight.read_bytes()
    assert output.with_suffix(".meta.json").read_bytes() == straight.with_suffix(".meta.json").read_bytes()
    assert not output.with_name(f"{output.name}.partial.jsonl").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(world: World, questions: Path, straight: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    done = kill_in_the_middle(start(world, questions, output), output)
    assert 12 <= done < 45
    assert start(world, questions, output).wait(120) == 0, log_of(output)
    assert "continuing after" in log_of(output)
    same_files(output, straight)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 48
    assert sum("failure" in row for row in rows) == 3  # the image that is cut short


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_ray_workers_give_the_same_bytes_also_when_killed(
    world: World, questions: Path, straight: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    kill_in_the_middle(start(world, questions, output, workers=2), output)
    assert start(world, questions, output, workers=2).wait(180) == 0, log_of(output)
    assert "continuing after" in log_of(output)
    same_files(output, straight)
