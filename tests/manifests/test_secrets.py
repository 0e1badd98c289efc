"""A secret that the environment holds is nowhere afterwards: not in a manifest, a job, a parameter, a log or a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api_server import SUCCEEDED, Cluster, serving
from tests.pipelines import kfp_server
from tests.rendered import K8S, OVERLAYS, REPOSITORY, objects, ray_job

PLANTED = "planted-9f2c-secret"
SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "PGPASSWORD",
    "RAY_AUTH_TOKEN",
)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a step that has every secret, at work in `tmp_path`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    secrets = {name: f"{PLANTED}-{name}" for name in SECRETS}
    return {"PATH": path, "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY), "MLFLOW_RUN_ID": "r1", **secrets}


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What the command says, on both streams."""
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout + done.stderr


def written(folder: Path) -> str:
    """Everything in the files below `folder`, with their names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "kubeconfig")
    return "\n".join(f"{path}\n{path.read_bytes().decode(errors='replace')}" for path in paths)


def kubeconfig(folder: Path, cluster: Cluster) -> str:
    server = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{cluster.port}"}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
    user = {"name": "u", "user": {"token": cluster.token}}
    config = {"clusters": [server], "contexts": [context], "current-context": "x", "users": [user]}
    (folder / "kubeconfig").write_text(json.dumps(config))
    return str(folder / "kubeconfig")


# as a pipeline step does it: the verb through run_step, with a log of its own
STEP = """
from locvlm.cli.steps import run_step
run_step(["train", "--stage", "align", "--config", "c.yaml", "--images", "i", "--data", "a=b", "--output", "o"],
         log="logs/train.log", runner="kuberay", image="locvlm:test")
"""


@pytest.mark.parametrize("ends", ["well", "badly", "refused"])
def test_a_launched_step_leaves_no_secret_behind(
    ends: str, tmp_path: Path, environment: dict[str, str], schemas: Path
) -> None:
    with serving(schemas) as cluster:
        cluster.token = f"{PLANTED}-kube"
        cluster.script = [SUCCEEDED]
        if ends == "badly":
            cluster.script = [{"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 1"}]
        elif ends == "refused":
            cluster.refuse["POST rayjobs"] = [(403, "forbidden")]
        environment["KUBECONFIG"] = kubeconfig(tmp_path, cluster)
        said = run([sys.executable, "-c", STEP], tmp_path, environment)
        sent = json.dumps([cluster.jobs, cluster.requests])
    assert ("exit code" in said) == (ends != "well"), said
    assert cluster.count("POST", "rayjobs") == 1, said
    assert (ends == "refused") != bool(cluster.jobs)
    assert "r1" in sent or ends == "refused"  # what is meant to travel does
    logs = written(tmp_path)
    assert "$ locvlm launch" in logs
    for place in (said, sent, logs):
        assert PLANTED not in place


def test_no_secret_of_the_caller_gets_into_a_printed_job_or_a_compiled_pipeline(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    launch = [sys.executable, "-m", "locvlm", "launch", "--name", "try-1", "--dry-run", "--", "config"]
    said = run(launch, tmp_path, environment)
    assert "kind: RayJob" in said, said
    said += run(
        [sys.executable, "-m", "workflows.compile", "--output", str(tmp_path / "packages")], tmp_path, environment
    )
    assert list((tmp_path / "packages").glob("*.yaml")), said
    assert PLANTED not in said + written(tmp_path)


def test_no_secret_of_the_caller_gets_into_a_rendered_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, PLANTED)
    objects.cache_clear()
    rendered = json.dumps([[objects(overlay), ray_job(overlay)] for overlay in OVERLAYS])
    objects.cache_clear()
    assert PLANTED not in rendered
    assert PLANTED not in written(K8S)


# as the steps of a pipeline do it: a run with its lineage in MLflow, a model with its figures, a look at everything
TRACKED = """
import json, os
from pathlib import Path
from locvlm.cli import main
from locvlm.cli.steps import run_step
from locvlm.config import dump_config
from locvlm.presets import preset
run_step(["begin", "--root", "run", "--kfp-run", "k1", "--tag", "code=c"], log="run/logs/begin.log")
Path("run/models/locvlm").mkdir(parents=True)
Path("run/models/locvlm/locvlm.yaml").write_text(dump_config(preset("tiny")))
figures = {"accuracy": {"value": 0.5, "n": 1, "low": 0.0, "high": 1.0}}
metrics = {"format": 1, "task": "coco-spatial", "n": 1, "figures": figures, "items": {}}
Path("run/m.json").write_text(json.dumps(metrics))
argv = ["register", "--model", "run/models/locvlm", "--metrics", "run/m.json", "--output", "run/register.json"]
run_step(argv, log="run/logs/register.log")
main(["lineage", "1"])
os.environ["MLFLOW_TRACKING_URI"] = f"http://user:{os.environ['MLFLOW_TRACKING_PASSWORD']}@127.0.0.1:9"
main(["doctor", "--preset", "tiny", "--storage", "s3://nowhere/x", "--kfp", "http://127.0.0.1:9"])
try:
    run_step(["promote", "--version", "1", "--output", "run/decision.json"], log="run/logs/promote.log")
except RuntimeError as failure:
    print(failure)
"""


def test_no_secret_gets_into_a_log_a_run_or_a_tag(tmp_path: Path, environment: dict[str, str]) -> None:
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    environment["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    environment.pop("MLFLOW_RUN_ID")
    said = run([sys.executable, "-c", TRACKED], tmp_path, environment)
    assert "locvlm version 1 (challenger)" in said, said
    assert "FAILED  storage s3://nowhere/x" in said
    assert "talking to MLflow at http://127.0.0.1:9" in said
    kept = written(tmp_path)
    assert "$ locvlm promote" in kept
    assert (tmp_path / "mlflow.db").stat().st_size > 100_000
    assert PLANTED not in said
    assert PLANTED not in kept


def test_no_secret_is_sent_to_kfp(tmp_path: Path, environment: dict[str, str], schemas: Path) -> None:
    with kfp_server.serving(schemas / "kfp" / "kfp_api_v2beta1.swagger.json") as kfp:
        submit = [sys.executable, "-m", "workflows.submit", "--endpoint", kfp.url, "--token", f"{PLANTED}-token"]
        said = run([*submit, "--preset", "tiny"], tmp_path, environment)
        said += run(
            [*submit, "--preset", "tiny", "--schedule", "0 3 * * *", "--dvc-file", "d.dvc", "--dvc-remote", "s3://b/x"],
            tmp_path,
            environment,
        )
        sent = json.dumps([kfp.runs, kfp.schedules])
    assert (len(kfp.runs), len(kfp.schedules), kfp.faults) == (1, 1, []), said
    assert "locvlm-mlflow" in sent  # the secret's name travels, as it should
    for place in (said, sent, written(tmp_path)):
        assert PLANTED not in place
