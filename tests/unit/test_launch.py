"""The launcher through the real Kubernetes client, against a small API server that checks what it is sent."""

import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from locvlm.errors import JobFailed, LaunchError
from locvlm.launch import (
    JobSettings,
    connect,
    default_template,
    job_name,
    launch,
    render_ray_job,
    validate_ray_job,
)
from tests.crds import crd_faults

POLL = 0.01
# as JSON, which is YAML that parses in no time
TEMPLATE = json.dumps(yaml.safe_load(default_template().read_text()))
COMMAND = ["locvlm", "train", "--stage", "instruct"]
SUCCEEDED = {
    "jobDeploymentStatus": "Complete",
    "jobStatus": "SUCCEEDED",
    "jobId": "try-1-abcde",
    "rayClusterName": "try-1-fghij",
    "startTime": "2026-01-01T00:00:00Z",
    "endTime": "2026-01-01T01:00:00Z",
}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
STARTING = {"jobDeploymentStatus": "Initializing", "jobStatus": ""}

Job = dict[str, Any]


def rendered(settings: JobSettings | None = None, command: list[str] = COMMAND, image: str = "locvlm:test") -> Job:
    return render_ray_job(TEMPLATE, "try-1", image, command, settings)


# --- names, rendering, rules


def test_a_name_is_the_same_for_the_same_run_and_step_and_fits_kuberay() -> None:
    names = set()
    steps = ["train", "Train Stage 2!", "", "9-starts-with-a-digit", "x" * 200, "ends-with-" + "-" * 40, "\u65e5\u672c"]
    for run in ("run-1", "run-2", "0" * 300):
        for step in steps:
            name = job_name(run, step)
            assert name == job_name(run, step)
            assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
            assert len(name) <= 47
            names.add(name)
    assert len(names) == 3 * len(steps)
    assert job_name("run-1", "train") == "locvlm-train-03d0550ce6"


def test_the_command_survives_the_submitters_shell_and_the_drivers_shell() -> None:
    words = ["--set", "name=a b", "$HOME", "`id`", "it's", 'say "x"', "a&b;c|d(e)", "*", "back\\slash", "", "#no", "~"]
    line = rendered(command=["printf", "%s\\0", *words])["spec"]["entrypoint"]
    # the submitter's shell splits the line, Ray joins the words with shlex and gives them to the driver's shell
    split = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    joined = shlex.join(split.decode().split("\0")[:-1])
    driver = subprocess.run(["sh", "-c", joined], capture_output=True, check=True).stdout
    assert driver.decode().split("\0")[:-1] == words


def test_rendering_sets_name_image_queue_size_deadline_and_environment() -> None:
    settings = JobSettings(
        namespace="team",
        queue="fast",
        workers=3,
        gpus_per_worker=2,
        entrypoint_gpus=1,
        deadline_minutes=90,
        environment={"MLFLOW_RUN_ID": "r1", "MLFLOW_TRACKING_URI": "http://elsewhere:5000"},
    )
    job = rendered(settings)
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert (job["metadata"]["name"], job["metadata"]["namespace"]) == ("try-1", "team")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "fast"
    assert (spec["activeDeadlineSeconds"], spec["entrypointNumGpus"]) == (5400, 1)
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    pod = group["template"]["spec"]
    wanted = {"cpu": "20", "memory": "160Gi", "nvidia.com/gpu": "2"}  # a quarter of the template's eight GPUs
    assert pod["containers"][0]["resources"] == {"requests": wanted, "limits": wanted}
    assert [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume] == ["16Gi"]
    for template in (spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"], group["template"]):
        assert template["spec"]["containers"][0]["image"] == "locvlm:test"
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        env = template["spec"]["containers"][0]["env"]
        values = {entry["name"]: entry["value"] for entry in env}
        assert len(values) == len(env)
        assert values["MLFLOW_RUN_ID"] == "r1"
        assert values["MLFLOW_TRACKING_URI"] == "http://elsewhere:5000"


def test_without_settings_the_template_decides_and_an_empty_queue_takes_the_job_out_of_kueue() -> None:
    template = yaml.safe_load(default_template().read_text())
    assert rendered()["metadata"]["labels"] == template["metadata"]["labels"]
    assert rendered()["spec"]["activeDeadlineSeconds"] == template["spec"]["activeDeadlineSeconds"]
    assert "kueue.x-k8s.io/queue-name" not in rendered(JobSettings(queue=""))["metadata"]["labels"]


def test_amounts_are_rounded_up_and_parts_shared_by_an_anchor_are_filled_apart() -> None:
    template = """
kind: RayJob
spec:
  rayClusterSpec:
    headGroupSpec: {template: &pod {spec: {containers: [{name: ray, image: x, env: [{name: A, value: "1"}],
      resources: {limits: {cpu: 15, memory: 10Gi, nvidia.com/gpu: 4}}}]}}}
    workerGroupSpecs: [{groupName: gpu, template: *pod}]
"""
    settings = JobSettings(gpus_per_worker=1, environment={"B": "2"})
    cluster = render_ray_job(template, "x", "i", ["locvlm"], settings)["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert worker["resources"]["limits"] == {"cpu": "4", "memory": "3Gi", "nvidia.com/gpu": "1"}
    assert head["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert head["env"] == worker["env"] == [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]


@pytest.mark.parametrize(
    ("template", "settings", "words"),
    [
        ("a: [", None, "not valid YAML"),
        ("kind: Pod\nspec: {}", None, "not a RayJob"),
        ("[]", None, "not a RayJob"),
        ("kind: RayJob\nspec: {}", JobSettings(workers=2), "0 worker groups"),
        ("kind: RayJob\nspec: {rayClusterSpec: {workerGroupSpecs: [{}]}}", JobSettings(workers=0), "at least 1"),
        (
            "kind: RayJob\nspec: {rayClusterSpec: {workerGroupSpecs: [{template: {spec: {containers: [{}]}}}]}}",
            JobSettings(gpus_per_worker=2),
            "no limit for nvidia.com/gpu",
        ),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, settings: JobSettings | None, words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        render_ray_job(template, "x", "i", ["locvlm"], settings)


def test_an_empty_command_is_refused() -> None:
    with pytest.raises(LaunchError, match="command is empty"):
        rendered(command=[])


def put(job: Job, place: str, value: object) -> None:
    *way, last = place.split(".")
    node: Any = job
    for key in way:
        node = node[int(key)] if key.isdigit() else node.setdefault(key, {})
    if value is None:
        del node[last]
    else:
        node[last] = value


SPEC, CLUSTER, WORKERS = "spec", "spec.rayClusterSpec", "spec.rayClusterSpec.workerGroupSpecs.0"


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


# --- a cluster


class Cluster(ThreadingHTTPServer):
    """An API server with one kind: it checks creates against the CRD, plays a script of statuses, serves a log.

    `script`: the statuses of the job, one a look, the last one for ever. `hold()` keeps the script where it is.
    `log`: the lines by pod. `breaks`: how many lines the next followed streams give before they stop in mid-line: they
    are cut, or ended in good form (`clean`), or left open without a word (`stuck`).
    `refuse`: answers to give instead, by "METHOD path-ending", the last of a list for ever.
    """

    daemon_threads = True

    def __init__(self, schemas: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.schemas = schemas
        self.jobs: dict[str, Job] = {}
        self.script: list[Job] = [STARTING, RUNNING, SUCCEEDED]
        self.hold: Callable[[], bool] = lambda: False
        self.log: dict[str, list[str]] = {"try-1-aaaaa": ["hello", "step 1 loss 2.5", "done"]}
        self.breaks: list[int] = []
        self.after_break: Callable[[], None] = lambda: None
        self.stamps = True
        self.clean = False
        self.stuck = threading.Event()
        self.refuse: dict[str, list[tuple[int, str]]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.n_logs = 0

    @property
    def api(self) -> Any:
        from kubernetes import client

        return client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{self.server_port}"))

    def put(self, job: Job, status: Job | None = None, **metadata: str) -> None:
        """A job that is there already."""
        self.jobs["try-1"] = copy.deepcopy(job) | {"status": status or {}}
        self.jobs["try-1"]["metadata"] |= metadata

    def count(self, method: str, ending: str) -> int:
        return sum(entry[0] == method and entry[1].endswith(ending) for entry in self.requests)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that hangs up is no news
            super().handle_error(request, client_address)


class Answer(BaseHTTPRequestHandler):
    server: Cluster
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, code: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fault(self, code: int, message: str) -> None:
        self.answer(code, {"kind": "Status", "status": "Failure", "code": code, "message": message})

    def begin(self) -> tuple[str, dict[str, str]] | None:
        """Path and query, unless this request is to be refused."""
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.server.requests.append((self.command, parts.path, query))
        for key, answers in self.server.refuse.items():
            method, ending = key.split()
            if method == self.command and parts.path.endswith(ending) and answers:
                code, message = answers.pop(0) if len(answers) > 1 else answers[0]
                if code:
                    self.fault(code, message)
                    return None
        return parts.path, query

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        begun = self.begin()
        if begun is None:
            return
        path, query = begun
        assert path == f"/apis/ray.io/v1/namespaces/{job['metadata']['namespace']}/rayjobs"
        name = job["metadata"]["name"]
        faults = crd_faults(self.server.schemas, job)
        if faults and "unknown field" in faults[0]:
            if query.get("fieldValidation") == "Strict":
                self.fault(400, f"strict decoding error: {faults[0]}")
                return
            faults = []
        if faults:
            self.fault(422, f'RayJob.ray.io "{name}" is invalid: {faults[0]}')
        elif name in self.server.jobs:
            self.fault(409, f'rayjobs.ray.io "{name}" already exists')
        else:
            job["metadata"] |= {"uid": "0001", "creationTimestamp": "2026-01-01T00:00:00Z"}
            self.server.jobs[name] = job
            self.answer(201, job)

    def do_DELETE(self) -> None:
        if (begun := self.begin()) is None:
            return
        name = begun[0].split("/")[-1]
        if self.server.jobs.pop(name, None) is None:
            self.fault(404, "not found")
        else:
            self.answer(200, {"kind": "Status", "status": "Success"})

    def do_GET(self) -> None:
        if (begun := self.begin()) is None:
            return
        path, query = begun
        if path.endswith("/log"):
            self.stream(path.split("/")[-2], query)
        elif path.endswith("/pods"):
            assert query["labelSelector"] == "job-name=try-1"
            pods = [
                {
                    "metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:0{index}Z"},
                    "spec": {"containers": [{"name": "ray-job-submitter"}]},
                    "status": {"phase": "Running"},
                }
                for index, name in enumerate(self.server.log)
            ]
            pending = {"metadata": {"name": "new", "creationTimestamp": "2027-01-01T00:00:00Z"}}
            self.answer(200, {"items": [*pods, pending | {"status": {"phase": "Pending"}}]})
        else:
            self.look(path.split("/")[-1])

    def look(self, name: str) -> None:
        job = self.server.jobs.get(name)
        if job is None:
            self.fault(404, f'rayjobs.ray.io "{name}" not found')
            return
        if not job.get("status"):
            script = self.server.script
            status = script.pop(0) if len(script) > 1 and not self.server.hold() else script[0]
            job = job | {"status": status}
        self.answer(200, job)

    def stream(self, pod: str, query: dict[str, str]) -> None:
        assert (query["timestamps"], query["container"]) == ("True", "ray-job-submitter")
        self.server.n_logs += 1
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        follow = query["follow"] == "True"
        cut = self.server.breaks.pop(0) if follow and self.server.breaks else None
        for index, line in enumerate(list(self.server.log[pod])):
            # two lines a nanosecond: a time stamp alone does not say where a stream was cut
            stamp = f"2026-01-01T00:00:00.{index // 2:09d}Z " if self.server.stamps else ""
            data = f"{stamp}{line}\n".encode()
            if index == cut:
                self.chunk(data[: len(data) // 2])
                self.server.after_break()
                while self.server.stuck.is_set():
                    time.sleep(0.005)
                self.close_connection = True
                if self.server.clean:
                    self.wfile.write(b"0\r\n\r\n")
                return
            self.chunk(data)
        while follow and self.server.jobs and self.server.hold():
            time.sleep(0.005)
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


@pytest.fixture
def cluster(schemas: Path) -> Iterator[Cluster]:
    server = Cluster(schemas)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def run(cluster: Cluster, job: Job | None = None, **options: Any) -> tuple[Any, list[str]]:
    lines: list[str] = []
    done = launch(job or rendered(), cluster.api, poll_seconds=POLL, write=lines.append, **options)
    return done, lines


def when(condition: Callable[[], bool], action: Callable[[], None]) -> None:
    """Do `action` in the background as soon as `condition` holds."""

    def wait() -> None:
        while not condition():
            time.sleep(0.002)
        action()

    threading.Thread(target=wait, daemon=True).start()


# --- a job that succeeds


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
    ("code", "words"), [(401, "log in"), (403, "k8s/rbac.yaml"), (404, "KubeRay operator in the cluster")]
)
def test_a_refusal_says_what_to_do_and_is_not_tried_again(cluster: Cluster, code: int, words: str) -> None:
    cluster.refuse["POST rayjobs"] = [(code, "no")]
    with pytest.raises(LaunchError, match=f"answered {code}: no; .*{words}"):
        run(cluster)
    assert cluster.count("POST", "rayjobs") == 1


def test_a_server_that_is_not_there_is_a_launch_error(schemas: Path) -> None:
    server = Cluster(schemas)
    server.server_close()
    with pytest.raises(LaunchError, match="cannot be reached"):
        run(server, patience_seconds=0.0)


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


# --- the log


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("stamps", [True, False])
@pytest.mark.parametrize("cut", [0, 3, 8])
def test_a_log_stream_that_breaks_goes_on_with_no_line_lost_or_twice(
    cluster: Cluster, cut: int, stamps: bool, clean: bool
) -> None:
    cluster.clean = clean
    cluster.log = {"try-1-aaaaa": [f"step {index} loss {1 / (index + 1):.3f}" for index in range(9)]}
    cluster.stamps = stamps
    cluster.breaks = [cut, cut, 8]
    cluster.hold = lambda: cluster.n_logs < 4
    _, lines = run(cluster)
    assert cluster.n_logs >= 4
    assert lines == cluster.log["try-1-aaaaa"]


def test_a_reconnection_asks_only_for_the_last_minutes(cluster: Cluster) -> None:
    cluster.breaks = [2]
    cluster.hold = lambda: cluster.n_logs < 2
    run(cluster)
    asked = [query.get("sinceSeconds") for _, path, query in cluster.requests if path.endswith("/log")]
    assert asked[0] is None
    assert all(int(seconds) >= 300 for seconds in asked[1:])


def test_the_log_of_a_new_submitter_follows_the_rest_of_the_old_one(cluster: Cluster) -> None:
    cluster.log = {"try-1-aaaaa": ["one", "two", "three"]}
    cluster.breaks = [1]
    cluster.after_break = lambda: cluster.log.update({"try-1-bbbbb": ["four", "five"]})
    cluster.hold = lambda: cluster.n_logs < 3
    assert run(cluster)[1] == ["one", "two", "three", "four", "five"]


def test_a_log_that_cannot_be_read_does_not_matter_because_the_status_decides(cluster: Cluster) -> None:
    cluster.refuse = {"GET /log": [(500, "kubelet away")]}
    done, lines = run(cluster)
    assert done.ray_job_id
    assert lines == []


def test_a_log_stream_that_is_stuck_does_not_hold_up_the_end_or_lose_its_rest(cluster: Cluster) -> None:
    cluster.breaks = [1]
    cluster.stuck.set()
    cluster.hold = lambda: cluster.n_logs == 0
    started = time.monotonic()
    _, lines = run(cluster)
    assert time.monotonic() - started < 5
    assert lines == ["hello", "step 1 loss 2.5", "done"]
    cluster.stuck.clear()


def test_a_reader_that_hangs_up_does_not_end_the_job(cluster: Cluster) -> None:
    def write(_line: str) -> None:
        raise BrokenPipeError

    assert launch(rendered(), cluster.api, poll_seconds=POLL, write=write).ray_job_id


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


# --- the command line


MAIN = """
import argparse, sys
from locvlm.cli import launch as verb
from locvlm.errors import LocVLMError
assert not {"kubernetes", "torch", "ray"} & set(sys.modules)
parser = argparse.ArgumentParser()
verb.add_verbs(parser.add_subparsers())
args = parser.parse_args(sys.argv[1:])
try:
    args.run(args)
except LocVLMError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def locvlm_launch(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KUBECONFIG": "/nonexistent/config", **environment}
    return subprocess.run([sys.executable, "-c", MAIN, "launch", *words], capture_output=True, text=True, env=env)


def test_the_verb_runs_a_job_through_a_kubeconfig_and_writes_a_receipt(cluster: Cluster, tmp_path: Path) -> None:
    server = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{cluster.server_port}"}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
    config = {"clusters": [server], "contexts": [context], "current-context": "x", "users": [{"name": "u", "user": {}}]}
    (tmp_path / "config").write_text(json.dumps(config))
    receipt = tmp_path / "receipt.json"
    words = ["--name", "try-1", "--image", "locvlm:7", "--poll-seconds", str(POLL), "--receipt", str(receipt), "--"]
    done = locvlm_launch(*words, "config", "--preset", "tiny", KUBECONFIG=str(tmp_path / "config"), MLFLOW_RUN_ID="r9")
    assert (done.returncode, done.stdout) == (0, "hello\nstep 1 loss 2.5\ndone\n"), done.stderr
    written = json.loads(receipt.read_text())
    assert (written["image"], written["entrypoint"]) == ("locvlm:7", "locvlm config --preset tiny")
    head = cluster.jobs["try-1"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "MLFLOW_RUN_ID", "value": "r9"} in head["env"]


def test_without_a_cluster_the_verb_says_so_and_exits_with_2() -> None:
    done = locvlm_launch("--name", "try-1", "--", "config", "--preset", "tiny")
    assert done.returncode == 2
    assert "neither a pod's service account nor a usable kubeconfig" in done.stderr
    assert "Traceback" not in done.stderr


def verb(*words: str) -> None:
    import argparse

    from locvlm.cli import launch as group

    parser = argparse.ArgumentParser()
    group.add_verbs(parser.add_subparsers())
    args = parser.parse_args(["launch", *words])
    args.run(args)


def test_a_dry_run_prints_the_job_and_needs_no_cluster(schemas: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb("--name", "try-1", "--workers", "2", "--dry-run", "--", "config", "--set", "name=a b")
    job = yaml.safe_load(capsys.readouterr().out)
    assert crd_faults(schemas, job) == []
    assert job["spec"]["entrypoint"] == "locvlm config --set 'name=a b'"
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2


@pytest.mark.parametrize("command", [["trian"], ["config", "--presett", "tiny"]])
def test_a_wrong_inner_command_is_told_before_anything_is_submitted(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        verb("--name", "try-1", "--", *command)
    assert caught.value.code == 2
    assert command[-2 if len(command) > 1 else 0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "try-1", "--", "launch"], "launching a launch"),
        (["--name", "try-1", "--workers", "0", "--", "config"], "--workers is 0"),
        (["--name", "try-1", "--deadline-minutes", "-5", "--", "config"], "--deadline-minutes is -5"),
        (["--name", "try-1", "--template", "/nonexistent.yaml", "--", "config"], "reading the job template"),
        (["--name", "Try_1", "--dry-run", "--", "config"], "must be lower-case"),
    ],
)
def test_a_wrong_option_is_a_launch_error(words: list[str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        verb(*words)


def test_the_template_is_found_in_the_checkout_and_else_in_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_template() == Path(__file__).resolve().parents[2] / "k8s" / "ray-job.yaml"
    monkeypatch.setattr("locvlm.launch.__file__", str(tmp_path / "site-packages" / "locvlm" / "launch.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(LaunchError, match="--template"):
        default_template()
    (tmp_path / "share" / "locvlm").mkdir(parents=True)
    (tmp_path / "share" / "locvlm" / "ray-job.yaml").write_text("kind: RayJob")
    assert default_template() == tmp_path / "share" / "locvlm" / "ray-job.yaml"


def test_inside_a_cluster_the_service_account_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    (tmp_path / "token").write_text("secret-token")
    (tmp_path / "ca.crt").write_text("certificate")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    from kubernetes import client

    monkeypatch.setattr(client, "ApiClient", lambda configuration: configuration)
    configuration = connect()
    assert configuration.host == "https://10.0.0.1:443"
    assert configuration.api_key == {"authorization": "bearer secret-token"}
