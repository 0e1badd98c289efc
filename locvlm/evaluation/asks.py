"""What a model is asked, and what it is to whoever asks: between the questions of the tasks and the engines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image, ImageOps

from locvlm.config import EvaluationConfig, ExperimentConfig, FamilyConfig, VideoConfig
from locvlm.data.frames import find_video, open_frames
from locvlm.data.names import coco_image_id
from locvlm.errors import DataError
from locvlm.pixels import ImageSource
from locvlm.records import leads_out, medium_of

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Ask:
    """One question for the model: `prompt` is the user's words alone, `name` the image's in `images`, which is shown
    mirrored left to right with `mirror`. A name of a video stands for its frames, as many as `video` says; without it
    for the middle one."""

    id: str
    images: ImageSource
    name: str
    prompt: str
    mirror: bool = False
    video: VideoConfig | None = None

    @property
    def image(self) -> Path:
        """What tells the image from others."""
        return self.images.path / (f"{self.name}#mirrored" if self.mirror else self.name)

    def open(self) -> Image.Image | list[Image.Image]:
        """The decoded image, or the frames of a video for a model that takes them. Raises DataError."""
        if medium_of(self.name) == "video":
            frames = open_frames(self.images.path, self.name, self.video)
            return frames if self.video is not None else frames[0]
        image = self.images.open(self.name)
        return ImageOps.mirror(image) if self.mirror else image


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Why a question has no answer; it counts as wrong and is reported."""

    reason: str


class Engine(Protocol):
    """A model that answers questions about images."""

    @property
    def config(self) -> ExperimentConfig | FamilyConfig:
        """How it is asked: the config that it was trained with, or what is known of a model that others trained."""

    def answers(self, asks: Sequence[Ask], decoding: EvaluationConfig) -> Sequence[str | Unanswered]:
        """One answer an ask, in order. Raises DataError for an image that cannot be read."""


def locate(sources: Sequence[ImageSource], name: str) -> tuple[ImageSource, str] | None:
    """The first of `sources` that has the image or video, and its name there; None when none has.

    Every image of COCO train2014 and val2014 is one of train2017 or val2017 too, where COCO_val2014_000000000042.jpg is
    called 000000000042.jpg: that one stands in. No source has a name that leads out of it.
    """
    if leads_out(name):
        return None
    number = coco_image_id(name)
    for wanted in (name,) if number is None else (name, f"{number:012d}.jpg"):
        for source in sources:
            if source.has(wanted) or (medium_of(wanted) == "video" and find_video(source.path, wanted)):
                return source, wanted
    return None


def ask_all(engine: Engine, asks: Sequence[Ask], decoding: EvaluationConfig) -> list[str | Unanswered]:
    """One answer an ask, in order; what cannot be read is left unanswered and the rest is asked."""
    try:
        return list(engine.answers(asks, decoding)) if asks else []
    except DataError:
        faults = {name: fault for name in dict.fromkeys(ask.name for ask in asks) if (fault := _fault(asks, name))}
        if not faults:
            raise
    rest = [ask for ask in asks if ask.name not in faults]
    answered = iter(engine.answers(rest, decoding) if rest else [])
    return [Unanswered(faults[ask.name]) if ask.name in faults else next(answered) for ask in asks]


def fill(groups: Iterable[Sequence[_T]], size: int) -> list[list[_T]]:
    """The groups put together, in order, into batches of at most `size` items; a larger group is a batch by itself."""
    batches: list[list[_T]] = []
    for group in groups:
        if batches and len(batches[-1]) + len(group) <= size:
            batches[-1] += group
        else:
            batches.append(list(group))
    return batches


def _fault(asks: Sequence[Ask], name: str) -> str:
    """Why an image cannot be shown to the model; empty when it can."""
    ask = next(ask for ask in asks if ask.name == name)
    try:
        ask.open()
    except DataError as fault:
        return str(fault).replace(f"{ask.images.path}/", "")
    return ""
