"""The rules of a RayJob that its schema cannot say.

They are those of the KubeRay 1.7 operator (ray-operator/controllers/ray/utils/validation.go) and of Kueue's webhook.
"""

import re
from collections.abc import Iterator, Sequence

import yaml

from locvlm.errors import LaunchError
from locvlm.launch.job import QUEUE_LABEL, Job, containers

MAX_NAME = 47  # KubeRay appends a suffix and DNS labels end at 63
MAX_QUEUED_WORKER_GROUPS = 17  # Kueue: a workload's pod sets, less head and submitter
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def validate_ray_job(job: Job) -> None:
    """Check what the CRD's schema cannot say: the rules of the KubeRay 1.7 operator and, for a queued job, of Kueue.

    Raises LaunchError that lists every fault. Such a job would be created and then sit there as ValidationFailed.
    """
    name = job.get("metadata", {}).get("name", "?")
    try:
        faults = [*_metadata_faults(job), *_lifetime_faults(job), *_mode_faults(job), *_cluster_faults(job)]
        if QUEUE_LABEL in (job["metadata"].get("labels") or {}):
            faults += _queue_faults(job)
    except (AttributeError, KeyError, TypeError) as fault:
        raise LaunchError(
            f"checking the RayJob {name}: a value in it is of the wrong kind ({fault}); "
            "compare it with k8s/ray-job.yaml"
        ) from None
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise LaunchError(f"checking the RayJob {name}: {len(faults)} fault(s)\n{lines}")


def _metadata_faults(job: Job) -> Iterator[str]:
    name = str(job.get("metadata", {}).get("name", ""))
    if len(name) > MAX_NAME:
        yield f"the name {name!r} has {len(name)} characters, at most {MAX_NAME} are allowed"
    if not DNS_1035.fullmatch(name):
        yield f"the name {name!r} must be lower-case letters, digits and '-', begin with a letter, not end with '-'"


def _lifetime_faults(job: Job) -> Iterator[str]:
    spec = job["spec"]
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    ttl = spec.get("ttlSecondsAfterFinished", 0)
    rules = (spec.get("deletionStrategy") or {}).get("deletionRules")
    if ttl < 0:
        yield f"ttlSecondsAfterFinished is {ttl}, it must not be negative"
    if ttl > 0 and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if rules and (shuts_down or ttl > 0):
        yield "deletionRules exclude shutdownAfterJobFinishes and ttlSecondsAfterFinished"
    if spec.get("suspend") and not shuts_down:
        yield "suspend needs shutdownAfterJobFinishes: true"
    for key, least in (("activeDeadlineSeconds", 1), ("preRunningDeadlineSeconds", 1), ("backoffLimit", 0)):
        if spec.get(key) is not None and spec[key] < least:
            yield f"{key} is {spec[key]}, it must be at least {least}"


def _mode_faults(job: Job) -> Iterator[str]:
    spec = job["spec"]
    mode = spec.get("submissionMode", "K8sJobMode")
    selects = bool(spec.get("clusterSelector"))
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode is {mode!r}, it must be one of {', '.join(SUBMISSION_MODES)}"
    if not spec.get("entrypoint") and mode != "InteractiveMode":
        yield "entrypoint is empty"
    if selects == bool(spec.get("rayClusterSpec")):
        yield "exactly one of rayClusterSpec and clusterSelector must be set"
    if spec.get("suspend") and selects:
        yield "suspend does not go with clusterSelector"
    if spec.get("backoffLimit", 0) > 0 and (selects or mode == "InteractiveMode"):
        yield "backoffLimit does not go with clusterSelector or InteractiveMode"
    if mode == "SidecarMode":
        if selects:
            yield "SidecarMode does not go with clusterSelector"
        yield from (f"SidecarMode forbids {key}" for key in ("submitterPodTemplate", "submitterConfig") if key in spec)
        head = (spec.get("rayClusterSpec") or {}).get("headGroupSpec") or {}
        yield from _restart_faults("SidecarMode", [head])
    try:
        yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except yaml.YAMLError:
        yield "runtimeEnvYAML is not valid YAML"


def _restart_faults(reason: str, groups: Sequence[Job]) -> Iterator[str]:
    for group in groups:
        policy = ((group.get("template") or {}).get("spec") or {}).get("restartPolicy", "Never")
        if policy != "Never":
            yield f"{reason} needs restartPolicy Never in {group.get('groupName', 'the head')}, found {policy}"


def _cluster_faults(job: Job) -> Iterator[str]:
    cluster = job["spec"].get("rayClusterSpec")
    if not cluster:
        return
    head, workers = cluster.get("headGroupSpec") or {}, cluster.get("workerGroupSpecs") or []
    for group in (head, *workers):
        yield from _group_faults(group)
    if cluster.get("enableInTreeAutoscaling") and (cluster.get("autoscalerOptions") or {}).get("version") == "v2":
        yield from _restart_faults("autoscaler v2", [head, *workers])
    auth = cluster.get("authOptions") or {}
    if auth.get("mode") == "token":
        version = re.match(r"(\d+)\.(\d+)", str(cluster.get("rayVersion", "")))
        if version is None or (int(version[1]), int(version[2])) < (2, 52):
            yield f"authOptions.mode token needs rayVersion 2.52 or later, found {cluster.get('rayVersion')!r}"
    if auth.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth does not work for a RayJob"


def _group_faults(group: Job) -> Iterator[str]:
    name = group.get("groupName", "the head")
    start = group.get("rayStartParams") or {}
    if not containers(group.get("template")):
        yield f"{name} has no container"
    if group.get("resources") and any(start.get(key) for key in ("num-cpus", "num-gpus", "memory", "resources")):
        yield f"{name} sets resources both in rayStartParams and in resources; use one"
    if "labels" in start:
        yield f"{name}: rayStartParams.labels is not supported, use labels"
    low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    if low > high:
        yield f"{name}: minReplicas {low} is above maxReplicas {high}"


def _queue_faults(job: Job) -> Iterator[str]:
    spec = job["spec"]
    cluster = spec.get("rayClusterSpec") or {}
    if not spec.get("shutdownAfterJobFinishes"):
        yield "a queued job needs shutdownAfterJobFinishes: true, or it would hold its quota for ever"
    if spec.get("clusterSelector"):
        yield "a queued job cannot use clusterSelector"
    if cluster.get("enableInTreeAutoscaling"):
        yield "a queued job cannot autoscale (Kueue admits a fixed size)"
    if len(cluster.get("workerGroupSpecs") or []) > MAX_QUEUED_WORKER_GROUPS:
        yield f"a queued job has at most {MAX_QUEUED_WORKER_GROUPS} worker groups"
