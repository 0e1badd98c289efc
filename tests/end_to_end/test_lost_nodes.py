"""Ray Train on several nodes that are really killed and drained: raylets on this machine, a worker each.

A node is what `ray start` makes, as in a pod of KubeRay; it is lost by SIGKILL to all its processes at once.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from locvlm.config import dump_config, resolve
from tests.tiny import World, build_world

STEPS = 90
EVERY = 40
SEEN = ("step", "tokens", "targets", "conversations", "learning_rate")  # what the samples of a step decide
RAY = str(Path(sys.executable).with_name("ray"))


class Nodes:
    """A Ray cluster: a head that holds no worker, and nodes of one CPU that come and go."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.address = folder, f"127.0.0.1:{port}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": self.address,
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
            "RAY_health_check_period_ms": "500",
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._sockets = tempfile.TemporaryDirectory(
            prefix="r-", ignore_cleanup_errors=True
        )  # their paths must be short
        self._start(
            "head",
            "--head",
            f"--port={port}",
            "--num-cpus=0",
            "--include-dashboard=false",
            f"--temp-dir={self._sockets.name}",
        )

    def add(self, *names: str) -> None:
        """Nodes of one CPU each."""
        for name in names:
            self._start(name, f"--address={self.address}", "--num-cpus=1")

    def kill(self, name: str) -> None:
        """As a machine that loses its power."""
        for process in self._processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.running.pop(name).wait()

    def drain(self, name: str, seconds: int) -> None:
        """The notice of a cloud: the node will be taken away in so many seconds."""
        (raylet,) = [p for p in self._processes(name) if p.name() == "raylet"]
        (node,) = [part.partition("=")[2] for part in raylet.cmdline() if part.startswith("--node_id=")]
        notice = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        command = [RAY, "drain-node", f"--address={self.address}", f"--node-id={node}", *notice]
        subprocess.run([*command, f"--deadline-remaining-seconds={seconds}"], env=self.environment, check=True)

    def with_workers(self) -> list[str]:
        """The nodes that hold a training worker now."""
        return [n for n in self.running if any("RayTrainWorker" in " ".join(_words(p)) for p in self._processes(n))]

    def close(self) -> None:
        """Nothing stays."""
        for name in list(self.running):
            self.kill(name)
        self._sockets.cleanup()

    def _start(self, name: str, *arguments: str) -> None:
        command = [RAY, "start", "--block", *arguments, "--object-store-memory=100000000"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
        log = self.folder / f"{name}.log"
        with open(log, "wb") as file:
            self.running[name] = subprocess.Popen(command, env=self.environment, stdout=file, stderr=file)
        wait_for(lambda: "Ray runtime started" in log.read_text(), self.running[name], log)

    def _processes(self, name: str) -> list[psutil.Process]:
        if self.running[name].poll() is not None:
            return []
        root = psutil.Process(self.running[name].pid)
        return [root, *root.children(recursive=True)]


class Run:
    """`locvlm train` on the cluster."""

    def __init__(self, world: World, nodes: Nodes, output: Path, workers: int, *overrides: str) -> None:
        self.output, self.log = output, output.with_suffix(".log")
        self.folder = output.parent / f".{output.name}.training"
        config = output.with_suffix(".yaml")
        config.write_text(dump_config(resolve(world.config.model_dump(mode="json"), overrides)))
        command = [sys.executable, "-m", "locvlm", "train", "--stage", "align", "--config", str(config)]
        command += ["--data", f"generic={world.data['generic']}", "--images", str(world.images)]
        command += ["--workers", str(workers), "--output", str(output)]
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen(command, env=nodes.environment, stdout=file, stderr=file)

    def wait_for_step(self, step: int, stale: dict[str, int] | None = None) -> None:
        """Until the run has come to the step and Ray knows the checkpoint before it. `stale` is an earlier attempt's
        point of that step, which stands on the curve until the next attempt comes to it."""

        def reached() -> bool:
            points = [point for point in self.curve if point["step"] >= step]
            state = self.folder / "ray" / "checkpoint_manager_snapshot.json"
            is_known = state.is_file() and f"step-{step // EVERY * EVERY:09d}" in state.read_text()
            return is_known and points != [] and points[0] != stale

        wait_for(reached, self.process, self.log)

    def finish(self) -> None:
        """To the end."""
        assert self.process.wait(300) == 0, self.log.read_text()[-4000:]

    @property
    def curve(self) -> list[dict[str, int]]:
        """Its points so far, one a step."""
        return rows_of((self.output if self.output.exists() else self.folder) / "curve.jsonl")

    @property
    def attempts(self) -> list[dict[str, int]]:
        """Where each attempt went on, and with how many workers."""
        return rows_of(self.output / "attempts.jsonl")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    settings = [f"stages.align.steps={STEPS}", "stages.align.global_batch=48", f"cluster.checkpoint_every={EVERY}"]
    return build_world(tmp_path_factory.mktemp("world"), *settings, "cluster.log_every=1", "cluster.max_failures=1")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    cluster = Nodes(tmp_path_factory.mktemp("r"))
    try:
        cluster.add("a", "b", "c", "d")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def straight(world: World, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing disturbs."""
    run = Run(world, nodes, tmp_path_factory.mktemp("straight") / "model", 2)
    run.finish()
    assert run.attempts == [{"step": 0, "workers": 2}]
    return run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_and_a_notice_cost_nothing_but_time(
    world: World, nodes: Nodes, straight: Run, tmp_path: Path
) -> None:
    """The kill uses up the one failure that is allowed: the node that is taken away afterwards counts as none. On its
    notice the step is saved, long before the next checkpoint is due."""
    run = Run(world, nodes, tmp_path / "model", 2)
    run.wait_for_step(EVERY + 2)
    stale = run.curve[EVERY]
    assert stale["step"] == EVERY + 1
    nodes.kill(nodes.with_workers()[-1])
    run.wait_for_step(EVERY + 1, stale)
    at = run.curve[-1]["step"]
    leaving = nodes.with_workers()[-1]
    pace = stale["seconds"] / stale["step"]
    nodes.drain(leaving, seconds=max(1, round(10 * pace)))  # time for some steps, not for all up to the checkpoint
    run.finish()
    nodes.kill(leaving)
    first, second, third = run.attempts
    assert first == {"step": 0, "workers": 2}
    assert second == {"step": EVERY, "workers": 2}
    assert third["workers"] == 2
    assert at <= third["step"] < 2 * EVERY
    assert json.loads((run.output / "receipt.json").read_text())["attempts"] == 3
    ours, theirs = (load_file(one.output / "model.safetensors") for one in (run, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [without_time(row) for row in run.curve] == [without_time(row) for row in straight.curve]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_elastic_run_goes_on_with_fewer_workers_at_the_same_sample(
    world: World, nodes: Nodes, straight: Run, tmp_path: Path
) -> None:
    """Of all nodes one is left. The samples of every step stay the same, so do its loss and its update."""
    run = Run(world, nodes, tmp_path / "model", 2, "cluster.min_workers=1")
    run.wait_for_step(EVERY + 2)
    left = nodes.with_workers()[0]
    for name in [name for name in nodes.running if name not in ("head", left)]:
        nodes.kill(name)
    run.finish()
    assert run.attempts == [{"step": 0, "workers": 2}, {"step": EVERY, "workers": 1}]
    for ours, theirs in zip(run.curve, straight.curve, strict=True):
        assert {key: ours[key] for key in SEEN} == {key: theirs[key] for key in SEEN}
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-2)


def rows_of(path: Path) -> list[dict[str, int]]:
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be half written


def without_time(row: dict[str, int]) -> dict[str, int]:
    return {key: value for key, value in row.items() if key != "seconds"}


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def wait_for(
    condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, seconds: float = 300
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)
