"""`locvlm doctor` against real services: an S3 server, and MLflow with users on PostgreSQL."""

import subprocess
import sys
from pathlib import Path

import pytest

from locvlm import doctor
from tests.deployment import Deployment, needs_postgres, s3_client
from tests.pipelines import kfp_server

pytestmark = pytest.mark.slow

DVC = str(Path(sys.executable).with_name("dvc"))


def test_an_object_goes_to_s3_and_is_gone_again(s3_server: str) -> None:
    client = s3_client(s3_server)
    client.create_bucket(Bucket="examined")
    check = doctor.check_storage("s3://examined/runs/")
    assert (check.state, check.found) == ("ok", "an object was written, read and deleted")
    assert client.list_objects_v2(Bucket="examined")["KeyCount"] == 0
    missing = doctor.check_storage("s3://nowhere/runs")
    assert missing.state == "failed"
    assert missing.mend == "make the bucket of s3://nowhere/runs, or correct the address"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "set AWS_ENDPOINT_URL to the store's address"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_store_that_is_away_or_wants_a_key_is_told(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, str], words: str
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no credentials of whoever runs the tests
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    check = doctor.check_storage("s3://examined/runs")
    assert check.state == "failed"
    assert words in check.mend


def test_a_data_version_is_found_in_s3_once_it_was_pushed(s3_server: str, tmp_path: Path) -> None:
    s3_client(s3_server).create_bucket(Bucket="versions")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    place = "s3://versions/locvlm"
    for command in (
        ["init", "--quiet", "--no-scm"],
        ["remote", "add", "--quiet", "-d", "store", place],
        ["add", "--quiet", "data"],
    ):
        subprocess.run([DVC, *command], cwd=tmp_path, check=True)
    pin = str(tmp_path / "data.dvc")
    assert doctor.check_data(pin).mend == "`dvc push` it from where the data is"
    subprocess.run([DVC, "push", "--quiet"], cwd=tmp_path, check=True)
    check = doctor.check_data(pin)
    assert (check.state, check.found.split(" has ")[0]) == ("ok", place)
    assert doctor.check_data(pin, "s3://versions/elsewhere").state == "failed"


@needs_postgres
def test_mlflow_is_asked_as_our_user_and_under_the_name_that_jobs_use(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in deployment.client.items():
        monkeypatch.setenv(name, value)
    uri = deployment.client["MLFLOW_TRACKING_URI"]
    good, name = doctor.check_mlflow(uri, f"mlflow.locvlm.svc:{deployment.port}")
    assert (good.state, name.state) == ("ok", "ok")
    assert "experiment" in good.found
    trap = list(doctor.check_mlflow(uri, "mlflow.elsewhere.svc:5000"))[1]
    assert trap.state == "failed"
    assert trap.found == "jobs reach it as mlflow.elsewhere.svc:5000, and it answers that name 403"
    assert trap.mend == "start the server with --allowed-hosts that lists mlflow.elsewhere.svc:5000"
    (refused,) = doctor.check_mlflow(uri.replace("127.0.0.1", "mlflow.localhost"))
    assert "403" in refused.found or "resolve" in refused.found
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-wrong-password")
    (stranger,) = doctor.check_mlflow(uri)
    assert stranger.mend == "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    assert "planted" not in stranger.found


def test_kfp_answers_and_another_server_is_not_taken_for_it(s3_server: str, schemas: Path) -> None:
    with kfp_server.serving(schemas / "kfp" / "kfp_api_v2beta1.swagger.json") as kfp:
        assert doctor.check_kfp(kfp.url).state == "ok"
        assert doctor.check_kfp(f"{kfp.url}/elsewhere").state == "failed"
    assert doctor.check_kfp(s3_server).state == "failed"
