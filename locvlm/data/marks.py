"""Boxes and words that belong together: one colour an object, in the picture and in the text beside it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from locvlm.coordinates import LocationFormat
from locvlm.errors import DataError
from locvlm.records import BoxXYXY

N_COLOURS = 8

_NOMINAL = 290  # displayed pixels of a picture where it is narrowest; labels are kept apart at this size
_TALLEST = 26 * 16  # displayed pixels
_LETTER, _LINE = 7.0, 17  # displayed pixels of a label
_LONGEST_LABEL = 26  # characters
_SMALL_SIDE = 0.07  # of the picture; a smaller box is drawn thin
_GROUP = re.compile(r"[(\[][^()\[\]]+[)\]]")


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text. `colour` is the number of the object it belongs to, None for plain text; `mark` is a class of the
    page's style; `title` is told on hovering."""

    text: str
    colour: int | None = None
    mark: str = ""
    title: str = ""


Text = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A box to draw, in pixels of the image. `point`: its centre is drawn too, because locations are points. `read`: it
    was read from the text and is not a field of the record. `thin`: it is too small for a full line."""

    box: BoxXYXY
    label: str
    colour: int
    point: bool = False
    read: bool = False
    thin: bool = False


@dataclass(frozen=True, slots=True)
class Tag:
    """A label at a box: a corner in percent of the picture, and to which side of that point it extends."""

    text: str
    colour: int
    x: float
    y: float
    leftwards: bool
    upwards: bool


class Marks:
    """The objects of one record in an image of `width` x `height` pixels (0: not known, nothing can be drawn), their
    colours, and the words of the text that belong to them. `location` writes places; None where it is not known."""

    def __init__(self, location: LocationFormat | None, width: int, height: int) -> None:
        self.places: list[Place] = []
        self.location = location
        self.width, self.height = width, height
        self._spots: dict[str, tuple[int, str]] = {}

    def add(self, box: BoxXYXY | None, label: str, words: Sequence[str] = (), read: bool = False) -> int | None:
        """The colour of an object, the same for the same box and label; None when it has no place to draw. `words` are
        coloured in the text, as is the text of the box."""
        if box is None or not (self.width > 0 and self.height > 0):
            return None
        colour = next((place.colour for place in self.places if (place.box, place.label) == (box, label)), None)
        if colour is None:
            colour = len(self.places) % N_COLOURS
            point = self.location is not None and self.location.kind == "point"
            side = min((box[2] - box[0]) / self.width, (box[3] - box[1]) / self.height)
            self.places.append(Place(box, label, colour, point, read, side < _SMALL_SIDE))
        told = f"{label}: {pixels(box)}" if label else pixels(box)
        for text in (*words, *self.written(box)):
            if text:
                self._spots.setdefault(text, (colour, told))
        return colour

    def written(self, box: BoxXYXY) -> list[str]:
        """The text of a box; none where it has none."""
        if self.location is None or not (self.width > 0 and self.height > 0):
            return []
        try:
            return [self.location.encode(box, self.width, self.height)]
        except DataError:  # lost by a crop
            return []

    def read(self, text: str) -> None:
        """Add the boxes that a literal text names."""
        if self.location is None or self.location.kind != "bbox" or not (self.width > 0 and self.height > 0):
            return
        for match in _GROUP.finditer(text):
            box = self.location.decode(match[0], self.width, self.height)
            if box is not None and len(box) == 4:
                self.add(box, "", (match[0],), read=True)

    def pieces(self, text: str, mark: str = "") -> Text:
        """The text with the words of each object in its colour."""
        if not self._spots:
            return (Piece(text, mark=mark),)
        longest = sorted(self._spots, key=lambda spot: (-len(spot), spot))
        pattern = "|".join(rf"(?<!\w){re.escape(spot)}(?!\w)" for spot in longest)
        pieces: list[Piece] = []
        end = 0
        for match in re.finditer(pattern, text):
            colour, title = self._spots[match[0]]
            pieces += [Piece(text[end : match.start()], mark=mark), Piece(match[0], colour, mark, title)]
            end = match.end()
        return tuple(piece for piece in (*pieces, Piece(text[end:], mark=mark)) if piece.text)

    def tags(self) -> Iterator[Tag]:
        """The labels of the boxes, kept apart and inside the picture as far as they can be."""
        if not (self.width > 0 and self.height > 0):
            return
        scale = min(_NOMINAL / self.width, _TALLEST / self.height)
        broad, tall = self.width * scale, self.height * scale
        taken: list[tuple[float, float, float, float]] = []
        for place in self.places:
            if not place.label:
                continue
            text = place.label
            if len(text) > _LONGEST_LABEL:
                text = text[: _LONGEST_LABEL - 1].rstrip() + "\u2026"
            wide = min(broad, _LETTER * len(text) + 10)
            x1, x2 = (min(max(place.box[k] * scale, 0), broad) for k in (0, 2))
            y1, y2 = (min(max(place.box[k] * scale, 0), tall) for k in (1, 3))
            best: tuple[float, Tag, tuple[float, float, float, float]] | None = None
            for y, upwards in ((y1, True), (y1, False), (y2, False), (y2, True)):
                for x, leftwards in ((x1, False), (x2, True)):
                    left, top = (x - wide if leftwards else x), (y - _LINE if upwards else y)
                    area = (left, top, left + wide, top + _LINE)
                    outside = sum(max(0.0, far) for far in (-left, area[2] - broad, -top, area[3] - tall))
                    cost = 1000 * outside + sum(_overlap(area, other) for other in taken)
                    if best is None or cost < best[0]:
                        corner = (100 * x / broad, 100 * y / tall)
                        best = (cost, Tag(text, place.colour, *corner, leftwards, upwards), area)
            if best is not None:
                taken.append(best[2])
                yield best[1]


def pixels(box: BoxXYXY) -> str:
    """A box as text: 10, 20.5, 30, 40 px."""
    return ", ".join(f"{value:.2f}".rstrip("0").rstrip(".") for value in box) + " px"


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
