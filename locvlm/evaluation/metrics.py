"""Arithmetic over many scores: figures from sums, intervals over image clusters, differences between two models, IoU.

Every figure here is a function of sums over the questions. Nearly all are a ratio of two: a question adds (numerator,
denominator) to each figure that it counts for, and accuracy, precision, recall, F1 or a mean IoU differ only in what is
added; with denominator zero the figure is 0. METEOR of a corpus is a longer formula over longer sums. Questions about
one image are not independent, so intervals come from resampling whole images.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from locvlm.errors import DataError

Sums = dict[str, tuple[float, ...]]
Floats = NDArray[np.float64]
Formula = Callable[[Floats], Floats]  # sums [..., k] -> figure [...]

N_RESAMPLES = 1000
CONFIDENCE = 0.95
_Z = 1.959963984540054  # two-sided 95 %
_CHUNK = 100  # resamples at a time; bounds memory at 100 x clusters


@dataclass(frozen=True, slots=True)
class Item:
    """What one question adds to each figure. `image` is its cluster."""

    id: str
    image: str
    sums: Sums


@dataclass(frozen=True, slots=True)
class Floor:
    """What the best answer that ignores the image would score, and which answer that is."""

    value: float
    answer: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A fraction in [0, 1]; `low`, `high`: its 95 % interval (None when nothing counts for it); `n` questions count."""

    value: float
    n: int
    low: float | None
    high: float | None
    floor: float | None = None
    floor_answer: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


class Difference(NamedTuple):
    """First model minus second, with its paired 95 % interval."""

    difference: float
    low: float
    high: float


def summarise(
    items: Sequence[Item], names: Sequence[str], floors: Mapping[str, Floor], seed: int = 0
) -> dict[str, Figure]:
    """The named figures over all items, each with its interval, n and floor."""
    tables = _by_cluster(items, names)
    samples = _resample([tables], names, seed)[0]
    figures = {}
    for column, (name, table) in enumerate(zip(names, tables, strict=True)):
        n = sum(1 for item in items if any(item.sums.get(name, ())[1:]))
        value = _value(name, table)
        filled = int(table[:, 1:].any(axis=1).sum())
        low, high = _interval(samples[:, column], value, filled)
        floor = floors.get(name)
        figures[name] = Figure(value, n, low, high, floor.value if floor else None, floor.answer if floor else "")
    return figures


def paired_difference(
    first: Mapping[str, Any], second: Mapping[str, Any], figure: str = "accuracy", seed: int = 0
) -> Difference:
    """`figure` of the first model minus that of the second on the same questions, with a 95 % interval.

    `first` and `second` are contents of two metrics.json of one task. Both models are resampled together, image by
    image, so that what makes a question hard for both cancels out. Raises DataError when the two did not answer the
    same questions, do not have the figure, or were told right from wrong by different judges.
    """
    one, two = _paired_tables(first, second, figure)
    samples = _resample([[one], [two]], [figure], seed)
    low, high = _percentiles(samples[0][:, 0] - samples[1][:, 0])
    difference = _value(figure, one) - _value(figure, two)
    return Difference(difference, min(low, difference), max(high, difference))


def swapped_p(first: Mapping[str, Any], second: Mapping[str, Any], figure: str, seed: int = 0) -> float:
    """The two-sided p of the difference of `paired_difference` if it made no difference which model answered: how often
    it is at least as large when the two are swapped at random, image by image (N_RESAMPLES times, or every way there is
    when there are fewer). Never below 1 / (N_RESAMPLES + 1). Raises DataError as `paired_difference` does.
    """
    one, two = _paired_tables(first, second, figure)
    formula, is_exact = FORMULAS.get(figure, _ratio), 2 ** len(one) <= N_RESAMPLES
    found = abs(_value(figure, one) - _value(figure, two)) - 1e-12
    as_large = 0
    for swaps in _swaps(len(one), is_exact, seed):
        apart = swaps @ (two - one)
        differences = formula(one.sum(axis=0) + apart) - formula(two.sum(axis=0) - apart)
        as_large += int(np.count_nonzero(np.abs(differences) >= found))
    return as_large / 2 ** len(one) if is_exact else (as_large + 1) / (N_RESAMPLES + 1)


def _swaps(n: int, is_exact: bool, seed: int) -> Iterator[Floats]:
    """Which of n clusters change sides, [some, n] of 0 and 1: every way there is, or N_RESAMPLES at random."""
    if is_exact:
        yield (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)
        return
    generator = np.random.default_rng(seed)
    for begin in range(0, N_RESAMPLES, _CHUNK):
        yield generator.integers(0, 2, (min(_CHUNK, N_RESAMPLES - begin), n)).astype(np.float64)


def _paired_tables(first: Mapping[str, Any], second: Mapping[str, Any], figure: str) -> list[Floats]:
    """The sums of each image for both models, in one order. Raises DataError."""
    refuse_other_judges([first, second], "comparing two models")
    items = [items_of(metrics) for metrics in (first, second)]
    by_id = [{item.id: item for item in side} for side in items]
    if first.get("task") != second.get("task") or by_id[0].keys() != by_id[1].keys():
        only = [len(by_id[i].keys() - by_id[1 - i].keys()) for i in (0, 1)]
        raise DataError(
            f"comparing two models on {figure}: the first has {len(items[0])} questions of {first.get('task')!r}, the "
            f"second {len(items[1])} of {second.get('task')!r}; {only[0]} occur only in the first, {only[1]} only in "
            "the second; score both on the same data"
        )
    for metrics in (first, second):
        if figure not in metrics.get("figures", {}):
            raise DataError(
                f"comparing two models: {metrics.get('task')!r} has no figure {figure!r}; it has "
                f"{', '.join(metrics.get('figures', {})) or 'none'}"
            )
    second_items = [by_id[1][item.id] for item in items[0]]
    if any(a.image != b.image for a, b in zip(items[0], second_items, strict=True)):
        raise DataError(f"comparing two models on {figure}: equal question ids stand for different images")
    return [_by_cluster(side, [figure])[0] for side in (items[0], second_items)]


def refuse_other_judges(metrics: Iterable[Mapping[str, Any]], doing: str) -> None:
    """Raises DataError when contents of metrics.json stem from different judges: the same answers scored by two judges
    lie ten points apart."""
    judges = sorted({str(entry["judge"]) for entry in metrics if entry.get("judge") is not None})
    if len(judges) > 1:
        raise DataError(
            f"{doing}: the figures come from different judges ({', '.join(judges)}), so they say nothing about each "
            "other; score all with one --judge"
        )


def items_of(metrics: Mapping[str, Any]) -> list[Item]:
    """The items of a metrics.json. Raises DataError when it has none."""
    try:
        return [
            Item(key, value["image"], {name: (sums[0], sums[1], *sums[2:]) for name, sums in value["sums"].items()})
            for key, value in metrics["items"].items()
        ]
    except (KeyError, TypeError, AttributeError, IndexError):
        raise DataError(
            "comparing two models: a metrics file has no scores by question (`items`); write it with `locvlm score`"
        ) from None


def wilson(value: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction of n independent trials; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    spread = _Z * _Z / n
    centre = (value + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(value * (1 - value) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def meteor(sums: Floats) -> Floats:
    """METEOR 1.5 from its statistics [..., 23] as `Meteor.statistics` gives them, summed over any number of segments.

    The statistics: lengths of hypothesis and reference, function words of each; for each of the four kinds of match
    (exact, stem, synonym, paraphrase) matched content words of hypothesis and reference, then function words of both;
    chunks, matched words of hypothesis and of reference. The weights are those for English. Returns [...].
    """
    stages = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    weights, delta = np.array([1.0, 0.6, 0.8, 0.6]), 0.75
    matches = weights @ (delta * stages[..., :2] + (1 - delta) * stages[..., 2:])
    lengths = delta * (sums[..., :2] - sums[..., 2:4]) + (1 - delta) * sums[..., 2:4]
    precision, recall = np.moveaxis(_divide(matches, lengths), -1, 0)
    fragments = _divide(sums[..., 20], sums[..., 21:23].mean(axis=-1))
    mean = _divide(precision * recall, 0.85 * precision + 0.15 * recall)
    return np.asarray(mean * (1 - 0.6 * fragments**0.2))


def _divide(above: Floats, below: Floats) -> Floats:
    """Element by element; 0 where the denominator is 0."""
    return np.divide(above, below, out=np.zeros_like(below), where=below > 0)


def _ratio(sums: Floats) -> Floats:
    return _divide(sums[..., 0], sums[..., 1])


FORMULAS: Mapping[str, Formula] = {"meteor": meteor, "meteor_stripped": meteor}  # every other figure is a ratio


def _value(name: str, table: Floats) -> float:
    return float(FORMULAS.get(name, _ratio)(table.sum(axis=0)))


def _by_cluster(items: Sequence[Item], names: Sequence[str]) -> list[Floats]:
    """For each figure the sums of each cluster, [clusters, k]; clusters in order of first appearance."""
    rows: dict[str, int] = {}
    where = np.array([rows.setdefault(item.image, len(rows)) for item in items], dtype=np.intp)
    tables = []
    for name in names:
        width = next((len(item.sums[name]) for item in items if name in item.sums), 2)
        nothing = (0.0,) * width
        values = np.array([item.sums.get(name, nothing) for item in items], dtype=np.float64)
        table = np.zeros((len(rows), width))
        np.add.at(table, where, values.reshape(len(items), width))
        tables.append(table)
    return tables


def _resample(models: Sequence[Sequence[Floats]], names: Sequence[str], seed: int) -> list[Floats]:
    """Figures of each model over the same resamples of the clusters, each [N_RESAMPLES, figures]."""
    n_clusters = len(models[0][0]) if names else 0
    if n_clusters == 0:
        return [np.zeros((N_RESAMPLES, len(names))) for _ in models]
    generator = np.random.default_rng(seed)
    shares = np.full(n_clusters, 1 / n_clusters)
    parts: list[list[Floats]] = [[] for _ in models]
    for begin in range(0, N_RESAMPLES, _CHUNK):
        size = min(_CHUNK, N_RESAMPLES - begin)
        weights = generator.multinomial(n_clusters, shares, size=size).astype(np.float64)
        for part, tables in zip(parts, models, strict=True):
            columns = [FORMULAS.get(name, _ratio)(weights @ table) for name, table in zip(names, tables, strict=True)]
            part.append(np.stack(columns, axis=1))
    return [np.concatenate(part) for part in parts]


def _percentiles(samples: Floats) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _interval(samples: Floats, value: float, n_clusters: int) -> tuple[float | None, float | None]:
    if n_clusters == 0:
        return None, None
    if n_clusters == 1 or value <= 0 or value >= 1:
        # resampling cannot leave a set that is all right or all wrong; ten of ten is not certainty
        low, high = wilson(min(1.0, max(0.0, value)), n_clusters)
    else:
        low, high = _percentiles(samples)
    return min(low, value), max(high, value)
