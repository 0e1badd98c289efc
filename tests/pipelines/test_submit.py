"""The compiled package goes through KFP's real command line and client to a server that checks what it gets."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.kfp_server import KfpServer, serving
from workflows import submit
from workflows.compile import package

KFP = str(Path(sys.executable).with_name("kfp"))


RETRAIN = ["--dvc-file", "data.dvc", "--dvc-remote", "s3://bucket/data"]


@pytest.fixture
def kfp_server(schemas: Path) -> Iterator[KfpServer]:
    with serving(schemas / "kfp" / "kfp_api_v2beta1.swagger.json") as server:
        yield server


def check_arguments(run: dict[str, Any]) -> None:
    """As the server does: every argument is a parameter of the pipeline, every needed one is given."""
    inputs = run["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    given = run["runtime_config"]["parameters"]
    assert given.keys() <= inputs.keys()
    assert {name for name, spec in inputs.items() if not spec.get("isOptional")} <= given.keys()
    kinds: dict[str, Any] = {"STRING": str, "LIST": list, "STRUCT": dict, "BOOLEAN": bool}
    kinds |= {"NUMBER_INTEGER": (int, float), "NUMBER_DOUBLE": (int, float)}
    for name, value in given.items():
        assert isinstance(value, kinds[inputs[name]["parameterType"]]), name


@pytest.mark.parametrize("verb", ["create", "submit"])
def test_the_plain_kfp_command_submits_the_package(kfp_server: KfpServer, tmp_path: Path, verb: str) -> None:
    command = [
        KFP,
        "--endpoint",
        kfp_server.url,
        "run",
        verb,
        "-e",
        "locvlm",
        "-r",
        "first",
        "-f",
        str(package("image")),
    ]
    values = ["root=/mnt/locvlm/runs/1", "data_root=/mnt/locvlm/data", "images=/mnt/locvlm/images", "seed=3"]
    values += ["preset=locvlm-b", 'overrides=["coordinates.n_bins=112"]']
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([*command, *values], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert kfp_server.faults == []
    (run,) = kfp_server.runs
    assert run["display_name"] == "first"
    assert run["experiment_id"] == "e0"
    assert kfp_server.experiments[0]["display_name"] == "locvlm"
    assert run["runtime_config"]["parameters"]["seed"] == 3
    assert run["runtime_config"]["parameters"]["overrides"] == ["coordinates.n_bins=112"]
    assert set(run["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}
    check_arguments({**run, "pipeline_spec": run["pipeline_spec"]["pipeline_spec"]})


def test_our_command_submits_the_same_through_the_client(
    kfp_server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--endpoint", kfp_server.url, "--data-md5", "abc"]
    assert submit.main([*given, "--set", "coordinates.n_bins=112", "--seed", "5"]) == 0
    assert kfp_server.faults == []
    (run,) = kfp_server.runs
    assert run["service_account"] == "locvlm-launcher"
    arguments = run["runtime_config"]["parameters"]
    assert arguments["runner"] == "kuberay"
    assert arguments["data_md5"] == "abc"
    assert arguments["overrides"] == ["coordinates.n_bins=112"]
    assert arguments["root"].startswith("/mnt/locvlm/runs/locvlm-b-")
    check_arguments({**run, "pipeline_spec": run["pipeline_spec"]["pipeline_spec"]})
    said = capsys.readouterr().out
    assert "run r0\n" in said
    assert f"{kfp_server.url}/#/runs/details/r0" in said
    assert submit.main([*given, "--set", "coordinates.n_bins=112", "--seed", "5", "--no-cache"]) == 0
    again = kfp_server.runs[1]
    assert again["runtime_config"]["parameters"]["root"] == arguments["root"]
    assert not caching(again) & {True}
    assert caching(run) == {True, False}


def caching(run: dict[str, Any]) -> set[bool]:
    tasks = run["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"].values()
    return {task["cachingOptions"].get("enableCache", False) for task in tasks}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "coordinates.n_bin=112"], "did you mean n_bins"),
        (["--preset", "huge"], "it must be one of tiny"),
        (["--dvc-remote", "s3://bucket/x"], "--data-md5"),
        (["--schedule", "0 3 * *", *RETRAIN], "found 4 fields"),
        (["--schedule", "0 3 * * *", "--pipeline", "image"], "it would train the same again"),
        (["--schedule", "0 3 * * *"], "it needs dvc_file, dvc_remote"),
        (["--pipeline", "retrain", *RETRAIN, "--data-md5", "m"], "it has no data_md5"),
        (["--pipeline", "video"], "it needs test_videos, video_instructions, videos"),
        (["--argument", "memori=1Gi"], "with one of baseline_overrides"),
        (["--argument", "node_selector=[]"], "has to be JSON of the kind STRUCT"),
        (["--argument", "tolerations={"], "has to be JSON of the kind LIST"),
        (["--package", "no.yaml"], "reading the package no.yaml"),
        (["--endpoint", ""], "KFP's address is needed"),
        ([], "is this KFP's address"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(["--endpoint", "http://127.0.0.1:9", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_run_is_given_its_resources_and_places(kfp_server: KfpServer) -> None:
    given = ["--argument", "memory=32Gi", "--argument", 'node_selector={"pool": "cpu"}']
    given += ["--argument", 'tolerations=[{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]']
    given += ["--pipeline", "video", "--argument", "videos=/v", "--argument", "test_videos=/t", "--argument"]
    assert submit.main(["--endpoint", kfp_server.url, *given, "video_instructions=/i.json"]) == 0
    assert kfp_server.faults == []
    (run,) = kfp_server.runs
    check_arguments({**run, "pipeline_spec": run["pipeline_spec"]["pipeline_spec"]})
    arguments = run["runtime_config"]["parameters"]
    assert arguments["memory"] == "32Gi"
    assert arguments["node_selector"] == {"pool": "cpu"}
    assert arguments["tolerations"][0]["key"] == "spot"


def test_another_pipeline_or_another_input_has_another_folder(kfp_server: KfpServer) -> None:
    given = ["--endpoint", kfp_server.url, "--preset", "locvlm-vid-b"]
    for options in ([], ["--pipeline", "ablation"], ["--argument", "captions=/c.json"], []):
        assert submit.main([*given, *options]) == 0
    roots = [run["runtime_config"]["parameters"]["root"] for run in kfp_server.runs]
    assert roots[0] == roots[3]
    assert len(set(roots)) == 3


def test_a_schedule_runs_one_at_a_time_and_makes_up_for_nothing(
    kfp_server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--endpoint", kfp_server.url, "--schedule", "0 3 * * *", *RETRAIN, "--service-account", "launcher"]
    assert submit.main([*given, "--set", "coordinates.n_bins=112"]) == 0
    assert kfp_server.faults == []
    (schedule,) = kfp_server.schedules.values()
    assert schedule["display_name"] == "retrain-locvlm-locvlm-b"
    assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * *"}}
    assert schedule["no_catchup"] is True
    assert int(schedule["max_concurrency"]) == 1
    assert schedule["mode"] == "ENABLE"
    assert schedule["service_account"] == "launcher"
    check_arguments({**schedule, "pipeline_spec": schedule["pipeline_spec"]["pipeline_spec"]})
    arguments = schedule["runtime_config"]["parameters"]
    assert arguments["dvc_file"] == "data.dvc"
    assert arguments["overrides"] == ["coordinates.n_bins=112"]
    assert arguments["runs"] == "/mnt/locvlm/runs"
    said = capsys.readouterr().out
    assert "schedule s0: retrain-locvlm-locvlm-b, 0 0 3 * * * (UTC, seconds first), one run at a time" in said
    assert f"{kfp_server.url}/#/recurringrun/details/s0" in said


def test_a_schedule_replaces_the_one_of_its_name_alone(
    kfp_server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--endpoint", kfp_server.url, *RETRAIN]
    for options in (
        ["--schedule", "0 3 * * *"],
        ["--schedule", "0 3 * * *", "--preset", "locvlm-l"],
        ["--schedule", "30 0 4 * * 1"],
    ):
        assert submit.main([*given, *options]) == 0
    assert kfp_server.faults == []
    assert {key: one["trigger"]["cron_schedule"]["cron"] for key, one in kfp_server.schedules.items()} == {
        "s1": "0 0 3 * * *",
        "s2": "30 0 4 * * 1",
    }
    assert "it replaces s0" in capsys.readouterr().out


def test_a_retraining_is_submitted_once_by_the_same_command(kfp_server: KfpServer) -> None:
    assert submit.main(["--endpoint", kfp_server.url, "--pipeline", "retrain", *RETRAIN]) == 0
    (run,) = kfp_server.runs
    assert run["display_name"] == "retrain-locvlm-b"
    check_arguments({**run, "pipeline_spec": run["pipeline_spec"]["pipeline_spec"]})
    assert kfp_server.schedules == {}
