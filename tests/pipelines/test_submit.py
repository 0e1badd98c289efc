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
from workflows.compile import PACKAGE

KFP = str(Path(sys.executable).with_name("kfp"))


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
    kinds = {"STRING": str, "LIST": list, "NUMBER_INTEGER": (int, float)}
    for name, value in given.items():
        assert isinstance(value, kinds[inputs[name]["parameterType"]]), name


@pytest.mark.parametrize("verb", ["create", "submit"])
def test_the_plain_kfp_command_submits_the_package(kfp_server: KfpServer, tmp_path: Path, verb: str) -> None:
    command = [KFP, "--endpoint", kfp_server.url, "run", verb, "-e", "locvlm", "-r", "first", "-f", str(PACKAGE)]
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
    given = ["--endpoint", kfp_server.url, "--data-md5", "abc", "--service-account", "locvlm-launcher"]
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
        ([], "is this KFP's address"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(["--endpoint", "http://127.0.0.1:9", *options]) == 2
    assert message in capsys.readouterr().err
