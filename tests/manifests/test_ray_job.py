"""The RayJob of a launch on every kind of cluster, and the queues it waits in."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from locvlm.launch import JobSettings, validate_ray_job
from tests.crds import crd_faults
from tests.kustomize import Manifest
from tests.rendered import OVERLAYS, REPOSITORY, amount, containers, named, of_kind, pods, ray_job

everywhere = pytest.mark.parametrize("overlay", OVERLAYS)
with_gpus = pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name != "local"])
GPU = "nvidia.com/gpu"


@pytest.mark.parametrize(
    "settings",
    [
        JobSettings(),
        JobSettings(namespace="team", queue="", workers=3, gpus_per_worker=1, entrypoint_gpus=1, deadline_minutes=5),
        JobSettings(queue="other", priority="locvlm-urgent", environment={"MLFLOW_RUN_ID": "0123"}, lineage="ab-1"),
    ],
    ids=["as it is", "resized", "queued"],
)
@everywhere
def test_a_job_fits_the_definition_and_the_operators_rules(overlay: str, settings: JobSettings, schemas: Path) -> None:
    job = ray_job(overlay, settings)
    assert crd_faults(schemas, job) == []
    validate_ray_job(job)


@pytest.mark.parametrize(
    ("place", "typo"),
    [
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec", "nodeSelctor"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.tolerations.0", "efect"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources", "limit"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.envFrom.0.secretRef", "nmae"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.volumes.1.emptyDir", "sizelimit"),
        ("spec.submitterPodTemplate.spec.securityContext", "runAsNonroot"),
        ("spec", "backOffLimit"),
    ],
)
def test_a_planted_typo_is_refused(schemas: Path, place: str, typo: str) -> None:
    job = copy.deepcopy(ray_job("gke"))
    node: Any = job
    for key in place.split("."):
        node = node[int(key) if key.isdigit() else key]
    node[typo] = {}
    (fault,) = crd_faults(schemas, job)
    assert typo in fault


@pytest.mark.parametrize("value", ["eight", None, -1])
def test_a_wrong_value_is_refused(schemas: Path, value: object) -> None:
    job = ray_job("gke")
    job["spec"]["preRunningDeadlineSeconds"] = value
    assert crd_faults(schemas, job)


def groups(overlay: str) -> tuple[Manifest, Manifest]:
    cluster = ray_job(overlay)["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"], workers


@everywhere
def test_no_task_runs_on_the_head_and_every_ray_container_has_shared_memory(overlay: str) -> None:
    head, workers = groups(overlay)
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in (head, workers):
        pod = group["template"]["spec"]
        mount = next(mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/dev/shm")
        volume = next(volume for volume in pod["volumes"] if volume["name"] == mount["name"])
        assert volume["emptyDir"]["medium"] == "Memory"
        assert amount(volume["emptyDir"]["sizeLimit"]) < amount(pod["containers"][0]["resources"]["limits"]["memory"])


@with_gpus
def test_workers_take_a_whole_a100_node(overlay: str) -> None:
    resources = groups(overlay)[1]["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"][GPU] == resources["limits"][GPU] == "8"


def test_on_one_machine_nothing_asks_for_a_gpu_or_a_label_whatever_the_step_says() -> None:
    job = ray_job("local", JobSettings(workers=1, gpus_per_worker=1, entrypoint_gpus=1))
    assert "entrypointNumGpus" not in job["spec"]
    for pod in pods(job):
        assert "nodeSelector" not in pod
        assert all(GPU not in container["resources"]["limits"] for container in containers(pod))
    assert all("nodeSelector" not in pod for item in of_kind("local", "Deployment") for pod in pods(item))


@everywhere
def test_the_job_ends_and_frees_its_gpus_whatever_happens(overlay: str) -> None:
    spec = ray_job(overlay)["spec"]
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] >= 600
    assert spec["backoffLimit"] >= 1
    assert spec["submitterConfig"]["backoffLimit"] >= 1
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "suspend" not in spec


def test_the_ray_version_is_the_pinned_one() -> None:
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
    assert ray_job("gke")["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]


@everywhere
def test_prometheus_is_told_where_ray_exports_its_metrics(overlay: str) -> None:
    for group in groups(overlay):
        annotations = group["template"]["metadata"]["annotations"]
        port = annotations["prometheus.io/port"]
        assert annotations["prometheus.io/scrape"] == "true"
        assert group["rayStartParams"]["metrics-export-port"] == port
        ports = {entry["name"]: entry["containerPort"] for entry in group["template"]["spec"]["containers"][0]["ports"]}
        assert ports["metrics"] == int(port)


# --- the queues


def flavors(overlay: str) -> list[str]:
    (group,) = named(overlay, "ClusterQueue", "locvlm")["spec"]["resourceGroups"]
    return [flavor["name"] for flavor in group["flavors"]]


def admitted_to(overlay: str, pod: Manifest) -> list[str]:
    """The flavors that Kueue may give a pod, by its rule: selector against labels, tolerations against taints."""
    specs = {name: named(overlay, "ResourceFlavor", name)["spec"] for name in flavors(overlay)}
    keys = {key for spec in specs.values() for key in spec.get("nodeLabels", {})}
    selected = {key: value for key, value in pod.get("nodeSelector", {}).items() if key in keys}
    fitting = []
    for name, spec in specs.items():
        tolerated = {entry["key"] for entry in [*pod.get("tolerations", []), *spec.get("tolerations", [])]}
        taints = {taint["key"] for taint in spec.get("nodeTaints", [])}
        if selected.items() <= spec.get("nodeLabels", {}).items() and taints <= tolerated:
            fitting.append(name)
    return fitting


@with_gpus
def test_the_head_gets_an_on_demand_node_and_the_workers_an_a100_spot_first(overlay: str) -> None:
    spec = ray_job(overlay)["spec"]
    head, workers = groups(overlay)
    for template in (head["template"], spec["submitterPodTemplate"]):
        assert admitted_to(overlay, template["spec"]) == ["cpu-on-demand"]
        assert "tolerations" not in template["spec"]
    spot = [] if overlay == "on-prem" else ["gpu-a100-spot"]
    assert admitted_to(overlay, workers["template"]["spec"]) == [*spot, "gpu-a100-on-demand"]


def test_spot_and_on_demand_nodes_are_told_apart_by_what_the_cloud_sets() -> None:
    for overlay, key in (("gke", "cloud.google.com/gke-provisioning"), ("eks", "eks.amazonaws.com/capacityType")):
        values = [named(overlay, "ResourceFlavor", name)["spec"]["nodeLabels"][key] for name in flavors(overlay)]
        assert values[0] == values[2] != values[1]


def demand(job: Manifest) -> list[tuple[Manifest, Counter[str]]]:
    """Pod and total requests of submitter, head and workers."""
    spec = job["spec"]
    parts = [(1, spec["submitterPodTemplate"]), (1, spec["rayClusterSpec"]["headGroupSpec"]["template"])]
    parts += [(group["replicas"], group["template"]) for group in spec["rayClusterSpec"]["workerGroupSpecs"]]
    return [
        (
            template["spec"],
            Counter(
                {
                    kind: count * amount(value)
                    for kind, value in template["spec"]["containers"][0]["resources"]["requests"].items()
                }
            ),
        )
        for count, template in parts
    ]


@pytest.mark.parametrize("workers", [1, 2])
@everywhere
def test_a_job_of_one_or_two_nodes_fits_the_queues_quota(overlay: str, workers: int) -> None:
    (group,) = named(overlay, "ClusterQueue", "locvlm")["spec"]["resourceGroups"]
    left = {
        flavor["name"]: {entry["name"]: amount(entry["nominalQuota"]) for entry in flavor["resources"]}
        for flavor in group["flavors"]
    }
    assert all(set(quota) == set(group["coveredResources"]) for quota in left.values())
    for pod, wanted in demand(ray_job(overlay, JobSettings(workers=workers))):
        fitting = [
            name
            for name in admitted_to(overlay, pod)
            if all(value <= left[name].get(kind, 0) for kind, value in wanted.items())
        ]
        assert fitting, (pod["containers"][0]["name"], wanted)
        for kind, value in wanted.items():
            left[fitting[0]][kind] -= value


@everywhere
def test_the_queue_chain_is_whole(overlay: str) -> None:
    job, local = ray_job(overlay), named(overlay, "LocalQueue", "locvlm")
    labels = job["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert job["metadata"]["namespace"] == local["metadata"]["namespace"]
    queue = named(overlay, "ClusterQueue", local["spec"]["clusterQueue"])
    namespace = queue["spec"]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert named(overlay, "Namespace", namespace)
    priorities = {item["metadata"]["name"]: item["value"] for item in of_kind(overlay, "WorkloadPriorityClass")}
    assert labels["kueue.x-k8s.io/priority-class"] in priorities
    assert priorities["locvlm-urgent"] > priorities["locvlm-normal"] > priorities["locvlm-background"]
    assert {item["metadata"]["name"] for item in of_kind(overlay, "ResourceFlavor")} == set(flavors(overlay))


@everywhere
def test_no_job_is_applied_with_the_manifests(overlay: str) -> None:
    assert of_kind(overlay, "RayJob") == []
