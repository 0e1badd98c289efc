"""Servers that the tests of this folder talk to."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.deployment import BUCKET, Database, Deployment, Valve, s3_client


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server (moto, in a process of its own)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("s3") / "log"
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def s3_server(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an S3 server, which the environment of the test and its processes names, with credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return s3_endpoint


@pytest.fixture(scope="session")
def artifacts(s3_endpoint: str) -> Iterator[Valve]:
    """The way from the MLflow server to its storage. A test that shuts it opens it again."""
    valve = Valve(s3_endpoint)
    yield valve
    valve.shut()


@pytest.fixture(scope="session")
def deployment(s3_endpoint: str, artifacts: Valve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The MLflow server as k8s/ starts it. A test that stops a part of it starts it again."""
    s3_client(s3_endpoint).create_bucket(Bucket=BUCKET)
    database = Database()
    try:
        running = Deployment(tmp_path_factory.mktemp("mlflow"), database, artifacts.address)
        try:
            yield running
        finally:
            running.stop()
    finally:
        database.remove()


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    client = s3_client(url)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            client.list_buckets()
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
    pytest.fail(f"the S3 server did not come up:\n{log.read_text()[-3000:]}")
