"""`locvlm train`, and `locvlm foundation` that makes the tiny preset's starting point."""

import argparse
import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from locvlm.cli.configuration import add_config_options, read_config
from locvlm.cli.story import params_of
from locvlm.errors import ConfigError, TrackingError
from locvlm.records import read_json

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
    parser.add_argument(
        "--images",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="the images: a folder, or shards made by `locvlm data shard`; with NAME= those of one source of --data "
        "(repeatable), without it those of all other sources",
    )
    parser.add_argument(
        "--validate",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="held-out data, looked at every cluster.validate_every steps: conversations (their loss, and places asked "
        "for), or a coco-spatial question set; repeatable",
    )
    parser.add_argument("--model", type=Path, help="checkpoint to start from (default: the foundation of the config)")
    parser.add_argument("--output", type=Path, required=True, help="the new checkpoint folder")
    parser.add_argument("--resume", action="store_true", help="insist on continuing an unfinished run")
    parser.add_argument("--workers", type=int, help="Ray workers (default: cluster.num_workers; 0: without Ray)")
    parser.set_defaults(run=_train)

    parser = verbs.add_parser("foundation", help="train the tiny vision tower and language model from scratch")
    add_config_options(parser)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO instances of drawn scenes to learn from")
    parser.add_argument("--held-out", type=Path, required=True, help="COCO instances to measure what the tower sees on")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tower-steps", type=int, help="of the vision tower's lesson")
    parser.add_argument("--reading-steps", type=int, help="of the language model's first lesson")
    parser.add_argument("--soft-steps", type=int, help="of its second, with scenes in soft tokens")
    parser.set_defaults(run=_foundation)


def _train(args: argparse.Namespace) -> None:
    from locvlm import tracking
    from locvlm.training import stage

    config = read_config(args, default="tiny")
    data = _named_paths("--data", args.data)
    validation = _named_paths("--validate", args.validate)
    job = stage.Job(
        stage=args.stage,
        config=config,
        data=data,
        images=_image_folders(args.images, {**data, **validation}),
        output=args.output.resolve(),
        parent=args.model.resolve() if args.model else None,
        validation=validation,
    )
    n_workers = config.cluster.num_workers if args.workers is None else args.workers
    if n_workers < 0:
        raise ConfigError(f"training {args.stage}: --workers is {n_workers}; give 0 (without Ray) or more")
    stage.check(job, n_workers)
    is_trained = not stage.begin(job, resume=args.resume)
    if is_trained and not job.folder.exists():
        log.info("%s is finished already; nothing to do", args.output)
        return
    params = params_of(config, args.stage, args.model.name if args.model else "the foundation", n_workers)
    tags = {"stage": args.stage, "config": config.fingerprint(), "job": job.fingerprint}
    try:
        with tracking.start_stage(args.output.name, "", params, tags, job.folder / stage.MEMO) as tracker:
            for name, path in job.data.items():
                tracker.log_dataset(name, path, stage.fingerprint_of(path))
            with _follow({job.folder / "curve.jsonl": "", job.folder / "validation.jsonl": "validation/"}, tracker):
                if not is_trained:
                    _run(job, n_workers)
            tracker.deliver()  # waits; the artifacts do not
            for path in (*sorted(job.output.glob("*.jsonl")), job.output / "receipt.json", job.output / "locvlm.yaml"):
                tracker.log_artifact(path)
            tracking.set_tags(tracker.run_id, {"fingerprint": read_json(job.output / "receipt.json")["fingerprint"]})
    except TrackingError as fault:
        if not job.output.exists():
            raise
        raise TrackingError(
            f"{fault}\n{args.output} is trained and whole, only its figures are not all recorded: run the same command "
            "again when the server is back, it trains nothing again"
        ) from None
    stage.clear(job)
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
def _follow(curves: dict[Path, str], tracker: Any) -> Iterator[None]:
    """Send the points of the curves to the tracker while the workers write them, and say where the run is. `curves`:
    file -> what the names of its figures begin with."""
    done = threading.Event()
    sent = {path: tracker.last_step(f"{prefix}seconds") for path, prefix in curves.items()}  # by an earlier try
    thread = threading.Thread(target=_forward, args=(curves, sent, tracker, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _forward(curves: dict[Path, str], sent: dict[Path, int], tracker: Any, done: threading.Event) -> None:
    from locvlm.training.curve import read_curve

    while True:
        finished = done.wait(5.0)
        for path, prefix in curves.items():
            points = read_curve(path)
            new = [point for point in points if point["step"] > sent[path]]
            for point in new:
                tracker.log_metrics({f"{prefix}{k}": v for k, v in point.items() if k != "step"}, point["step"])
            if new:
                sent[path] = new[-1]["step"]
                log.info("%s", _told(prefix, new[-1]))
        if finished:
            return


def _told(prefix: str, point: dict[str, float]) -> str:
    if not prefix:
        return f"step {point['step']}, loss {point['loss']:.4f}, {point['seconds']:.0f} s"
    figures = ", ".join(f"{name} {value:.4f}" for name, value in point.items() if name not in ("step", "seconds"))
    return f"validation at step {point['step']}: {figures}"


def _foundation(args: argparse.Namespace) -> None:
    from locvlm.training.foundation import READING_STEPS, SOFT_STEPS, TOWER_STEPS, train_foundation

    config = read_config(args, default="tiny")
    given = ((args.tower_steps, TOWER_STEPS), (args.reading_steps, READING_STEPS), (args.soft_steps, SOFT_STEPS))
    steps = [usual if wanted is None else wanted for wanted, usual in given]
    train_foundation(config, args.annotations, args.held_out, args.images, args.output, *steps)


def _named_paths(option: str, values: list[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals:
            name, path = Path(value).stem, value
        if name in named:
            raise ConfigError(f"reading {option} {value!r}: the name {name!r} is given twice")
        named[name] = Path(path).resolve()
    return named


def _image_folders(values: list[str], data: dict[str, Path]) -> dict[str, Path]:
    """Source name -> folder; a value without the name of a source is for all that have none of their own."""
    named: dict[str, Path] = {}
    shared: Path | None = None
    for value in values:
        name, equals, path = value.partition("=")
        if equals and name in data:
            if name in named:
                raise ConfigError(f"reading --images {value!r}: the images of {name!r} are given twice")
            named[name] = Path(path).resolve()
        elif equals and not Path(value).exists():
            raise ConfigError(
                f"reading --images {value!r}: --data and --validate gave no {name!r}; they gave "
                f"{', '.join(sorted(data))}"
            )
        elif shared is not None:
            raise ConfigError(f"reading --images {value!r}: images for all sources are given twice; name one NAME=DIR")
        else:
            shared = Path(value).resolve()
    return named if shared is None else {name: named.get(name, shared) for name in data}
