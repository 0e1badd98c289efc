"""Every manifest that people apply, and the RayJob that the launcher fills, as the API server would see them."""

import copy
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from locvlm import __version__
from locvlm.launch import JobSettings, default_template, render_ray_job, validate_ray_job
from tests.crds import FILES, crd_faults

REPOSITORY = Path(__file__).resolve().parents[2]
K8S = REPOSITORY / "k8s"
KUBERNETES = "1.37"
APPLIED = yaml.safe_load((K8S / "kustomization.yaml").read_text())["resources"]
IMAGE = f"locvlm:{__version__}"
CLUSTER_WIDE = ("Namespace", "ResourceFlavor", "ClusterQueue")

Manifest = dict[str, Any]


def documents(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((K8S / name).read_text()))


def rendered(settings: JobSettings | None = None) -> Manifest:
    return render_ray_job(default_template().read_text(), "try-1", IMAGE, ["locvlm", "train"], settings)


ALL = [(name, doc) for name in APPLIED for doc in documents(name)] + [("ray-job.yaml", rendered())]
IDS = [f"{name}-{doc['kind']}-{doc['metadata']['name']}" for name, doc in ALL]


def named(kind: str, name: str) -> Manifest:
    return next(doc for _, doc in ALL if (doc["kind"], doc["metadata"]["name"]) == (kind, name))


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


PODS = [
    pytest.param(pod, id=f"{label}-{index}")
    for label, (_, doc) in zip(IDS, ALL, strict=True)
    for index, pod in enumerate(pods(doc))
]


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def test_every_manifest_file_is_applied_or_the_template() -> None:
    files = {path.name for path in K8S.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == {*APPLIED, "ray-job.yaml"}


@pytest.mark.parametrize("doc", [doc for _, doc in ALL], ids=IDS)
def test_a_manifest_fits_its_schema(doc: Manifest, request: pytest.FixtureRequest) -> None:
    if doc["kind"] in FILES:
        assert crd_faults(request.getfixturevalue("schemas"), doc) == []
    else:
        kubernetes_validate.validate(doc, KUBERNETES, strict=True)


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_of_any_kind_fits_the_core_schema(pod: Manifest) -> None:
    doc = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    kubernetes_validate.validate(doc, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "settings",
    [
        JobSettings(),
        JobSettings(namespace="team", queue="", workers=3, gpus_per_worker=1, entrypoint_gpus=1, deadline_minutes=5),
        JobSettings(queue="other", environment={"MLFLOW_RUN_ID": "0123"}),
    ],
)
def test_a_rendered_job_fits_the_schema_and_the_operators_rules(schemas: Path, settings: JobSettings) -> None:
    job = rendered(settings)
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
    job = copy.deepcopy(rendered())
    node = job
    for key in place.split("."):
        node = node[int(key) if key.isdigit() else key]
    node[typo] = {}
    faults = crd_faults(schemas, job)
    assert len(faults) == 1
    assert typo in faults[0]


@pytest.mark.parametrize("value", ["eight", None, -1])
def test_a_wrong_value_is_refused(schemas: Path, value: object) -> None:
    job = rendered()
    job["spec"]["preRunningDeadlineSeconds"] = value
    assert crd_faults(schemas, job)


def test_a_typo_in_a_queue_is_refused(schemas: Path) -> None:
    queue = copy.deepcopy(named("ClusterQueue", "locvlm"))
    queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]["nominalQuotas"] = "1"
    assert "nominalQuotas" in crd_faults(schemas, queue)[0]


@pytest.mark.parametrize("pod", PODS)
def test_no_container_runs_as_root_or_can_become_it(pod: Manifest) -> None:
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
        assert set(volume) - {"name"} <= {"emptyDir", "persistentVolumeClaim"}


@pytest.mark.parametrize("pod", PODS)
def test_every_container_requests_and_limits_cpu_and_memory(pod: Manifest) -> None:
    for container in containers(pod):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests)
        assert {"cpu", "memory"} <= set(limits)
        assert requests["memory"] == limits["memory"]
        assert amount(requests["cpu"]) <= amount(limits["cpu"])


@pytest.mark.parametrize("pod", PODS)
def test_every_image_is_the_projects_own_at_this_version_and_without_a_registry(pod: Manifest) -> None:
    assert {container["image"] for container in containers(pod)} == {IMAGE}


def test_no_secret_has_a_value_in_a_manifest() -> None:
    assert all(doc["kind"] != "Secret" for _, doc in ALL)
    for _, doc in ALL:
        if doc["kind"] == "ConfigMap":
            assert set(doc["data"]) == {"MLFLOW_TRACKING_URI"}
            assert "@" not in doc["data"]["MLFLOW_TRACKING_URI"]  # no user and password in the address
    secret = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)
    for _, doc in ALL:
        for pod in pods(doc):
            for container in containers(pod):
                assert all(list(source) == ["secretRef"] for source in container.get("envFrom", []))
                for entry in container.get("env", []):
                    assert not secret.search(entry["name"])
                    assert "@" not in entry["value"]


def test_the_head_is_on_demand_without_cpus_and_the_workers_are_on_a100() -> None:
    cluster = rendered()["spec"]["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["template"]["spec"]["nodeSelector"] == {"locvlm/node-pool": "cpu-on-demand"}
    assert "tolerations" not in head["template"]["spec"]
    pod = workers["template"]["spec"]
    assert pod["nodeSelector"] == {"locvlm/node-pool": "gpu-a100"}
    resources = pod["containers"][0]["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "8"


def test_every_ray_container_has_shared_memory() -> None:
    for group in (job := rendered()["spec"]["rayClusterSpec"])["workerGroupSpecs"] + [job["headGroupSpec"]]:
        pod = group["template"]["spec"]
        mount = next(mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/dev/shm")
        volume = next(volume for volume in pod["volumes"] if volume["name"] == mount["name"])
        assert volume["emptyDir"]["medium"] == "Memory"


def test_the_job_ends_and_frees_its_gpus_whatever_happens() -> None:
    spec = rendered()["spec"]
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] >= 600
    assert spec["backoffLimit"] >= 1
    assert spec["submitterConfig"]["backoffLimit"] >= 1
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "suspend" not in spec


def test_the_ray_version_is_the_pinned_one() -> None:
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
    assert rendered()["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]


def amount(quantity: Any) -> float:
    """A Kubernetes quantity as a number."""
    match = re.fullmatch(r"(\d+)(m|Gi|Ti)?", str(quantity))
    assert match, quantity
    return int(match[1]) * {None: 1.0, "m": 0.001, "Gi": 2.0**30, "Ti": 2.0**40}[match[2]]


def demand(job: Manifest) -> dict[str, Counter[str]]:
    """Requests by node pool: head, workers, submitter."""
    spec = job["spec"]
    groups = [(1, spec["submitterPodTemplate"]), (1, spec["rayClusterSpec"]["headGroupSpec"]["template"])]
    groups += [(group["replicas"], group["template"]) for group in spec["rayClusterSpec"]["workerGroupSpecs"]]
    total: dict[str, Counter[str]] = {}
    for count, template in groups:
        pool = template["spec"]["nodeSelector"]["locvlm/node-pool"]
        for kind, value in template["spec"]["containers"][0]["resources"]["requests"].items():
            total.setdefault(pool, Counter())[kind] += count * amount(value)
    return total


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_of_one_or_two_nodes_fits_the_queues_quota(workers: int) -> None:
    (group,) = named("ClusterQueue", "locvlm")["spec"]["resourceGroups"]
    quotas = {
        flavor["name"]: {entry["name"]: amount(entry["nominalQuota"]) for entry in flavor["resources"]}
        for flavor in group["flavors"]
    }
    assert all(set(quota) == set(group["coveredResources"]) for quota in quotas.values())
    for pool, wanted in demand(rendered(JobSettings(workers=workers))).items():
        assert all(value <= quotas[pool][kind] for kind, value in wanted.items()), (pool, wanted)


def test_the_queue_chain_is_whole() -> None:
    job, local = rendered(), named("LocalQueue", "locvlm")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert job["metadata"]["namespace"] == local["metadata"]["namespace"]
    cluster_queue = named("ClusterQueue", local["spec"]["clusterQueue"])
    namespace = cluster_queue["spec"]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert named("Namespace", namespace)
    flavors = [flavor["name"] for group in cluster_queue["spec"]["resourceGroups"] for flavor in group["flavors"]]
    labels = {name: named("ResourceFlavor", name)["spec"]["nodeLabels"] for name in flavors}
    for pod in pods(job):  # Kueue gives a pod set the flavor whose node labels its selector allows
        assert [name for name in flavors if labels[name].items() >= pod["nodeSelector"].items()]
    tolerated = {entry["key"] for pod in pods(job) for entry in pod.get("tolerations", [])}
    taints = {taint["key"] for name in flavors for taint in named("ResourceFlavor", name)["spec"].get("nodeTaints", [])}
    assert taints <= tolerated


def test_every_claim_that_a_pod_mounts_exists_in_its_namespace() -> None:
    claims = {doc["metadata"]["name"] for _, doc in ALL if doc["kind"] == "PersistentVolumeClaim"}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for _, doc in ALL
        for pod in pods(doc)
        for volume in pod.get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert used == claims


def test_everything_namespaced_lies_in_the_namespace_that_enforces_restricted_pods() -> None:
    namespace = named("Namespace", "locvlm")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for _, doc in ALL:
        assert doc["metadata"].get("namespace") == (None if doc["kind"] in CLUSTER_WIDE else "locvlm")


def test_the_launchers_role_allows_what_a_launch_needs_and_no_more() -> None:
    rules = {
        (rule["apiGroups"][0], rule["resources"][0]): set(rule["verbs"])
        for rule in named("Role", "locvlm-launcher")["rules"]
    }
    assert rules == {
        ("ray.io", "rayjobs"): {"create", "get", "list", "watch", "patch", "delete"},
        ("", "pods"): {"get", "list"},
        ("", "pods/log"): {"get"},
    }
    binding = named("RoleBinding", "locvlm-launcher")
    assert binding["roleRef"]["name"] == "locvlm-launcher"
    assert named("ServiceAccount", binding["subjects"][0]["name"])


def mlflow_options() -> dict[str, str]:
    (container,) = named("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["mlflow", "server"]
    return dict(option.removeprefix("--").split("=", 1) for option in container["command"][2:])


def test_mlflow_answers_to_the_name_that_jobs_use_and_not_to_foreign_ones() -> None:
    from mlflow.server.security_utils import is_allowed_host_header

    allowed = mlflow_options()["allowed-hosts"].split(",")
    env = rendered()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    (address,) = [entry["value"] for entry in env if entry["name"] == "MLFLOW_TRACKING_URI"]
    assert is_allowed_host_header(allowed, address.removeprefix("http://"))
    assert is_allowed_host_header(allowed, "localhost:5000")  # kubectl port-forward
    assert not is_allowed_host_header(allowed, "mlflow.example.org:5000")
    service = named("Service", "mlflow")
    assert address == f"http://mlflow.locvlm.svc:{service['spec']['ports'][0]['port']}"


def test_mlflow_opens_the_database_that_was_made_ready_and_is_probed_on_health() -> None:
    deployment = named("Deployment", "mlflow")["spec"]
    pod = deployment["template"]["spec"]
    assert pod["initContainers"][0]["command"] == ["mlflow", "db", "upgrade", mlflow_options()["backend-store-uri"]]
    assert deployment["strategy"] == {"type": "Recreate"}
    assert deployment["replicas"] == 1
    assert pod["enableServiceLinks"] is False
    container = pod["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    selector = named("Service", "mlflow")["spec"]["selector"]
    assert selector == deployment["selector"]["matchLabels"]
    assert selector.items() <= deployment["template"]["metadata"]["labels"].items()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kustomize_yields_the_same_objects_and_leaves_cluster_wide_ones_without_a_namespace() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(K8S)], capture_output=True, text=True, check=True)
    built = {(doc["kind"], doc["metadata"]["name"]): doc for doc in yaml.safe_load_all(done.stdout)}
    assert built == {(doc["kind"], doc["metadata"]["name"]): doc for name, doc in ALL if name != "ray-job.yaml"}


def dockerfile() -> list[str]:
    """The instructions, continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", (K8S / "image" / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]


def test_the_image_is_built_in_stages_and_ends_as_an_ordinary_user() -> None:
    lines = dockerfile()
    stages = [line for line in lines if line.startswith("FROM ")]
    assert len(stages) >= 2
    last = lines[lines.index(stages[-1]) :]
    users = [line.split()[1] for line in last if line.startswith("USER ")]
    pod = next(pods(rendered()))["securityContext"]
    assert users == [f"{pod['runAsUser']}:{pod['runAsGroup']}"]


def test_the_image_installs_with_the_constraints_compiles_and_carries_the_template() -> None:
    lines = dockerfile()
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert all("constraints.txt" in line for line in installs)
    assert any("pip install . -c constraints.txt" in line for line in installs)
    assert any("compileall" in line for line in lines)
    assert "COPY k8s/ray-job.yaml /opt/venv/share/locvlm/ray-job.yaml" in lines


def test_every_file_that_the_image_copies_is_in_the_repository_and_let_through() -> None:
    ignored = (K8S / "image" / "Dockerfile.dockerignore").read_text().split("\n")
    for line in dockerfile():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (REPOSITORY / source).exists(), source
                assert f"!{source}" in ignored
