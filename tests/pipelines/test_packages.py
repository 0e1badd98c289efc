"""The compiled packages of all pipelines: in step with the code, cached by what decides, complete for a cluster."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import image
from workflows.compile import PIPELINES, compile_package, package
from workflows.steps import MLFLOW_KEYS, STORAGE_KEYS, TIMEOUTS

# steps that change something outside the run's folder, or that only a look at the world can answer
NEVER_CACHED = {"begin", "fetch-data", "register", "promote", "report", "due", "release"}


def read(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The spec of a package and its platform part."""
    with open(package(name), encoding="utf-8") as file:
        spec, platform = yaml.load_all(file, yaml.CSafeLoader)
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def dags(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, parameters, tasks) of the pipeline and of every condition and handler in it."""
    for name, part in (("root", spec["root"]), *spec["components"].items()):
        if "dag" in part:
            yield name, part.get("inputDefinitions", {}).get("parameters", {}), part["dag"]["tasks"]


def steps(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(component, task) of every step."""
    for _, _, tasks in dags(spec):
        for task in tasks.values():
            component = task["componentRef"]["name"]
            if "dag" not in spec["components"][component]:
                yield component.removeprefix("comp-").rstrip("-0123456789"), task


@pytest.mark.parametrize("name", PIPELINES)
def test_the_committed_package_is_what_the_code_compiles_to(name: str, tmp_path: Path) -> None:
    if image.IMAGE != "locvlm:0.1.0":
        pytest.skip("LOCVLM_IMAGE is set: the committed packages name the default image")
    compile_package(name, tmp_path / "package.yaml")
    fresh = (tmp_path / "package.yaml").read_text()
    assert fresh == package(name).read_text(), "run `python -m workflows.compile`"


@pytest.mark.parametrize("name", PIPELINES)
def test_cached_steps_know_the_code_and_their_data_and_side_effects_are_never_cached(name: str) -> None:
    for component, task in steps(read(name)[0]):
        is_cached = bool(task["cachingOptions"].get("enableCache"))
        assert is_cached == (component not in NEVER_CACHED), component
        if is_cached:
            given = task["inputs"]["parameters"]
            assert "code_version" in given, component
            assert given.keys() & {"data_md5", "inputs", "preset"}, component


@pytest.mark.parametrize("name", PIPELINES)
def test_every_parameter_that_a_step_reads_reaches_it(name: str) -> None:
    spec, platform = read(name)
    for where, parameters, tasks in dags(spec):
        for task in tasks.values():
            wanted = {
                given["componentInputParameter"]
                for given in task.get("inputs", {}).get("parameters", {}).values()
                if "componentInputParameter" in given
            }
            component = spec["components"][task["componentRef"]["name"]]
            settings = platform.get(component.get("executorLabel", ""), {})
            wanted.add(settings.get("nodeSelector", {}).get("nodeSelectorJson", {}).get("componentInputParameter"))
            wanted |= {one["tolerationJson"]["componentInputParameter"] for one in settings.get("tolerations", [])}
            wanted |= {one["secretNameParameter"]["componentInputParameter"] for one in settings.get("secretAsEnv", [])}
            assert wanted - {None} <= parameters.keys(), where


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_has_its_place_its_limits_and_its_deadline(name: str) -> None:
    spec, platform = read(name)
    storage = Path(package(name)).parents[1] / "k8s" / "base" / "storage.yaml"
    claims = {document["metadata"]["name"] for document in yaml.safe_load_all(storage.read_text())}
    assert platform.keys() == spec["deploymentSpec"]["executors"].keys()
    for label, settings in platform.items():
        assert settings["pvcMount"][0]["constant"] in claims
        assert all(secret["optional"] is True for secret in settings["secretAsEnv"])
        given = {pair["envVar"] for secret in settings["secretAsEnv"] for pair in secret["keyToEnv"]}
        assert given == {*STORAGE_KEYS, *MLFLOW_KEYS}
        user = {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}  # KFP adds the rest of "restricted"
        assert settings["securityContext"] == user
        assert int(settings["activeDeadlineSeconds"]) in TIMEOUTS.values()
        resources = spec["deploymentSpec"]["executors"][label]["container"]["resources"]
        assert resources.keys() >= {
            f"resource{kind}{end}" for kind in ("Cpu", "Memory") for end in ("Request", "Limit")
        }


def test_deadlines_are_what_they_were_compiled_with(tmp_path: Path) -> None:
    compile_package("image", tmp_path / "package.yaml", {"light": 60, "data": 120, "job": 180})
    _, platform = yaml.safe_load_all((tmp_path / "package.yaml").read_text())
    found = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert found["exec-score"]["activeDeadlineSeconds"] == "60"
    assert found["exec-build-spatial"]["activeDeadlineSeconds"] == "120"
    assert found["exec-train-stage"]["activeDeadlineSeconds"] == "180"
