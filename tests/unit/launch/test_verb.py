"""`locvlm launch`."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from locvlm.cli import launch as group
from locvlm.errors import LaunchError
from locvlm.launch import connect
from tests.api_server import POLL, Cluster
from tests.crds import crd_faults

MAIN = """
import argparse, sys
from locvlm.cli import launch as verb
from locvlm.errors import LocVLMError
assert not {"kubernetes", "torch", "ray"} & set(sys.modules)
parser = argparse.ArgumentParser()
verb.add_verbs(parser.add_subparsers())
args = parser.parse_args(sys.argv[1:])
try:
    args.run(args)
except LocVLMError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def locvlm_launch(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "KUBECONFIG": "/nonexistent/config", **environment}
    return subprocess.run([sys.executable, "-c", MAIN, "launch", *words], capture_output=True, text=True, env=env)


def test_the_verb_runs_a_job_through_a_kubeconfig_and_writes_a_receipt(cluster: Cluster, tmp_path: Path) -> None:
    receipt = tmp_path / "receipt.json"
    words = ["--name", "try-1", "--image", "locvlm:7", "--poll-seconds", str(POLL), "--receipt", str(receipt), "--"]
    done = locvlm_launch(
        *words,
        "config",
        "--preset",
        "tiny",
        KUBECONFIG=cluster.kubeconfig(tmp_path),
        MLFLOW_RUN_ID="r9",
        LOCVLM_LINEAGE="20260101-000000-ab",
    )
    assert (done.returncode, done.stdout) == (0, "hello\nstep 1 loss 2.5\ndone\n"), done.stderr
    written = json.loads(receipt.read_text())
    assert (written["image"], written["entrypoint"]) == ("locvlm:7", "locvlm config --preset tiny")
    job = cluster.jobs["try-1"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    env = {entry["name"]: entry["value"] for entry in head["spec"]["containers"][0]["env"]}
    assert (env["MLFLOW_RUN_ID"], env["LOCVLM_RAY_JOB"]) == ("r9", "try-1")
    assert env["LOCVLM_LINEAGE"] == "20260101-000000-ab"
    for part in (job, head, job["spec"]["submitterPodTemplate"]):
        assert part["metadata"]["labels"]["locvlm/lineage"] == "20260101-000000-ab"


def test_without_a_cluster_the_verb_says_so_and_exits_with_2() -> None:
    done = locvlm_launch("--name", "try-1", "--", "config", "--preset", "tiny")
    assert done.returncode == 2
    assert "neither a pod's service account nor a usable kubeconfig" in done.stderr
    assert "Traceback" not in done.stderr


def verb(*words: str) -> None:
    parser = argparse.ArgumentParser()
    group.add_verbs(parser.add_subparsers())
    args = parser.parse_args(["launch", *words])
    args.run(args)


def test_a_dry_run_prints_the_job_and_needs_no_cluster(schemas: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb("--name", "try-1", "--workers", "2", "--dry-run", "--", "config", "--set", "name=a b")
    job = yaml.safe_load(capsys.readouterr().out)
    assert crd_faults(schemas, job) == []
    assert job["spec"]["entrypoint"] == "locvlm config --set 'name=a b'"
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2


@pytest.mark.parametrize("command", [["trian"], ["config", "--presett", "tiny"]])
def test_a_wrong_inner_command_is_told_before_anything_is_submitted(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        verb("--name", "try-1", "--", *command)
    assert caught.value.code == 2
    assert command[-2 if len(command) > 1 else 0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "try-1", "--", "launch"], "launching a launch"),
        (["--name", "try-1", "--workers", "0", "--", "config"], "--workers is 0"),
        (["--name", "try-1", "--deadline-minutes", "-5", "--", "config"], "--deadline-minutes is -5"),
        (["--name", "try-1", "--template", "/nonexistent.yaml", "--", "config"], "reading the job template"),
        (["--name", "Try_1", "--dry-run", "--", "config"], "must be lower-case"),
    ],
)
def test_a_wrong_option_is_a_launch_error(words: list[str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        verb(*words)


def test_inside_a_cluster_the_service_account_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    (tmp_path / "token").write_text("secret-token")
    (tmp_path / "ca.crt").write_text("certificate")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    from kubernetes import client

    monkeypatch.setattr(client, "ApiClient", lambda configuration: configuration)
    configuration = connect()
    assert configuration.host == "https://10.0.0.1:443"
    assert configuration.api_key == {"authorization": "bearer secret-token"}


SITE = """
spec: {rayClusterSpec: {headGroupSpec: {template: {spec: {nodeSelector: {pool: ours}}}}}}
"""


def test_what_the_cluster_says_about_its_jobs_is_merged_unless_a_file_is_given(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.config_map = {"kind": "ConfigMap", "data": {"ray-job.yaml": SITE}}
    (tmp_path / "site.yaml").write_text(SITE.replace("ours", "theirs"))
    config = cluster.kubeconfig(tmp_path)
    for options, pool in (([], "ours"), (["--site", str(tmp_path / "site.yaml")], "theirs")):
        cluster.jobs.clear()
        words = ["--name", "try-1", "--poll-seconds", str(POLL), *options, "--", "config", "--preset", "tiny"]
        done = locvlm_launch(*words, KUBECONFIG=config)
        assert done.returncode == 0, done.stderr
        head = cluster.jobs["try-1"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert head["nodeSelector"]["pool"] == pool
    assert cluster.count("GET", "configmaps/locvlm-ray-job") == 1


def test_a_cluster_that_does_not_let_its_job_settings_be_read_says_what_is_missing(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.refuse["GET locvlm-ray-job"] = [(403, "forbidden")]
    done = locvlm_launch("--name", "try-1", "--", "config", KUBECONFIG=cluster.kubeconfig(tmp_path))
    assert done.returncode == 2
    assert "reading the ConfigMap locvlm-ray-job in namespace locvlm" in done.stderr
    assert "k8s/base/rbac.yaml" in done.stderr
    assert cluster.jobs == {}
