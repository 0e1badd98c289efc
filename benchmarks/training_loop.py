"""Our training loop with MLflow on, against a bare PyTorch loop, transformers' `Trainer` and TRL's `SFTTrainer`.

    python benchmarks/training_loop.py [--steps 30] [--rounds 7] [--with-trl DIR]

The same tiny Llava with the same starting weights, the same batches (drawn scenes, collated anew at every step), AdamW
with the same settings and learning rates, clipping at the same norm, a log line every ten steps:

    bare       the fewest lines that train: collate, forward, backward, clip, update
    ours       `locvlm.training.loop.train`, its curve file, and the thread that sends it to MLflow (SQLite)
    trainer    transformers' Trainer around the loss function of `bare`, reporting to nobody
    trl        TRL's SFTTrainer on the model itself with labels, reporting to nobody; needs packages that the project
               does without: `--with-trl` makes an environment for them in a new folder, on top of this one

The losses are compared first, step by step, within 1e-4 (relative); without that there is no figure. The sides run
alternately in one process, every other round in reverse order, the computing on one thread. A round's figure is the
median CPU time of its steps after the first ten, plus a step's share of what other threads took (MLflow's, to its last
word); printed are the medians of the rounds, and of the ratios in a round with the range that their middle half lies
in.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

BATCH = 4
WARM = 10  # steps that are not timed
LOG_EVERY = 10
COMPARED = 10
CLOSE = 1e-4
IGNORE = -100
TRL = "trl==1.16.0"
CPU = torch.device("cpu")


def make_trl(folder: Path) -> Path:
    """A virtual environment with TRL that sees the packages of this one; returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making TRL's environment in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        ours = [path for path in sys.path if path.endswith("site-packages")]
        (site / "locvlm.pth").write_text(
            "".join(f"{path}\n" for path in (*ours, Path(__file__).resolve().parent.parent))
        )
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, TRL, f"torch=={torch.__version__.partition('+')[0]}"], check=True)
    return python


class Task:
    """What all sides train: samples in memory, the starting model, the stage."""

    def __init__(self, folder: Path) -> None:
        from locvlm.config import InstructConfig
        from locvlm.coordinates import make_location_format
        from locvlm.data.coco import read_instances
        from locvlm.data.conversations import open_conversations, write_conversations
        from locvlm.data.dataset import TrainingData
        from locvlm.data.instruct import Renderer, build_localize_instruct
        from locvlm.data.scenes import draw_scenes
        from locvlm.geometry import make_geometry
        from locvlm.model.checkpoint import start
        from locvlm.model.stages import set_trainable
        from locvlm.pixels import open_images
        from locvlm.presets import preset

        draw_scenes(folder / "scenes", seed=0, n_train=60, n_test=1)
        instances = read_instances(folder / "scenes" / "instances_train.json")
        write_conversations(folder, build_localize_instruct(instances, InstructConfig(), 0))
        self.config = preset("tiny", ["stages.instruct.mixture=[]", "stages.instruct.precision=fp32"])
        self.folder = folder
        self.loaded = start(self.config, None)
        set_trainable(self.loaded.model, ("adapter", "language"))
        geometry = make_geometry(self.config.geometry)
        data = TrainingData(
            self.stage(1),
            {"localize": open_conversations(folder)},
            open_images(folder / "scenes" / "images"),
            Renderer(make_location_format(self.config.coordinates, geometry), self.config.prompts, 0),
            self.loaded.encoder,
            geometry,
            self.config.model.language.max_length,
            0,
        )
        ready = [data.sample(i) for i in range(len(data))]  # reading is no part of the loop
        data.sample = lambda index: ready[index % len(ready)]
        self.data = data

    def stage(self, steps: int) -> Any:
        changes = {"steps": steps, "global_batch": BATCH, "conversations_per_image": 0}
        return self.config.stages.instruct.model_copy(update=changes)

    def model(self) -> Any:
        return copy.deepcopy(self.loaded.model).train()

    def samples(self, step: int) -> list[Any]:
        return [self.data.sample(step * BATCH + i) for i in range(BATCH)]

    def collate(self, samples: list[Any]) -> Any:
        from locvlm.data.collate import collate

        return collate(samples, self.loaded.encoder.pad_id)


class Clock:
    """CPU seconds of every step after `WARM`, and of the other threads meanwhile; the losses of the logged steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ticks: list[float] = []
        self.others = 0.0

    def tick(self, step: int) -> None:
        """`step` steps are done."""
        if step == WARM:
            self.others = time.thread_time() - time.process_time()
        if step >= WARM:
            self.ticks.append(time.thread_time())

    def per_step(self) -> float:
        """The median step and an equal share of what other threads did until now."""
        self.others += time.process_time() - time.thread_time()
        steps = [after - before for before, after in pairwise(self.ticks)]
        return statistics.median(steps) + self.others / len(steps)


def bare(task: Task, steps: int, clock: Clock, log_every: int) -> None:
    from locvlm.training.loop import learning_rate

    stage, model = task.stage(steps), task.model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=stage.betas, weight_decay=stage.weight_decay)
    for step in range(steps):
        batch = task.collate(task.samples(step))
        loss = model.sum_loss(**batch.inputs(CPU)) / batch.n_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, stage.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % log_every == 0:
            clock.losses.append(loss.item())
        clock.tick(step + 1)


class NoCheckpoints:
    """No other side writes any."""

    def latest(self) -> None:
        return None

    def save(self, step: int, write: Callable[[Path], None], point: Any) -> None:
        pass

    def finish(self) -> None:
        pass

    def preempted(self) -> bool:
        return False


def ours(task: Task, steps: int, clock: Clock, log_every: int) -> None:
    from locvlm import tracking
    from locvlm.cli.training import _follow
    from locvlm.training.curve import Curve
    from locvlm.training.engine import TorchEngine
    from locvlm.training.loop import train

    class Timed(TorchEngine):
        """Updates are counted where they happen."""

        done = 0

        def update(self, learning_rate: float) -> Any:
            found = super().update(learning_rate)
            clock.tick(Timed.done)  # the first is the rehearsal's
            Timed.done += 1
            return found

    stage = task.stage(steps)
    cluster = task.config.cluster.model_copy(update={"log_every": log_every, "loader_threads": 0})
    engine = Timed(task.model(), stage, CPU)
    with tempfile.TemporaryDirectory(dir=task.folder) as name, tracking.start_stage("bench", "", {}, {}) as tracker:
        curve = Curve(Path(name, "curve.jsonl"))

        def on_point(point: Any) -> None:
            clock.losses.append(point.loss)
            curve.add(asdict(point))

        with _follow({curve.path: ""}, tracker):
            train(stage, task.data, engine, NoCheckpoints(), task.loaded.encoder.pad_id, cluster, on_point=on_point)


class MeanLoss(torch.nn.Module):
    """The loss of `bare` as transformers' Trainer wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, n_targets: int, **inputs: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.model.sum_loss(**inputs) / n_targets}


class InOrder(torch.utils.data.Dataset[Any]):
    """The samples in the order of the steps."""

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.n = task, steps * BATCH

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return self.task.data.sample(index)


def _arguments(kind: Any, task: Task, steps: int, log_every: int, **more: Any) -> Any:
    stage = task.stage(steps)
    return kind(
        output_dir=str(task.folder / "trainer"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=stage.learning_rate,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.clip_norm,
        logging_steps=log_every,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        **more,
    )


def _run_trainer(trainer: Any, clock: Clock, task: Task, steps: int) -> None:
    """Train with the learning rates of our stage; losses and times by a callback."""
    from transformers import PrinterCallback, TrainerCallback

    from locvlm.training.loop import learning_rate

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.tick(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    stage = task.stage(steps)

    def schedule(num_training_steps: int, optimizer: Any = None) -> Any:
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer or trainer.optimizer, lambda step: learning_rate(stage, step, steps) / stage.learning_rate
        )
        trainer.lr_scheduler = rates
        return rates

    trainer.create_scheduler = schedule
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch())
    trainer.train()


def trainer(task: Task, steps: int, clock: Clock, log_every: int) -> None:
    from transformers import Trainer, TrainingArguments

    def collate(samples: list[Any]) -> dict[str, Any]:
        batch = task.collate(samples)
        return {**batch.inputs(CPU), "n_targets": batch.n_targets}

    arguments = _arguments(TrainingArguments, task, steps, log_every)
    _run_trainer(
        Trainer(MeanLoss(task.model()), arguments, data_collator=collate, train_dataset=InOrder(task, steps)),
        clock, task, steps,
    )  # fmt: skip


def trl(task: Task, steps: int, clock: Clock, log_every: int) -> None:
    from datasets import Dataset
    from shared_prefix import padded_batch
    from trl import SFTConfig, SFTTrainer

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return padded_batch([task.data.sample(row["index"]) for row in rows], task.loaded.encoder.pad_id)

    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "activation_checkpointing": False}
    _run_trainer(
        SFTTrainer(
            task.model(),
            args=_arguments(SFTConfig, task, steps, log_every, bf16=False, **settings),
            data_collator=collate,
            train_dataset=Dataset.from_dict({"input_ids": [[0]] * (steps * BATCH), "index": range(steps * BATCH)}),
            processing_class=task.loaded.encoder.tokenizer,
        ),
        clock, task, steps,
    )  # fmt: skip


SIDES = {"bare": bare, "ours": ours, "trainer": trainer, "trl": trl}


@contextmanager
def mlflow_store(folder: Path) -> Iterator[None]:
    """A local store as `make demo` has it, made ready beforehand."""
    from locvlm import tracking

    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    tracking.initialise(os.environ["MLFLOW_TRACKING_URI"])
    yield
    del os.environ["MLFLOW_TRACKING_URI"]


def refuse_other_losses(found: dict[str, list[float]]) -> None:
    """Ends the program when a side trains something else."""
    for side, losses in found.items():
        gaps = [abs(a - b) / b for a, b in zip(losses[:COMPARED], found["bare"][:COMPARED], strict=True)]
        if not max(gaps) <= CLOSE:
            sys.exit(f"the losses of {side} differ by up to {max(gaps):.1e}: {losses[:3]} and {found['bare'][:3]}")


def quartiles(done: list[float], base: list[float]) -> list[float]:
    """Of the ratios of a round: a quarter lies below the first, half below the second, a quarter above the third."""
    return statistics.quantiles((a / b for a, b in zip(done, base, strict=True)), n=4, method="inclusive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--with-trl", type=Path, metavar="DIR", help="compare TRL too, in an environment made there")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=["bare", "ours", "trainer"], help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.with_trl is not None:
        python = make_trl(args.with_trl.absolute())
        command = [str(python), __file__, "--steps", str(args.steps), "--rounds", str(args.rounds), "--sides", *SIDES]
        sys.exit(subprocess.run(command).returncode)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, mlflow_store(Path(name)):
        task = Task(Path(name))
        found = {}
        for side in args.sides:
            clock = Clock()
            SIDES[side](task, max(COMPARED, WARM) + 1, clock, 1)
            found[side] = clock.losses
        refuse_other_losses(found)
        begin = ", ".join(f"{loss:.4f}" for loss in found["bare"][:3])
        print(f"{COMPARED} steps of {BATCH} samples: equal losses ({begin}, ...)", flush=True)
        runs: dict[str, list[float]] = {side: [] for side in args.sides}
        for number in range(args.rounds):
            for side in args.sides if number % 2 == 0 else reversed(args.sides):
                clock = Clock()
                SIDES[side](task, args.steps, clock, LOG_EVERY)
                runs[side].append(clock.per_step())
    for side, done in runs.items():
        low, over, high = quartiles(done, runs["bare"])
        print(
            f"{side:8} {1e3 * statistics.median(done):7.1f} ms of CPU a step, {over - 1:+.1%} of bare "
            f"({low - 1:+.1%} to {high - 1:+.1%})"
        )
    for side, done in runs.items():
        if side not in ("bare", "ours"):
            low, times, high = quartiles(done, runs["ours"])
            print(f"ours is {times:.2f} times as fast as {side} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
