"""Panoptic segmentation -> boxes: the COCO categories, what a segmenter is, id maps, COCO-panoptic PNG + JSON files.

An id map is an integer array [height, width] with the segment id of every pixel; an id without a label (0 as a rule) is
no segment. A stuff category is one segment an image. The box of a segment spans its pixels: x1, y1 = first column and
row, x2, y2 = last column and row + 1 (paper, section 3.4; the boxes of Pseudo-ActNet).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from locvlm.data.coco import decode_json, read_bytes, whole
from locvlm.errors import CheckpointError, DataError
from locvlm.pixels import open_image
from locvlm.records import BoxXYXY, encodable, leads_out

IdMap = npt.NDArray[np.int32]

MIN_SHARE = 0.001  # of the image's area; a smaller segment gives no box

# The 133 COCO panoptic categories in the order of their ids, without the suffixes -merged, -other and -stuff.
THINGS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
STUFF = (
    "banner", "blanket", "bridge", "cardboard", "counter", "curtain", "door", "floor-wood", "flower", "fruit",
    "gravel", "house", "light", "mirror", "net", "pillow", "platform", "playingfield", "railroad", "river", "road",
    "roof", "sand", "sea", "shelf", "snow", "stairs", "tent", "towel", "wall-brick", "wall-stone", "wall-tile",
    "wall-wood", "water", "window-blind", "window", "tree", "fence", "ceiling", "sky", "cabinet", "table", "floor",
    "pavement", "mountain", "grass", "dirt", "paper", "food", "building", "rock", "wall", "rug",
)  # fmt: skip
CATEGORIES = THINGS + STUFF

_IS_THING = frozenset(THINGS)
_NEEDED = (
    "needed is a COCO panoptic file: an object with the lists images [{id, width, height}], annotations [{image_id, "
    "file_name, segments_info: [{id, category_id, iscrowd}]}] and categories [{id, name}]"
)


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment. `box_xyxy` in pixels, `area` in pixels; `is_crowd` marks a COCO crowd region (many things)."""

    category: str
    is_thing: bool
    box_xyxy: BoxXYXY
    area: int
    is_crowd: bool = False


@dataclass(frozen=True, slots=True)
class Label:
    """What a segment id of an id map stands for."""

    category: str
    is_crowd: bool = False


@dataclass(frozen=True, slots=True)
class PanopticImage:
    """One image of a COCO panoptic file: the PNG of its id map, and the label of every segment id."""

    id: int
    file_name: str
    width: int
    height: int
    labels: Mapping[int, Label]


class Segmenter(Protocol):
    """A panoptic segmentation model. `label_names`: every name that it may give a segment, as the model writes it."""

    @property
    def label_names(self) -> Sequence[str]: ...  # noqa: D102

    def segment(self, images: Sequence[Image.Image]) -> Sequence[tuple[IdMap, Mapping[int, str]]]:
        """The id map of every RGB image, as large as the image, and the name of every segment id in it."""
        ...


def clean_category(name: str) -> str:
    """A COCO panoptic name without its suffixes: "wall-other-merged" -> "wall"."""
    return re.sub(r"(-(merged|other|stuff))+$", "", name)


def check_label_names(names: Iterable[str], origin: str) -> None:
    """Raises CheckpointError unless the names, cleaned, are the 133 COCO panoptic categories; `origin` says whose.

    A smaller vocabulary would call a category absent that the model cannot see, so every one is needed.
    """
    found = {clean_category(name) for name in names}
    unknown, missing = sorted(found - set(CATEGORIES)), sorted(set(CATEGORIES) - found)
    if unknown or missing:
        faults = [f"{len(some)} {kind} ({', '.join(some[:4])})" for kind, some in
                  (("unknown", unknown), ("missing", missing)) if some]  # fmt: skip
        raise CheckpointError(
            f"using the segmenter {origin}: its labels are not the 133 COCO panoptic categories: {', '.join(faults)}; "
            "use a model trained for COCO panoptic segmentation"
        )


def segment_boxes(id_map: IdMap, labels: Mapping[int, Label]) -> list[Segment]:
    """The segments of an id map [height, width] in the order of `labels`; ids without a pixel give none, and all of a
    stuff category are one segment at the place of the first."""
    segments: dict[int | str, Segment] = {}
    places = _extents(id_map, list(labels))
    for (key, label), (x1, y1, x2, y2, area) in zip(labels.items(), places.tolist(), strict=True):
        if not area:
            continue
        is_thing = label.category in _IS_THING
        box: BoxXYXY = (float(x1), float(y1), float(x2), float(y2))
        segment = Segment(label.category, is_thing, box, area, label.is_crowd)
        group = key if is_thing else label.category
        segments[group] = _joined(segments[group], segment) if group in segments else segment
    return list(segments.values())


def large_segments(segments: Iterable[Segment], width: int, height: int, min_share: float = MIN_SHARE) -> list[Segment]:
    """The segments whose area is at least `min_share` of a width x height image."""
    return [segment for segment in segments if segment.area >= min_share * width * height]


def read_panoptic(path: Path) -> list[PanopticImage]:
    """The images of a COCO panoptic JSON file (plain or gzip), ascending by image id.

    Raises DataError when the file cannot be read, is not a COCO panoptic file, or holds a record that cannot be used:
    a category outside the 133, a segment without an id, two records of one image.
    """
    value = decode_json(path, read_bytes(path))
    lists = [value.get(key) if isinstance(value, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(records, list) for records in lists):
        raise DataError(f"reading {path}: not a COCO panoptic file; {_NEEDED}")
    try:
        names = {_number(c["id"]): _category(c["name"]) for c in lists[2] or ()}
        sizes = {_number(i["id"]): (_number(i["width"]), _number(i["height"])) for i in lists[0] or ()}
        images = [_image(record, sizes, names) for record in lists[1] or ()]
    except (KeyError, TypeError, ValueError) as fault:
        raise DataError(f"reading {path}: a record cannot be used ({_reason(fault)}); {_NEEDED}") from None
    if not images or len({image.id for image in images}) < len(images):
        found = "two annotations have one image_id" if images else "the list of annotations is empty"
        raise DataError(f"reading {path}: {found}; {_NEEDED}")
    return sorted(images, key=lambda image: image.id)


def read_id_map(image: PanopticImage, folder: Path) -> IdMap:
    """The id map of an image from its PNG in `folder`: id = R + 256 G + 65536 B.

    Raises DataError when the PNG is missing, does not decode, is not RGB or has another size than the file says.
    """
    path = folder / image.file_name
    png = open_image(path)
    if png.mode not in ("RGB", "RGBA") or png.size != (image.width, image.height):
        raise DataError(
            f"reading the id map {path}: found a {png.mode} image of {png.width} x {png.height}; needed is RGB, "
            f"{image.width} x {image.height}, with id = R + 256 G + 65536 B"
        )
    pixels = np.asarray(png)
    ids = pixels[..., 2].astype(np.int32)
    for channel in (1, 0):
        ids <<= 8
        ids |= pixels[..., channel]
    return ids


def _extents(id_map: IdMap, ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """[len(ids), 5]: x1, y1, x2, y2 and area of each id; area 0 for one without a pixel.

    An image is a few thousand horizontal runs of equal ids, so everything after the first pass is small.
    """
    extents = np.zeros((len(ids), 5), np.int64)
    height, width = id_map.shape
    if not ids or not id_map.size:
        return extents
    is_start = np.ones((height, width), bool)
    np.not_equal(id_map[:, 1:], id_map[:, :-1], out=is_start[:, 1:])
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=id_map.size)
    run_ids = id_map.reshape(-1)[starts]
    wanted = np.asarray(ids, np.int64)
    order = np.argsort(wanted)
    rank = np.searchsorted(wanted[order], run_ids).clip(max=len(ids) - 1)
    place = order[rank]
    runs = np.flatnonzero(wanted[place] == run_ids)
    runs = runs[np.argsort(place[runs], kind="stable")]
    if not len(runs):
        return extents
    groups, first = np.unique(place[runs], return_index=True)
    rows, columns = np.divmod(starts[runs], width)
    extents[groups, 0] = np.minimum.reduceat(columns, first)
    extents[groups, 1] = np.minimum.reduceat(rows, first)
    extents[groups, 2] = np.maximum.reduceat(columns + lengths[runs], first)
    extents[groups, 3] = np.maximum.reduceat(rows, first) + 1
    extents[groups, 4] = np.add.reduceat(lengths[runs], first)
    return extents


def _joined(a: Segment, b: Segment) -> Segment:
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box_xyxy, b.box_xyxy
    box = (min(ax1, bx1), min(ay1, by1), max(ax2, bx2), max(ay2, by2))
    return Segment(a.category, a.is_thing, box, a.area + b.area, a.is_crowd or b.is_crowd)


def _image(record: Any, sizes: Mapping[int, tuple[int, int]], names: Mapping[int, str]) -> PanopticImage:
    key, file_name = _number(record["image_id"]), record["file_name"]
    if not isinstance(file_name, str) or leads_out(file_name):
        raise ValueError(f"file_name {file_name!r} leads out of the folder")
    if min(sizes[key]) < 1:
        raise ValueError(f"image {key} has no size")
    segments = record["segments_info"]
    labels = {_number(s["id"]): Label(names[_number(s["category_id"])], bool(s.get("iscrowd"))) for s in segments}
    if len(labels) < len(segments) or any(not 0 < number < 1 << 24 for number in labels):
        raise ValueError(f"the segment ids of image {key} are not different numbers from 1 to 2^24 - 1")
    return PanopticImage(key, file_name, *sizes[key], labels)


def _category(name: Any) -> str:
    if not isinstance(name, str) or not encodable(name) or clean_category(name) not in CATEGORIES:
        raise ValueError(f"{name!r} is not one of the 133 COCO panoptic categories")
    return clean_category(name)


def _number(value: Any) -> int:
    number = whole(value)
    if number is None:
        raise ValueError(f"{value!r} is not a whole number")
    return number


def _reason(fault: Exception) -> str:
    return f"no {fault.args[0]!r}" if isinstance(fault, KeyError) else str(fault)
