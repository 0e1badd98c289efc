"""The manifests as a cluster gets them: every overlay rendered, and the RayJob that a launch makes there."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from locvlm import __version__
from locvlm.launch import JobSettings, default_template, render_ray_job
from tests.kustomize import Manifest, build

REPOSITORY = Path(__file__).resolve().parent.parent
K8S = REPOSITORY / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
IMAGE = f"locvlm:{__version__}"


@cache
def objects(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` sends. Shared: copy before changing."""
    return build(K8S / "overlays" / overlay)


def named(overlay: str, kind: str, name: str) -> Manifest:
    return next(item for item in objects(overlay) if (item["kind"], item["metadata"]["name"]) == (kind, name))


def of_kind(overlay: str, kind: str) -> list[Manifest]:
    return [item for item in objects(overlay) if item["kind"] == kind]


def site(overlay: str) -> str:
    """What `locvlm launch` reads from that cluster."""
    return str(named(overlay, "ConfigMap", "locvlm-ray-job")["data"]["ray-job.yaml"])


def ray_job(overlay: str, settings: JobSettings | None = None) -> Manifest:
    """The job of a launch on that cluster."""
    template = default_template().read_text(encoding="utf-8")
    return render_ray_job(template, "try-1", IMAGE, ["locvlm", "train"], settings, site(overlay))


def pods(node: Any) -> Iterator[Manifest]:
    """Every pod spec anywhere below `node`."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for item in node:
            yield from pods(item)


def all_pods(overlay: str) -> list[Manifest]:
    return list(pods([*objects(overlay), ray_job(overlay)]))


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def amount(quantity: Any) -> float:
    """A Kubernetes quantity as a number."""
    match = re.fullmatch(r"(\d+)(m|Mi|Gi|Ti)?", str(quantity))
    assert match, quantity
    return int(match[1]) * {None: 1.0, "m": 0.001, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}[match[2]]
