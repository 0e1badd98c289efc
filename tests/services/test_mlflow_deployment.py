"""The MLflow server exactly as k8s/ starts it (commands, settings, auth file) on a real PostgreSQL and an S3 server."""

import json
import os
import time
from pathlib import Path

import pytest

from locvlm import tracking
from tests.deployment import ADMIN_PASSWORD, BUCKET, Deployment, needs_postgres, s3_client
from tests.rendered import named

pytestmark = [pytest.mark.slow, needs_postgres]

SEARCH = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"


def test_the_server_asks_for_a_password_and_answers_only_to_its_own_names(deployment: Deployment) -> None:
    assert deployment.get("/health", host="any.example.org") == 200
    assert deployment.get(SEARCH) == 401
    assert deployment.get(SEARCH, password="wrong-password") == 401
    assert deployment.get(SEARCH, password=ADMIN_PASSWORD) == 200
    for name in ("mlflow", "mlflow.locvlm.svc", "mlflow.locvlm.svc.cluster.local"):
        assert deployment.get(SEARCH, host=f"{name}:{deployment.port}", password=ADMIN_PASSWORD) == 200
    assert deployment.get(SEARCH, host="any.example.org", password=ADMIN_PASSWORD) == 403


POINTS = [
    {"loss": 2.5, "learning_rate": 1e-3, "gradient_norm": 1.5, "tokens": 1000.0, "seconds": 10.0},
    {"loss": 1.5, "learning_rate": 5e-4, "gradient_norm": 0.5, "tokens": 3000.0, "seconds": 20.0},
]


def test_a_run_with_its_artifact_goes_through_without_s3_keys_and_the_dashboard_draws_it(
    deployment: Deployment, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg2

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in deployment.client.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "curve.jsonl").write_text("{}\n")
    client = tracking.connect()
    run = client.create_run(client.create_experiment("deployed"), run_name="instruct")
    tracker = tracking.MlflowTracker(client, os.environ["MLFLOW_TRACKING_URI"], run.info.run_id)
    for step, point in enumerate(POINTS):
        tracker.log_metrics(point, step)
    tracker.log_artifact(tmp_path / "curve.jsonl")
    tracker.close("FINISHED")
    keys = [item["Key"] for item in s3_client(s3_endpoint).list_objects_v2(Bucket=BUCKET, Prefix="mlflow/")["Contents"]]
    assert [key for key in keys if key.endswith(f"{run.info.run_id}/artifacts/curve.jsonl")]

    values = {name.lower().replace("pg", "", 1): value for name, value in deployment.database.client.items()}
    name, drawn = f"instruct {run.info.run_id[:6]}", {}
    with psycopg2.connect(dbname="mlflow", **values) as connection, connection.cursor() as cursor:
        dashboard = json.loads(named("on-prem", "ConfigMap", "locvlm-dashboard")["data"]["locvlm-training.json"])
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                if "rawSql" in target:
                    now = int(time.time())
                    text = target["rawSql"].replace("$__unixEpochFrom()", str(now - 600))
                    cursor.execute(text.replace("$__unixEpochTo()", str(now + 60)))
                    found = [(row[1], row[2]) for row in cursor.fetchall()]
                    drawn[panel["title"]] = [row for row in found if row[0] == name]  # others use the server too
    assert drawn == {
        "Loss per supervised token": [(name, 2.5), (name, 1.5)],
        "Tokens per second": [(name, 200.0)],
        "Gradient norm": [(name, 1.5), (name, 0.5)],
        "Learning rate": [(name, 1e-3), (name, 5e-4)],
    }


def test_no_password_is_in_the_servers_log_or_on_its_command_line(deployment: Deployment) -> None:
    import psutil

    assert deployment.process is not None
    process = psutil.Process(deployment.process.pid)
    lines = [" ".join(part.cmdline()) for part in (process, *process.children(recursive=True))]
    said = deployment.log.read_text() + "\n".join(lines)
    assert "basic-auth" in said
    assert "planted" not in said
