"""Predictions -> metrics.json. Needs no model; every question of the set counts, answered or not."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from locvlm.config import CoordinateConfig, ExperimentConfig, GeometryConfig
from locvlm.errors import DataError
from locvlm.evaluation.metrics import CONFIDENCE, N_RESAMPLES, Figure, Item, summarise
from locvlm.evaluation.questions import Question, QuestionSet, read_rows, row_id, spread
from locvlm.evaluation.tasks import Task, categories_of, from_predictions, read_set
from locvlm.records import atomic_write, read_json

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Failures:
    """What went wrong between questions and answers, by id. All but `unknown` count as wrong answers."""

    missing: tuple[str, ...]
    duplicate: tuple[str, ...]
    unknown: tuple[str, ...]
    failed: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "missing": list(self.missing),
            "duplicate": list(self.duplicate),
            "unknown": list(self.unknown),
            "failed": dict(self.failed),
        }


def meta_path(predictions: Path) -> Path:
    """The file beside a prediction file that says which model made it and how: x.jsonl -> x.meta.json."""
    return predictions.with_suffix(".meta.json")


def read_meta(predictions: Path) -> dict[str, Any]:
    """What the file beside the predictions says; empty when there is none. Raises DataError."""
    path = meta_path(predictions)
    if not path.is_file():
        return {}
    meta = read_json(path)
    if not isinstance(meta, dict):
        raise DataError(f"reading {path}: an object was needed, found a {type(meta).__name__}; predict again")
    return meta


def score(
    task: Task, predictions: Path, data: Path | None = None, config: ExperimentConfig | None = None
) -> dict[str, Any]:
    """The contents of metrics.json for one prediction file.

    With `data` a prediction needs only `id` (or `question_id`) and `answer`; without it the rows carry their own
    references. A set that was asked with --limit is scored on the questions that were chosen then. `config` says how
    places are written where neither the data nor the predictions do. Missing and repeated ids count as wrong, unknown
    ones are listed. Raises DataError for a file in a wrong format or of another task.
    """
    rows = read_rows(predictions)
    meta = read_meta(predictions)
    _refuse_other_task(task, predictions, rows, meta)
    answers, failures_of_rows, repeated = _answers(predictions, rows)
    questions = _question_set(task, predictions, rows, meta, data, config)
    ids = [question.id for question in questions.questions]
    known = set(ids)
    failures = Failures(
        missing=tuple(key for key in ids if key not in answers),
        duplicate=tuple(key for key in repeated if key in known),
        unknown=tuple(key for key in answers if key not in known),
        failed={key: reason for key, reason in failures_of_rows.items() if key in known},
    )
    if len(failures.missing) == len(ids):
        raise DataError(
            f"scoring {predictions}: none of its {len(answers)} ids is among the {len(ids)} questions of "
            f"{data}; these predictions belong to other data (first id here {next(iter(answers))!r}, there {ids[0]!r})"
        )
    wrong = {*failures.missing, *failures.duplicate, *failures.failed}
    scorer = task.scorer(questions)
    items = [Item(q.id, q.image, scorer.sums(None if q.id in wrong else answers[q.id], q)) for q in questions.questions]
    figures = summarise(items, scorer.figures, scorer.floors())
    return {
        "format": FORMAT,
        "task": task.name,
        "primary": task.primary if task.primary in figures else scorer.figures[0],
        "dataset": str(meta.get("dataset") or questions.name),
        "n": len(items),
        "n_images": len({item.image for item in items}),
        **{name: figure.value for name, figure in figures.items()},
        "figures": {name: figure.to_dict() for name, figure in figures.items()},
        "counts": scorer.counts(items),
        "failures": failures.to_dict(),
        "n_failures": len(wrong),
        "interval": {
            "confidence": CONFIDENCE,
            "method": "bootstrap over images, percentiles; Wilson over images where all or none is right",
            "resamples": N_RESAMPLES,
            "seed": 0,
        },
        "limit": meta.get("limit"),
        "decoding": meta.get("decoding"),
        "model": meta.get("model"),
        "items": {item.id: {"image": item.image, "sums": item.sums} for item in items},
    }


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json in one step: keys in their order, one line a question under `items`."""
    head = json.dumps({key: value for key, value in metrics.items() if key != "items"}, indent=1)
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in metrics["items"].items())
    with atomic_write(path) as file:
        file.write(f'{head[:-2]},\n "items": {{\n{lines}\n }}\n}}\n')


def read_metrics(path: Path) -> dict[str, Any]:
    """A metrics.json as `locvlm score` writes it. Raises DataError."""
    metrics = read_json(path)
    if not isinstance(metrics, dict) or not {"task", "figures", "items", "n"} <= metrics.keys():
        raise DataError(f"reading {path}: not a metrics file; write it with `locvlm score`")
    if metrics.get("format") != FORMAT:
        raise DataError(
            f"reading {path}: it is of format {metrics.get('format')!r}, this version reads {FORMAT}; score again"
        )
    return metrics


def describe(metrics: Mapping[str, Any]) -> str:
    """A few lines for the terminal: every figure with its interval, n and floor."""
    lines = [f"{metrics['task']}: {metrics['n']} questions on {metrics['n_images']} images of {metrics['dataset']}"]
    for name, values in metrics["figures"].items():
        figure = Figure(**values)
        between = "" if figure.low is None else f" [{figure.low:.3f}, {figure.high:.3f}]"
        floor = "" if figure.floor is None else f", floor {figure.floor:.3f} ({figure.floor_answer})"
        lines.append(f"  {name:<19} {figure.value:.3f}{between}, n {figure.n}{floor}")
    kinds = {kind: len(ids) for kind, ids in metrics["failures"].items() if ids}
    if kinds:
        told = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        lines.append(f"  failures: {told}; {metrics['n_failures']} questions counted as wrong for that")
    return "\n".join(lines)


def _refuse_other_task(task: Task, path: Path, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    named = {str(row["task"]) for row in rows if "task" in row} | ({str(meta["task"])} if "task" in meta else set())
    others = sorted(named - {task.name})
    if others:
        raise DataError(
            f"scoring {path}: these are predictions for the task {', '.join(others)}, not {task.name}; "
            f"score them with --task {others[0]}"
        )


def _answers(path: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Answers by id (the first of repeated ones), reasons of failed rows, and the repeated ids."""
    answers: dict[str, str] = {}
    failed: dict[str, str] = {}
    times: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            key = row_id(row)
        except KeyError:
            raise DataError(
                f"scoring {path}: record {number} has neither id nor question_id; needed are records with id and answer"
            ) from None
        answer = row.get("answer")
        if not isinstance(answer, str):
            raise DataError(
                f"scoring {path}: record {number} (id {key!r}) has no `answer` text; records need id and answer"
            )
        times[key] += 1
        answers.setdefault(key, answer)
        if row.get("failure"):
            failed[key] = str(row["failure"])
    return answers, failed, [key for key, n in times.items() if n > 1]


def _question_set(
    task: Task,
    predictions: Path,
    rows: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    data: Path | None,
    config: ExperimentConfig | None,
) -> QuestionSet:
    coordinates, geometry = _places_of_meta(predictions, meta)
    if config is not None and coordinates is None:
        coordinates, geometry = config.coordinates, config.geometry
    if data is None:
        questions = from_predictions(task, predictions, rows)
        categories = tuple(meta.get("categories") or categories_of(questions))
        return QuestionSet(predictions.stem, questions, categories, coordinates, geometry)
    found = read_set(task, data)
    if task.writes_places and None not in (coordinates, found.coordinates) and coordinates != found.coordinates:
        raise DataError(
            f"scoring {predictions} on {data}: the answers write places as {coordinates}, the data as "
            f"{found.coordinates}; give the data that the model was asked about"
        )
    limit = meta.get("limit")
    return replace(
        found,
        questions=_limited(found.questions, limit),
        coordinates=coordinates or found.coordinates,
        geometry=geometry or found.geometry,
    )


def _limited(questions: tuple[Question, ...], limit: Any) -> tuple[Question, ...]:
    return spread(questions, limit) if isinstance(limit, int) else questions


def _places_of_meta(
    predictions: Path, meta: Mapping[str, Any]
) -> tuple[CoordinateConfig | None, GeometryConfig | None]:
    config = meta.get("config")
    if not isinstance(config, dict):
        return None, None
    try:
        return (
            CoordinateConfig.model_validate(config.get("coordinates", {})),
            GeometryConfig.model_validate(config.get("geometry", {})),
        )
    except ValidationError as fault:
        raise DataError(
            f"reading {meta_path(predictions)}: {fault.errors()[0]['msg']}; predict again or remove the file"
        ) from None
