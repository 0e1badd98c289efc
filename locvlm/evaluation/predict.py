"""Questions -> answers of a model, batch by batch; an interrupted run continues where it stopped.

The model comes in through `Model`, so this file knows no torch. Finished answers lie in FILE.partial.jsonl until the
last one is there; then FILE and FILE's .meta.json appear, which says what was asked of which model and how.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from locvlm import __version__
from locvlm.config import EvaluationConfig, ExperimentConfig, FamilyConfig, VideoConfig
from locvlm.errors import ConfigError, DataError, UserError
from locvlm.evaluation.asks import Ask, Engine, Unanswered, ask_all, fill, locate
from locvlm.evaluation.inference import run_batches
from locvlm.evaluation.progress import progress
from locvlm.evaluation.questions import Question, Scorer, spread
from locvlm.evaluation.score import meta_path, read_meta
from locvlm.evaluation.tasks import Task, read_set
from locvlm.evaluation.wording import OUT_OF_SIGHT
from locvlm.pixels import ImageSource, open_images
from locvlm.prompts import render_prompt
from locvlm.records import atomic_write, fingerprint, write_json, write_jsonl

log = logging.getLogger(__name__)

_MOST_FAILED = 0.5  # share of the questions asked so far; more, and something is wrong with the run itself
_ENOUGH = 100  # questions before that share means anything, in a set that has as many


class Model(Protocol):
    """What --model names. `open` travels to workers by pickle."""

    def identity(self) -> dict[str, Any]:
        """What decides its answers; `model` is among the keys."""

    def describe(self) -> ExperimentConfig | FamilyConfig:
        """How it is asked, found without its weights."""

    def receipt(self) -> Any:
        """What training wrote beside it; None where there is nothing."""

    def open(self) -> Engine:
        """Ready to answer."""


@dataclass(frozen=True, slots=True)
class Job:
    """One task on one data set, into one file. `split`: of a data file that holds several."""

    task: Task
    data: Path
    output: Path
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What all jobs of one call share. `images`: folders in which an image is looked for in turn (see `asks.locate`);
    `decoding` overrides single values of the model's evaluation section; `n_workers`: see `inference.run_batches`."""

    images: Sequence[Path]
    limit: int | None = None
    decoding: Mapping[str, Any] | None = None
    overwrite: bool = False
    n_workers: int = 1


def predict(
    jobs: Sequence[Job], options: Options, model: Model, on_fault: Callable[[Job, UserError], None] | None = None
) -> None:
    """Run the jobs that are not finished yet; the model is not opened when nothing is left to do.

    A finished job is one whose output was made from the same data by the same model, asked in the same way with the
    same settings. What cannot be asked or answered (an image that does not decode, a request that an endpoint refuses)
    is a failure and counts as wrong; the run goes on. The file is the same whatever the number of workers and however
    often the run was interrupted. Raises DataError when an output holds something else, and when more than half of the
    questions fail; what `read_set` raises too. With `on_fault` what is wrong with a job is told to it, and the other
    jobs go on; an output that holds something else is refused before any of them begins.
    """
    for folder in options.images:
        if not folder.is_dir():
            raise DataError(f"predicting: the image folder {folder} does not exist; give it with --images")
    config = model.describe()
    shared = {**model.identity(), "asked": asked_of(config)}
    todo = []
    for job in jobs:
        identity = _identity(job, options, shared)
        if not is_done(f"predicting {job.task.name}", job.output, identity, options.overwrite):
            todo.append((job, identity))
    if not todo:
        return
    images = [open_images(folder.resolve()) for folder in options.images]  # a worker may stand in another folder
    opened = _Opened(model)
    decoding = _decoding(config, options.decoding or {})
    for job, identity in todo:
        try:
            run = _Run(job, options, images, opened, config, decoding, identity)
        except UserError as fault:  # a set that cannot be read, or not be put to this model
            _tell(job, fault, on_fault)
            continue
        try:
            run.run()
        except DataError as fault:  # what is wrong with the model itself stops all jobs
            _tell(job, fault, on_fault)


def _tell(job: Job, fault: UserError, on_fault: Callable[[Job, UserError], None] | None) -> None:
    if on_fault is None:
        raise fault
    on_fault(job, fault)


def asked_of(config: ExperimentConfig | FamilyConfig) -> dict[str, Any]:
    """How a model is asked, for the file beside its answers: the text around a question, the pixels, the text of
    places."""
    if isinstance(config, FamilyConfig):
        return config.model_dump(mode="json", exclude_none=True, exclude={"evaluation"})
    return {
        "family": "locvlm",
        "layout": render_prompt("{question}", config.prompts.system),
        "coordinates": config.coordinates.model_dump(mode="json"),
        "geometry": config.geometry.model_dump(mode="json"),
        "prompts": config.prompts.model_dump(mode="json"),
    }


class _Opened:
    """The model, opened once in this process however many jobs there are; a worker opens its own."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._engine: Engine | None = None

    def __call__(self) -> Engine:
        if self._engine is None:
            self._engine = self.model.open()
        return self._engine

    def __reduce__(self) -> tuple[Any, ...]:
        return _Opened, (self.model,)


@dataclass(frozen=True, slots=True)
class _Work:
    """What a worker does with a batch of questions: one answer each. Travels to it by pickle."""

    images: Sequence[ImageSource]
    decoding: EvaluationConfig
    video: VideoConfig | None

    def __call__(self, engine: Engine, batch: Sequence[Question]) -> list[str | Unanswered]:
        asks = [self._ask(question) for question in batch if question.prompt]
        answered = iter(ask_all(engine, asks, self.decoding))
        return [next(answered) if question.prompt else Unanswered(OUT_OF_SIGHT) for question in batch]

    def _ask(self, question: Question) -> Ask:
        """An image that no folder has is asked of the first, which tells what is missing."""
        source, name = locate(self.images, question.image) or (self.images[0], question.image)
        return Ask(question.id, source, name, question.prompt, question.mirror, self.video)


class _Run:
    """One job under way."""

    def __init__(
        self,
        job: Job,
        options: Options,
        images: Sequence[ImageSource],
        opened: _Opened,
        config: ExperimentConfig | FamilyConfig,
        decoding: EvaluationConfig,
        identity: dict[str, Any],
    ) -> None:
        self._job, self._options, self._config, self._decoding = job, options, config, decoding
        self._opened, self._identity = opened, identity
        self._set = read_set(job.task, job.data, config, split=job.split)
        self._scorer: Scorer = job.task.scorer(self._set)
        self._questions = spread(self._set.questions, options.limit)
        self._partial = partial_path(job.output)
        self._work = _Work(images, decoding, config.video)
        self._failed: dict[str, str] = {}

    def run(self) -> None:
        """Ask what is not answered yet, then put the files under their final names."""
        # the same batches whether interrupted or not: what shares a batch may touch the last bits of a number
        batches = fill(_by_image(self._questions), self._decoding.batch_size)
        rows = self._resume(batches)
        todo = [batch for batch in batches if batch[0].id not in rows]
        n_asked = len(rows)
        with (
            progress(self._job.task.name, len(self._questions)) as advance,
            open(self._partial, "a", encoding="utf-8") as file,
        ):
            advance(n_asked)
            for number, answers in run_batches(self._opened, self._work, todo, self._options.n_workers):
                new = [self._row(q, answer) for q, answer in zip(todo[number], answers, strict=True)]
                # a question that failed is asked again when the command is
                append_rows(file, [row for row in new if "failure" not in row])
                rows |= {row["id"]: row for row in new}
                n_asked += len(new)
                self._refuse_if_most_failed(n_asked)
                advance(len(new))
        self._finish([rows[question.id] for question in self._questions])

    def _resume(self, batches: Sequence[Sequence[Question]]) -> dict[str, dict[str, Any]]:
        """The rows of the whole batches of an interrupted run of the same job; a torn tail is dropped."""
        found = {row["id"]: row for row in read_partial(self._partial, self._identity, self._options.overwrite)}
        whole = [batch for batch in batches if all(question.id in found for question in batch)]
        done = {question.id: found[question.id] for batch in whole for question in batch}
        if done:
            log.info("%s: continuing after %d of %d answers", self._job.task.name, len(done), len(self._questions))
        with atomic_write(self._partial) as file:
            file.write(json.dumps({"identity": self._identity}) + "\n")
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in done.values())
        return done

    def _row(self, question: Question, answer: str | Unanswered) -> dict[str, Any]:
        fault = answer.reason if isinstance(answer, Unanswered) else ""
        said = "" if isinstance(answer, Unanswered) else answer
        row = {
            "id": question.id,
            "task": self._job.task.name,
            "image": question.image,
            "prompt": question.prompt,
            "answer": said,
            "parsed": None if fault else self._scorer.parse(said, question),
            "reference": question.reference,
        }
        if question.mirror:
            row["mirror"] = True
        if question.boxes:
            row["boxes"] = {name: list(box) for name, box in question.boxes.items()}
        if fault:
            row["failure"] = self._failed[question.id] = fault
        return row

    def _refuse_if_most_failed(self, n_asked: int) -> None:
        n = len(self._failed)
        if n <= _MOST_FAILED * max(n_asked, min(len(self._questions), _ENOUGH)):
            return
        if n == n_asked:
            self._partial.unlink()
        kept = "" if n == n_asked else "; the answers until now are kept"
        raise DataError(
            f"predicting {self._job.task.name}: {n} of the {n_asked} questions asked until now failed{kept}; the "
            f"first: {next(iter(self._failed.values()))}; mend that and run the command again"
        )

    def _finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        job = self._job
        write_jsonl(job.output, rows)
        config = self._config.model_dump(mode="json", exclude_none=isinstance(self._config, FamilyConfig))
        failed = {row["id"]: row["failure"] for row in rows if "failure" in row}
        meta = {
            "task": job.task.name,
            "dataset": self._set.name,
            "identity": self._identity,
            "n": len(rows),
            "limit": self._options.limit,
            "decoding": self._decoding.model_dump(mode="json"),
            "prompts": self._config.prompts.model_dump(mode="json"),
            "config": config,
            "model": {"fingerprint": self._identity["model"], "receipt": self._opened.model.receipt()},
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


def _by_image(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """The questions image by image, the images by their longest prompt, so that batches hold little padding."""
    images: dict[tuple[str, bool], list[Question]] = {}
    for question in questions:
        images.setdefault((question.image, question.mirror), []).append(question)
    yield from sorted(images.values(), key=lambda alike: max(len(question.prompt) for question in alike))


def _identity(job: Job, options: Options, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What decides every answer; equal identities give equal files."""
    if not job.data.exists():
        raise DataError(f"predicting {job.task.name}: there is no data {job.data}")
    return {
        "task": job.task.name,
        "data": fingerprint(job.data),
        **({} if job.split is None else {"split": job.split}),
        **shared,
        "limit": options.limit,
        "overrides": dict(sorted((options.decoding or {}).items())),
    }


def is_done(doing: str, output: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `output` holds what `identity` asks for; `doing` begins the messages. Raises DataError when it holds
    something else."""
    if not output.exists() or overwrite:
        return False
    if output.is_dir():
        raise DataError(f"{doing}: the output {output} is a folder; name a file")
    found = read_meta(output).get("identity")
    if found is None and partial_path(output).is_file():
        return False  # stopped between the last two steps
    if found == identity:
        log.info("%s: %s is complete already (same model, data and settings)", doing, output)
        return True
    raise DataError(
        f"{doing}: {output} exists and was made otherwise ({differences(found, identity)}); "
        "name another output, or pass --overwrite"
    )


def differences(found: Any, wanted: Mapping[str, Any]) -> str:
    """What two identities disagree on, for a message."""
    if not isinstance(found, dict):
        return "nothing beside it says how"
    return "; ".join(
        f"{key}: there {found.get(key)!r}, asked for {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    )


def _decoding(config: ExperimentConfig | FamilyConfig, overrides: Mapping[str, Any]) -> EvaluationConfig:
    values = {**config.evaluation.model_dump(), **overrides}
    try:
        return EvaluationConfig.model_validate(values)
    except ValidationError as faults:
        told = "; ".join(f"{fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}" for fault in faults.errors())
        raise ConfigError(f"setting how the model answers: {told}") from None


def partial_path(output: Path) -> Path:
    """Where the finished answers of an unfinished run lie."""
    return output.with_name(f"{output.name}.partial.jsonl")


def read_partial(path: Path, identity: Mapping[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """The rows that an interrupted run of the same identity left; a line cut short is dropped. Raises DataError for a
    file of another run."""
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
            f"continuing from {path}: it was begun otherwise ({differences(found, identity)}); "
            "name another output, or pass --overwrite"
        )
    return rows


def append_rows(file: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a partial file and have them on the disk."""
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.flush()
    os.fsync(file.fileno())
