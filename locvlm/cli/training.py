"""`locvlm train`, and `locvlm foundation` that makes the tiny preset's starting point."""

import argparse
import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from locvlm.cli.configuration import add_config_options, read_config
from locvlm.errors import ConfigError

log = logging.getLogger(__name__)


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register `train` and `foundation`."""
    parser = verbs.add_parser("train", help="run one training stage as a Ray Train job")
    add_config_options(parser)
    parser.add_argument("--stage", required=True, choices=("align", "instruct", "video"))
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="[NAME=]PATH",
        help="a dataset folder or a LLaVA JSON list; NAME is what the mixture of the config calls it; repeatable",
    )
    parser.add_argument("--images", type=Path, required=True, help="the image folder")
    parser.add_argument("--model", type=Path, help="checkpoint to start from (default: the foundation of the config)")
    parser.add_argument("--output", type=Path, required=True, help="the new checkpoint folder")
    parser.add_argument("--resume", action="store_true", help="insist on continuing an unfinished run")
    parser.add_argument("--workers", type=int, help="Ray workers (default: cluster.num_workers; 0: without Ray)")
    parser.set_defaults(run=_train)

    parser = verbs.add_parser("foundation", help="train the tiny vision tower and language model from scratch")
    add_config_options(parser)
    parser.add_argument("--data", type=Path, required=True, help="a dataset folder made by `locvlm data generic`")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.set_defaults(run=_foundation)


def _train(args: argparse.Namespace) -> None:
    from locvlm import tracking
    from locvlm.training import stage

    config = read_config(args, default="tiny")
    job = stage.Job(
        stage=args.stage,
        config=config,
        data=_named_paths(args.data),
        images=args.images.resolve(),
        output=args.output.resolve(),
        parent=args.model.resolve() if args.model else None,
    )
    n_workers = config.cluster.num_workers if args.workers is None else args.workers
    if n_workers < 0:
        raise ConfigError(f"training {args.stage}: --workers is {n_workers}; give 0 (without Ray) or more")
    stage.check(job, n_workers)
    if not stage.begin(job, resume=args.resume):
        log.info("%s is finished already; nothing to do", args.output)
        return
    params = {**tracking.flatten(config.model_dump(mode="json")), "stage": args.stage, "workers": str(n_workers)}
    tags = {"stage": args.stage, "config": config.fingerprint(), "job": job.fingerprint}
    with tracking.start_stage(args.output.name, "", params, tags) as tracker:
        for name, path in job.data.items():
            tracker.log_dataset(name, path, stage.fingerprint_of(path))
        with _follow(job.folder / "curve.jsonl", tracker):
            _run(job, n_workers)
        tracker.log_artifact(job.output / "receipt.json")
        tracker.log_artifact(job.output / "curve.jsonl")
        tracker.log_artifact(job.output / "locvlm.yaml")
    shutil.rmtree(job.folder)
    receipt = json.loads((job.output / "receipt.json").read_text())
    log.info(
        "%s: %d steps, %d conversations, loss %.4f, %.0f s -> %s",
        args.stage, receipt["steps"], receipt["conversations"], receipt["loss"], receipt["seconds"], args.output,
    )  # fmt: skip


def _run(job: Any, n_workers: int) -> None:
    if n_workers:
        from locvlm.training.ray_train import train_on_ray

        train_on_ray(job, n_workers)
        return
    import torch

    from locvlm.training.checkpoints import FolderCheckpoints
    from locvlm.training.stage import run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run(job, FolderCheckpoints(job.folder), device, show_progress=sys.stderr.isatty())


@contextmanager
def _follow(curve: Path, tracker: Any) -> Iterator[None]:
    """Send the points of the curve to the tracker while the workers write them, and say where the run is."""
    done = threading.Event()
    thread = threading.Thread(target=_forward, args=(curve, tracker, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _forward(curve: Path, tracker: Any, done: threading.Event) -> None:
    sent = 0
    while True:
        finished = done.wait(5.0)
        points = [json.loads(line) for line in curve.read_text().splitlines()] if curve.is_file() else []
        new = [point for point in points if point["step"] > sent]
        for point in new:
            tracker.log_metrics({k: v for k, v in point.items() if k != "step"}, point["step"])
        if new:
            sent = new[-1]["step"]
            log.info("step %d, loss %.4f, %.0f s", sent, new[-1]["loss"], new[-1]["seconds"])
        if finished:
            return


def _foundation(args: argparse.Namespace) -> None:
    from locvlm.training.foundation import train_foundation

    config = read_config(args, default="tiny")
    train_foundation(config, args.data, args.images, args.output, args.steps, show_progress=sys.stderr.isatty())


def _named_paths(values: list[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals:
            name, path = Path(value).stem, value
        if name in named:
            raise ConfigError(f"reading --data {value!r}: the name {name!r} is given twice")
        named[name] = Path(path).resolve()
    return named
