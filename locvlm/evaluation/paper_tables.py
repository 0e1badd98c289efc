"""Tables 2 and 4 to 14 of the paper with our runs below the paper's rows, column for column.

A cell without a number says why. Video answers are told right by a judge, and judges differ by ten points on the same
answers, so each judge has a column of its own and the paper's (GPT-3.5 of 2023) is never ours.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from locvlm.errors import DataError
from locvlm.evaluation.arms import OBJECTIVES, Arm, Result, facts_of, is_row_of
from locvlm.evaluation.metrics import Figure
from locvlm.evaluation.tables import REGION_SPLITS, TITLES, paper
from locvlm.records import read_json

PAPER_JUDGE = "GPT-3.5 of 2023"
POPE_SPLITS = ("random", "popular", "adversarial")
_VIDEO_TASKS = {
    "activitynet-qa": "activitynet_qa",
    "msrvtt-qa": "msrvtt_qa",
    "msvd-qa": "msvd_qa",
    "tgif-qa": "tgif_qa",
}  # task -> column of Table 6
_NOT_GIVEN = "no metrics given"
_NEEDS_VIDEO = "no metrics given; needs video data"
_OTHER_JUDGE = "judge differs"
_NOT_PRINTED = "not printed"
_SERVER = "only its server can score it"
_MARKS = {True: "yes", False: "no"}


@dataclass(frozen=True, slots=True)
class PaperCell:
    """A number as text with its interval, or why there is none. `hint`: what ours was measured on."""

    text: str = ""
    interval: str = ""
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class PaperLine:
    """A row: the paper's (`arm` None) or that of one of our arms, by number."""

    label: str
    arm: int | None
    cells: tuple[PaperCell, ...]


@dataclass(frozen=True, slots=True)
class PaperTable:
    """One table. `n_ours`: how many of its cells hold a number of ours."""

    number: str
    title: str
    heads: tuple[str, ...]
    lines: tuple[PaperLine, ...]
    notes: tuple[str, ...]

    @property
    def n_ours(self) -> int:
        """Measured cells of our arms."""
        return sum(bool(cell.hint) for line in self.lines if line.arm is not None for cell in line.cells)


@dataclass(frozen=True, slots=True)
class Keywords:
    """The counts of one keywords.json under a name."""

    name: str
    counts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Column:
    """`printed`: a row of the paper -> cell; `measured`: an arm -> cell."""

    head: str
    printed: Callable[[Mapping[str, Any]], PaperCell]
    measured: Callable[[Arm], PaperCell]


def paper_tables(arms: Sequence[Arm], keywords: Sequence[Keywords] = ()) -> list[PaperTable]:
    """All tables, in the paper's order."""
    return [
        _table_2(arms),
        _table_4(arms),
        _table_5(arms),
        _table_6(arms),
        _table_7(arms),
        _table_8(arms),
        _table_9(arms),
        _table_10(arms),
        *_table_11(arms),
        _table_12(arms),
        _table_13(arms),
        _table_14(keywords),
    ]


def read_keywords_file(name: str, path: Path) -> Keywords:
    """The output of `locvlm data keywords`: the file, or the folder it lies in. Raises DataError."""
    file = path / "keywords.json" if path.is_dir() else path
    counts = read_json(file)
    try:
        for phrase in counts["phrases"].values():
            int(phrase["conversations"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"reading {file}: these are no phrase counts; write them with `locvlm data keywords`") from None
    return Keywords(name, counts)


def _table_2(arms: Sequence[Arm]) -> PaperTable:
    row = _Rows("2", "how it writes places", lambda arm: facts_of(arm).get("representation") in ("nfp", "ivb", "diga"))
    names = _fact_column("Coordinates", lambda row: str(row["name"]), "representation", str.upper)
    return _ablation("2", "table_2", _rows("table_2"), [names], arms, row)


def _table_4(arms: Sequence[Arm]) -> PaperTable:
    heads = [("all_lr", "All L/R"), ("left", "Left"), ("right", "Right")]
    heads += [("all_ab", "All A/B"), ("above", "Above"), ("below", "Below")]
    return _spatial("4", "table_4", heads, arms)


def _table_13(arms: Sequence[Arm]) -> PaperTable:
    return _spatial("13", "table_13", (("all", "All"), ("left", "Left"), ("right", "Right")), arms)


def _spatial(number: str, table: str, heads: Sequence[tuple[str, str]], arms: Sequence[Arm]) -> PaperTable:
    blocks = []
    for icl in (False, True):
        task = "coco-spatial-icl" if icl else "coco-spatial"
        columns = [_Column(head, _value(key), _spatial_cell(task, key)) for key, head in heads]
        blocks.append(("in-context" if icl else "direct", _rows(table, icl=icl), columns))
    return _blocks(number, table, blocks, arms)


def _spatial_cell(task: str, key: str) -> Callable[[Arm], PaperCell]:
    vertical = key in ("all_ab", "above", "below")
    axis, other = ("accuracy_above", "accuracy_left")[:: 1 if vertical else -1]
    figure = "accuracy" if key.startswith("all") else f"accuracy_{key}"
    side = "above and below" if vertical else "left and right"
    kind = "coco-spatial-vertical" if vertical else "coco-spatial"

    def wanted(result: Result) -> bool:
        figures = result.metrics["figures"]
        # the accuracy of a set of both axes is neither column's
        return axis in figures and not (figure == "accuracy" and other in figures)

    return lambda arm: _measured(arm, kind, task, figure, wanted, f"no metrics given for {side}")


def _table_5(arms: Sequence[Arm]) -> PaperTable:
    columns = [
        _text_column("LLM", "llm"),
        _text_column("Pixels", "visual_side", lambda arm: _side(arm)),
        _text_column("Zero-shot", "zero_shot"),
        _Column("GQA test-dev", _value("gqa_testdev"), lambda arm: _measured(arm, "gqa-testdev", "gqa", "accuracy")),
        _Column("VQAv2 val", _value("vqa_v"), lambda arm: _measured(arm, "vqav2-val", "vqav2", "accuracy")),
        _Column(
            "VQAv2 test", _value("vqa_t"), lambda arm: PaperCell(reason=arm.missing.get("vqav2-test-dev", _SERVER))
        ),
    ]
    return _table("5", "table_5", _rows("table_5"), columns, arms)


def _table_6(arms: Sequence[Arm]) -> PaperTable:
    columns = [_text_column("Zero-shot", "zero_shot")]
    for task, key in _VIDEO_TASKS.items():
        columns += _judged(arms, task, TITLES[task], key)
    return _table("6", "table_6", _rows("table_6"), columns, arms)


def _table_7(arms: Sequence[Arm]) -> PaperTable:
    columns = [
        _text_column("Video training", "video_level_training", _video_training),
        _text_column("Frames", "frames", lambda arm: str(facts_of(arm).get("frames", ""))),
        *_judged(arms, "activitynet-qa", "Accuracy", "acc"),
    ]
    return _table("7", "table_7", _rows("table_7"), columns, arms)


def _table_8(arms: Sequence[Arm]) -> PaperTable:
    def kind(result: Result) -> str:
        dataset = result.key[1]
        return next((name for name in ("hal-act", "hal-ade") if name in dataset), "hal-coco")

    def cell(name: str) -> Callable[[Arm], PaperCell]:
        return lambda arm: _measured(arm, name, "presence", "accuracy", lambda result: kind(result) == name)

    names = (("Hal-COCO", "hal_coco"), ("Hal-ADE", "hal_ade"), ("Hal-Act", "hal_act"))
    columns = [_Column(head, _value(key), cell(head.lower())) for head, key in names]
    return _table("8", "table_8", _rows("table_8"), columns, arms)


def _table_9(arms: Sequence[Arm]) -> PaperTable:
    heads = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1", "yes_ratio": "Yes"}

    def cell(split: str, figure: str) -> Callable[[Arm], PaperCell]:
        return lambda arm: _measured(arm, f"pope-{split}", "pope", figure, lambda result: split in result.key[1])

    blocks = []
    for split in POPE_SPLITS:
        columns = [_Column(head, _value(key), cell(split, key)) for key, head in heads.items()]
        blocks.append((split, _rows("table_9", split=split), columns))
    table = _blocks("9", "table_9", blocks, arms)
    note = "Mean F1 is that of the three splits, the single number that LLaVA's papers give; the paper's is computed "
    return replace(table, lines=(*table.lines, *_mean_f1(table)), notes=(*table.notes, note + "from its printed F1."))


def _mean_f1(table: PaperTable) -> list[PaperLine]:
    """One row a model: the mean over the splits of the F1 that the rows above show."""
    where = table.heads.index("F1")
    of: dict[tuple[str, int | None], list[PaperCell]] = {}
    for line in table.lines:
        of.setdefault((line.label.partition(", ")[2], line.arm), []).append(line.cells[where])
    lines = []
    for (model, arm), cells in of.items():
        found = [float(cell.text) for cell in cells if cell.text]
        if len(found) == len(POPE_SPLITS):
            mean = PaperCell(f"{sum(found) / len(found):.1f}", hint="" if arm is None else "mean of the three splits")
        else:
            mean = PaperCell(reason=f"{len(found)} of 3 splits given")
        empty = PaperCell(reason="only F1 is averaged")
        lines.append(
            PaperLine(f"mean, {model}", arm, tuple(mean if n == where else empty for n in range(len(table.heads))))
        )
    return lines


def _table_10(arms: Sequence[Arm]) -> PaperTable:
    columns = [_text_column("Zero-shot", "zero_shot")]
    heads = ("RefCOCO testB", "RefCOCO+ testB", "RefCOCOg val", "RefCOCOg test")
    columns += [_Column(head, _value(key), _region(key)) for head, key in zip(heads, REGION_SPLITS, strict=True)]
    return _table("10", "table_10", _rows("table_10"), columns, arms)


def _region(column: str) -> Callable[[Arm], PaperCell]:
    names = REGION_SPLITS[column]
    return lambda arm: _measured(arm, names[0], "region-description", "meteor", lambda result: result.key[1] in names)


def _table_11(arms: Sequence[Arm]) -> list[PaperTable]:
    switched = _Rows("11-objectives", "its objectives", lambda arm: facts_of(arm).keys() >= OBJECTIVES.keys())
    placed = _Rows(
        "11-data",
        "whether it saw pseudo-data (say so with --label)",
        lambda arm: facts_of(arm).keys() >= {"location", "pseudo_data"},
    )
    choices = [
        _fact_column("Location", lambda row: str(row["location"]), "location"),
        _fact_column("Pseudo-data", lambda row: _MARKS[row["pseudo_data"]], "pseudo_data"),
    ]
    data = paper()["tables"]["table_11"]
    first = _ablation("11", "table_11", data["objectives"], _switches(""), arms, switched)
    second = _ablation("11", "table_11", data["location_and_pseudo_data"], choices, arms, placed)
    return [
        replace(first, title="Ablation of the objectives"),
        replace(second, title="Ablation of location type and pseudo-data"),
    ]


def _table_12(arms: Sequence[Arm]) -> PaperTable:
    wanted = {f"video_{name}" for name in OBJECTIVES}
    row = _Rows("12", "its video objectives", lambda arm: facts_of(arm).keys() >= wanted)
    return _ablation("12", "table_12", _rows("table_12"), _switches("video_"), arms, row, is_image=False)


def _switches(prefix: str) -> list[_Column]:
    heads = (("LocPred", "locpred"), ("NegPred", "negpred"), ("RevLoc", "revloc"))
    return [_fact_column(head, lambda row, key=key: _MARKS[row[key]], f"{prefix}{key}") for head, key in heads]  # type: ignore[misc]


def _table_14(keywords: Sequence[Keywords]) -> PaperTable:
    heads = ("Left", "% of conv.", "Right", "% of conv.")
    lines = []
    for row in _rows("table_14"):
        keys = ("left_count", "left_percent", "right_count", "right_percent")
        label = row["template"].format("<side>")
        lines.append(PaperLine(f"{label}, paper", None, tuple(_value(key)(row) for key in keys)))
        for number, counted in enumerate(keywords):
            cells: list[PaperCell] = []
            for word in ("left", "right"):
                found = counted.counts["phrases"].get(row["template"].format(word), {})
                of = f"{counted.counts.get('conversations', 0)} conversations"
                for key, form in (("conversations", "{}"), ("percent_of_conversations", "{:.2f}")):
                    value = found.get(key)
                    cells.append(PaperCell(reason="not counted") if value is None else _counted(form.format(value), of))
            lines.append(PaperLine(f"{label}, {counted.name}", number, tuple(cells)))
    notes = list(paper()["tables"]["table_14"].get("notes", ()))
    if not keywords:
        notes.append("No counts of ours: none were given (locvlm data keywords, then --keywords).")
    return PaperTable("14", paper()["tables"]["table_14"]["title"], heads, tuple(lines), tuple(notes))


def _counted(text: str, hint: str) -> PaperCell:
    return PaperCell(text, hint=hint)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which arms are rows of an ablation: those that may be (`table`) and of which is known what the rows differ in
    (`is_told`); `what` that is."""

    table: str
    what: str
    is_told: Callable[[Arm], bool]


def _ablation(
    number: str,
    table: str,
    rows: Sequence[Mapping[str, Any]],
    first: Sequence[_Column],
    arms: Sequence[Arm],
    ours: _Rows,
    *,
    is_image: bool = True,
) -> PaperTable:
    """GQA and RefCOCOg test (not of a table about videos alone) and ActivityNet-QA of the runs that say what they
    are."""
    images = [
        _Column("GQA", _value("gqa"), lambda arm: _measured(arm, "gqa-testdev", "gqa", "accuracy")),
        _Column("RefCOCOg test", _value("rd"), _region("refcocog_test")),
    ]
    meant = [arm for arm in arms if is_row_of(arm, ours.table)]
    told = [arm for arm in meant if ours.is_told(arm)]
    columns = [*first, *(images if is_image else ()), *_judged(arms, "activitynet-qa", "A-QA", "a_qa")]
    made = _table(number, table, rows, columns, told, numbers=_numbers(arms))
    unknown = ", ".join(arm.name for arm in meant if arm not in told)
    note = [f"Not in this table, because nothing says {ours.what}: {unknown}."] if unknown else []
    return replace(made, notes=(*made.notes, *note))


def _numbers(arms: Sequence[Arm]) -> dict[str, int]:
    return {arm.name: number for number, arm in enumerate(arms)}


def _table(
    number: str,
    table: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[_Column],
    arms: Sequence[Arm],
    numbers: Mapping[str, int] | None = None,
) -> PaperTable:
    return _blocks(number, table, [("", rows, columns)], arms, numbers)


def _blocks(
    number: str,
    table: str,
    blocks: Iterable[tuple[str, Sequence[Mapping[str, Any]], Sequence[_Column]]],
    arms: Sequence[Arm],
    numbers: Mapping[str, int] | None = None,
) -> PaperTable:
    """Blocks of rows under the same heads, each the paper's rows and then ours; a block's name begins its labels."""
    data = paper()["tables"][table]
    lines: list[PaperLine] = []
    heads: tuple[str, ...] = ()
    numbers = numbers or _numbers(arms)
    for name, rows, columns in blocks:
        heads = tuple(column.head for column in columns)
        start = f"{name}, " if name else ""
        lines += [PaperLine(start + _label(row), None, tuple(c.printed(row) for c in columns)) for row in rows]
        lines += [
            PaperLine(start + arm.name, numbers[arm.name], tuple(c.measured(arm) for c in columns)) for arm in arms
        ]
    measured = sorted({cell.hint for line in lines for cell in line.cells if cell.hint})
    notes = (*map(str, data.get("notes", ())), *([f"Ours: {'; '.join(measured)}."] if measured else ()))
    return PaperTable(number, str(data["title"]), heads, tuple(lines), notes)


def _label(row: Mapping[str, Any]) -> str:
    name = str(row.get("name") or row.get("model") or "paper")
    return "LocVLM-B" if name == "Ours" else name


def _rows(table: str, **wanted: Any) -> list[Mapping[str, Any]]:
    rows = paper()["tables"][table]["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _value(key: str) -> Callable[[Mapping[str, Any]], PaperCell]:
    def printed(row: Mapping[str, Any]) -> PaperCell:
        value = row.get(key)
        return PaperCell(reason=_NOT_PRINTED) if value is None else PaperCell(str(value))

    return printed


def _text_column(head: str, key: str, ours: Callable[[Arm], str] | None = None) -> _Column:
    """A column that describes a model; `key`: of the paper's rows."""

    def printed(row: Mapping[str, Any]) -> PaperCell:
        value = row.get(key)
        text = _MARKS[value] if isinstance(value, bool) else str(value or "")
        return PaperCell(text) if text else PaperCell(reason=_NOT_PRINTED)

    def measured(arm: Arm) -> PaperCell:
        text = ours(arm) if ours else ""
        return PaperCell(text) if text else PaperCell(reason="not known")

    return _Column(head, printed, measured)


def _fact_column(
    head: str, printed: Callable[[Mapping[str, Any]], str], fact: str, form: Callable[[str], str] = str
) -> _Column:
    def measured(arm: Arm) -> PaperCell:
        value = facts_of(arm)[fact]
        return PaperCell(_MARKS[value] if isinstance(value, bool) else form(value))

    return _Column(head, lambda row: PaperCell(printed(row)), measured)


def _judged(arms: Sequence[Arm], task: str, title: str, key: str) -> list[_Column]:
    """The paper's column, and one for each judge of ours."""
    judges = sorted({result.key[2] for arm in arms for result in arm.of(task)})

    def elsewhere(arm: Arm) -> PaperCell:
        return PaperCell(reason=_OTHER_JUDGE if arm.of(task) else arm.missing.get(task, _NEEDS_VIDEO))

    def by(judge: str) -> Callable[[Arm], PaperCell]:
        return lambda arm: _measured(
            arm, task, task, "accuracy", lambda result: result.key[2] == judge, _OTHER_JUDGE, _NEEDS_VIDEO
        )

    ours = [
        _Column(f"{title}, judge {judge or 'not named'}", lambda _: PaperCell(reason=_OTHER_JUDGE), by(judge))
        for judge in judges
    ]
    return [_Column(f"{title}, judge {PAPER_JUDGE}", _value(key), elsewhere), *ours]


def _measured(
    arm: Arm,
    benchmark: str,
    task: str,
    figure: str,
    wanted: Callable[[Result], bool] = lambda result: True,
    other: str = "",
    absent: str = _NOT_GIVEN,
) -> PaperCell:
    """The figure of the first result of the task that is `wanted`. Where there is none the reason is what the arm says
    about the benchmark, else `absent` where it has none of the task, and `other` where it has."""
    results = arm.of(task)
    chosen = next(filter(wanted, results), None)
    if chosen is None and benchmark in arm.missing:
        return PaperCell(reason=arm.missing[benchmark])
    if not results:
        return PaperCell(reason=absent)
    if chosen is None:
        return PaperCell(reason=other or f"no metrics given for this set, only for {results[0].key[1] or 'another'}")
    values = chosen.metrics["figures"].get(figure)
    if values is None:
        why = chosen.metrics.get("not_computed", {}).get(figure)
        return PaperCell(reason=f"not computed: {str(why).partition(';')[0]}" if why else f"its metrics lack {figure}")
    found = Figure(**values)
    if not found.n:
        return PaperCell(reason="no question counts for it")
    between = "" if found.low is None or found.high is None else f"{100 * found.low:.1f} to {100 * found.high:.1f}"
    hint = f"{chosen.metrics['n']} questions of {chosen.key[1] or 'unnamed data'}"
    return PaperCell(f"{100 * found.value:.1f}", between, hint=hint)


def _video_training(arm: Arm) -> str:
    frames = facts_of(arm).get("frames")
    return "" if frames is None else _MARKS[frames != "1"]


def _side(arm: Arm) -> str:
    geometry = arm.config.get("geometry")
    return str(geometry.get("side", "")) if isinstance(geometry, Mapping) else ""
