"""A look at held-out data: right figures, no trace in the training, and the best weights kept through a crash."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from locvlm.config import CoordinateConfig, ExperimentConfig, InstructConfig, resolve
from locvlm.data.coco import read_instances
from locvlm.data.collate import collate
from locvlm.data.conversations import write_conversations
from locvlm.data.instruct import build_localize_instruct
from locvlm.data.spatial import build_coco_spatial
from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.score import score
from locvlm.evaluation.tasks import read_set, task_named
from locvlm.model import load
from locvlm.model.checkpoint import LoadedModel, start
from locvlm.model.stages import set_trainable
from locvlm.pixels import open_images
from locvlm.records import Manifest, write_jsonl, write_manifest
from locvlm.training import stage
from locvlm.training.checkpoints import FolderCheckpoints
from locvlm.training.engine import TorchEngine
from locvlm.training.loop import Point
from locvlm.training.validation import Validation, open_held_out, read_best
from tests.tiny import World, build_world

CPU = torch.device("cpu")

# a learning rate that spoils the model: the first look, at step 3, is the best
SPOILING = (
    "cluster.keep_best=loss",
    "stages.instruct.learning_rate=1.0",
    "stages.instruct.warmup_ratio=0.9",
    "stages.instruct.schedule=linear",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """`data` has two more sets, of the scenes that nothing trains on: `places` and `sides`."""
    folder = tmp_path_factory.mktemp("world")
    world = build_world(
        folder,
        "stages.instruct.global_batch=4",
        "stages.instruct.conversations_per_image=2",
        "stages.instruct.steps=8",
        "cluster.num_workers=0",
        "cluster.checkpoint_every=2",
        "cluster.log_every=1",
        "cluster.validate_every=3",
        "cluster.validate_samples=10",
        "cluster.validate_questions=5",
        "evaluation.max_new_tokens=12",
    )
    instances = read_instances(folder / "scenes" / "instances_test.json")
    places, sides = folder / "places", folder / "sides"
    places.mkdir()
    built = build_localize_instruct(instances, InstructConfig(grouping="qa"), 0, None)
    counts = write_conversations(places, built)
    coordinates = world.config.coordinates.model_dump(mode="json")
    geometry = world.config.geometry.model_dump(mode="json")
    write_manifest(places, Manifest("localize-test", counts, seed=0, coordinates=coordinates, geometry=geometry))
    sides.mkdir()
    rows = build_coco_spatial(instances).rows
    write_jsonl(sides / "questions.jsonl", rows)
    return World(world.config, world.foundation, world.images, {**world.data, "places": places, "sides": sides})


def changed(config: ExperimentConfig, *overrides: str) -> ExperimentConfig:
    return resolve(config.model_dump(mode="json"), overrides)


def job(world: World, output: Path, *overrides: str, held_out: tuple[str, ...] = ("places", "sides")) -> stage.Job:
    data = {name: world.data[name] for name in ("generic", "localize")}
    validation = {name: world.data[name] for name in held_out}
    return stage.Job("instruct", changed(world.config, *overrides), data, world.images, output, None, validation)


def run(job: stage.Job, beat: Callable[[Point], None] = lambda point: None) -> dict[str, Any]:
    stage.check(job, 0)
    stage.begin(job)
    stage.run(job, FolderCheckpoints(job.folder), CPU, beat)
    return dict(json.loads((job.output / "receipt.json").read_text()))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def validation(world: World, loaded: LoadedModel, folder: Path, rank: int = 0, world_size: int = 1) -> Validation:
    set_trainable(loaded.model, ("adapter", "language"))
    engine = TorchEngine(loaded.model, loaded.config.stages.instruct, CPU)
    engine.rank, engine.world = rank, world_size
    images = open_images(world.images)
    sets = [open_held_out(name, world.data[name], images, loaded.config) for name in ("places", "sides")]
    return Validation(sets, loaded.config.stages.instruct, loaded, engine, folder)


def test_validation_changes_nothing_in_the_weights_that_come_out(world: World, tmp_path: Path) -> None:
    receipts = [
        run(job(world, tmp_path / name, held_out=sets)) for name, sets in (("a", ()), ("b", ("places", "sides")))
    ]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert receipts[0]["kept"] == receipts[1]["kept"] == {"figure": "last", "step": 8}
    rows = rows_of(tmp_path / "b")
    assert [row["step"] for row in rows] == [3, 6, 8]  # every three steps and at the end
    assert set(rows[0]) == {"step", "loss", "loc_iou", "loc_acc50", "neg_accuracy", "spatial_accuracy"}
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_model_comes_back_as_it_was(world: World, tmp_path: Path) -> None:
    loaded = start(world.config, None)
    look = validation(world, loaded, tmp_path)
    loaded.model.model.language_model.layers[0].eval()
    modes = [module.training for module in loaded.model.modules()]
    state = torch.get_rng_state()
    look(1)
    assert [module.training for module in loaded.model.modules()] == modes
    assert True in modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_the_loss_is_that_of_the_whole_set_per_supervised_token(world: World, tmp_path: Path) -> None:
    config = changed(world.config, "cluster.validate_samples=1000")
    look = validation(world, start(config, None), tmp_path)
    (row,) = [look(1), *rows_of(tmp_path)][1:]
    data = look.data["places"]
    batches = [collate([data.sample(i)], look.loaded.encoder.pad_id) for i in range(len(data))]
    with torch.no_grad():
        loss = sum(float(look.loaded.model.sum_loss(**batch.inputs(CPU))) for batch in batches)
    assert row["loss"] == pytest.approx(loss / sum(batch.n_targets for batch in batches), rel=1e-5)


@pytest.mark.parametrize(("task", "name"), [("localization", "places"), ("coco-spatial", "sides")])
def test_the_probes_ask_and_judge_as_predict_and_score_do(world: World, tmp_path: Path, task: str, name: str) -> None:
    config = changed(world.config, "cluster.validate_questions=1000")
    probes = open_held_out(name, world.data[name], open_images(world.images), config).probes
    asked = read_set(task_named(task), world.data[name], config).questions
    assert {probe.id: probe.prompt for probe in probes} == {question.id: question.prompt for question in asked}
    said = (
        "It is located at (3,4,30,40)",
        "There is no such object in the image",
        "on the left",
        "right, not left",
        "",
    )
    answers = {probe.id: said[number % len(said)] for number, probe in enumerate(probes)}
    write_jsonl(tmp_path / "answers.jsonl", [{"id": key, "answer": text} for key, text in answers.items()])
    scored = score(task_named(task), tmp_path / "answers.jsonl", world.data[name], config)
    worth: dict[str, list[float]] = {}
    for probe in probes:
        for figure, value in probe.judge(answers[probe.id]).items():
            worth.setdefault(figure, []).append(value)
    theirs = {"loc_iou": "mean_iou", "loc_acc50": "accuracy_iou50", "neg_accuracy": "neg_recall"}
    for figure, values in worth.items():
        assert sum(values) > 0 or figure == "loc_acc50"
        assert sum(values) / len(values) == pytest.approx(scored[theirs.get(figure, "accuracy")])


def test_the_ranks_share_the_work_and_lose_nothing(world: World, tmp_path: Path) -> None:
    loaded = start(world.config, None)
    whole = validation(world, loaded, tmp_path)
    parts = [validation(world, loaded, tmp_path, rank, 3) for rank in range(3)]
    assert len({len(part._batches("places")) for part in parts}) == 1  # they meet in every forward pass
    sums = [part._losses() | part._answers() for part in parts]
    for key, (total, n) in (whole._losses() | whole._answers()).items():
        ours = [own.get(key, (0.0, 0.0)) for own in sums]
        assert sum(part[1] for part in ours) == n
        assert sum(part[0] for part in ours) == pytest.approx(total, rel=1e-5)


def test_the_best_weights_are_kept_and_the_receipt_says_when(world: World, tmp_path: Path) -> None:
    receipt = run(job(world, tmp_path / "best", *SPOILING))
    rows = rows_of(tmp_path / "best")
    best = min(rows, key=lambda row: row["loss"])
    assert best["step"] == 3
    assert receipt["kept"] == {"figure": "loss", "value": best["loss"], "step": best["step"]}
    assert receipt["steps"] == 8
    loaded = load(tmp_path / "best")
    look = validation(world, LoadedModel(loaded.model, loaded.encoder, loaded.config), tmp_path / "again")
    look(1)
    assert rows_of(tmp_path / "again")[0]["loss"] == pytest.approx(best["loss"], rel=1e-5)


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("at", [4, 5, 8])
def test_the_best_survives_a_crash(world: World, tmp_path: Path, at: int) -> None:
    """Checkpoints at 2, 4, 6 and 8, looks at 3, 6 and 8; cut off after step `at`, before its checkpoint or after."""
    straight = run(job(world, tmp_path / "straight", *SPOILING))

    def cut(point: Point) -> None:
        if point.step == at:
            raise PowerCutError

    broken = job(world, tmp_path / "broken", *SPOILING)
    with pytest.raises(PowerCutError):
        run(broken, cut)
    weights, kept = read_best(broken.folder / "best.safetensors")
    assert kept["step"] == 3
    assert weights
    resumed = run(broken)
    assert resumed["kept"] == straight["kept"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("broken", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "straight")


class DyingCheckpoints(FolderCheckpoints):
    def save(self, step: int, write: Callable[[Path], None], point: Point) -> None:
        super().save(step, write, point)
        if step == 8:
            self.finish()
            raise PowerCutError


def test_a_look_that_was_cut_off_at_the_very_end_is_made_up_for(world: World, tmp_path: Path) -> None:
    straight = job(world, tmp_path / "straight")
    run(straight)
    broken = job(world, tmp_path / "broken")
    stage.begin(broken)
    with pytest.raises(PowerCutError):
        stage.run(broken, DyingCheckpoints(broken.folder), CPU)
    assert [row["step"] for row in rows_of(broken.folder)] == [3, 6]
    receipt = run(broken)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "straight")
    assert (receipt["steps"], receipt["loss"]) == (
        8,
        json.loads((tmp_path / "straight" / "receipt.json").read_text())["loss"],
    )


def test_several_sets_have_a_figure_each_and_one_together(world: World, tmp_path: Path) -> None:
    run(job(world, tmp_path / "out", "stages.instruct.steps=1", held_out=("places", "generic")))
    (row,) = rows_of(tmp_path / "out")
    assert min(row["loss/places"], row["loss/generic"]) < row["loss"] < max(row["loss/places"], row["loss/generic"])
    assert "loc_iou/places" not in row


def test_a_figure_that_no_set_gives_is_refused_before_anything_starts(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_best is spatial_accuracy, and the held-out data gives loc_acc50"):
        stage.check(job(world, tmp_path / "out", "cluster.keep_best=spatial_accuracy", held_out=("places",)), 0)
    with pytest.raises(ConfigError, match="gives no figure"):
        stage.check(job(world, tmp_path / "out", "cluster.keep_best=loss", held_out=()), 0)
    config = ("cluster.keep_best=loc_iou", "cluster.engine=zero3")
    with pytest.raises(ConfigError, match=r"gives loss \(cluster.engine zero3\)"):
        stage.check(job(world, tmp_path / "out", *config), 0)


def test_held_out_data_with_other_places_is_refused(world: World, tmp_path: Path) -> None:
    coordinates = CoordinateConfig(representation="nfp").model_dump(mode="json")
    other = job(world, tmp_path / "out", f"coordinates={json.dumps(coordinates)}", held_out=("places",))
    with pytest.raises(DataError, match="validating on places"):
        stage.check(other, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "image": "a.png", "prompt": "?"}, "has no 'reference'"),
        ({"id": "1", "image": "a.png", "prompt": "?", "reference": "yes"}, "'yes', not one of left, right"),
    ],
)
def test_a_question_set_of_another_kind_is_refused(world: World, tmp_path: Path, row: Any, message: str) -> None:
    write_jsonl(tmp_path / "questions.jsonl", [row])
    with pytest.raises(DataError, match=message):
        open_held_out("other", tmp_path, open_images(world.images), world.config)


def test_an_image_that_is_missing_shows_before_the_first_step(world: World, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "questions.jsonl", [{"id": "1", "image": "gone.png", "prompt": "?", "reference": "left"}])
    world.data["gone"] = tmp_path
    try:
        with pytest.raises(DataError, match=r"gone\.png"):
            run(job(world, tmp_path / "out", held_out=("gone",)))
    finally:
        del world.data["gone"]
    assert not (tmp_path / ".out.training" / "curve.jsonl").exists()


def test_points_have_no_overlap_with_boxes(world: World, tmp_path: Path) -> None:
    config = changed(world.config, "coordinates.location=point")
    found = open_held_out("places", world.data["places"], open_images(world.images), config)
    assert found.figures == {"loss", "neg_accuracy"}
