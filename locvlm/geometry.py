"""Pixels <-> network pixels: one object maps the image and its boxes, so that they cannot disagree.

    squash           resize to side x side, aspect ratio ignored (default; the paper's formula n_b * x / W)
    letterbox        pad to a square with CLIP's mean colour, then resize (LLaVA-1.5)
    letterbox_white  the same with white (Shikra)
    crop             short side to `side`, then the central square, as CLIP does (LLaVA v1); loses what lies outside

A checkpoint is trained and evaluated with one geometry. There is no flip or other augmentation, because left and right
are words here, and no EXIF transpose, because COCO annotates the stored pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image

from locvlm.config import GeometryConfig
from locvlm.errors import ConfigError, DataError
from locvlm.records import BoxXYXY

Kind = Literal["squash", "letterbox", "letterbox_white", "crop"]

CLIP_MEAN_COLOUR = (122, 116, 104)  # int(255 * CLIP's mean), as LLaVA-1.5 pads
_PADDING = {"letterbox": CLIP_MEAN_COLOUR, "letterbox_white": (255, 255, 255)}
MIN_VISIBLE = 0.5  # share of a box's area that has to survive the crop

_MAX_SIDE = 1e9  # pixels; far above any image, far below an overflow
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class ImageGeometry:
    """How an image of any size becomes the `side` x `side` square of the network. Raises ConfigError."""

    kind: Kind = "squash"
    side: int = 224

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.side < 1:
            raise ConfigError(
                f"making an image geometry: kind is {self.kind!r} and side is {self.side}; "
                f"kind must be one of {', '.join(get_args(Kind))}, side 1 or more"
            )

    def apply(self, image: Image.Image) -> Image.Image:
        """The side x side RGB image that the network sees, resized bicubically. Any PIL mode goes in.

        Raises DataError when the pixels cannot be read (a file cut short).
        """
        rgb = to_rgb(image)
        if self.kind in _PADDING:
            square = max(rgb.size)
            left, top = _pad_offset(*rgb.size)
            width = square
            if rgb.width == square:
                # resizing begins along the rows, and a row of one colour stays what it is: pad only afterwards
                width = self.side
                rgb = rgb.resize((width, rgb.height), Image.Resampling.BICUBIC)
            canvas = Image.new("RGB", (width, square), _PADDING[self.kind])
            canvas.paste(rgb, (left, top))
            rgb = canvas
        if self.kind != "crop":
            return rgb.resize((self.side, self.side), Image.Resampling.BICUBIC)
        new_width, new_height, left, top = self._crop_plan(*rgb.size)
        rgb = rgb.resize((new_width, new_height), Image.Resampling.BICUBIC)
        return rgb.crop((left, top, left + self.side, top + self.side))

    def map_box(self, box_xyxy: Sequence[float], width: float, height: float) -> BoxXYXY | None:
        """Box (x1, y1, x2, y2) in pixels of the original width x height image -> box in network pixels.

        The box is first clipped to the image. With `crop` the result is the visible part; None when less than half of
        the box's area or not its centre is visible. Raises DataError for a box that is not finite or is inverted, or a
        size below one pixel.
        """
        x1, y1, x2, y2 = _clip(_checked(box_xyxy, width, height), width, height)
        scale_x, scale_y, shift_x, shift_y = self._affine(width, height)
        # values are held in the square because rounding may leave 224.00000000000003
        mapped = (
            x1 * scale_x + shift_x,
            y1 * scale_y + shift_y,
            x2 * scale_x + shift_x,
            y2 * scale_y + shift_y,
        )
        visible = _clip(mapped, self.side, self.side)
        if self.kind == "crop" and not self._survives(mapped, visible):
            return None
        return visible

    def unmap_box(self, box_xyxy: Sequence[float], width: float, height: float) -> BoxXYXY:
        """Box in network pixels -> box in pixels of the original width x height image, clipped to the image.

        The inverse of `map_box` up to rounding (for `crop`, of the visible part). Raises DataError as `map_box`.
        """
        x1, y1, x2, y2 = _checked(box_xyxy, width, height)
        scale_x, scale_y, shift_x, shift_y = self._affine(width, height)
        original = (
            (x1 - shift_x) / scale_x,
            (y1 - shift_y) / scale_y,
            (x2 - shift_x) / scale_x,
            (y2 - shift_y) / scale_y,
        )
        return _clip(original, width, height)

    def _affine(self, width: float, height: float) -> tuple[float, float, float, float]:
        """Network pixel = original pixel * scale + shift: (scale_x, scale_y, shift_x, shift_y)."""
        if self.kind == "squash":
            return self.side / width, self.side / height, 0.0, 0.0
        if self.kind in _PADDING:
            scale = self.side / max(width, height)
            left, top = _pad_offset(int(width), int(height))
            return scale, scale, left * scale, top * scale
        new_width, new_height, crop_left, crop_top = self._crop_plan(int(width), int(height))
        return new_width / width, new_height / height, -crop_left, -crop_top

    def _crop_plan(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(width, height) after resizing and (left, top) of the central square, rounded as CLIP's processor does."""
        short = min(width, height)
        new_width = self.side if width == short else int(self.side * width / short)
        new_height = self.side if height == short else int(self.side * height / short)
        return new_width, new_height, (new_width - self.side) // 2, (new_height - self.side) // 2

    def _survives(self, mapped: BoxXYXY, visible: BoxXYXY) -> bool:
        centre_x, centre_y = (mapped[0] + mapped[2]) / 2, (mapped[1] + mapped[3]) / 2
        if not (0 <= centre_x <= self.side and 0 <= centre_y <= self.side):
            return False
        return _area(visible) >= MIN_VISIBLE * _area(mapped)


def make_geometry(config: GeometryConfig) -> ImageGeometry:
    """The geometry that a configuration names."""
    return ImageGeometry(config.kind, config.side)


def box_iou(first: BoxXYXY, second: BoxXYXY) -> float:
    """Intersection over union of two (x1, y1, x2, y2) boxes in the same units; 0 when both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - overlap
    return overlap / union if union > 0 else 0.0


def inside(point: tuple[float, float], box: BoxXYXY) -> bool:
    """Whether the point (x, y) lies in the box, border included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: 16-bit greyscale is scaled to 8 bits, transparency is dropped as LLaVA does.

    Raises DataError when the pixels cannot be read.
    """
    try:
        image.load()
    except (OSError, SyntaxError) as fault:
        name = getattr(image, "filename", "") or "(in memory)"
        raise DataError(
            f"reading the image {name}: {fault}; the file is damaged or cut short, copy or download it again"
        ) from None
    if image.mode in _SIXTEEN_BIT:
        # PIL would clip everything above 255 to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode == "La":  # the one mode that PIL does not convert directly
        image = image.convert("LA")
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _pad_offset(width: int, height: int) -> tuple[int, int]:
    """(left, top) of the image inside the padded square; integer floor, as LLaVA pads."""
    square = max(width, height)
    return (square - width) // 2, (square - height) // 2


def _checked(box_xyxy: Sequence[float], width: float, height: float) -> BoxXYXY:
    try:
        x1, y1, x2, y2 = (float(value) for value in box_xyxy)
        legal = x1 <= x2 and y1 <= y2 and all(map(math.isfinite, (x1, y1, x2, y2)))
        legal = legal and 1 <= width <= _MAX_SIDE and 1 <= height <= _MAX_SIDE
    except (TypeError, ValueError, OverflowError):
        legal = False
    if not legal:
        raise DataError(
            f"mapping the box {box_xyxy!r} of an image of {width} x {height}: needed are four finite numbers "
            "(x1, y1, x2, y2) in pixels with x1 <= x2 and y1 <= y2, and a width and height of 1 or more; "
            "correct the annotation or leave it out"
        )
    return x1, y1, x2, y2


def _clip(box: BoxXYXY, width: float, height: float) -> BoxXYXY:
    x1, y1, x2, y2 = box
    return (
        max(0.0, min(x1, float(width))),
        max(0.0, min(y1, float(height))),
        max(0.0, min(x2, float(width))),
        max(0.0, min(y2, float(height))),
    )


def _area(box: BoxXYXY) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
