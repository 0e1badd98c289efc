"""The loop: schedule, token-exact loss, packing, resume, refusal of bad batches."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from locvlm.config import ExperimentConfig, resolve
from locvlm.coordinates import make_location_format
from locvlm.data.collate import collate
from locvlm.data.conversations import open_conversations
from locvlm.data.dataset import TrainingData
from locvlm.data.instruct import Renderer
from locvlm.errors import ConfigError, DataError
from locvlm.geometry import make_geometry
from locvlm.model import load
from locvlm.model.checkpoint import LoadedModel, start
from locvlm.model.stages import set_trainable
from locvlm.presets import preset
from locvlm.training import stage
from locvlm.training.checkpoints import FolderCheckpoints
from locvlm.training.engine import TorchEngine
from locvlm.training.loop import NonFiniteLossError, Point, learning_rate, n_steps, share, train
from tests.tiny import World, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


def changed(config: ExperimentConfig, *overrides: str) -> ExperimentConfig:
    return resolve(config.model_dump(mode="json"), overrides)


def training_data(world: World, loaded: LoadedModel, config: ExperimentConfig, name: str = "instruct") -> TrainingData:
    geometry = make_geometry(config.geometry)
    return TrainingData(
        getattr(config.stages, name),
        {name: open_conversations(path) for name, path in world.data.items()},
        world.images,
        Renderer(make_location_format(config.coordinates, geometry), config.prompts, config.seed),
        loaded.encoder,
        geometry,
        config.model.language.max_length,
        config.seed,
    )


def test_the_papers_schedule_warms_up_for_three_tenths_and_falls_as_a_cosine() -> None:
    instruct = preset("locvlm-b").stages.instruct
    assert (instruct.learning_rate, instruct.global_batch, instruct.epochs, instruct.warmup_ratio) == (
        2e-5,
        64,
        10,
        0.3,
    )
    assert n_steps(instruct, 191_798) == 29_969  # 2 x 95,899 conversations, ten epochs, batch 64
    total = 100
    assert learning_rate(instruct, 0, total) == pytest.approx(2e-5 / 30)
    assert learning_rate(instruct, 29, total) == pytest.approx(2e-5)
    assert learning_rate(instruct, 65, total) == pytest.approx(1e-5)
    assert learning_rate(instruct, 99, total) < 2e-8


def test_a_batch_that_does_not_divide_names_the_legal_numbers_of_workers() -> None:
    instruct = preset("locvlm-b").stages.instruct
    assert [list(share(instruct, rank, 32)) for rank in (0, 31)] == [[0, 1], [62, 63]]
    with pytest.raises(ConfigError, match=r"64 does not divide among 3 workers; use one of \[1, 2, 4, 8, 16, 32, 64\]"):
        share(instruct, 0, 3)


def test_packed_conversations_cost_what_they_cost_alone(world: World) -> None:
    loaded = load(world.foundation)
    config = changed(world.config, "stages.instruct.conversations_per_image=5")
    data = training_data(world, loaded, config)
    samples = [data.sample(i) for i in range(3)]
    packed = collate(samples, loaded.encoder.pad_id)
    alone = [dataclasses.replace(s, branches=(branch,)) for s in samples for branch in s.branches]
    with torch.no_grad():
        together = loaded.model.sum_loss(**packed.inputs(torch.device("cpu")))
        parts = [loaded.model.sum_loss(**collate([s], 3).inputs(torch.device("cpu"))) for s in alone]
    assert packed.n_conversations == 15
    assert float(together) == pytest.approx(float(sum(parts)), rel=1e-5)


def test_the_loss_equals_transformers_own_on_the_same_conversation(world: World) -> None:
    loaded = load(world.foundation)
    config = changed(world.config, "stages.instruct.conversations_per_image=0")
    sample = training_data(world, loaded, config).sample(0)
    (branch,) = sample.branches
    ids = torch.tensor([sample.prefix + branch.ids])
    labels = torch.tensor(
        [[-100] * len(sample.prefix) + [t if s else -100 for t, s in zip(branch.ids, branch.supervised, strict=True)]]
    )
    batch = collate([sample], loaded.encoder.pad_id)
    with torch.no_grad():
        theirs = loaded.model(input_ids=ids, pixel_values=batch.pixel_values, labels=labels).loss
        ours = loaded.model.sum_loss(**batch.inputs(torch.device("cpu"))) / batch.n_targets
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_micro_batches_add_up_to_the_whole_batch(world: World, tmp_path: Path) -> None:
    whole, parts = (_train(world, tmp_path / str(size), steps=1, micro_batch=size)[1] for size in (0, 3))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)


def test_an_epoch_shows_every_conversation_once_in_an_order_of_its_own(world: World) -> None:
    loaded = load(world.foundation)
    config = changed(world.config, "stages.instruct.conversations_per_image=0", "stages.instruct.mixture=[]")
    data = training_data(world, loaded, config)
    orders = [[tuple(row) for row in data._order(epoch)] for epoch in (0, 1)]
    assert len(data) == sum(len(open_conversations(path)) for path in world.data.values())
    assert len(set(orders[0])) == len(data)
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_the_mixture_gives_each_entry_its_share(world: World) -> None:
    loaded = load(world.foundation)
    mixture = (
        "[{source: generic, objective: caption, weight: 0.25}, {source: localize, objective: loc_pred, weight: 0.75}]"
    )
    config = changed(world.config, "stages.instruct.conversations_per_image=0", f"stages.instruct.mixture={mixture}")
    data = training_data(world, loaded, config)
    entries = [entry for entry, _ in data._order(0)]
    assert entries.count(0) == pytest.approx(0.25 * len(data), abs=1)
    with pytest.raises(DataError, match="no conversation of objective 'nothing'"):
        training_data(world, loaded, changed(config, "stages.instruct.mixture=[{source: generic, objective: nothing}]"))
    with pytest.raises(ConfigError, match="names the source"):
        training_data(world, loaded, changed(config, "stages.instruct.mixture=[{source: elsewhere}]"))


def test_twenty_steps_equal_ten_a_crash_and_ten_more(world: World, tmp_path: Path) -> None:
    straight, _ = _train(world, tmp_path / "straight", steps=20)

    class PowerCutError(Exception):
        pass

    def cut(point: Point) -> None:
        if point.step == 14:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        _train(world, tmp_path / "broken", steps=20, on_point=cut)
    kept = FolderCheckpoints(tmp_path / "broken").latest()
    assert kept is not None
    assert json.loads((kept / "point.json").read_text())["step"] == 10
    resumed, last = _train(world, tmp_path / "broken", steps=20)
    assert last.step == 20
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_the_stages_own_parts_move(world: World, tmp_path: Path) -> None:
    before = load(world.foundation).model.state_dict()
    loaded, _ = _train(world, tmp_path, steps=2)
    moved = {name for name, value in loaded.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("model.multi_modal_projector", "model.language_model", "lm_head")) for name in moved)
    assert any(name.startswith("model.language_model") for name in moved)


def test_a_loss_that_is_not_a_number_stops_before_anything_moves(world: World, tmp_path: Path) -> None:
    loaded = start(world.config, None)
    set_trainable(loaded.model, ("adapter", "language"))
    with torch.no_grad():
        loaded.model.lm_head.weight[0, 0] = math.nan
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    engine = TorchEngine(loaded.model, world.config.stages.instruct, torch.device("cpu"))
    data = training_data(world, loaded, world.config)
    with pytest.raises(NonFiniteLossError, match=r"training step 1: the loss is nan.*Samples 0\.\.31"):
        train(
            world.config.stages.instruct, data, engine, FolderCheckpoints(tmp_path), 3, checkpoint_every=1, log_every=1
        )
    after = loaded.model.state_dict()
    assert all(torch.equal(after[n], before[n]) or "lm_head" in n for n in before)


def test_the_loss_falls_on_two_images(world: World, tmp_path: Path) -> None:
    points: list[Point] = []
    _train(world, tmp_path, steps=100, batch=2, n_images=2, rate=5e-3, on_point=points.append)
    assert points[-1].loss < 0.25 * points[0].loss


def test_a_finished_or_foreign_output_is_never_overwritten(world: World, tmp_path: Path) -> None:
    config = changed(world.config, "stages.align.steps=1", "stages.align.global_batch=2")
    job = stage.Job("align", config, {"generic": world.data["generic"]}, world.images, tmp_path / "out")
    assert stage.begin(job)
    stage.run(job, FolderCheckpoints(job.folder), torch.device("cpu"))
    assert not stage.begin(job)
    assert json.loads((job.output / "receipt.json").read_text())["steps"] == 1
    other = dataclasses.replace(job, config=changed(config, "seed=9"))
    with pytest.raises(ConfigError, match="holds another run"):
        stage.begin(other)
    with pytest.raises(ConfigError, match="no unfinished run"):
        stage.begin(dataclasses.replace(job, output=tmp_path / "elsewhere"), resume=True)


def test_a_job_crosses_to_a_worker_and_back(world: World, tmp_path: Path) -> None:
    job = stage.Job("instruct", world.config, world.data, world.images, tmp_path / "out", world.foundation)
    assert stage.Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job


def _train(
    world: World,
    folder: Path,
    steps: int,
    *,
    micro_batch: int = 0,
    batch: int = 4,
    n_images: int = 0,
    rate: float = 1.5e-3,
    on_point: Callable[[Point], None] = lambda point: None,
) -> tuple[LoadedModel, Point]:
    config = changed(
        world.config,
        f"stages.instruct.steps={steps}",
        f"stages.instruct.global_batch={batch}",
        f"stages.instruct.learning_rate={rate}",
        "stages.instruct.conversations_per_image=4",
    )
    loaded = start(config, None)
    set_trainable(loaded.model, config.stages.instruct.trainable)
    data = training_data(world, loaded, config)
    if n_images:
        data.image_names = data.image_names[:n_images]
    engine = TorchEngine(loaded.model, config.stages.instruct, torch.device("cpu"))
    last = train(
        config.stages.instruct,
        data,
        engine,
        FolderCheckpoints(folder),
        loaded.encoder.pad_id,
        checkpoint_every=10,
        log_every=2,
        micro_batch=micro_batch,
        on_point=on_point,
    )
    return loaded, last
