"""The API server: how it is reached, the few calls that a launch makes, its refusals in its own words."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import yaml

from locvlm.errors import LaunchError
from locvlm.launch.job import Job

logger = logging.getLogger(__name__)

API = {"group": "ray.io", "version": "v1", "plural": "rayjobs"}
SITE = "locvlm-ray-job"  # the ConfigMap with what this cluster's jobs need beside the template
SITE_KEY = "ray-job.yaml"
STARTED = ("Running", "Succeeded", "Failed")  # phases of a pod that has a log
LONGEST_WORDS = 2000
QUICK = (5, 30)  # seconds to connect, seconds between bytes
STREAM = (5, 300)  # a half-dead log connection is given up after five silent minutes and opened again
FIRST_CONTACT_SECONDS = 30.0

T = TypeVar("T")


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


def site_part(api: Any, namespace: str, poll_seconds: float) -> str:
    """What this cluster adds to the job template (`render_ray_job(site_text=...)`), from the ConfigMap that its overlay
    makes; "" when there is none.

    Raises LaunchError when it cannot be read.
    """
    doing = f"reading the ConfigMap {SITE} in namespace {namespace}"
    return patiently(RayJobs(api, namespace).site_part, doing, poll_seconds, FIRST_CONTACT_SECONDS)


class ApiError(Exception):
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
def faults_translated() -> Iterator[None]:
    """Whatever the client raises becomes an ApiError."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as fault:
        raise ApiError(fault.status or 0, _server_words(fault)) from None
    except HTTPError as fault:
        raise ApiError(0, str(fault)) from None


def _server_words(fault: Any) -> str:
    """The message of a Kubernetes Status object, or whatever the server said."""
    body = fault.body.decode(errors="replace") if isinstance(fault.body, bytes) else str(fault.body or "")
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.strip()[:LONGEST_WORDS] or str(fault.reason)


class RayJobs:
    """The few calls on one namespace that a launch needs. All raise ApiError."""

    def __init__(self, api: Any, namespace: str) -> None:
        from kubernetes import client

        self.namespace = namespace
        self._objects = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)

    def create(self, job: Job) -> None:
        """Strict: without it the server drops a misspelt field without a word."""
        with faults_translated():
            self._objects.create_namespaced_custom_object(
                **API, namespace=self.namespace, body=job, field_validation="Strict", _request_timeout=QUICK
            )

    def get(self, name: str) -> Job | None:
        """The job, or None when there is none of this name."""
        try:
            with faults_translated():
                found = self._objects.get_namespaced_custom_object(
                    **API, namespace=self.namespace, name=name, _request_timeout=QUICK
                )
        except ApiError as fault:
            if fault.status == 404:
                return None
            raise
        if not isinstance(found, dict):
            raise ApiError(0, f"this is not a JSON object: {str(found)[:200]}")
        return found

    def delete(self, name: str) -> None:
        """Delete the job; its pods go first, so that the name is free only when the GPUs are. Gone already is fine."""
        try:
            with faults_translated():
                self._objects.delete_namespaced_custom_object(
                    **API, namespace=self.namespace, name=name, propagation_policy="Foreground", _request_timeout=QUICK
                )
        except ApiError as fault:
            if fault.status != 404:
                raise

    def site_part(self) -> str:
        """The ConfigMap that says what jobs of this cluster need beside the template; "" when there is none."""
        try:
            with faults_translated():
                answer = self._core.read_namespaced_config_map(
                    SITE, self.namespace, _preload_content=False, _request_timeout=QUICK
                )
                text = answer.data
        except ApiError as fault:
            if fault.status == 404:
                return ""
            raise
        try:
            return str(json.loads(text)["data"][SITE_KEY])
        except (ValueError, KeyError, TypeError) as fault:
            raise LaunchError(
                f"reading the ConfigMap {SITE} in namespace {self.namespace}: it has no {SITE_KEY} ({fault!r}); "
                "apply the overlay of this cluster again"
            ) from None

    def submitter_pod(self, name: str) -> tuple[str, str] | None:
        """Pod and container of the newest submitter that has started; the Kubernetes Job has the RayJob's name."""
        with faults_translated():
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
            raise ApiError(0, f"this is not a list of pods ({fault!r})") from None

    def open_log(self, pod: tuple[str, str], *, follow: bool, since_seconds: int | None) -> Any:
        """The byte stream of a pod's log, every line behind its time stamp."""
        limit = {} if since_seconds is None else {"since_seconds": since_seconds}
        with faults_translated():
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


def patiently(
    call: Callable[[], T],
    doing: str,
    poll_seconds: float,
    patience_seconds: float,
    *,
    after: str = "",
    was_allowed: bool = False,
) -> T:
    """`call`, again and again while the server cannot be reached. Raises LaunchError with the server's words.

    `was_allowed`: the same call went through before, so 401 and 403 are a server that has just started and does not
    know its roles yet, or a token that is being replaced.
    """
    until = time.monotonic() + patience_seconds
    while True:
        try:
            return call()
        except ApiError as fault:
            passes = fault.passes or (was_allowed and fault.status in (401, 403))
            if not passes or time.monotonic() >= until:
                raise LaunchError(f"{doing}: {fault}{_hint(fault.status)}{after}") from None
            logger.warning("%s: %s; trying again", doing, fault)
        time.sleep(poll_seconds)


def _hint(status: int) -> str:
    hints = {
        400: "; mend the template",
        401: "; log in to the cluster again",
        403: "; the service account needs the role of k8s/base/rbac.yaml in this namespace",
        404: "; this needs the namespace, and the KubeRay operator in the cluster",
        422: "; mend the template",
    }
    return hints.get(status, "")
