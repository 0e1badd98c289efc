"""The backup of MLflow's database and its way back, with the very commands of docs/runbook.md."""

import re
import subprocess
from pathlib import Path

import pytest

from locvlm import tracking
from locvlm.registry.champion import PROMOTED, Change, crown, history
from tests.conftest import REPOSITORY
from tests.deployment import USER, Database, needs_postgres

pytestmark = [pytest.mark.slow, needs_postgres]


def command(program: str) -> str:
    """What the runbook has the database's pod do."""
    text = (REPOSITORY / "docs" / "runbook.md").read_text()
    (found,) = re.findall(rf"exec (?:-i )?postgres-0 -- sh -c '({program} [^']*)'", text)
    return str(found)


def test_runs_models_and_the_champion_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database()
    try:
        for name, value in (database.client | {"POSTGRES_USER": USER}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2:///mlflow")
        monkeypatch.chdir(tmp_path)
        client = tracking.connect(tracking.initialise("postgresql+psycopg2:///mlflow"))
        with tracking.start_stage("align", "", {"seed": 1}, {}) as run:
            run.log_metrics({"loss": 0.5}, 7)
        client.create_registered_model("kept")
        version = client.create_model_version("kept", f"runs:/{run.run_id}/model", run.run_id)
        crown(client, "kept", Change(str(version.version), "", PROMOTED, "a test", "first"))
        dump = subprocess.run(["sh", "-c", command("pg_dump")], capture_output=True, check=True).stdout
        client.delete_registered_model("kept")
        client.delete_run(run.run_id)
        client.create_registered_model("later")
        subprocess.run(["sh", "-c", command("pg_restore")], input=dump, capture_output=True, check=True)
        assert client.get_model_version_by_alias("kept", "champion").run_id == run.run_id
        assert [change.reason for change in history(client, "kept")] == ["first"]
        found = client.get_run(run.run_id)
        assert (found.info.lifecycle_stage, found.data.metrics, found.data.params) == (
            "active",
            {"loss": 0.5},
            {"seed": "1"},
        )
        assert [model.name for model in client.search_registered_models()] == ["kept"]
    finally:
        database.remove()
