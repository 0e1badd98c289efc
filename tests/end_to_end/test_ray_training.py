"""A stage as a Ray Train job with two workers, one of which is really killed."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file

from locvlm.config import dump_config, resolve
from locvlm.training.ray_train import local_head, train_on_ray
from locvlm.training.stage import Job
from tests.tiny import World, build_world

STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(
        tmp_path_factory.mktemp("world"),
        f"stages.align.steps={STEPS}",
        "stages.align.conversations_per_image=0",
        "cluster.checkpoint_every=10",
        "cluster.log_every=1",
        "cluster.validate_every=4",
        "cluster.validate_samples=6",
        "cluster.validate_questions=3",
        "cluster.keep_best=loss",
    )


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with local_head() as address:
        yield address


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_killed_worker_costs_nothing_but_time(world: World, tmp_path: Path, head: str, engine: str) -> None:
    """Checkpoints at 10 and 20: the killed run does the steps after 10 again, on the same samples, and looks at the
    same held-out data; the best weights come through as well. What was really restarted stands in `attempts.jsonl`."""
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(resolve(world.config.model_dump(mode="json"), [f"cluster.engine={engine}"])))
    straight = _start(world, config, tmp_path / "straight", tmp_path / "straight.log")
    assert straight.wait(120) == 0, (tmp_path / "straight.log").read_text()[-3000:]
    broken = _start(world, config, tmp_path / "broken", tmp_path / "broken.log")
    folder = tmp_path / ".broken.training"
    _wait_for(lambda: _last_step(folder / "curve.jsonl") >= 12 and _is_registered(folder, 10), broken)
    victims = [p for p in psutil.process_iter(["cmdline", "ppid"]) if _is_worker(p, head)]
    assert victims
    os.kill(victims[-1].pid, signal.SIGKILL)
    assert broken.wait(150) == 0, (tmp_path / "broken.log").read_text()[-3000:]
    attempts, undisturbed = (_rows(tmp_path / name / "attempts.jsonl") for name in ("broken", "straight"))
    assert attempts == [{"step": 0, "workers": 2}, {"step": 10, "workers": 2}]
    assert undisturbed == attempts[:1]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("broken", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["step"] for row in _rows(tmp_path / "broken" / "curve.jsonl")] == list(range(1, STEPS + 1))
    looks, expected = (_rows(tmp_path / name / "validation.jsonl") for name in ("broken", "straight"))
    assert [row["step"] for row in looks] == [4, 8, 12, 16, 20]
    assert {"loss", "loc_iou", "neg_accuracy"} <= looks[0].keys()
    assert [{**row, "seconds": 0} for row in looks] == [{**row, "seconds": 0} for row in expected]
    receipt = json.loads((tmp_path / "broken" / "receipt.json").read_text())
    assert (receipt["steps"], receipt["workers"], receipt["attempts"]) == (STEPS, 2, 2)
    assert receipt["precision"] == "fp32"
    best = min(looks, key=lambda row: row["loss"])
    assert receipt["kept"] == {"figure": "loss", "value": best["loss"], "step": best["step"]}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_worker_that_dies_before_it_is_at_work_is_made_again(
    world: World, tmp_path: Path, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray Train gives up when a worker is lost after it was made and before the training function runs in it."""
    config = resolve(world.config.model_dump(mode="json"), ["cluster.cpus_per_worker=1", "stages.align.steps=2"])
    job = _Fatal("align", config, {"generic": world.data["generic"]}, world.images, tmp_path / "model")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with caplog.at_level(logging.WARNING):
        train_on_ray(job, 1)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert "lost while it started" in caplog.text
    assert (tmp_path / "died").exists()
    assert _rows(job.output / "attempts.jsonl") == [{"step": 0, "workers": 1}]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_without_its_last_checkpoint_a_run_goes_on_from_the_one_before(world: World, tmp_path: Path, head: str) -> None:
    changes = ["cluster.cpus_per_worker=1", "stages.align.steps=4", "cluster.checkpoint_every=2"]
    config = resolve(world.config.model_dump(mode="json"), changes)
    job = Job("align", config, {"generic": world.data["generic"]}, world.images, tmp_path / "model")
    train_on_ray(job, 1)
    trained = load_file(job.output / "model.safetensors")
    shutil.rmtree(job.output)
    shutil.rmtree(job.folder / "ray" / "step-000000004")
    train_on_ray(job, 1)
    assert [row["step"] for row in _rows(job.output / "attempts.jsonl")] == [0, 2]
    again = load_file(job.output / "model.safetensors")
    assert all(torch.equal(again[name], trained[name]) for name in trained)


class _Fatal(Job):
    """Kills the first worker that is handed the training function; Ray hands over the settings by themselves before."""

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "fatal": _Fuse(self.output.parent / "died")}


@dataclass
class _Fuse:
    burnt: Path

    def __reduce__(self) -> tuple[object, ...]:
        return _burn, (self.burnt,)


def _burn(burnt: Path) -> _Fuse:
    lit = "LOCVLM_TEST_LIT" in os.environ
    os.environ["LOCVLM_TEST_LIT"] = "1"
    if lit and not burnt.exists() and _is_ray_worker(psutil.Process()):
        burnt.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return _Fuse(burnt)


def _start(world: World, config: Path, output: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "locvlm", "train", "--stage", "align", "--config", str(config), "--workers", "2"]
    command += ["--validate", f"localize={world.data['localize']}"]
    command += ["--data", f"generic={world.data['generic']}", "--images", str(world.images), "--output", str(output)]
    with open(log, "wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def _is_worker(process: psutil.Process, head: str) -> bool:
    """Whether it is a training worker below this head's raylet: other tests have heads of their own meanwhile."""
    try:
        if not _is_ray_worker(process):
            return False
        return any(part.endswith(f"address={head}") for part in psutil.Process(process.info["ppid"]).cmdline())
    except psutil.Error:
        return False


def _is_ray_worker(process: psutil.Process) -> bool:
    return any("RayTrainWorker" in part for part in process.cmdline())


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _is_registered(folder: Path, step: int) -> bool:
    """Whether Ray would go on from the checkpoint of that step; it takes a moment after the step."""
    state = folder / "ray" / "checkpoint_manager_snapshot.json"
    return state.is_file() and f"step-{step:09d}" in state.read_text()


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
