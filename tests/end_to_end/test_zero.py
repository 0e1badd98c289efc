"""DeepSpeed's ZeRO on two CPU processes with gloo: the same losses as plain DDP, whole weights out, exact resume.

This proves the wiring (partitions, gathering, checkpoints); speed and memory need GPUs.
"""

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from locvlm.config import ClusterConfig
from locvlm.data.collate import Batch, collate
from locvlm.data.dataset import Branch, Sample
from locvlm.model.checkpoint import LoadedModel, start
from locvlm.model.stages import set_trainable
from locvlm.presets import preset
from locvlm.training.stage import make_engine

ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero2 offload")
LORA = ("ddp lora", "zero2 lora")
STEPS = 5
SAVED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What two processes found with each engine; with weight decay and a learning rate of the adapter's own AdamW has
    four groups."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=worker, args=(rank, port, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
        assert process.exitcode == 0
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in (*ENGINES, *LORA)}


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", ENGINES[1:])
def test_zero_gives_the_losses_and_gradient_norms_of_plain_ddp(results: dict[str, dict[str, Any]], name: str) -> None:
    for key in ("losses", "norms"):
        assert results[name][key] == pytest.approx(results["ddp"][key], rel=2e-5)
    assert results[name]["far_from_ddp"] < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES[1:])
def test_zero_gives_the_held_out_loss_of_plain_ddp(results: dict[str, dict[str, Any]], name: str) -> None:
    """In the middle of a run, whose steps it leaves alone: they equal those of DDP before and after."""
    assert results[name]["held_out"] == pytest.approx(results["ddp"]["held_out"], rel=2e-5)


@pytest.mark.slow
def test_lora_trains_the_same_with_zero_2_as_with_ddp(results: dict[str, dict[str, Any]]) -> None:
    plain, zero = (results[name] for name in LORA)
    for key in ("losses", "norms", "held_out"):
        assert zero[key] == pytest.approx(plain[key], rel=2e-5)
    assert zero["losses"] != pytest.approx(results["zero2"]["losses"], rel=1e-3)
    assert zero["shapes"] == plain["shapes"]
    assert all(".lora_" in name or "multi_modal_projector" in name for name in zero["shapes"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENGINES, *LORA])
def test_a_checkpoint_is_taken_up_bit_by_bit(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["resumed_losses"] == results[name]["losses"][SAVED:]
    assert results[name]["resumed_equal"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_any_engine_goes_on_with_a_checkpoint_of_another(results: dict[str, dict[str, Any]], name: str) -> None:
    assert results[name]["losses_after_ddp"] == pytest.approx(results["ddp"]["losses"][SAVED:], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_one_process_goes_on_with_the_shards_of_two(
    results: dict[str, dict[str, Any]], folder: Path, name: str
) -> None:
    engine, loaded = build("ddp")
    engine.restore(sorted((folder / name).glob("shard-*.pt")), SAVED)
    losses = []
    for step in range(SAVED, STEPS):
        batches = [batch(loaded, 100 * step + 10 * rank + number) for rank in range(2) for number in range(2)]
        targets = sum(b.n_targets for b in batches)
        assert len({b.n_targets for b in batches}) == len(batches)  # or a mean of means would do
        found = [engine.accumulate(b, 1 / targets, last=number == 3) for number, b in enumerate(batches)]
        engine.update(1e-3)
        losses.append(float(sum(found)) / targets)
    assert losses == pytest.approx(results[name]["losses"][SAVED:], rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_the_gathered_weights_are_whole_and_those_the_stage_trains(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    assert results[name]["shapes"] == results["ddp"]["shapes"]
    assert all(not key.startswith("model.vision_tower") for key in results[name]["shapes"])


def worker(rank: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    reference: dict[str, torch.Tensor] = {}
    for name in (*ENGINES, *LORA):
        found, weights = examine(name, rank, folder)
        if rank == 0:
            if name in ("ddp", "ddp lora"):
                reference = weights
            found["far_from_ddp"] = max(float((weights[key] - reference[key]).abs().max()) for key in reference)
            found["shapes"] = {key: list(value.shape) for key, value in weights.items()}
            (folder / f"{name}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def examine(name: str, rank: int, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    engine, loaded = build(name)
    losses, norms = steps(engine, loaded, rank, 0, SAVED)
    (held_out,) = engine.total([engine.held_out(batch(loaded, 1000 + rank))])
    own = folder / name
    own.mkdir(exist_ok=True)
    torch.save(engine.snapshot(), own / f"shard-{rank:05d}.pt")
    dist.barrier()
    more, more_norms = steps(engine, loaded, rank, SAVED, STEPS)
    weights = engine.trained_weights()
    resumed, fresh = build(name)
    resumed.restore(sorted(own.glob("shard-*.pt")), SAVED)
    again, _ = steps(resumed, fresh, rank, SAVED, STEPS)
    theirs = resumed.trained_weights()
    other, fresh = build(name)
    plain = "ddp lora" if name in LORA else "ddp"
    other.restore(sorted((folder / plain).glob("shard-*.pt")), SAVED)
    after_ddp, _ = steps(other, fresh, rank, SAVED, STEPS)
    return {
        "held_out": held_out,
        "losses": losses + more,
        "norms": norms + more_norms,
        "resumed_losses": again,
        "resumed_equal": all(torch.equal(weights[key], theirs[key]) for key in weights),
        "losses_after_ddp": after_ddp,
    }, weights


def build(name: str) -> tuple[Any, LoadedModel]:
    kind, _, more = name.partition(" ")
    settings = ["precision=fp32", "weight_decay=0.1", "adapter_learning_rate=4e-3"]
    lora = ["model.lora={rank: 4, dropout: 0}"] if more == "lora" else []
    config = preset("tiny", [*(f"stages.instruct.{setting}" for setting in settings), *lora])
    loaded = start(config, None)
    set_trainable(loaded.model, config.stages.instruct.trainable, config.model.lora, config.seed)
    cluster = ClusterConfig(num_workers=2, engine=kind, offload=more == "offload")
    engine = make_engine(loaded.model, config.stages.instruct, cluster, torch.device("cpu"))
    engine.rehearse(batch(loaded, 99))
    return engine, loaded


def steps(engine: Any, loaded: LoadedModel, rank: int, begin: int, end: int) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in range(begin, end):
        batches = [batch(loaded, 100 * step + 10 * rank + number) for number in range(2)]
        (targets,) = engine.total([float(sum(b.n_targets for b in batches))])
        found = [engine.accumulate(b, 1 / targets, last=number == 1) for number, b in enumerate(batches)]
        (loss,) = engine.total([float(sum(found))])
        norms.append(engine.update(1e-3))
        losses.append(loss / targets)
    return losses, norms


def batch(loaded: LoadedModel, seed: int) -> Batch:
    """Two samples of random words about random pixels; no two batches of a step have equally many."""
    generator = torch.Generator().manual_seed(seed)
    encoder = loaded.encoder
    samples = []
    for _ in range(2):
        length = 14 + seed % 7 + seed // 10 % 2 * 8
        ids = torch.randint(5, 800, (length,), generator=generator).tolist()
        pixels = (128 + 64 * torch.randn(48, 48, 3, generator=generator)).clamp(0, 255).to(torch.uint8).numpy()
        prefix = [encoder.bos_id, *[encoder.image_id] * encoder.n_image_tokens, 9]
        samples.append(Sample(pixels, prefix, (Branch(ids, [place > 5 for place in range(length)]),)))
    return collate(samples, encoder.pad_id)
