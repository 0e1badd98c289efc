"""What the HTML pages share: their templates and style, and pictures as data URIs.

A page is one file without script and without any outside reference; the templates lie in `assets/pages`.
"""

import base64
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from locvlm.geometry import to_rgb

_SMALL = 256  # pixels; a smaller image is enlarged by whole pixels, so that it shows what the model saw
_ENLARGED = 384
_LARGEST = 640


@dataclass(frozen=True, slots=True)
class Picture:
    """An image ready for the page; `width`, `height` in its own pixels, which is what boxes are given in."""

    uri: str
    width: int
    height: int


def picture(image: Image.Image) -> Picture:
    """Embed an image of any PIL mode: a small one enlarged with nearest-neighbour, a large one reduced.

    Raises DataError when its pixels cannot be read.
    """
    image = to_rgb(image)
    width, height = image.size
    longest = max(width, height)
    if longest < _SMALL:
        factor = max(1, _ENLARGED // longest)
        shown = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        return Picture(_data_uri(shown, "png"), width, height)
    if longest > _LARGEST:
        scale = _LARGEST / longest
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
    return Picture(_data_uri(image, "jpeg"), width, height)


def environment() -> Any:
    """The jinja environment of every page: all text is escaped, a name that is not given is an error."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("locvlm", "assets/pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    found.filters["number"] = number
    return found


def number(value: float) -> str:
    """A whole number with its thousands apart: 26 716."""
    return f"{value:,.0f}".replace(",", " ")


def _data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
