"""A stage with LoRA, from its first step to the folder that the next stage begins with."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locvlm.config import resolve
from locvlm.errors import CheckpointError
from locvlm.model import load
from locvlm.model.checkpoint import start
from locvlm.model.lora import is_lora
from locvlm.model.stages import set_trainable
from locvlm.model.variants import LocVLM
from locvlm.training import stage
from locvlm.training.checkpoints import FolderCheckpoints
from locvlm.training.loop import Point
from tests.tiny import World, build_world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(
        tmp_path_factory.mktemp("world"),
        "model.lora={rank: 4, alpha: 8, dropout: 0.2}",
        "stages.instruct.global_batch=4",
        "stages.instruct.conversations_per_image=2",
        "stages.instruct.learning_rate=5e-3",
        "stages.instruct.adapter_learning_rate=1e-3",
        "stages.instruct.steps=6",
        "stages.align.steps=2",
        "stages.align.global_batch=4",
        "cluster.num_workers=0",
        "cluster.checkpoint_every=2",
        "cluster.log_every=1",
    )


def job(world: World, output: Path, *overrides: str, parent: Path | None = None, name: str = "instruct") -> stage.Job:
    config = resolve(world.config.model_dump(mode="json"), overrides)
    data = world.data if name == "instruct" else {"generic": world.data["generic"]}
    return stage.Job(name, config, data, world.images, output, parent)  # type: ignore[arg-type]


def run(job: stage.Job, beat: Callable[[Point], None] = lambda point: None) -> None:
    stage.check(job, 0)
    stage.begin(job)
    stage.run(job, FolderCheckpoints(job.folder), CPU, beat)


def test_the_output_holds_the_base_as_it_was_and_the_updates_beside_it(world: World, tmp_path: Path) -> None:
    run(job(world, tmp_path / "out"))
    begun = start(world.config, None).model.state_dict()
    base = LocVLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    updates = load_file(tmp_path / "out" / "lora" / "adapter_model.safetensors")
    assert len(updates) == 2 * 2 * 7  # factors, layers, linear layers of each
    assert all(value.abs().max() > 0 for value in updates.values())
    loaded = load(tmp_path / "out").model.state_dict()
    adapter = {name for name in begun if "multi_modal_projector" in name}
    assert {name for name in begun if not torch.equal(base[name], begun[name])} == adapter
    moved = {name for name in begun if not torch.equal(loaded[name], begun[name])}
    linear = {name for name in begun if "language_model.layers" in name and "proj" in name}
    assert moved == adapter | linear  # merged; and nothing else moved
    shutil.rmtree(tmp_path / "out" / "lora")
    with pytest.raises(CheckpointError, match="trained with LoRA and its folder lora/ is missing"):
        load(tmp_path / "out")


def test_a_training_checkpoint_holds_only_what_is_trained(world: World, tmp_path: Path) -> None:
    own = job(world, tmp_path / "out")
    run(own)
    latest = FolderCheckpoints(own.folder).latest()
    assert latest is not None
    states = torch.load(latest / "shard-00000-of-00001.pt", weights_only=True)
    assert states
    assert all(is_lora(name) or "multi_modal_projector" in name for name in states)
    whole = load(world.foundation).model
    assert sum(s["weight"].numel() for s in states.values()) < 0.5 * sum(p.numel() for p in whole.parameters())


def test_dropout_does_not_keep_a_resumed_run_from_the_same_weights(world: World, tmp_path: Path) -> None:
    run(job(world, tmp_path / "straight"))

    class PowerCutError(Exception):
        pass

    def cut(point: Point) -> None:
        if point.step == 5:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        run(job(world, tmp_path / "broken"), cut)
    torch.manual_seed(12345)
    run(job(world, tmp_path / "broken"))
    for name in ("model.safetensors", "lora/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / run_name / name) for run_name in ("broken", "straight"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_dropout_takes_part_in_training(world: World, tmp_path: Path) -> None:
    run(job(world, tmp_path / "with"))
    run(job(world, tmp_path / "without", "model.lora.dropout=0"))
    ours, theirs = (load_file(tmp_path / n / "lora" / "adapter_model.safetensors") for n in ("with", "without"))
    assert not all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_stages_follow_one_another(world: World, tmp_path: Path) -> None:
    """align (whole adapter, no updates) -> instruct with LoRA -> instruct again, on the merged weights."""
    run(job(world, tmp_path / "align", name="align"))
    assert not (tmp_path / "align" / "lora").exists()
    run(job(world, tmp_path / "first", parent=tmp_path / "align"))
    second = job(world, tmp_path / "second", parent=tmp_path / "first")
    run(second)
    merged = load(tmp_path / "first").model.state_dict()
    base = load_file(tmp_path / "second" / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    stored = next(key for key in base if key.endswith("layers.0.mlp.up_proj.weight"))
    assert torch.equal(base[stored], merged[name])
    # a parent with other updates is another parent, though its base is the same
    prints = json.loads((tmp_path / "second" / "receipt.json").read_text())
    assert prints["job"] == second.fingerprint
    updates = tmp_path / "first" / "lora" / "adapter_model.safetensors"
    updates.write_bytes(updates.read_bytes()[:-4] + b"\0\0\0\0")
    assert second.fingerprint != prints["job"]


def test_a_parent_that_trained_whole_may_go_on_with_lora(world: World, tmp_path: Path) -> None:
    run(job(world, tmp_path / "whole", "model.lora=null", "stages.instruct.adapter_learning_rate=null"))
    run(job(world, tmp_path / "lora", parent=tmp_path / "whole"))
    assert (tmp_path / "lora" / "lora" / "adapter_config.json").is_file()


def test_recomputing_activations_changes_nothing(world: World, tmp_path: Path) -> None:
    """The dropped places are the same in both passes."""
    for name in ("true", "false"):
        run(job(world, tmp_path / name, f"cluster.recompute={name}"))
    ours, theirs = (load_file(tmp_path / n / "lora" / "adapter_model.safetensors") for n in ("true", "false"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_4bit_base_trains_and_the_output_holds_the_base_in_full(world: World, tmp_path: Path) -> None:
    points: list[Point] = []
    run(job(world, tmp_path / "out", "model.lora.base=4bit", "stages.instruct.steps=20"), points.append)
    assert points[-1].loss < points[0].loss
    base = load_file(tmp_path / "out" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in base.values())
    assert load(tmp_path / "out").config.model.lora is not None


def test_freezing_all_but_the_updates_holds_for_the_engine_too(world: World) -> None:
    loaded = start(world.config, None)
    settings = world.config.stages.instruct
    set_trainable(loaded.model, settings.trainable, world.config.model.lora, 0)
    engine = stage.make_engine(loaded.model, settings, world.config.cluster, CPU)
    trained = engine.trained_weights()
    assert {is_lora(name) or "multi_modal_projector" in name for name in trained} == {True}
