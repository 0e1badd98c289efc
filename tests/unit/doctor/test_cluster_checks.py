"""`locvlm doctor --cluster` against the objects of our own overlays, and against clusters that lack something."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from locvlm.cli import main
from locvlm.launch.look import NEEDED
from tests.overlay_server import NODE, OverlayServer, serving
from tests.rendered import K8S, OVERLAYS

KUBECONFIG = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"  # read when the client is imported


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OverlayServer]:
    with serving("gke") as found:
        monkeypatch.setattr(KUBECONFIG, found.kubeconfig(tmp_path))
        yield found


def examine(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, dict[str, str]]:
    """The cluster's checks by name."""
    given = ["doctor", "--cluster", "--json", *options]
    assert main(given) == code
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["ok"] is (code == 0)
    names = [check["name"] for check in told["checks"]]
    return {check["name"]: check for check in told["checks"][names.index("cluster") :]}


def test_a_cluster_that_has_everything_is_ok(server: OverlayServer, capsys: pytest.CaptureFixture[str]) -> None:
    checks = examine(capsys, "--gpu-type", "A100")
    assert {name: check["state"] for name, check in checks.items() if name != "workers"} == {
        "cluster": "ok",
        "rights": "ok",
        "kind rayjobs.ray.io": "ok",
        "kind clusterqueues.kueue.x-k8s.io": "ok",
        "job size": "ok",
        "queue locvlm": "ok",
        "GPU nodes": "ok",
        "secret locvlm-mlflow": "ok",
        "secret locvlm-storage": "ok",
        "volume locvlm-shared": "ok",
    }
    assert checks["queue locvlm"]["found"] == (
        "quota for GPUs: gpu-a100-spot 16 (0 in use), gpu-a100-on-demand 8 (0 in use); the job asks for 8"
    )
    assert checks["GPU nodes"]["found"] == (
        "1 with locvlm/node-pool=gpu-a100, cloud.google.com/gke-accelerator=nvidia-tesla-a100: 8 GPUs "
        "(nvidia-tesla-a100)"
    )
    assert all(method == "GET" or "accessreview" in path for method, path in server.asked)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_passes_its_own_examination(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(overlay) as found:
        found.nodes = [found.node({"locvlm/node-pool": "gpu-a100", "node.kubernetes.io/instance-type": "p4d.24xlarge",
                                   "cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}, 8)]  # fmt: skip
        monkeypatch.setattr(KUBECONFIG, found.kubeconfig(tmp_path))
        checks = examine(capsys, "--preset", "tiny")
    assert {check["state"] for name, check in checks.items() if name != "workers"} == {"ok"}
    assert ("GPU nodes" in checks) == (overlay != "local")


def flavor(name: str, gpus: int) -> dict[str, Any]:
    return {"name": name, "resources": [{"name": "nvidia.com/gpu", "total": str(gpus)}]}


# what is wrong, the options, the check it shows in, its state, what it says
FAULTS: dict[str, tuple[dict[str, Any], list[str], str, str, str]] = {
    "no rights": ({"account": "nobody"}, [], "rights", "failed", "not allowed here: create rayjobs, get rayjobs"),
    "rights unknown": ({"refuse": {"accessreviews": 403}}, [], "rights", "warning", "cannot be asked for"),
    "no KubeRay": ({"groups": {"kueue.x-k8s.io/v1beta2": ["clusterqueues"]}}, [], "kind rayjobs.ray.io", "failed", ""),
    "no Kueue": ({"groups": {"ray.io/v1": ["rayjobs"]}}, [], "kind clusterqueues.kueue.x-k8s.io", "failed", ""),
    "no queue": ({}, ["--queue", "other"], "queue other", "failed", "localqueues other not found"),
    "queue hidden": ({"refuse": {"clusterqueues/": 403}}, [], "queue locvlm", "warning", "may not be looked at"),
    "queue asleep": (
        {"status": {"conditions": [{"type": "Active", "status": "False", "message": "no flavor gpu-a100-spot"}]}},
        [],
        "queue locvlm",
        "failed",
        "it is not active: no flavor gpu-a100-spot",
    ),
    "too little quota": ({}, ["--job-workers", "3"], "queue locvlm", "failed", "the job asks for 24"),
    "quota in use": (
        {"status": {"flavorsUsage": [flavor("gpu-a100-spot", 12), flavor("gpu-a100-on-demand", 1)]}},
        [],
        "queue locvlm",
        "warning",
        "gpu-a100-spot 16 (12 in use), gpu-a100-on-demand 8 (1 in use)",
    ),
    "too many workers": (
        {},
        ["--gpus-per-worker", "2"],
        "job size",
        "failed",
        "trains with 8 workers, the job asks for 2",
    ),
    "no nodes": ({"nodes": []}, [], "GPU nodes", "warning", "no node with locvlm/node-pool=gpu-a100, cloud"),
    "nodes hidden": ({"refuse": {"/nodes": 403}}, [], "GPU nodes", "warning", "may not be looked at"),
    "other GPUs": ({}, ["--gpu-type", "H100"], "GPU nodes", "failed", "(nvidia-tesla-a100)"),
    "no device plugin": ({"nodes": [OverlayServer.node(NODE, 0)]}, [], "GPU nodes", "failed", "0 GPUs"),
    "few GPUs": ({}, ["--job-workers", "2"], "GPU nodes", "warning", "8 GPUs (nvidia-tesla-a100); the job asks for 16"),
    "no secret": ({"secrets": set()}, [], "secret locvlm-mlflow", "warning", "there is none"),
    "secrets hidden": ({"refuse": {"/secrets/": 403}}, [], "secret locvlm-storage", "warning", "may not be looked at"),
    "volume waits": ({"phase": "Pending"}, [], "volume locvlm-shared", "warning", "Pending"),
    "no volume": ({"refuse": {"/persistentvolumeclaims/": 404}}, [], "volume locvlm-shared", "failed", "there is none"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_cluster_lacks_is_told_with_what_to_mend(
    fault: str, server: OverlayServer, capsys: pytest.CaptureFixture[str]
) -> None:
    state, options, name, outcome, words = FAULTS[fault]
    for key, value in state.items():
        setattr(server, key, value)
    check = examine(capsys, *options, code=2 if outcome == "failed" else 0)[name]
    assert check["state"] == outcome
    assert words in check["found"]
    assert check["mend"]


def test_a_cluster_that_is_away_is_one_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving("gke") as gone:
        config = gone.kubeconfig(tmp_path)
    monkeypatch.setattr(KUBECONFIG, config)
    checks = examine(capsys, code=2)
    assert checks["cluster"]["state"] == "failed"
    assert list(checks) == ["cluster", "workers"]
    monkeypatch.setattr(KUBECONFIG, str(tmp_path / "none"))
    assert "neither a pod's service account nor" in examine(capsys, code=2)["cluster"]["found"]


def test_the_rights_that_are_asked_for_are_those_of_the_role() -> None:
    documents = yaml.safe_load_all((K8S / "base" / "rbac.yaml").read_text())
    (role,) = [document for document in documents if document["kind"] == "Role"]
    given = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert given == set(NEEDED)
