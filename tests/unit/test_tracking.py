"""MLflow on a SQLite file: what is stored, what a dead server does, what several processes may do at once."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from locvlm import tracking
from locvlm.errors import TrackingError
from locvlm.records import read_json, write_json

MD5 = "6ea46d53348e675e87743182f72de908.dir"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking.initialise(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.fixture
def client(store: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return tracking.connect()


def test_importing_tracking_does_not_import_mlflow() -> None:
    code = "import sys, locvlm.tracking, locvlm.registry; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_tracked_without_a_tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.open_parent_run("run", {}) == ""
    with tracking.start_stage("align", "", {"a": 1}, {}) as run:
        run.log_metrics({"loss": 1.0}, 1)
        run.log_artifact(tmp_path / "missing")
        run.log_dataset("scenes", tmp_path, MD5)
    assert run.run_id == ""
    assert list(tmp_path.iterdir()) == []


def test_a_stage_is_nested_and_keeps_what_was_logged(client: Any, tmp_path: Path) -> None:
    parent = tracking.open_parent_run("pipeline", {"code": "abc"})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    with tracking.start_stage("align", parent, {"stage": "align", "big": "x" * 9000}, {"stage": "align"}) as run:
        run.log_metrics({"loss": 2.0, "lr": 0.1}, 1)
        run.log_metrics({"loss": 1.0}, 2)
        run.log_artifact(tmp_path / "folder", "kept")
        run.log_dataset("scenes", Path("data/scenes"), MD5)
        run.log_dataset("captions", Path("captions.json"), "sha256:" + "0" * 64)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == parent
    assert found.info.experiment_id == client.get_run(parent).info.experiment_id
    assert found.data.params["stage"] == "align"
    assert len(found.data.params["big"]) == 6000
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert [a.path for a in client.list_artifacts(run.run_id, "kept")] == ["kept/a.txt"]
    inputs = {entry.dataset.name: entry.dataset for entry in found.inputs.dataset_inputs}
    assert (inputs["scenes"].source_type, inputs["scenes"].digest) == ("dvc", MD5)
    assert (inputs["captions"].source_type, len(inputs["captions"].digest)) == ("local", 36)


def test_a_figure_becomes_an_artifact(client: Any) -> None:
    from matplotlib.figure import Figure

    with tracking.start_stage("report", "", {}, {}) as run:
        run.log_figure(Figure(), "figures/loss.png")
    assert [a.path for a in client.list_artifacts(run.run_id, "figures")] == ["figures/loss.png"]


def test_the_run_of_the_environment_is_adopted_as_parent(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tracking.open_parent_run("of kfp", {})
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another experiment")
    with tracking.start_stage("align", "", {}, {}) as run:
        pass
    found = client.get_run(run.run_id)
    assert run.run_id != parent
    assert found.data.tags["mlflow.parentRunId"] == parent
    assert found.info.experiment_id == client.get_run(parent).info.experiment_id
    assert client.get_run(parent).info.status == "RUNNING"


@pytest.mark.parametrize(
    ("fault", "status", "note"),
    [(ValueError("bad loss"), "FAILED", "ValueError: bad loss"), (KeyboardInterrupt(), "KILLED", "interrupted")],
)
def test_a_stage_that_ends_badly_says_so(client: Any, fault: BaseException, status: str, note: str) -> None:
    seen = []

    def stage() -> None:
        with tracking.start_stage("align", "", {}, {}) as run:
            seen.append(run.run_id)
            raise fault

    with pytest.raises(type(fault)):
        stage()
    found = client.get_run(seen[0])
    assert found.info.status == status
    assert found.data.tags["mlflow.note.content"] == note


def test_a_continued_pipeline_reopens_its_run(client: Any) -> None:
    run_id = tracking.open_parent_run("pipeline", {})
    tracking.resume_run(run_id).close("FAILED", "a step failed")
    assert client.get_run(run_id).info.status == "FAILED"
    assert tracking.open_parent_run("pipeline", {}, run_id) == run_id
    assert client.get_run(run_id).info.status == "RUNNING"


def test_work_that_was_cut_off_goes_on_in_its_own_run(client: Any, tmp_path: Path) -> None:
    memo = tmp_path / "work" / "mlflow.json"
    with contextlib.suppress(ValueError), tracking.start_stage("align", "", {"a": 1}, {}, memo) as run:
        assert run.last_step("loss") == 0
        run.log_metrics({"loss": 2.0}, 1)
        run.log_metrics({"loss": 1.0}, 2)
        raise ValueError("cut off")
    with tracking.start_stage("align", "", {"a": 2}, {}, memo) as again:  # with other workers, say
        assert again.run_id == run.run_id
        assert client.get_run(run.run_id).info.status == "RUNNING"
        assert again.last_step("loss") == 2
        again.log_metrics({"loss": 0.5}, 3)
    found = client.get_run(run.run_id)
    assert (found.info.status, found.data.params) == ("FINISHED", {"a": "1"})
    assert "mlflow.note.content" not in found.data.tags
    assert [point.step for point in client.get_metric_history(run.run_id, "loss")] == [1, 2, 3]


@pytest.mark.parametrize("known", ["0" * 32, ""], ids=["of another store", "deleted"])
def test_a_run_that_is_gone_is_begun_anew(client: Any, tmp_path: Path, known: str) -> None:
    memo = tmp_path / "mlflow.json"
    if not known:
        known = tracking.open_parent_run("align", {})
        client.delete_run(known)
    write_json(memo, {"mlflow_run_id": known})
    with tracking.start_stage("align", "", {}, {}, memo) as run:
        assert run.run_id not in ("", known)
    assert read_json(memo) == {"mlflow_run_id": run.run_id}
    assert tracking.open_parent_run("pipeline", {}, known) not in ("", known)


def test_artifacts_lie_beside_the_database_whatever_the_working_folder(client: Any, store: str) -> None:
    location = client.get_experiment_by_name("locvlm").artifact_location
    assert location == Path(store.removeprefix("sqlite:///")).with_name("mlartifacts").as_uri()


def test_a_relative_path_is_made_absolute_and_plain_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("mlruns", "file:///tmp/mlruns"):
        with pytest.raises(TrackingError, match="sqlite:////absolute/path"):
            tracking.initialise(uri)
    with pytest.raises(TrackingError, match="the path of a file"):
        tracking.initialise("sqlite:///")
    (tmp_path / "notes.db").write_text("this is no database, only some text that is long enough" * 9)
    with pytest.raises(TrackingError, match=r"notes\.db.*mlflow db upgrade"):
        tracking.initialise("sqlite:///notes.db")


def test_an_unset_uri_is_told_to_whoever_needs_one() -> None:
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI is not set"):
        tracking.connect()


def test_a_dead_server_is_one_message_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    began = time.monotonic()
    told = pytest.raises(TrackingError, match=r"talking to MLflow at http://127\.0\.0\.1:9: ")
    with told as caught, tracking.start_stage("align", "", {}, {}):
        pytest.fail("the stage must not begin")
    assert "secret" not in str(caught.value).split(": ")[0]
    assert time.monotonic() - began < 20


class Flaky:
    """A client whose server is away at first."""

    def __init__(self, n_failures: int) -> None:
        self.n_failures = n_failures
        self.stored: list[tuple[str, int]] = []
        self.status = ""

    def log_batch(self, run_id: str, metrics: list[Any], synchronous: bool) -> None:
        if self.n_failures:
            self.n_failures -= 1
            raise ConnectionError("connection refused")
        self.stored += [(metric.key, metric.step) for metric in metrics]

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status = status


def test_metrics_wait_for_a_server_that_is_away_and_lose_no_value(caplog: pytest.LogCaptureFixture) -> None:
    client = Flaky(n_failures=1)
    run = tracking.MlflowTracker(client, "http://server", "run")
    run.log_metrics({"loss": 2.0}, 1)
    assert "connection refused" in caplog.text
    run.log_metrics({"loss": 1.0}, 2)  # too early for another try
    assert client.stored == []
    run.close("FINISHED")
    assert client.stored == [("loss", 1), ("loss", 2)]
    assert client.status == "FINISHED"


def test_metrics_that_never_arrive_are_counted_aloud(caplog: pytest.LogCaptureFixture) -> None:
    client = Flaky(n_failures=9)
    run = tracking.MlflowTracker(client, "http://server", "run")
    run.log_metrics({"loss": 2.0}, 1)
    run.close("FINISHED")
    assert "1 metric values never reached http://server" in caplog.text


def test_a_stage_waits_at_its_end_and_fails_when_the_server_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_PATIENCE", 0.05)
    client = Flaky(n_failures=2)
    run = tracking.MlflowTracker(client, "http://server", "run")
    run.log_metrics({"loss": 2.0}, 1)
    run.deliver()
    assert client.stored == [("loss", 1)]
    client.n_failures = 10**9
    run.log_metrics({"loss": 1.0}, 2)
    with pytest.raises(TrackingError, match=r"recording 1 values that were kept while it was away: .*refused"):
        run.deliver()


RACE = """
import multiprocessing
import mlflow
from locvlm import tracking

def work(name, gate):
    gate.wait()
    with tracking.start_stage(name, "", {"a": 1}, {}) as run:
        for step in range(20):
            run.log_metrics({"loss": step}, step)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(3)
    started = [context.Process(target=work, args=(name, gate)) for name in "abc"]
    for process in started:
        process.start()
    for process in started:
        process.join()
    raise SystemExit(max(process.exitcode for process in started))
"""


def test_three_processes_may_make_the_same_new_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run([sys.executable, "-c", RACE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    client = tracking.connect(uri)
    runs = client.search_runs([client.get_experiment_by_name("locvlm").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["a", "b", "c"]
    assert all(len(client.get_metric_history(run.info.run_id, "loss")) == 20 for run in runs)
