"""Every overlay as the API server would see it: schemas, security, resources, references."""

import copy
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.crds import FILES, crd_faults
from tests.kustomize import Manifest
from tests.rendered import (
    IMAGE,
    K8S,
    OVERLAYS,
    REPOSITORY,
    all_pods,
    amount,
    containers,
    named,
    objects,
    of_kind,
    pods,
    ray_job,
)

KUBERNETES = ("1.31", "1.37")
CLUSTER_WIDE = ("Namespace", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass")
everywhere = pytest.mark.parametrize("overlay", OVERLAYS)


def test_there_is_an_overlay_for_every_kind_of_cluster_and_the_readme_names_each() -> None:
    assert OVERLAYS == ["eks", "gke", "local", "on-prem"]
    readme = (K8S / "README.md").read_text()
    assert all(f"| `{overlay}` |" in readme for overlay in OVERLAYS)


def test_every_manifest_file_is_used() -> None:
    used = {K8S / "ray-job.yaml"}
    for path in K8S.rglob("kustomization.yaml"):
        content = yaml.safe_load(path.read_text())
        names = [name for name in content["resources"] if name.endswith(".yaml")]
        names += [entry["path"] for entry in content.get("patches", []) if "path" in entry]
        names += [name for entry in content.get("configMapGenerator", []) for name in entry["files"]]
        used |= {path, *(path.parent / name for name in names)}
    assert {path for kind in ("yaml", "ini", "json") for path in K8S.rglob(f"*.{kind}")} == used


@pytest.mark.parametrize("version", KUBERNETES)
@everywhere
def test_every_object_fits_its_schema(overlay: str, version: str) -> None:
    for item in objects(overlay):
        if item["kind"] not in FILES:
            kubernetes_validate.validate(copy.deepcopy(item), version, strict=True)
    for pod in all_pods(overlay):
        kubernetes_validate.validate(as_pod(pod), version, strict=True)


@everywhere
def test_every_custom_object_fits_its_definition(overlay: str, schemas: Path) -> None:
    custom = [item for item in objects(overlay) if item["kind"] in FILES]
    assert {item["kind"] for item in custom} == set(FILES) - {"RayJob"}
    for item in custom:
        assert crd_faults(schemas, item) == []


def as_pod(pod: Manifest) -> Manifest:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": copy.deepcopy(pod)}


@pytest.mark.parametrize(
    ("kind", "name", "place", "typo"),
    [
        ("Deployment", "mlflow", "spec.template.spec.containers.0", "imagePullPolice"),
        ("StatefulSet", "postgres", "spec.template.spec.securityContext", "runAsNonroot"),
        ("NetworkPolicy", "ray", "spec.ingress.0.from.0", "podSelecter"),
        ("PersistentVolumeClaim", "locvlm-shared", "spec", "storageClass"),
        ("Role", "locvlm-launcher", "rules.0", "verb"),
    ],
)
def test_a_planted_typo_is_refused(kind: str, name: str, place: str, typo: str) -> None:
    item = copy.deepcopy(named("on-prem", kind, name))
    put(item, place, typo)
    with pytest.raises(kubernetes_validate.ValidationError, match=typo):
        kubernetes_validate.validate(item, KUBERNETES[-1], strict=True)


def test_a_planted_typo_in_a_queue_is_refused(schemas: Path) -> None:
    queue = copy.deepcopy(named("gke", "ClusterQueue", "locvlm"))
    put(queue, "spec.resourceGroups.0.flavors.0.resources.0", "nominalQuotas")
    assert "nominalQuotas" in crd_faults(schemas, queue)[0]


def put(node: Any, place: str, key: str) -> None:
    for part in place.split("."):
        node = node[int(part) if part.isdigit() else part]
    node[key] = "1"


@everywhere
def test_everything_namespaced_lies_in_the_namespace_that_enforces_restricted_pods(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for item in [*objects(overlay), ray_job(overlay)]:
        wanted = None if item["kind"] in CLUSTER_WIDE else namespace["metadata"]["name"]
        assert item["metadata"].get("namespace") == wanted, item["metadata"]["name"]


@everywhere
def test_no_container_runs_as_root_or_can_become_it(overlay: str) -> None:
    for pod in all_pods(overlay):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["runAsGroup"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["automountServiceAccountToken"] is False
        for container in containers(pod):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert not {"runAsUser", "runAsNonRoot", "privileged", "seccompProfile"} & set(own)
        for volume in pod.get("volumes", []):
            assert set(volume) - {"name"} <= {"emptyDir", "persistentVolumeClaim", "configMap"}


@everywhere
def test_every_container_requests_and_limits_cpu_and_memory(overlay: str) -> None:
    for pod in all_pods(overlay):
        for container in containers(pod):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(requests) <= set(limits)
            assert requests["memory"] == limits["memory"]
            assert amount(requests["cpu"]) <= amount(limits["cpu"])


@everywhere
def test_every_mount_has_its_volume_and_every_volume_a_mount(overlay: str) -> None:
    claimed = {"data"}  # a StatefulSet's own claim template
    for pod in all_pods(overlay):
        mounted = {mount["name"] for container in containers(pod) for mount in container.get("volumeMounts", [])}
        assert mounted - claimed == {volume["name"] for volume in pod.get("volumes", [])}


@everywhere
def test_every_image_is_named_by_digest_and_without_a_registry(overlay: str) -> None:
    images = {container["image"] for pod in pods(objects(overlay)) for container in containers(pod)}
    ours = {image for image in images if image.startswith("locvlm")}
    assert len(ours) == 1
    for image in images - ({IMAGE} if overlay == "local" else set()):
        assert re.fullmatch(r"[a-z]+(:\d+)?@sha256:[0-9a-f]{64}", image)
    if overlay == "local":
        assert ours == {IMAGE}
    job = {container["image"] for pod in pods(ray_job(overlay)) for container in containers(pod)}
    assert job == {IMAGE}


def references(node: Any) -> set[tuple[str, str]]:
    """Kind and name of everything that pods below `node` take their values, files and identity from."""
    found: set[tuple[str, str]] = set()
    for pod in pods(node):
        found.add(("ServiceAccount", pod["serviceAccountName"]))
        for volume in pod.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                found.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
            if "configMap" in volume:
                found.add(("ConfigMap", volume["configMap"]["name"]))
        for container in containers(pod):
            for source in container.get("envFrom", []):
                ((kind, value),) = source.items()
                found.add(({"secretRef": "Secret", "configMapRef": "ConfigMap"}[kind], value["name"]))
            for entry in container.get("env", []):
                if "valueFrom" in entry:
                    found.add(("Secret", entry["valueFrom"]["secretKeyRef"]["name"]))
    return found


def external_secrets() -> dict[str, set[str]]:
    """The secrets that the README asks people to make, with their keys."""
    readme = (K8S / "README.md").read_text().partition("## Secrets")[2]
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|", readme, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", keys)) for name, keys in rows}


@everywhere
def test_everything_that_a_pod_refers_to_exists_or_is_a_secret_of_the_readme(overlay: str) -> None:
    wanted = references([*objects(overlay), ray_job(overlay)])
    there = {(item["kind"], item["metadata"]["name"]) for item in objects(overlay)}
    assert {name for kind, name in wanted - there if kind == "Secret"} == set(external_secrets())
    assert all(kind == "Secret" for kind, _ in wanted - there)
    claims = {entry for entry in there if entry[0] == "PersistentVolumeClaim"}
    assert claims <= wanted, "a claim that nothing mounts"
    for binding in of_kind(overlay, "RoleBinding"):
        assert ("Role", binding["roleRef"]["name"]) in there
        assert all((subject["kind"], subject["name"]) in there for subject in binding["subjects"])


@everywhere
def test_the_accounts_of_pods_have_no_role(overlay: str) -> None:
    bound = {subject["name"] for item in of_kind(overlay, "RoleBinding") for subject in item["subjects"]}
    assert bound == {"locvlm-launcher"}
    assert not bound & {pod["serviceAccountName"] for pod in all_pods(overlay)}


@everywhere
def test_a_key_that_a_manifest_reads_is_one_that_the_readme_names(overlay: str) -> None:
    for pod in all_pods(overlay):
        for container in containers(pod):
            for entry in container.get("env", []):
                if "valueFrom" in entry:
                    reference = entry["valueFrom"]["secretKeyRef"]
                    assert reference["key"] in external_secrets()[reference["name"]]


@everywhere
def test_no_secret_has_a_value_in_a_manifest(overlay: str) -> None:
    assert of_kind(overlay, "Secret") == []
    secret = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)
    for item in of_kind(overlay, "ConfigMap"):
        for name, value in item["data"].items():
            assert not secret.search(name)
            assert not re.search(r"://[^/\s]*@", value), "a user and password in an address"
            assert not re.search(r"^\s*\w*(password|secret)\w*\s*[=:]\s*\S", value, re.MULTILINE | re.IGNORECASE)
    for pod in all_pods(overlay):
        for container in containers(pod):
            for entry in container.get("env", []):
                assert "valueFrom" in entry or not secret.search(entry["name"])
                assert "@" not in entry.get("value", "")
            assert all("@" not in word for word in container.get("command", []))


def test_no_registry_or_cloud_host_is_named_in_the_tree() -> None:
    host = re.compile(r"\b[\w.-]+\.(io|com|dev|org)/[\w./-]+[:@]", re.IGNORECASE)
    for path in (*K8S.rglob("*.yaml"), K8S / "image" / "Dockerfile"):
        for line in path.read_text().splitlines():
            assert not ("image" in line and host.search(line)), f"{path.relative_to(REPOSITORY)}: {line}"
