"""`locvlm predict`, `locvlm score` and `locvlm report`: answers, numbers, one page."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.errors import ConfigError

if TYPE_CHECKING:
    from locvlm.evaluation.predict import Answerer

TASK_NAMES = "coco-spatial, coco-spatial-icl, presence, pope, localization, region-description"


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register predict, score and report."""
    _add_predict(verbs)
    _add_score(verbs)
    _add_report(verbs)


def _add_predict(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "predict",
        help="ask a model the questions of one or more tasks",
        description="Ask a model the questions of a task. --task, --data and --output may be repeated in step: the "
        "model is loaded once. An interrupted call continues when it is run again.",
    )
    parser.add_argument("--task", action="append", required=True, metavar="NAME", help=TASK_NAMES)
    parser.add_argument(
        "--data", action="append", required=True, type=Path, metavar="PATH", help="question file or data folder"
    )
    parser.add_argument("--output", action="append", required=True, type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="output folder of `locvlm train`")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of the images")
    parser.add_argument("--limit", type=int, metavar="N", help="ask N questions from all over the set, always the same")
    parser.add_argument("--temperature", type=float, help="0: greedy; default: the checkpoint's evaluation section")
    parser.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that was made otherwise")
    parser.set_defaults(run=_predict)


def _predict(args: argparse.Namespace) -> None:
    from locvlm.evaluation.predict import Job, Options, predict
    from locvlm.evaluation.tasks import task_named

    if not len(args.task) == len(args.data) == len(args.output):
        raise ConfigError(
            f"predicting: found {len(args.task)} --task, {len(args.data)} --data and {len(args.output)} --output; "
            "give the three in step, once for each task"
        )
    if len({path.resolve() for path in args.output}) < len(args.output):
        raise ConfigError("predicting: two tasks have the same --output; name a file for each")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"predicting: --limit is {args.limit}, it must be 1 or more")
    jobs = [
        Job(task_named(task), data, output)
        for task, data, output in zip(args.task, args.data, args.output, strict=True)
    ]
    names = ("temperature", "seed", "max_new_tokens", "batch_size")
    decoding = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    predict(jobs, Options(args.model, args.images, args.limit, decoding, args.overwrite), _open_model)


def _open_model(folder: Path) -> "Answerer":
    from locvlm.model import load  # torch comes in only when there is something to ask

    return load(folder)


def _add_score(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "score",
        help="predictions to metrics.json; needs no model",
        description="Score predictions. With --data they need only id (or question_id) and answer; without it they "
        "carry their own references, as `locvlm predict` writes them.",
    )
    parser.add_argument("--task", required=True, metavar="NAME", help=TASK_NAMES)
    parser.add_argument("--predictions", required=True, type=Path, metavar="FILE", help="JSON lines or a JSON list")
    parser.add_argument("--data", type=Path, metavar="PATH", help="question file or data folder")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="metrics.json")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="how places are written, where nothing beside the files says so"
    )
    parser.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> None:
    from locvlm.config import load_config
    from locvlm.evaluation.score import describe, score, write_metrics
    from locvlm.evaluation.tasks import task_named

    config = None if args.config is None else load_config(args.config)
    metrics = score(task_named(args.task), args.predictions, args.data, config)
    write_metrics(args.output, metrics)
    print(describe(metrics))


def _add_report(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "report",
        help="one HTML page: models side by side, the paper's numbers, pictures, curves",
        description="Write report.html (one file, no outside reference) and report.md. The folder of an arm holds "
        "<task>.metrics.json and, for pictures, <task>.jsonl. The first arm is compared with the others.",
    )
    parser.add_argument("--arm", action="append", required=True, metavar="NAME=DIR", help="repeat for each model")
    parser.add_argument(
        "--curve", action="append", default=[], metavar="'NAME STAGE'=FILE", help="a curve.jsonl; may be repeated"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images; without it no pictures")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the report")
    parser.add_argument("--title", default="LocVLM: what location objectives buy")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from locvlm.evaluation.figures import read_curve
    from locvlm.evaluation.report import read_arm, write_report

    folders = _named_paths("--arm", args.arm)
    arms = [read_arm(name, folder) for name, folder in folders.items()]
    curves = [read_curve(name, path, list(folders)) for name, path in _named_paths("--curve", args.curve).items()]
    if args.images is not None and not args.images.is_dir():
        raise ConfigError(f"reporting: the image folder {args.images} does not exist; correct or drop --images")
    html, markdown = write_report(arms, curves, args.images, args.output, args.title)
    print(html)
    print(markdown)


def _named_paths(option: str, values: Sequence[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name.strip() or not path:
            raise ConfigError(f"reporting: {option} {value!r} is not of the form NAME=PATH")
        if name.strip() in named:
            raise ConfigError(f"reporting: {option} names {name.strip()!r} twice; give each its own name")
        named[name.strip()] = Path(path)
    return named
