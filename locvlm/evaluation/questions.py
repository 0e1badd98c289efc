"""What is asked: one question with its reference, a whole set of them, and the files they lie in.

A set comes from a questions.jsonl (alone or in a dataset folder), from a benchmark's own file, or from a
Localize-Instruct folder, whose structured turns become one question each.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from locvlm.config import CoordinateConfig, GeometryConfig
from locvlm.coordinates import LocationFormat, make_location_format
from locvlm.data.coco import read_bytes
from locvlm.errors import DataError
from locvlm.evaluation.metrics import Figure, Floor, Item, Sums
from locvlm.geometry import make_geometry
from locvlm.records import BoxXYXY, read_manifest

QUESTIONS_FILE = "questions.jsonl"
CONVERSATIONS_FILE = "conversations.arrow"
ID_NAMES = ("id", "question_id", "questionId", "ref_id")  # ours, VQA and POPE, GQA, REFER


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image or video. `reference` is what the task scores against, a JSON value; None where the
    set comes without answers, so that it can be asked but not scored.

    `boxes`: the objects that the question is about, name -> (x1, y1, x2, y2) in pixels, for pictures only.
    `mirror`: it is about the image mirrored left to right, and so are its boxes.
    """

    id: str
    image: str
    prompt: str
    reference: Any
    boxes: Mapping[str, BoxXYXY] = field(default_factory=dict)
    mirror: bool = False


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """All questions of one data set for one task.

    `categories`: every category name of the set, sorted (empty where the task has none). `coordinates`, `geometry`:
    how places are written in its prompts and answers, where that is known. `skipped`: records of the files that are no
    question of the set, by reason.
    """

    name: str
    questions: tuple[Question, ...]
    categories: tuple[str, ...] = ()
    coordinates: CoordinateConfig | None = None
    geometry: GeometryConfig | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a question set lies: its file, the file of its answers where that is another one, and which split of a file
    that holds several."""

    path: Path
    annotations: Path | None = None
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a set's files in our terms, and the records left out, by reason."""

    rows: Sequence[Mapping[str, Any]]
    skipped: Mapping[str, int] = field(default_factory=dict)


class Scorer(ABC):
    """The rules of one task for one question set. `figures`: the names it reports, the most telling first."""

    figures: tuple[str, ...]

    def prepare(self, answers: Mapping[str, str | None]) -> None:  # noqa: B027 - most tasks have nothing to prepare
        """Called once before `sums` with the answer to every question (None: a failure), for work that is done for all
        answers together."""

    @abstractmethod
    def parse(self, answer: str, question: Question) -> Any:
        """What the task reads from an answer, a JSON value; None when it reads nothing."""

    @abstractmethod
    def sums(self, answer: str | None, question: Question) -> Sums:
        """What the question adds to each figure; `answer` None is a failure and counts as wrong."""

    @abstractmethod
    def floors(self) -> dict[str, Floor]:
        """What the best answer that ignores the image would score, computed from the references themselves."""

    def counts(self, items: Sequence[Item]) -> dict[str, int]:
        """Whole numbers worth reporting beside the figures."""
        return {}

    def facts(self, figures: Mapping[str, Figure]) -> dict[str, Any]:
        """What else metrics.json says at its top level: figures by kind of question, the judge, why one is missing."""
        return {}


def spread(questions: Sequence[Question], limit: int | None) -> tuple[Question, ...]:
    """`limit` questions from all over the set, always the same ones, in the order of the set; all when None.

    They are drawn by a hash of the id: equal steps would pick one class only where classes alternate.
    """
    if limit is None or limit >= len(questions):
        return tuple(questions)
    ranked = sorted(questions, key=lambda question: hashlib.blake2b(question.id.encode(), digest_size=16).digest())
    chosen = {question.id for question in ranked[:limit]}
    return tuple(question for question in questions if question.id in chosen)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, plain or gzip. Raises DataError that names the file."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as fault:
        raise DataError(f"reading {path}: {fault}; the file must be UTF-8 text") from None


def read_value(path: Path) -> Any:
    """The value of a JSON file, or the list of the values of a JSON-lines file, plain or gzip; told apart by the
    content and not by the name (POPE's files are JSON lines named .json). Raises DataError that names the file and the
    place of the fault."""
    text = read_text(path)
    try:
        return json.loads(text) if text.strip() else []
    except (json.JSONDecodeError, RecursionError):
        if "\n" not in text.strip() or text.lstrip()[:1] != "{":
            return _parse(path, text, "")
    lines = enumerate(text.split("\n"), 1)  # not splitlines: U+2028 is legal inside a JSON string
    return [_parse(path, line, f"line {number}: ") for number, line in lines if line.strip()]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list or of a JSON-lines file. Raises DataError as `read_value`."""
    return check_rows(path, read_value(path))


def check_rows(path: Path, value: Any) -> list[dict[str, Any]]:
    """`value`, read from `path`, as a list of objects; one object stands for a list of one. Raises DataError."""
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"reading {path}: record {number} is a {type(row).__name__}, an object was needed")
    if not rows:
        raise DataError(f"reading {path}: the file holds no record")
    return list(rows)


def plain_rows(source: Source) -> Rows:
    """The rows of a questions file of ours, or of a benchmark's file that has the same form. Raises DataError when a
    second file or a split was named, which such a set does not have."""
    for name, value in (("--annotations", source.annotations), ("--split", source.split)):
        if value is not None:
            raise DataError(f"reading {source.path}: this set has its answers beside its questions; leave out {name}")
    return Rows(read_rows(source.path))


def joined(
    source: Source, rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], dict[str, int]]:
    """Every row with the fields of its own answer record over it, and how many records of the answers file belong to no
    row. Raises DataError when a row has no answer record."""
    merged: list[Mapping[str, Any]] = []
    absent = []
    for number, row in enumerate(rows, 1):
        try:
            key = row_id(row)
        except KeyError:
            raise DataError(f"reading {source.path}: record {number} has no usable id") from None
        if key in answers:
            merged.append({**row, **answers[key]})
        else:
            absent.append(key)
    if absent:
        raise DataError(
            f"reading {source.path} with the answers {source.annotations}: {len(absent)} of {len(rows)} questions have "
            f"no answer there (first id {absent[0]!r}); give the two files of one split"
        )
    unasked = len(answers) - len(rows)
    return merged, {"answer without a question": unasked} if unasked > 0 else {}


def by_id(path: Path, rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Rows by their id. Raises DataError for a row without an id and for an id that occurs twice."""
    found: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        try:
            key = row_id(row)
        except KeyError:
            raise DataError(f"reading {path}: record {number} has no usable id") from None
        if key in found:
            raise DataError(f"reading {path}: the question id {key!r} occurs twice; ids must be unique")
        found[key] = row
    return found


def row_id(row: Mapping[str, Any]) -> str:
    """The id of a row under any of the names that benchmarks give it, as text. Raises KeyError when it has none."""
    value = next((row[name] for name in ID_NAMES if name in row), None)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise KeyError("id")
    return str(value)


def refuse_repeated(path: Path, questions: Iterable[Question]) -> None:
    """Raises DataError when two questions share an id, because an answer could then belong to either."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"reading {path}: the question id {question.id!r} occurs twice; ids must be unique")
        seen.add(question.id)


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a data folder, or of the folder around its questions file; empty when there is none."""
    folder = path if path.is_dir() else path.parent
    beside = path.is_dir() or path.name in (QUESTIONS_FILE, CONVERSATIONS_FILE)
    return read_manifest(folder) if beside and (folder / "manifest.json").is_file() else {}


def places_of(path: Path, manifest: Mapping[str, Any]) -> tuple[CoordinateConfig | None, GeometryConfig | None]:
    """The coordinate and geometry sections of a manifest, None where it has none. Raises DataError."""
    try:
        coordinates = manifest.get("coordinates") or None
        geometry = manifest.get("geometry") or None
        return (
            CoordinateConfig.model_validate(coordinates) if coordinates else None,
            GeometryConfig.model_validate(geometry) if geometry else None,
        )
    except ValidationError as fault:
        first = fault.errors()[0]
        raise DataError(
            f"reading the manifest of {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; build the set again"
        ) from None


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as fault:
        raise DataError(
            f"reading {path}: {where}not valid JSON ({fault}); the file may be cut short, copy or make it again"
        ) from None


def location_format(questions: QuestionSet) -> LocationFormat | None:
    """How the set writes places (no geometry: squash); None when that is not known."""
    if questions.coordinates is None:
        return None
    geometry = make_geometry(questions.geometry) if questions.geometry is not None else None
    return make_location_format(questions.coordinates, geometry)


def text_of(row: Mapping[str, Any], *names: str) -> str:
    """The first of the named fields that the row has, which must be text. Raises KeyError."""
    for name in names:
        if name in row:
            if isinstance(row[name], str):
                return str(row[name])
            break
    raise KeyError(names[0])


def box_of(value: Any) -> BoxXYXY:
    """Four finite numbers as a box (x1, y1, x2, y2). Raises ValueError."""
    try:
        x1, y1, x2, y2 = (float(number) for number in value)
    except (TypeError, ValueError):
        x1 = y1 = x2 = y2 = math.nan
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 < x1 or y2 < y1:
        raise ValueError(f"the box {value!r} is not [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2")
    return x1, y1, x2, y2


def size_of(row: Mapping[str, Any]) -> tuple[float, float]:
    """(width, height) of the row's image in pixels. Raises KeyError."""
    for name in ("width", "height"):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise KeyError(name)
    return float(row["width"]), float(row["height"])
