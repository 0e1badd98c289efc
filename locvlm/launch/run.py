"""One job's life: created or found, followed, and judged by its status when it has ended."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from locvlm.errors import JobFailed, LaunchError
from locvlm.launch.client import FIRST_CONTACT_SECONDS, ApiError, RayJobs, patiently
from locvlm.launch.follow import LogFollower
from locvlm.launch.job import QUEUE_LABEL, Job, image_of
from locvlm.launch.rules import validate_ray_job

logger = logging.getLogger(__name__)

FINAL_STATES = ("Complete", "Failed", "ValidationFailed")
LONGEST_MESSAGE = 2000  # Ray puts up to 20,000 characters of log into status.message
ADVICE = {
    "DeadlineExceeded": "it ran longer than activeDeadlineSeconds: raise --deadline-minutes, the run resumes",
    "PreRunningDeadlineExceeded": "its pods did not start in time: look for free GPUs with `kubectl describe pod`",
    "ValidationFailed": "the operator refused it: mend the template",
    "SubmissionFailed": "the submitter could not hand it to Ray: look at `kubectl logs job/<name>`",
}


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
    jobs = RayJobs(api, job["metadata"].get("namespace", "default"))
    name = job["metadata"]["name"]
    log = LogFollower(jobs, name, write or _print_line, poll_seconds)
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
        image=image_of(job),
        entrypoint=job["spec"]["entrypoint"],
        ray_job_id=status.get("jobId", ""),
        ray_cluster=status.get("rayClusterName", ""),
        reattached=reattached,
        started=status.get("startTime", ""),
        ended=status.get("endTime", ""),
    )


def _same_work(existing: Job, job: Job) -> bool:
    """The two do the same: Kueue and the operator change other parts of a job's spec, but never these."""
    return existing["spec"].get("entrypoint") == job["spec"].get("entrypoint") and image_of(existing) == image_of(job)


def _create_or_attach(
    jobs: RayJobs, job: Job, poll_seconds: float, deadline_seconds: float | None, patience_seconds: float
) -> bool:
    """Whether the job was there already. One that failed is replaced once: a retried step is a new try."""
    name = job["metadata"]["name"]
    doing = f"creating the RayJob {name} in namespace {jobs.namespace}"
    started, replaced = time.monotonic(), False
    while not patiently(lambda: _create(jobs, job), doing, poll_seconds, patience_seconds):
        existing = patiently(lambda: jobs.get(name), doing, poll_seconds, patience_seconds)
        if existing is not None and "deletionTimestamp" not in existing["metadata"]:
            if not _same_work(existing, job):
                raise LaunchError(
                    f"{doing}: there is a job of this name with another command or image "
                    f"({existing['spec'].get('entrypoint')!r}, {image_of(existing)!r}); "
                    f"take another name, or delete it with `kubectl -n {jobs.namespace} delete rayjob {name}`"
                )
            if replaced or not _failed(existing):
                logger.info("job %s: is there already (%s), following it", name, _state(existing))
                return True
            logger.info("job %s: an earlier try failed (%s), starting it again", name, _state(existing))
            patiently(lambda: jobs.delete(name), doing, poll_seconds, patience_seconds)
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


def _create(jobs: RayJobs, job: Job) -> bool:
    """False when a job of this name is there already."""
    try:
        jobs.create(job)
    except ApiError as fault:
        if fault.status == 409:
            return False
        raise
    return True


def _wait(jobs: RayJobs, job: Job, poll_seconds: float, deadline_seconds: float | None, patience_seconds: float) -> Job:
    """The job in its final state. Raises JobFailed when it vanished or was deleted on the deadline."""
    name = job["metadata"]["name"]
    doing = f"following the RayJob {name} in namespace {jobs.namespace}"
    again = "; the job was left as it is, the same command follows it again"
    started, state = time.monotonic(), ""
    while True:
        found = patiently(lambda: jobs.get(name), doing, poll_seconds, patience_seconds, after=again, was_allowed=True)
        if found is None:
            raise JobFailed(f"{doing}: it was deleted before it had finished; launch it again to start over")
        if _state(found) != state:
            state = _state(found)
            logger.info("job %s: %s", name, state)
        if (found.get("status") or {}).get("jobDeploymentStatus") in FINAL_STATES:
            return found
        left = float("inf") if deadline_seconds is None else started + deadline_seconds - time.monotonic()
        if left <= 0:
            patiently(lambda: jobs.delete(name), f"deleting the RayJob {name}", poll_seconds, FIRST_CONTACT_SECONDS)
            raise JobFailed(
                f"{doing}: it had not finished {deadline_seconds:g} s after the launch ({state}) and was deleted; "
                "raise --deadline-minutes (the wait in the queue counts) or ask for fewer GPUs"
            )
        waited = time.monotonic() - started
        time.sleep(min(poll_seconds, left, max(1.0, waited / 10)))  # a short job is looked at more often


def _state(job: Job) -> str:
    status = job.get("status") or {}
    deployment, ray = status.get("jobDeploymentStatus") or "New", status.get("jobStatus")
    queue = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    if queue and deployment in ("New", "Suspended") and job["spec"].get("suspend"):
        return f"waiting in the queue {queue}"
    return f"{deployment}, {ray}" if ray else str(deployment)


def _last_words(jobs: RayJobs, name: str, status: Job, last_lines: Sequence[str]) -> str:
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


def _cancel(jobs: RayJobs, job: Job) -> None:
    """Delete the job of an interrupted launch; one of the same name that does other work is not ours."""
    name = job["metadata"]["name"]
    try:
        existing = jobs.get(name)
        if existing is not None and _same_work(existing, job):
            jobs.delete(name)
            logger.warning("job %s: interrupted, so it was deleted", name)
    except ApiError as fault:
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
