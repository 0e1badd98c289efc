"""Ray in place of KubeRay: a Ray head in processes of its own, and an operator that runs RayJobs on it by its Jobs API.

The API server is that of `tests.api_server`. One head stands for the clusters that KubeRay would make one a job; it is
given the secrets that envFrom names, each job the `env` of its own pods. The shared volume is the machine's disk.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.api_server import Cluster, Job
from tests.deployment import free_port

FINAL = ("Complete", "Failed")


class RayHead:
    """`ray start --head`, with the authentication that the template asks for. `secrets`: variables of its pods."""

    def __init__(self, secret_variables: Mapping[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="locvlm-ray-"))  # short: Ray keeps sockets below it
        self.token = secrets.token_hex(16)
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        program = Path(sys.executable).with_name("ray")
        environment = {
            "PATH": os.pathsep.join([str(program.parent), os.environ["PATH"]]),
            "HOME": str(self.folder),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            **secret_variables,
        }
        options = {
            "port": free_port(),
            "dashboard-port": port,
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
            "metrics-export-port": free_port(),
            "node-ip-address": "127.0.0.1",
            "num-cpus": 2,
            "object-store-memory": 100_000_000,
            "temp-dir": self.folder / "ray",
        }
        command = [str(program), "start", "--head", "--block", *(f"--{key}={value}" for key, value in options.items())]
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._wait()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def processes(self, *words: str) -> list[psutil.Process]:
        """Those below the head whose command line has all the words."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                if all(word in line for word in words):
                    found.append(process)
        return found

    def stop(self) -> None:
        every = [*psutil.Process(self.process.pid).children(recursive=True)]
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        for process in [
            *psutil.wait_procs(every, timeout=5)[1],
            *([self.process] if self.process.poll() is None else []),
        ]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self) -> None:
        deadline = time.monotonic() + 120
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers=self.headers)
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(request, timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        pytest.fail(f"the Ray head did not come up:\n{(self.folder / 'log').read_text()[-3000:]}")


class Operator(Cluster):
    """An API server whose RayJobs run on a Ray head.

    `made`: how often each job was created; `tries`: the Ray jobs of each, in order. A try that fails is repeated
    `backoffLimit` times, as KubeRay does with a new cluster; a job that is deleted is stopped.
    """

    def __init__(self, schemas: Path, head: RayHead) -> None:
        from ray.job_submission import JobSubmissionClient

        super().__init__(schemas)
        self.script, self.log = [{}], {}
        self.made: dict[str, int] = {}
        self.tries: dict[str, list[str]] = {}
        self.faults: list[str] = []
        self._known: dict[str, Job] = {}
        self._backoffs: dict[str, int] = {}
        self._client = JobSubmissionClient(head.address, headers=head.headers)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        super().start()
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join(30)
        super().stop()

    def grows(self, pod: str) -> bool:
        job = self.jobs.get(pod.rpartition("-")[0])
        return self.running and job is not None and pod == self._pod(job) and not _is_final(job)

    def state(self, name: str) -> str:
        """What `kubectl get rayjob` would show."""
        return str((self.jobs[name].get("status") or {}).get("jobDeploymentStatus", ""))

    def _pod(self, job: Job) -> str:
        return self.tries.get(job["metadata"]["name"], [""])[-1]

    def _work(self) -> None:
        while not self._end.wait(0.2):
            try:
                self._look()
            except Exception as fault:  # noqa: BLE001 - told by the test
                self.faults.append(repr(fault))

    def _look(self) -> None:
        jobs = dict(self.jobs)
        for name, known in list(self._known.items()):
            if jobs.get(name) is not known:
                del self._known[name]
                if not _is_final(known):
                    self._client.stop_job(self.tries[name][-1])
        for name, job in jobs.items():
            if name not in self._known:
                self._known[name] = job
                self.made[name] = self.made.get(name, 0) + 1
                self._backoffs[name] = 0
                self._submit(job)
            elif not _is_final(job):
                self._follow(job)

    def _submit(self, job: Job) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        container = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        before = self.tries.get(name, [])
        self.tries[name] = [*before, f"{name}-{len(before)}"]
        self.log[self.tries[name][-1]] = []
        job["status"] = {"jobDeploymentStatus": "Retrying" if before else "Initializing", "jobStatus": ""}
        self._client.submit_job(
            entrypoint=spec["entrypoint"], submission_id=self.tries[name][-1], runtime_env={"env_vars": variables}
        )

    def _follow(self, job: Job) -> None:
        name = job["metadata"]["name"]
        ray_job = self.tries[name][-1]
        found = self._client.get_job_info(ray_job)
        text = self._client.get_job_logs(ray_job)
        is_done = found.status.is_terminal()
        lines = text.split("\n")
        self.log[ray_job] = lines if is_done and lines[-1] else lines[:-1]
        status = {"jobStatus": str(found.status.value), "jobId": ray_job, "rayClusterName": f"{ray_job}-cluster"}
        status["startTime"] = "2026-01-01T00:00:00Z"
        if not is_done:
            job["status"] = {**status, "jobDeploymentStatus": "Running"}
        elif found.status == "SUCCEEDED":
            job["status"] = {**status, "jobDeploymentStatus": "Complete", "endTime": "2026-01-01T01:00:00Z"}
        elif self._backoffs[name] < job["spec"].get("backoffLimit", 0):
            self._backoffs[name] += 1
            self._submit(job)
        else:
            words = {"reason": "AppFailed", "message": found.message or ""}
            job["status"] = {**status, **words, "jobDeploymentStatus": "Failed"}


def _is_final(job: Job) -> bool:
    return (job.get("status") or {}).get("jobDeploymentStatus") in FINAL


@contextlib.contextmanager
def operating(schemas: Path, secret_variables: Mapping[str, str]) -> Iterator[tuple[Operator, RayHead]]:
    """An API server with its operator, and the Ray head that it uses."""
    head = RayHead(secret_variables)
    try:
        operator = Operator(schemas, head)
        operator.start()
        try:
            yield operator, head
        finally:
            operator.stop()
    finally:
        head.stop()
