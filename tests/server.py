"""`locvlm serve` as a process of its own, and a client that sends what no decent client would."""

import base64
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What came back; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        """The JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A server that runs on this machine."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.port}/"

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        """A connection of one's own."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Any request; underscores of header names become hyphens."""
        connection = self.connect()
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            reply = connection.getresponse()
            found = {name.lower(): value for name, value in reply.getheaders()}
            return Reply(reply.status, found, reply.read())
        finally:
            connection.close()

    def ask(self, **query: Any) -> Reply:
        """POST /api/answer; an image may be a path or bytes."""
        image = query.get("image")
        if isinstance(image, Path):
            image = image.read_bytes()
        if isinstance(image, bytes):
            query["image"] = base64.b64encode(image).decode()
        return self.request("POST", "/api/answer", json.dumps(query), content_type="application/json")


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """`locvlm serve` on a free port; its log in `folder`."""
    command = [sys.executable, "-m", "locvlm", "serve", "--port", "0", *options]
    log = folder / "serve.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )
    try:
        deadline = time.monotonic() + 120
        while (
            found := re.search(r"^serving .* at http://127\.0\.0\.1:(\d+)/$", log.read_text(), re.MULTILINE)
        ) is None:
            assert process.poll() is None, f"the server ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the server did not come up:\n{log.read_text()}"
            time.sleep(0.1)
        yield Server(process, int(found[1]), log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
