"""Tracking and registry through a real MLflow server, as on the cluster: artifacts go through its proxy."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from locvlm import registry, tracking
from locvlm.config import dump_config
from locvlm.errors import TrackingError
from locvlm.presets import preset
from locvlm.records import write_json
from locvlm.registry import versions
from locvlm.registry.checkpoints import fetch_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server that answers under the names that k8s/base/mlflow.yaml lists."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = tracking.initialise(f"sqlite:///{folder / 'mlflow.db'}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--port", str(port)]
    command += ["--allowed-hosts", f"127.0.0.1:{port}"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"the MLflow server did not come up:\n{log.read_text()[-3000:]}")


def test_a_model_is_registered_and_promoted_through_the_server(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "locvlm.yaml").write_text(dump_config(preset("tiny", ["gate.must_beat_floor=[coco-spatial/accuracy]"])))
    figure = {"value": 0.9, "n": 10, "low": 0.6, "high": 1.0, "floor": 0.5}
    write_json(tmp_path / "metrics.json", {"task": "coco-spatial", "figures": {"accuracy": figure}, "items": {}})
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "through the server")  # one whose artifacts the server keeps
    made = registry.register(model, {"coco-spatial": tmp_path / "metrics.json"}, "served", {"git": "abc"})
    monkeypatch.setattr(versions, "LARGEST_UPLOAD", 3)
    assert not registry.register(model, {"coco-spatial": tmp_path / "metrics.json"}, "served", {}).is_new
    (model / "model.safetensors").write_bytes(b"other weights")
    pointer = registry.register(model, {"coco-spatial": tmp_path / "metrics.json"}, "served", {})
    assert pointer.weights == model.as_uri()
    decision = registry.promote("served", made.version, lambda *_: (0.0, 0.0, 0.0))
    assert decision.promoted
    client = tracking.connect()
    aliases = client.get_registered_model("served").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {"champion": "1", "challenger": "2"}
    assert client.get_run(made.run_id).info.artifact_uri.startswith("mlflow-artifacts:/")
    stored = fetch_checkpoint("models:/served@champion", tmp_path / "fetched")
    assert (stored.folder / "model.safetensors").read_bytes() == b"weights"


def test_a_host_name_that_the_server_refuses_is_explained(server: str) -> None:
    with pytest.raises(TrackingError, match="--allowed-hosts"):
        tracking.initialise(server.replace("127.0.0.1", "localhost"))
