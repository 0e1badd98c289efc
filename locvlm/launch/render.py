"""The RayJob: one template, what the cluster adds to it, what one launch changes. All of it in `render_ray_job`."""

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from locvlm.errors import LaunchError
from locvlm.launch.job import LINEAGE_LABEL, QUEUE_LABEL, Job, containers, pod_templates, ray_containers

GPU = "nvidia.com/gpu"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
ACCELERATOR = "locvlm/accelerator"  # annotation; "none": this cluster's workers have no GPU


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What a launch changes in the template; None keeps the template's value.

    `queue` is a Kueue LocalQueue ("": not queued). `workers` counts worker pods and `gpus_per_worker` the GPUs of each;
    a pod's cpu, memory and shared memory follow its GPUs in proportion. `entrypoint_gpus` are GPUs of the command's own
    process: 0 for `train`, whose Ray workers hold them, 1 for a verb that runs a model itself. `priority` is a Kueue
    WorkloadPriorityClass. `environment` is set in the Ray pods and must not hold a secret. `lineage`: the id of the
    pipeline run that the job belongs to, for a label of the job and its pods.
    """

    namespace: str | None = None
    queue: str | None = None
    priority: str | None = None
    workers: int | None = None
    gpus_per_worker: int | None = None
    entrypoint_gpus: int | None = None
    deadline_minutes: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    lineage: str = ""


def default_template() -> Path:
    """The template `k8s/ray-job.yaml`: of the checkout around this module, else of the image (`<prefix>/share/locvlm`).

    Raises LaunchError when there is neither.
    """
    places = (Path(__file__).parents[2] / "k8s", Path(sys.prefix) / "share" / "locvlm")
    for place in places:
        if (place / "ray-job.yaml").is_file():
            return place / "ray-job.yaml"
    raise LaunchError(
        f"looking for the job template: no ray-job.yaml in {' or '.join(map(str, places))}; "
        "give its path with --template (the repository has it as k8s/ray-job.yaml)"
    )


def job_name(run_id: str, step: str) -> str:
    """A job's name: the same for the same run and step, DNS-1035, at most 47 characters."""
    digest = sha256(f"{run_id}\0{step}".encode()).hexdigest()[:10]
    slug = re.sub(r"[^a-z0-9]+", "-", step.lower())[:28].strip("-")
    return "-".join(part for part in ("locvlm", slug, digest) if part)


def render_ray_job(
    template_text: str,
    name: str,
    image: str,
    entrypoint: Sequence[str],
    settings: JobSettings | None = None,
    site_text: str = "",
) -> Job:
    """Fill the RayJob template: name, image of every Ray pod, command (quoted for the shell), settings.

    `site_text` is this cluster's fragment of a RayJob (k8s/overlays/*/ray-job.yaml), merged into the template first:
    mappings by key (null takes a key away), lists of named items by name, other lists and values are replaced.
    Raises LaunchError when the template is not a RayJob or a setting has no place in it.
    """
    if not entrypoint:
        raise LaunchError(f"rendering the job {name}: the command is empty; give a locvlm verb after --")
    job = _read_template(template_text)
    if site_text:
        job = _merged(job, _read_site(site_text))
    try:
        _fill(job, name, image, entrypoint, settings or JobSettings())
    except (AttributeError, IndexError, KeyError, TypeError) as fault:
        raise LaunchError(
            f"rendering the job {name}: the template has not the parts of a RayJob ({fault!r}); "
            "compare it with k8s/ray-job.yaml"
        ) from None
    return job


def _fill(job: Job, name: str, image: str, entrypoint: Sequence[str], settings: JobSettings) -> None:
    metadata, spec = job["metadata"], job["spec"]
    if (metadata.get("annotations") or {}).get(ACCELERATOR) == "none":
        settings = replace(settings, gpus_per_worker=None, entrypoint_gpus=None)
    metadata["name"] = name
    # Ray's submitter parses this line once and joins the words again with the same quoting for the driver's shell
    spec["entrypoint"] = shlex.join(entrypoint)
    if settings.namespace is not None:
        metadata["namespace"] = settings.namespace
    if settings.queue is not None:
        labels = metadata.setdefault("labels", {})
        labels.pop(QUEUE_LABEL, None)
        if settings.queue:
            labels[QUEUE_LABEL] = settings.queue
    if settings.priority is not None:
        metadata.setdefault("labels", {})[PRIORITY_LABEL] = settings.priority
    if settings.deadline_minutes is not None:
        spec["activeDeadlineSeconds"] = 60 * settings.deadline_minutes
    if settings.entrypoint_gpus is not None:
        spec["entrypointNumGpus"] = settings.entrypoint_gpus
    if settings.lineage:
        for part in (metadata, *(template.setdefault("metadata", {}) for template in pod_templates(job))):
            part.setdefault("labels", {})[LINEAGE_LABEL] = settings.lineage
    for container in (*ray_containers(job), *containers(spec.get("submitterPodTemplate"))):
        container["image"] = image
    for container in ray_containers(job):
        env = [entry for entry in container.get("env", []) if entry["name"] not in settings.environment]
        container["env"] = env + [{"name": key, "value": value} for key, value in sorted(settings.environment.items())]
    _resize_workers(job, settings)


def _read_template(text: str) -> Job:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as fault:
        raise LaunchError(f"reading the job template: not valid YAML ({fault})") from None
    if not isinstance(value, dict) or value.get("kind") != "RayJob" or not isinstance(value.get("spec"), dict):
        raise LaunchError("reading the job template: it is not a RayJob; start from k8s/ray-job.yaml")
    # through JSON, so that parts shared by a YAML anchor become separate and can be changed one by one
    job: Job = json.loads(json.dumps(value, default=str))
    job.setdefault("metadata", {})
    return job


def _read_site(text: str) -> Job:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as fault:
        raise LaunchError(f"reading the cluster's part of the job: not valid YAML ({fault})") from None
    if not isinstance(value, dict) or not set(value) <= {"apiVersion", "kind", "metadata", "spec"}:
        raise LaunchError(
            "reading the cluster's part of the job: it must be a mapping with metadata and spec, as in a RayJob; "
            "compare it with k8s/overlays/gke/ray-job.yaml"
        )
    site: Job = json.loads(json.dumps(value, default=str))
    return site


def _merged(base: Any, change: Any) -> Any:
    """`base` with `change` applied; see render_ray_job."""
    if isinstance(change, dict):
        out = dict(base) if isinstance(base, dict) else {}
        for key, value in change.items():
            if value is None:
                out.pop(key, None)
            else:
                out[key] = _merged(out.get(key), value)
        return out
    key = _list_key(base, change)
    if key is None:
        return change
    changes = {item[key]: item for item in change}
    kept = [_merged(item, changes.pop(item[key], {})) for item in base]
    return kept + [_merged(None, item) for item in changes.values()]


def _list_key(*lists: Any) -> str | None:
    """What tells the items of these lists apart, if they are lists of named items."""
    if not all(isinstance(items, list) and all(isinstance(item, dict) for item in items) for items in lists):
        return None
    return next((key for key in ("name", "groupName") if all(key in item for items in lists for item in items)), None)


def _resize_workers(job: Job, settings: JobSettings) -> None:
    if settings.workers is None and settings.gpus_per_worker is None:
        return
    groups = (job["spec"].get("rayClusterSpec") or {}).get("workerGroupSpecs") or []
    if len(groups) != 1:
        raise LaunchError(f"sizing the workers: the template has {len(groups)} worker groups, this needs exactly one")
    if any(count is not None and count < 1 for count in (settings.workers, settings.gpus_per_worker)):
        raise LaunchError("sizing the workers: --workers and --gpus-per-worker must be at least 1")
    group = groups[0]
    if settings.workers is not None:
        group |= dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), settings.workers)
    if settings.gpus_per_worker is not None:
        _resize_pod(group["template"]["spec"], settings.gpus_per_worker)


def _resize_pod(pod: Job, gpus: int) -> None:
    """Set the GPUs of a worker pod; cpu, memory and the size of in-memory volumes follow in proportion, rounded up."""
    resources = pod["containers"][0].get("resources") or {}
    try:
        before = int(resources["limits"][GPU])
    except (KeyError, ValueError):
        raise LaunchError(f"sizing the workers: the template's worker has no limit for {GPU}; add one") from None
    for amounts in (resources["limits"], resources.get("requests") or {}):
        for kind in ("cpu", "memory"):
            if kind in amounts:
                amounts[kind] = _scale(amounts[kind], gpus, before)
        if GPU in amounts:
            amounts[GPU] = str(gpus)
    for volume in pod.get("volumes") or []:
        shared = volume.get("emptyDir") or {}
        if shared.get("medium") == "Memory" and "sizeLimit" in shared:
            shared["sizeLimit"] = _scale(shared["sizeLimit"], gpus, before)


def _scale(quantity: Any, numerator: int, denominator: int) -> str:
    match = re.fullmatch(r"(\d+)([A-Za-z]*)", str(quantity))
    if match is None:
        raise LaunchError(f"sizing the workers: {quantity!r} is not a whole amount such as 80 or 640Gi")
    return f"{-(-int(match[1]) * numerator // denominator)}{match[2]}"
