"""Custom resource definitions as JSON Schema, so that a manifest can be checked without an API server."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

FILES = {
    "RayJob": "kuberay/ray.io_rayjobs.yaml",
    "RayService": "kuberay/ray.io_rayservices.yaml",
    "ResourceFlavor": "kueue/kueue.x-k8s.io_resourceflavors.yaml",
    "ClusterQueue": "kueue/kueue.x-k8s.io_clusterqueues.yaml",
    "LocalQueue": "kueue/kueue.x-k8s.io_localqueues.yaml",
    "WorkloadPriorityClass": "kueue/kueue.x-k8s.io_workloadpriorityclasses.yaml",
}


def crd_faults(schemas: Path, obj: dict[str, Any]) -> list[str]:
    """What the API server would hold against `obj`: unknown fields first (strict decoding), then wrong values."""
    group_version, kind = obj["apiVersion"], obj["kind"]
    errors = sorted(
        _validator(schemas / FILES[kind], group_version).iter_errors(obj), key=lambda error: error.json_path
    )
    errors.sort(key=lambda error: error.validator != "additionalProperties")
    return [
        f"{'unknown field at ' if error.validator == 'additionalProperties' else ''}{error.json_path}: {error.message}"
        for error in errors
    ]


@lru_cache
def _validator(path: Path, group_version: str) -> Draft202012Validator:
    with open(path, encoding="utf-8") as file:
        crd = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    group, version = group_version.split("/")
    assert crd["spec"]["group"] == group
    served = {entry["name"]: entry for entry in crd["spec"]["versions"] if entry["served"]}
    return Draft202012Validator(_closed(served[version]["schema"]["openAPIV3Schema"]))


def _closed(node: Any) -> Any:
    """A structural schema as JSON Schema: closed objects, int-or-string, nullable, defaults that satisfy `required`."""
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    properties = {name: _closed(value) for name, value in node.get("properties", {}).items()}
    out = {key: _closed(value) for key, value in node.items() if key not in ("properties", "default", "example")}
    if properties:
        out["properties"] = properties
        if "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    if "required" in node:
        out["required"] = [name for name in node["required"] if "default" not in node["properties"].get(name, {})]
    if node.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if node.get("nullable"):
        out = {"anyOf": [{"type": "null"}, out]}
    return out
