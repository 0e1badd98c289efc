"""The whole pipeline on real servers, killed at five places without a chance to clean up, and started again each time.

MLflow on PostgreSQL with basic auth, its artifacts and the DVC remote on S3, the steps by KFP's local runner, training
and asking as RayJobs: the operator of `tests.kuberay` runs them on a Ray head in processes of its own. What comes out
is held against a run that nobody disturbed, on this machine and without Ray.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from locvlm import tracking
from locvlm.cli import main
from tests.deployment import ADMIN_PASSWORD, BUCKET, Deployment, needs_postgres, s3_client
from tests.kuberay import Operator, RayHead, operating
from tests.rendered import REPOSITORY, site

pytestmark = [pytest.mark.slow, needs_postgres, pytest.mark.timeout(1800)]

STEPS = 10
MODELS = ("align", "locvlm", "baseline")
SETTINGS = [
    *(
        f"stages.{stage}.{setting}"
        for stage in ("align", "instruct")
        for setting in (f"steps={STEPS}", "global_batch=4")
    ),
    "cluster.checkpoint_every=2",
    "cluster.log_every=1",
    "gate.must_beat_floor=[]",  # nobody learns anything in ten steps
]
FOLLOWING = "is there already (Running, RUNNING), following it"
DONE_MEANWHILE = "is there already (Complete, SUCCEEDED), following it"


class Pipeline:
    """`python -m workflows.run_local` with the same options, start after start."""

    def __init__(self, folder: Path, environment: dict[str, str], *options: str) -> None:
        self.runs, self.log, self.environment = folder / "runs", folder / "log", environment
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        self.command = [sys.executable, "-m", "workflows.run_local", "--runs", str(self.runs), "--questions", "8"]
        self.command += [*settings, *options]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> Path:
        return next(self.runs.glob("tiny-*"), self.runs / "none")

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=REPOSITORY, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds; the process has to be alive, if one was started."""
        deadline = time.monotonic() + 400
        while not condition():
            alive = self.process is None or self.process.poll() is None
            assert alive, f"it ended too early:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"it never came so far:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.005)

    def kill(self) -> None:
        """The process and all its children at once."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def finish(self) -> None:
        assert self.process is not None
        assert self.process.wait(400) == 0, self.log.read_text()[-5000:]

    def said(self, step: str) -> str:
        """The log of a step."""
        return text(self.root / "logs" / f"{step}.log")

    def n_trained(self, model: str) -> int:
        """How many steps of an unfinished training are on the curve."""
        return text(self.root / "models" / f".{model}.training" / "curve.jsonl").count("\n")


@dataclass(frozen=True)
class Story:
    """What happened. `root`: the run that was killed; `straight`: the one that was not."""

    root: Path
    straight: Path
    pipeline: Pipeline
    operator: Operator
    tracked: dict[str, str]
    head: RayHead

    def made(self) -> dict[str, tuple[int, int]]:
        """Step -> how often its RayJob was created, and how many Ray jobs that took."""
        operator = self.operator
        return {
            re.sub(r"^locvlm-|-[0-9a-f]{10}$", "", name): (n, len(operator.tries[name]))
            for name, n in operator.made.items()
        }


def text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def environment_of(folder: Path, **more: str) -> dict[str, str]:
    foreign = ("MLFLOW_", "LOCVLM_", "AWS_", "RAY_", "KUBE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "HOME": str(folder), "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1", **more}


def storage(endpoint: str) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": endpoint, **keys}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    sizes = ["--n-train", "40", "--n-test", "8", "--seed", "0"]
    assert main(["data", "scenes", "--output", str(folder), "--shards", *sizes]) == 0
    return folder


@pytest.fixture(scope="module")
def pushed(scenes: Path, s3_endpoint: str) -> tuple[str, str]:
    """The scenes in a DVC remote on S3: the remote and the version."""
    s3_client(s3_endpoint).create_bucket(Bucket="scenes")
    remote, folder = "s3://scenes/dvc", scenes.parent
    (folder / ".dvc").mkdir()
    config = f"[core]\n    no_scm = true\n    remote = s3\n['remote \"s3\"']\n    url = {remote}\n"
    (folder / ".dvc" / "config").write_text(config)
    environment = environment_of(folder, **storage(s3_endpoint))
    for words in (["add", "--quiet", "scenes"], ["push", "--quiet"]):
        command = [str(Path(sys.executable).with_name("dvc")), *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return remote, yaml.safe_load((folder / "scenes.dvc").read_text())["outs"][0]["md5"]


@pytest.fixture(scope="module")
def story(
    deployment: Deployment,
    s3_endpoint: str,
    scenes: Path,
    pushed: tuple[str, str],
    schemas: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("straight")
    options = ["--scenes", str(scenes), "--n-train", "40", "--n-test", "8", "--set", "cluster.num_workers=0"]
    straight = Pipeline(folder, environment_of(folder), *options)
    straight.start()
    straight.finish()

    folder = tmp_path_factory.mktemp("killed")
    tracked, keys = deployment.client, storage(s3_endpoint)
    secrets = {name: value for name, value in tracked.items() if name != "MLFLOW_TRACKING_URI"} | keys
    with operating(schemas, secrets) as (operator, head):
        operator.config_map = {"data": {"ray-job.yaml": site_here(tracked["MLFLOW_TRACKING_URI"])}}
        environment = environment_of(folder, KUBECONFIG=operator.kubeconfig(folder), **tracked, **keys)
        remote, version = pushed
        options = ["--runner", "kuberay", "--dvc-remote", remote, "--data-md5", version]
        options += ["--captions", "captions_train.json"]
        pipeline = Pipeline(folder, environment, *options, "--set", "cluster.num_workers=1")
        try:
            tell(pipeline, operator, head)
        finally:
            if pipeline.process is not None and pipeline.process.poll() is None:
                pipeline.kill()
        assert operator.faults == []
        yield Story(pipeline.root, straight.root, pipeline, operator, tracked, head)


def site_here(uri: str) -> str:
    """What the overlay for one machine says of jobs, and where MLflow is."""
    part = yaml.safe_load(site("local"))
    cluster = part["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        group["template"]["spec"]["containers"][0]["env"] = [{"name": "MLFLOW_TRACKING_URI", "value": uri}]
    return str(yaml.safe_dump(part))


def tell(pipeline: Pipeline, operator: Operator, head: RayHead) -> None:
    """Five kills, and a run to the end."""

    def state(step: str) -> str:
        return next((operator.state(job) for job in operator.made if job.startswith(f"locvlm-{step}-")), "")

    # 1: while data is built
    pipeline.start()
    pipeline.wait_for(lambda: "$ locvlm data generic" in pipeline.said("build-generic"))
    pipeline.wait_for(lambda: any((pipeline.root / "data").glob("*generic*")))  # under its temporary name
    pipeline.kill()

    # 2: while align trains. Its job is left alone; that it is still under way when the next start finds it, its worker
    # is held
    pipeline.start()
    pipeline.wait_for(lambda: pipeline.n_trained("align") >= 2)
    workers = head.processes("RayTrainWorker")
    assert workers
    for worker in workers:
        worker.suspend()
    pipeline.kill()
    pipeline.start()
    pipeline.wait_for(lambda: FOLLOWING in pipeline.said("train-align"))
    for worker in workers:
        worker.resume()

    # 3: while the LocVLM arm trains, and its job's own process with it; the operator's second try ends before the next
    # start
    pipeline.wait_for(lambda: pipeline.n_trained("locvlm") >= 3)
    drivers = head.processes("train --stage instruct", f"{pipeline.root}/models/locvlm")
    assert drivers
    for driver in drivers:
        driver.kill()
    pipeline.kill()
    pipeline.wait_for(lambda: state("train-locvlm") == "Complete")

    # 4: while questions are asked
    pipeline.start()
    pipeline.wait_for((pipeline.root / "predictions" / "locvlm").exists)
    pipeline.kill()

    # 5: between register and promote
    pipeline.start()
    pipeline.wait_for((pipeline.root / "register.json").is_file)
    pipeline.kill()
    assert not (pipeline.root / "decision.json").exists()

    pipeline.start()
    pipeline.finish()


def test_no_job_is_made_twice_and_a_killed_one_goes_on_from_its_checkpoint(story: Story) -> None:
    assert story.made() == {
        "train-align": (1, 1),
        "train-locvlm": (1, 2),
        "train-baseline": (1, 1),
        "predict-locvlm": (1, 1),
        "predict-baseline": (1, 1),
    }
    second = next(tries for name, tries in story.operator.tries.items() if "train-locvlm" in name)[1]
    said = "\n".join(story.operator.log[second])
    assert "continuing the run in" in said
    attempts = rows(story.root / "models" / "locvlm" / "attempts.jsonl")
    assert [attempt["step"] == 0 for attempt in attempts] == [True, False]
    assert f"resuming after step {attempts[1]['step']}" in said
    assert FOLLOWING in story.pipeline.said("train-align")
    assert DONE_MEANWHILE in story.pipeline.said("train-locvlm")


@pytest.mark.parametrize("model", MODELS)
def test_every_step_is_trained_once_and_the_weights_are_those_of_an_undisturbed_run(story: Story, model: str) -> None:
    ours, theirs = story.root / "models" / model, story.straight / "models" / model
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    curve = [{**row, "seconds": 0} for row in rows(ours / "curve.jsonl")]
    assert [row["step"] for row in curve] == list(range(1, STEPS + 1))
    assert curve == [{**row, "seconds": 0} for row in rows(theirs / "curve.jsonl")]
    receipts = [json.loads((folder / "receipt.json").read_text()) for folder in (ours, theirs)]
    assert receipts[0]["attempts"] == (2 if model == "locvlm" else 1)
    same = ("fingerprint", "data", "steps", "tokens", "targets", "conversations", "loss", "kept")
    assert [{key: receipt[key] for key in same} for receipt in receipts] == 2 * [
        {key: receipts[1][key] for key in same}
    ]


def test_data_answers_and_figures_are_those_of_an_undisturbed_run(story: Story) -> None:
    def found(root: Path) -> dict[str, Any]:
        files = [*root.glob("data/*/manifest.json"), *root.glob("predictions/*/*.jsonl"), *root.glob("questions/*/*")]
        content = {str(path.relative_to(root)): path.read_bytes() for path in files if path.is_file()}
        scored = {path: json.loads(path.read_text()) for path in root.glob("predictions/*/*.metrics.json")}
        figures = {str(path.relative_to(root)): (value["figures"], value["items"]) for path, value in scored.items()}
        return {**content, **figures}

    ours = found(story.root)
    assert len([name for name in ours if name.endswith(".metrics.json")]) == 10
    assert ours == found(story.straight)
    assert (story.root / "report" / "report.html").is_file()


def test_there_is_one_version_and_it_is_champion(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracker(story, monkeypatch)
    assert [str(version.version) for version in client.search_model_versions("name = 'locvlm'")] == ["1"]
    assert {alias: str(at) for alias, at in client.get_registered_model("locvlm").aliases.items()}["champion"] == "1"
    decision = json.loads((story.root / "decision.json").read_text())
    assert (decision["version"], decision["promoted"]) == ("1", True)


def test_mlflow_has_one_run_a_stage_with_every_point_once(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracker(story, monkeypatch)
    parent = json.loads((story.root / "run.json").read_text())["mlflow_run_id"]
    found = client.get_run(parent)
    nested = client.search_runs([found.info.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert sorted(run.info.run_name.partition(" ")[0] for run in nested) == sorted([*MODELS, "register"])
    assert {run.info.status for run in [found, *nested]} == {"FINISHED"}
    for run in nested:
        if run.info.run_name in MODELS:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
            assert sorted(steps) == list(range(1, STEPS + 1)), run.info.run_name
            assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} >= {"receipt.json"}


def test_nothing_half_made_is_left_and_no_secret_is_written_down(story: Story) -> None:
    # KFP makes a folder a start; there the kill may have caught a receipt under its temporary name
    made = [path for path in story.root.rglob("*") if "kfp" not in path.relative_to(story.root).parts]
    assert [path for path in made if path.name.startswith(".") or ".partial." in path.name] == []
    for folder in (story.root, story.head.folder / "ray"):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 22:
                assert ADMIN_PASSWORD.encode() not in path.read_bytes(), path


def test_the_weights_of_the_version_are_on_s3(story: Story, s3_endpoint: str) -> None:
    listed = s3_client(s3_endpoint).list_objects_v2(Bucket=BUCKET, Prefix="mlflow/")["Contents"]
    stored = [item for item in listed if item["Key"].endswith("/locvlm/model.safetensors")]
    size = (story.root / "models" / "locvlm" / "model.safetensors").stat().st_size
    assert [item["Size"] for item in stored] == [size]


def tracker(story: Story, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in story.tracked.items():
        monkeypatch.setenv(name, value)
    return tracking.connect()
