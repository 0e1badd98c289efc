"""The one training loop: plain, under Ray, with any engine.

Loss = cross-entropy summed over the supervised tokens of the whole step (all ranks, all micro-batches) divided by their
number, so a short LocPred answer weighs as much a token as a long caption.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from locvlm.config import StageConfig
from locvlm.data.collate import Batch, collate
from locvlm.data.dataset import TrainingData
from locvlm.errors import ConfigError, LocVLMError
from locvlm.training.engine import Engine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the training curve; `loss` is per supervised token, averaged since the last point; sums are over
    the whole run so far."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    targets: int
    conversations: int
    seconds: float


class Checkpoints(Protocol):
    """Where the loop keeps what it needs to go on. `latest` is None for a new run."""

    def latest(self) -> Path | None: ...  # noqa: D102

    def save(self, step: int, write: Callable[[Path], None], point: Point) -> None:
        """Called by every rank at the same steps; `write` fills a folder and must run on rank 0 only."""


class NonFiniteLossError(LocVLMError):
    """The loss became NaN or infinite; nothing was updated with it."""


def n_steps(stage: StageConfig, samples_per_epoch: int) -> int:
    """Optimizer steps of a stage; the last batch of all may reach into a further epoch."""
    if stage.steps is not None:
        return stage.steps
    return math.ceil((stage.epochs or 0) * samples_per_epoch / stage.global_batch)


def learning_rate(stage: StageConfig, step: int, total: int) -> float:
    """Linear warm-up over `warmup_ratio` of all steps, then cosine or linear decay to zero. `step` counts from 0."""
    warmup = round(stage.warmup_ratio * total)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    factor = 0.5 * (1 + math.cos(math.pi * done)) if stage.schedule == "cosine" else 1 - done
    return stage.learning_rate * factor


def share(stage: StageConfig, rank: int, world: int) -> range:
    """The samples of a global batch that a rank works on. Raises ConfigError when the batch does not divide."""
    if stage.global_batch % world:
        legal = [n for n in range(1, stage.global_batch + 1) if stage.global_batch % n == 0]
        raise ConfigError(
            f"dividing the batch: global_batch {stage.global_batch} does not divide among {world} workers; "
            f"use one of {legal} workers or another global_batch"
        )
    size = stage.global_batch // world
    return range(rank * size, (rank + 1) * size)


def train(
    stage: StageConfig,
    data: TrainingData,
    engine: Engine,
    checkpoints: Checkpoints,
    pad_id: int,
    *,
    checkpoint_every: int,
    log_every: int,
    micro_batch: int = 0,
    on_point: Callable[[Point], None] = lambda point: None,
    show_progress: bool = False,
) -> Point:
    """Train to the end of the stage, from the last checkpoint if there is one; returns the last point of the curve.

    `micro_batch`: samples a forward pass (0: the rank's whole share at once). Raises NonFiniteLossError
    before the optimizer moves when the loss is not a number.
    """
    total = n_steps(stage, len(data))
    own = share(stage, engine.rank, engine.world)
    step, counters = _resume(engine, checkpoints)
    begun, since = time.monotonic() - counters.pop("seconds", 0.0), {"loss": 0.0, "targets": 0.0}
    point = Point(step, math.nan, 0.0, 0.0, int(counters["tokens"]), int(counters["targets"]), 0, 0.0)
    with _progress(show_progress and engine.rank == 0) as bar:
        task = bar.add_task("training", total=total, completed=step, loss=math.nan)
        while step < total:
            samples = [data.sample(step * stage.global_batch + i) for i in own]
            size = micro_batch or len(samples)
            batches = [collate(samples[i : i + size], pad_id) for i in range(0, len(samples), size)]
            loss_sum, sums = _accumulate(engine, batches)
            if not math.isfinite(loss_sum):
                names = [step * stage.global_batch + i for i in own]
                raise NonFiniteLossError(
                    f"training step {step + 1}: the loss is {loss_sum}; nothing was updated. Samples {names[0]}.."
                    f"{names[-1]} on rank {engine.rank}; lower the learning rate or look at these samples"
                )
            rate = learning_rate(stage, step, total)
            norm = engine.update(rate)
            step += 1
            for name, value in sums.items():
                counters[name] += value
            since["loss"] += loss_sum
            since["targets"] += sums["targets"]
            mean = since["loss"] / since["targets"]
            bar.update(task, completed=step, loss=mean)
            last = step == total
            if last or step % log_every == 0 or step % checkpoint_every == 0:
                sizes = {name: int(counters[name]) for name in ("tokens", "targets", "conversations")}
                point = Point(step, mean, rate, norm, **sizes, seconds=round(time.monotonic() - begun, 3))
            if last or step % log_every == 0:
                on_point(point)
                since = {"loss": 0.0, "targets": 0.0}
            if last or step % checkpoint_every == 0:
                checkpoints.save(step, partial(_write, engine=engine, point=point), point)
    return point


def _accumulate(engine: Engine, batches: list[Batch]) -> tuple[float, dict[str, float]]:
    """Forward and backward over the micro-batches of a step; sums over all ranks."""
    names = ("targets", "tokens", "conversations")
    counts = [[batch.n_targets, batch.n_tokens, batch.n_conversations] for batch in batches]
    sums = dict(zip(names, engine.total([float(sum(column)) for column in zip(*counts, strict=True)]), strict=True))
    loss_sum = 0.0
    for batch in batches:
        loss = engine.sum_loss(batch)
        loss_sum += float(loss.detach())
        engine.backward(loss / sums["targets"])
    return engine.total([loss_sum])[0], sums


def _resume(engine: Engine, checkpoints: Checkpoints) -> tuple[int, dict[str, float]]:
    folder = checkpoints.latest()
    if folder is None:
        return 0, {"tokens": 0.0, "targets": 0.0, "conversations": 0.0}
    point = json.loads((folder / "point.json").read_text())
    engine.load_state(torch.load(folder / "state.pt", map_location="cpu", weights_only=True))
    log.info("resuming after step %d", point["step"])
    return point["step"], {name: point[name] for name in ("tokens", "targets", "conversations", "seconds")}


def _write(folder: Path, engine: Engine, point: Point) -> None:
    torch.save(engine.state(), folder / "state.pt")
    (folder / "point.json").write_text(json.dumps(asdict(point)))


def _progress(show: bool) -> Progress:
    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    return Progress(*columns, disable=not show, transient=False)
