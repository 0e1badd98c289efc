"""A small API server with one namespace: RayJobs checked against their CRD, pods with logs, the cluster's ConfigMap."""

import contextlib
import copy
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from locvlm.launch import JobSettings, default_template, launch, render_ray_job
from tests.crds import crd_faults

POLL = 0.01
# as JSON, which is YAML that parses in no time
TEMPLATE = json.dumps(yaml.safe_load(default_template().read_text()))
COMMAND = ["locvlm", "train", "--stage", "instruct"]
SUCCEEDED = {
    "jobDeploymentStatus": "Complete",
    "jobStatus": "SUCCEEDED",
    "jobId": "try-1-abcde",
    "rayClusterName": "try-1-fghij",
    "startTime": "2026-01-01T00:00:00Z",
    "endTime": "2026-01-01T01:00:00Z",
}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
STARTING = {"jobDeploymentStatus": "Initializing", "jobStatus": ""}
SPEC, CLUSTER, WORKERS = "spec", "spec.rayClusterSpec", "spec.rayClusterSpec.workerGroupSpecs.0"

Job = dict[str, Any]


def rendered(settings: JobSettings | None = None, command: list[str] = COMMAND, image: str = "locvlm:test") -> Job:
    return render_ray_job(TEMPLATE, "try-1", image, command, settings)


def put(job: Job, place: str, value: object) -> None:
    *way, last = place.split(".")
    node: Any = job
    for key in way:
        node = node[int(key)] if key.isdigit() else node.setdefault(key, {})
    if value is None:
        del node[last]
    else:
        node[last] = value


class Cluster:
    """An API server's state and its switch: `start` and `stop` may be called again, the address stays.

    It checks creates against the CRD, plays a script of statuses, serves logs and the cluster's ConfigMap.
    `script`: the statuses of the job, one a look, the last one for ever. `hold()` keeps the script where it is.
    `log`: the lines by pod; `gone`: pods that are listed no more and whose log answers 404.
    `breaks`: how many lines the next followed streams give before they stop in mid-line: they are cut, or ended in good
    form (`clean`), or left open without a word (`stuck`).
    `refuse`: answers to give instead, by "METHOD path-ending", the last of a list for ever.
    `lost_replies`: creates that are done but whose answer never arrives. `token`: what a caller must bring.
    """

    def __init__(self, schemas: Path) -> None:
        self.schemas = schemas
        self.jobs: dict[str, Job] = {}
        self.config_map: dict[str, Any] = {}
        self.script: list[Job] = [STARTING, RUNNING, SUCCEEDED]
        self.hold: Callable[[], bool] = lambda: False
        self.log: dict[str, list[str]] = {"try-1-aaaaa": ["hello", "step 1 loss 2.5", "done"]}
        self.gone: set[str] = set()
        self.breaks: list[int] = []
        self.after_break: Callable[[], None] = lambda: None
        self.stamps = True
        self.clean = False
        self.stuck = threading.Event()
        self.refuse: dict[str, list[tuple[int, str]]] = {}
        self.lost_replies = 0
        self.token = ""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.n_logs = 0
        self.port = 0
        self._server: Server | None = None

    def start(self) -> None:
        """Listen, on the port of the first start."""
        self._server = Server(self)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server.cut()
        self._server = None

    @property
    def running(self) -> bool:
        return self._server is not None

    @property
    def api(self) -> Any:
        from kubernetes import client

        configuration = client.Configuration(host=f"http://127.0.0.1:{self.port}")
        if self.token:
            configuration.api_key["authorization"] = f"Bearer {self.token}"
        return client.ApiClient(configuration)

    def kubeconfig(self, folder: Path) -> str:
        """The path of a kubeconfig that names this server."""
        server = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        user = {"name": "u", "user": {"token": self.token} if self.token else {}}
        config = {"clusters": [server], "contexts": [context], "current-context": "x", "users": [user]}
        (folder / "config").write_text(json.dumps(config))
        return str(folder / "config")

    def put(self, job: Job, status: Job | None = None, **metadata: str) -> None:
        """A job that is there already."""
        self.jobs["try-1"] = copy.deepcopy(job) | {"status": status or {}}
        self.jobs["try-1"]["metadata"] |= metadata

    def grows(self, pod: str) -> bool:
        """Whether the log of `pod` is still being written: a stream that follows it waits for more."""
        return bool(self.jobs) and self.hold() and self.running

    def count(self, method: str, ending: str) -> int:
        return sum(entry[0] == method and entry[1].endswith(ending) for entry in self.requests)

    def permissions(self) -> set[tuple[str, str, str]]:
        """What a role must allow for the requests so far: group, resource, verb."""
        return {_permission(method, path) for method, path, _ in self.requests}


def _permission(method: str, path: str) -> tuple[str, str, str]:
    group = path.split("/")[2] if path.startswith("/apis/") else ""
    resource, *named = path.partition("/namespaces/")[2].split("/")[1:]
    if named[1:]:
        resource += "/" + named[1]
    verbs = {"POST": "create", "DELETE": "delete", "GET": "get" if named else "list"}
    return group, resource, verbs[method]


class Server(ThreadingHTTPServer):
    """One run of the API server."""

    daemon_threads = True

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.connections: list[socket.socket] = []
        super().__init__(("127.0.0.1", cluster.port), Answer)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def cut(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that hangs up is no news
            super().handle_error(request, client_address)


class Answer(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def cluster(self) -> Cluster:
        return self.server.cluster

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, code: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fault(self, code: int, message: str) -> None:
        self.answer(code, {"kind": "Status", "status": "Failure", "code": code, "message": message})

    def begin(self) -> tuple[str, dict[str, str]] | None:
        """Path and query, unless this request is to be refused."""
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.cluster.requests.append((self.command, parts.path, query))
        if self.cluster.token and self.headers["Authorization"] != f"Bearer {self.cluster.token}":
            self.fault(401, "Unauthorized")
            return None
        for key, answers in self.cluster.refuse.items():
            method, ending = key.split()
            if method == self.command and parts.path.endswith(ending) and answers:
                code, message = answers.pop(0) if len(answers) > 1 else answers[0]
                if code:
                    self.fault(code, message)
                    return None
        return parts.path, query

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        begun = self.begin()
        if begun is None:
            return
        path, query = begun
        assert path == f"/apis/ray.io/v1/namespaces/{job['metadata']['namespace']}/rayjobs"
        name = job["metadata"]["name"]
        faults = crd_faults(self.cluster.schemas, job)
        if faults and "unknown field" in faults[0]:
            if query.get("fieldValidation") == "Strict":
                self.fault(400, f"strict decoding error: {faults[0]}")
                return
            faults = []
        if faults:
            self.fault(422, f'RayJob.ray.io "{name}" is invalid: {faults[0]}')
        elif name in self.cluster.jobs:
            self.fault(409, f'rayjobs.ray.io "{name}" already exists')
        else:
            job["metadata"] |= {"uid": "0001", "creationTimestamp": "2026-01-01T00:00:00Z"}
            self.cluster.jobs[name] = job
            if self.cluster.lost_replies:
                self.cluster.lost_replies -= 1
                self.close_connection = True
                return
            self.answer(201, job)

    def do_DELETE(self) -> None:
        if (begun := self.begin()) is None:
            return
        name = begun[0].split("/")[-1]
        if self.cluster.jobs.pop(name, None) is None:
            self.fault(404, "not found")
        else:
            self.answer(200, {"kind": "Status", "status": "Success"})

    def do_GET(self) -> None:
        if (begun := self.begin()) is None:
            return
        path, query = begun
        if path.endswith("/log"):
            self.stream(path.split("/")[-2], query)
        elif path.endswith("/pods"):
            job, _, owner = query["labelSelector"].partition("=")
            assert job == "job-name"
            pods = [
                {
                    "metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:{index:02d}Z"},
                    "spec": {"containers": [{"name": "ray-job-submitter"}]},
                    "status": {"phase": "Running"},
                }
                for index, name in enumerate(self.cluster.log)
                if name not in self.cluster.gone and name.startswith(f"{owner}-")
            ]
            pending = {"metadata": {"name": "new", "creationTimestamp": "2027-01-01T00:00:00Z"}}
            self.answer(200, {"items": [*pods, pending | {"status": {"phase": "Pending"}}]})
        elif "/configmaps/" in path:
            self.find_config_map(path.split("/")[-1])
        else:
            self.look(path.split("/")[-1])

    def find_config_map(self, name: str) -> None:
        if name == "locvlm-ray-job" and self.cluster.config_map:
            self.answer(200, self.cluster.config_map)
        else:
            self.fault(404, f'configmaps "{name}" not found')

    def look(self, name: str) -> None:
        job = self.cluster.jobs.get(name)
        if job is None:
            self.fault(404, f'rayjobs.ray.io "{name}" not found')
            return
        if not job.get("status"):
            script = self.cluster.script
            status = script.pop(0) if len(script) > 1 and not self.cluster.hold() else script[0]
            job = job | {"status": status}
        self.answer(200, job)

    def stream(self, pod: str, query: dict[str, str]) -> None:
        assert (query["timestamps"], query["container"]) == ("True", "ray-job-submitter")
        self.cluster.n_logs += 1
        if pod in self.cluster.gone:
            self.fault(404, f'pods "{pod}" not found')
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        follow = query["follow"] == "True"
        cut = self.cluster.breaks.pop(0) if follow and self.cluster.breaks else None
        index = 0
        while index < len(self.cluster.log[pod]) or (follow and self.cluster.grows(pod)):
            if index == len(self.cluster.log[pod]):
                time.sleep(0.005)
                continue
            line = self.cluster.log[pod][index]
            # two lines a nanosecond: a time stamp alone does not say where a stream was cut
            stamp = f"2026-01-01T00:00:00.{index // 2:09d}Z " if self.cluster.stamps else ""
            data = f"{stamp}{line}\n".encode()
            if index == cut:
                self.chunk(data[: len(data) // 2])
                self.cluster.after_break()
                while self.cluster.stuck.is_set():
                    time.sleep(0.005)
                self.close_connection = True
                if self.cluster.clean:
                    self.wfile.write(b"0\r\n\r\n")
                return
            self.chunk(data)
            index += 1
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


@contextlib.contextmanager
def serving(schemas: Path) -> Iterator[Cluster]:
    """A cluster that runs, stopped at the end."""
    cluster = Cluster(schemas)
    cluster.start()
    try:
        yield cluster
    finally:
        if cluster.running:
            cluster.stop()


def run(cluster: Cluster, job: Job | None = None, **options: Any) -> tuple[Any, list[str]]:
    lines: list[str] = []
    done = launch(job or rendered(), cluster.api, poll_seconds=POLL, write=lines.append, **options)
    return done, lines


def when(condition: Callable[[], bool], action: Callable[[], None]) -> None:
    """Do `action` in the background as soon as `condition` holds."""

    def wait() -> None:
        while not condition():
            time.sleep(0.002)
        action()

    threading.Thread(target=wait, daemon=True).start()
