"""Servers that go away while a model is trained and registered: one clear message or recovery, nothing lost, nothing
trained again."""

import json
import logging
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from locvlm import registry, tracking
from locvlm.cli import main
from locvlm.config import dump_config
from locvlm.data.fetch import fetch_remote
from locvlm.errors import DataError, TrackingError
from locvlm.records import write_json
from locvlm.training.curve import Curve
from tests.deployment import Deployment, Valve, free_port, needs_postgres
from tests.tiny import World, build_world

pytestmark = [pytest.mark.slow]

STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(
        tmp_path_factory.mktemp("world"),
        f"stages.align.steps={STEPS}",
        "stages.align.global_batch=4",
        "cluster.num_workers=0",
        "cluster.checkpoint_every=2",
        "cluster.log_every=1",
        "gate.must_beat_floor=[]",
    )


@pytest.fixture(scope="module")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a run that nobody disturbed."""
    output = tmp_path_factory.mktemp("straight") / "align"
    assert train(world, output) == 0
    return output


@pytest.fixture
def tracked(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server, which the environment names."""
    for name, value in deployment.client.items():
        monkeypatch.setenv(name, value)
    return tracking.connect()


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    before = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = before


def train(world: World, output: Path) -> int:
    config = output.parent / "config.yaml"
    config.write_text(dump_config(world.config))
    command = ["train", "--stage", "align", "--config", str(config), "--images", str(world.images)]
    return main([*command, "--data", f"generic={world.data['generic']}", "--output", str(output)])


def at_step(step: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do `action` once, when the training has come to `step`."""
    add = Curve.add

    def act(curve: Curve, point: Any) -> None:
        add(curve, point)
        if point["step"] == step and not done:
            done.append(step)
            action()

    done: list[int] = []
    monkeypatch.setattr(Curve, "add", act)


def points(client: Any, name: str) -> list[list[int]]:
    """Of every run of this name: the steps whose loss is recorded."""
    experiment = client.get_experiment_by_name("locvlm").experiment_id
    runs = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    assert {run.info.status for run in runs} == {"FINISHED"}
    histories = [client.get_metric_history(run.info.run_id, "loss") for run in runs]
    return [sorted(point.step for point in history) for history in histories]


@needs_postgres
def test_a_tracking_server_that_dies_for_good_costs_no_training_and_the_rest_is_sent_later(
    world: World,
    straight: Path,
    deployment: Deployment,
    tracked: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracking, "_PATIENCE", 0.0)
    at_step(3, lambda: deployment.stop(signal.SIGKILL), monkeypatch)
    output = tmp_path / "dies"
    began = time.monotonic()
    assert train(world, output) == 2
    assert time.monotonic() - began < 60
    said = capsys.readouterr().err
    assert f"{output} is trained and whole, only its figures are not all recorded: run the same command again" in said
    assert "Traceback" not in said
    made = (output / "model.safetensors").stat()
    assert (output / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()

    assert train(world, output) == 2  # still away
    assert "talking to MLflow at http://127.0.0.1" in capsys.readouterr().err
    deployment.start()
    assert train(world, output) == 0
    assert points(tracked, "dies") == [list(range(1, STEPS + 1))]
    assert (output / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns
    assert not (tmp_path / ".dies.training").exists()


@needs_postgres
def test_a_database_that_restarts_in_the_middle_is_waited_for(
    world: World,
    deployment: Deployment,
    tracked: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    back = threading.Timer(4.0, deployment.database.start)

    def restart() -> None:
        deployment.database.stop()
        back.start()

    at_step(3, restart, monkeypatch)
    assert train(world, tmp_path / "restarts") == 0
    back.join()
    assert "metrics wait" in caplog.text
    assert points(tracked, "restarts") == [list(range(1, STEPS + 1))]


@needs_postgres
def test_storage_that_is_away_is_told_within_seconds_and_artifacts_follow_later(
    world: World,
    artifacts: Valve,
    tracked: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "stored"
    at_step(3, artifacts.shut, monkeypatch)
    began = time.monotonic()
    try:
        assert train(world, output) == 2
        assert time.monotonic() - began < 60
        said = capsys.readouterr().err
        assert "run the same command again" in said
        assert "Traceback" not in said
        write_json(tmp_path / "metrics.json", {"task": "coco-spatial", "figures": {}, "items": {}})
        began = time.monotonic()
        with pytest.raises(TrackingError, match="is the storage behind the server up"):
            registry.register(output, {"coco-spatial": tmp_path / "metrics.json"}, "stored", {})
        assert time.monotonic() - began < 60
    finally:
        artifacts.open()
    assert train(world, output) == 0
    assert points(tracked, "stored") == [list(range(1, STEPS + 1))]
    registry.register(output, {"coco-spatial": tmp_path / "metrics.json"}, "stored", {})
    assert [str(version.version) for version in tracked.search_model_versions("name = 'stored'")] == ["1"]


def test_data_whose_storage_is_away_is_told_within_seconds(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"pulling 0123.*s3://nowhere/data.*Could not connect") as caught:
        fetch_remote("0123456789abcdef0123456789abcdef.dir", "s3://nowhere/data", tmp_path / "data")
    assert time.monotonic() - began < 30
    assert "AWS_ENDPOINT_URL" in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for little."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_while_data_is_built_is_told_and_leaves_nothing_half_made(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["data", "scenes", "--output", str(small_disk / "scenes"), "--n-train", "30", "--n-test", "8"]
    (small_disk / "others").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 65536))
    assert main(build) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert [path.name for path in small_disk.iterdir()] == ["others"]
    (small_disk / "others").unlink()
    assert main(build) == 0


def test_a_disk_that_is_full_at_a_checkpoint_is_told_and_the_run_goes_on_when_there_is_room(
    world: World,
    straight: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = small_disk / "align"

    def fill() -> None:
        left = shutil.disk_usage(small_disk).free
        (small_disk / "others").write_bytes(b"x" * (left - 8192))  # room for a point, not for a checkpoint

    at_step(3, fill, monkeypatch)
    assert train(world, output) == 2
    said = capsys.readouterr().err
    assert "saving the checkpoint of step 4" in said
    assert re.search(r"No space left on device|was cut short \(.*\), with 0\.0 MB free there", said)
    assert "Traceback" not in said
    kept = small_disk / ".align.training"
    assert [path.name for path in kept.glob("*step*")] == ["step-000000002"]
    assert not output.exists()

    (small_disk / "others").unlink()
    assert train(world, output) == 0
    assert (output / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    curve = [json.loads(line)["step"] for line in (output / "curve.jsonl").read_text().splitlines()]
    assert curve == list(range(1, STEPS + 1))
