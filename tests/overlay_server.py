"""An API server that only reads: the objects of one overlay, some nodes, and rights as the overlay's own roles say."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.rendered import named, objects

NODE = {"locvlm/node-pool": "gpu-a100", "cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}


class OverlayServer:
    """`secrets`: the names that are there; `phase`: of every volume claim; `status`: of the ClusterQueue; `refuse`: a
    part of a path -> the code that it is answered with; `groups`: the API groups that are installed."""

    def __init__(self, overlay: str) -> None:
        self.overlay = overlay
        self.secrets = {"locvlm-mlflow", "locvlm-storage"}
        self.phase = "Bound"
        self.status: dict[str, Any] = {"conditions": [{"type": "Active", "status": "True"}]}
        self.nodes = [self.node(NODE, 8)]
        self.refuse: dict[str, int] = {}
        self.groups = {"ray.io/v1": ["rayjobs"], "kueue.x-k8s.io/v1beta2": ["clusterqueues", "localqueues"]}
        self.account = "locvlm-launcher"
        self.asked: list[tuple[str, str]] = []
        self.url = ""

    @staticmethod
    def node(labels: dict[str, str], gpus: int) -> dict[str, Any]:
        amounts = {"cpu": "96", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
        return {"metadata": {"name": "n", "labels": labels}, "status": {"allocatable": amounts}}

    def kubeconfig(self, folder: Path) -> str:
        server = {"name": "c", "cluster": {"server": self.url}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config = {
            "clusters": [server],
            "contexts": [context],
            "current-context": "x",
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
        (folder / "kubeconfig").write_text(json.dumps(config))
        return str(folder / "kubeconfig")

    def answer(self, method: str, target: str, accept: str, body: Any) -> tuple[int, Any]:
        parts = urlsplit(target)
        path, query = parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.asked.append((method, path))
        for part, code in self.refuse.items():
            if part in path:
                return code, {"message": f"refused: {path}"}
        if path == "/version":
            return 200, {"gitVersion": "v1.33.1"}
        if path.endswith("/selfsubjectaccessreviews"):
            return 201, {"status": {"allowed": self.may(body["spec"]["resourceAttributes"])}}
        if path == "/api/v1/nodes":
            return 200, {"items": self.matching(query.get("labelSelector", ""))}
        group = path.removeprefix("/apis/")
        if group.count("/") == 1 and path.startswith("/apis/"):
            known = self.groups.get(group)
            return (200, {"resources": [{"name": kind} for kind in known]}) if known else (404, {"message": "no group"})
        return self.object(path.split("/"), accept)

    def may(self, wanted: dict[str, str]) -> bool:
        role = named(self.overlay, "Role", "locvlm-launcher")
        resource = "/".join(part for part in (wanted["resource"], wanted.get("subresource", "")) if part)
        return self.account == "locvlm-launcher" and any(
            wanted["group"] in rule["apiGroups"]
            and resource in rule["resources"]
            and wanted["verb"] in rule["verbs"]
            and ("resourceNames" not in rule or wanted.get("name") in rule["resourceNames"])
            for rule in role["rules"]
        )

    def matching(self, selector: str) -> list[dict[str, Any]]:
        wanted = dict(pair.split("=") for pair in selector.split(",") if pair)
        return [node for node in self.nodes if wanted.items() <= node["metadata"]["labels"].items()]

    def object(self, path: list[str], accept: str) -> tuple[int, Any]:
        kind, name = path[-2], path[-1]
        if kind == "secrets":
            assert "PartialObjectMetadata" in accept, "the contents of a secret were asked for"
            return (200, {"metadata": {"name": name}}) if name in self.secrets else (404, {"message": f"no {name}"})
        for item in objects(self.overlay):
            if item["kind"].lower() + "s" == kind and item["metadata"]["name"] == name:
                more = {"clusterqueues": self.status, "persistentvolumeclaims": {"phase": self.phase}}.get(kind)
                return 200, {**item, **({"status": more} if more else {})}
        return 404, {"message": f"{kind} {name} not found"}


@contextlib.contextmanager
def serving(overlay: str) -> Iterator[OverlayServer]:
    """A server that runs, stopped at the end."""
    state = OverlayServer(overlay)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.handle_any()

        def do_POST(self) -> None:
            self.handle_any()

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            code, value = state.answer(self.command, self.path, self.headers.get("Accept", ""), body)
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
