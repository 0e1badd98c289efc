"""What a data set holds, counted and drawn: objectives, categories, boxes, lengths, template draws, repetitions.

Counting goes over Arrow columns batch by batch, so that 200 000 conversations take seconds and little memory. Text
depends on the coordinates and is rendered when it is read; its lengths are counted on a drawn part of a large set.
"""

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from locvlm.data.conversations import STRUCTURED, ConversationFile
from locvlm.data.instruct import Renderer, draw
from locvlm.data.pages import number
from locvlm.errors import DataError
from locvlm.prompts import LOC_PROMPTS, REV_PROMPTS
from locvlm.records import BoxXYXY

TOP = 30  # categories shown by name
LENGTHS_OF = 5000  # conversations whose text is rendered to count its length

_GRID = 24  # cells a side of the map of box centres
_DECADES, _PER_DECADE = 5, 4  # the histogram of areas: from 1e-5 of the image to all of it
_SHORT = 12  # characters; an answer up to this length is counted by itself
_MANY = 10
_OFTEN = 0.05  # share of the turns that short answers must have to be worth a chart
_LOG_ABOVE = 50
_PROMPTS = {"loc_pred": LOC_PROMPTS, "neg_pred": LOC_PROMPTS, "rev_loc": REV_PROMPTS}


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a bar chart; `length` in [0, 1]."""

    label: str
    n: int
    length: float
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """A bar chart; `note` says what is counted and on which scale."""

    title: str
    note: str
    bars: tuple[Bar, ...]
    kind: str = "bars"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts over equal steps of an axis. `labels`: what each column stands for; `ticks`: (place in [0, 1], text)."""

    title: str
    note: str
    counts: tuple[int, ...]
    labels: tuple[str, ...]
    ticks: tuple[tuple[float, str], ...]
    kind: str = "histogram"

    @property
    def peak(self) -> int:
        """The largest count."""
        return max(self.counts)


@dataclass(frozen=True, slots=True)
class Heat:
    """Box centres over the image, rows from top to bottom; `cells` are counts."""

    title: str
    note: str
    cells: tuple[tuple[int, ...], ...]
    kind: str = "heat"

    @property
    def peak(self) -> int:
        """The largest count."""
        return max(map(max, self.cells))


@dataclass(frozen=True, slots=True)
class TemplateDraw:
    """How often each template of one objective was drawn in epoch 0, against a uniform draw.

    `deviations`: counts minus `expected`, in standard deviations of a uniform draw. `p`: of the chi-square test.
    """

    objective: str
    templates: tuple[str, ...]
    counts: tuple[int, ...]
    expected: float
    deviations: tuple[float, ...]
    p: float


@dataclass(frozen=True, slots=True)
class Distribution:
    """All charts of one data set, and plain facts as (name, value)."""

    facts: tuple[tuple[str, str], ...]
    charts: tuple[Bars | Histogram | Heat, ...]
    templates: tuple[TemplateDraw, ...] = ()


@dataclass(slots=True)
class Counts:
    """What is added up while a data set is read."""

    objectives: Counter[str] = field(default_factory=Counter)
    categories: Counter[tuple[str, str]] = field(default_factory=Counter)  # (objective, category)
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)  # (objective, short answer)
    images: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)  # turns a conversation
    areas: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_DECADES * _PER_DECADE, np.int64))
    centres: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((_GRID, _GRID), np.int64))
    thirds: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 3), np.int64))
    templates: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    question_lengths: list[int] = field(default_factory=list)
    answer_lengths: list[int] = field(default_factory=list)
    keys: "array[int]" = field(default_factory=lambda: array("q"))  # hashes of turns: equal ones are repetitions
    boxes_without_place: int = 0
    boxes: "array[float]" = field(default_factory=lambda: array("d"))  # x1, y1, x2, y2, width, height: not settled yet

    def add_object(self, kind: str, category: str, box: BoxXYXY | None, width: float, height: float) -> None:
        """One object, its box in pixels of an image of width x height."""
        if category:
            self.categories[kind, category] += 1
        if box is not None:
            self.boxes.extend((*box, width, height))

    def settle(self) -> None:
        """Take in the boxes of `add_object`."""
        found = np.array(self.boxes).reshape(-1, 6)
        self.boxes = array("d")
        self.add_boxes(found[:, :4], found[:, 4:])

    def add_boxes(self, boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> None:
        """`boxes` [n, 4] as (x1, y1, x2, y2) and `sizes` [n, 2] as (width, height), all in pixels."""
        with np.errstate(all="ignore"):
            low, high = boxes[:, :2] / sizes, boxes[:, 2:] / sizes
        legal = np.isfinite(low).all(1) & np.isfinite(high).all(1) & (high >= low).all(1)
        self.boxes_without_place += int((~legal).sum())
        low, high = low[legal].clip(0, 1), high[legal].clip(0, 1)
        area = np.maximum((high - low).prod(1), 10.0**-_DECADES)
        step = np.floor((np.log10(area) + _DECADES) * _PER_DECADE).astype(np.int64)
        self.areas += np.bincount(step.clip(0, len(self.areas) - 1), minlength=len(self.areas))
        centre = (low + high) / 2
        cell = np.minimum((centre * _GRID).astype(np.int64), _GRID - 1)
        np.add.at(self.centres, (cell[:, 1], cell[:, 0]), 1)
        for axis in range(2):
            part = 1 + (centre[:, axis] > 0.6).astype(np.int64) - (centre[:, axis] < 0.4)
            self.thirds[axis] += np.bincount(part, minlength=3)


def conversation_distribution(file: ConversationFile, renderer: Renderer | None) -> Distribution:
    """The distribution of a file of conversations. Without a `renderer` (the coordinates are not known) the lengths
    are those of literal turns, and no template draw is counted."""
    counts = Counts()
    for batch in file.table.to_batches():
        _count_batch(counts, batch, renderer)
    n = min(len(file), LENGTHS_OF)
    chosen: Iterable[int] = range(len(file))
    if n < len(file):
        chosen = heapq.nsmallest(n, chosen, key=lambda row: draw(1 << 60, "lengths", row))
    for row in chosen:
        _count_lengths(counts, file, row, renderer)
    part = "" if n == len(file) else f" of {number(n)} conversations that were drawn"
    facts = [("conversations", number(len(file))), ("turns", number(sum(counts.objectives.values())))]
    ids = file.table.column("id")
    facts += _facts(counts, len(file) - pc.count_distinct(ids).as_py(), "turn")
    facts += [(f"skipped: {reason}", number(times)) for reason, times in sorted(file.skipped.items())]
    media = dict(_value_counts(file.table.column("medium")))
    shown = "a video" if set(media) == {"video"} else "an image"
    charts = [
        _bars("Turns by objective", "", counts.objectives),
        *_category_charts(counts),
        *_answer_chart(counts),
        *_box_charts(counts),
        *_steps("Turns of a conversation", "", counts.turns),
        *_steps(f"Conversations about {shown}", "", Counter(counts.images.values())),
        *_lengths("Length of a question", counts.question_lengths, part),
        *_lengths("Length of an answer", counts.answer_lengths, part),
    ]
    draws = [_template_draw(kind, counts.templates[kind]) for kind in STRUCTURED if kind in counts.templates]
    return Distribution(tuple(facts), tuple(charts), tuple(draws))


def counted_distribution(counts: Counts, noun: str, n: int, repeated_ids: int, unusable: int) -> Distribution:
    """The distribution of `n` questions or videos (the `noun`), from what was added up while they were read.
    `unusable`: records that are none."""
    counts.settle()
    facts = [(noun, number(n)), *_facts(counts, repeated_ids, noun.removesuffix("s"))]
    if unusable:
        facts.append((f"skipped: records that are no {noun}", number(unusable)))
    many = len(counts.objectives) > 1
    charts = [
        *([_bars(f"{noun.capitalize()} by answer or objective", "", counts.objectives)] if many else []),
        *_category_charts(counts),
        *_box_charts(counts),
        *(_steps("Questions about an image", "", Counter(counts.images.values())) if noun == "questions" else ()),
        *_lengths("Length of a question", counts.question_lengths),
        *_lengths(
            "Length of an answer", counts.answer_lengths if max(counts.answer_lengths, default=0) > _SHORT else ()
        ),
    ]
    return Distribution(tuple(facts), tuple(charts))


def chi_square_p(counts: Sequence[int]) -> float:
    """The p-value of Pearson's chi-square test that all of two or more values are equally likely.

    1.0 when nothing was counted. Exact: the upper incomplete gamma function at half-integers.
    """
    total = sum(counts)
    if not total:
        return 1.0
    expected = total / len(counts)
    half = sum((n - expected) ** 2 for n in counts) / expected / 2
    if not half:
        return 1.0
    freedom = len(counts) - 1
    order = 1.0 if freedom % 2 == 0 else 0.5
    p = math.exp(-half) if freedom % 2 == 0 else math.erfc(math.sqrt(half))
    while order < freedom / 2:  # Q(a + 1, x) = Q(a, x) + x^a e^-x / gamma(a + 1)
        p += math.exp(order * math.log(half) - half - math.lgamma(order + 1))
        order += 1
    return min(1.0, p)


def _count_batch(counts: Counts, batch: pa.RecordBatch, renderer: Renderer | None) -> None:
    nested = batch.column("turns")
    offsets = nested.offsets.to_numpy()
    flat = nested.flatten()
    columns = dict(zip((child.name for child in flat.type), flat.flatten(), strict=True))
    sizes = np.diff(offsets)
    parents = np.repeat(np.arange(batch.num_rows), sizes)
    numbers = np.arange(len(parents)) - np.repeat(offsets[:-1] - offsets[0], sizes)
    counts.turns.update(sizes.tolist())
    counts.images.update(dict(_value_counts(batch.column("image"))))
    for kind, n in _value_counts(columns["objective"]):
        counts.objectives[kind] += n
        chosen = pc.equal(columns["objective"], kind)
        for name, times in _value_counts(columns["category"].filter(chosen)):
            counts.categories[kind, name] += times
        if kind not in STRUCTURED:
            texts = columns["answer"].filter(chosen)
            for text, times in _value_counts(texts.filter(pc.less_equal(pc.utf8_length(texts), _SHORT))):
                counts.answers[kind, text] += times
    placed = columns["box_xyxy"].is_valid().to_numpy(zero_copy_only=False)
    boxes = columns["box_xyxy"].drop_null().flatten().to_numpy().reshape(-1, 4)
    extent = np.stack([batch.column(name).to_numpy() for name in ("width", "height")], 1).astype(np.float64)
    counts.add_boxes(boxes, extent[parents[placed]])
    kinds = columns["objective"].to_pylist()
    if renderer is not None:
        _count_templates(counts, renderer.seed, batch.column("id").to_pylist(), kinds, parents, numbers)
    names = batch.column("image").to_pylist()
    rest = [columns[name].to_pylist() for name in ("category", "description", "question", "answer")]
    places = columns["box_xyxy"].to_pylist()
    for parent, kind, place, *texts in zip(parents.tolist(), kinds, places, *rest, strict=True):
        counts.keys.append(hash((names[parent], kind, None if place is None else tuple(place), *texts)))


def _count_templates(
    counts: Counts,
    seed: int,
    ids: Sequence[str],
    kinds: Sequence[str],
    parents: npt.NDArray[np.int64],
    numbers: npt.NDArray[np.int64],
) -> None:
    for kind, parent, place in zip(kinds, parents.tolist(), numbers.tolist(), strict=True):
        prompts = _PROMPTS.get(kind)
        if prompts is not None:
            if kind not in counts.templates:
                counts.templates[kind] = np.zeros(len(prompts), np.int64)
            counts.templates[kind][draw(len(prompts), seed, 0, ids[parent], place)] += 1


def _count_lengths(counts: Counts, file: ConversationFile, row: int, renderer: Renderer | None) -> None:
    conversation = file[row]
    try:
        if renderer is None:
            texts = [(turn.question, turn.answer) for turn in conversation.turns if turn.objective not in STRUCTURED]
        else:
            texts = renderer.turns(conversation)
    except DataError:  # the page shows which; here it has no length
        return
    counts.question_lengths += [len(question) for question, _ in texts]
    counts.answer_lengths += [len(answer) for _, answer in texts]


def _value_counts(column: Any) -> list[tuple[str, int]]:
    found = pc.value_counts(column)
    return list(zip(found.field(0).to_pylist(), found.field(1).to_pylist(), strict=True))


def _facts(counts: Counts, repeated_ids: int, noun: str) -> list[tuple[str, str]]:
    facts = [("images or videos", number(len(counts.images))), ("ids used before", number(repeated_ids))]
    if counts.keys:
        repeated = len(counts.keys) - len(np.unique(np.frombuffer(counts.keys, np.int64)))
        facts.append((f"{noun}s that say the same about the same image as one before", number(repeated)))
    if counts.boxes_without_place:
        facts.append(("boxes without a place (no image size, or not x1 <= x2)", number(counts.boxes_without_place)))
    return facts


def _bars(title: str, note: str, counts: Mapping[str, int], log: bool = False, rest: tuple[int, int] = (0, 0)) -> Bars:
    """Bars from the largest on; `rest`: how many more there are and what they add up to."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    largest = ordered[0][1] if ordered else 1
    log = log and largest > _LOG_ABOVE

    def length(n: int) -> float:
        if log:
            return math.log10(1 + n) / math.log10(1 + largest)
        return n / largest

    note = f"{note}; logarithmic scale" if log else note
    bars = [Bar(label, n, min(1.0, length(n))) for label, n in ordered]
    if rest[0]:
        bars.append(Bar(f"{number(rest[0])} more", rest[1], min(1.0, length(rest[1])), quiet=True))
    return Bars(title, note, tuple(bars))


def _category_charts(counts: Counts) -> list[Bars]:
    """One chart of the categories that are there and one of those that are not: their balance is a shortcut."""
    absent = {"neg_pred", "no"}
    charts = []
    for title, kinds in (
        ("Categories asked about", {kind for kind, _ in counts.categories} - absent),
        ("Categories that are not in the image", absent),
    ):
        totals: Counter[str] = Counter()
        for (kind, name), n in counts.categories.items():
            if kind in kinds and name:
                totals[name] += n
        if totals:
            ranked = sorted(totals, key=lambda name: (-totals[name], name))
            tail = ranked[TOP:]
            top = {name: totals[name] for name in ranked[:TOP]}
            note = f"{number(len(totals))} categories"
            charts.append(_bars(title, note, top, True, (len(tail), sum(totals[name] for name in tail))))
    return charts


def _answer_chart(counts: Counts) -> list[Bars]:
    if sum(counts.answers.values()) < _OFTEN * sum(counts.objectives.values()) or not counts.answers:
        return []
    top = dict(sorted(counts.answers.items(), key=lambda pair: (-pair[1], pair[0]))[:_MANY])
    rest = (len(counts.answers) - len(top), sum(counts.answers.values()) - sum(top.values()))
    note = f"answers of literal turns of at most {_SHORT} characters"
    return [_bars("Short answers", note, {f"{kind}: {text}": n for (kind, text), n in top.items()}, rest=rest)]


def _box_charts(counts: Counts) -> list[Histogram | Heat]:
    n = int(counts.areas.sum())
    if not n:
        return []
    edges = [10 ** (step / _PER_DECADE - _DECADES) for step in range(_DECADES * _PER_DECADE + 1)]
    labels = tuple(f"{_share(low)} to {_share(high)}" for low, high in pairwise(edges))
    ticks = tuple((decade / _DECADES, _share(10.0 ** (decade - _DECADES))) for decade in range(_DECADES + 1))
    across, down = (tuple(f"{100 * part / n:.0f} %" for part in counts.thirds[axis]) for axis in range(2))
    where = (
        f"centres left {across[0]}, middle fifth {across[1]}, right {across[2]}; "
        f"above {down[0]}, middle fifth {down[1]}, below {down[2]}"
    )
    return [
        Histogram(
            "Area of a box", f"{number(n)} boxes, as a share of the image", tuple(counts.areas.tolist()), labels, ticks
        ),
        Heat("Where the boxes are", where, _cells(counts.centres, n)),
    ]


def _cells(centres: npt.NDArray[np.int64], n: int) -> tuple[tuple[int, ...], ...]:
    """Fewer and larger cells for few boxes."""
    merged = 3 if n < 200 else 2 if n < 2000 else 1
    side = len(centres) // merged
    found = centres.reshape(side, merged, side, merged).sum((1, 3))
    return tuple(tuple(row) for row in found.tolist())


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _steps(title: str, note: str, counts: Mapping[int, int]) -> list[Bars | Histogram]:
    """Whole numbers: bars while they are few, a histogram beyond."""
    if not counts:
        return []
    if len(counts) <= _MANY:
        largest = max(counts.values())
        bars = tuple(Bar(number(key), counts[key], counts[key] / largest) for key in sorted(counts))
        return [Bars(title, note, bars)]
    return [_histogram(title, note, np.repeat(list(counts), list(counts.values())))]


def _lengths(title: str, lengths: Sequence[int], part: str = "") -> list[Histogram]:
    if not lengths:
        return []
    values = np.asarray(lengths)
    middle, most = np.percentile(values, [50, 95])
    note = (
        f"characters{part}; half have at most {middle:.0f}, 95 % at most {most:.0f}, the longest {number(values.max())}"
    )
    return [_histogram(title, note, values)]


def _histogram(title: str, note: str, values: npt.NDArray[np.int64]) -> Histogram:
    """Of whole numbers, in steps of a round width; the last column holds the thousandth that lies far out."""
    top = max(1, int(np.percentile(values, 99.9)))
    width = next(
        step * 10**power for power in range(19) for step in (1, 2, 5) if top // (step * 10**power) < 30
    )  # at most 30 columns
    n = top // width + 1
    counts = np.bincount(np.minimum(values // width, n - 1), minlength=n)
    labels = [f"{number(k * width)} to {number(k * width + width - 1)}" if width > 1 else number(k) for k in range(n)]
    if values.max() >= n * width:
        labels[-1] = f"{number((n - 1) * width)} and more"
    every = max(1, math.ceil(n / 5))
    ticks = tuple((k / n, number(k * width)) for k in range(0, n, every))
    return Histogram(title, note, tuple(counts.tolist()), tuple(labels), ticks)


def _template_draw(objective: str, found: npt.NDArray[np.int64]) -> TemplateDraw:
    counts = tuple(found.tolist())
    total, share = sum(counts), 1 / len(counts)
    spread = math.sqrt(total * share * (1 - share))
    expected = total * share
    deviations = tuple((n - expected) / spread for n in counts)
    return TemplateDraw(objective, _PROMPTS[objective], counts, expected, deviations, chi_square_p(counts))
