"""A look at held-out data while a stage trains: the loss, and a few questions asked.

    loss              per supervised token, on a fixed part of each held-out set of conversations
    loc_iou           mean IoU of the greedy answers to LocPred questions, an unreadable answer counting 0
    loc_acc50         share of them with an IoU of at least 0.5
    neg_accuracy      share of the NegPred questions that are answered with "no such object"
    spatial_accuracy  share of the COCO-Spatial questions whose answer has the right word (the paper's rule)

Every rank takes its share of all of them. A figure of several sets is over all their tokens or questions together; that
of one set stands beside it as `figure/NAME`.
"""

import json
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from locvlm.config import ExperimentConfig, StageConfig
from locvlm.coordinates import LocationFormat, make_location_format
from locvlm.data.collate import collate
from locvlm.data.conversations import ConversationFile, open_conversations
from locvlm.data.dataset import TrainingData
from locvlm.data.instruct import Renderer, turn_alone
from locvlm.errors import DataError
from locvlm.geometry import box_iou, make_geometry
from locvlm.model.checkpoint import LoadedModel
from locvlm.model.variants import LocVLM
from locvlm.pixels import ImageSource
from locvlm.prompts import OPPOSITE, said_side, says_absent
from locvlm.records import Conversation, read_jsonl
from locvlm.training.checkpoints import save_error
from locvlm.training.curve import Curve
from locvlm.training.engine import Engine

log = logging.getLogger(__name__)

QUESTIONS_NAME = "questions.jsonl"
ASKED = ("loc_iou", "loc_acc50", "neg_accuracy", "spatial_accuracy")
BEST_NAME = "best.safetensors"

# (set, figure) -> its sum and the number of tokens or questions that it is over
Sums = dict[tuple[str, str], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Probe:
    """One question for `LocVLM.answers`. `judge`: an answer -> what it is worth in each figure, 0 to 1."""

    id: str
    images: ImageSource
    name: str
    prompt: str
    judge: Callable[[str], dict[str, float]]

    @property
    def image(self) -> Path:
        """What tells the image from others."""
        return self.images.path / self.name

    def open(self) -> Image.Image:
        """The decoded image. Raises DataError."""
        return self.images.open(self.name)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out set: `conversations` whose loss is measured (None: a set of questions), `probes` that are asked."""

    name: str
    images: ImageSource
    conversations: ConversationFile | None
    probes: tuple[Probe, ...]

    @property
    def figures(self) -> set[str]:
        """What can be said of the set."""
        asked = {figure for probe in self.probes for figure in probe.judge("")}
        return asked if self.conversations is None else asked | {"loss"}


def open_held_out(name: str, path: Path, images: ImageSource, config: ExperimentConfig) -> HeldOut:
    """A folder of conversations (or a LLaVA list), or a COCO-Spatial question set, with its part of fixed questions.

    Raises DataError for anything else.
    """
    if (path / QUESTIONS_NAME).is_file():
        return HeldOut(name, images, None, tuple(_sides(path / QUESTIONS_NAME, images, config)))
    file = open_conversations(path)
    return HeldOut(name, images, file, tuple(_places(file, images, config)))


class Validation:
    """Called by every rank at the same steps; rank 0 writes `validation.jsonl` into `folder`.

    The model comes back in its training mode and the random state as it was. With `cluster.keep_best` naming a figure
    the weights of the best step lie in `folder` as well. A run that was cut off finds them again.
    """

    def __init__(
        self, sets: Sequence[HeldOut], stage: StageConfig, loaded: LoadedModel, engine: Engine, folder: Path
    ) -> None:
        config = loaded.config
        self.loaded, self.engine, self.folder = loaded, engine, folder
        self.keep = config.cluster.keep_best
        # no more at once than a training step has on this rank: what fits there fits here
        self.at_once = config.cluster.micro_batch or max(1, stage.global_batch // engine.world)
        self.decoding = config.evaluation.model_copy(update={"temperature": 0.0, "batch_size": self.at_once})
        self.data = {one.name: _data(one, stage, loaded) for one in sets if one.conversations is not None}
        asked = [(one.name, probe) for one in sets for probe in one.probes] if engine.whole else []
        self.probes = asked[engine.rank :: engine.world]
        self.keys = [
            (one.name, figure) for one in sets for figure in sorted(one.figures) if engine.whole or figure == "loss"
        ]
        if not engine.whole and any(one.probes for one in sets) and engine.rank == 0:
            log.warning("validation asks no questions: ZeRO-3 spreads the weights over the workers; it measures losses")
        self.curve = Curve(folder / "validation.jsonl")
        self.best = _best_so_far(folder / BEST_NAME, self.keep)
        self._try_images()

    def __call__(self, step: int) -> None:
        """Measure, write the figures down, and keep the weights where they are the best so far."""
        begun = time.monotonic()
        with _set_aside(self.loaded.model):
            figures = self._figures(self._losses() | self._answers())
        if self.engine.rank == 0:
            self.curve.add({"step": step, **figures, "seconds": round(time.monotonic() - begun, 3)})
        self._keep_best(step, figures)

    def _try_images(self) -> None:
        """Read everything once, so that an image that is missing shows now and not after hours."""
        for name, data in self.data.items():
            for indices in self._batches(name):
                for index in indices or ():
                    data.sample(index)
        for _, probe in self.probes:
            probe.open()

    def _batches(self, name: str) -> list[list[int] | None]:
        """This rank's batches of a set; None where the others have one more: they have to meet in each forward pass."""
        n = min(len(self.data[name]), self.loaded.config.cluster.validate_samples)
        batches: list[list[int] | None] = [
            list(range(begin, min(n, begin + self.at_once))) for begin in range(0, n, self.at_once)
        ]
        batches += [None] * (-len(batches) % self.engine.world)
        return batches[self.engine.rank :: self.engine.world]

    def _losses(self) -> Sums:
        found: Sums = {}
        for name, data in self.data.items():
            loss = tokens = 0.0
            for indices in self._batches(name):
                batch = collate([data.sample(index) for index in indices or [0]], self.loaded.encoder.pad_id)
                value = self.engine.held_out(batch)
                if indices is not None:
                    loss, tokens = loss + value, tokens + batch.n_targets
            found[name, "loss"] = (loss, tokens)
        return found

    def _answers(self) -> Sums:
        found: Sums = {}
        answers = self.loaded.answers([probe for _, probe in self.probes], self.decoding)
        for (name, probe), answer in zip(self.probes, answers, strict=True):
            for figure, worth in probe.judge(answer).items():
                total, n = found.get((name, figure), (0.0, 0.0))
                found[name, figure] = (total + worth, n + 1)
        return found

    def _figures(self, own: Sums) -> dict[str, float]:
        """The figures over all ranks: each over all sets together, and of each set where several have it."""
        values = self.engine.total([part for key in self.keys for part in own.get(key, (0.0, 0.0))])
        sums = dict(zip(self.keys, zip(values[::2], values[1::2], strict=True), strict=True))
        figures = {}
        for figure in ("loss", *ASKED):
            of_sets = {name: pair for (name, key), pair in sums.items() if key == figure}
            if of_sets:
                total, n = (sum(part) for part in zip(*of_sets.values(), strict=True))
                figures[figure] = total / n
            if len(of_sets) > 1:
                figures |= {f"{figure}/{name}": total / n for name, (total, n) in of_sets.items()}
        return figures

    def _keep_best(self, step: int, figures: Mapping[str, float]) -> None:
        if self.keep == "last":
            return
        value = figures[self.keep]
        better = value < self.best if self.keep == "loss" else value > self.best
        if not any(self.engine.total([float(better and self.engine.rank == 0)])):  # rank 0 decides for all
            return
        self.best = value
        weights = self.engine.trained_weights()
        if self.engine.rank == 0:
            _write_best(self.folder / BEST_NAME, weights, {"figure": self.keep, "value": value, "step": step})


def read_best(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights that `Validation` kept, and the figure, value and step for which."""
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return weights, json.loads(file.metadata()["kept"])


def _write_best(path: Path, weights: dict[str, torch.Tensor], kept: dict[str, Any]) -> None:
    """Under the final name in one step: a run that dies here keeps the best before."""
    temporary = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary, metadata={"kept": json.dumps(kept)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise save_error(int(kept["step"]), path, error) from None


def _best_so_far(path: Path, figure: str) -> float:
    if figure == "last" or not path.is_file():
        return math.inf if figure == "loss" else -math.inf
    return float(read_best(path)[1]["value"])


def _data(held_out: HeldOut, stage: StageConfig, loaded: LoadedModel) -> TrainingData:
    """The conversations as the stage would train on them, one a sample; the order of the first epoch, which hangs on
    the seed alone, picks the part that is looked at."""
    assert held_out.conversations is not None
    config = loaded.config
    geometry = make_geometry(config.geometry)
    return TrainingData(
        stage.model_copy(update={"mixture": (), "conversations_per_image": 0, "group_by_length": False}),
        {held_out.name: held_out.conversations},
        held_out.images,
        Renderer(make_location_format(config.coordinates, geometry), config.prompts, config.seed),
        loaded.encoder,
        geometry,
        config.model.language.max_length,
        config.seed,
        config.video,
    )


def _places(file: ConversationFile, images: ImageSource, config: ExperimentConfig) -> Iterator[Probe]:
    """Up to `validate_questions` LocPred and as many NegPred turns about images, each asked alone, worded as
    `locvlm predict` words them."""
    rows = [row for row, objective in enumerate(file.objectives) if objective in ("loc_pred", "neg_pred")]
    random.Random(f"{config.seed}/validation").shuffle(rows)
    location = make_location_format(config.coordinates, make_geometry(config.geometry))
    renderer = Renderer(location, config.prompts, int((file.manifest or {}).get("seed", 0)))
    wanted = config.cluster.validate_questions
    # a point has no overlap with a box
    left = {"loc_pred": wanted if location.kind == "bbox" else 0, "neg_pred": wanted}
    for row in rows:
        if not any(left.values()):
            return
        conversation: Conversation = file[row]
        for number, turn in enumerate(conversation.turns):
            if left.get(turn.objective, 0) and conversation.medium == "image":
                left[turn.objective] -= 1
                alone = turn_alone(conversation, number)
                prompt = renderer.turns(alone)[0][0]
                yield Probe(alone.id, images, alone.image, prompt, _judge_of(alone, location))


def _judge_of(alone: Conversation, location: LocationFormat) -> Callable[[str], dict[str, float]]:
    (turn,) = alone.turns
    truth = turn.box_xyxy

    def judge(answer: str) -> dict[str, float]:
        place = location.decode(answer, alone.width, alone.height)
        if turn.objective == "neg_pred" or truth is None:
            return {"neg_accuracy": float(place is None and says_absent(answer))}
        iou = 0.0 if place is None or len(place) != 4 else box_iou(place, truth)
        return {"loc_iou": iou, "loc_acc50": float(iou >= 0.5)}

    return judge


def _sides(path: Path, images: ImageSource, config: ExperimentConfig) -> Iterator[Probe]:
    """Up to `validate_questions` direct questions; those about mirrored images are left out."""
    rows = [row for row in read_jsonl(path) if row.get("mirror") is not True]
    random.Random(f"{config.seed}/validation").shuffle(rows)
    for row in rows[: config.cluster.validate_questions]:
        try:
            key, image, prompt, side = (str(row[name]) for name in ("id", "image", "prompt", "reference"))
        except KeyError as error:
            raise DataError(f"validating on {path}: a question has no {error}; give a set of coco-spatial") from None
        if side not in OPPOSITE:
            raise DataError(
                f"validating on {path}: the answer to the question {key!r} is {side!r}, not one of "
                f"{', '.join(OPPOSITE)}; give a set made by `locvlm data coco-spatial`"
            )
        yield Probe(key, images, image, prompt, _judge_side(side))


def _judge_side(side: str) -> Callable[[str], dict[str, float]]:
    return lambda answer: {"spatial_accuracy": float(said_side(answer, side) in (side, "both"))}


@contextmanager
def _set_aside(model: LocVLM) -> Iterator[None]:
    """The model in eval mode with the plain attention kernel; its modes, kernel and the random state come back."""
    modes = {module: module.training for module in model.modules()}
    language = model.model.language_model
    kernel = language.config._attn_implementation
    device = model.lm_head.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        if kernel == "flex_attention":
            language.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            if kernel == "flex_attention":
                language.set_attn_implementation(kernel)
            for module, mode in modes.items():
                module.training = mode
