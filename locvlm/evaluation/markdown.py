"""The report as Markdown, and how its numbers are written there and on the page."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from locvlm.evaluation.figures import Curve
from locvlm.evaluation.measures import Compared, Seeds
from locvlm.evaluation.metrics import Figure
from locvlm.evaluation.paper_tables import PaperCell, PaperTable
from locvlm.evaluation.tables import Comparison, Row, TaskTable


def markdown(values: Mapping[str, Any], curves: Sequence[Curve]) -> str:
    """The whole report without its pictures. `values`: what the page's template is given."""
    names = [arm.name for arm in values["arms"]]
    lines = [f"# {values['title']}", ""]
    for measure in values["measures"]:
        lines += _markdown_task(measure.table, names)
    for compared in values["comparisons"]:
        lines += _markdown_compared(compared)
    for seeds in values["seeds"]:
        lines += _markdown_seeds(seeds)
    lines += ["## The paper's tables", ""]
    for table in values["paper"]:
        lines += _markdown_paper(table)
    if curves:
        lines += _markdown_curves(curves)
    lines += ["## How to read this", "", *(f"- {note}" for note in values["notes"]), ""]
    for name, facts in values["provenance"]:
        lines += [f"## Where {name} came from", "", *(f"- {key}: `{value}`" for key, value in facts), ""]
    return "\n".join(lines).rstrip() + "\n"


def text_tables(tables: Sequence[PaperTable]) -> str:
    """The paper's tables for a terminal: ours below the paper's rows, and under each table why a cell is empty."""
    return "\n\n".join(map(_text_table, tables))


def _text_table(table: PaperTable) -> str:
    reasons: dict[str, str] = {}  # why ours has no number -> its letter
    heads = [head.partition(", ") for head in table.heads]
    rows = [["", *(above if below else "" for above, _, below in heads)]] if any(below for *_, below in heads) else []
    rows.append(["", *(below or above for above, _, below in heads)])
    for line in table.lines:
        is_ours = line.arm is not None
        cells = [cell.text or (_letter(cell.reason, reasons) if is_ours else "-") for cell in line.cells]
        rows.append([f"{line.label} (ours)" if is_ours else line.label, *cells])
    told = [f"  {letter} {reason}" for reason, letter in reasons.items()]
    return "\n".join([f"Table {table.number}: {table.title}", aligned(rows), *told])


def _letter(reason: str, reasons: dict[str, str]) -> str:
    return reasons.setdefault(reason, f"[{chr(ord('a') + len(reasons))}]")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = (c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _markdown_task(table: TaskTable, names: Sequence[str]) -> list[str]:
    head = ["figure", *names, *(f"{names[0]} - {other}" for other in names[1:]), "floor", "n", "paper"]
    return [
        f"## {table.title} (`{table.task}`)",
        "",
        f"{table.n} questions on {table.n_images} {table.media} of {table.dataset}; percent, 95 % interval.",
        "",
        *_markdown_table(head, [_markdown_row(row) for row in table.rows]),
        "",
        *(f"- {note}" for note in table.notes),
        *([""] if table.notes else []),
    ]


def _markdown_compared(compared: Compared) -> list[str]:
    head = ["figure", "difference", "p", "right in one alone", "McNemar p", "n"]
    rows = []
    for title, test in compared.tests:
        if isinstance(test, str):
            rows.append([title, f"- ({test})", "", "", "", ""])
            continue
        value, low, high = test.difference
        split = test.mcnemar
        rows.append(
            [
                title,
                f"{points(value)} ({points(low)} to {points(high)})",
                chance(test.p),
                "-" if split is None else f"{split.only_first} / {split.only_second}",
                "-" if split is None else chance(split.p),
                f"{test.n}" + (f" ({test.left_out} of one run alone left out)" if test.left_out else ""),
            ]
        )
    return [f"## {compared.first} against {compared.second}", "", *_markdown_table(head, rows), ""]


def _markdown_seeds(seeds: Seeds) -> list[str]:
    rows = [
        [
            title,
            str(spread.n),
            percent(spread.mean),
            percent(spread.deviation),
            f"{percent(spread.low)} to {percent(spread.high)}",
        ]
        for title, spread in seeds.rows
    ]
    head = ["figure", "runs", "mean", "standard deviation", "range"]
    return [f"## {seeds.name} over seeds ({', '.join(seeds.arms)})", "", *_markdown_table(head, rows), ""]


def _markdown_paper(table: PaperTable) -> list[str]:
    rows = [
        [line.label + (" (ours)" if line.arm is not None else ""), *(_markdown_cell(cell) for cell in line.cells)]
        for line in table.lines
    ]
    notes = [f"- {note}" for note in table.notes]
    return [f"### Table {table.number}: {table.title}", "", *_markdown_table(["", *table.heads], rows), "", *notes, ""]


def _markdown_cell(cell: PaperCell) -> str:
    if not cell.text:
        return f"- ({cell.reason})"
    return f"{cell.text} ({cell.interval})" if cell.interval else cell.text


def _markdown_curves(curves: Sequence[Curve]) -> list[str]:
    rows = [
        [
            f"{curve.label} {curve.panel}",
            str(curve.steps[-1]),
            f"{curve.losses[-1]:.3f}",
            "-" if curve.tokens is None else str(curve.tokens),
            "-" if curve.seconds is None else duration(curve.seconds),
        ]
        for curve in curves
    ]
    return ["## Training", "", *_markdown_table(["run", "steps", "last loss", "tokens", "time"], rows), ""]


def _markdown_row(row: Row) -> list[str]:
    cells = [
        cell.short if cell.figure is None else f"{percent(cell.figure.value)} ({interval(cell.figure)})"
        for cell in row.cells
    ]
    n = next((str(cell.figure.n) for cell in row.cells if cell.figure is not None), "0")
    floor = "-" if row.floor is None else f"{percent(row.floor)} ({row.floor_answer})"
    paper = row.paper.note
    if row.paper.ours is not None:
        paper = f"LLaVA {percent(row.paper.baseline)}, LocVLM-B {percent(row.paper.ours)} ({row.paper.note})"
    return [row.label, *cells, *(_difference(comparison) for comparison in row.comparisons), floor, n, paper]


def _difference(comparison: Comparison) -> str:
    if comparison.difference is None:
        return comparison.reason
    value, low, high = comparison.difference
    word = f", {comparison.verdict}" if comparison.verdict else ""
    return f"{points(value)} ({points(low)} to {points(high)}){word}"


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', ' ').replace(chr(10), ' ') for cell in line)} |" for line in lines]


def percent(value: float | None) -> str:
    """A fraction as a percentage; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\u2212")


def interval(figure: Figure) -> str:
    """The 95 % interval; empty where there is none."""
    return "" if figure.low is None or figure.high is None else f"{percent(figure.low)} to {percent(figure.high)}"


def chance(p: float) -> str:
    """A p-value."""
    return "< 0.01" if p < 0.01 else f"{p:.2f}"


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
