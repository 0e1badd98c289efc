"""Text <-> places: the three representations of the paper (section 3.2), and nothing else does this arithmetic.

A codec turns a box or a point in float pixels of an image of `width` x `height` into text and back. Boxes are
`(x1, y1, x2, y2)`, top-left origin, x2 = x + w.

    IVB   integer bins       (4,52,13,63)                      the default of all main results
    NFP   fractions          (0.0195,0.2344,0.0586,0.2832)
    DIGA  anchor, deviation  (0,4,-3,-11,6,0)

and, for other people's models, PatchTokens, the location tokens of Kosmos-2.

Encoding clips to the image. Every text that a codec writes comes back to itself: encode(decode(text)) == text (the
unsigned form of DIGA, which the paper prints, is the one exception).

Decoding reads whatever a model says and never raises for a string:
- the first group of the right number of numbers in () or [] wins; without one the first such group parted by commas,
  then by blanks; text around the numbers, blanks, signs and decimals are allowed; anything else gives None;
- a number outside the range means the border, however far outside, as it does when encoding;
- two corners name a box in any order: x1 > x2 or y1 > y2 are swapped.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from locvlm.errors import ConfigError, DataError
from locvlm.records import BoxXYXY

if TYPE_CHECKING:  # keeps pydantic out of the data workers that only encode
    from locvlm.config import CoordinateConfig

PointXY = tuple[float, float]

_INF = math.inf
_MAX_SIDE = 1e9  # pixels; far above any image, far below the overflow of n_bins * x
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:[0-9]++(?:\.[0-9]++)?|\.[0-9]++)(?!\w|\.[0-9])")
_BRACKETED = re.compile(r"[(\[]([^()\[\]]*+)[)\]]")
_SEPARATOR = re.compile(r"\s*[,;]\s*|\s+")
_BARE_SEPARATORS = ((",", ";"), ("",))
_PATCH = re.compile(r"<patch_index_([0-9]{1,9})>")
_PATCH_PAIR = re.compile(rf"{_PATCH.pattern}\s*{_PATCH.pattern}")
_EDGE = 1e-9  # of a patch: what lies on an edge must not fall off it by rounding


class Codec(ABC):
    """One representation. `box_names` and `point_names` are the names that a prompt gives to the numbers."""

    box_names: tuple[str, ...] = ("x1", "y1", "x2", "y2")
    point_names: tuple[str, ...] = ("cx", "cy")
    brackets: str
    separator: str

    @abstractmethod
    def encode_box(self, box_xyxy: Sequence[float], width: float, height: float) -> str:
        """Text of a box in pixels. Raises DataError for a box that is not finite or inverted, or a size <= 0."""

    @abstractmethod
    def decode_box(self, text: str, width: float, height: float) -> BoxXYXY | None:
        """Box in pixels, inside the image, x1 <= x2, y1 <= y2; None when `text` holds no box."""

    @abstractmethod
    def encode_point(self, point_xy: Sequence[float], width: float, height: float) -> str:
        """Text of a point (x, y) in pixels. Raises DataError for a point that is not finite, or a size <= 0."""

    @abstractmethod
    def decode_point(self, text: str, width: float, height: float) -> PointXY | None:
        """Point (x, y) in pixels, inside the image; None when `text` holds no point."""

    def join(self, parts: Sequence[object]) -> str:
        """The parts in this codec's brackets and separator."""
        return f"{self.brackets[0]}{self.separator.join(map(str, parts))}{self.brackets[1]}"


@dataclass(frozen=True)
class IVB(Codec):
    """Integer bins (section 3.2): b = round(n_bins * x / width), likewise y; half to even, as the paper's 52.5 -> 52.

    The labels 0..n_bins are grid lines, so 0 and n_bins are the borders of the image. Decoding an integer b gives
    b * width / n_bins: off by at most width / (2 * n_bins), exact on bins. Raises ConfigError for n_bins < 1.
    """

    n_bins: int
    brackets: str = field(default="()", kw_only=True)
    separator: str = field(default=",", kw_only=True)

    def __post_init__(self) -> None:
        _check_style(self.brackets, self.separator)
        if self.n_bins < 1:
            raise ConfigError(f"making the IVB codec: n_bins is {self.n_bins}, it must be 1 or more")

    def encode_box(self, box_xyxy: Sequence[float], width: float, height: float) -> str:
        """See Codec."""
        x1, y1, x2, y2 = self.box_bins(box_xyxy, width, height)
        gap = self.separator
        return f"{self.brackets[0]}{x1}{gap}{y1}{gap}{x2}{gap}{y2}{self.brackets[1]}"

    def decode_box(self, text: str, width: float, height: float) -> BoxXYXY | None:
        """See Codec."""
        numbers = _read(text, 4)
        return None if numbers is None else _place_box(numbers, self.n_bins, width, height)

    def encode_point(self, point_xy: Sequence[float], width: float, height: float) -> str:
        """See Codec."""
        return self.join(self.point_bins(point_xy, width, height))

    def decode_point(self, text: str, width: float, height: float) -> PointXY | None:
        """See Codec."""
        numbers = _read(text, 2)
        return None if numbers is None else _place_point(numbers, self.n_bins, width, height)

    def box_bins(self, box_xyxy: Sequence[float], width: float, height: float) -> tuple[int, int, int, int]:
        """The four bins (x1, y1, x2, y2) of a box in pixels. Raises DataError as `encode_box`."""
        x1, y1, x2, y2, w, h = _checked_box(box_xyxy, width, height)
        n = self.n_bins  # (n * x) / w in float64 and this order everywhere, so ties do not depend on the caller
        return round(n * x1 / w), round(n * y1 / h), round(n * x2 / w), round(n * y2 / h)

    def point_bins(self, point_xy: Sequence[float], width: float, height: float) -> tuple[int, int]:
        """The two bins (x, y) of a point in pixels. Raises DataError as `encode_point`."""
        x, y, w, h = _checked_point(point_xy, width, height)
        return round(self.n_bins * x / w), round(self.n_bins * y / h)


@dataclass(frozen=True)
class NFP(Codec):
    """Normalised floating point (section 3.2): x / width with exactly four decimals, 0.0000 to 1.0000.

    Decoding is off by at most width * 5e-5. `decimals`: 3 in Shikra's text, 2 in that of LLaVA-1.5.
    """

    decimals: int = field(default=4, kw_only=True)
    brackets: str = field(default="()", kw_only=True)
    separator: str = field(default=",", kw_only=True)

    def __post_init__(self) -> None:
        _check_style(self.brackets, self.separator)
        if self.decimals < 1:
            raise ConfigError(f"making the NFP codec: decimals is {self.decimals}, it must be 1 or more")

    def encode_box(self, box_xyxy: Sequence[float], width: float, height: float) -> str:
        """See Codec."""
        x1, y1, x2, y2, w, h = _checked_box(box_xyxy, width, height)
        return self.join([f"{fraction:.{self.decimals}f}" for fraction in (x1 / w, y1 / h, x2 / w, y2 / h)])

    def decode_box(self, text: str, width: float, height: float) -> BoxXYXY | None:
        """See Codec."""
        numbers = _read(text, 4)
        return None if numbers is None else _place_box(numbers, 1, width, height)

    def encode_point(self, point_xy: Sequence[float], width: float, height: float) -> str:
        """See Codec."""
        x, y, w, h = _checked_point(point_xy, width, height)
        return self.join([f"{fraction:.{self.decimals}f}" for fraction in (x / w, y / h)])

    def decode_point(self, text: str, width: float, height: float) -> PointXY | None:
        """See Codec."""
        numbers = _read(text, 2)
        return None if numbers is None else _place_point(numbers, 1, width, height)


@dataclass(frozen=True)
class DIGA(Codec):
    """Deviation from an image-grid anchor (section 3.2): `(p,q,dx1,dy1,dx2,dy2)`, for a point `(p,q,dx,dy)`.

    The image is a grid of n_bins / patch anchors a side, each `patch` bins wide (one ViT patch); (p, q) counts them
    along x and y, and anchor p has its centre at bin patch * p + patch // 2. The box is first put into IVB bins; its
    anchor is the one that holds the mid-point of those bins; the deviations are bins minus anchor centre. Starting
    from bins is what fits the paper's example, and it makes decoding exact on bins.

    `sign="unsigned_paper"` writes absolute deviations as the paper prints them, (0,4,3,11,6,0). This is lossy:
    decoding has to suppose that x1, y1 lie before the anchor's centre and x2, y2 (and a point) after it.
    Raises ConfigError when n_bins is not a multiple of patch.
    """

    n_bins: int
    patch: int = 14
    sign: Literal["signed", "unsigned_paper"] = field(default="signed", kw_only=True)
    brackets: str = field(default="()", kw_only=True)
    separator: str = field(default=",", kw_only=True)

    box_names = ("p", "q", "dx1", "dy1", "dx2", "dy2")
    point_names = ("p", "q", "dx", "dy")

    def __post_init__(self) -> None:
        _check_style(self.brackets, self.separator)
        if self.patch < 1 or self.n_bins < 1 or self.n_bins % self.patch:
            raise ConfigError(
                f"making the DIGA codec: n_bins is {self.n_bins} and patch is {self.patch}; "
                "both must be 1 or more and n_bins a multiple of patch"
            )
        if self.sign not in ("signed", "unsigned_paper"):
            raise ConfigError(f"making the DIGA codec: sign is {self.sign!r}, it must be signed or unsigned_paper")

    def encode_box(self, box_xyxy: Sequence[float], width: float, height: float) -> str:
        """See Codec."""
        x1, y1, x2, y2 = IVB(self.n_bins).box_bins(box_xyxy, width, height)
        p, q = self._anchor(x1 + x2), self._anchor(y1 + y2)
        cx, cy = self._centre(p), self._centre(q)
        return self._write(p, q, x1 - cx, y1 - cy, x2 - cx, y2 - cy)

    def decode_box(self, text: str, width: float, height: float) -> BoxXYXY | None:
        """See Codec. None also when p or q is not a whole number."""
        numbers = _read(text, 6)
        if numbers is None or numbers[0] % 1 or numbers[1] % 1:
            return None
        cx, cy = self._centre(int(numbers[0])), self._centre(int(numbers[1]))
        dx1, dy1, dx2, dy2 = numbers[2:]
        if self.sign == "unsigned_paper":
            dx1, dy1 = -dx1, -dy1
        return _place_box((cx + dx1, cy + dy1, cx + dx2, cy + dy2), self.n_bins, width, height)

    def encode_point(self, point_xy: Sequence[float], width: float, height: float) -> str:
        """See Codec."""
        x, y = IVB(self.n_bins).point_bins(point_xy, width, height)
        p, q = self._anchor(2 * x), self._anchor(2 * y)
        return self._write(p, q, x - self._centre(p), y - self._centre(q))

    def decode_point(self, text: str, width: float, height: float) -> PointXY | None:
        """See Codec. None also when p or q is not a whole number."""
        numbers = _read(text, 4)
        if numbers is None or numbers[0] % 1 or numbers[1] % 1:
            return None
        cx, cy = self._centre(int(numbers[0])), self._centre(int(numbers[1]))
        return _place_point((cx + numbers[2], cy + numbers[3]), self.n_bins, width, height)

    def _anchor(self, twice_bin: int) -> int:
        # the border n_bins belongs to the last anchor
        return min(twice_bin // (2 * self.patch), self.n_bins // self.patch - 1)

    def _centre(self, anchor: int) -> int:
        return self.patch * anchor + self.patch // 2

    def _write(self, p: int, q: int, *deviations: int) -> str:
        if self.sign == "unsigned_paper":
            return self.join((p, q, *map(abs, deviations)))
        return self.join((p, q, *deviations))


@dataclass(frozen=True)
class PatchTokens(Codec):
    """Kosmos-2's location tokens: the image is a grid of n_side x n_side patches, numbered row by row, and a box is the
    tokens of its first and its last patch, `<patch_index_0044><patch_index_0863>`; a point is the token of its patch.

    Decoding is that of Kosmos-2: the centres of the two patches, or their outer edges when they share a row or column.
    It is off by at most a patch. Raises ConfigError for n_side < 1.
    """

    n_side: int = 32

    box_names = ("first", "last")
    point_names = ("patch",)
    brackets = "()"
    separator = ","

    def __post_init__(self) -> None:
        if self.n_side < 1:
            raise ConfigError(f"making the patch codec: n_side is {self.n_side}, it must be 1 or more")

    def encode_box(self, box_xyxy: Sequence[float], width: float, height: float) -> str:
        """See Codec."""
        x1, y1, x2, y2, w, h = _checked_box(box_xyxy, width, height)
        left, top = self._patch(x1 / w), self._patch(y1 / h)
        # a box that ends on an edge does not reach into the next patch
        right = max(left, math.ceil(self.n_side * x2 / w - _EDGE) - 1)
        bottom = max(top, math.ceil(self.n_side * y2 / h - _EDGE) - 1)
        return self._token(left, top) + self._token(right, bottom)

    def decode_box(self, text: str, width: float, height: float) -> BoxXYXY | None:
        """See Codec. None also for a number that is no patch of the grid."""
        match = _PATCH_PAIR.search(text)
        if match is None:
            return None
        first, last = self._place(match[1]), self._place(match[2])
        if first is None or last is None:
            return None
        inset = 0.0 if first[0] == last[0] or first[1] == last[1] else 0.5
        left, right = sorted((first[0], last[0]))
        top, bottom = sorted((first[1], last[1]))
        corners = (left + inset, top + inset, right + 1 - inset, bottom + 1 - inset)
        return _place_box(corners, self.n_side, width, height)

    def encode_point(self, point_xy: Sequence[float], width: float, height: float) -> str:
        """See Codec."""
        x, y, w, h = _checked_point(point_xy, width, height)
        return self._token(self._patch(x / w), self._patch(y / h))

    def decode_point(self, text: str, width: float, height: float) -> PointXY | None:
        """See Codec: the centre of the first patch that is named."""
        match = _PATCH.search(text)
        place = None if match is None else self._place(match[1])
        return None if place is None else _place_point((place[0] + 0.5, place[1] + 0.5), self.n_side, width, height)

    def _patch(self, fraction: float) -> int:
        return min(math.floor(self.n_side * fraction + _EDGE), self.n_side - 1)

    def _token(self, column: int, row: int) -> str:
        return f"<patch_index_{row * self.n_side + column:04d}>"

    def _place(self, digits: str) -> tuple[int, int] | None:
        """(column, row) of a patch."""
        number = int(digits)
        return (number % self.n_side, number // self.n_side) if number < self.n_side**2 else None


def make_codec(config: "CoordinateConfig") -> Codec:
    """The codec that a coordinate configuration names."""
    brackets, separator = config.brackets, config.separator
    if config.representation == "patches":
        return PatchTokens(config.n_bins)
    if config.representation == "nfp":
        return NFP(decimals=config.decimals, brackets=brackets, separator=separator)
    if config.representation == "diga":
        return DIGA(config.n_bins, config.patch, sign=config.diga_sign, brackets=brackets, separator=separator)
    return IVB(config.n_bins, brackets=brackets, separator=separator)


class Frame(Protocol):
    """The square that the network sees: what a LocationFormat needs of `locvlm.geometry.ImageGeometry`."""

    @property
    def kind(self) -> str:
        """squash, letterbox or crop."""

    @property
    def side(self) -> int:
        """Side of the square in network pixels."""

    def map_box(self, box_xyxy: Sequence[float], width: float, height: float) -> BoxXYXY | None:
        """Original pixels -> network pixels."""

    def unmap_box(self, box_xyxy: Sequence[float], width: float, height: float) -> BoxXYXY:
        """Network pixels -> original pixels."""


@dataclass(frozen=True)
class LocationFormat:
    """How one checkpoint writes the place of an object: a codec, box or point, and the frame the numbers refer to.

    With `squash` (or no frame) the codec works on the original image: squashing scales each axis by its own length,
    as the paper's formula does. With `letterbox` and `crop` the box is first carried into the network's square.
    """

    codec: Codec
    kind: Literal["bbox", "point"] = "bbox"
    frame: Frame | None = None

    @property
    def repr_text(self) -> str:
        """The {repr} of the prompts: "(x1,y1,x2,y2) bbox" or "(cx,cy) point"; DIGA names its own numbers."""
        names = self.codec.box_names if self.kind == "bbox" else self.codec.point_names
        return f"{self.codec.join(names)} {self.kind}"

    def encode(self, box_xyxy: Sequence[float], width: float, height: float) -> str:
        """Text for an object's box (float pixels of the original image of width x height).

        The point form is the centre of the continuous box inside the image, encoded then: not the mean of the two
        encoded corners. Raises DataError for a bad box or size, or when a crop loses the object.
        """
        if self.frame is not None and self.frame.kind != "squash":
            mapped = self.frame.map_box(box_xyxy, width, height)
            if mapped is None:
                raise DataError(
                    f"writing the location of box {tuple(box_xyxy)} in an image of {width} x {height}: the crop to "
                    "the central square loses this object; leave it out of the data, or use the geometry squash"
                )
            box_xyxy, width, height = mapped, self.frame.side, self.frame.side
        if self.kind == "bbox":
            return self.codec.encode_box(box_xyxy, width, height)
        x1, y1, x2, y2, width, height = _checked_box(box_xyxy, width, height)
        return self.codec.encode_point(((x1 + x2) / 2, (y1 + y2) / 2), width, height)

    def decode(self, text: str, width: float, height: float) -> BoxXYXY | PointXY | None:
        """Box (x1, y1, x2, y2) or point (x, y) in pixels of the original image; None when `text` holds none."""
        if self.frame is None or self.frame.kind == "squash":
            if self.kind == "bbox":
                return self.codec.decode_box(text, width, height)
            return self.codec.decode_point(text, width, height)
        side = self.frame.side
        if self.kind == "bbox":
            box = self.codec.decode_box(text, side, side)
            return None if box is None else self.frame.unmap_box(box, width, height)
        point = self.codec.decode_point(text, side, side)
        return None if point is None else self.frame.unmap_box((*point, *point), width, height)[:2]


def make_location_format(config: "CoordinateConfig", geometry: Frame | None = None) -> LocationFormat:
    """The location format of a coordinate configuration and an image geometry (None: squash)."""
    return LocationFormat(make_codec(config), config.location, geometry)


def _check_style(brackets: str, separator: str) -> None:
    if brackets not in ("()", "[]") or separator not in (",", ", "):
        raise ConfigError(
            f"making a codec: brackets are {brackets!r} and separator is {separator!r}; "
            "brackets must be '()' or '[]', separator ',' or ', '"
        )


def _checked_box(
    box_xyxy: Sequence[float], width: float, height: float
) -> tuple[float, float, float, float, float, float]:
    """(x1, y1, x2, y2, width, height) as Python floats, the box clipped to the image. Raises DataError."""
    try:
        x1, y1, x2, y2 = box_xyxy
        x1, y1, x2, y2, w, h = float(x1), float(y1), float(x2), float(y2), float(width), float(height)
        legal = -_INF < x1 <= x2 < _INF and -_INF < y1 <= y2 < _INF and 0 < w <= _MAX_SIDE and 0 < h <= _MAX_SIDE
    except (TypeError, ValueError, OverflowError):
        legal = False
    if not legal:
        raise DataError(
            f"encoding the box {box_xyxy!r} of an image of {width} x {height}: needed are four finite numbers "
            "(x1, y1, x2, y2) in pixels with x1 <= x2 and y1 <= y2, and a positive width and height; "
            "correct the annotation or leave it out"
        )
    # `<= 0` also turns -0.0 into 0.0, which would be written "-0.0000"
    return (
        0.0 if x1 <= 0 else min(x1, w),
        0.0 if y1 <= 0 else min(y1, h),
        0.0 if x2 <= 0 else min(x2, w),
        0.0 if y2 <= 0 else min(y2, h),
        w,
        h,
    )


def _checked_point(point_xy: Sequence[float], width: float, height: float) -> tuple[float, float, float, float]:
    """(x, y, width, height) as Python floats, the point clipped to the image. Raises DataError."""
    try:
        x, y = point_xy
        x, y, w, h = float(x), float(y), float(width), float(height)
        legal = -_INF < x < _INF and -_INF < y < _INF and 0 < w <= _MAX_SIDE and 0 < h <= _MAX_SIDE
    except (TypeError, ValueError, OverflowError):
        legal = False
    if not legal:
        raise DataError(
            f"encoding the point {point_xy!r} of an image of {width} x {height}: needed are two finite numbers "
            "(x, y) in pixels, and a positive width and height; correct the annotation or leave it out"
        )
    return 0.0 if x <= 0 else min(x, w), 0.0 if y <= 0 else min(y, h), w, h


def _read(text: str, arity: int) -> tuple[float, ...] | None:
    """The numbers of the group that the module's rule picks, held within +-1e9 so that sums stay finite."""
    for group in _groups(text):
        if len(group) == arity:
            return tuple(max(-_MAX_SIDE, min(_MAX_SIDE, float(number))) for number in group)
    return None


def _groups(text: str) -> Iterator[list[str]]:
    for match in _BRACKETED.finditer(text):
        parts = _SEPARATOR.split(match[1].strip())
        if all(_NUMBER.fullmatch(part) for part in parts):
            yield parts
    for separators in _BARE_SEPARATORS:
        run: list[str] = []
        end = 0
        for match in _NUMBER.finditer(text):
            if run and text[end : match.start()].strip() not in separators:
                yield run
                run = []
            run.append(match[0])
            end = match.end()
        yield run


def _place_box(bins: Sequence[float], n_bins: int, width: float, height: float) -> BoxXYXY:
    """Two corners in bins -> pixels."""
    x1, y1 = _place_point(bins[:2], n_bins, width, height)
    x2, y2 = _place_point(bins[2:], n_bins, width, height)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _place_point(bins: Sequence[float], n_bins: int, width: float, height: float) -> PointXY:
    """A point in bins -> pixels, clipped to the image."""
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        raise DataError(f"decoding a location: the image is {width} x {height}, a positive width and height is needed")
    x, y = (max(0.0, min(float(n_bins), b)) for b in bins)
    return x * float(width) / n_bins, y * float(height) / n_bins
