"""The one training loop: plain, under Ray, with any engine.

Loss = cross-entropy summed over the supervised tokens of the whole step (all ranks, all micro-batches) divided by their
number, so a short LocPred answer weighs as much a token as a long caption.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from locvlm.config import ClusterConfig, StageConfig
from locvlm.data.collate import Batch, collate
from locvlm.data.dataset import Sample, TrainingData
from locvlm.errors import CheckpointError, ConfigError, UserError
from locvlm.training.engine import Engine

log = logging.getLogger(__name__)

_POINT_FILE = "point.json"


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
        """Called by every rank at the same steps. `write` puts this rank's files into a folder; it holds a copy of all
        it writes, so it may run while training goes on. Raises what an earlier `write` raised."""

    def finish(self) -> None:
        """Wait until everything is written. Raises what a `write` raised."""

    def preempted(self) -> bool:
        """Whether the machine of some rank will be taken away soon."""


class NonFiniteLossError(UserError):
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


def share(stage: StageConfig, rank: int, world: int, *, elastic: bool = False) -> range:
    """The samples of a global batch that a rank works on: the batch stays what the config says, whatever the number of
    workers. Raises ConfigError when it does not divide; `elastic` runs divide it as evenly as it goes."""
    if stage.global_batch % world and (not elastic or world > stage.global_batch):
        legal = [n for n in range(1, stage.global_batch + 1) if stage.global_batch % n == 0]
        raise ConfigError(
            f"dividing the batch: global_batch {stage.global_batch} does not divide among {world} workers; "
            f"use one of {legal} workers or another global_batch"
        )
    return range(rank * stage.global_batch // world, (rank + 1) * stage.global_batch // world)


def micro_batches(n_samples: int, stage: StageConfig, world: int, micro_batch: int) -> list[range]:
    """A rank's samples in forward passes of at most `micro_batch` (0: all at once): as many passes on every rank, since
    the ranks meet in each of them. Of an elastic run's rank with fewer samples than passes the last pass is empty."""
    largest = -(-stage.global_batch // world)
    n_passes = -(-largest // micro_batch) if micro_batch else 1
    n_filled = min(n_passes, n_samples)
    filled = [range(i * n_samples // n_filled, (i + 1) * n_samples // n_filled) for i in range(n_filled)]
    return filled + [range(n_samples, n_samples)] * (n_passes - n_filled)


def train(
    stage: StageConfig,
    data: TrainingData,
    engine: Engine,
    checkpoints: Checkpoints,
    pad_id: int,
    cluster: ClusterConfig,
    *,
    on_begin: Callable[[int], None] = lambda step: None,
    on_point: Callable[[Point], None] = lambda point: None,
    validate: Callable[[int], None] | None = None,
    show_progress: bool = False,
) -> Point:
    """Train to the end of the stage, from the last checkpoint if there is one; returns the last point of the curve.

    The longest batch runs first without moving anything, so that a run that does not fit ends at once. `on_begin` is
    told the step that it goes on from. `validate` is called by every rank each `cluster.validate_every` steps and at
    the end; the weights come out the same with and without it. When a machine is about to be taken away the step is
    saved, and training goes on until it is gone. Raises NonFiniteLossError before the optimizer moves when the loss is
    not a number.
    """
    run = _Run(stage, data, engine, checkpoints, pad_id, cluster)
    run.rehearse()
    point = run.resume()
    step = point.step
    on_begin(step)
    since = {"loss": 0.0, "targets": 0.0}

    def look() -> None:
        if validate is not None and step and (step == run.total or step % cluster.validate_every == 0):
            validate(step)

    look()  # a run that was cut off between a checkpoint and the look that follows it
    with closing(run.loader), _progress(show_progress and engine.rank == 0) as bar:
        task = bar.add_task("training", total=run.total, completed=step, loss=math.nan)
        while step < run.total:
            rate = learning_rate(stage, step, run.total)
            loss, targets, norm, warned = run.step(step, rate)
            step += 1
            since = {"loss": since["loss"] + loss, "targets": since["targets"] + targets}
            mean = since["loss"] / since["targets"]
            bar.update(task, completed=step, loss=mean)
            last = step == run.total
            point = run.point(step, mean, rate, norm)
            if last or step % cluster.log_every == 0:
                on_point(point)
                since = {"loss": 0.0, "targets": 0.0}
            if last or warned or step % cluster.checkpoint_every == 0:
                run.save(point)
            look()
    checkpoints.finish()
    return point


class _Loader:
    """The batches of each step, one a forward pass; with threads, those of the next step are made while this one is
    computed. `parts`: the places of a batch's samples among those of `indices`; an empty one has the first sample, for
    a pass that counts for nothing."""

    def __init__(
        self,
        data: TrainingData,
        indices: Callable[[int], list[int]],
        parts: Sequence[range],
        pad_id: int,
        n_threads: int,
    ) -> None:
        self.data, self.indices, self.parts, self.pad_id = data, indices, parts, pad_id
        self.pool = ThreadPoolExecutor(n_threads, thread_name_prefix="samples") if n_threads else None
        self.coming: dict[int, Future[list[Batch]]] = {}

    def batches(self, step: int, *, ahead: bool) -> list[Batch]:
        """Those of `step`; `ahead`: begin with the next step's."""
        if self.pool is None:
            return self._collated([self.data.sample(index) for index in self.indices(step)])
        for wanted in (step, step + 1) if ahead else (step,):
            if wanted not in self.coming:
                samples = [self.pool.submit(self.data.sample, index) for index in self.indices(wanted)]
                self.coming[wanted] = self.pool.submit(self._collated_when_made, samples)
        return self.coming.pop(step).result()

    def _collated(self, samples: Sequence[Sample]) -> list[Batch]:
        batches = [collate([samples[i] for i in part] or samples[:1], self.pad_id) for part in self.parts]
        return [batch.pinned() for batch in batches] if torch.cuda.is_available() else batches

    def _collated_when_made(self, samples: Sequence[Future[Sample]]) -> list[Batch]:
        # queued behind its samples, so that a lone thread has made them by now
        return self._collated([future.result() for future in samples])

    def close(self) -> None:
        """Give up what is still being made."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


class _Run:
    """The parts of a training run that its steps share."""

    def __init__(
        self,
        stage: StageConfig,
        data: TrainingData,
        engine: Engine,
        checkpoints: Checkpoints,
        pad_id: int,
        cluster: ClusterConfig,
    ) -> None:
        self.stage, self.data, self.engine, self.checkpoints = stage, data, engine, checkpoints
        self.pad_id = pad_id
        self.total = n_steps(stage, len(data))
        self.cluster = cluster
        self.own, self.parts = self._work_of(engine.rank)
        self.loader = _Loader(
            data,
            lambda step: [step * stage.global_batch + i for i in self.own],
            self.parts,
            pad_id,
            cluster.loader_threads,
        )
        self.counters = {"tokens": 0.0, "targets": 0.0, "conversations": 0.0}
        self.leaving = False
        self.begun = time.monotonic()

    def rehearse(self) -> None:
        """The longest samples through forward, backward and an update that moves nothing."""
        longest = self.data.longest(max(len(part) for part in self.parts))
        try:
            loss = self.engine.rehearse(collate([self.data.sample(index) for index in longest], self.pad_id))
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise ConfigError(
                f"trying the longest batch ({len(longest)} samples a forward pass): it does not fit the memory "
                f"({(str(error) or 'out of memory').splitlines()[0]}); lower cluster.micro_batch, turn "
                "cluster.recompute on, or use a higher ZeRO stage (cluster.engine) or more GPUs"
            ) from None
        self._refuse_bad(0, [float(loss)], lambda rank, number: longest)

    def resume(self) -> Point:
        """Take up the last checkpoint; returns its point, that of step 0 for a new run."""
        folder = self.checkpoints.latest()
        if folder is None:
            return self.point(0, math.nan, 0.0, 0.0)
        try:
            point = json.loads((folder / _POINT_FILE).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"resuming from {folder}: {error}; remove this checkpoint") from None
        # those of an attempt with another number of workers, cut off in the middle of saving, may lie beside them
        shards = sorted(folder.glob(_shard_name("*", point["world"])))
        if len(shards) != point["world"]:
            raise CheckpointError(
                f"resuming from {folder}: it has {len(shards)} of {point['world']} shards; remove this checkpoint to "
                "resume from the one before"
            )
        self.engine.restore(shards, point["step"])
        self.counters = {name: point[name] for name in self.counters}
        self.begun -= point["seconds"]
        log.info("resuming after step %d", point["step"])
        return Point(**{name: value for name, value in point.items() if name != "world"})

    def step(self, step: int, rate: float) -> tuple[float, float, float, bool]:
        """One update; returns the loss sum, the supervised tokens, the gradient norm, and whether it became known just
        now that a machine will go."""
        # what a step draws (dropout) hangs on nothing that was drawn before
        torch.manual_seed(_step_seed(self.data.seed, step, self.engine.rank))
        batches = self.loader.batches(step, ahead=step + 1 < self.total)
        counted = [batch for batch, part in zip(batches, self.parts, strict=True) if part]
        targets, tokens, conversations, leaving = self.engine.total(
            [
                float(sum(batch.n_targets for batch in counted)),
                float(sum(batch.n_tokens for batch in counted)),
                float(sum(batch.n_conversations for batch in counted)),
                float(self.checkpoints.preempted()),
            ]
        )
        losses = [
            self.engine.accumulate(batch, 1 / targets if part else 0.0, last=number == len(batches))
            for number, (batch, part) in enumerate(zip(batches, self.parts, strict=True), 1)
        ][: len(counted)]
        # the only look at the losses: until here the device works ahead of this process
        loss_sum = self._refuse_bad(
            step + 1, torch.stack(losses).tolist(), lambda rank, number: self._samples(step, rank, number)
        )
        norm = self.engine.update(rate)
        if not math.isfinite(norm):
            raise NonFiniteLossError(
                f"training step {step + 1}: the loss is a number ({loss_sum / targets:.4g} a token), but its gradient "
                "is not finite; nothing was saved since the last checkpoint: lower the learning rate, or use precision "
                "fp32"
            )
        for name, value in (("targets", targets), ("tokens", tokens), ("conversations", conversations)):
            self.counters[name] += value
        warned, self.leaving = leaving > 0 and not self.leaving, leaving > 0
        return loss_sum, targets, norm, warned

    def point(self, step: int, loss: float, rate: float, norm: float) -> Point:
        """A point of the curve."""
        sizes = {name: int(value) for name, value in self.counters.items()}
        return Point(step, loss, rate, norm, **sizes, seconds=round(time.monotonic() - self.begun, 3))

    def save(self, point: Point) -> None:
        """Copy this rank's share of the state and have it written."""
        states, rank, world = self.engine.snapshot(), self.engine.rank, self.engine.world

        def write(folder: Path) -> None:
            torch.save(states, folder / _shard_name(f"{rank:05d}", world))
            if rank == 0:
                (folder / _POINT_FILE).write_text(json.dumps({**asdict(point), "world": world}))

        self.checkpoints.save(point.step, write, point)

    def _work_of(self, rank: int) -> tuple[range, list[range]]:
        """The places in the global batch that are a rank's, and those in a forward pass among them."""
        own = share(self.stage, rank, self.engine.world, elastic=self.cluster.min_workers > 0)
        return own, micro_batches(len(own), self.stage, self.engine.world, self.cluster.micro_batch)

    def _samples(self, step: int, rank: int, number: int) -> list[int]:
        """The samples of a rank's forward pass `number` (from 0)."""
        own, parts = self._work_of(rank)
        return [step * self.stage.global_batch + own[i] for i in parts[number]]

    def _refuse_bad(self, step: int, losses: list[float], samples: Callable[[int, int], Sequence[int]]) -> float:
        """The loss sum over all ranks. Raises NonFiniteLossError, on every rank, that names the samples; `samples`:
        those of (rank, forward pass)."""
        bad = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), None)
        # every rank tells where its first bad sample is (plus one), so that all can say it
        where = [0.0] * self.engine.world
        if bad is not None:
            where[self.engine.rank] = 1.0 + bad
        loss_sum, *found = self.engine.total([0.0 if bad is not None else sum(losses), *where])
        if not any(found):
            return loss_sum
        self.engine.discard()
        rank = next(number for number, value in enumerate(found) if value)
        names = ", ".join(self.data.describe(index) for index in samples(rank, int(found[rank]) - 1))
        doing = f"training step {step}" if step else "trying the longest batch before step 1"
        raise NonFiniteLossError(
            f"{doing}: the loss is not a finite number; nothing was updated. It comes from forward pass "
            f"{int(found[rank])} of rank {rank} ({names}); lower the learning rate or look at these samples"
        )


def _is_out_of_memory(error: Exception) -> bool:
    """On a CPU torch says it in words only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _shard_name(rank: str, world: int) -> str:
    return f"shard-{rank}-of-{world:05d}.pt"


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest(), "big") >> 1


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
