"""An answer's places drawn on its image."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from locvlm.serving.forms import Place

_COLOURS = ("#6db3ea", "#f0a253", "#6cc79a", "#c497dd")  # those of the web page
_DARK = (0, 0, 0)


def draw_places(image: Image.Image, places: Sequence[Place], asked: Sequence[float] | None = None) -> Image.Image:
    """A copy of an RGB image with the boxes and points; `asked`: a box (x1, y1, x2, y2) that was asked about, in white.
    Lines grow with the image."""
    drawn = image.copy()
    canvas = ImageDraw.Draw(drawn)
    line = max(1, round(max(image.size) / 200))
    if asked is not None:
        _box(canvas, asked, "#ffffff", line)
    for number, place in enumerate(places):
        colour = _COLOURS[number % len(_COLOURS)]
        if place.box is not None:
            _box(canvas, place.box, colour, line)
        elif place.point is not None:
            canvas.circle(place.point, 3 * line, fill=colour, outline=_DARK, width=max(1, line // 2))
    return drawn


def _box(canvas: ImageDraw.ImageDraw, box: Sequence[float], colour: str, line: int) -> None:
    """A coloured line in a dark one, so that it shows on any ground."""
    x1, y1, x2, y2 = box
    canvas.rectangle((x1 - line, y1 - line, x2 + line, y2 + line), outline=_DARK, width=3 * line)
    canvas.rectangle((x1, y1, x2, y2), outline=colour, width=line)
