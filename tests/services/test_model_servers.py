"""A registered version behind other people's servers: MLflow's own and Ray Serve, each as processes of their own."""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import pyfunc
from PIL import Image

from locvlm import registry, tracking
from locvlm.cli import main
from locvlm.errors import TrackingError
from locvlm.model.checkpoint import TINY_FOUNDATION
from locvlm.records import write_json
from locvlm.registry import versions
from locvlm.serving.assistant import open_assistant
from locvlm.serving.forms import Answer, Query
from locvlm.serving.limits import Limits
from tests.rendered import named
from tests.server import serving

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent  # `mlflow models serve` looks for uvicorn on PATH
FIGURE = {"value": 0.9, "n": 10, "low": 0.6, "high": 1.0, "floor": 0.5}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry in which `inside` is a champion with its weights, `beside` one whose weights lie elsewhere."""
    folder = tmp_path_factory.mktemp("registry")
    uri = tracking.initialise(f"sqlite:///{folder / 'mlflow.db'}")
    write_json(folder / "metrics.json", {"task": "coco-spatial", "figures": {"accuracy": FIGURE}, "items": {}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        for name, largest in (("inside", versions.LARGEST_UPLOAD), ("beside", 1000)):
            patch.setattr(versions, "LARGEST_UPLOAD", largest)
            registry.register(TINY_FOUNDATION, {"coco-spatial": folder / "metrics.json"}, name, {})
            tracking.connect().set_registered_model_alias(name, registry.CHAMPION, "1")
    return uri


@pytest.fixture(autouse=True)
def use_store(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("images") / "image.png"
    Image.effect_noise((60, 40), 90).convert("RGB").save(path)
    image = base64.b64encode(path.read_bytes()).decode()
    return [{"image": image, "locate": "red circle"}, {"image": image, "box": [5, 5, 40, 30]}]


@pytest.fixture(scope="module")
def expected(queries: list[dict[str, Any]]) -> list[Answer]:
    """What the checkpoint says when it is asked without any server."""
    assistant = open_assistant(TINY_FOUNDATION, Limits())
    return assistant.answers([assistant.prepare(Query.model_validate(query)) for query in queries])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, content: Any) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as fault:
        return fault.code, json.loads(fault.read())


@contextlib.contextmanager
def running(command: list[str], health: str, folder: Path, **environment: str) -> Iterator[None]:
    """A server in a process group of its own, from the time that it is healthy."""
    log = folder / "server.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]), **environment},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 150
        while not healthy(health):
            assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"the server did not come up:\n{log.read_text()[-3000:]}"
            time.sleep(0.3)
        yield
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, how)
                process.wait(30)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_mlflow_serves_the_champion(queries: list[dict[str, Any]], expected: list[Answer], tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/inside@champion", "-p", str(port)]
    with running([*command, "--env-manager", "local"], f"http://127.0.0.1:{port}/ping", tmp_path):
        status, found = post(f"http://127.0.0.1:{port}/invocations", {"inputs": queries})
        assert (status, [Answer.model_validate_json(text) for text in found["predictions"]]) == (200, expected)
        status, found = post(f"http://127.0.0.1:{port}/invocations", {"inputs": [{"image": 3}]})
        assert status == 400
        assert "image" in found["message"]


def test_weights_that_lie_elsewhere_are_found_and_checked(
    queries: list[dict[str, Any]], expected: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = pyfunc.load_model("models:/beside@champion")
    assert [Answer.model_validate_json(text) for text in loaded.predict(queries)] == expected
    model = tmp_path / "model"
    shutil.copytree(TINY_FOUNDATION, model)
    write_json(tmp_path / "metrics.json", {"task": "coco-spatial", "figures": {"accuracy": FIGURE}, "items": {}})
    monkeypatch.setattr(versions, "LARGEST_UPLOAD", 1000)
    made = registry.register(model, {"coco-spatial": tmp_path / "metrics.json"}, "replaced", {})
    with open(model / "model.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(TrackingError, match="no longer holds what was registered"):
        pyfunc.load_model(made.source)


def test_serve_opens_the_champion_and_ends_when_it_has_answered(
    queries: list[dict[str, Any]], expected: list[Answer], tmp_path: Path
) -> None:
    with serving(tmp_path, "--registry", "models:/inside@champion") as server:
        about = server.request("GET", "/api").content
        assert (about["model"], about["version"]) == ("inside", "1")
        assert "inside version 1" in server.request("GET", "/").body.decode()
        body = json.dumps(queries[0]).encode()
        connection = server.connect()
        connection.putrequest("POST", "/api/answer")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:10])
        time.sleep(0.5)  # the request is under way
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        connection.send(body[10:])
        reply = connection.getresponse()
        assert (reply.status, Answer.model_validate_json(reply.read())) == (200, expected[0])
        assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_ask_opens_a_version(
    queries: list[dict[str, Any]], expected: list[Answer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image.png").write_bytes(base64.b64decode(queries[1]["image"]))
    command = ["ask", "--image", str(tmp_path / "image.png"), "--json"]
    assert main([*command, "--registry", "models:/inside/1", "--box", "5,5,40,30"]) == 0
    assert Answer.model_validate_json(capsys.readouterr().out) == expected[1]
    assert main([*command, "--registry", "models:/nobody@champion", "--question", "x"]) == 2
    assert "nobody" in capsys.readouterr().err


def test_ray_serve_runs_the_application_of_the_ray_service(
    queries: list[dict[str, Any]], expected: list[Answer], tmp_path: Path
) -> None:
    config = yaml.safe_load(named("local", "RayService", "locvlm")["spec"]["serveConfigV2"])
    port = free_port()
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"]["registry"] = "models:/inside@champion"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with (
        tempfile.TemporaryDirectory(prefix="r-", ignore_cleanup_errors=True) as short,  # Ray keeps sockets below it
        running(
            [str(BIN / "serve"), "run", "config.yaml"],
            f"http://127.0.0.1:{port}/health",
            tmp_path,
            RAY_ADDRESS="local",
            RAY_TMPDIR=short,
            RAY_AUTH_MODE="disabled",
        ),
    ):
        status, found = post(f"http://127.0.0.1:{port}/api/answer", queries[0])
        assert (status, Answer.model_validate(found)) == (200, expected[0])
        assert post(f"http://127.0.0.1:{port}/api/answer", {"image": "", "question": "x"})[0] == 400
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=30) as reply:
            assert json.loads(reply.read())["version"] == "1"
