"""What a task is, and the tasks there are. Whether an answer is right is decided in the task's own file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from locvlm.config import CoordinateConfig, ExperimentConfig, FamilyConfig, GeometryConfig
from locvlm.coordinates import LocationFormat, make_location_format
from locvlm.data.conversations import open_conversations
from locvlm.data.instruct import Renderer, turn_alone
from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.evaluation import gqa, localization, presence, region, spatial, video_qa, vqa
from locvlm.evaluation.judges import Judge
from locvlm.evaluation.questions import (
    CONVERSATIONS_FILE,
    QUESTIONS_FILE,
    Question,
    QuestionSet,
    Rows,
    Scorer,
    Source,
    manifest_of,
    places_of,
    plain_rows,
    refuse_repeated,
    row_id,
)
from locvlm.evaluation.wording import Wording
from locvlm.geometry import make_geometry
from locvlm.prompts import SHORT_ANSWER_SUFFIX
from locvlm.records import Conversation, Turn

Render = Callable[[Conversation], list[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of question and how it is scored.

    `row`: a row of a questions file -> Question (KeyError names a missing key, ValueError says what is wrong).
    `turn`: id, conversation and turn of a Localize-Instruct set -> Question without prompt, or None where the task does
    not ask that turn; without `turn` the task cannot read such folders. `scorer`: the rules for one question set.
    `primary`: the figure that stands for the task (the first of the scorer's where the set does not have it).
    `rows`: the files of a set -> rows. `suffix`: what every prompt ends with. `ask`: the prompt of a question that
    comes without one. `judged`: the scorer under a judge of the user's choice, where the task takes one. `result`: a
    record of the benchmark's official result file from an id, an answer, and whether that answer comes from such a
    file already.
    """

    name: str
    row_task: str
    row: Callable[[Mapping[str, Any]], Question]
    scorer: Callable[[QuestionSet], Scorer]
    primary: str
    turn: Callable[[str, Conversation, Turn], Question | None] | None = None
    rows: Callable[[Source], Rows] = plain_rows
    suffix: str = ""
    ask: Callable[[Question, LocationFormat], str] | None = None
    judged: Callable[[QuestionSet, Judge | None], Scorer] | None = None
    result: Callable[[str, str, bool], Mapping[str, Any]] | None = None

    @property
    def writes_places(self) -> bool:
        """Whether prompts or answers hold coordinates, so that data and checkpoint have to agree on their form."""
        return self.turn is not None


def _video_task(name: str, rows: Callable[[Source], Rows]) -> Task:
    scorer = video_qa.VideoQaScorer
    return Task(name, name, video_qa.question, scorer, "accuracy", rows=rows, judged=scorer)


TASKS: dict[str, Task] = {
    "coco-spatial": Task("coco-spatial", "coco-spatial", spatial.direct_question, spatial.SpatialScorer, "accuracy"),
    "coco-spatial-icl": Task(
        "coco-spatial-icl", "coco-spatial", spatial.icl_question, spatial.SpatialScorer, "accuracy"
    ),
    "presence": Task("presence", "presence", presence.question, presence.PresenceScorer, "accuracy"),
    "pope": Task("pope", "presence", presence.question, presence.PresenceScorer, "f1"),
    "localization": Task(
        "localization",
        "localization",
        localization.question,
        localization.LocalizationScorer,
        "mean_iou",
        localization.turn_question,
    ),
    "region-description": Task(
        "region-description",
        "region-description",
        region.question,
        region.RegionScorer,
        "meteor",
        region.turn_question,
        rows=region.rows,
        ask=region.prompt_of,
    ),
    "vqav2": Task(
        "vqav2",
        "vqav2",
        vqa.question,
        vqa.VqaScorer,
        "accuracy",
        rows=vqa.rows,
        suffix=SHORT_ANSWER_SUFFIX,
        result=vqa.result,
    ),
    "gqa": Task(
        "gqa",
        "gqa",
        gqa.question,
        gqa.GqaScorer,
        "accuracy",
        rows=gqa.rows,
        suffix=SHORT_ANSWER_SUFFIX,
        result=gqa.result,
    ),
    "activitynet-qa": _video_task("activitynet-qa", video_qa.activitynet_rows),
    "msrvtt-qa": _video_task("msrvtt-qa", video_qa.msrvtt_rows),
    "msvd-qa": _video_task("msvd-qa", video_qa.msvd_rows),
    "tgif-qa": _video_task("tgif-qa", video_qa.tgif_rows),
}


def task_named(name: str) -> Task:
    """The task of that name. Raises DataError that lists the names."""
    if name not in TASKS:
        raise DataError(f"looking up the task {name!r}: it must be one of {', '.join(TASKS)}")
    return TASKS[name]


def read_set(
    task: Task,
    path: Path,
    config: ExperimentConfig | FamilyConfig | None = None,
    *,
    annotations: Path | None = None,
    split: str | None = None,
) -> QuestionSet:
    """The questions of a file or folder, with the prompts that a model of `config` is asked. `annotations`: the file of
    the answers where they lie apart; `split`: which one of a file that holds several.

    Without `config` (scoring) the prompts of a Localize-Instruct folder stay empty. Models that others trained are
    asked about places in their own form, whatever the set's own prompts say; a question that cannot be put to them has
    an empty prompt. Raises DataError for a set that cannot be read or is another task's, CheckpointError when it writes
    places in another form than a checkpoint of ours, ConfigError when nothing says how a model writes them.
    """
    if not path.exists():
        raise DataError(f"reading the {task.name} questions {path}: there is no such file or folder")
    manifest = manifest_of(path)
    coordinates, geometry = places_of(path, manifest)
    wording = None
    if task.writes_places and isinstance(config, FamilyConfig):
        wording = _wording(task, path, config, int(manifest.get("seed", 0)))
    elif task.writes_places and isinstance(config, ExperimentConfig):
        _refuse_other_places(path, coordinates, geometry, config)
    file = path
    if path.is_dir():
        file = path / QUESTIONS_FILE if (path / QUESTIONS_FILE).is_file() else path / CONVERSATIONS_FILE
        if not file.is_file():
            raise DataError(
                f"reading the {task.name} questions {path}: the folder holds neither {QUESTIONS_FILE} nor "
                f"{CONVERSATIONS_FILE}; build it with `locvlm data ...`"
            )
    if file.name == CONVERSATIONS_FILE:
        render: Render | None = None if wording is None else wording.turns
        if isinstance(config, ExperimentConfig):
            render = _renderer(config, int(manifest.get("seed", 0)))
        found = _from_conversations(task, file, render)
    else:
        found = _from_rows(task, Source(file, annotations, split))
        if wording is not None:
            found = replace(found, questions=tuple(map(wording.reworded, found.questions)))
        elif isinstance(config, ExperimentConfig):
            found = _with_prompts(task, found, config, path, is_known=coordinates is not None)
    refuse_repeated(file, found.questions)
    if not found.questions:
        raise DataError(f"reading {path}: it holds no question for the task {task.name!r}")
    if task.writes_places and config is not None:
        coordinates, geometry = config.coordinates, config.geometry
    return replace(found, name=set_name(path, manifest, split), coordinates=coordinates, geometry=geometry)


def from_predictions(task: Task, path: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[Question, ...]:
    """The questions that prediction rows carry themselves; a repeated id gives one question.

    Raises DataError when a row has no reference.
    """
    questions: dict[str, Question] = {}
    for number, row in enumerate(rows, 1):
        reference = row.get("reference")
        if reference is None:
            raise DataError(f"scoring {path}: record {number} has no reference; give the questions with --data")
        prompt = row.get("prompt", "")
        whole = {**row, "task": task.row_task, "prompt": prompt, "icl_prompt": prompt, "icl_reference": reference}
        whole |= reference if isinstance(reference, Mapping) else {}
        whole.setdefault("image", row_id(row))  # without an image every question is a cluster of its own
        question = _question(task, whole, f"scoring {path}: record {number}")
        questions.setdefault(question.id, question)
    return tuple(questions.values())


def set_name(path: Path, manifest: Mapping[str, Any], split: str | None = None) -> str:
    """What figures of the set are told apart by: coco-spatial-vertical-released; refcocog-test for the split test of
    refcocog/refs(umd).p."""
    if not manifest.get("dataset"):
        return path.stem if split is None else f"{path.absolute().parent.name}-{split}"
    options = manifest.get("options") or {}
    usual = {"axis": "horizontal", "rules": "paper"}
    return "-".join(
        [manifest["dataset"], *(options[key] for key, value in usual.items() if options.get(key, value) != value)]
    )


def categories_of(questions: Iterable[Question]) -> tuple[str, ...]:
    """Every category that the references of structured questions name, sorted."""
    references = (question.reference for question in questions)
    return tuple(sorted({str(r["category"]) for r in references if isinstance(r, Mapping) and r.get("category")}))


def _refuse_other_places(
    path: Path, coordinates: CoordinateConfig | None, geometry: GeometryConfig | None, config: ExperimentConfig
) -> None:
    pairs: list[tuple[str, BaseModel | None, BaseModel]] = [
        ("coordinates", coordinates, config.coordinates),
        ("geometry", geometry, config.geometry),
    ]
    faults = []
    for section, ours, theirs in pairs:
        if ours is None or ours == theirs:
            continue
        left, right = ours.model_dump(), theirs.model_dump()
        faults += [
            f"  {section}.{key}: data {left[key]!r}, checkpoint {right[key]!r}"
            for key in left
            if left[key] != right[key]
        ]
    if faults:
        lines = "\n".join(faults)
        raise CheckpointError(
            f"asking a model about {path}: the data writes places otherwise than the checkpoint learned to\n{lines}\n"
            "build the data again with the checkpoint's locvlm.yaml (--config), or take a checkpoint that was trained "
            "with the form of the data"
        )


def _wording(task: Task, path: Path, family: FamilyConfig, seed: int) -> Wording:
    if family.coordinates is None:
        raise ConfigError(
            f"asking a {family.family} model the {task.name} questions {path}: nothing says how it writes places; name "
            "a config whose coordinates it is to use with --config"
        )
    return Wording(family, seed)


def _from_rows(task: Task, source: Source) -> QuestionSet:
    found = task.rows(source)
    questions = [
        _question(task, row, f"reading the {task.name} questions {source.path}: record {number}")
        for number, row in enumerate(found.rows, 1)
    ]
    if task.suffix:
        questions = [
            question
            if question.prompt.endswith(task.suffix)
            else replace(question, prompt=f"{question.prompt}{task.suffix}")
            for question in questions
        ]
    return QuestionSet(source.path.stem, tuple(questions), categories_of(questions), skipped=found.skipped)


def _with_prompts(
    task: Task, found: QuestionSet, config: ExperimentConfig, path: Path, *, is_known: bool
) -> QuestionSet:
    """The set with a prompt for every question that came without. `is_known`: whether the set's manifest says how its
    own prompts write places."""
    if task.writes_places and not is_known and any(question.prompt for question in found.questions):
        raise DataError(
            f"reading the {task.name} questions {path}: there is no manifest.json beside them, so nothing says how "
            "their prompts write places; keep questions.jsonl in the folder it was built in"
        )
    if task.ask is None:
        return found
    location = make_location_format(config.coordinates, make_geometry(config.geometry))
    ask = task.ask
    asked = (q if q.prompt else replace(q, prompt=ask(q, location)) for q in found.questions)
    return replace(found, questions=tuple(asked))


def _question(task: Task, row: Mapping[str, Any], where: str) -> Question:
    if row.get("task", task.row_task) != task.row_task:
        raise DataError(f"{where} is of the task {row['task']!r}, not {task.row_task!r}; give that task's data")
    try:
        return task.row(row)
    except KeyError as fault:
        raise DataError(f"{where} has no usable {fault.args[0]!r}") from None
    except ValueError as fault:
        raise DataError(f"{where}: {fault}") from None


def _from_conversations(task: Task, path: Path, render: Render | None) -> QuestionSet:
    if task.turn is None:
        raise DataError(
            f"reading the {task.name} questions {path}: this is a training set of conversations, which only "
            f"{', '.join(name for name, other in TASKS.items() if other.turn)} can be asked from"
        )
    questions: list[Question] = []
    categories: set[str] = set()
    conversations = open_conversations(path.parent)
    for index in range(len(conversations)):
        conversation = conversations[index]
        for number, turn in enumerate(conversation.turns):
            categories.add(turn.category)
            alone = turn_alone(conversation, number)
            question = task.turn(alone.id, conversation, turn)
            if question is None:
                continue
            if render is not None:
                question = replace(question, prompt=render(alone)[0][0])
            questions.append(question)
    categories.discard("")
    return QuestionSet(path.stem, tuple(questions), tuple(sorted(categories)))


def _renderer(config: ExperimentConfig, seed: int) -> Render:
    location = make_location_format(config.coordinates, make_geometry(config.geometry))
    return Renderer(location, config.prompts, seed).turns
