"""`locvlm caption` really killed in the middle, alone and on Ray Data: the rest is done, and the bytes are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.evaluation.asks import Engine
from locvlm.evaluation.inference import run_batches
from locvlm.model import load
from locvlm.model.checkpoint import TINY_FOUNDATION
from locvlm.training.ray_train import local_head
from tests.tiny import World, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The captions of a run that nothing disturbed, in one process."""
    output = tmp_path_factory.mktemp("straight") / "captions.jsonl"
    run = start(world, output)
    assert run.wait(120) == 0, log_of(output)
    return output


def start(world: World, output: Path, workers: int = 1) -> "subprocess.Popen[bytes]":
    scenes = world.images.parent
    command = [sys.executable, "-m", "locvlm", "caption", "--annotations", str(scenes / "instances_train.json")]
    command += ["--images", str(world.images), "--model", str(world.foundation), "--output", str(output)]
    # an untrained model never says the stop token: long answers leave time to kill it
    command += ["--limit", "16", "--batch-size", "4", "--max-new-tokens", "150", "--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def log_of(output: Path) -> str:
    return output.with_suffix(".log").read_text()[-3000:]


def kill_in_the_middle(run: "subprocess.Popen[bytes]", output: Path) -> set[int]:
    """Kill the process when two batches are on the disk; the objects that are finished."""
    partial = output.with_name(f"{output.name}.partial.jsonl")
    deadline = time.monotonic() + 120
    while not partial.is_file() or partial.read_bytes().count(b"\n") < 3:
        assert run.poll() is None, f"the run ended before the kill: {log_of(output)}"
        assert time.monotonic() < deadline, f"nothing was finished in time: {log_of(output)}"
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not output.exists()
    lines = partial.read_bytes().split(b"\n")[1:-1]
    return {row["id"] for line in lines for row in json.loads(line)["rows"]}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(world: World, straight: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    done = kill_in_the_middle(start(world, output), output)
    total = len(straight.read_text().splitlines())
    assert 0 < len(done) < total
    assert start(world, output).wait(120) == 0, log_of(output)
    assert f"continuing after {len(done)} of {total} objects" in log_of(output)
    assert output.read_bytes() == straight.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.jsonl", "captions.log", "captions.meta.json"]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_ray_workers_give_the_same_bytes_also_when_killed(world: World, straight: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    done = kill_in_the_middle(start(world, output, workers=2), output)
    assert start(world, output, workers=2).wait(180) == 0, log_of(output)
    assert f"continuing after {len(done)} of" in log_of(output)
    assert output.read_bytes() == straight.read_bytes()
    meta = output.with_suffix(".meta.json")
    assert meta.read_bytes() == straight.with_suffix(".meta.json").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ray_actors_hand_over_results_and_the_users_error() -> None:
    def open_model() -> Engine:
        return load(TINY_FOUNDATION)

    def open_nothing() -> Engine:
        return load("/nowhere/at/all")

    def halve(engine: Engine, batch: Sequence[int]) -> list[int]:
        assert engine.config is not None
        if 13 in batch:
            raise DataError("thirteen cannot be halved")
        return [number // 2 for number in batch]

    batches = [[2 * n, 2 * n + 2] for n in range(20)]
    with local_head():
        assert dict(run_batches(open_model, halve, batches, 2)) == {n: [n, n + 1] for n in range(20)}
        with pytest.raises(DataError, match=r"^thirteen cannot be halved$"):
            list(run_batches(open_model, halve, [[1], [13], [5]], 2))
        with pytest.raises(CheckpointError, match=r"^loading the model /nowhere/at/all: there is no such folder"):
            list(run_batches(open_nothing, halve, batches, 2))
        with pytest.raises(ConfigError, match=r"starting 999 workers: the cluster has \d+ [CG]PUs"):
            next(run_batches(open_model, halve, batches, 999))
