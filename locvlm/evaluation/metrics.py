"""Arithmetic over many scores: ratios of sums, intervals over image clusters, differences between two models, IoU.

Every figure here is a ratio of sums over the questions: a question adds (numerator, denominator) to each figure that it
counts for, and accuracy, precision, recall, F1 or a mean IoU differ only in what is added. A figure with denominator
zero is 0. Questions about one image are not independent, so intervals come from resampling whole images.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from locvlm.errors import DataError
from locvlm.records import BoxXYXY

Sums = dict[str, tuple[float, float]]
Floats = NDArray[np.float64]

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
    numerators, denominators, n_clusters = _by_cluster(items, names)
    samples = _resample([(numerators, denominators)], n_clusters, seed)[0]
    figures = {}
    for column, name in enumerate(names):
        n = sum(1 for item in items if item.sums.get(name, (0, 0))[1] > 0)
        value = _ratio(numerators[:, column].sum(), denominators[:, column].sum())
        filled = int((denominators[:, column] > 0).sum())
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
    same questions or do not have the figure.
    """
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
    one = _by_cluster(items[0], [figure])
    two = _by_cluster(second_items, [figure])
    samples = _resample([one[:2], two[:2]], one[2], seed)
    low, high = _percentiles(samples[0][:, 0] - samples[1][:, 0])
    difference = _ratio(one[0].sum(), one[1].sum()) - _ratio(two[0].sum(), two[1].sum())
    return Difference(difference, min(low, difference), max(high, difference))


def items_of(metrics: Mapping[str, Any]) -> list[Item]:
    """The items of a metrics.json. Raises DataError when it has none."""
    try:
        return [
            Item(key, value["image"], {name: (pair[0], pair[1]) for name, pair in value["sums"].items()})
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


def box_iou(first: BoxXYXY, second: BoxXYXY) -> float:
    """Intersection over union of two (x1, y1, x2, y2) boxes in the same units; 0 when both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - overlap
    return overlap / union if union > 0 else 0.0


def inside(point: tuple[float, float], box: BoxXYXY) -> bool:
    """Whether the point (x, y) lies in the box, border included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _area(box: BoxXYXY) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else 0.0


def _by_cluster(items: Iterable[Item], names: Sequence[str]) -> tuple[Floats, Floats, int]:
    """Numerators and denominators, each [clusters, figures], clusters in order of first appearance."""
    rows: dict[str, int] = {}
    where: list[int] = []
    values: list[list[tuple[float, float]]] = []
    for item in items:
        where.append(rows.setdefault(item.image, len(rows)))
        values.append([item.sums.get(name, (0.0, 0.0)) for name in names])
    table = np.asarray(values, dtype=np.float64).reshape(len(values), len(names), 2)
    sums = np.zeros((len(rows), len(names), 2))
    np.add.at(sums, np.asarray(where, dtype=np.intp), table)
    return sums[:, :, 0], sums[:, :, 1], len(rows)


def _resample(models: Sequence[tuple[Floats, Floats]], n_clusters: int, seed: int) -> list[Floats]:
    """Figures of each model over the same resamples of the clusters, each [N_RESAMPLES, figures]."""
    if n_clusters == 0:
        return [np.zeros((N_RESAMPLES, numerators.shape[1])) for numerators, _ in models]
    generator = np.random.default_rng(seed)
    shares = np.full(n_clusters, 1 / n_clusters)
    parts: list[list[Floats]] = [[] for _ in models]
    for begin in range(0, N_RESAMPLES, _CHUNK):
        size = min(_CHUNK, N_RESAMPLES - begin)
        weights = generator.multinomial(n_clusters, shares, size=size).astype(np.float64)
        for part, (numerators, denominators) in zip(parts, models, strict=True):
            below = weights @ denominators
            part.append(np.divide(weights @ numerators, below, out=np.zeros_like(below), where=below > 0))
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
