"""A look inside a data set: one HTML page of samples with their boxes drawn and the text beside, and its distribution.

Samples are drawn by a keyed hash, from every objective in turn. An image that cannot be shown is said to be so and
counted; without images the boxes stand on an empty canvas of the right size.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from locvlm.config import PromptConfig
from locvlm.coordinates import LocationFormat
from locvlm.data.actnet import DATASET as LABELS
from locvlm.data.actnet import VIDEOS_NAME, VideoLabels
from locvlm.data.coco import whole
from locvlm.data.conversations import STRUCTURED, ConversationFile, open_conversations
from locvlm.data.distribution import Counts, Distribution, conversation_distribution, counted_distribution
from locvlm.data.instruct import Renderer, draw
from locvlm.data.marks import Marks, Piece, Place, Tag, Text, pixels
from locvlm.data.pages import Picture, environment
from locvlm.data.rows import decode_row, split_rows
from locvlm.errors import DataError
from locvlm.prompts import render_chat, render_plain
from locvlm.records import BoxXYXY, Conversation, Turn, atomic_write, read_manifest

QUESTIONS_NAME = "questions.jsonl"
OTHER_SIZE = "the picture has another size than the record says"

_WORDS = ("yes", "no", "left", "right", "above", "below")
_ROLES = ("subject", "object", "third")
_TOLD = {
    "id",
    "question_id",
    "image",
    "video",
    "width",
    "height",
    "prompt",
    "text",
    "question",
    "icl_prompt",
    "icl_reference",
}
_TOLD |= {"reference", "references", "label", "answer", "category", "box", *_ROLES}

# (name, image or mirrored image or video, numbers of a video's frames where they are known) -> the picture (of a video
# the middle frame), or why there is none
Shoot = Callable[[str, str, Sequence[int]], Picture | str]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question, its answer, and the stored fields behind them as (name, text)."""

    question: Text
    answer: Text
    fields: tuple[tuple[str, Text], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One record on the page. `width`, `height`: of the picture in pixels, 0 when unknown. `faults`: why there is no
    picture, or what is odd. `more`: (title, text) to unfold. `band`: the axis of the middle fifth to draw, if any."""

    group: str
    id: str
    image: str
    medium: str
    width: int
    height: int
    picture: Picture | None
    faults: tuple[str, ...]
    places: tuple[Place, ...]
    tags: tuple[Tag, ...]
    exchanges: tuple[Exchange, ...] = ()
    fields: tuple[tuple[str, Text], ...] = ()
    more: tuple[tuple[str, Text], ...] = ()
    band: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """How a data set is to be shown.

    `n` samples, drawn by `seed`, only of `objective` if it is not empty. `shoot` gives the pictures; None: there are
    none. `renderer` writes structured turns; None: how is not known. `how_written` says in words how it does.
    """

    n: int = 20
    seed: int = 0
    objective: str = ""
    shoot: Shoot | None = None
    renderer: Renderer | None = None
    how_written: str = ""

    @property
    def location(self) -> LocationFormat | None:
        """How places are written; None where that is not known."""
        return None if self.renderer is None else self.renderer.location

    @property
    def system(self) -> str:
        """The text that a conversation begins with."""
        return (PromptConfig() if self.renderer is None else self.renderer.prompts).system


@dataclass(frozen=True, slots=True)
class Shown:
    """What a page holds: samples, and pictures that are missing or odd, by reason."""

    samples: int
    faults: Mapping[str, int]


@dataclass(slots=True)
class Groups:
    """Row numbers by what the rows show. `rows`: how many there are; one may be in several groups, or in none."""

    members: dict[str, "array[int]"] = field(default_factory=dict)
    rows: int = 0

    def add(self, row: int, names: Iterable[str]) -> None:
        """One row and its groups."""
        self.rows += 1
        for name in names:
            self.members.setdefault(name, array("q")).append(row)

    def choose(self, n: int, seed: int, objective: str = "") -> list[tuple[str, int]]:
        """(group, row) of `n` rows: of every group in turn the next by the draw, no row twice.

        Raises DataError when there is no group `objective`.
        """
        if objective and objective not in self.members:
            raise DataError(
                f"it holds nothing of the objective {objective!r}; there are {', '.join(sorted(self.members))}"
            )
        names = [objective] if objective else sorted(self.members)
        queues = {name: iter(self._drawn(name, n, seed)) for name in names}
        chosen: dict[int, str] = {}
        while queues and len(chosen) < n:
            for name in list(queues):
                row = next((row for row in queues[name] if row not in chosen), None)
                if row is None:
                    del queues[name]
                elif len(chosen) < n:
                    chosen[row] = name
        return sorted(((name, row) for row, name in chosen.items()), key=lambda pair: pair[0])

    def _drawn(self, name: str, n: int, seed: int) -> list[int]:
        members = self.members[name]
        keys = np.fromiter((draw(1 << 62, seed, "show", row) for row in members), np.int64, len(members))
        first = np.argsort(keys, kind="stable")[: n * len(self.members)]  # other groups may take some of them before
        return [members[place] for place in first]


class Looked(Protocol):
    """A data set of any kind as the page needs it."""

    manifest: dict[str, Any] | None

    def read(self, view: View) -> tuple[Groups, Distribution]:
        """Read it through once."""

    def sample(self, group: str, row: int, view: View) -> Sample:
        """One of its records."""


def open_dataset(path: Path) -> Looked:
    """What a data set folder holds: conversations, questions, or labels of videos; or a file of one of the first two.

    Raises DataError when there is nothing of that kind, or it is damaged.
    """
    if path.is_dir():
        if (path / QUESTIONS_NAME).is_file():
            return _Questions(path / QUESTIONS_NAME)
        return _Labels(path) if (path / VIDEOS_NAME).is_file() else _Conversations(path)
    if not path.exists():
        raise DataError(f"looking into {path}: there is no such file or folder")
    if path.suffix == ".arrow":
        return _Conversations(path)
    first = decode_row(split_rows(path)[0], dict[str, Any]) or {}
    if "annotations" in first and "images" in first:
        raise DataError(
            f"looking into {path}: this is an annotation file; build a data set of it with `locvlm data ...` and name "
            "that folder"
        )
    return _Conversations(path) if "conversations" in first else _Questions(path)


def write_page(path: Path, output: Path, view: View) -> Shown:
    """Write the page of the data set `path` to the file `output`.

    Raises DataError when the set cannot be read, is empty, or has nothing of the objective asked for.
    """
    found = open_dataset(path)
    groups, distribution = found.read(view)
    if not groups.rows:
        raise DataError(f"looking into {path}: it holds nothing to show; needed are conversations or questions")
    try:
        chosen = groups.choose(view.n, view.seed, view.objective)
    except DataError as fault:
        raise DataError(f"looking into {path}: {fault}") from None
    samples = [found.sample(group, row, view) for group, row in chosen]
    faults = dict(sorted(Counter(fault for sample in samples for fault in sample.faults).items()))
    manifest = found.manifest or {}
    name = path.resolve().name if path.is_dir() else path.name
    values = {
        "title": str(manifest.get("dataset") or name),
        "name": name,
        "samples": samples,
        "n_all": groups.rows,
        "faults": faults,
        "left_out": [] if view.objective else sorted(set(groups.members) - {sample.group for sample in samples}),
        "objective": view.objective,
        "about": list(_about(manifest, view)),
        "distribution": distribution,
        "pictures": view.shoot is not None,
        "drawn": any(sample.places for sample in samples),
        "seed": view.seed,
    }
    page = environment().get_template("show.html.jinja").render(values)
    with atomic_write(output, "wb") as file:
        file.write(page.encode("utf-8", "replace"))  # a foreign file may hold half of a surrogate pair
    return Shown(len(samples), faults)


class _Conversations:
    def __init__(self, path: Path) -> None:
        self.file: ConversationFile = open_conversations(path)
        self.manifest = self.file.manifest

    def read(self, view: View) -> tuple[Groups, Distribution]:
        """By the objective of a conversation and those of its structured turns."""
        groups = Groups()
        for batch in self.file.table.to_batches():
            nested = batch.column("turns")
            ends = (nested.offsets.to_numpy() - nested.offsets[0].as_py()).tolist()
            kinds = nested.flatten().field("objective").to_pylist()
            for row, objective in enumerate(batch.column("objective").to_pylist()):
                turns = kinds[ends[row] : ends[row + 1]]
                groups.add(groups.rows, {objective, *(kind for kind in turns if kind in STRUCTURED)})
        return groups, conversation_distribution(self.file, view.renderer)

    def sample(self, group: str, row: int, view: View) -> Sample:
        conversation: Conversation = self.file[row]
        stored = (conversation.width, conversation.height)
        picture, faults, size = _shot(view, conversation.image, conversation.medium, stored)
        marks = Marks(view.location, *size)
        colours = [
            marks.add(turn.box_xyxy, turn.category or turn.description, (turn.description or turn.category,))
            for turn in conversation.turns
        ]
        try:
            texts = _texts(conversation, view)
        except DataError as fault:
            faults += (f"the text cannot be written: {fault}",)
            texts = [("", "")] * len(conversation.turns)
        if all(turn.box_xyxy is None for turn in conversation.turns):
            for question, answer in texts:
                marks.read(question)
                marks.read(answer)
        whole_text = _training_text(marks, texts, view.system)
        return Sample(
            group,
            conversation.id,
            conversation.image,
            conversation.medium,
            *size,
            picture,
            faults,
            tuple(marks.places),
            tuple(marks.tags()),
            tuple(
                Exchange(marks.pieces(question), marks.pieces(answer), tuple(_fields(turn, colour)))
                for turn, colour, (question, answer) in zip(conversation.turns, colours, texts, strict=True)
            ),
            more=(("The text as the model reads it", whole_text),) if any(map(any, texts)) else (),
        )


def _texts(conversation: Conversation, view: View) -> list[tuple[str, str]]:
    """The (question, answer) pairs. Raises DataError when they cannot be written."""
    if view.renderer is not None:
        return view.renderer.turns(conversation)
    if any(turn.objective in STRUCTURED for turn in conversation.turns):
        raise DataError("nothing says how this set writes places; give --preset or --config")
    return [(turn.question, turn.answer) for turn in conversation.turns]


def _fields(turn: Turn, colour: int | None) -> Iterator[tuple[str, Text]]:
    yield "objective", (Piece(turn.objective),)
    if turn.category:
        yield "category", (Piece(turn.category, colour),)
    if turn.description:
        yield "description", (Piece(turn.description),)
    if turn.box_xyxy is not None:
        yield "box", (Piece(pixels(turn.box_xyxy), colour),)


def _training_text(marks: Marks, texts: Sequence[tuple[str, str]], system: str) -> Text:
    """The chat text with its supervised parts marked; the plain form for a caption without a request."""
    try:
        if len(texts) == 1 and not texts[0][0].strip():
            text, span = render_plain(texts[0][1])
            spans = [span]
        else:
            text, spans = render_chat(texts, system)
    except DataError as fault:
        return (Piece(str(fault)),)
    pieces: list[Piece] = []
    end = 0
    for start, stop in spans:
        pieces += [*marks.pieces(text[end:start]), *marks.pieces(text[start:stop], "taught")]
        end = stop
    return tuple(pieces)


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a question set, whatever its task. `objects`: (role, category, box in pixels or None)."""

    id: str
    image: str
    medium: str
    width: int
    height: int
    group: str
    prompt: str
    icl_prompt: str
    reference: str
    objects: tuple[tuple[str, str, BoxXYXY | None], ...]
    fields: tuple[tuple[str, str], ...]


class _Questions:
    def __init__(self, path: Path) -> None:
        beside = path.name == QUESTIONS_NAME and (path.parent / "manifest.json").is_file()
        self.manifest = read_manifest(path.parent) if beside else None
        self._rows = split_rows(path)
        options = (self.manifest or {}).get("options")
        self._options = options if isinstance(options, Mapping) else {}

    def read(self, view: View) -> tuple[Groups, Distribution]:
        groups, counts = Groups(), Counts()
        ids: set[str] = set()
        repeated = unusable = 0
        for row in range(len(self._rows)):
            question = self._question(row)
            if question is None:
                unusable += 1
                continue
            groups.add(row, (question.group,))
            repeated += question.id in ids
            ids.add(question.id)
            counts.objectives[question.group] += 1
            counts.images[question.image] += 1
            counts.keys.append(hash((question.image, question.prompt, question.reference)))
            counts.question_lengths.append(len(question.prompt))
            counts.answer_lengths.append(len(question.reference))
            for _, category, box in question.objects:
                counts.add_object(question.group, category, box, question.width, question.height)
        return groups, counted_distribution(counts, "questions", groups.rows, repeated, unusable)

    def sample(self, group: str, row: int, view: View) -> Sample:
        question = self._question(row)
        if question is None:
            raise IndexError(f"row {row} is no question")
        picture, faults, size = _shot(view, question.image, question.medium, (question.width, question.height))
        marks = Marks(view.location, *size)
        fields: list[tuple[str, Text]] = []
        for role, category, box in question.objects:
            colour = marks.add(box, category or role, (category,))
            told = "" if box is None else "; ".join((pixels(box), *marks.written(box), *_centre(box, size)))
            pieces = (
                (Piece(category, colour), Piece("; "), Piece(told)) if category and told else (Piece(category or told),)
            )
            fields.append((role or ("category" if category else "box"), pieces))
        fields += [(name, (Piece(value),)) for name, value in question.fields]
        by_band = self._options.get("rules") == "paper"
        return Sample(
            group,
            question.id,
            question.image,
            question.medium,
            *size,
            picture,
            faults,
            tuple(marks.places),
            tuple(marks.tags()),
            (Exchange(marks.pieces(question.prompt), marks.pieces(question.reference), tuple(fields)),),
            more=(("In context", marks.pieces(question.icl_prompt)),) if question.icl_prompt else (),
            band=str(self._options.get("axis", "")) if by_band else "",
        )

    def _question(self, row: int) -> Question | None:
        value = decode_row(self._rows[row], dict[str, Any])
        return None if value is None else _question(value, row)


def _question(row: Mapping[str, Any], place: int) -> Question | None:
    prompt = next((row[name] for name in ("prompt", "text", "question") if isinstance(row.get(name), str)), None)
    if prompt is None:
        return None
    names_video = "image" not in row and isinstance(row.get("video"), str)
    medium = "video" if names_video or row.get("medium") == "video" else "image"  # Hal-Act keeps the name in `image`
    image = row.get("video" if names_video else "image")
    said = _said(next((row[key] for key in ("reference", "references", "label", "answer") if key in row), ""))
    icl = row.get("icl_prompt")
    return Question(
        id=str(row.get("id", row.get("question_id", f"row-{place}"))),
        image=image if isinstance(image, str) else "",
        medium="mirrored image" if medium == "image" and row.get("mirror") is True else medium,
        width=whole(row.get("width")) or 0,
        height=whole(row.get("height")) or 0,
        group=_group(row, said),
        prompt=prompt,
        icl_prompt=f"{icl} {_said(row.get('icl_reference', ''))}" if isinstance(icl, str) else "",
        reference=said,
        objects=tuple(_objects(row)),
        fields=tuple((name, _said(value)) for name, value in row.items() if name not in _TOLD and value is not None),
    )


def _group(row: Mapping[str, Any], said: str) -> str:
    """What a question shows: its objective, or an answer of few, or its task."""
    objective = row.get("objective")
    if isinstance(objective, str) and objective:
        return objective
    return said.lower() if said.lower() in _WORDS else str(row.get("task", "questions"))


def _objects(row: Mapping[str, Any]) -> Iterator[tuple[str, str, BoxXYXY | None]]:
    if "category" in row or "box" in row:
        yield "", str(row.get("category", "")), _box(row.get("box"))
    for role in _ROLES:
        value = row.get(role)
        if isinstance(value, Mapping):
            yield role, str(value.get("category", "")), _box(value.get("box"))


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " | ".join(value)
    return json.dumps(value, ensure_ascii=False)


def _box(value: Any) -> BoxXYXY | None:
    try:
        x1, y1, x2, y2 = (float(number) for number in value)
    except (TypeError, ValueError):
        return None
    return (x1, y1, x2, y2) if np.isfinite((x1, y1, x2, y2)).all() and x1 <= x2 and y1 <= y2 else None


def _centre(box: BoxXYXY, size: tuple[int, int]) -> Iterator[str]:
    if size[0] > 0 and size[1] > 0:
        x, y = 50 * (box[0] + box[2]) / size[0], 50 * (box[1] + box[3]) / size[1]
        yield f"centre at {x:.1f} % from the left, {y:.1f} % from the top"


class _Labels:
    """The segments of a video's frames; the middle one of the sampled frames is shown."""

    def __init__(self, path: Path) -> None:
        self.manifest: dict[str, Any] | None = read_manifest(path)
        self._path = path / VIDEOS_NAME
        self._rows = split_rows(self._path)

    def read(self, view: View) -> tuple[Groups, Distribution]:
        groups, counts = Groups(), Counts()
        videos: set[str] = set()
        repeated = 0
        for row in range(len(self._rows)):
            labels = self._labels(row)
            groups.add(row, (LABELS,))
            repeated += labels.video in videos
            videos.add(labels.video)
            counts.images[labels.video] += 1
            for frame in labels.frames:
                for segment in frame:
                    counts.add_object("segment", segment.category, segment.box_xyxy, labels.width, labels.height)
            for category in labels.absent:
                counts.add_object("neg_pred", category, None, 0, 0)
        return groups, counted_distribution(counts, "videos", groups.rows, repeated, 0)

    def sample(self, group: str, row: int, view: View) -> Sample:
        labels = self._labels(row)
        middle = len(labels.indices) // 2
        picture, faults, size = _shot(view, labels.video, "video", (labels.width, labels.height), labels.indices)
        marks = Marks(view.location, *size)
        fields: list[tuple[str, Text]] = [("frames", (Piece(", ".join(map(str, labels.indices))),))]
        for number, (index, frame) in enumerate(zip(labels.indices, labels.frames, strict=False)):
            pieces: list[Piece] = []
            for segment in frame:
                box = segment.box_xyxy
                colour = marks.add(box, segment.category) if number == middle else None
                pieces.append(Piece(f"{segment.category} ({pixels(box)})", colour))
                pieces.append(Piece("; "))
            shown = " (shown)" if number == middle else ""
            fields.append((f"frame {index}{shown}", tuple(pieces[:-1]) or (Piece("no segment"),)))
        fields.append(("absent", (Piece(", ".join(labels.absent)),)))
        return Sample(
            group,
            labels.video,
            labels.video,
            "video",
            *size,
            picture,
            faults,
            tuple(marks.places),
            tuple(marks.tags()),
            fields=tuple(fields),
        )

    def _labels(self, row: int) -> VideoLabels:
        labels = decode_row(self._rows[row], VideoLabels)
        if labels is None:
            raise DataError(
                f"reading {self._path}: record {row + 1} is not the labels of a video; build it again with "
                f"`locvlm data {LABELS}`"
            )
        return labels


def _shot(
    view: View, name: str, medium: str, stored: tuple[int, int], frames: Sequence[int] = ()
) -> tuple[Picture | None, tuple[str, ...], tuple[int, int]]:
    """The picture, what is odd about it, and the size in which boxes are drawn: that of the picture, or the stored."""
    size = (max(0, stored[0]), max(0, stored[1]))
    if view.shoot is None:
        return None, (), size
    found = view.shoot(name, medium, frames)
    if isinstance(found, str):
        return None, (found,), size
    actual = (found.width, found.height)
    return found, ((OTHER_SIZE,) if all(size) and size != actual else ()), actual


def _about(manifest: Mapping[str, Any], view: View) -> Iterator[tuple[str, str]]:
    """What the manifest says, as (name, value) lines."""
    for name in ("counts", "skipped", "notes", "options"):
        section = manifest.get(name)
        if isinstance(section, Mapping) and section:
            yield name, ", ".join(f"{key} {_said(value)}" for key, value in section.items())
    for entry in manifest.get("sources") or ():
        if isinstance(entry, Mapping):
            yield "source", " ".join(str(value) for value in entry.values())
    if "seed" in manifest:
        yield "seed", str(manifest["seed"])
    if view.how_written:
        yield "text", view.how_written
