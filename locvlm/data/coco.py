"""COCO annotation files -> image records, the unique-object filter, absent categories.

`segmentation` and every other field that nothing here reads is skipped by the decoder and never becomes an object.
"""

import gc
import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from locvlm.errors import DataError
from locvlm.records import BoxXYXY, ImageRecord, ObjectRecord

CrowdRule = Literal["counts", "ignored", "singleton_ok", "ignored_singleton_ok"]

CLIPPED = "box partly outside the image: clipped"
EXCLUDED = "image excluded on request"

_BAD_IMAGE = "image record without a whole-number id, a file_name, a width or a height"
_BAD_NAME = "image file name that leads out of the image folder"
_BAD_SIZE = "image of zero or negative size"
_SAME_IMAGE = "image id that occurred before"
_BAD_ANNOTATION = "annotation record without a whole-number id, image_id or category_id"
_SAME_ANNOTATION = "annotation id that occurred before"
_NO_IMAGE = "annotation of an unknown image"
_SKIPPED_IMAGE = "annotation of a skipped image"
_NO_CATEGORY = "annotation of an unknown category id"
_NO_BOX = "box that is not four finite numbers"
_EMPTY_BOX = "box of zero or negative size"
_OUTSIDE = "box wholly outside the image"
_IMAGE_FAULTS = (_BAD_IMAGE, _BAD_NAME, _BAD_SIZE, _SAME_IMAGE)
_ANNOTATION_FAULTS = (
    _BAD_ANNOTATION,
    _SAME_ANNOTATION,
    _NO_IMAGE,
    _SKIPPED_IMAGE,
    _NO_CATEGORY,
    _NO_BOX,
    _EMPTY_BOX,
    _OUTSIDE,
)

_NAN_BOX: BoxXYXY = (math.nan, math.nan, math.nan, math.nan)
_NEEDED = (
    "needed is a COCO instances file: an object with the lists images [{id, file_name, width, height}], "
    "annotations [{id, image_id, category_id, bbox [x, y, w, h]}] and categories [{id, name}]"
)


@dataclass(slots=True)
class Instances:
    """A COCO instances file as records.

    `images` ascend by image id, their objects by annotation id; boxes are `(x1, y1, x2, y2)` pixels inside the image.
    `categories`: names in the order of the category ids. `skipped`: reason -> number of records that cannot be used.
    `notes`: reason -> number of records that were used, but not as they stood (clipped boxes), or left out on request.

    An annotation whose box cannot be used is skipped as a place, not as a fact: its object stays in the image with a
    box of zero size, so that it still counts when instances are counted and its category is never called absent.
    """

    images: list[ImageRecord]
    categories: list[str]
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int | bool = 0


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def read_instances(path: Path, *, exclude: Collection[int] = frozenset()) -> Instances:
    """Read a COCO instances file (JSON, plain or gzip); `exclude` holds image ids to leave out.

    A faulty record is skipped and counted by reason. Raises DataError when the file cannot be read, is not a COCO
    instances file, has no image or category, or when more than half of its images or annotations are faulty.
    """
    data = read_bytes(path)
    skipped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    with _collector_paused():
        try:
            file = msgspec.json.decode(data, type=_File)
            n_images, n_annotations = len(file.images), len(file.annotations)
        except msgspec.DecodeError:  # somewhere a record is out of the ordinary; find out which
            file, n_images, n_annotations = _decode_record_by_record(path, data, skipped)
        del data
        names = _category_names(path, file.categories)
        if n_images == 0:
            raise DataError(f"reading {path}: the list of images is empty; {_NEEDED}")
        images, dropped = _usable_images(file.images, skipped)
        refuse_if_most_skipped(path, "images", {r: skipped[r] for r in _IMAGE_FAULTS}, n_images)
        objects = _objects_by_image(file.annotations, images, dropped, names, exclude, skipped, notes)
        refuse_if_most_skipped(path, "annotations", {r: skipped[r] for r in _ANNOTATION_FAULTS}, n_annotations)
        records = [
            ImageRecord(image.id, image.file_name, image.width, image.height, tuple(sorted(objects[image.id], key=_id)))
            for image in sorted(images.values(), key=_id)
            if image.id not in exclude
        ]
    if len(records) < len(images):
        notes[EXCLUDED] = len(images) - len(records)
    categories = list(dict.fromkeys(names[key] for key in sorted(names)))
    return Instances(records, categories, skipped, notes)


def usable_objects(image: ImageRecord, crowd: CrowdRule = "counts") -> list[ObjectRecord]:
    """The objects that their category name alone picks out: exactly one annotation of the category in the image, a box
    of positive size, and no crowd region (paper, section 4.1). `crowd` is `InstructConfig.crowd`:

    - counts: a crowd region counts as an instance and is never usable;
    - ignored: a crowd region does not count and is never usable;
    - singleton_ok: as `counts`, but a crowd region that is the only instance is usable;
    - ignored_singleton_ok: as `ignored`, but a crowd region that is the only annotation of its category is usable.
    """
    ignored = crowd in ("ignored", "ignored_singleton_ok")
    lone_crowd = crowd in ("singleton_ok", "ignored_singleton_ok")
    n_all = Counter(thing.category for thing in image.objects)
    n_single = Counter(thing.category for thing in image.objects if not thing.is_crowd) if ignored else n_all
    usable = []
    for thing in image.objects:
        n = n_all[thing.category] if thing.is_crowd else n_single[thing.category]
        x1, y1, x2, y2 = thing.box_xyxy
        if n == 1 and (lone_crowd or not thing.is_crowd) and x2 > x1 and y2 > y1:
            usable.append(thing)
    return usable


def absent_categories(image: ImageRecord, categories: Iterable[str]) -> list[str]:
    """The categories, in the given order, of which the image has no annotation of any kind, crowd regions included."""
    present = {thing.category for thing in image.objects}
    return [name for name in categories if name not in present]


def leads_out(file_name: str) -> bool:
    """Whether a file name of a dataset would leave the folder it is relative to, or cannot be a file name at all."""
    if file_name.isascii() and file_name.replace("_", "").replace(".", "", 1).isalnum():
        return False  # the common case: one plain component
    if not file_name or "\0" in file_name or "\\" in file_name or not _encodable(file_name):
        return True
    name = PurePosixPath(file_name)
    return name.is_absolute() or ".." in name.parts or not name.parts


def safe_image_path(images_dir: Path, file_name: str) -> Path:
    """`images_dir / file_name`. Raises DataError for a name that leads out of `images_dir`."""
    if leads_out(file_name):
        raise DataError(
            f"opening the image {file_name!r} in {images_dir}: the name leads out of the folder; needed are relative "
            "names with forward slashes and without '..'"
        )
    return images_dir / file_name


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, unpacked if it is gzip (told by its content). Raises DataError that names the file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"reading {path}: there is no such file") from None
    except IsADirectoryError:
        raise DataError(f"reading {path}: this is a folder, a JSON file was needed") from None
    except OSError as error:
        raise DataError(f"reading {path}: {error.strerror or error}") from None
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
            raise DataError(
                f"unpacking {path}: {fault}; the gzip file is cut short or damaged, copy or download it again"
            ) from None
    return data.removeprefix(b"\xef\xbb\xbf")


def decode_json(path: Path, data: bytes) -> Any:
    """Any JSON value from the bytes of the file `path`. Raises DataError that names the file and the fault."""
    try:
        return json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise DataError(
            f"reading {path}: not valid JSON ({fault}); the file may be cut short, copy or download it again"
        ) from None
    except RecursionError:
        raise DataError(f"reading {path}: not a COCO file, it is nested too deeply; {_NEEDED}") from None


def whole(value: Any) -> int | None:
    """`value` as an int if it is a whole number (640 and 640.0), else None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None


def refuse_if_most_skipped(path: Path, noun: str, faults: Mapping[str, int], total: int) -> None:
    """Raises DataError with the reasons when more than half of `total` records were skipped for `faults`."""
    n = sum(faults.values())
    if 2 * n <= total:
        return
    reasons = "\n".join(f"  - {reason}: {count}" for reason, count in sorted(faults.items()) if count)
    raise DataError(
        f"reading {path}: {n} of {total} {noun} cannot be used, so the file does not fit\n{reasons}\n"
        "check that it is the file you meant, and that the files you gave belong together"
    )


def _usable_images(images: list[_Image], skipped: Counter[str]) -> tuple[dict[int, _Image], set[int]]:
    """The images by id, and the ids of those that were skipped."""
    usable: dict[int, _Image] = {}
    dropped: set[int] = set()
    for image in images:
        if image.id in usable or image.id in dropped:
            skipped[_SAME_IMAGE] += 1
        elif image.width <= 0 or image.height <= 0:
            skipped[_BAD_SIZE] += 1
            dropped.add(image.id)
        elif leads_out(image.file_name):
            skipped[_BAD_NAME] += 1
            dropped.add(image.id)
        else:
            usable[image.id] = image
    return usable, dropped


def _objects_by_image(
    annotations: list[_Annotation],
    images: Mapping[int, _Image],
    dropped: Collection[int],
    names: Mapping[int, str],
    exclude: Collection[int],
    skipped: Counter[str],
    notes: Counter[str],
) -> dict[int, list[ObjectRecord]]:
    """The objects of every image in file order; empties `annotations` on the way, so that memory is not held twice."""
    places: dict[int, tuple[int, int, list[ObjectRecord]]] = {
        image.id: (image.width, image.height, []) for image in images.values()
    }
    seen: set[int] = set()
    annotations.reverse()
    while annotations:
        annotation = annotations.pop()
        place = places.get(annotation.image_id)
        if place is None:
            skipped[_SKIPPED_IMAGE if annotation.image_id in dropped else _NO_IMAGE] += 1
            continue
        if annotation.image_id in exclude:
            continue
        name = names.get(annotation.category_id)
        if name is None:
            skipped[_NO_CATEGORY] += 1
            continue
        if annotation.id in seen:
            skipped[_SAME_ANNOTATION] += 1
            continue
        seen.add(annotation.id)
        width, height, objects = place
        x1, y1, w, h = annotation.bbox
        x2, y2 = x1 + w, y1 + h
        if 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height:
            box = (x1, y1, x2, y2)
        else:
            box, fault = _mend_box((x1, y1, x2, y2), width, height)
            (notes if fault == CLIPPED else skipped)[fault] += 1
        objects.append(ObjectRecord(annotation.id, name, box, bool(annotation.iscrowd)))
    return {image_id: objects for image_id, (_, _, objects) in places.items()}


def _mend_box(box: BoxXYXY, width: int, height: int) -> tuple[BoxXYXY, str]:
    """The part of the box inside the image, of zero size if there is none, and what was wrong with the box."""
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)):
        return (0.0, 0.0, 0.0, 0.0), _NO_BOX
    inside = (
        min(max(x1, 0.0), float(width)),
        min(max(y1, 0.0), float(height)),
        min(max(x2, 0.0), float(width)),
        min(max(y2, 0.0), float(height)),
    )
    if x2 <= x1 or y2 <= y1:
        return (inside[0], inside[1], inside[0], inside[1]), _EMPTY_BOX
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return (inside[0], inside[1], inside[0], inside[1]), _OUTSIDE
    return inside, CLIPPED


def _category_names(path: Path, categories: list[_Category]) -> dict[int, str]:
    names: dict[int, str] = {}
    for category in categories:
        if not category.name:
            raise DataError(f"reading {path}: category id {category.id} has an empty name; every category needs one")
        if names.setdefault(category.id, category.name) != category.name:
            raise DataError(
                f"reading {path}: category id {category.id} is both {names[category.id]!r} and {category.name!r}; "
                "every category id needs one name"
            )
    if not names:
        raise DataError(f"reading {path}: the list of categories is empty; {_NEEDED}")
    return names


def _decode_record_by_record(path: Path, data: bytes, skipped: Counter[str]) -> tuple[_File, int, int]:
    """The slow way, for files with a record that the typed decoder refuses; returns also how many there were."""
    value = decode_json(path, data)
    if not isinstance(value, dict):
        raise DataError(f"reading {path}: found a {_kind(value)} at the top; {_NEEDED}")
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(value.get(key), list)]
    if missing:
        found = ", ".join(sorted(map(str, value))[:8]) or "no key"
        raise DataError(f"reading {path}: there is no list {' or '.join(missing)} (found {found}); {_NEEDED}")
    categories = [_category(path, record) for record in value["categories"]]
    images = [_image(record) for record in value["images"]]
    annotations = [_annotation(record) for record in value["annotations"]]
    if n := images.count(None):
        skipped[_BAD_IMAGE] = n
    if n := annotations.count(None):
        skipped[_BAD_ANNOTATION] = n
    file = _File([i for i in images if i is not None], [a for a in annotations if a is not None], categories)
    return file, len(images), len(annotations)


def _category(path: Path, record: Any) -> _Category:
    key = whole(record.get("id")) if isinstance(record, dict) else None
    name = record.get("name") if isinstance(record, dict) else None
    if key is None or not isinstance(name, str) or not _encodable(name):
        raise DataError(f"reading {path}: category {str(record)[:80]} has no whole-number id or no name; {_NEEDED}")
    return _Category(key, name)


def _image(record: Any) -> _Image | None:
    if not isinstance(record, dict):
        return None
    key, width, height = (whole(record.get(name)) for name in ("id", "width", "height"))
    file_name = record.get("file_name")
    if key is None or width is None or height is None or not isinstance(file_name, str):
        return None
    return _Image(key, file_name, width, height)


def _annotation(record: Any) -> _Annotation | None:
    if not isinstance(record, dict):
        return None
    key, image, category = (whole(record.get(name)) for name in ("id", "image_id", "category_id"))
    if key is None or image is None or category is None:
        return None
    return _Annotation(key, image, category, _box(record.get("bbox")), bool(record.get("iscrowd")))


def _box(value: Any) -> BoxXYXY:
    if not isinstance(value, list) or len(value) != 4:
        return _NAN_BOX
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        return _NAN_BOX
    try:
        x, y, w, h = map(float, value)
    except OverflowError:  # a whole number beyond the range of a float
        return _NAN_BOX
    return (x, y, w, h)


def _id(record: _Image | ObjectRecord) -> int:
    return record.id


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No cyclic garbage is made here, and a million small records would be walked again and again for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
