"""Experiment tracking: the only place, with registry.py, that talks to MLflow.

What is tracked, and where, is said by the environment: MLFLOW_TRACKING_URI (unset: nothing is tracked),
MLFLOW_RUN_ID (the run that stages are nested under), MLFLOW_EXPERIMENT_ID or MLFLOW_EXPERIMENT_NAME. Only rank 0 of a
training, or a step that runs alone, may open a stage. A server that is dead at the start is an error within seconds;
one that goes away later costs the run its late metrics, with a warning, never the training.
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

log = logging.getLogger(__name__)

EXPERIMENT = "locvlm"
_RETRY_AFTER = 30.0  # seconds before a failed metric upload is tried again

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
                    self._client.set_tag(self.run_id, "mlflow.note.content", note[:4000])
                self._client.set_terminated(self.run_id, status)
        except TrackingError as fault:
            log.warning("the run %s could not be marked %s: %s", self.run_id, status, fault)

    def _flush(self) -> None:
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
        said = " ".join(str(fault).split())
        hint = "is the server up, and MLFLOW_TRACKING_URI right?"
        if "Invalid Host header" in said:
            hint = "the server refuses this host name; start it with --allowed-hosts that lists it"
        elif "401" in said[:200]:
            hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        elif uri.startswith("sqlite:"):
            hint = "is the file writable and made by MLflow? `mlflow db upgrade` brings an old one up to date"
        raise TrackingError(f"talking to MLflow at {_without_password(uri)}: {said[:400]}; {hint}") from fault


def open_parent_run(name: str, tags: Mapping[str, str], run_id: str = "") -> str:
    """Open the run that the stages of a pipeline run are nested under; returns its id ("" when nothing is tracked).

    With `run_id`, that run is set running again instead (a pipeline that continues after a failed step).
    Raises TrackingError.
    """
    if not enabled():
        return ""
    uri = initialise(os.environ["MLFLOW_TRACKING_URI"])
    with reaching(uri):
        client = connect(uri)
        if run_id:
            client.update_run(run_id, status="RUNNING")
            return run_id
        return str(client.create_run(_experiment_id(client, None), run_name=name, tags=dict(tags)).info.run_id)


def resume_run(run_id: str) -> MlflowTracker | NullTracker:
    """A tracker for a run that is open already, such as the parent run of a pipeline."""
    if not run_id or not enabled():
        return NullTracker()
    uri = os.environ["MLFLOW_TRACKING_URI"]
    return MlflowTracker(connect(uri), uri, run_id)


@contextlib.contextmanager
def start_stage(
    name: str, parent_run_id: str, params: Mapping[str, object], tags: Mapping[str, str]
) -> Iterator[MlflowTracker | NullTracker]:
    """A run for one stage, nested under `parent_run_id` or, where that is empty, under MLFLOW_RUN_ID.

    The run ends FINISHED, or FAILED with the error's message as its note, or KILLED on KeyboardInterrupt.
    Raises TrackingError when the store does not answer at the start.
    """
    if not enabled():
        yield NullTracker()
        return
    uri = initialise(os.environ["MLFLOW_TRACKING_URI"])
    with reaching(uri):
        client = connect(uri)
        parent = parent_run_id or os.environ.get("MLFLOW_RUN_ID", "")
        every_tag = {**tags, **({"mlflow.parentRunId": parent} if parent else {})}
        # A nested run must lie in its parent's experiment, whatever the names in the environment say.
        experiment = client.get_run(parent).info.experiment_id if parent else _experiment_id(client, None)
        run = client.create_run(experiment, run_name=name, tags=every_tag)
        _log_params(client, run.info.run_id, params)
    tracker = MlflowTracker(client, uri, run.info.run_id)
    try:
        yield tracker
    except KeyboardInterrupt:
        tracker.close("KILLED", "interrupted")
        raise
    except BaseException as fault:
        tracker.close("FAILED", f"{type(fault).__name__}: {fault}")
        raise
    tracker.close("FINISHED")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as `a.b.c` -> text, lists as JSON: the form in which a config becomes run parameters."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


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
            return str(client.create_experiment(name, artifact_location=artifact_location))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was quicker
            if found is None:
                raise
    return str(found.experiment_id)


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
