"""Experiment tracking: the only place, with registry/, that talks to MLflow.

What is tracked, and where, is said by the environment: MLFLOW_TRACKING_URI (unset: nothing is tracked),
MLFLOW_RUN_ID (the run that stages are nested under), MLFLOW_EXPERIMENT_ID or MLFLOW_EXPERIMENT_NAME; LOCVLM_LINEAGE and
LOCVLM_RAY_JOB (which pipeline run and RayJob this process works for) become tags. Only rank 0 of a training, or a step
that runs alone, may open a stage. A server that is dead at the start is an error within seconds; while one is away
later, metrics wait, and nothing else does. At the end a stage waits for it, for a while, and else ends with an error;
a stage that keeps a memo then goes on in the same run when it is started again, where the metrics break off.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from locvlm.errors import TrackingError
from locvlm.records import read_json, write_json

log = logging.getLogger(__name__)

EXPERIMENT = "locvlm"
LINEAGE, RAY_JOB = "LOCVLM_LINEAGE", "LOCVLM_RAY_JOB"
_NOTE = "mlflow.note.content"
_RETRY_AFTER = 30.0  # seconds before a failed metric upload is tried again
_PATIENCE = 120.0  # seconds that the end of a stage waits for a server that is away: a restart takes less

# MLflow's pages: runs of trainings, not of chats; and what is where
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    _NOTE: "One run a pipeline run; nested in it one a training stage (align, then the arms). It has its curve, what "
    "it was trained with, and the figures of its model (task/figure). Select the runs of two arms and compare.",
}

# Used where the environment says nothing else. With mlflow's own settings a dead server keeps a person waiting for
# four minutes; the others keep it from talking where nobody asked.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class Tracker(Protocol):
    """What a stage may log. `run_id` is empty where nothing is tracked."""

    run_id: str

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at an optimizer step."""

    def last_step(self, key: str) -> int:
        """The last step of a figure that this run has already, from an earlier try; 0 for a new run."""

    def deliver(self) -> None:
        """Wait until all numbers are recorded."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Store one file, or a folder with all it holds, under `folder` of the run's artifacts."""

    def log_figure(self, figure: Any, name: str) -> None:
        """Store a matplotlib figure as `name`, for example `figures/loss.png`."""

    def log_dataset(self, name: str, path: Path, fingerprint: str) -> None:
        """Name an input. `fingerprint` is DVC's md5 (32 hex digits, or 32 and `.dir`), or `sha256:...`."""

    def close(self, status: str, note: str = "") -> None:
        """End the run as FINISHED, FAILED or KILLED; `start_stage` does so by itself."""


class NullTracker:
    """Tracks nothing, where MLFLOW_TRACKING_URI is unset."""

    run_id = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing is recorded."""

    def last_step(self, key: str) -> int:
        """Nothing was recorded."""
        return 0

    def deliver(self) -> None:
        """Nothing waits."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Nothing is stored."""

    def log_figure(self, figure: Any, name: str) -> None:
        """Nothing is stored."""

    def log_dataset(self, name: str, path: Path, fingerprint: str) -> None:
        """Nothing is named."""

    def close(self, status: str, note: str = "") -> None:
        """Nothing is open."""


class MlflowTracker:
    """One run of MLflow. It uses the client, not the fluent functions, which write into whichever run is active."""

    def __init__(self, client: Any, uri: str, run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self._uri = uri
        self._pending: list[Any] = []
        self._try_again = 0.0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers; while the server is away they wait, and go with a later call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(key, float(value), now, step) for key, value in metrics.items()]
        if time.monotonic() >= self._try_again:
            self._flush()

    def last_step(self, key: str) -> int:
        """The last step of a figure that the run has already, from an earlier try. Raises TrackingError."""
        with reaching(self._uri):
            return max((metric.step for metric in self._client.get_metric_history(self.run_id, key)), default=0)

    def deliver(self) -> None:
        """Wait until all numbers are recorded. Raises TrackingError when the server stays away."""
        until = time.monotonic() + _PATIENCE
        while (fault := self._flush()) is not None:
            if time.monotonic() >= until:
                raise TrackingError(f"recording {len(self._pending)} values that were kept while it was away: {fault}")
            time.sleep(min(2.0, _PATIENCE))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Store a file or a folder. Raises TrackingError when it does not exist or cannot be stored."""
        if not path.exists():
            raise TrackingError(f"logging the artifact {path}: there is no such file or folder")
        store = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        with reaching(self._uri):
            store(self.run_id, str(path), folder or None)

    def log_figure(self, figure: Any, name: str) -> None:
        """Store a matplotlib figure. Raises TrackingError."""
        with reaching(self._uri):
            self._client.log_figure(self.run_id, figure, name)

    def log_dataset(self, name: str, path: Path, fingerprint: str) -> None:
        """Name an input; MLflow shows the source type `dvc` where the fingerprint is DVC's. Raises TrackingError."""
        from mlflow.entities import DatasetInput, InputTag

        with reaching(self._uri):
            tags = [InputTag("mlflow.data.context", "input")]
            self._client.log_inputs(self.run_id, [DatasetInput(_dataset(name, path, fingerprint), tags)])

    def close(self, status: str, note: str = "") -> None:
        """End the run as FINISHED, FAILED or KILLED. Never raises: the stage's own outcome counts more."""
        self._flush()
        if self._pending:
            log.warning("%d metric values never reached %s; curve.jsonl holds them", len(self._pending), self._uri)
        try:
            with reaching(self._uri):
                if note:
                    self._client.set_tag(self.run_id, _NOTE, note[:4000])
                self._client.set_terminated(self.run_id, status)
        except TrackingError as fault:
            log.warning("the run %s could not be marked %s: %s", self.run_id, status, fault)

    def _flush(self) -> TrackingError | None:
        """Send what waits; returns why it could not be sent."""
        began = time.monotonic()
        try:
            while self._pending:
                with reaching(self._uri):
                    self._client.log_batch(self.run_id, metrics=self._pending[:1000], synchronous=True)
                del self._pending[:1000]
        except TrackingError as fault:
            # A host that swallows packets costs a time-out each try: wait ten times as long as the try took.
            now = time.monotonic()
            self._try_again = now + max(_RETRY_AFTER, 10 * (now - began))
            log.warning("metrics wait, %d values so far: %s", len(self._pending), fault)
            return fault
        return None


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables such as MLFLOW_RUN_ID for the time of the body, then what they were before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def enabled() -> bool:
    """Whether anything is tracked in this process."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI"))


def initialise(uri: str) -> str:
    """Make the store behind `uri` ready and return the URI with an absolute path.

    A SQLite store gets its schema once, under a file lock (several processes that first-touch one file together ruin it
    for good), and the experiment gets an absolute artifact location (MLflow's own default is the folder of whichever
    process comes first). Raises TrackingError for an unusable URI or a store that does not answer.
    """
    if not uri.startswith(("sqlite:", "http://", "https://", "postgresql", "mysql", "mssql")):
        raise TrackingError(
            f"opening the tracking store {uri!r}: MLflow no longer keeps runs in plain folders; use "
            "sqlite:////absolute/path/mlflow.db or the http address of a server"
        )
    artifacts = None
    if uri.startswith("sqlite:"):
        database = Path(uri.removeprefix("sqlite:").removeprefix("///").partition("?")[0]).absolute()
        if database.name in ("", ":memory:") or database.is_dir():
            raise TrackingError(
                f"opening the tracking store {uri!r}: the path of a file is needed, sqlite:////path/mlflow.db"
            )
        uri = f"sqlite:///{database}"
        _create_schema(database, uri)
        artifacts = (database.parent / "mlartifacts").as_uri()
    client = connect(uri)
    with reaching(uri):
        _experiment_id(client, artifacts)
    return uri


def connect(uri: str = "") -> Any:
    """An MlflowClient for `uri`, or for MLFLOW_TRACKING_URI. Raises TrackingError: neither is set, or not usable."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise TrackingError(
            "opening the tracking store: MLFLOW_TRACKING_URI is not set; set it to sqlite:////absolute/path/mlflow.db "
            "or to the http address of a server"
        )
    _settle()
    from mlflow import MlflowClient

    with reaching(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextlib.contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turn the errors of MLflow's client in the body into one TrackingError that names `uri`."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as fault:
        said = re.sub(r"//[^/@\s]+@", "//", " ".join(str(fault).split()))  # a user and password of the address
        hint = "is the server up, and MLFLOW_TRACKING_URI right?"
        if "Invalid Host header" in said:
            hint = "the server refuses this host name; start it with --allowed-hosts that lists it"
        elif "mlflow-artifacts" in said:
            hint = "is the storage behind the server up, and what does the server's log say of it?"
        elif "401" in said[:200]:
            hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        elif uri.startswith("sqlite:"):
            hint = "is the file writable and made by MLflow? `mlflow db upgrade` brings an old one up to date"
        raise TrackingError(f"talking to MLflow at {_without_password(uri)}: {said[:400]}; {hint}") from fault


def open_parent_run(name: str, tags: Mapping[str, str], run_id: str = "") -> str:
    """Open the run that the stages of a pipeline run are nested under; returns its id ("" when nothing is tracked).

    With `run_id`, that run is set running again instead (a pipeline that continues after a failed step), unless this
    store does not have it. Raises TrackingError.
    """
    if not enabled():
        return ""
    uri = initialise(os.environ["MLFLOW_TRACKING_URI"])
    with reaching(uri):
        client = connect(uri)
        if run_id and _reopen(client, run_id):
            return run_id
        run = client.create_run(_experiment_id(client, None), run_name=name, tags={**origin_tags(), **tags})
        return str(run.info.run_id)


def tag_run(run_id: str, tags: Mapping[str, str]) -> str:
    """Tag a run that is there already and those that it is nested under; returns the id of the outermost.

    Raises TrackingError, also when there is no such run.
    """
    uri = os.environ["MLFLOW_TRACKING_URI"]
    client = connect(uri)
    outer = run_id
    with reaching(uri):
        while True:
            for key, value in tags.items():
                client.set_tag(outer, key, value)
            above = client.get_run(outer).data.tags.get("mlflow.parentRunId")
            if not above:
                return outer
            outer = str(above)


def set_tags(run_id: str, tags: Mapping[str, str]) -> None:
    """Tag one run; nothing where nothing is tracked. Raises TrackingError."""
    if not run_id or not enabled():
        return
    uri = os.environ["MLFLOW_TRACKING_URI"]
    with reaching(uri):
        client = connect(uri)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)


def add_figures(of: Mapping[str, str], figures: Mapping[str, float], tags: Mapping[str, str]) -> str:
    """Put final figures and tags on the newest run that has the tags `of`; returns its id, "" where there is none.

    Raises TrackingError.
    """
    uri = os.environ["MLFLOW_TRACKING_URI"]
    client = connect(uri)
    with reaching(uri):
        experiments = [one.experiment_id for one in client.search_experiments(max_results=1000)]
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in of.items())
        newest = ["attributes.start_time DESC"]
        found = list(client.search_runs(experiments, condition, max_results=1, order_by=newest))
    if not found:
        return ""
    run_id = str(found[0].info.run_id)
    tracker = MlflowTracker(client, uri, run_id)
    tracker.log_metrics(figures, 0)
    tracker.deliver()
    set_tags(run_id, tags)
    return run_id


def origin_tags() -> dict[str, str]:
    """Which pipeline run and which RayJob this process works for, as tags; empty for a verb that a person runs."""
    named = {"lineage": os.environ.get(LINEAGE, ""), "ray.job": os.environ.get(RAY_JOB, "")}
    return {key: value for key, value in named.items() if value}


def probe(uri: str) -> str:
    """Ask the store at `uri` for its experiments, as the user that the environment names; returns what it has in words.

    Makes nothing: a SQLite file that is not there yet is only told. Raises TrackingError.
    """
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///").partition("?")[0]).is_file():
        return f"{uri} is not there yet; the first run makes it"
    client = connect(uri)
    with reaching(uri):
        names = [experiment.name for experiment in client.search_experiments(max_results=100)]
    return f"{_without_password(uri)} has {len(names)} experiment{'' if len(names) == 1 else 's'}"


def resume_run(run_id: str) -> MlflowTracker | NullTracker:
    """A tracker for a run that is open already, such as the parent run of a pipeline."""
    if not run_id or not enabled():
        return NullTracker()
    uri = os.environ["MLFLOW_TRACKING_URI"]
    return MlflowTracker(connect(uri), uri, run_id)


@contextlib.contextmanager
def start_stage(
    name: str, parent_run_id: str, params: Mapping[str, object], tags: Mapping[str, str], memo: Path | None = None
) -> Iterator[MlflowTracker | NullTracker]:
    """A run for one stage, nested under `parent_run_id` or, where that is empty, under MLFLOW_RUN_ID.

    `memo`: a file beside the stage's work that names its run: work that goes on after it was cut off goes on in the
    same run. The run ends FINISHED, or FAILED with the error's message as its note, or KILLED on KeyboardInterrupt.
    Raises TrackingError when the store does not answer at the start, or stays away at the end.
    """
    if not enabled():
        yield NullTracker()
        return
    uri = initialise(os.environ["MLFLOW_TRACKING_URI"])
    with reaching(uri):
        client = connect(uri)
        parent = parent_run_id or os.environ.get("MLFLOW_RUN_ID", "")
        every_tag = {**origin_tags(), **tags, **({"mlflow.parentRunId": parent} if parent else {})}
        # A nested run must lie in its parent's experiment, whatever the names in the environment say.
        experiment = client.get_run(parent).info.experiment_id if parent else _experiment_id(client, None)
        run_id = str(read_json(memo)["mlflow_run_id"]) if memo is not None and memo.is_file() else ""
        if not run_id or not _reopen(client, run_id):
            run_id = str(client.create_run(experiment, run_name=name, tags=every_tag).info.run_id)
            if memo is not None:
                write_json(memo, {"mlflow_run_id": run_id})
            _log_params(client, run_id, params)
    tracker = MlflowTracker(client, uri, run_id)
    try:
        yield tracker
        tracker.deliver()
    except KeyboardInterrupt:
        tracker.close("KILLED", "interrupted")
        raise
    except BaseException as fault:
        tracker.close("FAILED", f"{type(fault).__name__}: {fault}")
        raise
    tracker.close("FINISHED")


def _settle() -> None:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _create_schema(database: Path, uri: str) -> None:
    database.parent.mkdir(parents=True, exist_ok=True)
    marker = database.with_name(f"{database.name}.schema")
    wanted = version("mlflow")
    with open(database.with_name(f"{database.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if database.is_file() and database.stat().st_size and marker.is_file() and marker.read_text() == wanted:
            return
        _settle()
        from mlflow.db import upgrade

        with reaching(uri):
            upgrade.main([uri], standalone_mode=False)
        marker.write_text(wanted)


def _experiment_id(client: Any, artifact_location: str | None) -> str:
    """The id of the experiment that the environment names; created when it does not exist."""
    from mlflow.exceptions import MlflowException

    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location, tags=_EXPERIMENT_TAGS))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was quicker
            if found is None:
                raise
    return str(found.experiment_id)


def _reopen(client: Any, run_id: str) -> bool:
    """Set a run that was left running again; False when this store does not have it (any more)."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as fault:
        if fault.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    if run.info.lifecycle_stage != "active":
        return False
    client.update_run(run_id, status="RUNNING")
    if _NOTE in run.data.tags:
        client.delete_tag(run_id, _NOTE)  # why it ended before
    return True


def _log_params(client: Any, run_id: str, params: Mapping[str, object]) -> None:
    from mlflow.entities import Param

    every = [Param(key, str(value)[:6000]) for key, value in params.items()]
    for first in range(0, len(every), 100):
        client.log_batch(run_id, params=every[first : first + 100], synchronous=True)


def _dataset(name: str, path: Path, fingerprint: str) -> Any:
    """MLflow's record of an input: type `dvc` or `local`, and a digest of at most 36 characters (MLflow's limit)."""
    from mlflow.entities import Dataset

    md5 = fingerprint.removeprefix("md5:")
    is_dvc = re.fullmatch(r"[0-9a-f]{32}(\.dir)?", md5) is not None
    return Dataset(
        name=name,
        digest=md5 if is_dvc else fingerprint.removeprefix("sha256:")[:36],
        source_type="dvc" if is_dvc else "local",
        source=json.dumps({"path": str(path), "fingerprint": fingerprint}),
    )


def _without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else uri
