"""As much of kustomize as the overlays in k8s/ use, so that they are tested where there is no kubectl.

Anything else is refused, not guessed at: another key, a patch of a list in a built-in kind, a name with a hash.
"""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

KEYS = {"apiVersion", "kind", "resources", "configMapGenerator", "images", "patches"}
CUSTOM = ("ray.io/", "kueue.x-k8s.io/")  # kinds whose lists kustomize replaces; it knows how to merge the built-in ones

Manifest = dict[str, Any]
Id = tuple[str, str, str | None, str]


class Unsupported(Exception):
    """A kustomization that this does not understand, or that kustomize would refuse too."""


def build(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize <folder>` prints, in the order of the files."""
    content = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    _only(content, KEYS, f"{folder}/kustomization.yaml")
    objects: list[Manifest] = []
    for name in content.get("resources", []):
        objects += _resource(folder, name)
    for entry in content.get("configMapGenerator", []):
        objects.append(_config_map(folder, entry))
    _refuse_twice(objects)
    for entry in content.get("patches", []):
        objects = _patched(objects, folder, entry)
    for entry in content.get("images", []):
        _only(entry, {"name", "newName", "newTag", "digest"}, "images")
        _each_container(objects, partial(_set_image, entry=entry))
    return objects


def identity(item: Manifest) -> Id:
    """What tells two objects of a cluster apart."""
    metadata = item["metadata"]
    return item["apiVersion"], item["kind"], metadata.get("namespace"), metadata["name"]


def _only(value: Any, keys: set[str], where: str) -> None:
    if not isinstance(value, dict) or not set(value) <= keys:
        unknown = sorted(set(value) - keys) if isinstance(value, dict) else value
        raise Unsupported(f"{where}: {unknown}")


def _resource(folder: Path, name: str) -> list[Manifest]:
    path = (folder / name).resolve()
    if path.is_dir():
        return build(path)
    if not path.is_file() or path.parent != folder.resolve():
        raise Unsupported(f"resource {name}: neither a folder nor a file of {folder}")
    return [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item is not None]


def _config_map(folder: Path, entry: Manifest) -> Manifest:
    _only(entry, {"name", "namespace", "files", "options"}, "configMapGenerator")
    _only(entry.get("options"), {"disableNameSuffixHash", "labels"}, "configMapGenerator.options")
    if entry["options"].get("disableNameSuffixHash") is not True:
        raise Unsupported("configMapGenerator: a name with a hash")
    metadata = {"name": entry["name"], "namespace": entry["namespace"], "labels": entry["options"].get("labels", {})}
    data = {Path(name).name: (folder / name).read_text(encoding="utf-8") for name in entry["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _refuse_twice(objects: list[Manifest]) -> None:
    ids = [identity(item) for item in objects]
    if len(set(ids)) < len(ids):
        raise Unsupported(f"twice: {sorted({str(name) for name in ids if ids.count(name) > 1})}")


def _patched(objects: list[Manifest], folder: Path, entry: Manifest) -> list[Manifest]:
    _only(entry, {"path", "patch", "target"}, "patches")
    if ("path" in entry) == ("patch" in entry):
        raise Unsupported("patches: exactly one of path and patch")
    text = entry["patch"] if "patch" in entry else (folder / entry["path"]).read_text(encoding="utf-8")
    contents = list(yaml.safe_load_all(text))
    if isinstance(contents[0], list):
        _only(entry.get("target"), {"kind", "name"}, "patches.target of operations")
        target = entry["target"]
        found = _one(objects, (target["kind"], target["name"]), lambda item: (item["kind"], item["metadata"]["name"]))
        for operation in contents[0]:
            _operate(found, operation)
        return objects
    if "target" in entry:
        raise Unsupported("patches: a merge with a target")
    if len(contents) > 1 and any("$patch" in content for content in contents):
        raise Unsupported("patches: a deletion beside other patches (kustomize 5.5 crashes on it)")
    for content in contents:
        found = _one(objects, identity(content), identity)
        if content.get("$patch") == "delete":
            objects = [item for item in objects if item is not found]
        else:
            _merge(found, content, found["apiVersion"].startswith(CUSTOM))
    return objects


def _one(objects: list[Manifest], wanted: object, of: Callable[[Manifest], object]) -> Manifest:
    found = [item for item in objects if of(item) == wanted]
    if len(found) != 1:
        raise Unsupported(f"a patch of {wanted} fits {len(found)} objects")
    return found[0]


def _merge(into: Manifest, patch: Manifest, custom: bool) -> None:
    for key, value in patch.items():
        if key.startswith("$"):
            raise Unsupported(f"patches: {key}")
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict):
            _merge(into.setdefault(key, {}), value, custom)
        elif isinstance(value, list) and not custom:
            raise Unsupported(f"patches: merging the list {key}; use operations")
        else:
            into[key] = copy.deepcopy(value)


def _operate(item: Any, operation: Manifest) -> None:
    """One operation of RFC 6902."""
    _only(operation, {"op", "path", "value"}, "operation")
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in way:
        item = item[int(part)] if isinstance(item, list) else item[part]
    key: Any = last
    if isinstance(item, list):
        key = len(item) if last == "-" else int(last)
    exists = key < len(item) if isinstance(item, list) else key in item
    if operation["op"] == "add" and isinstance(item, list):
        item.insert(key, operation["value"])
    elif operation["op"] == "add" or (operation["op"] == "replace" and exists):
        item[key] = operation["value"]
    elif operation["op"] == "remove" and exists:
        del item[key]
    else:
        raise Unsupported(f"operation {operation['op']} {operation['path']}")


def _each_container(node: Any, change: Callable[[Manifest], None]) -> None:
    if isinstance(node, list):
        for item in node:
            _each_container(item, change)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                for container in value:
                    change(container)
            else:
                _each_container(value, change)


def _set_image(container: Manifest, entry: Manifest) -> None:
    match = re.fullmatch(r"(?P<name>[^@]+?)(?P<tag>:[^:/@]+)?(?P<digest>@.+)?", container["image"])
    if match is None or match["name"] != entry["name"]:
        return
    rest = (match["tag"] or "") + (match["digest"] or "")
    if "digest" in entry:
        rest = f"@{entry['digest']}"
    elif "newTag" in entry:
        rest = f":{entry['newTag']}"
    container["image"] = entry.get("newName", entry["name"]) + rest
