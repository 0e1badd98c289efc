"""The smallest thing that workers do together: add up a number over all of them."""

import contextlib
import os
import tempfile
import time

import ray
import ray.train
import torch
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from locvlm.errors import LocVLMError
from locvlm.training.ray_train import local_head


def all_reduce(n_workers: int) -> tuple[str, float]:
    """The backend (nccl or gloo) and the seconds of one all-reduce, after a first one that connects the workers.

    On the Ray cluster at RAY_ADDRESS, or on one of this machine that is started for it. Raises LocVLMError.
    """
    with contextlib.ExitStack() as stack:
        if "RAY_ADDRESS" in os.environ:
            ray.init(address=os.environ["RAY_ADDRESS"], logging_level="warning", ignore_reinit_error=True)
        else:
            stack.enter_context(local_head())
        use_gpu = ray.cluster_resources().get("GPU", 0) >= n_workers
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="locvlm-"))
        trainer = TorchTrainer(
            _worker,
            scaling_config=ScalingConfig(
                num_workers=n_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": 0.5, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=RunConfig(name="all-reduce", storage_path=folder, failure_config=FailureConfig(max_failures=0)),
        )
        try:
            result = trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as fault:
            raise LocVLMError(f"adding up a number over {n_workers} workers: {str(fault).strip()[-500:]}") from fault
        backend, seconds = result.return_value
        return str(backend), float(seconds)


def _worker() -> tuple[str, float]:
    device = get_device()
    world = torch.distributed.get_world_size()
    began = 0.0
    for _ in range(2):  # the first one connects the workers
        began = time.perf_counter()
        total = torch.ones(1, device=device)
        torch.distributed.all_reduce(total)
        if int(total.item()) != world:
            raise RuntimeError(f"{world} workers added up 1 to {total.item()}")
    return torch.distributed.get_backend(), time.perf_counter() - began
