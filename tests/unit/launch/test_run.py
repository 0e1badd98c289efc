"""A job's life through the real Kubernetes client, against a small API server that checks what it is sent."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from locvlm.errors import JobFailed, LaunchError
from locvlm.launch import default_template, launch, site_part
from tests.api_server import (
    POLL,
    RUNNING,
    STARTING,
    SUCCEEDED,
    WORKERS,
    Cluster,
    Job,
    put,
    rendered,
    run,
    serving,
    when,
)


def test_a_job_is_created_strictly_followed_and_reported(cluster: Cluster) -> None:
    job = rendered()
    done, lines = run(cluster, job)
    (created,) = [query for method, _, query in cluster.requests if method == "POST"]
    assert created["fieldValidation"] == "Strict"
    assert cluster.jobs["try-1"]["spec"] == job["spec"]
    assert lines == ["hello", "step 1 loss 2.5", "done"]
    assert done.to_dict() == {
        "name": "try-1",
        "namespace": "locvlm",
        "uid": "0001",
        "image": "locvlm:test",
        "entrypoint": "locvlm train --stage instruct",
        "ray_job_id": "try-1-abcde",
        "ray_cluster": "try-1-fghij",
        "reattached": False,
        "started": "2026-01-01T00:00:00Z",
        "ended": "2026-01-01T01:00:00Z",
    }
    assert cluster.count("DELETE", "") == 0


def test_the_log_goes_to_stdout_by_default(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    launch(rendered(), cluster.api, poll_seconds=POLL)
    assert capsys.readouterr().out == "hello\nstep 1 loss 2.5\ndone\n"


def test_a_short_job_is_not_kept_waiting_by_the_pause_of_a_long_one(cluster: Cluster) -> None:
    cluster.script = [RUNNING, SUCCEEDED]
    began = time.monotonic()
    launch(rendered(), cluster.api, poll_seconds=60.0, write=lambda _: None)
    assert time.monotonic() - began < 30


def test_a_second_launch_of_the_same_job_follows_the_first_one(cluster: Cluster) -> None:
    cluster.put(rendered(), uid="0007")
    done, lines = run(cluster)
    assert done.reattached
    assert done.uid == "0007"
    assert lines == ["hello", "step 1 loss 2.5", "done"]
    assert cluster.count("POST", "rayjobs") == 1
    assert cluster.count("DELETE", "") == 0


def test_a_second_launch_of_a_job_that_succeeded_returns_at_once(cluster: Cluster) -> None:
    cluster.put(rendered(), SUCCEEDED)
    done, _ = run(cluster)
    assert done.reattached
    assert cluster.count("GET", "rayjobs/try-1") == 2


def test_a_second_launch_of_a_job_that_failed_starts_it_again(cluster: Cluster) -> None:
    cluster.put(rendered(), {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"})
    done, _ = run(cluster)
    assert not done.reattached
    assert [method for method, _, _ in cluster.requests if method != "GET"] == ["POST", "DELETE", "POST"]


def test_a_launch_waits_for_an_earlier_job_that_is_being_deleted(cluster: Cluster) -> None:
    cluster.put(rendered(), RUNNING, deletionTimestamp="2026-01-01T00:00:00Z")
    when(lambda: cluster.count("POST", "rayjobs") > 2, cluster.jobs.clear)
    done, _ = run(cluster)
    assert not done.reattached
    assert cluster.count("DELETE", "") == 0


def test_an_earlier_job_that_never_goes_away_ends_the_launch_on_the_deadline(cluster: Cluster) -> None:
    cluster.put(rendered(), RUNNING, deletionTimestamp="2026-01-01T00:00:00Z")
    with pytest.raises(LaunchError, match="still being deleted"):
        run(cluster, deadline_seconds=3 * POLL)


@pytest.mark.parametrize("other", [{"command": ["locvlm", "train", "--stage", "align"]}, {"image": "locvlm:other"}])
def test_a_job_of_this_name_that_does_other_work_is_neither_followed_nor_touched(cluster: Cluster, other: Job) -> None:
    cluster.put(rendered(**other))
    with pytest.raises(LaunchError, match="another command or image"):
        run(cluster)
    assert cluster.count("DELETE", "") == 0


# --- a job that is refused


def test_a_misspelt_field_deep_in_a_pod_is_told_in_the_servers_words(cluster: Cluster) -> None:
    job = rendered()
    put(job, f"{WORKERS}.template.spec.nodeSelctor", {"a": "b"})
    with pytest.raises(LaunchError, match=r"answered 400: strict decoding error: .*nodeSelctor.*mend the template"):
        run(cluster, job)
    assert cluster.jobs == {}


def test_an_invalid_value_is_told_in_the_servers_words(cluster: Cluster) -> None:
    job = rendered()
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "tokens"
    with pytest.raises(LaunchError, match=r"answered 422: RayJob.ray.io \"try-1\" is invalid: .*tokens"):
        run(cluster, job)


@pytest.mark.parametrize(
    ("code", "words"), [(401, "log in"), (403, "k8s/base/rbac.yaml"), (404, "KubeRay operator in the cluster")]
)
def test_a_refusal_says_what_to_do_and_is_not_tried_again(cluster: Cluster, code: int, words: str) -> None:
    cluster.refuse["POST rayjobs"] = [(code, "no")]
    with pytest.raises(LaunchError, match=f"answered {code}: no; .*{words}"):
        run(cluster)
    assert cluster.count("POST", "rayjobs") == 1


def test_a_server_that_is_not_there_is_a_launch_error(schemas: Path) -> None:
    with serving(schemas) as cluster:
        cluster.stop()
        with pytest.raises(LaunchError, match="cannot be reached"):
            run(cluster, patience_seconds=0.0)


def test_a_job_that_breaks_the_operators_rules_is_never_sent(cluster: Cluster) -> None:
    job = rendered()
    job["spec"]["submissionMode"] = "Job"
    with pytest.raises(LaunchError, match="submissionMode"):
        run(cluster, job)
    assert cluster.requests == []


# --- a job that fails


@pytest.mark.parametrize(
    ("deployment", "status", "reason", "advice"),
    [
        ("Failed", "FAILED", "AppFailed", "kubectl -n locvlm logs job/try-1"),
        ("Failed", "RUNNING", "DeadlineExceeded", "--deadline-minutes"),
        ("Failed", "", "PreRunningDeadlineExceeded", "free GPUs"),
        ("Failed", "", "SubmissionFailed", "kubectl logs job/try-1"),
        ("ValidationFailed", "", "ValidationFailed", "mend the template"),
        ("Complete", "STOPPED", "", "no reason given"),
        ("Complete", "FAILED", "", "no reason given"),
        ("Complete", "", "", "no reason given"),
    ],
)
def test_every_other_end_fails_with_the_reason_and_the_jobs_last_words(
    cluster: Cluster, deployment: str, status: str, reason: str, advice: str
) -> None:
    cluster.log = {"try-1-aaaaa": [f"line {index}" for index in range(40)] + ["CUDA out of memory", "SUCCEEDED"]}
    final = {"jobDeploymentStatus": deployment, "jobStatus": status, "reason": reason, "message": "exit code 1"}
    cluster.script = [STARTING, RUNNING, final]
    with pytest.raises(JobFailed) as caught:
        run(cluster)
    message = str(caught.value)
    for words in (deployment, reason, "exit code 1", advice, "  CUDA out of memory\n  SUCCEEDED"):
        assert words in message
    assert "line 39" in message
    assert "line 9" not in message
    assert cluster.count("DELETE", "") == 0


def test_a_long_message_is_cut_at_its_beginning(cluster: Cluster) -> None:
    message = "first " + "x" * 20_000 + " last"
    cluster.script = [{"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": message}]
    with pytest.raises(JobFailed) as caught:
        run(cluster)
    assert " last" in str(caught.value)
    assert "first" not in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_a_retry_by_the_operator_is_not_the_end(cluster: Cluster) -> None:
    cluster.script = [RUNNING, {"jobDeploymentStatus": "Retrying", "jobStatus": ""}, STARTING, RUNNING, SUCCEEDED]
    assert run(cluster)[0].ray_job_id == "try-1-abcde"


def test_a_job_that_someone_deletes_is_a_failure(cluster: Cluster) -> None:
    cluster.script = [RUNNING]
    when(lambda: cluster.n_logs > 0, cluster.jobs.clear)
    with pytest.raises(JobFailed, match="deleted before it had finished"):
        run(cluster)


# --- contact, deadline, cancel


def test_a_server_that_is_away_for_a_moment_is_waited_for(cluster: Cluster) -> None:
    cluster.refuse["POST rayjobs"] = [(503, "starting"), (0, "")]
    cluster.refuse["GET rayjobs/try-1"] = [(0, ""), (500, "etcd"), (429, "slow down"), (0, "")]
    done, _ = run(cluster)
    assert not done.reattached
    assert cluster.count("POST", "rayjobs") == 2


def test_a_server_that_stays_away_ends_the_launch_but_not_the_job(cluster: Cluster) -> None:
    cluster.refuse["GET rayjobs/try-1"] = [(0, ""), (500, "etcd lost")]
    with pytest.raises(LaunchError, match="etcd lost; the job was left as it is") as caught:
        run(cluster, patience_seconds=3 * POLL)
    assert not isinstance(caught.value, JobFailed)
    assert "try-1" in cluster.jobs


def test_a_job_over_the_deadline_is_deleted_with_its_pods_first(cluster: Cluster) -> None:
    cluster.script = [{"jobDeploymentStatus": "Suspended", "jobStatus": ""}]
    job = rendered()
    job["spec"]["suspend"] = True  # as Kueue's webhook leaves it
    with pytest.raises(JobFailed, match=r"waiting in the queue locvlm.* was deleted; raise --deadline-minutes"):
        run(cluster, job, deadline_seconds=5 * POLL)
    assert cluster.jobs == {}
    (deleted,) = [query for method, _, query in cluster.requests if method == "DELETE"]
    assert deleted["propagationPolicy"] == "Foreground"


def test_the_jobs_own_deadline_holds_when_none_is_given(cluster: Cluster) -> None:
    cluster.script = [RUNNING]
    job = rendered()
    job["spec"]["activeDeadlineSeconds"] = 1
    started = time.monotonic()
    with pytest.raises(JobFailed, match="had not finished 1 s after the launch"):
        run(cluster, job)
    assert time.monotonic() - started >= 1
    assert cluster.jobs == {}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what it puts into the background with SIGINT ignored; these tests are about one that is heard."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_launch_deletes_its_job(cluster: Cluster, number: signal.Signals) -> None:
    cluster.script = [RUNNING]
    cluster.hold = lambda: True
    before = signal.getsignal(signal.SIGTERM)

    when(lambda: cluster.n_logs > 0, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        run(cluster)
    assert cluster.jobs == {}
    assert cluster.count("DELETE", "rayjobs/try-1") == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_cancelled_launch_that_cannot_delete_says_how(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.script = [RUNNING]
    cluster.refuse["DELETE try-1"] = [(500, "etcd")]
    when(lambda: cluster.n_logs > 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(cluster)
    assert "run `kubectl -n locvlm delete rayjob try-1`" in caplog.text


def test_a_launch_works_off_the_main_thread(cluster: Cluster) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run(cluster)[0]))
    thread.start()
    thread.join(5)
    assert results[0].ray_job_id == "try-1-abcde"


# --- restarts, lost answers, preemption


def test_an_api_server_that_restarts_in_the_middle_loses_nothing(cluster: Cluster) -> None:
    cluster.log = {"try-1-aaaaa": [f"step {index}" for index in range(9)]}
    cluster.breaks = [4]
    restarted = threading.Event()
    cluster.hold = lambda: not restarted.is_set()

    def restart() -> None:
        cluster.stop()
        time.sleep(10 * POLL)
        # a server that has just started does not know its roles yet
        cluster.refuse["GET rayjobs/try-1"] = [(403, "not yet"), (401, "Unauthorized"), (503, "starting"), (0, "")]
        cluster.start()
        restarted.set()

    when(lambda: cluster.n_logs > 0, restart)
    done, lines = run(cluster, patience_seconds=20)
    assert done.ray_job_id == "try-1-abcde"
    assert lines == cluster.log["try-1-aaaaa"]
    assert cluster.count("POST", "rayjobs") == 1
    assert cluster.count("DELETE", "") == 0


def test_a_server_that_withdraws_the_permission_for_good_ends_the_launch_but_not_the_job(cluster: Cluster) -> None:
    cluster.refuse["GET rayjobs/try-1"] = [(0, ""), (403, "no longer")]
    with pytest.raises(LaunchError, match=r"no longer; .*the job was left as it is"):
        run(cluster, patience_seconds=3 * POLL)
    assert "try-1" in cluster.jobs


def test_a_create_whose_answer_is_lost_does_not_make_a_second_job(cluster: Cluster) -> None:
    cluster.lost_replies = 1
    done, _ = run(cluster)
    assert done.uid == "0001"
    assert len(cluster.jobs) == 1
    assert cluster.count("DELETE", "") == 0


def test_a_preempted_job_waits_in_the_queue_and_goes_on(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    suspending = {"jobDeploymentStatus": "Suspending", "jobStatus": "RUNNING"}
    suspended = {"jobDeploymentStatus": "Suspended", "jobStatus": ""}
    cluster.script = [RUNNING, suspending, suspended, suspended, STARTING, RUNNING, SUCCEEDED]
    job = rendered()
    job["spec"]["suspend"] = True  # as Kueue leaves it while the job waits
    assert run(cluster, job)[0].ray_job_id == "try-1-abcde"
    states = [record.getMessage() for record in caplog.records if record.getMessage().startswith("job try-1: ")]
    assert "job try-1: waiting in the queue locvlm" in states
    assert states[-1] == "job try-1: Complete, SUCCEEDED"
    assert cluster.count("DELETE", "") == 0


def test_a_step_that_was_killed_and_is_retried_follows_the_job_of_its_first_try(cluster: Cluster) -> None:
    """A killed step (SIGKILL, a lost node) deletes nothing; the next one has the same name."""
    cluster.put(rendered(), RUNNING, uid="0007")
    cluster.jobs["try-1"]["status"] = {}
    cluster.script = [RUNNING, RUNNING, SUCCEEDED]
    done, lines = run(cluster)
    assert (done.uid, done.reattached) == ("0007", True)
    assert lines == ["hello", "step 1 loss 2.5", "done"]
    assert len(cluster.jobs) == 1


def test_the_role_allows_what_a_launch_does_and_no_more(cluster: Cluster) -> None:
    documents = yaml.safe_load_all((default_template().parent / "base" / "rbac.yaml").read_text())
    (role,) = [document for document in documents if document["kind"] == "Role"]
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    site_part(cluster.api, "locvlm", POLL)
    run(cluster)
    cluster.put(rendered(), {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"})
    cluster.script = [RUNNING, SUCCEEDED]
    run(cluster)
    assert cluster.permissions() == allowed


def test_a_role_is_found_for_every_request(cluster: Cluster) -> None:
    run(cluster)
    assert ("", "pods/log", "get") in cluster.permissions()
    assert ("ray.io", "rayjobs", "create") in cluster.permissions()


@pytest.mark.parametrize("data", [{}, {"other.yaml": "a"}])
def test_a_config_map_without_the_part_is_told(cluster: Cluster, data: dict[str, str]) -> None:
    cluster.config_map = {"kind": "ConfigMap", "data": data}
    with pytest.raises(LaunchError, match="apply the overlay"):
        site_part(cluster.api, "locvlm", POLL)
