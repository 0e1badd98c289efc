"""The image pipeline: its package, what is cached, and whether `locvlm` understands every step."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from components import image
from components.build_generic import build_generic
from components.build_localize_instruct import build_localize_instruct
from components.build_presence import build_presence
from components.build_spatial import build_spatial
from components.fetch_data import fetch_data
from components.predict import predict
from components.promote import promote
from components.register import register
from components.report import report
from components.resolve_config import resolve_config
from components.score import score
from components.train_stage import train_stage
from locvlm import cli
from locvlm.cli import build_parser, steps
from locvlm.config import MixtureEntry
from locvlm.presets import preset
from workflows.compile import PACKAGE, compile_package
from workflows.image_pipeline import BASELINE, TASKS


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    spec = next(yaml.safe_load_all(PACKAGE.read_text(encoding="utf-8")))
    return dict(spec["root"]["dag"]["tasks"])


def test_the_committed_package_is_what_the_code_compiles_to(tmp_path: Path) -> None:
    if image.IMAGE != "locvlm:0.1.0":
        pytest.skip("LOCVLM_IMAGE is set: the committed package names the default image")
    compile_package(tmp_path / "package.yaml")
    assert (tmp_path / "package.yaml").read_text() == PACKAGE.read_text(), "run `python -m workflows.compile`"


def test_cached_steps_know_the_code_and_their_data_and_side_effects_are_never_cached(tasks: dict[str, Any]) -> None:
    uncached = {name for name, task in tasks.items() if not task["cachingOptions"].get("enableCache")}
    assert uncached == {"fetch-data", "register", "promote"}
    for name in tasks.keys() - uncached:
        given = tasks[name]["inputs"]["parameters"]
        assert "code_version" in given, name
        assert given.keys() & {"data_md5", "inputs", "preset"}, name


def test_both_arms_start_from_the_same_aligned_model_and_train_alike(tasks: dict[str, Any]) -> None:
    arms = [task["inputs"]["parameters"] for name, task in sorted(tasks.items()) if name.startswith("train-stage")][1:]
    assert [arm["name"]["runtimeValue"]["constant"] for arm in arms] == ["locvlm", "baseline"]
    for arm in arms:
        assert arm["parent"]["runtimeValue"]["constant"] == "align"
        assert arm["stage"]["runtimeValue"]["constant"] == "instruct"
    differ = {key for key in arms[0] if arms[0][key] != arms[1][key]}
    assert differ == {"name", "data", "overrides"}


def test_the_baseline_differs_in_its_mixture_alone() -> None:
    ours, baseline = preset("tiny"), preset("tiny", [BASELINE])
    mixture = baseline.stages.instruct.mixture
    assert mixture == (
        MixtureEntry(source="generic", objective="caption", weight=0.5),
        MixtureEntry(source="generic", objective="presence", weight=0.4),
        MixtureEntry(source="generic", objective="left_right", weight=0.1),
    )
    stage = ours.stages.instruct.model_copy(update={"mixture": mixture})
    assert baseline == ours.model_copy(update={"stages": ours.stages.model_copy(update={"instruct": stage})})


def test_the_platform_part_names_what_the_manifests_make(tasks: dict[str, Any]) -> None:
    spec, platform = yaml.safe_load_all(PACKAGE.read_text(encoding="utf-8"))
    claims = {
        document["metadata"]["name"]
        for document in yaml.safe_load_all((PACKAGE.parents[1] / "k8s" / "storage.yaml").read_text())
    }
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors.keys() == spec["deploymentSpec"]["executors"].keys()
    for settings in executors.values():
        assert settings["pvcMount"][0]["constant"] in claims
        assert settings["secretAsEnv"][0]["optional"] is True


class Recorder:
    """Stands in for `locvlm`: parses every command line as the real one does and leaves what the step reads next."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def main(self, argv: list[str]) -> int:
        arguments = build_parser().parse_args(argv)  # exits with 2 when it does not understand
        self.commands.append(list(argv))
        if argv[0] == "launch":
            build_parser().parse_args(arguments.command)
        output = getattr(arguments, "output", None)
        if isinstance(output, Path):
            output.parent.mkdir(parents=True, exist_ok=True)
            if argv[0] == "report":
                output.mkdir()
                (output / "report.html").write_text("<p>")
            else:
                output.write_text(json.dumps({"md5": "m", "version": "7"}))
        elif output:
            output[0].parent.mkdir(parents=True)
            output[0].write_text("{}")
        elif argv[0] == "launch":
            inner = arguments.command
            path = Path(inner[inner.index("--output") + 1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        return 0


BUILD = {"data_root": "/data", "config": "f", "data_md5": "m", "code_version": "c"}
HEAVY = {"images": "/data/images", "inputs": ["f"], "code_version": "c", "image": "img:1"}
TRAIN = {**HEAVY, "name": "locvlm", "stage": "instruct", "parent": "align", "overrides": [BASELINE]}
STEPS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "config": (resolve_config, {"preset": "tiny", "overrides": ["seed=1"], "seed": 0, "code_version": "c"}, "f"),
    "fetch": (
        fetch_data,
        {"data_root": "/data", "images": "/data/images", "data_md5": "m", "dvc_remote": ""},
        "m",
    ),
    "fetch from a remote": (
        fetch_data,
        {"data_root": "/data", "images": "/data/images", "data_md5": "m", "dvc_remote": "s3://bucket/x"},
        "m",
    ),
    "generic": (build_generic, {**BUILD, "captions": "/data/captions.json"}, "f"),
    "localize": (build_localize_instruct, {**BUILD, "split": "test"}, "f"),
    "spatial": (build_spatial, BUILD, "f"),
    "presence": (build_presence, BUILD, "f"),
    "train": (train_stage, {**TRAIN, "data": ["generic=generic", "localize=localize-train"], "runner": "local"}, "f"),
    "train on the cluster": (train_stage, {**TRAIN, "data": ["generic=generic"], "runner": "kuberay"}, "f"),
    "predict": (predict, {**HEAVY, "name": "locvlm", "tasks": TASKS, "n_test": 9, "runner": "local"}, "f"),
    "predict on the cluster": (
        predict,
        {**HEAVY, "name": "locvlm", "tasks": TASKS, "n_test": 0, "runner": "kuberay"},
        "f",
    ),
    "score": (score, {"name": "locvlm", "tasks": TASKS, "inputs": ["f"], "code_version": "c"}, "f"),
    "register": (
        register,
        {"name": "locvlm", "tasks": TASKS, "registry_name": "locvlm", "tags": ["data=m", "code=c"], "inputs": ["f"]},
        "7",
    ),
    "promote": (promote, {"registry_name": "locvlm", "version": "7"}, "f"),
    "report": (
        report,
        {"arms": ["LocVLM=locvlm", "baseline=baseline"], "images": "/i", "inputs": ["f"], "code_version": "c"},
        "f",
    ),
}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(cli, "main", recorder.main)
    return recorder


@pytest.mark.parametrize("name", STEPS)
def test_locvlm_understands_what_a_step_asks_of_it(
    name: str, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component, arguments, returned = STEPS[name]
    receipts: list[str] = []

    def write_receipt(output: str, receipt: str) -> str:
        assert receipt == str(tmp_path / "receipt")
        receipts.append(output)
        return "f"

    monkeypatch.setattr(steps, "write_receipt", write_receipt)
    artifacts: dict[str, Any] = {"receipt": SimpleNamespace(path=str(tmp_path / "receipt"))}
    if name == "report":
        artifacts["page"] = SimpleNamespace(path=str(tmp_path / "page.html"))
    function: Callable[..., str] = component.python_func
    assert function(root=str(tmp_path / "root"), **arguments, **artifacts) == returned
    assert recorder.commands
    assert receipts[0].startswith(str(tmp_path / "root"))
    assert list((tmp_path / "root" / "logs").iterdir())
    if name.endswith("on the cluster"):
        assert recorder.commands[0][0] == "launch"
    elif name != "config":
        assert str(tmp_path / "root") in shlex.join(recorder.commands[-1])


def test_every_component_of_the_pipeline_is_tried_here(tasks: dict[str, Any]) -> None:
    tried = {component.component_spec.name for component, _, _ in STEPS.values()}
    assert {
        task["componentRef"]["name"].removeprefix("comp-").rstrip("-0123456789") for task in tasks.values()
    } == tried
