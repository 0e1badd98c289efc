"""A stand-in for KFP's API server: its routes and the shapes of what it accepts come from KFP's own OpenAPI file."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema

TIME = "2026-01-01T00:00:00Z"


class KfpServer:
    """Keeps the runs and schedules it was sent; what KFP would not accept is in `faults` and answered with 400."""

    def __init__(self, schema: Path) -> None:
        self._api = json.loads(schema.read_text(encoding="utf-8"))
        for definition in self._api["definitions"].values():
            if "properties" in definition and "additionalProperties" not in definition:
                definition["additionalProperties"] = False  # a misspelt field is a fault, not a surprise later
        self._relax()
        self.runs: list[dict[str, Any]] = []
        self.schedules: dict[str, dict[str, Any]] = {}
        self._n_schedules = 0
        self.experiments: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.url = ""

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """The status and the JSON reply to one request."""
        route = re.sub(r"/runs/[^/]+$", "/runs/{run_id}", path)
        route = re.sub(r"/recurringruns/[^/]+$", "/recurringruns/{recurring_run_id}", route)
        operation = self._api["paths"].get(route, {}).get(method.lower())
        if operation is None:
            self.faults.append(f"KFP has no {method} {path}")
            return 404, {"message": "no such route"}
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "body":
                fault = self._fault(parameter["schema"], body)
                if fault:
                    self.faults.append(f"{method} {path}: {fault}")
                    return 400, {"message": fault}
        reply = self._reply(method, path, body)
        fault = self._fault(operation["responses"]["200"]["schema"], reply)
        assert not fault, f"this stand-in answers {path} as KFP does not: {fault}"
        return 200, reply

    def _relax(self) -> None:
        """KFP's own client sends numbers where the file says int64 as text; the server takes both."""
        for definition in self._api["definitions"].values():
            for spec in definition.get("properties", {}).values():
                if spec.get("format") == "int64":
                    spec["type"] = ["string", "integer"]

    def _fault(self, schema: dict[str, Any], value: Any) -> str:
        validator = jsonschema.Draft4Validator({**schema, "definitions": self._api["definitions"]})
        return "; ".join(f"{list(error.path)}: {error.message[:200]}" for error in validator.iter_errors(value))

    def _reply(self, method: str, path: str, body: Any) -> Any:
        if path.endswith("/healthz"):
            return {"multi_user": False}
        if path.endswith("/experiments") and method == "GET":
            return {"experiments": self.experiments, "total_size": len(self.experiments)}
        if path.endswith("/experiments"):
            made = {**body, "experiment_id": f"e{len(self.experiments)}", "created_at": TIME}
            self.experiments.append(made)
            return made
        if "/recurringruns" in path:
            return self._schedule(method, path.rpartition("/")[2], body)
        if method == "GET":
            number = int(path.rpartition("/r")[2])
        else:
            number = len(self.runs)
            self.runs.append(body)
        return {**self.runs[number], "run_id": f"r{number}", "created_at": TIME, "state": "PENDING"}

    def _schedule(self, method: str, name: str, body: Any) -> Any:
        if method == "DELETE":
            del self.schedules[name]
            return {}
        if method == "GET":
            return {"recurringRuns": list(self.schedules.values()), "total_size": len(self.schedules)}
        made = {**body, "recurring_run_id": f"s{self._n_schedules}", "created_at": TIME, "status": "ENABLED"}
        self._n_schedules += 1
        self.schedules[made["recurring_run_id"]] = made
        return made


@contextmanager
def serving(schema: Path) -> Iterator[KfpServer]:
    """Serve on a free port of this machine; `url` of the yielded server is its address."""
    kfp = KfpServer(schema)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._handle()

        def do_DELETE(self) -> None:
            self._handle()

        def do_POST(self) -> None:
            self._handle()

        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, reply = kfp.answer(self.command, urlsplit(self.path).path, body)
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kfp.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield kfp
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
