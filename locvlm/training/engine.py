"""How a step is spread over processes: the loop knows an engine, not a framework."""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from locvlm.config import StageConfig
from locvlm.data.collate import Batch
from locvlm.model.variants import LocVLM


class Engine(Protocol):
    """Forward, backward and update of one model, and its part of a checkpoint."""

    rank: int
    world: int

    def sum_loss(self, batch: Batch) -> torch.Tensor:
        """The summed token loss of a batch on this rank."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, already scaled, summed over ranks."""

    def total(self, values: list[float]) -> list[float]:
        """Sum of each value over all ranks."""

    def update(self, learning_rate: float) -> float:
        """Clip and apply the gradients, clear them; returns the gradient norm before clipping."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly: trained weights and optimizer state."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a state that `state` returned."""


class _SumLoss(nn.Module):
    """`LocVLM.sum_loss` as a forward, which DistributedDataParallel hooks."""

    def __init__(self, model: LocVLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model.sum_loss(**inputs)


class TorchEngine:
    """Plain PyTorch: one process, or DistributedDataParallel where a process group exists."""

    def __init__(self, model: LocVLM, stage: StageConfig, device: torch.device) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.device, self.stage = device, stage
        self.model = model.to(device)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = [p for p in self.trained.values() if p.ndim > 1]
        kept = [p for p in self.trained.values() if p.ndim <= 1]  # biases and norms are exempt
        groups = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((decayed, stage.weight_decay), (kept, 0.0))
            if parameters
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, eps=1e-8)
        self.step: nn.Module = _SumLoss(model)
        if self.world > 1:
            # no buffer changes during training, so none needs to be sent around
            self.step = DistributedDataParallel(self.step, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def sum_loss(self, batch: Batch) -> torch.Tensor:
        """Forward through DDP where there is one, in the stage's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.stage.precision == "bf16"):
            return self.step(**batch.inputs(self.device))  # type: ignore[no-any-return]

    def backward(self, loss: torch.Tensor) -> None:
        """Backward; DDP sums up over the ranks."""
        (loss * self.world).backward()  # type: ignore[no-untyped-call]  # DDP averages over ranks; the loss is a sum

    def total(self, values: list[float]) -> list[float]:
        """All-reduce in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device if self.device.type == "cuda" else None)
        dist.all_reduce(tensor)
        return [float(v) for v in tensor]

    def update(self, learning_rate: float) -> float:
        """One AdamW step."""
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.stage.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> dict[str, Any]:
        """Trained weights on the CPU and AdamW's moments."""
        return {
            "weights": {name: p.detach().cpu() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Back into the parameters, bit by bit."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
