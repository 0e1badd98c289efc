"""Predictions -> metrics.json. Needs no model; every question of the set counts, answered or not.

Predictions are rows of ours, or a benchmark's own result file: the id as id, question_id, questionId (GQA) or ref_id
(REFER), the answer as answer, pred (Video-ChatGPT), prediction (GQA), text (LLaVA) or sent (REFER).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from locvlm.config import CoordinateConfig, ExperimentConfig, GeometryConfig
from locvlm.errors import DataError
from locvlm.evaluation.judges import Judge
from locvlm.evaluation.metrics import CONFIDENCE, N_RESAMPLES, Figure, Item, summarise
from locvlm.evaluation.questions import Question, QuestionSet, Scorer, check_rows, read_value, row_id, spread
from locvlm.evaluation.tasks import TASKS, Task, categories_of, from_predictions, read_set
from locvlm.records import atomic_write, read_json

FORMAT = 1
# the first that a row has: where `pred` stands, `answer` is the reference
_ANSWER_NAMES = ("pred", "prediction", "answer", "text", "sent")


@dataclass(frozen=True, slots=True)
class Failures:
    """What went wrong between questions and answers, by id. All but `unknown` and `empty` count as wrong answers; an
    empty answer counts as what the task's rule makes of it (POPE's official rule: yes)."""

    missing: tuple[str, ...]
    duplicate: tuple[str, ...]
    unknown: tuple[str, ...]
    failed: Mapping[str, str]
    empty: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "missing": list(self.missing),
            "duplicate": list(self.duplicate),
            "unknown": list(self.unknown),
            "failed": dict(self.failed),
            "empty": list(self.empty),
        }


@dataclass(frozen=True, slots=True)
class _Predictions:
    """A prediction file: answers by id (the first of repeated ones), reasons of failed rows, the repeated ids, and
    whether it is a benchmark's result file and not ours."""

    answers: Mapping[str, str]
    failed: Mapping[str, str]
    repeated: tuple[str, ...]
    is_official: bool


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
    task: Task,
    predictions: Path,
    data: Path | None = None,
    config: ExperimentConfig | None = None,
    *,
    annotations: Path | None = None,
    split: str | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """The contents of metrics.json for one prediction file.

    With `data` a prediction needs only an id and an answer; without it the rows carry their own references.
    `annotations`: the file of the references where they lie apart from the questions; `split`: which split of `data`;
    `judge`: who decides, where the task leaves that open. A set that was asked with --limit is scored on the questions
    that were chosen then. `config` says how places are written where neither the data nor the predictions do. Missing
    and repeated ids count as wrong, unknown ones are listed. Raises DataError for a file in a wrong format or of
    another task, and for questions without references.
    """
    rows = _rows(predictions)
    meta = read_meta(predictions)
    _refuse_other_task(task, predictions, rows, meta)
    found = _answers(predictions, rows)
    if data is None:
        if annotations is not None or split is not None:
            raise DataError(f"scoring {predictions}: --annotations and --split say more about --data; give that too")
        questions = _own_set(task, predictions, rows, meta, config)
    else:
        read = read_set(task, data, annotations=annotations, split=split)
        questions = _placed(task, predictions, data, read, meta, config)
    failures, answers = _matched(found, predictions, data, questions.questions)
    absent = [question.id for question in questions.questions if question.reference is None]
    if absent:
        raise DataError(
            f"scoring {predictions}: {len(absent)} of {len(questions.questions)} questions of {data or predictions} "
            f"have no reference answer (first id {absent[0]!r}); give the file of the answers with --annotations"
        )
    scorer = _scorer(task, questions, judge)
    scorer.prepare(answers)
    items = [Item(q.id, q.image, scorer.sums(answers[q.id], q)) for q in questions.questions]
    figures = summarise(items, scorer.figures, scorer.floors())
    return {
        "format": FORMAT,
        "task": task.name,
        "primary": task.primary if task.primary in figures else scorer.figures[0],
        "dataset": str(meta.get("dataset") or questions.name),
        "n": len(items),
        "n_images": len({item.image for item in items}),
        **{name: figure.value for name, figure in figures.items()},
        **scorer.facts(figures),
        "figures": {name: figure.to_dict() for name, figure in figures.items()},
        "counts": scorer.counts(items),
        "failures": failures.to_dict(),
        "n_failures": sum(answer is None for answer in answers.values()),
        "skipped": dict(questions.skipped),
        "interval": {
            "confidence": CONFIDENCE,
            "method": "bootstrap over images, percentiles; Wilson over images where all or none is right",
            "resamples": N_RESAMPLES,
            "seed": 0,
        },
        "limit": meta.get("limit"),
        "decoding": meta.get("decoding"),
        "model": meta.get("model"),
        "config": meta.get("config"),
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
    if metrics.get("judge") is not None:
        lines.append(f"  judged by {metrics['judge']}")
    reasons = dict.fromkeys(metrics.get("not_computed", {}).values())
    for reason in reasons:
        names = ", ".join(name for name, why in metrics["not_computed"].items() if why == reason)
        lines.append(f"  not computed: {names}: {reason}")
    lines += [f"  skipped: {n} x {reason}" for reason, n in metrics.get("skipped", {}).items()]
    kinds = {kind: len(ids) for kind, ids in metrics["failures"].items() if ids}
    if kinds:
        told = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        lines.append(f"  failures: {told}; {metrics['n_failures']} questions counted as wrong for that")
    return "\n".join(lines)


def describe_briefly(metrics: Mapping[str, Any]) -> str:
    """The primary figure in one line."""
    figure = Figure(**metrics["figures"][metrics["primary"]])
    between = "" if figure.low is None else f" [{figure.low:.3f}, {figure.high:.3f}]"
    failed = f", {metrics['n_failures']} failed" if metrics["n_failures"] else ""
    judged = f", judged by {metrics['judge']}" if metrics.get("judge") else ""
    return f"{metrics['primary']} {figure.value:.3f}{between} of {metrics['n']} questions{failed}{judged}"


def _refuse_other_task(task: Task, path: Path, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    named = {str(row["task"]) for row in rows if "task" in row} | ({str(meta["task"])} if "task" in meta else set())
    others = sorted(named - {task.name})
    if others:
        raise DataError(
            f"scoring {path}: these are predictions for the task {', '.join(others)}, not {task.name}; "
            f"score them with --task {others[0]}"
        )


def write_results(task: Task, predictions: Path, data: Path, output: Path) -> Failures:
    """Write the benchmark's official result file, one record a question in the order of `data`, for a split whose
    answers only its server has. A question without one usable answer gets an empty one; returns which.

    Raises DataError for a task without such a file, and for predictions of other data.
    """
    if task.result is None:
        with_results = ", ".join(name for name, other in TASKS.items() if other.result is not None)
        raise DataError(f"exporting {predictions}: {task.name} has no official result file; {with_results} have one")
    rows = _rows(predictions)
    meta = read_meta(predictions)
    _refuse_other_task(task, predictions, rows, meta)
    if meta.get("limit") is not None:
        raise DataError(
            f"exporting {predictions}: only {meta['limit']} questions were asked (--limit); a server wants all"
        )
    found = _answers(predictions, rows)
    failures, answers = _matched(found, predictions, data, read_set(task, data).questions)
    records = [task.result(key, answer or "", found.is_official) for key, answer in answers.items()]
    with atomic_write(output) as file:
        json.dump(records, file)
        file.write("\n")
    return failures


def _scorer(task: Task, questions: QuestionSet, judge: Judge | None) -> Scorer:
    if task.judged is not None:
        return task.judged(questions, judge)
    if judge is not None:
        names = ", ".join(name for name, other in TASKS.items() if other.judged is not None)
        raise DataError(f"scoring {task.name}: its answers need no judge; --judge goes with {names}")
    return task.scorer(questions)


def _matched(
    found: _Predictions, path: Path, data: Path | None, questions: Sequence[Question]
) -> tuple[Failures, dict[str, str | None]]:
    """What went wrong, and for every question its answer, None where there is no usable one."""
    ids = [question.id for question in questions]
    known = set(ids)
    failures = Failures(
        missing=tuple(key for key in ids if key not in found.answers),
        duplicate=tuple(key for key in found.repeated if key in known),
        unknown=tuple(key for key in found.answers if key not in known),
        failed={key: reason for key, reason in found.failed.items() if key in known},
        empty=tuple(key for key in ids if not found.answers.get(key, "-").strip() and key not in found.failed),
    )
    if len(failures.missing) == len(ids):
        raise DataError(
            f"scoring {path}: none of its {len(found.answers)} ids is among the {len(ids)} questions of {data}; these "
            f"predictions belong to other data (first id here {next(iter(found.answers))!r}, there {ids[0]!r})"
        )
    wrong = {*failures.missing, *failures.duplicate, *failures.failed}
    return failures, {key: None if key in wrong else found.answers[key] for key in ids}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a prediction file; REFER wraps them as {"predictions": [...]}."""
    value = read_value(path)
    if isinstance(value, dict) and isinstance(value.get("predictions"), list):
        value = value["predictions"]
    return check_rows(path, value)


def _answers(path: Path, rows: Sequence[Mapping[str, Any]]) -> _Predictions:
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
        answer = next((row[name] for name in _ANSWER_NAMES if name in row), None)
        if not isinstance(answer, str):
            raise DataError(
                f"scoring {path}: record {number} (id {key!r}) has no `answer` text; records need id and answer"
            )
        times[key] += 1
        answers.setdefault(key, answer)
        if row.get("failure"):
            failed[key] = str(row["failure"])
    repeated = tuple(key for key, n in times.items() if n > 1)
    return _Predictions(answers, failed, repeated, is_official=all("id" not in row for row in rows))


def _own_set(
    task: Task,
    predictions: Path,
    rows: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    config: ExperimentConfig | None,
) -> QuestionSet:
    """The questions that the predictions carry themselves."""
    coordinates, geometry = _places(predictions, meta, config)
    questions = from_predictions(task, predictions, rows)
    categories = tuple(meta.get("categories") or categories_of(questions))
    return QuestionSet(predictions.stem, questions, categories, coordinates, geometry)


def _placed(
    task: Task,
    predictions: Path,
    data: Path,
    found: QuestionSet,
    meta: Mapping[str, Any],
    config: ExperimentConfig | None,
) -> QuestionSet:
    """The set read from `data` with the way in which the answers write places, as far as it was asked."""
    coordinates, geometry = _places(predictions, meta, config)
    is_own = "family" in (meta.get("config") or {})  # a model of others, asked in a form of its own
    known = None not in (coordinates, found.coordinates)
    if task.writes_places and not is_own and known and coordinates != found.coordinates:
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


def _places(
    predictions: Path, meta: Mapping[str, Any], config: ExperimentConfig | None
) -> tuple[CoordinateConfig | None, GeometryConfig | None]:
    """How the answers write places: as the file beside the predictions says, else as `config` does."""
    made_with = meta.get("config")
    if not isinstance(made_with, dict):
        return (None, None) if config is None else (config.coordinates, config.geometry)
    try:
        return (
            CoordinateConfig.model_validate(made_with.get("coordinates", {})),
            GeometryConfig.model_validate(made_with.get("geometry", {})),
        )
    except ValidationError as fault:
        raise DataError(
            f"reading {meta_path(predictions)}: {fault.errors()[0]['msg']}; predict again or remove the file"
        ) from None
