"""Questions -> answers of a model, batch by batch; an interrupted run continues where it stopped.

The model comes in through `Answerer`, so this file knows no torch. Finished answers lie in FILE.partial.jsonl until the
last one is there; then FILE and FILE's .meta.json appear.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from locvlm import __version__
from locvlm.config import EvaluationConfig, ExperimentConfig
from locvlm.data.coco import safe_image_path
from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.evaluation.questions import Question, Scorer, spread
from locvlm.evaluation.score import meta_path, read_meta
from locvlm.evaluation.tasks import Task, read_set
from locvlm.pixels import open_image
from locvlm.records import atomic_write, fingerprint, read_json, write_json, write_jsonl

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 20.0
_CONFIG_FILE = "locvlm.yaml"  # what every checkpoint of ours holds; the model package itself would bring in torch


@dataclass(frozen=True, slots=True)
class Ask:
    """One question for the model: `prompt` is the user's words alone, `image` a path."""

    id: str
    image: Path
    prompt: str


class Answerer(Protocol):
    """A model that answers questions about images."""

    @property
    def config(self) -> ExperimentConfig:
        """The config that the model was trained with; evaluation takes coordinates, geometry and prompts from it."""

    def answers(self, asks: Sequence[Ask], decoding: EvaluationConfig) -> list[str]:
        """One answer an ask, in order."""


@dataclass(frozen=True, slots=True)
class Job:
    """One task on one data set, into one file."""

    task: Task
    data: Path
    output: Path


@dataclass(frozen=True, slots=True)
class Options:
    """What all jobs of one call share. `decoding` overrides single values of the checkpoint's evaluation section."""

    model: Path
    images: Path
    limit: int | None = None
    decoding: Mapping[str, Any] | None = None
    overwrite: bool = False


def predict(jobs: Sequence[Job], options: Options, open_model: Callable[[Path], Answerer]) -> None:
    """Run the jobs that are not finished yet; the model is opened once, and not at all when nothing is left to do.

    A finished job is one whose output was made from the same data by the same model with the same settings. An image
    that cannot be read makes its questions failures; the run goes on. Raises DataError when an output holds something
    else, or when every question of a job failed; CheckpointError for a model folder that is none.
    """
    if not options.images.is_dir():
        raise DataError(f"predicting: the image folder {options.images} does not exist; give it with --images")
    if not (options.model / _CONFIG_FILE).is_file():  # told before 14 GB are read for their fingerprint
        found = "there is no such folder" if not options.model.is_dir() else f"{_CONFIG_FILE} is missing"
        raise CheckpointError(
            f"predicting with the model {options.model}: {found}, so this is not a whole LocVLM checkpoint; "
            "give the output folder of `locvlm train`"
        )
    print_of_model = fingerprint(options.model)
    todo = []
    for job in jobs:
        identity = _identity(job, options, print_of_model)
        if not _is_done(job, identity, options.overwrite):
            todo.append((job, identity))
    if not todo:
        return
    model = open_model(options.model)
    decoding = _decoding(model.config, options.decoding or {})
    for job, identity in todo:
        _Run(job, options, model, decoding, identity).run()


class _Run:
    """One job under way."""

    def __init__(
        self, job: Job, options: Options, model: Answerer, decoding: EvaluationConfig, identity: dict[str, Any]
    ) -> None:
        self._job, self._options, self._model, self._decoding = job, options, model, decoding
        self._identity = identity
        self._set = read_set(job.task, job.data, model.config)
        self._scorer: Scorer = job.task.scorer(self._set)
        self._questions = spread(self._set.questions, options.limit)
        self._partial = _partial_path(job.output)
        self._faults: dict[str, str] = {}

    def run(self) -> None:
        """Ask what is not answered yet, then put the files under their final names."""
        size = self._decoding.batch_size
        # the same batches whether interrupted or not: what shares a batch may touch the last bits of a number
        batches = [self._questions[begin : begin + size] for begin in range(0, len(self._questions), size)]
        done = self._resume(batches)
        rows: list[dict[str, Any]] = []
        with (
            _progress(self._job.task.name, len(self._questions)) as advance,
            open(self._partial, "a", encoding="utf-8") as file,
        ):
            for batch in batches:
                if all(question.id in done for question in batch):
                    new = [done[question.id] for question in batch]
                else:
                    new = self._answer(batch)
                    _append(file, new)
                rows += new
                advance(len(batch))
        self._finish(rows)

    def _resume(self, batches: Sequence[Sequence[Question]]) -> dict[str, dict[str, Any]]:
        """The rows of the whole batches of an interrupted run of the same job; a torn tail is dropped."""
        found = {row["id"]: row for row in _read_partial(self._partial, self._identity, self._options.overwrite)}
        whole = [batch for batch in batches if all(question.id in found for question in batch)]
        done = {question.id: found[question.id] for batch in whole for question in batch}
        if done:
            log.info("%s: continuing after %d of %d answers", self._job.task.name, len(done), len(self._questions))
        with atomic_write(self._partial) as file:
            file.write(json.dumps({"identity": self._identity}) + "\n")
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in done.values())
        return done

    def _answer(self, batch: Sequence[Question]) -> list[dict[str, Any]]:
        asks: dict[str, Ask] = {}
        faults: dict[str, str] = {}
        for question in batch:
            path, fault = self._image(question.image)
            if path is None:
                faults[question.id] = fault
            else:
                asks[question.id] = Ask(question.id, path, question.prompt)
        texts = self._model.answers(list(asks.values()), self._decoding) if asks else []
        answers = dict(zip(asks, texts, strict=True))
        rows = []
        for question in batch:
            row = {
                "id": question.id,
                "task": self._job.task.name,
                "image": question.image,
                "prompt": question.prompt,
                "answer": answers.get(question.id, ""),
                "parsed": self._scorer.parse(answers[question.id], question) if question.id in answers else None,
                "reference": question.reference,
            }
            if question.boxes:
                row["boxes"] = {name: list(box) for name, box in question.boxes.items()}
            if question.id in faults:
                row["failure"] = faults[question.id]
            rows.append(row)
        return rows

    def _image(self, name: str) -> tuple[Path | None, str]:
        """The path of an image, or why it cannot be shown to the model. Each image is tried once."""
        if name not in self._faults:
            self._faults[name] = _image_fault(self._options.images, name)
        fault = self._faults[name]
        return (None, fault) if fault else (safe_image_path(self._options.images, name), "")

    def _finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        job = self._job
        failed = {row["id"]: row["failure"] for row in rows if "failure" in row}
        if len(failed) == len(rows):
            self._partial.unlink()
            raise DataError(
                f"predicting {job.task.name}: none of the {len(rows)} questions could be asked; the first: "
                f"{next(iter(failed.values()))}; check --images"
            )
        write_jsonl(job.output, rows)
        config = self._model.config
        meta = {
            "task": job.task.name,
            "dataset": self._set.name,
            "identity": self._identity,
            "n": len(rows),
            "limit": self._options.limit,
            "decoding": self._decoding.model_dump(mode="json"),
            "prompts": config.prompts.model_dump(mode="json"),
            "config": config.model_dump(mode="json"),
            "model": {"fingerprint": self._identity["model"], "receipt": _receipt(self._options.model)},
            "categories": list(self._set.categories),
            "failed": failed,
            "locvlm": __version__,
        }
        write_json(meta_path(job.output), meta)
        self._partial.unlink()
        if failed:
            first = next(iter(failed.values()))
            log.warning("%s: %d of %d questions failed (%s)", job.task.name, len(failed), len(rows), first)
        log.info("%s: %d answers in %s", job.task.name, len(rows), job.output)


def _identity(job: Job, options: Options, print_of_model: str) -> dict[str, Any]:
    """What decides every answer; equal identities give equal files."""
    if not job.data.exists():
        raise DataError(f"predicting {job.task.name}: there is no data {job.data}")
    return {
        "task": job.task.name,
        "data": fingerprint(job.data),
        "model": print_of_model,
        "limit": options.limit,
        "overrides": dict(sorted((options.decoding or {}).items())),
    }


def _is_done(job: Job, identity: Mapping[str, Any], overwrite: bool) -> bool:
    if not job.output.exists() or overwrite:
        return False
    if job.output.is_dir():
        raise DataError(f"predicting {job.task.name}: the output {job.output} is a folder; name a file")
    found = read_meta(job.output).get("identity")
    if found is None and _partial_path(job.output).is_file():
        return False  # stopped between the last two steps
    if found == identity:
        log.info("%s: %s is complete already (same model, data and settings)", job.task.name, job.output)
        return True
    raise DataError(
        f"predicting {job.task.name}: {job.output} exists and was made otherwise ({_differences(found, identity)}); "
        "name another output, or pass --overwrite"
    )


def _differences(found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return "nothing beside it says how"
    return "; ".join(
        f"{key}: there {found.get(key)!r}, asked for {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    )


def _decoding(config: ExperimentConfig, overrides: Mapping[str, Any]) -> EvaluationConfig:
    values = {**config.evaluation.model_dump(), **overrides}
    try:
        return EvaluationConfig.model_validate(values)
    except ValidationError as faults:
        told = "; ".join(f"{fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}" for fault in faults.errors())
        raise ConfigError(f"setting how the model answers: {told}") from None


def _partial_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial.jsonl")


def _read_partial(path: Path, identity: Mapping[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    if not path.is_file() or overwrite:
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # the last element is empty, or a line cut short
    try:
        head, *rows = [json.loads(line) for line in lines]
        found = head["identity"]
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"continuing from {path}: not a partial prediction file; remove it or pass --overwrite"
        ) from None
    if found != identity:
        raise DataError(
            f"continuing from {path}: it was begun otherwise ({_differences(found, identity)}); "
            "name another output, or pass --overwrite"
        )
    return rows


def _append(file: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.flush()
    os.fsync(file.fileno())


def _image_fault(folder: Path, name: str) -> str:
    """Why the image cannot be shown to a model; empty when it can."""
    try:
        open_image(safe_image_path(folder, name))
    except DataError as fault:
        return str(fault).replace(f"{folder}/", "")
    return ""


def _receipt(model: Path) -> Any:
    path = model / "receipt.json"
    return read_json(path) if path.is_file() else None


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total)
            yield lambda n: bar.advance(task, n)
        return
    done = 0
    begin = last = time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and done < total:
            last = now
            rate = done / (now - begin)
            log.info(
                "%s: %d of %d answers, %.1f a second, %.0f s to go", name, done, total, rate, (total - done) / rate
            )

    yield advance
