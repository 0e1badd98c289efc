"""How a step is spread over processes: the loop knows an engine, not a framework."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from locvlm.config import StageConfig
from locvlm.data.collate import Batch
from locvlm.errors import CheckpointError
from locvlm.model.variants import LocVLM
from locvlm.training.precision import autocast, computed_in, say

MOMENTS = ("exp_avg", "exp_avg_sq")

# name of a trained weight -> {"weight", "exp_avg", "exp_avg_sq"}, whole tensors in fp32
States = dict[str, dict[str, torch.Tensor]]


class Engine(Protocol):
    """Forward, backward and update of one model, and its part of a checkpoint.

    A checkpoint holds every trained weight and its moments once, under its name, spread over one shard a rank; so any
    engine with any number of ranks takes up what any other left.
    """

    rank: int
    world: int
    whole: bool  # every rank holds all weights, so it can run the model by itself
    precision: str  # what it computes in, which on some processors is not what the stage says

    def accumulate(self, batch: Batch, scale: float, *, last: bool) -> torch.Tensor:
        """Add the gradient of scale * (summed token loss of `batch`), summed over ranks; returns the loss of this rank,
        a number that stays on the device until someone looks.

        `last`: no further batch before `update`; the ranks may exchange gradients then.
        """

    def held_out(self, batch: Batch) -> float:
        """The summed token loss of `batch` on this rank, without gradients. All ranks call it as often."""

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over all ranks."""

    def update(self, learning_rate: float) -> float:
        """Clip and apply the gradients, clear them; returns the gradient norm before clipping. Where that is not finite
        the run ends, and plain PyTorch moves nothing. The adapter moves at its own share of the learning rate where the
        stage gives it one."""

    def discard(self) -> None:
        """Clear the gradients without an update."""

    def rehearse(self, batch: Batch) -> torch.Tensor:
        """Forward, backward and an update that moves nothing: what fits here fits the run; returns the loss of this
        rank. Optimizer states exist afterwards, as at step 0."""

    def snapshot(self) -> States:
        """This rank's share of the checkpoint, copied to the CPU: later steps do not change it. All ranks call it."""

    def restore(self, shards: Iterable[Path], updates: int) -> None:
        """Take up the shards that `snapshot` gave on all ranks after `updates` updates; after `rehearse` only.
        All ranks call it."""

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """The trained weights, whole, in fp32 on the CPU (rank 0; empty elsewhere). All ranks call it."""


class SumLoss(nn.Module):
    """`LocVLM.sum_loss` as a forward, which distributed wrappers hook."""

    def __init__(self, model: LocVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> torch.Tensor:
        """The summed token loss."""
        return self.model.sum_loss(**inputs)


class TorchEngine:
    """Plain PyTorch: one process, or DistributedDataParallel where a process group exists."""

    whole = True

    def __init__(self, model: LocVLM, stage: StageConfig, device: torch.device) -> None:
        self.rank, self.world = rank_and_world()
        self.device, self.stage = device, stage
        self.precision = computed_in(device, stage.precision)
        if self.rank == 0:
            say(device, stage.precision)
        self.model = model.to(device)
        self.trained = trainable(model)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, stage),
            lr=stage.learning_rate,
            betas=stage.betas,
            eps=1e-8,
            fused=device.type == "cuda" or None,
        )
        self.step: nn.Module = SumLoss(model)
        if self.world > 1:
            # no buffer changes during training, so none needs to be sent around
            self.step = DistributedDataParallel(self.step, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def accumulate(self, batch: Batch, scale: float, *, last: bool) -> torch.Tensor:
        """Forward and backward in the stage's precision; DDP exchanges gradients on the last batch only."""
        waits = self.step.no_sync() if isinstance(self.step, DistributedDataParallel) and not last else nullcontext()
        with waits:
            with autocast(self.device, self.precision):
                loss = self.step(**batch.inputs(self.device))
            (loss * (scale * self.world)).backward()  # DDP averages over ranks; the loss is a sum
        found: torch.Tensor = loss.detach()
        return found

    def held_out(self, batch: Batch) -> float:
        """Forward in the stage's precision, past DDP: nothing is exchanged."""
        with torch.no_grad(), autocast(self.device, self.precision):
            return float(self.model.sum_loss(**batch.inputs(self.device)))

    def total(self, values: Sequence[float]) -> list[float]:
        """All-reduce in float64."""
        return all_reduced(values, self.world, self.device)

    def update(self, learning_rate: float) -> float:
        """One AdamW step; none with gradients that are not finite."""
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.stage.clip_norm))
        set_rate(self.optimizer.param_groups, learning_rate)
        if math.isfinite(norm):
            self.optimizer.step()
        self.discard()
        return norm

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def rehearse(self, batch: Batch) -> torch.Tensor:
        """With gradients of zero and a learning rate of zero."""
        loss = self.accumulate(batch, 0.0, last=True)
        for parameter in self.trained.values():
            if parameter.grad is not None:
                parameter.grad.zero_()  # 0 x an infinite loss is not zero
        self.update(0.0)
        for state in self.optimizer.state.values():
            state["step"].zero_()
        return loss

    def snapshot(self) -> States:
        """The weights that fall to this rank, with AdamW's moments."""
        found: States = {}
        for name in own_names({name: p.numel() for name, p in self.trained.items()}, self.rank, self.world):
            parameter = self.trained[name]
            state = self.optimizer.state[parameter]
            tensors = {"weight": parameter.detach(), **{key: state[key] for key in MOMENTS}}
            found[name] = {key: value.to("cpu", copy=True) for key, value in tensors.items()}
        return found

    def restore(self, shards: Iterable[Path], updates: int) -> None:
        """Back into the parameters and moments, bit by bit."""
        missing = set(self.trained)
        for states in read_shards(shards, self.trained):
            for name, values in states.items():
                parameter = self.trained[name]
                with torch.no_grad():
                    parameter.copy_(values["weight"])
                    for key in MOMENTS:
                        self.optimizer.state[parameter][key].copy_(values[key])
                missing.discard(name)
        refuse_missing(missing)
        for state in self.optimizer.state.values():
            state["step"].fill_(float(updates))

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """The parameters."""
        if self.rank != 0:
            return {}
        return {name: p.detach().to("cpu", torch.float32) for name, p in self.trained.items()}


def rank_and_world() -> tuple[int, int]:
    """Of this process in its process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that the stage trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(model: LocVLM, stage: StageConfig) -> list[dict[str, Any]]:
    """AdamW's groups: biases and norms are exempt from weight decay, and the adapter may have a learning rate of its
    own; `share`: a group's learning rate over the stage's."""
    share = 1.0 if stage.adapter_learning_rate is None else stage.adapter_learning_rate / stage.learning_rate
    adapter = {id(p) for p in model.adapter.parameters()}
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in trainable(model).values():
        key = (parameter.ndim > 1, share if id(parameter) in adapter else 1.0)
        found.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": stage.weight_decay if decayed else 0.0, "share": share}
        for (decayed, share), parameters in found.items()
    ]


def set_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Give every group its share of the learning rate."""
    for group in groups:
        group["lr"] = learning_rate * group["share"]


def all_reduced(values: Sequence[float], world: int, device: torch.device) -> list[float]:
    """The sum of each value over all ranks, in float64."""
    if world == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device if device.type == "cuda" else None)
    dist.all_reduce(tensor)
    return [float(v) for v in tensor]


def own_names(sizes: Mapping[str, int], rank: int, world: int) -> list[str]:
    """The names that `rank` writes: the largest first, each to the rank with the least so far."""
    loads = [0] * world
    own = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        if least == rank:
            own.append(name)
    return own


def read_shards(shards: Iterable[Path], trained: Mapping[str, nn.Parameter]) -> Iterable[States]:
    """The shards one by one. Raises CheckpointError for one that cannot be read or is another model's."""
    for path in shards:
        try:
            states: States = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(
                f"resuming from {path}: it cannot be read ({error}); remove this checkpoint"
            ) from None
        unknown = sorted(states.keys() - trained.keys())
        if unknown:
            raise CheckpointError(f"resuming from {path}: it holds {unknown[0]}, which this stage does not train")
        yield states


def refuse_missing(missing: Iterable[str]) -> None:
    """Raises CheckpointError when a trained weight was in no shard."""
    names = sorted(missing)
    if names:
        raise CheckpointError(
            f"resuming: {len(names)} trained weight(s) are in no shard of the checkpoint, the first is {names[0]}; "
            "remove this checkpoint to resume from the one before"
        )
