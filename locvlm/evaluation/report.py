"""One page of results: the arms side by side, the paper's numbers, pictures, loss curves, where everything came from.

The page is one HTML file without any outside reference; report.md holds the same tables.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locvlm.data.coco import safe_image_path
from locvlm.errors import DataError
from locvlm.evaluation.figures import Curve, Picture, curves_svg, picture
from locvlm.evaluation.metrics import Figure, items_of
from locvlm.evaluation.questions import read_rows, row_id
from locvlm.evaluation.score import read_meta, read_metrics
from locvlm.evaluation.tables import PAPER_NOTE, Comparison, Row, TaskTable, task_table
from locvlm.evaluation.tasks import TASKS
from locvlm.records import atomic_write

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"

# task -> kind of question -> number of pictures
_PICTURES = {
    "localization": {"loc_pred": 6, "neg_pred": 3},
    "coco-spatial": {"": 6},
    "coco-spatial-icl": {"": 3},
    "presence": {"": 6},
    "pope": {"": 6},
    "region-description": {"": 6},
}
_RIGHT = {
    "localization": ("accuracy_iou50", "centre_in_box", "neg_recall")
}  # the first figure that a question counts for

NOTES = (
    "Every figure is a share of all questions asked; a question without a usable answer counts as wrong.",
    "Intervals (95 %) come from resampling whole images, because questions about one image are not independent. They "
    "speak about other images of the same kind, not about other training runs.",
    "The floor is what the best answer scores that never looks at the image.",
    "The difference resamples both arms together, image by image. It is called shown when its interval lies above zero "
    "and the first arm is above its floor, contrary when it lies below zero, and not shown otherwise. Several figures "
    "are tested here and nothing is corrected for that.",
    PAPER_NOTE,
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One model's results. `metrics`: task -> metrics.json, or why there is none; `rows`: task -> prediction rows."""

    name: str
    metrics: Mapping[str, Mapping[str, Any] | str]
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]]
    meta: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Place:
    """A box or a point to draw, in pixels of the image. `arm` is the arm's number, None for the truth."""

    box: tuple[float, float, float, float] | None
    point: tuple[float, float] | None
    arm: int | None
    label: str


@dataclass(frozen=True, slots=True)
class Said:
    """What one arm said."""

    arm: int
    name: str
    answer: str
    right: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its picture and the answers of all arms."""

    question: str
    truth: str
    picture: Picture
    places: tuple[Place, ...]
    said: tuple[Said, ...]


def read_arm(name: str, folder: Path) -> Arm:
    """The results in a folder: <task>.metrics.json, <task>.jsonl and <task>.meta.json, each where it exists.

    Raises DataError for a missing folder, a folder without any metrics, or a damaged file.
    """
    if not folder.is_dir():
        raise DataError(f"reporting on {name}: there is no folder {folder}")
    metrics: dict[str, Mapping[str, Any] | str] = {}
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    meta = {}
    for task in TASKS:
        path = folder / f"{task}.metrics.json"
        if not path.is_file():
            metrics[task] = f"not run (no {path.name} in its folder)"
            continue
        found = read_metrics(path)
        if found["task"] != task:
            raise DataError(f"reporting on {name}: {path} holds scores of the task {found['task']!r}")
        metrics[task] = found
        answers = folder / f"{task}.jsonl"
        if answers.is_file():
            rows[task] = {row_id(row): row for row in read_rows(answers)}
            meta[task] = read_meta(answers)
    if all(isinstance(entry, str) for entry in metrics.values()):
        names = ", ".join(f"{task}.metrics.json" for task in TASKS)
        raise DataError(f"reporting on {name}: the folder {folder} holds none of {names}; run `locvlm score` first")
    return Arm(name, metrics, rows, meta)


def write_report(
    arms: Sequence[Arm], curves: Sequence[Curve], images: Path | None, output: Path, title: str
) -> tuple[Path, Path]:
    """Write report.html and report.md into the folder `output`; returns both paths. The first arm is compared with
    each of the others. Raises DataError when two arms answered different questions."""
    tables = [
        task_table(task, [arm.name for arm in arms], [arm.metrics[task] for arm in arms])
        for task in TASKS
        if any(not isinstance(arm.metrics[task], str) for arm in arms)
    ]
    examples = {table.task: list(_examples(table.task, arms, images)) for table in tables} if images else {}
    panels: dict[str, list[Curve]] = {}
    for curve in curves:
        panels.setdefault(curve.panel, []).append(curve)
    values = {
        "title": title,
        "arms": arms,
        "tables": tables,
        "examples": examples,
        "no_pictures": "" if images else "No pictures: no image folder was given.",
        "panels": {name: (curves_svg(group), group) for name, group in panels.items()},
        "no_curves": "" if curves else "No training curves were given.",
        "provenance": _provenance(arms),
        "notes": NOTES,
    }
    html, markdown = output / HTML_NAME, output / MARKDOWN_NAME
    page = _environment().get_template("report.html.jinja").render(values)
    with atomic_write(html) as file:
        file.write(page)
    with atomic_write(markdown) as file:
        file.write(_markdown(title, arms, tables, curves))
    return html, markdown


def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("locvlm.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "interval": _interval,
        "number": lambda value: f"{value:,.0f}".replace(",", " "),
        "duration": _duration,
    }
    return environment


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _points(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\u2212")


def _interval(figure: Figure) -> str:
    return "" if figure.low is None or figure.high is None else f"{_percent(figure.low)} to {_percent(figure.high)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _examples(task: str, arms: Sequence[Arm], images: Path | None) -> Iterator[Example]:
    """Questions that all arms answered, every pattern of right and wrong in turn, drawn by a hash of the id."""
    present = [(number, arm) for number, arm in enumerate(arms) if task in arm.rows]
    if images is None or not present:
        return
    right = {number: _right_answers(task, arm.metrics[task]) for number, arm in present}
    first = present[0][1].rows[task]
    shared = [key for key in first if all(key in arm.rows[task] and key in right[number] for number, arm in present)]
    shared.sort(key=lambda key: hashlib.blake2b(key.encode(), digest_size=16).digest())
    seen: set[str] = set()
    for kind, wanted in _PICTURES[task].items():
        groups: dict[tuple[bool, ...], list[str]] = {}
        for key in shared:
            if _kind(first[key]) == kind:
                groups.setdefault(tuple(right[number][key] for number, _ in present), []).append(key)
        shown = 0
        for key in _in_turn(groups):
            image = str(first[key].get("image", ""))
            if shown == wanted or image in seen:
                continue
            try:
                view = picture(safe_image_path(images, image))
            except DataError:
                continue  # the model could not see it either; its question is among the failures
            seen.add(image)
            shown += 1
            yield _example(
                view, key, [(number, arm, arm.rows[task][key], right[number][key]) for number, arm in present]
            )


def _example(view: Picture, key: str, answers: Sequence[tuple[int, Arm, Mapping[str, Any], bool]]) -> Example:
    row = answers[0][2]
    return Example(
        str(row.get("prompt") or key),
        _truth(row),
        view,
        tuple(_places(row, [(number, answer) for number, _, answer, _ in answers])),
        tuple(Said(number, arm.name, str(answer.get("answer", "")), ok) for number, arm, answer, ok in answers),
    )


def _in_turn(groups: Mapping[tuple[bool, ...], Sequence[str]]) -> Iterator[str]:
    """One of each group, then the second of each, and so on."""
    ordered = [groups[key] for key in sorted(groups, reverse=True)]
    for depth in range(max(map(len, ordered), default=0)):
        for group in ordered:
            if depth < len(group):
                yield group[depth]


def _right_answers(task: str, metrics: Mapping[str, Any] | str) -> dict[str, bool]:
    if isinstance(metrics, str):
        return {}
    names = _RIGHT.get(task, ("accuracy",))
    right = {}
    for item in items_of(metrics):
        name = next((name for name in names if name in item.sums), None)
        if name is not None:
            right[item.id] = item.sums[name][0] > 0
    return right


def _kind(row: Mapping[str, Any]) -> str:
    reference = row.get("reference")
    return str(reference.get("objective", "")) if isinstance(reference, Mapping) else ""


def _truth(row: Mapping[str, Any]) -> str:
    reference = row.get("reference")
    if not isinstance(reference, Mapping):
        return str(reference)
    if reference.get("objective") == "neg_pred":
        return f"{reference['category']}: not in the image"
    return str(reference.get("category", ""))


def _places(row: Mapping[str, Any], answers: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[Place]:
    for name, box in dict(row.get("boxes") or {}).items():
        yield Place(_four(box), None, None, str(name))
    for number, answer in answers:
        said = answer.get("parsed")
        if not isinstance(said, list) or not all(isinstance(value, int | float) for value in said):
            continue
        if len(said) == 4:
            yield Place(_four(said), None, number, "")
        elif len(said) == 2:
            yield Place(None, (float(said[0]), float(said[1])), number, "")


def _four(box: Sequence[float]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, x2, y2


def _provenance(arms: Sequence[Arm]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Name of each arm and what is known of its origin, as (key, value) lines."""
    told = []
    for arm in arms:
        lines: dict[str, str] = {}
        for task, meta in arm.meta.items():
            if not meta:
                continue
            model = meta.get("model") or {}
            lines["model"] = str(model.get("fingerprint", "unknown"))
            lines |= {f"training {key}": value for key, value in _flat(model.get("receipt") or {})}
            config = meta.get("config") or {}
            if config:
                digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
                lines["config"] = f"{config.get('name', '')} {digest}"
                lines["coordinates"] = _short(config.get("coordinates"))
                lines["geometry"] = _short(config.get("geometry"))
            lines["decoding"] = _short(meta.get("decoding"))
            identity = meta.get("identity") or {}
            limit = f", {meta['limit']} drawn" if meta.get("limit") else ""
            lines[f"data of {task}"] = f"{meta.get('dataset', '')} {identity.get('data', '')}{limit}".strip()
        told.append((arm.name, list(lines.items())))
    return told


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None and not isinstance(value, list):
        yield prefix, f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(section: Any) -> str:
    if not isinstance(section, Mapping):
        return "unknown"
    return ", ".join(f"{key} {value}" for key, value in section.items())


def _markdown(title: str, arms: Sequence[Arm], tables: Sequence[TaskTable], curves: Sequence[Curve]) -> str:
    lines = [f"# {title}", ""]
    for table in tables:
        lines += [f"## {table.title} (`{table.task}`)", ""]
        lines += [f"{table.n} questions on {table.n_images} images of {table.dataset}; percent, 95 % interval.", ""]
        names = [arm.name for arm in arms]
        head = ["figure", *names, *(f"{names[0]} - {other}" for other in names[1:]), "floor", "n", "paper"]
        lines += _markdown_table(head, [_markdown_row(row) for row in table.rows])
        lines += ["", *(f"- {note}" for note in table.notes), *([""] if table.notes else [])]
    if curves:
        lines += ["## Training", ""]
        rows = [
            [
                f"{curve.label} {curve.panel}",
                str(curve.steps[-1]),
                f"{curve.losses[-1]:.3f}",
                "-" if curve.tokens is None else str(curve.tokens),
                "-" if curve.seconds is None else _duration(curve.seconds),
            ]
            for curve in curves
        ]
        lines += [*_markdown_table(["run", "steps", "last loss", "tokens", "time"], rows), ""]
    lines += ["## How to read this", "", *(f"- {note}" for note in NOTES), ""]
    for name, facts in _provenance(arms):
        lines += [f"## Where {name} came from", "", *(f"- {key}: `{value}`" for key, value in facts), ""]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_row(row: Row) -> list[str]:
    cells = [
        cell.short if cell.figure is None else f"{_percent(cell.figure.value)} ({_interval(cell.figure)})"
        for cell in row.cells
    ]
    n = next((str(cell.figure.n) for cell in row.cells if cell.figure is not None), "0")
    floor = "-" if row.floor is None else f"{_percent(row.floor)} ({row.floor_answer})"
    paper = row.paper.note
    if row.paper.ours is not None:
        paper = f"LLaVA {_percent(row.paper.baseline)}, LocVLM-B {_percent(row.paper.ours)} ({row.paper.note})"
    return [row.label, *cells, *(_difference(comparison) for comparison in row.comparisons), floor, n, paper]


def _difference(comparison: Comparison) -> str:
    if comparison.difference is None:
        return comparison.reason
    value, low, high = comparison.difference
    word = f", {comparison.verdict}" if comparison.verdict else ""
    return f"{_points(value)} ({_points(low)} to {_points(high)}){word}"


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', ' ').replace(chr(10), ' ') for cell in line)} |" for line in lines]
