"""The cluster: rights, operators, queue and quota, nodes and their GPUs, secrets by name, the shared volume."""

from collections.abc import Callable, Iterator
from typing import Any

from locvlm.config import ExperimentConfig
from locvlm.doctor.check import Check
from locvlm.errors import LaunchError
from locvlm.launch import connect, render_ray_job, site_part
from locvlm.launch.client import ApiError
from locvlm.launch.look import NEEDED, Cluster, gpus_of, needs_of
from locvlm.launch.render import GPU, JobSettings

APPLY = "`kubectl apply -k` the overlay of this cluster (k8s/README.md)"
# API group, version, resource -> who brings it
KINDS = {
    ("ray.io", "v1", "rayjobs"): "install the KubeRay operator, 1.7",
    ("kueue.x-k8s.io", "v1beta2", "clusterqueues"): "install Kueue, 0.19, or launch with --queue ''",
}


def check_cluster(
    config: ExperimentConfig, template: str, settings: JobSettings, gpu_type: str = ""
) -> Iterator[Check]:
    """Everything about the cluster of the current kubeconfig context that a job of `config` needs.

    `template`: the RayJob to fill; `settings`: what the launch would change in it; `gpu_type`: part of the name that
    the GPUs must have.
    """
    try:
        api = connect()
        job = render_ray_job(template, "doctor", "locvlm", ["locvlm"], settings)
        namespace = str(job["metadata"].get("namespace", "default"))
        cluster = Cluster(api, namespace)
        version = cluster.version()
    except (LaunchError, ApiError) as fault:
        yield Check("cluster", "failed", str(fault), "set KUBECONFIG, log in, and see that the API server is up")
        return
    yield Check("cluster", "ok", f"Kubernetes {version}, namespace {namespace}")
    yield _rights(cluster)
    for (group, number, kind), mend in KINDS.items():
        yield _kind(cluster, group, number, kind, mend)
    try:
        job = render_ray_job(template, "doctor", "locvlm", ["locvlm"], settings, site_part(api, namespace, 0.5))
    except LaunchError as fault:
        yield Check("site", "warning", str(fault), APPLY)
    selector, queue, secrets, claims = needs_of(job)
    wanted = gpus_of(job)
    yield _workers_fit(config, wanted)
    if queue:
        yield _looked(f"queue {queue}", lambda: _queue(cluster, queue, wanted))
    if wanted:
        yield _looked("GPU nodes", lambda: _nodes(cluster, selector, wanted, gpu_type))
    for name in sorted(secrets):
        yield _looked(f"secret {name}", lambda name=name: _secret(cluster, name))  # type: ignore[misc]
    for name in sorted(claims):
        yield _looked(f"volume {name}", lambda name=name: _claim(cluster, name))  # type: ignore[misc]


def _looked(name: str, look: Callable[[], Check]) -> Check:
    """The outcome of a look; where one may not look it is a warning: a launch needs other rights than a doctor."""
    try:
        return look()
    except ApiError as fault:
        if fault.status in (401, 403):
            return Check(name, "warning", f"it may not be looked at: {fault}", "ask with an account that may")
        if fault.status == 404:
            return Check(name, "failed", str(fault), APPLY)
        return Check(name, "failed", str(fault), "ask again when the API server answers")
    except (KeyError, TypeError, ValueError) as fault:
        return Check(name, "failed", f"it is not of the form that was expected: {fault!r}", APPLY)


def _rights(cluster: Cluster) -> Check:
    name = "rights"
    try:
        missing = [f"{verb} {resource}" for group, resource, verb in NEEDED if not cluster.may(group, resource, verb)]
    except ApiError as fault:
        return Check(name, "warning", f"they cannot be asked for: {fault}", "ask with an account that may")
    if missing:
        mend = "bind this account to the role locvlm-launcher of k8s/base/rbac.yaml"
        return Check(name, "failed", f"not allowed here: {', '.join(missing)}", mend)
    return Check(name, "ok", f"all {len(NEEDED)} that a launch needs")


def _kind(cluster: Cluster, group: str, version: str, kind: str, mend: str) -> Check:
    name = f"kind {kind}.{group}"
    try:
        found = cluster.kinds(group, version)
    except ApiError as fault:
        if fault.status != 404:
            return Check(name, "warning", f"it cannot be asked for: {fault}", "ask again")
        found = set()
    if kind not in found:
        return Check(name, "failed", f"the API server does not know {group}/{version}", mend)
    return Check(name, "ok", f"{group}/{version}")


def _workers_fit(config: ExperimentConfig, wanted: int) -> Check:
    name = "job size"
    workers = config.cluster.num_workers
    if wanted and workers > wanted:
        mend = f"set cluster.num_workers={wanted}, or launch with more --workers or --gpus-per-worker"
        return Check(
            name, "failed", f"{config.name} trains with {workers} workers, the job asks for {wanted} GPUs", mend
        )
    return Check(name, "ok", f"{workers} workers, {wanted} GPUs" if wanted else f"{workers} workers on CPUs")


def _queue(cluster: Cluster, queue: str, wanted: int) -> Check:
    name = f"queue {queue}"
    found = cluster.queue(queue)
    status = found.get("status") or {}
    inactive = [one for one in status.get("conditions") or [] if one["type"] == "Active" and one["status"] != "True"]
    if inactive:
        told = inactive[0].get("message") or inactive[0].get("reason")
        return Check(name, "failed", f"it is not active: {told}", "make what it names, its flavors first")
    flavors = [flavor for group in found["spec"].get("resourceGroups") or [] for flavor in group["flavors"]]
    quotas = {flavor["name"]: _gpus(flavor["resources"], "nominalQuota") for flavor in flavors}
    used = {flavor["name"]: _gpus(flavor["resources"], "total") for flavor in status.get("flavorsUsage") or []}
    told = ", ".join(f"{key} {quotas[key]} ({used.get(key, 0)} in use)" for key in quotas if quotas[key])
    if not wanted:
        return Check(name, "ok", "active; the job asks for no GPU")
    most = max(quotas.values(), default=0)  # Kueue takes all workers of a job from one flavor
    if wanted > most:
        mend = "raise nominalQuota in k8s/base/queue.yaml, or ask for fewer with --workers and --gpus-per-worker"
        return Check(name, "failed", f"quota for GPUs: {told or 'none'}; the job asks for {wanted}", mend)
    if all(wanted > quota - used.get(key, 0) for key, quota in quotas.items()):
        return Check(name, "warning", f"quota for GPUs: {told}; the job asks for {wanted}", "it waits until others end")
    return Check(name, "ok", f"quota for GPUs: {told}; the job asks for {wanted}")


def _gpus(resources: Any, key: str) -> int:
    return sum(int(entry.get(key) or 0) for entry in resources if entry["name"] == GPU)


def _nodes(cluster: Cluster, selector: dict[str, str], wanted: int, gpu_type: str) -> Check:
    name = "GPU nodes"
    pool = cluster.pool(selector)
    labels = ", ".join(f"{key}={value}" for key, value in selector.items()) or "any"
    found = f"{pool.nodes} with {labels}: {pool.gpus} GPUs ({', '.join(pool.types) or 'type unknown'})"
    if not pool.nodes:
        mend = "label the pool, or it is one that grows from zero when the first job comes"
        return Check(name, "warning", f"no node with {labels}", mend)
    if gpu_type and not any(gpu_type.lower() in kind.lower() for kind in pool.types):
        return Check(name, "failed", found, f"a pool with {gpu_type}, or another --gpu-type")
    if not pool.gpus:
        return Check(name, "failed", found, "install the device plugin of NVIDIA: the nodes offer no nvidia.com/gpu")
    if pool.gpus < wanted:
        return Check(name, "warning", f"{found}; the job asks for {wanted}", "the pool has to grow")
    return Check(name, "ok", found)


def _secret(cluster: Cluster, name: str) -> Check:
    if cluster.has_secret(name):
        return Check(f"secret {name}", "ok", "it is there (its contents were not looked at)")
    mend = (
        f"`kubectl -n {cluster.namespace} create secret generic {name} --from-env-file=FILE`, unless pods have a role"
    )
    return Check(f"secret {name}", "warning", "there is none", mend)


def _claim(cluster: Cluster, name: str) -> Check:
    phase = cluster.claim_phase(name)
    if phase == "Bound":
        return Check(f"volume {name}", "ok", phase)
    if phase == "Pending":
        mend = "it binds when the first pod comes, or its storage class cannot make ReadWriteMany volumes"
        return Check(f"volume {name}", "warning", phase, mend)
    return Check(f"volume {name}", "failed", phase or "there is none", APPLY)
