"""The renderer that stands in for kubectl: the same objects, and a refusal of everything it does not know."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.kustomize import Unsupported, build, identity
from tests.rendered import K8S, OVERLAYS, objects


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_renders_the_same_objects(overlay: str) -> None:
    folder = str(K8S / "overlays" / overlay)
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    theirs = {identity(item): item for item in yaml.safe_load_all(done.stdout)}
    assert {identity(item): item for item in objects(overlay)} == theirs


POD = """
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: n}
spec: {containers: [{name: c, image: "app:1"}]}
"""
HASHED = "{name: a, namespace: n, files: [pod.yaml], options: {labels: {}}}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("namePrefix: a-", "namePrefix"),
        ("resources: [pod.yaml, pod.yaml]", "twice"),
        ("resources: [missing.yaml]", "missing.yaml"),
        ("resources: [../../outside.yaml]", "outside.yaml"),
        ("resources: ['https://example.org/x']", "neither a folder nor a file"),
        (f"configMapGenerator: [{HASHED}]", "with a hash"),
        ("configMapGenerator: [{name: a, literals: [a=b], options: {}}]", "literals"),
        ("patches: [{patch: '[]', path: x}]", "exactly one"),
        ("patches: [{patch: '[{op: add, path: /a, value: 1}]'}]", "target"),
        ("patches: [{target: {kind: Job, name: a}, patch: '[{op: add, path: /a, value: 1}]'}]", "fits 0"),
        ("patches: [{target: {kind: Pod, name: a}, patch: '[{op: move, path: /a, from: /b}]'}]", "from"),
        ("patches: [{target: {kind: Pod, name: a}, patch: '[{op: remove, path: /spec/b}]'}]", "remove /spec/b"),
        ("patches: [{target: {kind: Pod, name: a}, patch: '[{op: replace, path: /b, value: 1}]'}]", "replace /b"),
        (
            "patches: [{patch: '{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: n}, "
            "spec: {containers: []}}'}]",
            "merging the list containers",
        ),
        ("images: [{name: app, tagSuffix: x}]", "tagSuffix"),
    ],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "pod.yaml").write_text(POD)
    resources = "" if content.startswith("resources") else "resources: [pod.yaml]\n"
    (tmp_path / "kustomization.yaml").write_text(resources + content)
    with pytest.raises(Unsupported, match=words):
        build(tmp_path)


@pytest.mark.parametrize(
    ("image", "entry", "wanted"),
    [
        ("app:1", {"digest": "sha256:0"}, "app@sha256:0"),
        ("app", {"newTag": "2"}, "app:2"),
        ("app@sha256:1", {"newTag": "2"}, "app:2"),
        ("app:1", {"newName": "host:5000/team/app"}, "host:5000/team/app:1"),
        ("other:1", {"newTag": "2"}, "other:1"),
        ("host:5000/app:1", {"newTag": "2"}, "host:5000/app:1"),
    ],
)
def test_an_image_is_renamed_as_kustomize_does(tmp_path: Path, image: str, entry: dict[str, str], wanted: str) -> None:
    (tmp_path / "pod.yaml").write_text(POD.replace("app:1", image))
    content = {"resources": ["pod.yaml"], "images": [{"name": "app", **entry}]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    (pod,) = build(tmp_path)
    assert pod["spec"]["containers"][0]["image"] == wanted
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert yaml.safe_load(done.stdout) == pod
