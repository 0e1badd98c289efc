"""A RayJob as the plain value that the API server takes: the parts that filling, checking and following all look at."""

from typing import Any

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
LINEAGE_LABEL = "locvlm/lineage"

Job = dict[str, Any]


def containers(pod: Any) -> list[Job]:
    """The containers of a pod template; none where the template is missing."""
    found: list[Job] = ((pod or {}).get("spec") or {}).get("containers") or []
    return found


def ray_containers(job: Job) -> list[Job]:
    """The container of the head and of each worker group that runs Ray."""
    # KubeRay takes the first container of a pod as Ray's
    return [container for group in _groups(job) for container in containers(group.get("template"))[:1]]


def pod_templates(job: Job) -> list[Job]:
    """The pods that a job makes: submitter, head, workers; those that the job says nothing of are left out."""
    every = [job["spec"].get("submitterPodTemplate"), *(group.get("template") for group in _groups(job))]
    return [template for template in every if template]


def _groups(job: Job) -> list[Job]:
    cluster = job["spec"].get("rayClusterSpec") or {}
    return [cluster.get("headGroupSpec") or {}, *(cluster.get("workerGroupSpecs") or [])]


def image_of(job: Job) -> str:
    """The image of the head."""
    images = [str(container.get("image", "")) for container in ray_containers(job)]
    return images[0] if images else ""
