"""Bytes of a stranger -> an image, or a refusal that says why. Nothing is decoded before its size is known."""

import base64
import binascii
import io
import struct

from PIL import Image, ImageOps

from locvlm.errors import DataError
from locvlm.geometry import to_rgb
from locvlm.serving.limits import Limits, TooLarge

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

_FAULTS = (OSError, SyntaxError, ValueError, EOFError, struct.error, OverflowError)


def from_base64(text: str, limits: Limits) -> bytes:
    """The bytes of a base64 text; blanks and line ends in it are left out. Raises DataError, TooLarge."""
    compact = "".join(text.split())
    if len(compact) * 3 // 4 > limits.image_bytes + 2:
        raise TooLarge(_too_many_bytes(len(compact) * 3 // 4, limits))
    try:
        return base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(
            "reading the image: it is not base64; send the bytes of the file in base64, without a data: prefix"
        ) from None


def decode(data: bytes, limits: Limits) -> Image.Image:
    """The RGB image, turned the way a viewer shows it (EXIF): boxes are in the pixels that a person sees. Of an
    animation the first frame. Raises DataError for what is no whole image, TooLarge for one beyond the limits."""
    if len(data) > limits.image_bytes:
        raise TooLarge(_too_many_bytes(len(data), limits))
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooLarge(f"reading the image: it has more pixels than are taken; {_most(limits)}") from None
    except _FAULTS:
        raise DataError(
            f"reading the image: this is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file; send one of these"
        ) from None
    _refuse_size(*image.size, limits)
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except (*_FAULTS, DataError, MemoryError):
        raise DataError(
            "reading the image: it does not decode; the file is damaged or cut short, send a whole one"
        ) from None


def _refuse_size(width: int, height: int, limits: Limits) -> None:
    longer, shorter = max(width, height), min(width, height)
    if width * height > limits.pixels or longer > limits.side or longer > limits.aspect * shorter:
        raise TooLarge(f"reading the image: it is {width} x {height} pixels; {_most(limits)}")


def _most(limits: Limits) -> str:
    return (
        f"at most {limits.pixels / 1e6:g} million pixels, a side of {limits.side} and {limits.aspect}:1 are taken, "
        "send a smaller one"
    )


def _too_many_bytes(n: int, limits: Limits) -> str:
    return (
        f"reading the image: it has {n / 1e6:.1f} MB, at most {limits.image_bytes / 1e6:g} MB are taken; "
        "send a smaller one"
    )
