"""A stage as a Ray Train job with two workers, one of which is really killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from locvlm.config import dump_config, resolve
from locvlm.training.ray_train import local_head
from tests.tiny import World, build_world

STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(
        tmp_path_factory.mktemp("world"),
        f"stages.align.steps={STEPS}",
        "stages.align.conversations_per_image=0",
        "cluster.checkpoint_every=5",
        "cluster.log_every=1",
    )


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_killed_worker_costs_nothing_but_time(world: World, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(resolve(world.config.model_dump(mode="json"))))
    with local_head():
        straight = _start(world, config, tmp_path / "straight", tmp_path / "straight.log")
        assert straight.wait(120) == 0, (tmp_path / "straight.log").read_text()[-3000:]
        broken = _start(world, config, tmp_path / "broken", tmp_path / "broken.log")
        curve = tmp_path / ".broken.training" / "curve.jsonl"
        _wait_for(lambda: _last_step(curve) >= 6, broken)
        victims = [p for p in psutil.process_iter(["cmdline"]) if _is_worker(p)]
        assert victims
        os.kill(victims[-1].pid, signal.SIGKILL)
        assert broken.wait(150) == 0, (tmp_path / "broken.log").read_text()[-3000:]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("broken", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "curve.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    receipt = json.loads((tmp_path / "broken" / "receipt.json").read_text())
    assert (receipt["steps"], receipt["workers"]) == (STEPS, 2)


def _start(world: World, config: Path, output: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "locvlm", "train", "--stage", "align", "--config", str(config), "--workers", "2"]
    command += ["--data", f"generic={world.data['generic']}", "--images", str(world.images), "--output", str(output)]
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def _is_worker(process: psutil.Process) -> bool:
    return any("RayTrainWorker" in part for part in process.info["cmdline"] or [])


def _last_step(curve: Path) -> int:
    lines = curve.read_text().splitlines() if curve.is_file() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _wait_for(condition: object, process: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the training ended before the kill"
        assert time.monotonic() < deadline, "the training never came to the step of the kill"
        time.sleep(0.02)
