"""`locvlm predict` and `locvlm score`: answers and numbers."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locvlm.cli.asking import TASK_NAMES, add_judge_options, add_model_options, decoding_of, judge_of, model_of
from locvlm.errors import ConfigError

if TYPE_CHECKING:
    from locvlm.evaluation.tasks import Task


def add_verbs(verbs: "argparse._SubParsersAction[Any]") -> None:
    """Register predict and score."""
    _add_predict(verbs)
    _add_score(verbs)


def _add_predict(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "predict",
        help="ask a model the questions of one or more tasks",
        description="Ask a model the questions of a task. --task, --data and --output may be repeated in step: the "
        "model is loaded once. An interrupted call continues when it is run again. How the model was asked stands in "
        "the .meta.json beside the answers.",
    )
    parser.add_argument("--task", action="append", required=True, metavar="NAME", help=TASK_NAMES)
    parser.add_argument(
        "--data", action="append", required=True, type=Path, metavar="PATH", help="question file or data folder"
    )
    parser.add_argument("--split", action="append", metavar="NAME", help="of a data file that holds several (RefCOCO)")
    parser.add_argument("--output", action="append", required=True, type=Path, metavar="FILE", help="JSON lines")
    add_model_options(parser)
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
    decoding = decoding_of(args)
    splits = _in_step("predicting", "split", args.split, len(args.task), is_own=False)
    jobs = [
        Job(task_named(task), data, output, split)
        for task, data, output, split in zip(args.task, args.data, args.output, splits, strict=True)
    ]
    first = args.output[0]
    model = model_of(args, first.with_name(f"{first.stem}.replies.jsonl"))
    predict(jobs, Options(args.images, args.limit, decoding, args.overwrite, args.workers), model)


def _add_score(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "score",
        help="predictions to metrics.json; needs no model",
        description="Score predictions. With --data they need only an id and an answer, as in the benchmarks' own "
        "result files; without it they carry their own references, as `locvlm predict` writes them. --task, "
        "--predictions, --output and the options about the data may be repeated in step: METEOR starts Java once.",
    )
    parser.add_argument("--task", action="append", required=True, metavar="NAME", help=TASK_NAMES)
    parser.add_argument(
        "--predictions", action="append", required=True, type=Path, metavar="FILE", help="JSON lines or a JSON list"
    )
    parser.add_argument("--data", action="append", type=Path, metavar="PATH", help="question file or data folder")
    parser.add_argument(
        "--annotations",
        action="append",
        type=Path,
        metavar="FILE",
        help="the answers, where they lie apart (VQAv2, ...)",
    )
    parser.add_argument("--split", action="append", metavar="NAME", help="of a file that holds several (RefCOCO)")
    parser.add_argument("--output", action="append", type=Path, metavar="FILE", help="metrics.json")
    parser.add_argument(
        "--submission",
        action="append",
        type=Path,
        metavar="FILE",
        help="write the official result file (VQAv2 test-dev, GQA); without --output nothing is scored",
    )
    add_judge_options(parser)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="how places are written, where nothing beside the files says so"
    )
    parser.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> None:
    from locvlm.config import load_config
    from locvlm.evaluation.meteor import MeteorUnavailable
    from locvlm.evaluation.score import describe, score, write_metrics
    from locvlm.evaluation.tasks import task_named

    n = len(args.task)
    tasks = [task_named(name) for name in args.task]
    names = ("predictions", "data", "annotations", "split", "output", "submission")
    shared = ("data", "annotations", "split")
    columns = [_in_step("scoring", name, getattr(args, name), n, is_own=name not in shared) for name in names]
    config = None if args.config is None else load_config(args.config)
    first = (args.output or args.predictions)[0]
    judge = judge_of(args, first.with_name(f"{first.stem}.judge.jsonl"))
    unavailable: MeteorUnavailable | None = None
    for task, predictions, data, annotations, split, output, submission in zip(tasks, *columns, strict=True):
        if output is None and submission is None:
            raise ConfigError("scoring: nothing would be written; name metrics.json with --output")
        if submission is not None:
            _submit(task, predictions, data, submission)
        if output is None:
            continue
        try:
            metrics = score(task, predictions, data, config, annotations=annotations, split=split, judge=judge)
        except MeteorUnavailable as fault:  # every other task goes on
            unavailable = fault
            continue
        write_metrics(output, metrics)
        print(describe(metrics))
    if unavailable is not None:
        raise unavailable


def _in_step(doing: str, name: str, values: list[Any] | None, n: int, *, is_own: bool) -> list[Any]:
    """One value a task. What says something about the data may be given once for all tasks (`is_own` False)."""
    if values is None:
        return [None] * n
    if len(values) == 1 and not is_own:
        return values * n
    if len(values) != n:
        raise ConfigError(
            f"{doing}: found {n} --task and {len(values)} --{name}; give them in step, once for each task"
        )
    if name in ("output", "submission") and len({path.resolve() for path in values}) < n:
        raise ConfigError(f"{doing}: two tasks have the same --{name}; name a file for each")
    return values


def _submit(task: "Task", predictions: Path, data: Path | None, output: Path) -> None:
    from locvlm.evaluation.score import write_results

    if data is None:
        raise ConfigError("exporting: a result file needs the questions of its split; give them with --data")
    failures = write_results(task, predictions, data, output)
    kinds = {kind: len(ids) for kind, ids in failures.to_dict().items() if ids}
    told = "; ".join(f"{n} {kind}" for kind, n in kinds.items())
    print(f"{output}: result file for {task.name}" + (f" ({told}: empty answers where none is usable)" if told else ""))
