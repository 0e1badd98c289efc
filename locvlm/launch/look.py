"""What a cluster has, looked at without changing it: rights, kinds, queues, nodes, secrets by name."""

import json
from dataclasses import dataclass
from typing import Any

from locvlm.launch.client import QUICK, SITE, ApiError, faults_translated
from locvlm.launch.job import QUEUE_LABEL, Job, pod_templates, ray_containers
from locvlm.launch.render import GPU

# what a launch does: group, resource, verb. k8s/base/rbac.yaml gives exactly this to the account of the steps.
NEEDED = (
    ("ray.io", "rayjobs", "create"),
    ("ray.io", "rayjobs", "get"),
    ("ray.io", "rayjobs", "delete"),
    ("", "pods", "list"),
    ("", "pods/log", "get"),
    ("", "configmaps", "get"),
)
TYPE_LABELS = ("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator", "node.kubernetes.io/instance-type")
# the names of the secrets alone travel, never what is in them
_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


@dataclass(frozen=True, slots=True)
class Pool:
    """Nodes that one kind of pod may go to: how many, their GPUs, and what the labels call them."""

    nodes: int
    gpus: int
    types: tuple[str, ...]


class Cluster:
    """The calls of a look at one namespace. All raise ApiError."""

    def __init__(self, api: Any, namespace: str) -> None:
        self.namespace = namespace
        self._api = api

    def version(self) -> str:
        """Of Kubernetes, such as v1.33.1."""
        return str(self._get("/version").get("gitVersion", "unknown"))

    def kinds(self, group: str, version: str) -> set[str]:
        """The resources that the API server knows of one API group."""
        return {str(entry["name"]) for entry in self._get(f"/apis/{group}/{version}").get("resources", [])}

    def may(self, group: str, resource: str, verb: str) -> bool:
        """Whether whoever asks may do that in the namespace."""
        name, _, part = resource.partition("/")
        attributes = {"namespace": self.namespace, "group": group, "resource": name, "verb": verb}
        if part:
            attributes["subresource"] = part
        if resource == "configmaps":
            attributes["name"] = SITE
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        answer = self._call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=body)
        return bool((answer.get("status") or {}).get("allowed"))

    def queue(self, name: str) -> Job:
        """The ClusterQueue behind a LocalQueue of the namespace."""
        base = "/apis/kueue.x-k8s.io/v1beta2"
        local = self._get(f"{base}/namespaces/{self.namespace}/localqueues/{name}")
        return self._get(f"{base}/clusterqueues/{local['spec']['clusterQueue']}")

    def pool(self, selector: dict[str, str]) -> Pool:
        """The nodes with these labels, and the GPUs that they offer."""
        wanted = ",".join(f"{key}={value}" for key, value in sorted(selector.items()))
        nodes = self._get("/api/v1/nodes", query=[("labelSelector", wanted)] if wanted else [])["items"]
        gpus = sum(int((node.get("status") or {}).get("allocatable", {}).get(GPU, 0)) for node in nodes)
        labels = [node["metadata"].get("labels") or {} for node in nodes]
        types = {one[key] for one in labels for key in TYPE_LABELS if key in one}
        return Pool(len(nodes), gpus, tuple(sorted(types)))

    def has_secret(self, name: str) -> bool:
        """Whether a secret of this name is there; its contents are not asked for."""
        return self._has(f"/api/v1/namespaces/{self.namespace}/secrets/{name}")

    def claim_phase(self, name: str) -> str:
        """Bound, Pending or Lost; "" where there is no such volume claim."""
        path = f"/api/v1/namespaces/{self.namespace}/persistentvolumeclaims/{name}"
        if not self._has(path):
            return ""
        return str((self._get(path).get("status") or {}).get("phase", "Pending"))

    def _has(self, path: str) -> bool:
        try:
            self._call("GET", path, accept=_METADATA)
        except ApiError as fault:
            if fault.status == 404:
                return False
            raise
        return True

    def _get(self, path: str, query: list[tuple[str, str]] | None = None) -> Job:
        return self._call("GET", path, query=query)

    def _call(
        self, method: str, path: str, *, query: Any = None, body: Any = None, accept: str = "application/json"
    ) -> Job:
        with faults_translated():
            answer = self._api.call_api(
                path,
                method,
                query_params=query or [],
                header_params={"Accept": accept, "Content-Type": "application/json"},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=QUICK,
                _return_http_data_only=True,
            )
            text = answer.data
        try:
            found = json.loads(text)
        except ValueError as fault:
            raise ApiError(0, f"this is not JSON: {fault}") from None
        if not isinstance(found, dict):
            raise ApiError(0, f"this is not a JSON object: {str(found)[:200]}")
        return found


def gpus_of(job: Job) -> int:
    """GPUs that all pods of a job ask for together."""
    groups = (job["spec"].get("rayClusterSpec") or {}).get("workerGroupSpecs") or []
    head, *workers = ray_containers(job)
    counts = [1, *(int(group.get("replicas", 1)) for group in groups)]
    return sum(
        count * int(((container.get("resources") or {}).get("requests") or {}).get(GPU, 0))
        for count, container in zip(counts, [head, *workers], strict=True)
    )


def needs_of(job: Job) -> tuple[dict[str, str], str, set[str], set[str]]:
    """The node labels of a job's workers, its queue ("" for none), and the secrets and volume claims its pods name."""
    groups = (job["spec"].get("rayClusterSpec") or {}).get("workerGroupSpecs") or [{}]
    selector = dict(((groups[0].get("template") or {}).get("spec") or {}).get("nodeSelector") or {})
    secrets, claims = set(), set()
    for template in pod_templates(job):
        pod = template.get("spec") or {}
        claims |= {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod.get("volumes") or []
            if "persistentVolumeClaim" in volume
        }
        for container in pod.get("containers") or []:
            secrets |= {one["secretRef"]["name"] for one in container.get("envFrom") or [] if "secretRef" in one}
    return selector, str((job["metadata"].get("labels") or {}).get(QUEUE_LABEL, "")), secrets, claims
