"""The forms in which boxes come: COCO files, folders of YOLO labels, rows of normalised corners.

YOLO and normalised corners are shares of the image's width and height, so the size of every image has to come from
somewhere: the images themselves, a COCO file of the same images, or a list of sizes. Pixels are rounded to the
hundredth, the precision in which COCO writes them, so that labels made from a COCO file give back its boxes. Neither
form knows crowd regions: where one was left out, its category can look unique, or absent.
"""

import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from PIL import Image

from locvlm.data.coco import (
    CLIPPED,
    EXCLUDED,
    Instances,
    decode_json,
    mend_box,
    read_bytes,
    read_instances,
    refuse_if_most_skipped,
    whole,
)
from locvlm.errors import DataError
from locvlm.pixels import ImageSource, open_images
from locvlm.records import BoxXYXY, ImageRecord, ObjectRecord, encodable, leads_out, write_json

NO_LABELS = "image without labels"

_NO_SIZE = "labels of an image whose size is not known"
_NOT_TEXT = "label file that is not text"
_BAD_ROW = "row that does not have the form {id, image, instances}"
_SAME_IMAGE = "image that occurred before"
_BAD_LABEL = "label without a class"
_NO_CLASS = "label of an unknown class"
_NOT_SHARES = "box beyond the image: not shares of its width and height"
_IMAGE_FAULTS = (_NO_SIZE, _NOT_TEXT, _BAD_ROW, _SAME_IMAGE)

_FIRST_LINE = 1 << 20
_DECODING_FAULTS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_SLACK = 0.01  # what rounding may put beyond the border

_Size = tuple[int, int]
_Things = list[tuple[str, BoxXYXY]]  # category and corners as shares


def read_annotations(
    path: Path,
    *,
    exclude: Collection[int] = frozenset(),
    images: Path | None = None,
    sizes: Path | None = None,
    class_names: Path | None = None,
) -> Instances:
    """Annotated images in whichever form `path` has, told by its content; `exclude` holds image ids to leave out.

    - A COCO instances file: see `read_instances`; the other arguments are not used.
    - A folder of YOLO labels: a text file an image with lines `class cx cy w h`, shares of the image's size.
    - JSON lines {"id", "image", "instances": [{"category", "bbox": [x1, y1, x2, y2]}]}, again shares (the form in which
      LLaVA showed boxes to GPT-4); a row may have `width` and `height`.

    For the last two `sizes` (a COCO file of the same images, or JSON {"file name": [width, height]}) or else the image
    files of the folder `images` say how large an image is. `class_names` lists the classes: a name a line, a YOLO
    data.yaml, or a COCO file, whose categories are numbered in the order of their ids. Without it the classes are those
    of `sizes`, if that is a COCO file, or for JSON lines the categories that occur. An image has the id that `sizes`
    gives it, else the number its name ends in, else, where these are not different, its place in the order of names.
    Objects are numbered through in that order.

    Raises DataError as `read_instances`, and when sizes or classes are missing.
    """
    form = _form_of(path)
    if form == "coco":
        return read_instances(path, exclude=exclude)
    known = _Known.read(path, images, sizes)
    listed = known.classes if class_names is None else _class_names(class_names)
    if form == "yolo" and not listed:
        raise DataError(
            f"reading the labels {path}: nothing says what their class numbers mean; give names a line, a data.yaml "
            "or a COCO file with --class-names, or a COCO file with --sizes"
        )
    found = _Found()
    if form == "yolo":
        _read_labels(path, known, listed, found)
    else:
        _read_rows(path, known, set(listed), found)
    refuse_if_most_skipped(path, "images", {r: found.skipped[r] for r in _IMAGE_FAULTS}, found.n_images)
    if not found.images:
        raise DataError(f"reading {path}: it holds no labels of an image")
    instances = found.instances(known, exclude)
    faults = {reason: n for reason, n in instances.skipped.items() if reason not in _IMAGE_FAULTS}
    refuse_if_most_skipped(path, "boxes", faults, found.n_boxes)
    if class_names is None and form == "rows" and not known.classes:
        listed = sorted({thing.category for image in instances.images for thing in image.objects})
    instances.categories = listed
    return instances


def is_coco(path: Path) -> bool:
    """Whether `read_annotations` takes `path` for a COCO file. Raises DataError when it cannot be read."""
    return _form_of(path) == "coco"


def write_coco(path: Path, instances: Instances) -> None:
    """`instances` as a COCO file, categories numbered from 1. Boxes of zero size are written as such."""
    numbers = {name: number for number, name in enumerate(instances.categories, 1)}
    annotations = []
    for image in instances.images:
        for thing in image.objects:
            x1, y1, x2, y2 = thing.box_xyxy
            width, height = round(x2 - x1, 2), round(y2 - y1, 2)
            head = {"id": thing.id, "image_id": image.id, "category_id": numbers[thing.category]}
            size = {"bbox": [x1, y1, width, height], "area": width * height, "iscrowd": int(thing.is_crowd)}
            annotations.append(head | size)
    images = [
        {"id": image.id, "file_name": image.file_name, "width": image.width, "height": image.height}
        for image in instances.images
    ]
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    write_json(path, {"images": images, "annotations": annotations, "categories": categories})


@dataclass(slots=True)
class _Known:
    """What is known of images beside their labels. `names`: file names by stem, full and last part alone (empty where
    several share it). `sizes` and `ids` by file name; `source` finds sizes that are not in `sizes`."""

    names: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, _Size] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    source: ImageSource | None = None

    @classmethod
    def read(cls, path: Path, images: Path | None, sizes: Path | None) -> "_Known":
        known = cls()
        if sizes is not None:
            known._read_sizes(sizes)
        elif images is not None:
            known.source = open_images(images)
            known._name(known.source.names())
        elif path.is_dir():
            raise DataError(
                f"reading the labels {path}: they are shares of the images' sizes, and nothing says these; give the "
                "images with --images, or a COCO file or a list of sizes with --sizes"
            )
        return known

    def _read_sizes(self, path: Path) -> None:
        value = decode_json(path, read_bytes(path))
        if isinstance(value, dict) and isinstance(value.get("images"), list):
            instances = read_instances(path)
            self.classes = instances.categories
            self.sizes = {image.file_name: (image.width, image.height) for image in instances.images}
            self.ids = {image.file_name: image.id for image in instances.images}
        elif isinstance(value, dict) and all(map(_as_size, value.values())):
            self.sizes = {name: size for name, pair in value.items() if (size := _as_size(pair))}
        else:
            raise DataError(
                f'reading the sizes {path}: needed is a COCO file, or JSON {{"file name": [width, height]}} in pixels'
            )
        self._name(self.sizes)

    def _name(self, names: Iterable[str]) -> None:
        for name in names:
            stem = PurePosixPath(name).with_suffix("")
            self.names[stem.as_posix()] = name
            if stem.name != stem.as_posix():
                self.names[stem.name] = "" if stem.name in self.names else name

    def size(self, name: str) -> _Size | None:
        """Width and height in pixels."""
        if self.source is None:
            return self.sizes.get(name)
        try:
            with self.source.stream(name) as file, Image.open(file) as image:
                return image.size
        except _DECODING_FAULTS:
            return None

    def name_of(self, stem: str) -> str:
        """The image that labels of this name are about; empty if there is none."""
        return self.names.get(stem) or self.names.get(PurePosixPath(stem).name, "")


@dataclass(slots=True)
class _Found:
    """What was read: file name -> size and things."""

    images: dict[str, tuple[_Size, _Things]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    n_images: int = 0
    n_boxes: int = 0

    def add(self, name: str, size: _Size | None, things: _Things) -> None:
        if size is None:
            self.skipped[_NO_SIZE] += 1
        elif name in self.images:
            self.skipped[_SAME_IMAGE] += 1
        else:
            self.images[name] = (size, things)

    def instances(self, known: _Known, exclude: Collection[int]) -> Instances:
        """Without the categories."""
        ids = known.ids if known.ids.keys() >= self.images.keys() else _numbered(self.images)
        records: list[ImageRecord] = []
        n_objects = 0
        for name in sorted(self.images, key=lambda name: ids[name]):
            (width, height), things = self.images[name]
            objects = []
            for category, shares in things:
                n_objects += 1
                objects.append(ObjectRecord(n_objects, category, self._pixels(shares, width, height)))
            if ids[name] not in exclude:
                records.append(ImageRecord(ids[name], name, width, height, tuple(objects)))
        if n := len(self.images) - len(records):
            self.notes[EXCLUDED] = n
        return Instances(records, [], self.skipped, self.notes)

    def _pixels(self, shares: BoxXYXY, width: int, height: int) -> BoxXYXY:
        x1, y1, x2, y2 = shares
        if min(shares) < -_SLACK or max(shares) > 1 + _SLACK:
            self.skipped[_NOT_SHARES] += 1
            return (0.0, 0.0, 0.0, 0.0)
        left, top = round(x1 * width, 2), round(y1 * height, 2)
        # corner plus side, as for a COCO box, so that the last bit is the same
        box = (left, top, left + round((x2 - x1) * width, 2), top + round((y2 - y1) * height, 2))
        if 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height:
            return box
        mended, fault = mend_box(box, width, height)
        (self.notes if fault == CLIPPED else self.skipped)[fault] += 1
        return mended


def _form_of(path: Path) -> str:
    """coco, yolo or rows."""
    if path.is_dir():
        if next(path.rglob("*.txt"), None) is None:
            raise DataError(f"reading {path}: this is a folder without *.txt label files, and no COCO file either")
        return "yolo"
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            line = (gzip.GzipFile(fileobj=file) if packed else file).readline(_FIRST_LINE)
        value = json.loads(line)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error):
        return "coco"  # its reader says what is wrong, if anything is
    return "rows" if isinstance(value, dict) and "instances" in value else "coco"


def _read_labels(folder: Path, known: _Known, classes: Sequence[str], found: _Found) -> None:
    files = sorted(path for path in folder.rglob("*.txt") if path.is_file())
    for path in files:
        found.n_images += 1
        name = known.name_of(path.relative_to(folder).with_suffix("").as_posix())
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            found.skipped[_NOT_TEXT] += 1
            continue
        things = []
        for line in lines:
            if not line.strip():
                continue
            found.n_boxes += 1
            label = _label(line, classes)
            if isinstance(label, str):
                found.skipped[label] += 1
            else:
                things.append(label)
        found.add(name, known.size(name) if name else None, things)
    without = len(set(known.names.values()) - {""}) - len(found.images)
    if without > 0:
        found.notes[NO_LABELS] = without


def _label(line: str, classes: Sequence[str]) -> tuple[str, BoxXYXY] | str:
    """Category and corners of one line (NaN if it has none), or what is wrong with it."""
    code, *words = line.split()
    if not (code.isascii() and code.isdigit()):
        return _BAD_LABEL
    if len(code) > 9 or int(code) >= len(classes):
        return _NO_CLASS
    try:
        cx, cy, w, h = map(float, words)
    except ValueError:
        cx = cy = w = h = math.nan
    return classes[int(code)], (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)


def _read_rows(path: Path, known: _Known, classes: Collection[str], found: _Found) -> None:
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        found.n_images += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise DataError(f"reading {path}: line {number} is not valid JSON ({str(fault)[:200]})") from None
        name = row.get("image") if isinstance(row, dict) else None
        entries = row.get("instances") if isinstance(row, dict) else None
        if not isinstance(name, str) or leads_out(name) or not isinstance(entries, list):
            found.skipped[_BAD_ROW] += 1
            continue
        things = []
        for entry in entries:
            found.n_boxes += 1
            thing = _instance(entry, classes)
            if isinstance(thing, str):
                found.skipped[thing] += 1
            else:
                things.append(thing)
        size = _as_size([row.get("width"), row.get("height")])
        found.add(name, size or known.size(name) or known.size(known.name_of(_stem(name))), things)
    if found.skipped[_NO_SIZE] and not found.images and not (known.sizes or known.source):
        raise DataError(
            f"reading {path}: its boxes are shares of the images' sizes, and nothing says these; give the images with "
            "--images, or a COCO file or a list of sizes with --sizes"
        )


def _instance(entry: Any, classes: Collection[str]) -> tuple[str, BoxXYXY] | str:
    category = entry.get("category") if isinstance(entry, dict) else None
    box = entry.get("bbox") if isinstance(entry, dict) else None
    if not isinstance(category, str) or not category or not encodable(category):
        return _BAD_LABEL
    if classes and category not in classes:
        return _NO_CLASS
    if not isinstance(box, list) or len(box) != 4 or any(type(number) not in (int, float) for number in box):
        return category, (math.nan, math.nan, math.nan, math.nan)
    x1, y1, x2, y2 = (float(min(max(number, -9), 9)) for number in box)  # a whole number may be beyond any float
    return category, (x1, y1, x2, y2)


def _class_names(path: Path) -> list[str]:
    """The names of the classes, by number."""
    data = read_bytes(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise DataError(f"reading the class names {path}: not text ({fault}); needed is a name a line") from None
    if text.lstrip().startswith("{"):
        return read_instances(path).categories
    names: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix in (".yaml", ".yml"):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as fault:
            raise DataError(f"reading the class names {path}: not valid YAML ({fault})") from None
        names = value.get("names") if isinstance(value, dict) else None
        if isinstance(names, dict) and sorted(names) == list(range(len(names))):
            names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or len({str(name) for name in names}) < len(names):
        raise DataError(
            f"reading the class names {path}: needed are different names, one a line, or in a .yaml file the list or "
            "the numbered table `names`"
        )
    return [str(name) for name in names]


def _as_size(value: Any) -> _Size | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    width, height = map(whole, value)
    return (width, height) if width and height and 0 < width < 2**31 and 0 < height < 2**31 else None


def _numbered(names: Mapping[str, object]) -> dict[str, int]:
    """An id for each image: the number that its name ends in, or its place where these are not different."""
    found = {name: re.search(r"(\d{1,18})$", _stem(name)) for name in names}
    ids = {name: int(match[1]) for name, match in found.items() if match}
    if len(set(ids.values())) == len(names):
        return ids
    return {name: number for number, name in enumerate(sorted(names), 1)}


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
