"""The numbers of two or more models side by side, with the paper's beside them where it printed one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from locvlm.errors import DataError
from locvlm.evaluation.metrics import Difference, Figure, paired_difference, refuse_other_judges
from locvlm.evaluation.tasks import TASKS

PAPER_NOTE = "The paper's models have 7 billion parameters and were measured on COCO photographs."
MIN_IMAGES = 10  # below this a bootstrap over images says little

TITLES = {
    "coco-spatial": "Left or right, asked directly",
    "coco-spatial-icl": "Left or right, after two solved examples",
    "presence": "Is it in the image?",
    "pope": "Is it in the image? (POPE)",
    "localization": "Where is it?",
    "region-description": "What is at this place?",
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "activitynet-qa": "ActivityNet-QA",
    "msrvtt-qa": "MSRVTT-QA",
    "msvd-qa": "MSVD-QA",
    "tgif-qa": "TGIF-QA",
}

LABELS = {
    "accuracy": "Accuracy",
    "strict": "Accuracy, exactly one of the two words",
    "accuracy_left": "Accuracy where the answer is left",
    "accuracy_right": "Accuracy where the answer is right",
    "accuracy_above": "Accuracy where the answer is above",
    "accuracy_below": "Accuracy where the answer is below",
    "opposite_reading": "Accuracy under the opposite reading",
    "answered": "Answers that name a side",
    "precision": "Precision of yes",
    "recall": "Recall of yes",
    "f1": "F1 of yes",
    "yes_ratio": "Answered yes",
    "unparsable_rate": "Neither yes nor no",
    "mean_iou": "Mean IoU",
    "accuracy_iou50": "IoU at least 0.5",
    "centre_in_box": "Centre inside the true box",
    "parse_failure_rate": "No readable place in the answer",
    "refusal_rate": "Called absent though present",
    "neg_precision": "Absent: precision",
    "neg_recall": "Absent: recall",
    "neg_f1": "Absent: F1",
    "names_category": "Names the right category",
    "names_nothing": "Names no category",
    "meteor": "METEOR",
    "meteor_stripped": "METEOR without the template's beginning",
    "accuracy_always_normalised": "Accuracy, always normalised",
    "accuracy_yes_no": "Accuracy of yes/no questions",
    "accuracy_number": "Accuracy of number questions",
    "accuracy_other": "Accuracy of other questions",
    "consistency": "Right about the image and its mirror image",
    "flips": "Answers that turn with the image",
    "contains": "Answer contains the reference",
    "accuracy_of_judged": "Accuracy where the judge was understood",
    "judge_score": "Mean score of the judge, of 5",
}

REGION_SPLITS = {
    "refcoco_testB": ("refcoco-testB", "refcoco_testB"),
    "refcoco_plus_testB": ("refcoco+-testB", "refcoco+_testB"),
    "refcocog_val": ("refcocog-val", "refcocog_val"),
    "refcocog_test": ("refcocog-test", "refcocog_test"),
}  # column of Table 10 -> names of the data

_LESS_IS_BETTER = {"parse_failure_rate", "refusal_rate", "unparsable_rate", "names_nothing"}
# task -> column of Table 5
_SHORT_ANSWERS = {"vqav2": ("vqa_v", "Table 5, VQAv2 val"), "gqa": ("gqa_testdev", "Table 5, GQA test-dev")}
_NEITHER = {"yes_ratio", "opposite_reading", "answered"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One model's figure, or why there is none, in full and in a few words."""

    figure: Figure | None
    reason: str = ""

    @property
    def short(self) -> str:
        """The reason without its parenthesis."""
        return self.reason.partition(" (")[0]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The first model against another one. `verdict`: shown, not shown, contrary, or "" where no side is better."""

    against: str
    difference: Difference | None
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True)
class PaperNumbers:
    """The paper's baseline (LLaVA) and LocVLM-B as fractions; None and a reason where it printed none."""

    baseline: float | None
    ours: float | None
    note: str


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one task."""

    name: str
    label: str
    cells: tuple[Cell, ...]
    floor: float | None
    floor_answer: str
    comparisons: tuple[Comparison, ...]
    paper: PaperNumbers
    less_is_better: bool


@dataclass(frozen=True, slots=True)
class TaskTable:
    """One task: its rows, the most telling first. `paper_note`: why the paper has no number for any of them, or ""."""

    task: str
    title: str
    rows: tuple[Row, ...]
    n: int
    n_images: int
    dataset: str
    notes: tuple[str, ...]
    paper_note: str

    @property
    def media(self) -> str:
        """What the questions are about."""
        return "videos" if self.task.endswith("-qa") else "images"


def task_table(task: str, names: Sequence[str], metrics: Sequence[Mapping[str, Any] | str]) -> TaskTable:
    """The table of one task. `metrics`: for each named arm the contents of its metrics.json, or why there are none."""
    present = [entry for entry in metrics if isinstance(entry, Mapping)]
    refuse_other_judges(present, f"putting figures of {task} side by side")
    figure_names = list(dict.fromkeys(name for entry in present for name in entry["figures"]))
    primary = present[0]["primary"] if present else TASKS[task].primary
    figure_names.sort(key=lambda name: name != primary)
    rows = tuple(_row(task, name, names, metrics) for name in figure_names)
    first: Mapping[str, Any] = present[0] if present else {"n": 0, "n_images": 0, "dataset": ""}
    notes = [
        f"{arm}: {entry['n_failures']} questions without a usable answer count as wrong"
        for arm, entry in zip(names, metrics, strict=True)
        if isinstance(entry, Mapping) and entry.get("n_failures")
    ]
    cells = zip(names, rows[0].cells, strict=True) if rows else ()
    below = [arm for arm, cell in cells if cell.figure is not None and _below_floor(cell.figure)]
    if below:
        verbs = ("lies", "it scores", "it may") if len(below) == 1 else ("lie", "they score", "they may")
        notes.append(
            f"{', '.join(below)} {verbs[0]} below the floor: {verbs[1]} less than one fixed answer would, so "
            f"{verbs[2]} not answer in the form of the question, and a lead over that says little"
        )
    notes += [f"{arm}: {entry}" for arm, entry in zip(names, metrics, strict=True) if isinstance(entry, str)]
    title = TITLES[task]
    if "accuracy_above" in figure_names and "accuracy_left" not in figure_names:
        title = title.replace("Left or right", "Above or below")
    reasons = {row.paper.note for row in rows}
    paper_note = reasons.pop() if len(reasons) == 1 and all(row.paper.ours is None for row in rows) else ""
    return TaskTable(
        task, title, rows, int(first["n"]), int(first["n_images"]), str(first["dataset"]), tuple(notes), paper_note
    )


def paper_numbers(task: str, figure: str, figures: Sequence[str], dataset: str) -> PaperNumbers:
    """What the paper printed for a figure. `figures`: all figures of the task, which tell the axis of a spatial set."""
    if task in ("coco-spatial", "coco-spatial-icl"):
        return _spatial_numbers(figure, task.endswith("icl"), figures)
    if task == "presence":
        if figure != "accuracy":
            return PaperNumbers(None, None, "the paper prints accuracy only")
        if "hal-act" in dataset:
            return _from_table("table_8", {}, "hal_act", ("Video-ChatGPT", "LocVLM-Vid-B"), "Table 8, Hal-Act")
        column, note = ("hal_ade", "Hal-ADE") if "hal-ade" in dataset else ("hal_coco", "Hal-COCO")
        return _from_table("table_8", {}, column, ("LLaVA", "LocVLM-B"), f"Table 8, {note}")
    if task == "pope":
        split = next((name for name in ("random", "popular", "adversarial") if name in dataset), None)
        if split is None:
            return PaperNumbers(None, None, "the name of the data does not tell the POPE split")
        if figure == "unparsable_rate":
            return PaperNumbers(None, None, "the paper does not report this")
        return _from_table("table_9", {"split": split}, figure, ("LLaVA", "Ours"), f"Table 9, {split}")
    if task == "localization":
        return PaperNumbers(None, None, "the paper shows pictures (Figure 5) and no number")
    if task == "region-description":
        return _region_numbers(figure, dataset)
    if task in _SHORT_ANSWERS and figure == "accuracy":
        column, where = _SHORT_ANSWERS[task]
        return _from_table("table_5", {"zero_shot": True}, column, ("LLaVA-v1", "LocVLM-B"), where)
    if task in _SHORT_ANSWERS:
        return PaperNumbers(None, None, "the paper does not report this")
    return PaperNumbers(None, None, "the paper's judge was GPT-3.5 of 2023 (Table 6), another measure")


def verdict(difference: Difference, figure: str, first: Figure, n_images: int) -> tuple[str, str]:
    """A word and its reason. "shown" needs an interval of the difference above zero and a first model above its floor.

    "contrary": the interval lies on the other side of zero. "not shown": everything else. No word where neither
    direction is better.
    """
    if figure in _NEITHER:
        return "", "neither more nor less is better"
    sign = -1 if figure in _LESS_IS_BETTER else 1
    low, high = sorted((sign * difference.low, sign * difference.high))
    if high < 0:
        return "contrary", "the interval of the difference lies on the other side of zero"
    if low <= 0:
        return "not shown", "the interval of the difference holds zero"
    if n_images < MIN_IMAGES:
        return "not shown", f"fewer than {MIN_IMAGES} images"
    # a recall has the floor 1 (always yes), which no model can exceed
    if sign > 0 and first.floor is not None and first.low is not None and first.low <= first.floor < 1:
        return "not shown", f"not above its floor ({first.floor_answer})"
    return "shown", "the interval of the difference lies above zero"


def _below_floor(figure: Figure) -> bool:
    return figure.floor is not None and figure.high is not None and figure.high < figure.floor


def _row(task: str, figure: str, names: Sequence[str], metrics: Sequence[Mapping[str, Any] | str]) -> Row:
    cells = tuple(_cell(entry, figure) for entry in metrics)
    entry = next(entry for entry in metrics if isinstance(entry, Mapping) and figure in entry["figures"])
    comparisons = tuple(
        _comparison(figure, names[other], metrics[0], metrics[other], cells[0]) for other in range(1, len(names))
    )
    return Row(
        figure,
        LABELS.get(figure) or figure.replace("accuracy_type_", "accuracy, type ").replace("_", " ").capitalize(),
        cells,
        entry["figures"][figure]["floor"],
        entry["figures"][figure]["floor_answer"],
        comparisons,
        paper_numbers(task, figure, list(entry["figures"]), str(entry["dataset"])),
        figure in _LESS_IS_BETTER,
    )


def _cell(entry: Mapping[str, Any] | str, figure: str) -> Cell:
    if isinstance(entry, str):
        return Cell(None, entry)
    if figure not in entry["figures"]:
        return Cell(None, "this model's answers do not have this figure")
    values = Figure(**entry["figures"][figure])
    return Cell(values) if values.n else Cell(None, "no question counts for it")


def _comparison(
    figure: str, against: str, first: Mapping[str, Any] | str, second: Mapping[str, Any] | str, cell: Cell
) -> Comparison:
    if isinstance(first, str) or isinstance(second, str):
        return Comparison(against, None, "", "one of the two was not run")
    if cell.figure is None or not second["figures"].get(figure, {}).get("n"):
        return Comparison(against, None, "", "one of the two has no such figure")
    try:
        difference = paired_difference(first, second, figure)
    except DataError:  # one pair that cannot be compared must not cost the whole report
        return Comparison(against, None, "", "not the same questions")
    word, reason = verdict(difference, figure, cell.figure, int(first["n_images"]))
    return Comparison(against, difference, word, reason)


def _spatial_numbers(figure: str, icl: bool, figures: Sequence[str]) -> PaperNumbers:
    horizontal, vertical = "accuracy_left" in figures, "accuracy_above" in figures
    columns = {f"accuracy_{word}": word for word in ("left", "right", "above", "below")}
    if horizontal != vertical:
        columns["accuracy"] = "all_lr" if horizontal else "all_ab"
    if figure not in columns:
        return PaperNumbers(None, None, "the paper does not report this")
    where = f"Table 4, {'ICL' if icl else 'direct'}"
    return _from_table("table_4", {"icl": icl}, columns[figure], ("LLaVA", "Ours"), where)


def _region_numbers(figure: str, dataset: str) -> PaperNumbers:
    if figure != "meteor":
        return PaperNumbers(None, None, "the paper reports METEOR (Table 10), another measure")
    column = next((column for column, names in REGION_SPLITS.items() if dataset in names), None)
    if column is None:
        return PaperNumbers(None, None, "the name of the data does not tell the split (Table 10)")
    return _from_table("table_10", {"zero_shot": True}, column, ("LLaVA", "LocVLM-B"), f"Table 10, zero-shot, {column}")


def _from_table(table: str, row: Mapping[str, Any], column: str, names: tuple[str, str], note: str) -> PaperNumbers:
    wanted = {"name", "model"}
    values: dict[str, float | None] = {}
    for entry in paper()["tables"][table]["rows"]:
        if all(entry.get(key) == value for key, value in row.items()):
            name = next(str(entry[key]) for key in wanted if key in entry)
            values[name] = entry.get(column)
    baseline, ours = (values.get(name) for name in names)
    return PaperNumbers(None if baseline is None else baseline / 100, None if ours is None else ours / 100, note)


@cache
def paper() -> Any:
    """All numbers that the paper printed (assets/paper_tables.yaml)."""
    text = files("locvlm").joinpath("assets/paper_tables.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
