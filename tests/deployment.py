"""The tracking server exactly as k8s/ starts it (commands, settings, auth file), on a real PostgreSQL and an S3 server.

Both can be stopped and started again; their addresses stay.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.rendered import named

MISSING = [name for name in ("flask_wtf", "psycopg2") if importlib.util.find_spec(name) is None]
MISSING += [name for name in ("initdb", "pg_ctl", "createdb") if shutil.which(name) is None]
needs_postgres = pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}")

USER, PASSWORD = "locvlm-user", "planted-database-password"
ADMIN, ADMIN_PASSWORD = "admin", "planted-admin-password"
BUCKET = "locvlm"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def s3_client(endpoint: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )


class Valve:
    """A TCP address in front of another one, that can be shut: connections are then refused, and open ones are cut."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self.target, self.port = (host, int(port)), free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        assert self._listener is not None
        every, self._open = [self._listener, *self._open], []
        for connection in every:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was shut
            while True:
                here, there = listener.accept()[0], socket.create_connection(self.target)
                self._open += [here, there]
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


class Database:
    """A PostgreSQL that asks for a password. `client`: the PG* variables of its user."""

    def __init__(self) -> None:
        self.account = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
        self.folder = Path(tempfile.mkdtemp(prefix="locvlm-postgres-"))
        self.data = str(self.folder / "data")
        port = free_port()
        self.client = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": USER, "PGPASSWORD": PASSWORD}
        password = self.folder / "password"
        password.write_text(PASSWORD)
        if self.account:
            for path in (self.folder, password):
                shutil.chown(path, self.account)
        login = ("--auth=scram-sha-256", f"--username={USER}", f"--pwfile={password}")
        self._run("initdb", "-D", self.data, *login, "--no-sync")
        self.start()
        self._run("createdb", "mlflow", **self.client)

    def start(self) -> None:
        options = f"-p {self.client['PGPORT']} -h 127.0.0.1 -k {self.folder} -c fsync=off"
        self._run("pg_ctl", "-D", self.data, "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-D", self.data, "-m", mode, "stop")

    def remove(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder)

    def _run(self, *command: str, **more: str) -> None:
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"} | more
        done = subprocess.run(
            command, user=self.account, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr


class Deployment:
    """The MLflow server of k8s/base/mlflow.yaml. `log`: what it said."""

    def __init__(self, folder: Path, database: Database, s3_endpoint: str) -> None:
        self.folder, self.database, self.port, self.log = folder, database, free_port(), folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        pod = named("on-prem", "Deployment", "mlflow")["spec"]["template"]["spec"]
        auth = folder / "auth.ini"
        auth.write_text(named("on-prem", "ConfigMap", "mlflow-auth")["data"]["auth.ini"])
        secrets = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": s3_endpoint,
            "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "planted-secret-key",
        }
        here = {
            "MLFLOW_AUTH_CONFIG_PATH": str(auth),
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        base = {"PATH": path, "HOME": str(folder), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        (init,), (server,) = pod["initContainers"], pod["containers"]
        environment = base | _environment_of(init, database.client | here)
        done = subprocess.run(
            init["command"], cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        self._environment = base | _environment_of(server, database.client | secrets | here)
        command = [word.replace("5000", str(self.port)) for word in server["command"]]
        self._command = [re.sub(r"\$\((\w+)\)", lambda match: self._environment[match[1]], word) for word in command]
        self.start()

    @property
    def client(self) -> dict[str, str]:
        """The environment of a process that tracks here."""
        return {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.port}",
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": ADMIN_PASSWORD,
        }

    def start(self) -> None:
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.get("/health") == 200:
                    return
            except OSError:
                time.sleep(0.3)
        pytest.fail(f"the MLflow server did not come up:\n{self.log.read_text()[-3000:]}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)
        self.process.wait(60)
        self.process = None

    def get(self, path: str, *, host: str = "", password: str = "") -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if host:
            request.add_header("Host", host)
        if password:
            request.add_header("Authorization", "Basic " + b64encode(f"{ADMIN}:{password}".encode()).decode())
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as fault:
            return fault.code


def _environment_of(container: dict[str, Any], values: dict[str, str]) -> dict[str, str]:
    """What envFrom gives a container: its ConfigMaps, and the secrets as `values` has them."""
    environment: dict[str, str] = {}
    for source in container["envFrom"]:
        if "configMapRef" in source:
            environment |= named("on-prem", "ConfigMap", source["configMapRef"]["name"])["data"]
    return environment | values
