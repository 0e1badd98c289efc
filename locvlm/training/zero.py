"""DeepSpeed's ZeRO as an engine: optimizer states (1), gradients (2) and weights (3) spread over the ranks.

deepspeed is imported here only. Checkpoints have the same form as every engine's, not DeepSpeed's own: names and whole
tensors, so a run may go on with another ZeRO stage or another number of workers.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from locvlm.config import ClusterConfig, StageConfig
from locvlm.data.collate import Batch
from locvlm.errors import ConfigError
from locvlm.model.variants import LocVLM
from locvlm.training.engine import (
    MOMENTS,
    States,
    SumLoss,
    all_reduced,
    own_names,
    parameter_groups,
    rank_and_world,
    read_shards,
    refuse_missing,
    set_rate,
    trainable,
)

_COMPILED_COMMUNICATION = "deepspeed_shm_comm"


class ZeroEngine:
    """ZeRO 1, 2 or 3 with AdamW; with `cluster.offload` its optimizer states live in the memory of the host.

    Needs a process group (Ray Train makes it). The model comes in whole on every rank: it is partitioned here, after
    its weights were loaded. With precision bf16 the weights are bf16 beside an fp32 master copy.
    """

    def __init__(self, model: LocVLM, stage: StageConfig, cluster: ClusterConfig, device: torch.device) -> None:
        if not torch.distributed.is_initialized():
            raise ConfigError(
                f"training with cluster.engine {cluster.engine}: ZeRO needs a group of Ray workers; give --workers 1 "
                "or more, or set cluster.engine=ddp"
            )
        self.rank, self.world = rank_and_world()
        self.whole = cluster.engine != "zero3"
        self.device, self.stage = device, stage
        self.precision: str = stage.precision
        self.model = model.to(device)
        self.trained = trainable(model)
        self.sizes = {name: p.numel() for name, p in self.trained.items()}
        if device.type == "cpu":
            _leave_out_compiled_communication()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.engine, *_ = deepspeed.initialize(
            model=SumLoss(model),
            model_parameters=parameter_groups(model, stage),
            config=deepspeed_config(stage, cluster, self.world, fused=device.type == "cuda" and not cluster.offload),
            dist_init_required=False,
        )

    def accumulate(self, batch: Batch, scale: float, *, last: bool) -> torch.Tensor:
        """Forward and backward. DeepSpeed averages over ranks; the loss is a sum."""
        inputs = self._inputs(batch)
        self.engine.set_gradient_accumulation_boundary(last)
        loss: torch.Tensor = self.engine(**inputs)
        self.engine.backward(loss * (scale * self.world), scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the batch; moves nothing before the boundary
        return loss.detach()

    def held_out(self, batch: Batch) -> float:
        """Forward of the module inside the engine, whose steps it does not count; ZeRO-3 gathers weights on the way."""
        with torch.no_grad():
            return float(self.engine.module(**self._inputs(batch)))

    def total(self, values: Sequence[float]) -> list[float]:
        """All-reduce in float64."""
        return all_reduced(values, self.world, self.device)

    def update(self, learning_rate: float) -> float:
        """One AdamW step on the partitions."""
        set_rate(self.engine.optimizer.param_groups, learning_rate)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def discard(self) -> None:
        """Drop the gradients."""
        self.engine.optimizer.zero_grad()

    def rehearse(self, batch: Batch) -> torch.Tensor:
        """With gradients of zero and a learning rate of zero."""
        loss = self.accumulate(batch, 0.0, last=True)
        self.update(0.0)
        self._link_moments()
        self._set_counters(0)
        return loss

    def snapshot(self) -> States:
        """The weights that fall to this rank; every rank takes part in gathering each of them."""
        own = set(own_names(self.sizes, self.rank, self.world))
        found: States = {}
        for name, parameter in self.trained.items():
            tensors = {"weight": safe_get_full_fp32_param(parameter)}
            tensors |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if name in own:
                shape = _whole_shape(parameter)
                found[name] = {key: value.to("cpu", copy=True).view(shape) for key, value in tensors.items()}
        return found

    def restore(self, shards: Iterable[Path], updates: int) -> None:
        """Every rank reads every shard and keeps its partition."""
        missing = set(self.trained)
        for states in read_shards(shards, self.trained):
            for name, values in states.items():
                parameter = self.trained[name]
                self._set_weight(parameter, values["weight"].to(self.device))
                for key in MOMENTS:
                    safe_set_full_optimizer_state(parameter, values[key].to(self.device), key)
                missing.discard(name)
        refuse_missing(missing)
        self._set_counters(updates)

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Gathered one by one: a rank never holds more than one weight that is not its own."""
        whole: dict[str, torch.Tensor] = {}
        for name, parameter in self.trained.items():
            value = safe_get_full_fp32_param(parameter)
            if self.rank == 0:
                whole[name] = value.to("cpu", copy=True).view(_whole_shape(parameter))
        return whole

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = batch.inputs(self.device)
        if self.stage.precision == "bf16" and inputs["pixel_values"] is not None:
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        return inputs

    def _set_weight(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """The copy that computes, then the fp32 master."""
        if self.engine.zero_optimization_stage() < 3:
            parameter.data.copy_(value)
        else:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)

    def _link_moments(self) -> None:
        """DeepSpeed links weights to their moments after the first group has moved, when the others have none yet."""
        zero = self.engine.optimizer
        if self.engine.zero_optimization_stage() < 3:
            for weights, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(weights, flat, zero.optimizer.state)

    def _set_counters(self, updates: int) -> None:
        """AdamW's step counts; at step 0 its moments are zero too."""
        for state in self.engine.optimizer.optimizer.state.values():
            state["step"].fill_(float(updates))
            if updates == 0:
                for key in MOMENTS:
                    state[key].zero_()


def deepspeed_config(stage: StageConfig, cluster: ClusterConfig, world: int, *, fused: bool = False) -> dict[str, Any]:
    """DeepSpeed's own settings. Batch sizes are bookkeeping only: the loop decides what a step is made of.

    `fused`: AdamW in one kernel, which needs no copies as large as its states beside them.
    """
    zero: dict[str, Any] = {
        "stage": int(cluster.engine.removeprefix("zero")),
        "contiguous_gradients": True,
        "overlap_comm": False,  # gradients are summed in one order: runs repeat bit by bit
    }
    if cluster.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        "gradient_clipping": stage.clip_norm,
        "bf16": {"enabled": stage.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": stage.learning_rate,
                "betas": list(stage.betas),
                "eps": 1e-8,
                "weight_decay": stage.weight_decay,
                "torch_adam": True,  # no compiler on the machine is needed
                "fused": fused or None,
            },
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _leave_out_compiled_communication() -> None:
    """On CPUs DeepSpeed compiles an operation for shared memory at first use; gloo serves without a compiler.

    The switch is a private name: where it is gone DeepSpeed compiles as it likes.
    """
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict) and _COMPILED_COMMUNICATION in compatible:
        compatible[_COMPILED_COMMUNICATION] = False
