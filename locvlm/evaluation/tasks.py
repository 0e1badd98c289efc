"""What a task is, and the tasks there are. Whether an answer is right is decided in the task's own file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from locvlm.config import CoordinateConfig, ExperimentConfig, GeometryConfig
from locvlm.coordinates import make_location_format
from locvlm.data.conversations import open_conversations
from locvlm.data.instruct import Renderer
from locvlm.errors import CheckpointError, DataError
from locvlm.evaluation import localization, presence, region, spatial
from locvlm.evaluation.questions import (
    CONVERSATIONS_FILE,
    QUESTIONS_FILE,
    Question,
    QuestionSet,
    Scorer,
    manifest_of,
    places_of,
    read_rows,
    refuse_repeated,
    row_id,
)
from locvlm.geometry import make_geometry
from locvlm.records import Conversation, Turn

Render = Callable[[Conversation], list[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of question and how it is scored.

    `row`: a row of a questions file -> Question (KeyError names a missing key, ValueError says what is wrong).
    `turn`: id, conversation and turn of a Localize-Instruct set -> Question without prompt, or None where the task does
    not ask that turn; without `turn` the task cannot read such folders. `scorer`: the rules for one question set.
    `primary`: the figure that stands for the task.
    """

    name: str
    row_task: str
    row: Callable[[Mapping[str, Any]], Question]
    scorer: Callable[[QuestionSet], Scorer]
    primary: str
    turn: Callable[[str, Conversation, Turn], Question | None] | None = None

    @property
    def writes_places(self) -> bool:
        """Whether prompts or answers hold coordinates, so that data and checkpoint have to agree on their form."""
        return self.turn is not None


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
        "accuracy",
        region.turn_question,
    ),
}


def task_named(name: str) -> Task:
    """The task of that name. Raises DataError that lists the names."""
    if name not in TASKS:
        raise DataError(f"looking up the task {name!r}: it must be one of {', '.join(TASKS)}")
    return TASKS[name]


def read_set(task: Task, path: Path, config: ExperimentConfig | None = None) -> QuestionSet:
    """The questions of a file or folder, with the prompts that a checkpoint of `config` is asked.

    Without `config` (scoring) the prompts of a Localize-Instruct folder stay empty. Raises DataError for a set that
    cannot be read or is another task's, CheckpointError when it writes places in another form than the checkpoint.
    """
    if not path.exists():
        raise DataError(f"reading the {task.name} questions {path}: there is no such file or folder")
    manifest = manifest_of(path)
    coordinates, geometry = places_of(path, manifest)
    if task.writes_places and config is not None:
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
        render = None if config is None else _renderer(config, int(manifest.get("seed", 0)))
        found = _from_conversations(task, file, render)
    else:
        if task.writes_places and config is not None and coordinates is None:
            raise DataError(
                f"reading the {task.name} questions {path}: there is no manifest.json beside them, so nothing says how "
                "their prompts write places; keep questions.jsonl in the folder it was built in"
            )
        found = _from_rows(task, file)
    refuse_repeated(file, found.questions)
    if not found.questions:
        raise DataError(f"reading {path}: it holds no question for the task {task.name!r}")
    if task.writes_places and config is not None:
        coordinates, geometry = config.coordinates, config.geometry
    return replace(found, name=str(manifest.get("dataset") or path.stem), coordinates=coordinates, geometry=geometry)


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


def _from_rows(task: Task, path: Path) -> QuestionSet:
    questions = [
        _question(task, row, f"reading the {task.name} questions {path}: record {number}")
        for number, row in enumerate(read_rows(path), 1)
    ]
    return QuestionSet(path.stem, tuple(questions), categories_of(questions))


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
            key = f"{conversation.id}#{number}"
            question = task.turn(key, conversation, turn)
            if question is None:
                continue
            if render is not None:
                # one turn alone: the model must not read earlier answers; its key draws the template
                alone = replace(conversation, id=key, turns=(turn,))
                question = replace(question, prompt=render(alone)[0][0])
            questions.append(question)
    categories.discard("")
    return QuestionSet(path.stem, tuple(questions), tuple(sorted(categories)))


def _renderer(config: ExperimentConfig, seed: int) -> Render:
    location = make_location_format(config.coordinates, make_geometry(config.geometry))
    return Renderer(location, config.prompts, seed).turns
