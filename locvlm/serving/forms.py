"""What can be asked and what comes back: a question, "where is it?" (LocPred), "what is here?" (RevLoc).

Boxes are `[x1, y1, x2, y2]` and points `[x, y]` in pixels of the image as a viewer shows it. How places are written in
the prompt and read from the answer is the checkpoint's own.
"""

import math
import re

from pydantic import BaseModel, ConfigDict, Field, model_validator

from locvlm.config import ExperimentConfig
from locvlm.coordinates import make_location_format
from locvlm.errors import DataError
from locvlm.geometry import make_geometry
from locvlm.prompts import loc_question, render_prompt, rev_question

_TEMPLATE = 0  # of the paper's prompts for places
_GROUP = re.compile(r"[(\[][^()\[\]]+[)\]]")


class Query(BaseModel):
    """One image and exactly one of `question`, `locate` and `box`."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="the bytes of a JPEG, PNG, WebP, BMP or GIF file in base64")
    question: str | None = Field(None, description="asked as it is")
    locate: str | None = Field(None, description="what to find, such as 'red circle'")
    box: list[float] | None = Field(None, description="[x1, y1, x2, y2] in pixels: what is there?")

    @model_validator(mode="after")
    def _one_form(self) -> "Query":
        if [self.question, self.locate, self.box].count(None) != 2:
            raise ValueError("give exactly one of question, locate and box")
        return self


class Place(BaseModel):
    """A place that an answer names: `box` or `point`, and the characters [start, end) of the answer that name it."""

    box: list[float] | None = None
    point: list[float] | None = None
    start: int
    end: int


class Answer(BaseModel):
    """What the model said. `prompt` is what it was asked, `width` and `height` are the image's in pixels."""

    answer: str
    places: list[Place]
    prompt: str
    width: int
    height: int


class Forms:
    """The words of one checkpoint."""

    def __init__(self, config: ExperimentConfig, max_text: int) -> None:
        self._location = make_location_format(config.coordinates, make_geometry(config.geometry))
        self._clean = config.prompts.clean_templates
        self._max_text = max_text

    def prompt(self, query: Query, width: int, height: int) -> str:
        """The user's words for a query about an image of that size in pixels. Raises DataError."""
        if query.box is not None:
            return rev_question(_TEMPLATE, self._location.encode(_checked(query.box, width, height), width, height))
        text = query.question if query.question is not None else query.locate
        assert text is not None
        text = " ".join(text.split())
        if not 0 < len(text) <= self._max_text:
            raise DataError(
                f"reading the question: it has {len(text)} characters; 1 to {self._max_text} are taken, send another"
            )
        render_prompt(text, "")  # nothing but marks of the format is no question
        if query.question is not None:
            return text
        return loc_question(_TEMPLATE, text, self._location.repr_text, self._clean)

    def places(self, answer: str, width: int, height: int) -> list[Place]:
        """Every place in brackets that an answer names; without one, what the codec reads from all of it."""
        spans = [match.span() for match in _GROUP.finditer(answer)]
        return self._read(answer, spans, width, height) or self._read(answer, [(0, len(answer))], width, height)

    def _read(self, answer: str, spans: list[tuple[int, int]], width: int, height: int) -> list[Place]:
        found = []
        for start, end in spans:
            place = self._location.decode(answer[start:end], width, height)
            if place is not None:
                numbers = [round(number, 2) for number in place]
                kind = "box" if len(numbers) == 4 else "point"
                found.append(Place.model_validate({kind: numbers, "start": start, "end": end}))
        return found


def _checked(box: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """The box inside the image. Raises DataError."""
    if len(box) == 4 and all(map(math.isfinite, box)):
        x1, x2 = (min(max(x, 0.0), float(width)) for x in (box[0], box[2]))
        y1, y2 = (min(max(y, 0.0), float(height)) for y in (box[1], box[3]))
        if x1 < x2 and y1 < y2:
            return x1, y1, x2, y2
    raise DataError(
        f"reading the box {box[:8]}: needed are four numbers x1, y1, x2, y2 in pixels of the {width} x {height} image, "
        "with x1 < x2 and y1 < y2"
    )
