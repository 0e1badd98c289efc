"""The loop: schedule, token-exact loss, packing, resume, refusal of bad batches."""

import dataclasses
import errno
import json
import math
import os
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from locvlm.config import ClusterConfig, ExperimentConfig, resolve
from locvlm.coordinates import make_location_format
from locvlm.data.collate import Batch, collate
from locvlm.data.conversations import open_conversations
from locvlm.data.dataset import Sample, TrainingData
from locvlm.data.instruct import Renderer
from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.geometry import make_geometry
from locvlm.model import load
from locvlm.model.checkpoint import LoadedModel, start
from locvlm.model.stages import set_trainable
from locvlm.pixels import open_images
from locvlm.presets import preset
from locvlm.training import stage
from locvlm.training.checkpoints import FolderCheckpoints, SaveError
from locvlm.training.engine import TorchEngine
from locvlm.training.loop import NonFiniteLossError, Point, learning_rate, micro_batches, n_steps, share, train
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
        open_images(world.images),
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


def token_losses(loaded: LoadedModel, batch: Batch) -> torch.Tensor:
    """[targets]: the loss of every supervised token."""
    logits: list[torch.Tensor] = []
    hook = loaded.model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    with torch.no_grad():
        loaded.model.sum_loss(**batch.inputs(torch.device("cpu")))
    hook.remove()
    return torch.nn.functional.cross_entropy(logits[0], batch.targets, reduction="none")


def test_packed_conversations_cost_what_they_cost_alone(world: World) -> None:
    """Each supervised token by itself, in a model whose attention is far from even: seeing a neighbour, or standing
    behind it, would show."""
    loaded = load(world.foundation)
    with torch.no_grad():
        for name, weight in loaded.model.model.language_model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
                weight *= 15
    config = changed(world.config, "stages.instruct.conversations_per_image=5")
    data = training_data(world, loaded, config)
    samples = [data.sample(i) for i in range(3)]
    packed = collate(samples, loaded.encoder.pad_id)
    assert packed.n_conversations == 15
    assert packed.owners is not None
    assert packed.position_ids is not None
    alone = [dataclasses.replace(s, branches=(branch,)) for s in samples for branch in s.branches]
    wanted = torch.cat([token_losses(loaded, collate([s], 3)) for s in alone])
    torch.testing.assert_close(token_losses(loaded, packed), wanted, rtol=1e-5, atol=1e-5)
    leaking = dataclasses.replace(packed, owners=packed.owners.clamp(max=1))
    behind = dataclasses.replace(
        packed, position_ids=torch.arange(packed.input_ids.shape[1]).expand_as(packed.input_ids)
    )
    for wrong in (leaking, behind):
        assert float((token_losses(loaded, wrong) - wanted).abs().max()) > 1e-2


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
        pixels = batch.inputs(torch.device("cpu"))["pixel_values"]
        theirs = loaded.model(input_ids=ids, pixel_values=pixels, labels=labels).loss
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


def test_the_notice_of_a_machine_that_goes_saves_one_step_and_stops_nothing(world: World, tmp_path: Path) -> None:
    class Leaving(FolderCheckpoints):
        """The notice comes in the seventh step and is not taken back."""

        asked, saved = 0, 0

        def preempted(self) -> bool:
            self.asked += 1
            return self.asked >= 7

        def save(self, step: int, write: Callable[[Path], None], point: Point) -> None:
            super().save(step, write, point)
            self.saved += 1

    places = Leaving(tmp_path / "run", keep=9)
    trained, last = _train(world, tmp_path / "run", steps=20, checkpoints=places)
    assert last.step == 20
    assert [p.name for p in sorted((tmp_path / "run").iterdir())] == [f"step-{n:09d}" for n in (7, 10, 20)]
    assert places.saved == 3
    straight, _ = _train(world, tmp_path / "straight", steps=20)
    ours, theirs = trained.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_the_stages_own_parts_move(world: World, tmp_path: Path) -> None:
    before = load(world.foundation).model.state_dict()
    loaded, _ = _train(world, tmp_path, steps=2)
    moved = {name for name, value in loaded.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("model.multi_modal_projector", "model.language_model", "lm_head")) for name in moved)
    assert any(name.startswith("model.language_model") for name in moved)


def test_a_loss_that_is_not_a_number_stops_before_anything_moves(world: World, tmp_path: Path) -> None:
    config = changed(world.config, "stages.instruct.global_batch=4", "stages.instruct.steps=3")
    loaded = start(config, None)
    set_trainable(loaded.model, ("adapter", "language"))
    before: dict[str, torch.Tensor] = {}
    data = training_data(world, loaded, config)
    good = data.sample
    bad = next(index for index in (5, 6, 7) if index not in data.longest(1))  # of the second step, not tried before

    def spoilt(index: int) -> Sample:
        if index == 4:  # the second step begins
            before.update({name: value.clone() for name, value in loaded.model.state_dict().items()})
        sample = good(index)
        spoilt_features = np.full((loaded.encoder.n_image_tokens, 32), math.nan, np.float16)
        return dataclasses.replace(sample, pixels=None, features=spoilt_features) if index == bad else sample

    data.sample = spoilt  # type: ignore[method-assign]
    engine = TorchEngine(loaded.model, config.stages.instruct, torch.device("cpu"))
    with pytest.raises(NonFiniteLossError) as error:
        train(config.stages.instruct, data, engine, FolderCheckpoints(tmp_path), 3, cluster(micro_batch=1))
    assert "training step 2" in str(error.value)
    assert f"forward pass {bad - 3} of rank 0" in str(error.value)
    assert data.describe(bad) in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_every_rank_names_the_samples_that_another_rank_found_bad(world: World, tmp_path: Path) -> None:
    """Ray hands on what the first rank says, whichever rank it was."""

    class OtherRank(TorchEngine):
        """The second of two ranks reports its first pass in step 1; it has samples 2 and 3 of 4."""

        looks = 0

        def total(self, values: Sequence[float]) -> list[float]:
            found = list(values)
            if len(found) == 3:  # loss, and where each rank's first bad sample is
                self.looks += 1
                found[2] = float(self.looks == 2)  # the first look is at the longest batch
            return found

    config = changed(world.config, "stages.instruct.global_batch=4", "stages.instruct.steps=2")
    loaded = start(config, None)
    set_trainable(loaded.model, ("adapter", "language"))
    data = training_data(world, loaded, config)
    engine = OtherRank(loaded.model, config.stages.instruct, torch.device("cpu"))
    engine.world = 2
    with pytest.raises(NonFiniteLossError) as error:
        train(config.stages.instruct, data, engine, FolderCheckpoints(tmp_path), 3, cluster(micro_batch=1))
    assert str(error.value).startswith("training step 1: the loss is not a finite number; nothing was updated.")
    assert f"forward pass 1 of rank 1 ({data.describe(2)})" in str(error.value)


def test_a_gradient_that_is_not_a_number_moves_nothing(world: World, tmp_path: Path) -> None:
    loaded = start(world.config, None)
    set_trainable(loaded.model, ("adapter", "language"))
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    loaded.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    engine = TorchEngine(loaded.model, world.config.stages.instruct, torch.device("cpu"))
    data = training_data(world, loaded, world.config)
    with pytest.raises(NonFiniteLossError, match=r"training step 1: .* gradient is not finite"):
        train(world.config.stages.instruct, data, engine, FolderCheckpoints(tmp_path), 3, cluster())
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert FolderCheckpoints(tmp_path).latest() is None


def test_a_model_that_is_broken_from_the_start_is_found_before_the_first_step(world: World, tmp_path: Path) -> None:
    loaded = start(world.config, None)
    set_trainable(loaded.model, ("adapter", "language"))
    with torch.no_grad():
        loaded.model.lm_head.weight[0, 0] = math.nan
    engine = TorchEngine(loaded.model, world.config.stages.instruct, torch.device("cpu"))
    with pytest.raises(NonFiniteLossError, match="trying the longest batch before step 1"):
        train(
            world.config.stages.instruct,
            training_data(world, loaded, world.config),
            engine,
            FolderCheckpoints(tmp_path),
            3,
            cluster(),
        )


def test_a_batch_that_does_not_fit_the_memory_is_found_before_the_first_step(world: World, tmp_path: Path) -> None:
    class Hungry(TorchEngine):
        """Asks for more than there is."""

        def accumulate(self, batch: Batch, scale: float, *, last: bool) -> torch.Tensor:
            return torch.empty(1 << 55)

    config = changed(world.config, "stages.instruct.global_batch=6", "stages.instruct.steps=3")
    loaded = start(config, None)
    set_trainable(loaded.model, ("adapter", "language"))
    engine = Hungry(loaded.model, config.stages.instruct, torch.device("cpu"))
    data = training_data(world, loaded, config)
    with pytest.raises(ConfigError, match=r"the longest batch \(6 samples .*does not fit the memory .*micro_batch"):
        train(config.stages.instruct, data, engine, FolderCheckpoints(tmp_path), 3, cluster())
    assert not list(tmp_path.iterdir())


def test_the_rehearsal_leaves_no_trace(world: World, tmp_path: Path) -> None:
    config = changed(world.config, "stages.instruct.weight_decay=0.1")
    weights = []
    for rehearsed in (False, True):
        loaded = start(config, None)
        set_trainable(loaded.model, ("adapter", "language"))
        data = training_data(world, loaded, config)
        engine = TorchEngine(loaded.model, config.stages.instruct, torch.device("cpu"))
        batch = collate([data.sample(0), data.sample(1)], 3)
        if rehearsed:
            engine.rehearse(batch)
        engine.accumulate(batch, 1 / batch.n_targets, last=True)
        engine.update(1e-3)
        weights.append(engine.trained_weights())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_longest_samples_are_really_the_longest(world: World) -> None:
    loaded = load(world.foundation)
    config = changed(world.config, "stages.instruct.conversations_per_image=0", "stages.instruct.mixture=[]")
    data = training_data(world, loaded, config)
    sizes = [sum(len(branch.ids) for branch in data.sample(i).branches) for i in range(len(data))]
    found = data.longest(5)
    assert len(set(found)) == 5
    assert min(sizes[i] for i in found) >= sorted(sizes)[-len(sizes) // 10]
    packed = training_data(world, loaded, world.config)
    assert len(packed.longest(3)) == 3


def test_batches_grouped_by_length_waste_less_and_lose_nothing(world: World) -> None:
    loaded = load(world.foundation)
    useful = []
    for grouped in ("false", "true"):
        config = changed(
            world.config,
            "stages.instruct.conversations_per_image=0",
            "stages.instruct.mixture=[]",
            "stages.instruct.global_batch=8",
            f"stages.instruct.group_by_length={grouped}",
        )
        data = training_data(world, loaded, config)
        for epoch in (0, 1):
            rows = [tuple(row) for row in data._order(epoch)]
            assert len(set(rows)) == len(data)
        batches = [
            collate([data.sample(s * 8 + i) for i in range(8)], 3) for s in range(len(data) // 8, len(data) // 4)
        ]
        text = sum(batch.n_tokens for batch in batches) / sum(batch.input_ids.numel() for batch in batches)
        useful.append(text)
    assert useful[1] > useful[0] + 0.02
    assert useful[1] > 0.88


def test_threads_that_read_ahead_change_nothing(world: World, tmp_path: Path) -> None:
    alone, ahead = (_train(world, tmp_path / str(n), steps=4, threads=n)[0] for n in (0, 3))
    ours, theirs = ahead.model.state_dict(), alone.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_recomputing_activations_changes_nothing(world: World, tmp_path: Path) -> None:
    kept, recomputed = (_train(world, tmp_path / str(n), steps=3, recompute=n)[0] for n in (False, True))
    ours, theirs = recomputed.model.state_dict(), kept.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("batch", "world_size", "micro"), [(64, 8, 3), (64, 3, 4), (7, 3, 2), (5, 5, 4), (64, 8, 0), (64, 3, 1), (48, 5, 1)]
)
def test_every_rank_makes_as_many_passes_and_no_sample_is_lost(batch: int, world_size: int, micro: int) -> None:
    settings = changed(preset("locvlm-b"), f"stages.instruct.global_batch={batch}").stages.instruct
    shares = [share(settings, rank, world_size, elastic=True) for rank in range(world_size)]
    assert [i for own in shares for i in own] == list(range(batch))
    passes = [micro_batches(len(own), settings, world_size, micro) for own in shares]
    assert len({len(parts) for parts in passes}) == 1
    for own, parts in zip(shares, passes, strict=True):
        assert [i for part in parts for i in part] == list(range(len(own)))
        assert all(len(part) <= (micro or batch) for part in parts)
        assert all(parts[:-1])  # only the last may be empty


def test_a_pass_without_samples_counts_for_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that has fewer samples than passes meets the others in one more."""
    plain, point = _train(world, tmp_path / "plain", steps=2, micro_batch=3)

    def one_more(n_samples: int, *rest: Any) -> list[range]:
        return [*micro_batches(n_samples, *rest), range(n_samples, n_samples)]

    monkeypatch.setattr("locvlm.training.loop.micro_batches", one_more)
    padded, same = _train(world, tmp_path / "padded", steps=2, micro_batch=3)
    assert dataclasses.replace(same, seconds=0) == dataclasses.replace(point, seconds=0)
    ours, theirs = padded.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(world: World, tmp_path: Path) -> None:
    places = FolderCheckpoints(tmp_path / "run")
    point = Point(1, 0.0, 0.0, 0.0, 0, 0, 0, 0.0)
    places.save(1, lambda folder: (folder / "a").touch(), point)
    places.finish()

    def full(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    places.save(2, full, point)
    with pytest.raises(SaveError, match=r"step 2 in .*No space left on device; the checkpoint before it is whole"):
        places.finish()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-000000001"]
    assert places.latest() == tmp_path / "run" / "step-000000001"


def test_a_full_disk_stops_the_run_and_a_rerun_goes_on(world: World, tmp_path: Path) -> None:
    straight, _ = _train(world, tmp_path / "straight", steps=20)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(point: Point) -> None:
        if point.step == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limit[1]))

    try:
        with pytest.raises(SaveError, match="saving the checkpoint of step 20"):
            _train(world, tmp_path / "run", steps=20, on_point=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-000000010"]
    again, _ = _train(world, tmp_path / "run", steps=20)
    ours, theirs = again.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_storage_that_goes_away_stops_the_run_and_a_rerun_goes_on(world: World, tmp_path: Path) -> None:
    """What was mounted is another place now; the checkpoint before is whole when it comes back."""
    straight, _ = _train(world, tmp_path / "straight", steps=20)
    folder = tmp_path / "run"

    def lose(point: Point) -> None:
        if point.step == 12:
            folder.rename(tmp_path / "elsewhere")
            folder.write_text("not a folder")

    with pytest.raises(SaveError, match=r"saving the checkpoint of step 20 .*bring the storage back"):
        _train(world, folder, steps=20, on_point=lose)
    folder.unlink()
    (tmp_path / "elsewhere").rename(folder)
    assert [p.name for p in folder.iterdir()] == ["step-000000010"]
    again, _ = _train(world, folder, steps=20)
    ours, theirs = again.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def drop_a_shard(folder: Path) -> None:
    (folder / "shard-00000-of-00001.pt").unlink()


def cut_a_shard(folder: Path) -> None:
    path = folder / "shard-00000-of-00001.pt"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(("damage", "message"), [(drop_a_shard, "0 of 1 shards"), (cut_a_shard, "cannot be read")])
def test_a_damaged_training_checkpoint_is_told_apart(
    world: World, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    _train(world, tmp_path, steps=10)
    kept = FolderCheckpoints(tmp_path).latest()
    assert kept is not None
    damage(kept)
    with pytest.raises(CheckpointError, match=message):
        _train(world, tmp_path, steps=20)


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


def cluster(**values: Any) -> ClusterConfig:
    defaults = {"num_workers": 0, "checkpoint_every": 10, "log_every": 2, "loader_threads": 0}
    return ClusterConfig(**{**defaults, **values})


def _train(
    world: World,
    folder: Path,
    steps: int,
    *,
    micro_batch: int = 0,
    threads: int = 0,
    recompute: bool = False,
    batch: int = 4,
    n_images: int = 0,
    rate: float = 1.5e-3,
    on_point: Callable[[Point], None] = lambda point: None,
    checkpoints: FolderCheckpoints | None = None,
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
        data.image_keys = data.image_keys[:n_images]
    settings = cluster(micro_batch=micro_batch, loader_threads=threads, recompute=recompute)
    engine = stage.make_engine(loaded.model, config.stages.instruct, settings, torch.device("cpu"))
    last = train(
        config.stages.instruct,
        data,
        engine,
        checkpoints or FolderCheckpoints(folder),
        loaded.encoder.pad_id,
        settings,
        on_point=on_point,
    )
    return loaded, last
