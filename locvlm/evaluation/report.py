"""One page of results: the arms side by side, the paper's tables, pictures, loss curves, where everything came from.

The page is one HTML file without any outside reference; report.md holds the same tables.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from locvlm.data.faces import blurred_by
from locvlm.data.pages import environment
from locvlm.evaluation.arms import Arm, refuse_repeated_arms
from locvlm.evaluation.figures import Curve, curves_svg
from locvlm.evaluation.markdown import chance, duration, interval, markdown, percent, points
from locvlm.evaluation.measures import Measure, compared_of, measures_of, seeds_of
from locvlm.evaluation.paper_tables import Keywords, paper_tables
from locvlm.evaluation.pictures import examples, face_blur
from locvlm.evaluation.tables import PAPER_NOTE
from locvlm.pixels import open_images
from locvlm.records import atomic_write

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"

NOTES = (
    "Every figure is a share of all questions asked; a question without a usable answer counts as wrong.",
    "Intervals (95 %) come from resampling whole images, because questions about one image are not independent. They "
    "speak about other images of the same kind, not about other training runs.",
    "The floor is what the best answer scores that never looks at the image.",
    "The difference resamples both arms together, image by image. It is called shown when its interval lies above zero "
    "and the first arm is above its floor, contrary when it lies below zero, and not shown otherwise. Several figures "
    "are tested here and nothing is corrected for that.",
    "In comparisons p is two-sided: how often a difference as large comes about when the two are swapped at random, "
    "image by image. McNemar's counts questions as independent, which flatters it where several ask about one image.",
    PAPER_NOTE,
)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a page is made of besides its arms. `images`: folders in which pictures are looked for; `pairs`: names of
    arms to compare (none: the first with each of the others); `seeds`: name -> arms that differ in their seed alone;
    `blur_faces`: in the pictures."""

    title: str
    curves: Sequence[Curve] = ()
    images: Sequence[Path] = ()
    keywords: Sequence[Keywords] = ()
    pairs: Sequence[tuple[str, str]] = ()
    seeds: Mapping[str, Sequence[str]] | None = None
    blur_faces: bool = False


def write_report(arms: Sequence[Arm], output: Path, contents: Contents) -> tuple[Path, Path]:
    """Write report.html and report.md into the folder `output`; returns both paths.

    Raises ConfigError for a name that is no arm's, DataError for an image folder that cannot be opened or faces that
    cannot be blurred because the detector is missing.
    """
    refuse_repeated_arms(arm.name for arm in arms)
    measures = _with_pictures(measures_of(arms), arms, contents)
    panels: dict[str, list[Curve]] = {}
    for curve in contents.curves:
        panels.setdefault(curve.panel, []).append(curve)
    values = {
        "title": contents.title,
        "arms": arms,
        "measures": measures,
        "paper": paper_tables(arms, contents.keywords),
        "comparisons": compared_of(arms, measures, contents.pairs),
        "seeds": seeds_of(arms, measures, contents.seeds or {}),
        "no_pictures": "" if contents.images else "No pictures: no image folder was given.",
        "faces": _faces(contents),
        "panels": {name: (curves_svg(group), group) for name, group in panels.items()},
        "no_curves": "" if contents.curves else "No training curves were given.",
        "provenance": _provenance(arms),
        "notes": NOTES,
    }
    html, text = output / HTML_NAME, output / MARKDOWN_NAME
    pages = environment()
    pages.filters |= {
        "percent": percent,
        "points": points,
        "interval": interval,
        "duration": duration,
        "chance": chance,
    }
    page = pages.get_template("report.html.jinja").render(values)
    with atomic_write(html) as file:
        file.write(page)
    with atomic_write(text) as file:
        file.write(markdown(values, contents.curves))
    return html, text


def _with_pictures(measures: Sequence[Measure], arms: Sequence[Arm], contents: Contents) -> list[Measure]:
    if not contents.images:
        return list(measures)
    sources = [open_images(folder) for folder in contents.images]
    blur = face_blur() if contents.blur_faces else None
    return [
        replace(one, examples=tuple(examples(one.table.task, one.results, arms, sources, blur))) for one in measures
    ]


def _faces(contents: Contents) -> str:
    if not contents.images:
        return ""
    if contents.blur_faces:
        return "Faces are blurred in the pictures alone; the models saw them as they are in the image folder."
    known = [blurred_by(folder) is not None for folder in contents.images]
    if all(known):
        return "Faces are blurred, as they were for the models."
    return "Faces are blurred in some of the image folders, as they were for the models." if any(known) else ""


def _provenance(arms: Sequence[Arm]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Name of each arm and what is known of its origin, as (key, value) lines."""
    told = []
    for arm in arms:
        marks = {True: "yes", False: "no"}
        labels = {key: marks[value] if isinstance(value, bool) else value for key, value in arm.labels.items()}
        lines: dict[str, str] = {f"label {key}": value for key, value in labels.items()}
        for result in arm.results:
            task, meta = result.task, {**_known(result.metrics), **result.meta}
            model = meta.get("model") or {}
            if not model and not meta.get("config"):
                continue
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
            which = f"{task}, {result.key[1]}" if len(arm.of(task)) > 1 else task
            lines[f"data of {which}"] = f"{meta.get('dataset', '')} {identity.get('data', '')}{limit}".strip()
        told.append((arm.name, list(lines.items())))
    return told


def _known(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a metrics.json repeats of the file beside the predictions."""
    names = ("model", "config", "decoding", "limit", "dataset")
    return {name: metrics[name] for name in names if metrics.get(name) is not None}


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
