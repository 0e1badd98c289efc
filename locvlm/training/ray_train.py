"""A stage as a Ray Train job: one controller, N workers, restarts after a lost worker. Ray is named here only."""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchTrainer, get_device

from locvlm.errors import LocVLMError, UserError
from locvlm.records import read_json, write_json
from locvlm.training.checkpoints import SaveError, save_error
from locvlm.training.loop import Point
from locvlm.training.stage import Job, run

log = logging.getLogger(__name__)

_REFUSAL = "refusal.json"  # in the run's folder: what a worker found that the user has to mend


@contextlib.contextmanager
def local_head() -> Iterator[str]:
    """A Ray head for this process and its children: RAY_ADDRESS is set while the context is open."""
    _prepare_environment()
    context = ray.init(address="local", log_to_driver=False, logging_level="warning")
    address = context.address_info["gcs_address"]
    os.environ["RAY_ADDRESS"] = address
    try:
        yield address
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        ray.shutdown()


def train_on_ray(job: Job, n_workers: int) -> None:
    """Run the stage on `n_workers` workers of the cluster at RAY_ADDRESS, or on a Ray started for it.

    The same job in the same folder goes on from its last checkpoint. Raises the user's error as such, and LocVLMError
    when the workers failed more often than `cluster.max_failures`.
    """
    cluster = job.config.cluster
    _prepare_environment(elastic=cluster.min_workers > 0)
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), logging_level="warning")
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0  # where there are too few, Ray waits for more and says so
    if not use_gpu:
        log.info("training %s: the cluster has no GPU; training on its CPUs", job.stage)
    refusal = job.folder / _REFUSAL
    refusal.unlink(missing_ok=True)
    _forget_removed(job.folder / "ray")
    trainer = TorchTrainer(
        _worker,
        train_loop_config=job.to_dict(),
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, n_workers) if cluster.min_workers else n_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(job.folder.resolve()),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    for left in reversed(range(cluster.max_failures + 1)):
        try:
            trainer.fit()
            return
        except ray.train.TrainingFailedError as error:
            if not (left and _lost_while_starting(error)):
                raise _cause(error) from error
            log.warning("training %s: a worker was lost while it started; starting the workers again", job.stage)
        finally:
            refusal.unlink(missing_ok=True)


class RayCheckpoints:
    """The loop's checkpoints as Ray Train's: `save` is a barrier over all ranks."""

    def latest(self) -> Path | None:
        """The last checkpoint that Ray registered, where it lies: in the run's folder, which all machines share."""
        checkpoint = ray.train.get_checkpoint()
        return None if checkpoint is None else Path(checkpoint.path)

    def save(self, step: int, write: Callable[[Path], None], point: Point) -> None:
        """Every rank writes its shard to its own disk; Ray carries it to the storage while training goes on, and counts
        the checkpoint only when all shards are there."""
        folder = Path(tempfile.mkdtemp(prefix="locvlm-"))
        try:
            write(folder)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
            shutil.rmtree(folder, ignore_errors=True)
            raise save_error(step, folder, error) from None
        ray.train.report(
            asdict(point),
            Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step-{step:09d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def finish(self) -> None:
        """Nothing to do: Ray waits for its uploads when the worker ends."""

    def preempted(self) -> bool:
        """Whether Ray was told that a node of this run goes away. It restarts the workers elsewhere when the time is
        up, at no charge to `cluster.max_failures`."""
        return ray.train.get_preemption_info() is not None


def _worker(values: dict[str, Any]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    job = Job.from_dict(values)
    refusal = job.folder / _REFUSAL
    if refusal.is_file():  # Ray starts the workers again after any error; this one would only come again
        raise UserError(read_json(refusal)["message"])
    torch.set_num_threads(max(1, int(job.config.cluster.cpus_per_worker)))
    try:
        run(job, RayCheckpoints(), get_device())
    except SaveError:  # another machine may have room
        raise
    except UserError as error:
        with contextlib.suppress(OSError):  # without it, on a disk that is full, the workers are started again in vain
            write_json(refusal, {"message": str(error)})
        raise


def _forget_removed(folder: Path) -> None:
    """Take checkpoints that are gone off Ray's list of them, with which Ray refuses to start: so that one that is
    damaged can be removed to go on from the one before."""
    path = folder / "checkpoint_manager_snapshot.json"
    if not path.is_file():
        return
    state = read_json(path)
    listed = list(zip(state["checkpoint_results"], state["checkpoint_report_indices"], strict=True))
    kept = [entry for entry in listed if (folder / entry[0]["checkpoint_dir_name"]).is_dir()]
    if len(kept) == len(listed):
        return
    if not kept:
        log.warning("no checkpoint of the unfinished run lies in %s any more; beginning again", folder)
        shutil.rmtree(folder)
        return
    last, _ = max(kept, key=lambda entry: entry[1])
    log.warning(
        "%d checkpoint(s) are gone from %s; going on from %s",
        len(listed) - len(kept),
        folder,
        last["checkpoint_dir_name"],
    )
    state["checkpoint_results"] = [result for result, _ in kept]
    state["checkpoint_report_indices"] = [index for _, index in kept]
    state["latest_checkpoint_result"] = last
    write_json(path, state)


def _lost_while_starting(error: Exception) -> bool:
    """Whether a worker died after it was made and before it was at work. Ray Train restarts for all other losses, and
    gives up for this one."""
    return isinstance(error, ray.train.ControllerError) and isinstance(error.controller_failure, RayActorError)


def _cause(error: Exception) -> LocVLMError:
    """What the workers said: the user's mistake if it was one, else the words of the first failure."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return type(cause)(str(cause))
            cause = getattr(cause, "cause", None) or cause.__cause__
    return LocVLMError(f"training on Ray failed: {error}")


def _prepare_environment(*, elastic: bool = False) -> None:
    """Ray's own switches, where the user has not set them; none changes a result."""
    directory = str(Path(sys.executable).parent)
    if directory not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([directory, os.environ.get("PATH", "")])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A100 nodes pull a large image first. An elastic run may have counted on a node that is lost: it looks again soon
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60" if elastic else "600")
    home = Path.home()
    if "RAY_AUTH_MODE" not in os.environ and not os.access(home, os.W_OK):
        os.environ["RAY_AUTH_MODE"] = "disabled"  # the token file could not be written
