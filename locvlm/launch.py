"""Run one locvlm command on the cluster: fill k8s/ray-job.yaml, create the RayJob, follow it, judge it by its status.

The only module that talks to Kubernetes. A job has a name that follows from its run and step, so a retried step finds
the job of the first try (409) and follows that one instead of training twice.
"""

import contextlib
import json
import logging
import re
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import yaml

from locvlm.errors import JobFailed, LaunchError

logger = logging.getLogger(__name__)

API = {"group": "ray.io", "version": "v1", "plural": "rayjobs"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU = "nvidia.com/gpu"
MAX_NAME = 47  # KubeRay appends a suffix and DNS labels end at 63
MAX_QUEUED_WORKER_GROUPS = 17  # Kueue: a workload's pod sets, less head and submitter
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
STARTED = ("Running", "Succeeded", "Failed")  # phases of a pod that has a log
FINAL_STATES = ("Complete", "Failed", "ValidationFailed")
LAST_LINES = 30
LONGEST_MESSAGE = 2000  # Ray puts up to 20,000 characters of log into status.message
QUICK = (5, 30)  # seconds to connect, seconds between bytes
STREAM = (5, 300)  # a half-dead log connection is given up after five silent minutes and opened again
LOG_OVERLAP_SECONDS = 300  # asked for again after a break; repeated lines are recognised by their time stamps
FIRST_CONTACT_SECONDS = 30.0
ADVICE = {
    "DeadlineExceeded": "it ran longer than activeDeadlineSeconds: raise --deadline-minutes, the run resumes",
    "PreRunningDeadlineExceeded": "its pods did not start in time: look for free GPUs with `kubectl describe pod`",
    "ValidationFailed": "the operator refused it: mend the template",
    "SubmissionFailed": "the submitter could not hand it to Ray: look at `kubectl logs job/<name>`",
}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")

Job = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What a launch changes in the template; None keeps the template's value.

    `queue` is a Kueue LocalQueue ("": not queued). `workers` counts worker pods and `gpus_per_worker` the GPUs of each;
    a pod's cpu, memory and shared memory follow its GPUs in proportion. `entrypoint_gpus` are GPUs of the command's own
    process: 0 for `train`, whose Ray workers hold them, 1 for a verb that runs a model itself. `environment` is set in
    the Ray pods and must not hold a secret.
    """

    namespace: str | None = None
    queue: str | None = None
    workers: int | None = None
    gpus_per_worker: int | None = None
    entrypoint_gpus: int | None = None
    deadline_minutes: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A job that succeeded. `reattached`: an earlier launch had created it. Times as the server wrote them."""

    name: str
    namespace: str
    uid: str
    image: str
    entrypoint: str
    ray_job_id: str
    ray_cluster: str
    reattached: bool
    started: str
    ended: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, for a receipt."""
        return asdict(self)


def default_template() -> Path:
    """The template `k8s/ray-job.yaml`: of the checkout around this module, else of the image (`<prefix>/share/locvlm`).

    Raises LaunchError when there is neither.
    """
    places = (Path(__file__).parents[1] / "k8s", Path(sys.prefix) / "share" / "locvlm")
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
    template_text: str, name: str, image: str, entrypoint: Sequence[str], settings: JobSettings | None = None
) -> Job:
    """Fill the RayJob template: name, image of every Ray pod, command (quoted for the shell), settings.

    Raises LaunchError when the template is not a RayJob or a setting has no place in it.
    """
    settings = settings or JobSettings()
    if not entrypoint:
        raise LaunchError(f"rendering the job {name}: the command is empty; give a locvlm verb after --")
    job = _read_template(template_text)
    metadata, spec = job["metadata"], job["spec"]
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
    if settings.deadline_minutes is not None:
        spec["activeDeadlineSeconds"] = 60 * settings.deadline_minutes
    if settings.entrypoint_gpus is not None:
        spec["entrypointNumGpus"] = settings.entrypoint_gpus
    for container in (*_ray_containers(job), *_containers(spec.get("submitterPodTemplate"))):
        container["image"] = image
    for container in _ray_containers(job):
        env = [entry for entry in container.get("env", []) if entry["name"] not in settings.environment]
        container["env"] = env + [{"name": key, "value": value} for key, value in sorted(settings.environment.items())]
    _resize_workers(job, settings)
    return job


def validate_ray_job(job: Job) -> None:
    """Check what the CRD's schema cannot say: the rules of the KubeRay 1.7 operator and, for a queued job, of Kueue.

    Raises LaunchError that lists every fault. Such a job would be created and then sit there as ValidationFailed.
    """
    faults = [*_metadata_faults(job), *_lifetime_faults(job), *_mode_faults(job), *_cluster_faults(job)]
    if QUEUE_LABEL in job.get("metadata", {}).get("labels", {}):
        faults += _queue_faults(job)
    if faults:
        name = job.get("metadata", {}).get("name", "?")
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise LaunchError(f"checking the RayJob {name}: {len(faults)} fault(s)\n{lines}")


def connect() -> Any:
    """A Kubernetes API client: of the pod's service account inside a cluster, else of the current kubeconfig context.

    Raises LaunchError when there is neither.
    """
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        try:
            config.load_kube_config(client_configuration=configuration)
        except (config.ConfigException, OSError, yaml.YAMLError) as fault:
            raise LaunchError(
                f"connecting to the cluster: neither a pod's service account nor a usable kubeconfig ({fault}); "
                "set KUBECONFIG, or run inside the cluster"
            ) from None
    return client.ApiClient(configuration)


def launch(
    job: Job,
    api: Any,
    *,
    poll_seconds: float = 10.0,
    deadline_seconds: float | None = None,
    patience_seconds: float = 600.0,
    write: Callable[[str], None] | None = None,
) -> FinishedJob:
    """Create `job` or attach to the one that a first try left, pass its log to `write`, return when it succeeded.

    `api` is an ApiClient (`connect`). `deadline_seconds` bounds the whole wait, the time in the queue included; None
    takes the job's activeDeadlineSeconds. A server that cannot be reached is tried again for `patience_seconds`.
    On the deadline, on Ctrl-C and on SIGTERM the job is deleted. Success is what `status` says; the log is only shown.
    Raises JobFailed with the job's last words, LaunchError when it could not be submitted or contact was lost.
    """
    validate_ray_job(job)
    if deadline_seconds is None:
        deadline_seconds = job["spec"].get("activeDeadlineSeconds")
    jobs = _RayJobs(api, job["metadata"].get("namespace", "default"))
    name = job["metadata"]["name"]
    log = _LogFollower(jobs, name, write or _print_line, poll_seconds)
    with _sigterm_interrupts():
        try:
            first = min(patience_seconds, FIRST_CONTACT_SECONDS)
            reattached = _create_or_attach(jobs, job, poll_seconds, deadline_seconds, first)
            log.start()
            ended = _wait(jobs, job, poll_seconds, deadline_seconds, patience_seconds)
        except KeyboardInterrupt:
            _cancel(jobs, job)
            raise
        finally:
            log.finish()
    status = ended["status"]
    if not _succeeded(status):
        raise JobFailed(_last_words(jobs, name, status, log.last_lines))
    return FinishedJob(
        name=name,
        namespace=jobs.namespace,
        uid=ended["metadata"].get("uid", ""),
        image=_image(job),
        entrypoint=job["spec"]["entrypoint"],
        ray_job_id=status.get("jobId", ""),
        ray_cluster=status.get("rayClusterName", ""),
        reattached=reattached,
        started=status.get("startTime", ""),
        ended=status.get("endTime", ""),
    )


# --- the template


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


def _containers(pod: Any) -> list[Job]:
    containers: list[Job] = ((pod or {}).get("spec") or {}).get("containers") or []
    return containers


def _ray_containers(job: Job) -> list[Job]:
    cluster = job["spec"].get("rayClusterSpec") or {}
    groups = [cluster.get("headGroupSpec") or {}, *(cluster.get("workerGroupSpecs") or [])]
    # KubeRay takes the first container of a pod as Ray's
    return [container for group in groups for container in _containers(group.get("template"))[:1]]


def _image(job: Job) -> str:
    images = [str(container.get("image", "")) for container in _ray_containers(job)]
    return images[0] if images else ""


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


# --- the operator's rules (KubeRay 1.7, ray-operator/controllers/ray/utils/validation.go)


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
    if not _containers(group.get("template")):
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


# --- the server


class _ApiError(Exception):
    """An answer of the API server that is not success; status 0: no answer at all."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status

    @property
    def passes(self) -> bool:
        """It is worth asking again."""
        return self.status in (0, 408, 429) or self.status >= 500

    def __str__(self) -> str:
        answer = f"the server answered {self.status}" if self.status else "the server cannot be reached"
        return f"{answer}: {self.args[0]}"


@contextlib.contextmanager
def _faults_translated() -> Iterator[None]:
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as fault:
        raise _ApiError(fault.status or 0, _server_words(fault)) from None
    except HTTPError as fault:
        raise _ApiError(0, str(fault)) from None


def _server_words(fault: Any) -> str:
    """The message of a Kubernetes Status object, or whatever the server said."""
    body = fault.body.decode(errors="replace") if isinstance(fault.body, bytes) else str(fault.body or "")
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.strip()[:LONGEST_MESSAGE] or str(fault.reason)


class _RayJobs:
    """The few calls on one namespace that a launch needs. All raise _ApiError."""

    def __init__(self, api: Any, namespace: str) -> None:
        from kubernetes import client

        self.namespace = namespace
        self._objects = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)

    def create(self, job: Job) -> None:
        """Strict: without it the server drops a misspelt field without a word."""
        with _faults_translated():
            self._objects.create_namespaced_custom_object(
                **API, namespace=self.namespace, body=job, field_validation="Strict", _request_timeout=QUICK
            )

    def get(self, name: str) -> Job | None:
        """The job, or None when there is none of this name."""
        try:
            with _faults_translated():
                found = self._objects.get_namespaced_custom_object(
                    **API, namespace=self.namespace, name=name, _request_timeout=QUICK
                )
        except _ApiError as fault:
            if fault.status == 404:
                return None
            raise
        if not isinstance(found, dict):
            raise _ApiError(0, f"this is not a JSON object: {str(found)[:200]}")
        return found

    def delete(self, name: str) -> None:
        """Delete the job; its pods go first, so that the name is free only when the GPUs are. Gone already is fine."""
        try:
            with _faults_translated():
                self._objects.delete_namespaced_custom_object(
                    **API, namespace=self.namespace, name=name, propagation_policy="Foreground", _request_timeout=QUICK
                )
        except _ApiError as fault:
            if fault.status != 404:
                raise

    def submitter_pod(self, name: str) -> tuple[str, str] | None:
        """Pod and container of the newest submitter that has started; the Kubernetes Job has the RayJob's name."""
        with _faults_translated():
            answer = self._core.list_namespaced_pod(
                self.namespace, label_selector=f"job-name={name}", _preload_content=False, _request_timeout=QUICK
            )
            text = answer.data
        try:
            started = [pod for pod in json.loads(text)["items"] if pod["status"]["phase"] in STARTED]
            if not started:
                return None
            newest = max(started, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))
            return newest["metadata"]["name"], newest["spec"]["containers"][0]["name"]
        except (ValueError, KeyError, TypeError, IndexError) as fault:
            raise _ApiError(0, f"this is not a list of pods ({fault!r})") from None

    def open_log(self, pod: tuple[str, str], *, follow: bool, since_seconds: int | None) -> Any:
        """The byte stream of a pod's log, every line behind its time stamp."""
        limit = {} if since_seconds is None else {"since_seconds": since_seconds}
        with _faults_translated():
            return self._core.read_namespaced_pod_log(
                pod[0],
                self.namespace,
                container=pod[1],
                follow=follow,
                timestamps=True,
                _preload_content=False,
                _request_timeout=STREAM if follow else QUICK,
                **limit,
            )


# --- one job's life


def _same_work(existing: Job, job: Job) -> bool:
    """The two do the same: Kueue and the operator change other parts of a job's spec, but never these."""
    return existing["spec"].get("entrypoint") == job["spec"].get("entrypoint") and _image(existing) == _image(job)


def _create_or_attach(
    jobs: _RayJobs, job: Job, poll_seconds: float, deadline_seconds: float | None, patience_seconds: float
) -> bool:
    """Whether the job was there already. One that failed is replaced once: a retried step is a new try."""
    name = job["metadata"]["name"]
    doing = f"creating the RayJob {name} in namespace {jobs.namespace}"
    started, replaced = time.monotonic(), False
    while not _patiently(lambda: _create(jobs, job), doing, poll_seconds, patience_seconds):
        existing = _patiently(lambda: jobs.get(name), doing, poll_seconds, patience_seconds)
        if existing is not None and "deletionTimestamp" not in existing["metadata"]:
            if not _same_work(existing, job):
                raise LaunchError(
                    f"{doing}: there is a job of this name with another command or image "
                    f"({existing['spec'].get('entrypoint')!r}, {_image(existing)!r}); "
                    f"take another name, or delete it with `kubectl -n {jobs.namespace} delete rayjob {name}`"
                )
            if replaced or not _failed(existing):
                logger.info("job %s: is there already (%s), following it", name, _state(existing))
                return True
            logger.info("job %s: an earlier try failed (%s), starting it again", name, _state(existing))
            _patiently(lambda: jobs.delete(name), doing, poll_seconds, patience_seconds)
            replaced = True
        if deadline_seconds is not None and time.monotonic() - started > deadline_seconds:
            raise LaunchError(f"{doing}: an earlier job of this name is still being deleted; try again later")
        time.sleep(poll_seconds)
    logger.info("job %s: created in namespace %s", name, jobs.namespace)
    return False


def _failed(job: Job) -> bool:
    status = job.get("status") or {}
    return status.get("jobDeploymentStatus") in FINAL_STATES and not _succeeded(status)


def _succeeded(status: Job) -> bool:
    return (status.get("jobDeploymentStatus"), status.get("jobStatus")) == ("Complete", "SUCCEEDED")


def _create(jobs: _RayJobs, job: Job) -> bool:
    """False when a job of this name is there already."""
    try:
        jobs.create(job)
    except _ApiError as fault:
        if fault.status == 409:
            return False
        raise
    return True


def _patiently(call: Callable[[], T], doing: str, poll_seconds: float, patience_seconds: float, after: str = "") -> T:
    """`call`, again and again while the server cannot be reached. Raises LaunchError with the server's words."""
    until = time.monotonic() + patience_seconds
    while True:
        try:
            return call()
        except _ApiError as fault:
            if not fault.passes or time.monotonic() >= until:
                raise LaunchError(f"{doing}: {fault}{_hint(fault.status)}{after}") from None
            logger.warning("%s: %s; trying again", doing, fault)
        time.sleep(poll_seconds)


def _hint(status: int) -> str:
    hints = {
        400: "; mend the template",
        401: "; log in to the cluster again",
        403: "; the service account needs the role of k8s/rbac.yaml in this namespace",
        404: "; this needs the namespace, and the KubeRay operator in the cluster",
        422: "; mend the template",
    }
    return hints.get(status, "")


def _wait(
    jobs: _RayJobs, job: Job, poll_seconds: float, deadline_seconds: float | None, patience_seconds: float
) -> Job:
    """The job in its final state. Raises JobFailed when it vanished or was deleted on the deadline."""
    name = job["metadata"]["name"]
    doing = f"following the RayJob {name} in namespace {jobs.namespace}"
    again = "; the job was left as it is, the same command follows it again"
    started, state = time.monotonic(), ""
    while True:
        found = _patiently(lambda: jobs.get(name), doing, poll_seconds, patience_seconds, again)
        if found is None:
            raise JobFailed(f"{doing}: it was deleted before it had finished; launch it again to start over")
        if _state(found) != state:
            state = _state(found)
            logger.info("job %s: %s", name, state)
        if (found.get("status") or {}).get("jobDeploymentStatus") in FINAL_STATES:
            return found
        left = float("inf") if deadline_seconds is None else started + deadline_seconds - time.monotonic()
        if left <= 0:
            _patiently(lambda: jobs.delete(name), f"deleting the RayJob {name}", poll_seconds, FIRST_CONTACT_SECONDS)
            raise JobFailed(
                f"{doing}: it had not finished {deadline_seconds:g} s after the launch ({state}) and was deleted; "
                "raise --deadline-minutes (the wait in the queue counts) or ask for fewer GPUs"
            )
        time.sleep(min(poll_seconds, left))


def _state(job: Job) -> str:
    status = job.get("status") or {}
    deployment, ray = status.get("jobDeploymentStatus") or "New", status.get("jobStatus")
    queue = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    if queue and deployment in ("New", "Suspended") and job["spec"].get("suspend"):
        return f"waiting in the queue {queue}"
    return f"{deployment}, {ray}" if ray else str(deployment)


def _last_words(jobs: _RayJobs, name: str, status: Job, last_lines: Sequence[str]) -> str:
    reason, message = status.get("reason") or "no reason given", (status.get("message") or "").strip()
    if len(message) > LONGEST_MESSAGE:
        message = "..." + message[-LONGEST_MESSAGE:]
    advice = ADVICE.get(reason, "read its log above: `kubectl -n <namespace> logs job/<name>`")
    advice = advice.replace("<name>", name).replace("<namespace>", jobs.namespace)
    text = (
        f"the RayJob {name} in namespace {jobs.namespace} did not succeed: "
        f"{status.get('jobDeploymentStatus')}, job {status.get('jobStatus') or 'never ran'}, {reason}"
    )
    text += f": {message}" if message else ""
    if last_lines:
        text += "\nthe last lines of its log:\n" + "\n".join(f"  {line}" for line in last_lines)
    return f"{text}\nwhat to do: {advice}"


def _cancel(jobs: _RayJobs, job: Job) -> None:
    """Delete the job of an interrupted launch; one of the same name that does other work is not ours."""
    name = job["metadata"]["name"]
    try:
        existing = jobs.get(name)
        if existing is not None and _same_work(existing, job):
            jobs.delete(name)
            logger.warning("job %s: interrupted, so it was deleted", name)
    except _ApiError as fault:
        command = f"kubectl -n {jobs.namespace} delete rayjob {name}"
        logger.error("job %s: interrupted, but it could not be deleted (%s); run `%s`", name, fault, command)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM, by which Kubernetes and KFP stop a step, like Ctrl-C. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _print_line(line: str) -> None:
    print(line, flush=True)


@dataclass(slots=True)
class _Position:
    """How far one pod's log has been written: the last time stamp and the number of lines that carry it."""

    at: tuple[datetime, str] | None = None
    n_at: int = 0
    n_unstamped: int = 0
    read_at: float = 0.0


class _LogFollower:
    """Writes the submitter's log, each line once, in a thread of its own; a broken stream is opened again.

    The log is shown for people. No fault here ends a launch.
    """

    def __init__(self, jobs: _RayJobs, name: str, write: Callable[[str], None], poll_seconds: float) -> None:
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._jobs, self._name, self._write, self._poll_seconds = jobs, name, write, poll_seconds
        self._positions: dict[tuple[str, str], _Position] = {}
        self._pod: tuple[str, str] | None = None
        self._stream: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"log of {name}", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def finish(self) -> None:
        """Stop following and write what is left; does nothing when it never started."""
        if self._thread.ident is None:
            return
        self._stop.set()
        stream = self._stream
        if stream is not None:
            # the reader may close the stream at this very moment, then there is nothing to shut
            with contextlib.suppress(ValueError, RuntimeError, OSError):
                stream.shutdown()
        self._thread.join(timeout=sum(QUICK))
        if not self._thread.is_alive():
            self._attempt(follow=False)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._attempt(follow=True)
            self._stop.wait(self._poll_seconds)

    def _attempt(self, *, follow: bool) -> None:
        try:
            pod = self._jobs.submitter_pod(self._name)
            if self._pod not in (None, pod):  # a new submitter: first the rest of the old one
                self._read(self._pod, follow=False)
            self._pod = pod
            self._read(pod, follow=follow)
        except _ApiError as fault:
            if not self._stop.is_set():
                logger.info("job %s: its log cannot be read now (%s)", self._name, fault)

    def _read(self, pod: tuple[str, str] | None, *, follow: bool) -> None:
        if pod is None:
            return
        position = self._positions.setdefault(pod, _Position())
        since = int(time.monotonic() - position.read_at) + LOG_OVERLAP_SECONDS if position.at else None
        stream = self._jobs.open_log(pod, follow=follow, since_seconds=since)
        self._stream = stream
        known = _Position(position.at, position.n_at, position.n_unstamped)
        rest = b""
        try:
            if follow and self._stop.is_set():
                return
            with _faults_translated():
                for chunk in stream.stream():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        self._line(line, position, known)
            if not follow and rest:  # while following, half a line is a broken stream and comes again
                self._line(rest, position, known)
        finally:
            self._stream = None
            stream.close()

    def _line(self, raw: bytes, position: _Position, known: _Position) -> None:
        """Write one line unless `known`, what had been written before this stream was opened, has it."""
        line = raw.decode(errors="replace")
        stamp, _, text = line.partition(" ")
        try:
            at = (datetime.fromisoformat(stamp), stamp)
        except ValueError:  # something on the way took the stamps off, then such a stream begins at the beginning
            known.n_unstamped -= 1
            if known.n_unstamped < 0:
                position.n_unstamped += 1
                self._show(line)
            return
        if known.at is not None and at < known.at:
            return
        if at == known.at and known.n_at > 0:
            known.n_at -= 1
            return
        position.n_at = position.n_at + 1 if at == position.at else 1
        position.at, position.read_at = at, time.monotonic()
        self._show(text)

    def _show(self, text: str) -> None:
        self.last_lines.append(text)
        with contextlib.suppress(BrokenPipeError):  # nobody reads any more (`| head`); the job goes on
            self._write(text)
