"""The ablations: what the arms share, where they differ, and two small arms for real."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from locvlm.evaluation.arms import Arm, Result, with_labels
from locvlm.evaluation.paper_tables import paper_tables
from locvlm.presets import preset
from workflows import ablation_pipeline, run_local
from workflows.ablation_pipeline import ARMS, FULL, VIDEO_ARM_SETTINGS, VIDEO_ARMS
from workflows.compile import package

TINY = ["stages.align.steps=2", "stages.instruct.steps=2", "stages.align.global_batch=4", "cluster.num_workers=0"]
TINY += ["stages.instruct.global_batch=4", "evaluation.max_new_tokens=6"]


@pytest.fixture(scope="module")
def tasks() -> list[tuple[str, dict[str, Any]]]:
    """(component, the constants it is given) of every step."""
    with open(package("ablation"), encoding="utf-8") as file:
        spec = next(yaml.load_all(file, yaml.CSafeLoader))
    return [
        (
            task["componentRef"]["name"].removeprefix("comp-").rstrip("-0123456789"),
            {
                name: given["runtimeValue"]["constant"]
                for name, given in task["inputs"]["parameters"].items()
                if "runtimeValue" in given
            },
        )
        for task in spec["root"]["dag"]["tasks"].values()
    ]


def test_what_does_not_depend_on_the_arm_is_made_once(tasks: list[tuple[str, dict[str, Any]]]) -> None:
    made = [component for component, _ in tasks]
    for once in ("resolve-config", "fetch-data", "build-generic", "build-spatial", "build-presence", "caption-objects"):
        assert made.count(once) == 1, once
    for once in ("pseudo-actnet", "localize-activitynet", "video-instruct", "report"):
        assert made.count(once) == 1, once
    sets = [given["name"] for component, given in tasks if component == "build-localize-instruct"]
    assert sorted(sets) == [
        "localize-test",
        "localize-test-diga",
        "localize-test-nfp",
        "localize-test-point",
        "localize-train",
        "localize-train-diga",
        "localize-train-names",
        "localize-train-nfp",
        "localize-train-point",
    ]
    stages = [given["stage"] for component, given in tasks if component == "train-stage"]
    assert (stages.count("align"), stages.count("instruct"), stages.count("video")) == (1, 8, 12)


def test_every_arm_is_labelled_for_the_rows_of_its_tables(tasks: list[tuple[str, dict[str, Any]]]) -> None:
    (given,) = (given for component, given in tasks if component == "report")
    told = {label.rpartition(" ")[0] for label in given["labels"]}
    titles = {entry.partition("=")[0]: entry.partition("=")[2].split(",") for entry in given["arms"]}
    assert told == titles.keys() == {arm.title for arm in (*ARMS, *VIDEO_ARMS)}
    # a row's figures on images and on videos are those of a model and of the video model made from it
    assert all(titles[arm.title] == [arm.name, f"{arm.name}-video"] for arm in ARMS)
    results = {
        arm.title: Arm(arm.title, (Result(metrics(config_of(arm)), {}, {}),), {}) for arm in (*ARMS, *VIDEO_ARMS)
    }
    labels: dict[str, dict[str, str]] = {}
    for label in given["labels"]:
        title, _, told_of = label.rpartition(" ")
        key, _, value = told_of.partition("=")
        labels.setdefault(title, {})[key] = value
    arms = [with_labels(results[title], labels[title]) for title in titles]
    found = {table.title: table for table in paper_tables(arms) if table.number in ("2", "11", "12")}
    rows = {
        title: {
            line.label: [cell.text for cell in line.cells[: len(line.cells) - (1 if table.number == "12" else 3)]]
            for line in table.lines
            if line.arm is not None
        }
        for title, table in found.items()
    }
    full = FULL.title
    assert rows == {
        "Coordinate representation ablation": {full: ["IVB"], "NFP": ["NFP"], "DIGA": ["DIGA"]},
        "Ablation of the objectives": {
            full: ["yes", "yes", "yes"],
            "no location objective": ["no", "no", "no"],
            "LocPred": ["yes", "no", "no"],
            "LocPred and NegPred": ["yes", "yes", "no"],
        },
        "Ablation of location type and pseudo-data": {
            full: ["bbox", "yes"],
            "points": ["point", "yes"],
            "category names": ["bbox", "no"],
        },
        "Video objective ablation": {
            "video: all objectives": ["yes", "yes", "yes"],
            "video: no location objective": ["no", "no", "no"],
            "video: LocPred": ["yes", "no", "no"],
            "video: LocPred and NegPred": ["yes", "yes", "no"],
        },
    }
    assert not any("nothing says" in note for table in found.values() for note in table.notes)


def config_of(arm: ablation_pipeline.Arm | ablation_pipeline.VideoArm) -> dict[str, Any]:
    """What the metrics of the arm carry."""
    if isinstance(arm, ablation_pipeline.Arm):
        return preset("locvlm-vid-b", [*arm.places, arm.mixture]).model_dump(mode="json")
    return preset("locvlm-vid-b", [*VIDEO_ARM_SETTINGS, arm.mixture]).model_dump(mode="json")


def metrics(config: dict[str, Any]) -> dict[str, Any]:
    figure = {"value": 0.5, "n": 9, "low": 0.4, "high": 0.6, "floor": None, "floor_answer": ""}
    told = {"task": "gqa", "dataset": "testdev", "n": 9, "figures": {"accuracy": figure}}
    return {**told, "config": config}


def test_the_arms_are_the_rows_of_the_papers_tables() -> None:
    configs = {arm.name: preset("locvlm-vid-b", [*arm.places, arm.mixture]) for arm in ARMS}
    full = configs["full"]
    assert {name: config.coordinates.representation for name, config in configs.items()} == {
        **dict.fromkeys(configs, "ivb"),
        "nfp": "nfp",
        "diga": "diga",
    }
    assert configs["point"].coordinates.location == "point"
    assert {arm.name for arm in ARMS if not arm.captions} == {"names"}
    objectives = {
        name: [entry.objective for entry in config.stages.instruct.mixture if entry.source == "localize"]
        for name, config in configs.items()
    }
    assert objectives["none"] == []
    assert objectives["loc"] == ["loc_pred"]
    assert objectives["loc-neg"] == ["loc_pred", "neg_pred"]
    assert all(objectives[name] == objectives["full"] for name in ("nfp", "diga", "point", "names"))
    assert configs["names"] == full
    assert full.stages.instruct.mixture == preset("tiny").stages.instruct.mixture
    for config in configs.values():
        shares = {entry.objective: entry.weight for entry in config.stages.instruct.mixture}
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["stated_left_right"] == 0.2
        assert "left_right" not in shares
        assert shares["presence"] == shares["caption"]


def test_the_video_arms_differ_in_their_objectives_alone() -> None:
    configs = [preset("locvlm-vid-b", [*VIDEO_ARM_SETTINGS, arm.mixture]) for arm in VIDEO_ARMS]
    for config in configs:
        assert config.stages.video is not None
        assert config.video is not None
        assert config.video.n_frames == 8
        assert config.stages.video.trainable == ("adapter", "language")
        assert config.stages.video.mixture[0].source == "instructions"
    found = [
        [entry.objective for entry in config.stages.video.mixture[1:]] for config in configs if config.stages.video
    ]
    assert sorted(found, key=len) == [
        [],
        ["loc_pred"],
        ["loc_pred", "neg_pred"],
        ["loc_pred", "neg_pred", "rev_loc"],
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_arms_run_here_and_end_in_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nfp = dataclasses.replace(next(arm for arm in ARMS if arm.name == "nfp"), captions=False)
    none = next(arm for arm in ARMS if arm.name == "none")
    monkeypatch.setattr(ablation_pipeline, "ARMS", (nfp, none))
    options = ["--pipeline", "ablation", "--n-train", "40", "--n-test", "16", "--questions", "4"]
    options += [option for override in TINY for option in ("--set", override)]
    options += ["--runs", str(tmp_path / "runs"), "--scenes", str(tmp_path / "scenes")]
    assert run_local.main(options) == 0
    said = capsys.readouterr().out
    assert said.count("train: align ") == 2  # begun, done
    assert "caption the objects" not in said
    (page,) = tmp_path.glob("runs/*/report/report.html")
    for title in ("NFP", "no location objective"):
        assert title in page.read_text()
        assert f"  {title}" in said
    root = page.parents[1]
    configs = {name: (root / "models" / name / "locvlm.yaml").read_text() for name in ("nfp", "none")}
    assert yaml.safe_load(configs["nfp"])["coordinates"]["representation"] == "nfp"
    assert yaml.safe_load(configs["none"])["coordinates"]["representation"] == "ivb"
    receipts = [json.loads((root / "models" / name / "receipt.json").read_text()) for name in configs]
    assert {receipt["parent"] for receipt in receipts} == {str(root / "models" / "align")}
    assert not (root / "decision.json").exists()


def test_titles_may_begin_the_name_of_a_metric() -> None:
    for arm in (*ARMS, *VIDEO_ARMS):
        assert re.fullmatch(r"[\w\-. :/]+", arm.title), arm.title  # what MLflow takes


def test_the_full_arm_is_what_the_others_are_compared_with() -> None:
    assert ARMS[0] is FULL
