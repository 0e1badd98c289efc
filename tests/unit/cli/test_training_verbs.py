"""`locvlm train`: a whole run through the command line, and one clear message for whatever is wrong with its input."""

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from locvlm.cli import main
from locvlm.config import dump_config
from locvlm.data.conversations import open_conversations
from locvlm.model import load
from locvlm.model.checkpoint import save, start
from locvlm.records import Manifest, write_json, write_manifest
from tests.tiny import World, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """`data["localize"]` has the manifest that `locvlm data localize-instruct` writes."""
    world = build_world(
        tmp_path_factory.mktemp("world"),
        "stages.instruct.global_batch=4",
        "stages.instruct.steps=2",
        "cluster.num_workers=0",
        "cluster.validate_every=1",
        "cluster.validate_samples=4",
        "cluster.validate_questions=2",
    )
    describe(world.data["localize"], world)
    return world


@pytest.fixture(scope="module")
def checkpoint(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "model"
    save(start(world.config, None), folder)
    write_json(folder / "receipt.json", {"stage": "instruct"})
    return folder


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """`main` sets the root logger up; what it added goes again."""
    before = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = before


def describe(folder: Path, world: World, **sections: Any) -> None:
    """Write the manifest of a Localize-Instruct folder; `sections` differ from the config's."""
    config = world.config.model_dump(mode="json")
    places = {name: {**config[name], **sections.get(name, {})} for name in ("coordinates", "geometry")}
    counts = {"conversations": len(open_conversations(folder)), "loc_pred": 1, "neg_pred": 1, "rev_loc": 1}
    write_manifest(folder, Manifest("localize-instruct", counts, **places))


def command(world: World, folder: Path, *more: str) -> list[str]:
    config = folder / "config.yaml"
    config.write_text(dump_config(world.config))
    values = ["train", "--stage", "instruct", "--config", str(config), "--output", str(folder / "out")]
    values += ["--images", str(world.images), "--data", f"generic={world.data['generic']}"]
    return [
        *values,
        *([] if any("localize=" in one for one in more) else ["--data", f"localize={world.data['localize']}"]),
        *more,
    ]


def refused(world: World, folder: Path, capsys: pytest.CaptureFixture[str], message: str, *more: str) -> None:
    """Exit code 2, one message that says `message`, nothing under the final name."""
    assert main(command(world, folder, *more)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("locvlm: ") == 1
    assert "Traceback" not in said
    assert not (folder / "out").exists()


def edited(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON or YAML file of a copied checkpoint."""
    path = folder / name
    read, write = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    values = read(path.read_text())
    change(values)
    path.write_text(write(values))


def halved(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_run_with_held_out_data_leaves_both_curves_and_says_what_it_kept(world: World, tmp_path: Path) -> None:
    held_out = f"test={world.data['localize']}"
    keep = ["--set", "cluster.keep_best=loss", "--set", "cluster.log_every=1"]
    assert main(command(world, tmp_path, "--validate", held_out, *keep)) == 0
    out = tmp_path / "out"
    steps = {
        name: [json.loads(line)["step"] for line in (out / name).read_text().splitlines()]
        for name in ("curve.jsonl", "validation.jsonl")
    }
    assert steps == {"curve.jsonl": [1, 2], "validation.jsonl": [1, 2]}
    receipt = json.loads((out / "receipt.json").read_text())
    assert receipt["kept"]["figure"] == "loss"
    assert load(out).config.cluster.keep_best == "loss"
    assert not (tmp_path / ".out.training").exists()


def test_the_figures_of_held_out_data_reach_the_tracker(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main(command(world, tmp_path, "--validate", f"test={world.data['localize']}")) == 0
    client = MlflowClient(uri)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    figures = {"validation/loss", "validation/loc_iou", "validation/loc_acc50", "validation/neg_accuracy"}
    assert figures <= run.data.metrics.keys()
    assert [point.step for point in client.get_metric_history(run.info.run_id, "validation/loss")] == [1, 2]
    assert {"curve.jsonl", "validation.jsonl"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_a_finished_run_is_left_alone(world: World, tmp_path: Path) -> None:
    assert main(command(world, tmp_path)) == 0
    before = (tmp_path / "out" / "receipt.json").stat().st_mtime_ns
    assert main(command(world, tmp_path)) == 0
    assert (tmp_path / "out" / "receipt.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("prompts", {"system": "Be brief."}, "prompts.system: checkpoint 'Be brief.', config ''"),
        ("prompts", {"clean_templates": True}, "prompts.clean_templates: checkpoint True, config False"),
        ("geometry", {"kind": "letterbox"}, "geometry.kind: checkpoint 'letterbox', config 'squash'"),
        ("coordinates", {"representation": "nfp"}, "coordinates.representation: checkpoint 'nfp', config 'ivb'"),
        ("model", {"adapter": "mlp"}, "model.adapter: checkpoint 'mlp', config 'linear'"),
    ],
)
def test_a_parent_that_was_trained_otherwise_is_refused(
    world: World,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    section: str,
    change: dict[str, Any],
    message: str,
) -> None:
    parent = shutil.copytree(checkpoint, tmp_path / "parent")
    edited(parent, "locvlm.yaml", lambda values: values[section].update(change))
    refused(world, tmp_path, capsys, message, "--model", str(parent))


def test_the_coordinates_of_a_parent_that_knows_no_places_may_differ(
    world: World, checkpoint: Path, tmp_path: Path
) -> None:
    """Stage 1 is shared by the models of an ablation."""
    parent = shutil.copytree(checkpoint, tmp_path / "parent")
    edited(parent, "locvlm.yaml", lambda values: values["coordinates"].update({"representation": "nfp"}))
    write_json(parent / "receipt.json", {"stage": "align"})
    assert main(command(world, tmp_path, "--model", str(parent))) == 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"coordinates": {"representation": "nfp"}}, "its coordinates differ from the config's"),
        ({"coordinates": {"n_bins": 96}}, "its coordinates differ from the config's"),
        ({"geometry": {"kind": "crop"}}, "its geometry differ from the config's"),
    ],
)
@pytest.mark.parametrize("option", ["--data", "--validate"])
def test_data_that_writes_places_otherwise_than_the_model_is_refused(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    message: str,
    option: str,
) -> None:
    other = shutil.copytree(world.data["localize"], tmp_path / "other")
    describe(other, world, **sections)
    name = "localize" if option == "--data" else "held"
    refused(world, tmp_path, capsys, message, option, f"{name}={other}")


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    (lambda model: halved(model, "tokenizer.json"), "tokenizer.json cannot be read"),
    (lambda model: halved(model, "tokenizer_config.json"), "tokenizer"),
    (lambda model: halved(model, "model.safetensors"), "cut short"),
    (lambda model: (model / "model.safetensors").unlink(), "there are no weights in it"),
    (lambda model: halved(model, "config.json"), "config.json"),
    (lambda model: halved(model, "locvlm.yaml"), "locvlm.yaml"),
    (
        lambda model: edited(model, "tokenizer_config.json", lambda values: values.update(pad_token="</s>")),
        "its pad token is its stop token ('</s>')",
    ),
    (
        lambda model: edited(model, "tokenizer_config.json", lambda values: values.update(pad_token=None)),
        "it has no pad token",
    ),
    (lambda model: shutil.rmtree(model), "there is no such folder"),
    (lambda model: (model / "locvlm.yaml").unlink(), "locvlm.yaml is missing and config.json names no LLaVA model"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_a_broken_parent_is_told_in_one_message(
    world: World,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    parent = shutil.copytree(checkpoint, tmp_path / "parent")
    damage(parent)
    refused(world, tmp_path, capsys, message, "--model", str(parent))
    shutil.rmtree(parent, ignore_errors=True)
    shutil.copytree(checkpoint, parent)
    assert main(command(world, tmp_path, "--model", str(parent))) == 0  # mended: what failed is not in the way


@pytest.mark.parametrize(("damage", "message"), BROKEN[:4] + BROKEN[5:9])
def test_a_broken_checkpoint_is_told_by_the_other_verbs_too(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Any], message: str
) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    damage(model)
    assert main(["export", "--model", str(model), "--output", str(tmp_path / "stock")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(model) in said
    assert "Traceback" not in said
    assert not (tmp_path / "stock").exists()


def test_a_loss_that_is_not_a_number_is_the_users_to_mend(
    world: World, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load(checkpoint)
    with torch.no_grad():
        loaded.model.lm_head.weight[0, 0] = torch.nan
    save(loaded, tmp_path / "parent")
    refused(world, tmp_path, capsys, "the loss is not a finite number", "--model", str(tmp_path / "parent"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--validate", "nowhere"], "nowhere"),
        (["--set", "cluster.keep_best=loc_iou"], "keep_best is loc_iou, and the held-out data gives no figure"),
        (["--set", "cluster.keep_best=bleu"], "cluster.keep_best"),
        (
            ["--set", "cluster.num_workers=4", "--set", "cluster.min_workers=4", "--workers", "2"],
            "cluster.min_workers is 4 and there are to be 2 workers at most",
        ),
        (
            ["--set", "cluster.engine=zero2", "--set", "model.lora.base=4bit"],
            "which cluster.engine zero2 cannot spread",
        ),
    ],
)
def test_settings_that_cannot_be_met_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    refused(world, tmp_path, capsys, message, *more)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_qlora_without_its_package_is_refused_before_anything_starts(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(world, tmp_path, capsys, "bitsandbytes is not installed", "--set", "model.lora.base=4bit")
