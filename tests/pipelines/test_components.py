"""The components: whether `locvlm` understands what each step asks of it, and what a step hands on."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import components
from components.begin import begin
from components.build_generic import build_generic
from components.build_localize_instruct import build_localize_instruct
from components.build_presence import build_presence
from components.build_spatial import build_spatial
from components.build_video_presence import build_video_presence
from components.caption_objects import caption_objects
from components.due import due
from components.fetch_data import fetch_data
from components.localize_activitynet import localize_activitynet
from components.predict import predict
from components.promote import promote
from components.pseudo_actnet import pseudo_actnet
from components.register import register
from components.release import release
from components.report import report
from components.resolve_config import resolve_config
from components.score import score
from components.train_stage import train_stage
from components.video_features import video_features
from components.video_instruct import video_instruct
from locvlm import cli
from locvlm.cli import build_parser, steps
from locvlm.records import write_json
from workflows.image_pipeline import BASELINE, TASKS

# what the verbs' receipts hold that a step reads
RECEIPT = {"md5": "m", "version": "7", "due": True, "why": "because", "run": "tiny-1", "inputs": {"data": "0af.dir"}}
LINEAGE = "20260101-000000-abcdef01"


class Recorder:
    """Stands in for `locvlm`: parses every command line as the real one does and leaves what the step reads next."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def main(self, argv: list[str]) -> int:
        arguments = build_parser().parse_args(argv)  # exits with 2 when it does not understand
        self.commands.append(list(argv))
        if argv[0] == "launch":
            build_parser().parse_args(arguments.command)
        if argv[0] == "begin":
            write_json(arguments.root / "lineage.json", {"lineage": LINEAGE, "began": "now", "kfp_runs": ["k1"]})
        output = getattr(arguments, "output", None)
        if isinstance(output, Path):
            output.parent.mkdir(parents=True, exist_ok=True)
            if argv[0] == "report":
                output.mkdir()
                (output / "report.html").write_text("<p>")
            else:
                output.write_text(json.dumps(RECEIPT))
        elif output:
            output[0].parent.mkdir(parents=True, exist_ok=True)
            output[0].write_text("{}")
        elif argv[0] == "launch":
            inner = arguments.command
            path = Path(inner[inner.index("--output") + 1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        return 0


BUILD = {"data_root": "/data", "config": "f", "data_md5": "m", "code_version": "c"}
LOCALIZE = {**BUILD, "split": "train", "name": "localize-train", "captions": "", "overrides": []}
HEAVY = {"inputs": ["f"], "code_version": "c", "image": "img:1"}
TRAIN = {**HEAVY, "name": "locvlm", "stage": "instruct", "parent": "align", "overrides": [BASELINE]}
BENCHMARKS = [
    {"task": "region-description", "data": "/refs(umd).p", "images": "/data/images", "split": "test"},
    {"task": "activitynet-qa", "data": "/q.json", "images": "/videos", "annotations": "/a.json", "judge": "lexical"},
]
PREDICT = {**HEAVY, "name": "locvlm", "tasks": TASKS, "images": "/data/images", "benchmarks": []}
SCORE = {"name": "locvlm", "tasks": TASKS, "benchmarks": [], "inputs": ["f"], "code_version": "c"}
REGISTER = {"name": "locvlm", "registry_name": "locvlm", "tags": ["data=m", "code=c"], "inputs": ["f"]}
LABELS = {
    "name": "pseudo-actnet",
    "videos": "/v",
    "config": "f",
    "data_md5": "m",
    "code_version": "c",
    "image": "img:1",
}
FEATURES = {**HEAVY, "model": "image", "videos": "/v", "data_md5": "m", "runner": "local"}
CAPTION = {**HEAVY, "data_root": "/data", "images": "/i", "captioner": "", "runner": "local", "data_md5": "m"}
REPORT = {"inputs": ["f"], "code_version": "c", "curves": ["both align=align", "LocVLM instruct=locvlm"]}
DUE = {
    "runs": "/runs",
    "data": "/data",
    "dvc_file": "data.dvc",
    "repository": "",
    "revision": "",
    "below": "scenes",
    "images": "images",
    "captions": "",
    "preset": "tiny",
    "overrides": ["stages.align.steps=2"],
    "seed": 1,
    "registry_name": "locvlm",
    "code_version": "c",
    "owner": "run-1",
    "claim_hours": 24.0,
}
# name -> component, arguments, what it returns
STEPS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "begin": (begin, {"kfp_run": "k1", "tags": ["code=c", "preset=tiny"]}, LINEAGE),
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
    "localize": (build_localize_instruct, LOCALIZE, "f"),
    "localize with captions": (
        build_localize_instruct,
        {**LOCALIZE, "captions": "/c.jsonl", "overrides": ["coordinates.representation=nfp"]},
        "f",
    ),
    "spatial": (build_spatial, BUILD, "f"),
    "presence": (build_presence, BUILD, "f"),
    "caption": (caption_objects, {**CAPTION, "ready": ""}, "ROOT/data/object-captions.jsonl"),
    "train": (
        train_stage,
        {**TRAIN, "data": ["generic=generic", "localize=localize-train"], "images": ["/i"], "runner": "local"},
        "f",
    ),
    "train on the cluster": (
        train_stage,
        {**TRAIN, "data": ["video=video-instruct"], "images": ["/i", "video=/v"], "runner": "kuberay"},
        "f",
    ),
    "predict": (predict, {**PREDICT, "n_test": 9, "runner": "local"}, "f"),
    "predict benchmarks": (predict, {**PREDICT, "benchmarks": BENCHMARKS, "n_test": 0, "runner": "local"}, "f"),
    "predict on the cluster": (predict, {**PREDICT, "n_test": 0, "runner": "kuberay"}, "f"),
    "score": (score, SCORE, "f"),
    "score benchmarks": (score, {**SCORE, "benchmarks": BENCHMARKS}, "f"),
    "register": (register, {**REGISTER, "tasks": TASKS, "benchmarks": BENCHMARKS}, "7"),
    "promote": (promote, {"registry_name": "locvlm", "version": "7"}, "f"),
    "report": (report, {**REPORT, "arms": ["LocVLM=locvlm", "baseline=baseline"], "images": "/i"}, "f"),
    "report without pictures": (report, {**REPORT, "arms": ["LocVLM=locvlm"], "images": ""}, "f"),
    "labels": (pseudo_actnet, {**LABELS, "panoptic": "/p", "segmenter": "", "weights": "", "runner": "kuberay"}, "f"),
    "labels by a segmenter": (
        pseudo_actnet,
        {**LABELS, "panoptic": "", "segmenter": "seem", "weights": "/seem", "runner": "local"},
        "f",
    ),
    "activitynet": (
        localize_activitynet,
        {"labels": "pseudo-actnet", "config": "f", "inputs": ["f"], "code_version": "c"},
        "f",
    ),
    "instructions": (
        video_instruct,
        {"source": "/v.json", "videos": "/v", "config": "f", "data_md5": "m", "code_version": "c"},
        "f",
    ),
    "features": (video_features, {**FEATURES, "wanted": True}, "ROOT/data/video-features"),
    "hal-act": (
        build_video_presence,
        {"labels": "pseudo-actnet-test", "config": "f", "inputs": ["f"], "code_version": "c"},
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
    if name.startswith("report"):
        artifacts["page"] = SimpleNamespace(path=str(tmp_path / "page.html"))
    function: Callable[..., str] = component.python_func
    found = function(root=str(tmp_path / "root"), **arguments, **artifacts)
    assert found == returned.replace("ROOT", str(tmp_path / "root"))
    assert recorder.commands
    assert receipts[0].startswith(str(tmp_path / "root"))
    assert list((tmp_path / "root" / "logs").iterdir())
    if name.endswith("on the cluster"):
        assert recorder.commands[0][0] == "launch"
    elif name != "config":
        assert str(tmp_path / "root") in shlex.join(recorder.commands[-1])


def test_what_is_ready_is_not_made_again(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "write_receipt", lambda output, receipt: "f")
    receipt = SimpleNamespace(path=str(tmp_path / "receipt"))
    captions = caption_objects.python_func(root="/r", receipt=receipt, **{**CAPTION, "ready": "/c.jsonl"})
    assert captions == "/c.jsonl"
    folder = video_features.python_func(root="/r", receipt=receipt, **{**FEATURES, "wanted": False})
    assert folder == "/v"
    assert recorder.commands == []


def test_tasks_about_other_images_or_another_split_are_asked_apart(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "write_receipt", lambda output, receipt: "f")
    given = {**PREDICT, "tasks": TASKS[:2], "benchmarks": BENCHMARKS, "n_test": 3, "runner": "local"}
    predict.python_func(root=str(tmp_path), receipt=SimpleNamespace(path="r"), **given)
    asked = [build_parser().parse_args(command) for command in recorder.commands]
    assert [args.task for args in asked] == [
        ["coco-spatial", "coco-spatial-icl"],
        ["region-description"],
        ["activitynet-qa"],
    ]
    assert [list(map(str, args.images)) for args in asked] == [["/data/images"], ["/data/images"], ["/videos"]]
    assert [args.split for args in asked] == [None, ["test"], None]
    assert {args.limit for args in asked} == {3}


def test_a_retraining_is_asked_for_and_its_claim_is_given_back(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "write_receipt", lambda output, receipt: "f")
    receipt = SimpleNamespace(path=str(tmp_path / "receipt"))
    found = due.python_func(receipt=receipt, **{**DUE, "runs": str(tmp_path / "runs"), "captions": "captions.json"})
    assert found._asdict() == {
        "due": "yes",
        "why": "because",
        "root": f"{tmp_path}/runs/tiny-1",
        "md5": "0af.dir",
        "version": "/data/0af",
        "data_root": "/data/0af/scenes",
        "images": "/data/0af/images",
        "captions": "/data/0af/captions.json",
    }
    elsewhere = {**DUE, "runs": str(tmp_path / "runs"), "images": "/mnt/coco/images"}
    found = due.python_func(receipt=receipt, **elsewhere)
    assert (found.images, found.captions) == ("/mnt/coco/images", "")
    release.python_func(runs=str(tmp_path / "runs"), owner="run-1")
    assert recorder.commands[-1] == ["release", "--runs", str(tmp_path / "runs"), "--owner", "run-1"]


def test_every_component_is_tried_here() -> None:
    tried = {component.component_spec.name for component, _, _ in STEPS.values()} | {"due", "release"}
    files = {path.stem.replace("_", "-") for path in Path(str(components.__path__[0])).glob("*.py")}
    assert files - {"--init--", "image"} == tried


def test_an_ablation_row_has_the_figures_of_two_models_and_its_labels(recorder: Recorder, tmp_path: Path) -> None:
    files = [tmp_path / "predictions" / "nfp-video" / f"{name}.metrics.json" for name in ("activitynet-qa", "msvd-qa")]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.touch()
    receipts = {"receipt": SimpleNamespace(path=str(tmp_path / "r")), "page": SimpleNamespace(path=str(tmp_path / "p"))}
    given = {**REPORT, "arms": ["NFP=nfp,nfp-video"], "labels": ["NFP tables=2"], "images": ""}
    report.python_func(root=str(tmp_path), **given, **receipts)
    args = build_parser().parse_args(recorder.commands[-1])
    assert args.arm == [f"NFP={tmp_path}/predictions/nfp"]
    assert args.metrics == [f"NFP={file}" for file in files]
    assert args.label == ["NFP tables=2"]
