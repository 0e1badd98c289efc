"""Drawings for the report, as text that goes into the page: loss curves."""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from locvlm.errors import DataError
from locvlm.records import read_jsonl

# colours that stand for the page's own, so that the drawing follows light and dark
_INK, _FAINT = "#010203", "#040506"
_ARMS = tuple(f"#0a0b0{number}" for number in range(1, 9))


@dataclass(frozen=True, slots=True)
class Curve:
    """A training curve. `panel` is the stage it belongs to, `label` the arm, `colour` the arm's number."""

    label: str
    panel: str
    colour: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    tokens: int | None
    seconds: float | None


def read_curve(name: str, path: Path, colours: Sequence[str]) -> Curve:
    """The curve of a curve.jsonl (rows with step and loss). `name` is "arm stage". Raises DataError."""
    rows = read_jsonl(path)
    try:
        steps = tuple(int(row["step"]) for row in rows)
        losses = tuple(float(row["loss"]) for row in rows)
        tokens = int(rows[-1]["tokens"]) if rows and "tokens" in rows[-1] else None
        seconds = float(rows[-1]["seconds"]) if rows and "seconds" in rows[-1] else None
    except (KeyError, TypeError, ValueError) as fault:
        raise DataError(f"reading the curve {path}: {fault!r}; needed are rows with step and loss") from None
    if not rows:
        raise DataError(f"reading the curve {path}: it has no rows; training has not logged anything yet")
    label, _, panel = name.rpartition(" ")
    if not label:
        label, panel = name, "training"
    colour = colours.index(label) if label in colours else len(colours)
    return Curve(label, panel, colour, steps, losses, tokens, seconds)


def curves_svg(curves: Sequence[Curve]) -> str:
    """One panel of loss against steps as an SVG element whose colours are CSS variables of the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "locvlm", "font.size": 10, "font.family": "sans-serif"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            colour = _ARMS[curve.colour % len(_ARMS)]
            smooth = _running_mean(curve.losses)
            axes.plot(curve.steps, curve.losses, color=colour, linewidth=0.8, alpha=0.25)
            axes.plot(curve.steps, smooth, color=colour, linewidth=1.8)
        axes.set_xlabel("step", color=_INK)
        axes.set_ylabel("loss a token", color=_INK)
        axes.set_ylim(bottom=0)
        axes.tick_params(colors=_INK, length=0)
        axes.grid(axis="y", color=_FAINT, linewidth=0.7)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_FAINT)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), "Loss against steps: " + ", ".join(curve.label for curve in curves))


def _running_mean(values: Sequence[float]) -> list[float]:
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _themed(svg: str, title: str) -> str:
    """Only the <svg> element, sized by the page, with CSS variables for colours and the page's font."""
    svg = svg[svg.index("<svg") :]
    # its <style> would reach the whole page
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for number, colour in enumerate(_ARMS):
        svg = svg.replace(colour, f"var(--arm{number})")
    return svg.replace(_INK, "var(--ink)").replace(_FAINT, "var(--line)")
