"""What the operator or Kueue would hold against a RayJob, told before it is sent."""

import copy
import re

import pytest

from locvlm.errors import LaunchError
from locvlm.launch import validate_ray_job
from tests.api_server import CLUSTER, SPEC, WORKERS, Job, put, rendered


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metadata.name": "x" * 48}, "48 characters, at most 47"),
        ({"metadata.name": "Train_1"}, "must be lower-case"),
        ({"metadata.name": "1train"}, "begin with a letter"),
        ({f"{SPEC}.shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished needs"),
        ({f"{SPEC}.ttlSecondsAfterFinished": -1}, "must not be negative"),
        ({f"{SPEC}.deletionStrategy": {"deletionRules": [{}]}}, "deletionRules exclude"),
        (
            {
                f"{SPEC}.suspend": True,
                f"{SPEC}.shutdownAfterJobFinishes": None,
                f"{SPEC}.ttlSecondsAfterFinished": None,
            },
            "suspend needs shutdownAfterJobFinishes",
        ),
        ({f"{SPEC}.activeDeadlineSeconds": 0}, "activeDeadlineSeconds is 0"),
        ({f"{SPEC}.backoffLimit": -1}, "backoffLimit is -1"),
        ({f"{SPEC}.submissionMode": "K8sJob"}, "submissionMode is 'K8sJob'"),
        ({f"{SPEC}.entrypoint": ""}, "entrypoint is empty"),
        ({CLUSTER: None}, "exactly one of rayClusterSpec and clusterSelector"),
        ({f"{SPEC}.clusterSelector": {"ray.io/cluster": "a"}}, "exactly one of rayClusterSpec and clusterSelector"),
        ({f"{SPEC}.clusterSelector": {"ray.io/cluster": "a"}, CLUSTER: None}, "backoffLimit does not go"),
        ({f"{SPEC}.submissionMode": "InteractiveMode"}, "backoffLimit does not go"),
        ({f"{SPEC}.submissionMode": "SidecarMode"}, "SidecarMode forbids submitterPodTemplate"),
        (
            {f"{SPEC}.submissionMode": "SidecarMode", f"{CLUSTER}.headGroupSpec.template.spec.restartPolicy": "Always"},
            "SidecarMode needs restartPolicy Never in the head",
        ),
        ({f"{SPEC}.runtimeEnvYAML": "a: ["}, "runtimeEnvYAML"),
        ({f"{WORKERS}.minReplicas": 2}, "minReplicas 2 is above maxReplicas 1"),
        ({f"{WORKERS}.template.spec.containers": []}, "gpu has no container"),
        ({f"{CLUSTER}.headGroupSpec.template.spec.containers": []}, "the head has no container"),
        ({f"{CLUSTER}.headGroupSpec.resources": {"CPU": "1"}}, "use one"),
        ({f"{WORKERS}.rayStartParams.labels": "a=b"}, "rayStartParams.labels"),
        ({f"{CLUSTER}.rayVersion": None}, "needs rayVersion 2.52"),
        ({f"{CLUSTER}.rayVersion": "2.9.3"}, "needs rayVersion 2.52"),
        ({f"{CLUSTER}.authOptions.enableK8sTokenAuth": True}, "does not work for a RayJob"),
        ({f"{CLUSTER}.enableInTreeAutoscaling": True}, "cannot autoscale"),
        (
            {
                f"{CLUSTER}.enableInTreeAutoscaling": True,
                f"{CLUSTER}.autoscalerOptions.version": "v2",
                f"{WORKERS}.template.spec.restartPolicy": "Always",
            },
            "autoscaler v2 needs restartPolicy Never in gpu",
        ),
    ],
)
def test_what_the_operator_or_kueue_would_refuse_is_told_before_submission(changes: Job, words: str) -> None:
    job = rendered()
    for place, value in changes.items():
        put(job, place, value)
    with pytest.raises(LaunchError, match=re.escape(words)):
        validate_ray_job(job)


def test_a_queued_job_has_at_most_seventeen_worker_groups_and_all_faults_come_together() -> None:
    job = rendered()
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"] = [copy.deepcopy(group) for _ in range(18)]
    job["metadata"]["name"] = "Bad"
    with pytest.raises(LaunchError) as caught:
        validate_ray_job(job)
    assert "2 fault(s)" in str(caught.value)
    assert "17 worker groups" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {f"{SPEC}.ttlSecondsAfterFinished": "900"},
        {"spec": []},
        {"metadata.labels": 5},
        {f"{CLUSTER}.workerGroupSpecs": {"gpu": 1}},
        {f"{CLUSTER}.headGroupSpec": "head"},
    ],
)
def test_a_value_of_the_wrong_kind_is_told_without_a_traceback(changes: Job) -> None:
    job = rendered()
    for place, value in changes.items():
        put(job, place, value)
    with pytest.raises(LaunchError, match=r"checking the RayJob try-1"):
        validate_ray_job(job)
