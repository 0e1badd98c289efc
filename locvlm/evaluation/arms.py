"""The models that a report is about: their metrics.json files, their answers, and what is known of how they were made.

An arm is one run of one model. Its files lie in a folder, X.metrics.json with X.jsonl and X.meta.json beside it where
they exist, or are named one by one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.questions import read_rows, row_id
from locvlm.evaluation.score import read_meta, read_metrics
from locvlm.evaluation.tasks import TASKS
from locvlm.records import read_json

_ENDING = ".metrics.json"
MISSING = "missing.json"  # beside them: benchmark -> why it was not evaluated

OBJECTIVES = {"locpred": "loc_pred", "negpred": "neg_pred", "revloc": "rev_loc"}  # as the paper's tables name them
_SWITCHES = (*OBJECTIVES, "pseudo_data", *(f"video_{name}" for name in OBJECTIVES))
ABLATIONS = ("2", "11-objectives", "11-data", "12")  # the paper's tables that runs of an ablation are rows of
LABELS = ("representation", "location", "frames", "tables", *_SWITCHES)
_YES, _NO = ("yes", "true", "1", "on"), ("no", "false", "0", "off")


@dataclass(frozen=True, slots=True)
class Result:
    """One task on one data set: the contents of its metrics.json, its prediction rows by id where they are there, and
    what lies beside them (`meta`)."""

    metrics: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]
    meta: Mapping[str, Any]

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.metrics["task"])

    @property
    def key(self) -> tuple[str, str, str]:
        """Task, data set and judge ("" where nobody judges): figures of equal keys may share a column."""
        return self.task, str(self.metrics.get("dataset", "")), str(self.metrics.get("judge") or "")


@dataclass(frozen=True, slots=True)
class Arm:
    """One run: its results in the order of TASKS, and labels that the user gave it (see LABELS). `missing`: benchmark
    -> why there is no result of it, as far as `locvlm evaluate` said."""

    name: str
    results: tuple[Result, ...]
    labels: Mapping[str, str | bool]
    missing: Mapping[str, str] = field(default_factory=dict)

    def of(self, task: str) -> list[Result]:
        """The results of one task."""
        return [result for result in self.results if result.task == task]

    @property
    def config(self) -> Mapping[str, Any]:
        """The config that the model was made with, as its results carry it; empty where none does."""
        for result in self.results:
            found = result.metrics.get("config") or result.meta.get("config")
            if isinstance(found, Mapping):
                return found
        return {}

    @property
    def receipt(self) -> Mapping[str, Any]:
        """The receipt of the model's training; empty where nothing says."""
        for result in self.results:
            model = result.metrics.get("model") or result.meta.get("model") or {}
            if isinstance(model, Mapping) and isinstance(model.get("receipt"), Mapping):
                return dict(model["receipt"])
        return {}


def read_arm(name: str, folder: Path) -> Arm:
    """Every *.metrics.json of a folder, with the answers beside it, and what missing.json says is not there.

    Raises DataError for a missing folder, a folder without any metrics, or a damaged file.
    """
    if not folder.is_dir():
        raise DataError(f"reporting on {name}: there is no folder {folder}")
    paths = sorted(folder.glob(f"*{_ENDING}"))
    if not paths:
        names = ", ".join(f"{task}{_ENDING}" for task in TASKS)
        raise DataError(
            f"reporting on {name}: the folder {folder} holds no file *{_ENDING} ({names}); run `locvlm score` first"
        )
    arm = _arm(name, [_read_result(name, path) for path in paths])
    return replace(arm, missing=read_missing(folder))


def read_missing(folder: Path) -> dict[str, str]:
    """What missing.json says, benchmark -> why it was not evaluated; empty when there is none. Raises DataError."""
    path = folder / MISSING
    missing = read_json(path) if path.is_file() else {}
    if not isinstance(missing, dict):
        raise DataError(f"reading {path}: it is no object of reasons; remove it, and `locvlm evaluate` writes it anew")
    return {str(benchmark): str(why) for benchmark, why in missing.items()}


def with_files(name: str, arm: Arm | None, files: Sequence[Path]) -> Arm:
    """An arm with the results of single metrics.json files added; None: an arm of these alone. Raises DataError."""
    found = [_read_result(name, path) for path in files]
    made = _arm(name, [*(arm.results if arm else ()), *found])
    return replace(made, missing=arm.missing if arm else {})


def with_labels(arm: Arm, labels: Mapping[str, str]) -> Arm:
    """The arm with what the user says about it (LABELS), which goes before what its config says. Raises ConfigError."""
    told: dict[str, str | bool] = {}
    for key, value in labels.items():
        if key not in LABELS:
            raise ConfigError(f"labelling {arm.name}: {key!r} is not one of {', '.join(LABELS)}")
        if key in _SWITCHES and value.lower() not in (*_YES, *_NO):
            raise ConfigError(f"labelling {arm.name}: {key} is {value!r}, it must be yes or no")
        if key == "tables" and not set(value.split(",")) <= set(ABLATIONS):
            raise ConfigError(f"labelling {arm.name}: tables is {value!r}, it must be some of {','.join(ABLATIONS)}")
        told[key] = value.lower() in _YES if key in _SWITCHES else value
    return replace(arm, labels=told)


def facts_of(arm: Arm) -> dict[str, str | bool]:
    """What Tables 2, 7, 11 and 12 tell runs apart by (LABELS), as far as it is known: from the labels, else from the
    config. Whether pseudo-captions were trained on is known from a label alone."""
    facts: dict[str, str | bool] = {}
    config = arm.config
    coordinates = config.get("coordinates")
    if isinstance(coordinates, Mapping):
        facts |= {key: str(coordinates[key]) for key in ("representation", "location") if coordinates.get(key)}
    stages = config.get("stages")
    if isinstance(stages, Mapping):
        video = stages.get("video")
        facts |= _objectives(stages.get("instruct"), "", arm.receipt)
        facts |= _objectives(video, "video_", arm.receipt) if video else {}
        frames = (config.get("video") or {}).get("n_frames")
        facts["frames"] = str(frames) if video and frames else "1"
    return facts | dict(arm.labels)


def is_row_of(arm: Arm, table: str) -> bool:
    """Whether the arm may be a row of the ablation `table`: the label `tables` names those of a run that was made for
    some of them; without it the arm may be one of any."""
    return table in str(arm.labels.get("tables", table)).split(",")


def refuse_repeated_arms(names: Iterable[str]) -> None:
    """Raises ConfigError when two arms share a name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"reporting: two arms are called {name!r}; give each its own name")
        seen.add(name)


def _objectives(stage: Any, prefix: str, receipt: Mapping[str, Any]) -> dict[str, str | bool]:
    """Which location objectives a stage's mixture has. A share of a whole source counts for all three where the source
    is called localize...; without a mixture the sources are those of the receipt."""
    if not isinstance(stage, Mapping):
        return {}
    mixture = stage.get("mixture") or []
    if not mixture:
        same_stage = receipt.get("stage") == (prefix.rstrip("_") or "instruct")
        mixture = [{"source": name, "objective": ""} for name in receipt.get("data", ())] if same_stage else []
    if not mixture:
        return {}
    named = {str(entry.get("objective", "")) for entry in mixture}
    whole = any(str(e.get("source", "")).startswith("localize") and not e.get("objective") for e in mixture)
    return {f"{prefix}{name}": whole or objective in named for name, objective in OBJECTIVES.items()}


def _arm(name: str, results: Sequence[Result]) -> Arm:
    seen: set[tuple[str, str, str]] = set()
    for result in results:
        if result.key in seen:
            task, dataset, judge = result.key
            by = f", judged by {judge}," if judge else ""
            raise DataError(
                f"reporting on {name}: two of its metrics files are of {task} on {dataset or 'unnamed data'}{by}; "
                "give the second one to an arm of its own"
            )
        seen.add(result.key)
    order = list(TASKS)
    return Arm(name, tuple(sorted(results, key=lambda result: (order.index(result.task), result.key))), {})


def _read_result(name: str, path: Path) -> Result:
    metrics = read_metrics(path)
    stem = path.name.removesuffix(_ENDING)
    if metrics["task"] not in TASKS:
        raise DataError(
            f"reporting on {name}: {path} holds scores of the task {metrics['task']!r}, which is not known here; it "
            f"must be one of {', '.join(TASKS)}"
        )
    if stem in TASKS and metrics["task"] != stem:
        raise DataError(f"reporting on {name}: {path} holds scores of the task {metrics['task']!r}")
    answers = path.with_name(f"{stem}.jsonl")
    if stem == path.name or not answers.is_file():
        return Result(metrics, {}, {})
    return Result(metrics, {row_id(row): row for row in read_rows(answers)}, read_meta(answers))
