"""COCO annotation files -> image records, the unique-object filter, absent categories.

`segmentation` and every other field that nothing here reads is skipped by the decoder and never becomes an object.
"""

import gc
import gzip
import json
import math
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import msgspec
from PIL import Image

from locvlm.errors import DataError
from locvlm.records import BoxXYXY, ImageRecord, ObjectRecord, atomic_write

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

_MISSING_FILE = "image file that is missing"
_BAD_FILE = "image file that does not decode"
_OTHER_SIZE = "image file of another size than annotated"

_R = TypeVar("_R")

# what Pillow raises for damaged files
_DECODING_FAULTS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

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
    if crowd in ("counts", "singleton_ok"):
        usable = _singletons(image.objects)
    else:
        usable = _singletons([thing for thing in image.objects if not thing.is_crowd])
        if crowd == "ignored_singleton_ok":
            usable += [thing for thing in _singletons(image.objects) if thing.is_crowd]
            usable.sort(key=_id)
    return [thing for thing in usable if has_place(thing) and (crowd != "counts" or not thing.is_crowd)]


def _singletons(things: Iterable[ObjectRecord]) -> list[ObjectRecord]:
    """The things whose category occurs once, in their order."""
    first: dict[str, ObjectRecord] = {}
    repeated: set[str] = set()
    for thing in things:
        if first.setdefault(thing.category, thing) is not thing:
            repeated.add(thing.category)
    return [thing for category, thing in first.items() if category not in repeated]


def absent_categories(image: ImageRecord, categories: Iterable[str]) -> list[str]:
    """The categories, in the given order, of which the image has no annotation of any kind, crowd regions included."""
    present = {thing.category for thing in image.objects}
    return [name for name in categories if name not in present]


def check_images(
    images: Sequence[ImageRecord], folder: Path, on_done: Callable[[], object] = lambda: None
) -> tuple[list[ImageRecord], Counter[str]]:
    """Decode the file of every image in `folder`; returns the images that are sound, and reason -> number of others.

    A folder may hold a part of the images only: a missing file is a counted skip. `on_done` is called after each file.
    Raises DataError when `folder` is no folder, when none of its files is sound, or when more than half of the files
    that are there do not fit.
    """
    if not folder.is_dir():
        raise DataError(f"checking the images in {folder}: there is no such folder; needed is the folder of the images")
    sound: list[ImageRecord] = []
    skipped: Counter[str] = Counter()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter's lock
        for image, fault in zip(images, pool.map(lambda image: _file_fault(image, folder), images), strict=True):
            if fault:
                skipped[fault] += 1
            else:
                sound.append(image)
            on_done()
    there = {fault: n for fault, n in skipped.items() if fault != _MISSING_FILE}
    refuse_if_most_skipped(folder, "image files", there, len(images) - skipped[_MISSING_FILE])
    if images and not sound:
        raise DataError(
            f"checking the images in {folder}: it holds none of the {len(images)} images that the annotations name "
            f"(the first is {images[0].file_name}); give the folder that their file names are relative to"
        )
    return sound, skipped


def split_instances(path: Path, instances: Instances, folder: Path, is_test: Callable[[int], bool]) -> dict[str, int]:
    """Write the images of `instances`, which was read from `path`, as two COCO instances files: instances_train.json
    and instances_test.json in `folder`.

    `is_test` says of an image id where it goes. Records keep every field they had, polygons included, and their order;
    skipped ones are left out, but an annotation whose box cannot be used stays, with a box of zero size.
    Returns counts: images_train, images_test, annotations_train, annotations_test.
    """
    file = _read_raw(path)
    names = {c.id: c.name for c in (_category(path, json.loads(bytes(raw))) for raw in file.categories)}
    images = {image.id: image for image in instances.images}
    objects = {thing.id: (image.id, thing) for image in instances.images for thing in image.objects}
    parts = _Parts(file, is_test)
    image_decoder, annotation_decoder = msgspec.json.Decoder(_Image), msgspec.json.Decoder(_Annotation)
    for raw in file.images:
        image = _decode_one(raw, image_decoder, _image)
        if image and image.id in images and _same_image(image, images[image.id]):
            del images[image.id]  # a second record of the same id is not written
            parts.of(image.id).images.append(raw)
    for raw in file.annotations:
        annotation = _decode_one(raw, annotation_decoder, _annotation)
        if annotation is None or annotation.id not in objects:
            continue
        image_id, thing = objects[annotation.id]
        if (annotation.image_id, names.get(annotation.category_id)) == (image_id, thing.category):
            del objects[annotation.id]
            parts.of(image_id).annotations.append(raw if has_place(thing) else _without_box(annotation, thing))
    parts.write(folder, "instances")
    return {f"{kind}_{name}": n for kind in ("images", "annotations") for name, n in parts.sizes(kind).items()}


def split_captions(path: Path, instances: Instances, folder: Path, is_test: Callable[[int], bool]) -> dict[str, int]:
    """Write the captions of the images of `instances` as captions_train.json and captions_test.json in `folder`.

    `path` is a COCO captions file; captions of other images are left out. Returns counts: captions_train and
    captions_test. Raises DataError when it has no caption of these images.
    """
    file = _read_raw(path)
    wanted = {image.id for image in instances.images}
    parts = _Parts(file, is_test)
    for raw in file.images:
        image_id = _field(raw, "id")
        if image_id in wanted:
            parts.of(image_id).images.append(raw)
    for raw in file.annotations:
        image_id = _field(raw, "image_id", needs="caption")
        if image_id in wanted:
            parts.of(image_id).annotations.append(raw)
    counts = {f"captions_{name}": n for name, n in parts.sizes("annotations").items()}
    if not any(counts.values()):
        raise DataError(
            f"splitting the captions {path}: there is no caption of the images of the annotation file; needed is the "
            "COCO captions file of the same images: annotations [{id, image_id, caption}]"
        )
    parts.write(folder, "captions")
    return counts


def has_place(thing: ObjectRecord) -> bool:
    """Whether the object has a box of positive size."""
    x1, y1, x2, y2 = thing.box_xyxy
    return x2 > x1 and y2 > y1


def leads_out(file_name: str) -> bool:
    """Whether a file name of a dataset would leave the folder it is relative to, or cannot be a file name at all."""
    if file_name.isascii() and file_name.replace("_", "").replace(".", "", 1).isalnum():
        return False  # the common case: one plain component
    if not file_name or "\0" in file_name or "\\" in file_name or not encodable(file_name):
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


def decode_json(path: Path, data: bytes, **hooks: Any) -> Any:
    """Any JSON value from the bytes of the file `path`; `hooks` go to `json.loads`.

    Raises DataError that names the file and the fault.
    """
    try:
        return json.loads(data, **hooks)
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


def encodable(text: str) -> bool:
    """Whether the text can be written as UTF-8; JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_if_most_skipped(path: Path, noun: str, faults: Mapping[str, int], total: int) -> None:
    """Raises DataError with the reasons when more than half of `total` records were skipped for `faults`."""
    n = sum(faults.values())
    if 2 * n <= total:
        return
    reasons = "\n".join(f"  - {reason}: {count}" for reason, count in Counter(faults).most_common() if count)
    raise DataError(
        f"reading {path}: {n} of {total} {noun} cannot be used\n{reasons}\n"
        "more than half is taken for a mix-up: check that it is what you meant, and that what you gave belongs together"
    )


class _RawFile(msgspec.Struct):
    """A COCO file with its records as they stand in the text."""

    info: msgspec.Raw = msgspec.Raw(b"{}")
    licenses: msgspec.Raw = msgspec.Raw(b"[]")
    images: list[msgspec.Raw] = []
    annotations: list[msgspec.Raw] = []
    categories: list[msgspec.Raw] = []


class _Parts:
    """The train and the test part of a COCO file."""

    def __init__(self, file: _RawFile, is_test: Callable[[int], bool]) -> None:
        self.is_test = is_test
        self.train = _RawFile(file.info, file.licenses, categories=file.categories)
        self.test = _RawFile(file.info, file.licenses, categories=file.categories)

    def of(self, image_id: int) -> _RawFile:
        """The part that an image belongs to."""
        return self.test if self.is_test(image_id) else self.train

    def sizes(self, kind: str) -> dict[str, int]:
        """Records of one list (images, annotations) by part."""
        return {"train": len(getattr(self.train, kind)), "test": len(getattr(self.test, kind))}

    def write(self, folder: Path, stem: str) -> None:
        """`<stem>_train.json` and `<stem>_test.json`, a record a line."""
        for name, part in (("train", self.train), ("test", self.test)):
            with atomic_write(folder / f"{stem}_{name}.json", "wb") as file:
                file.write(b'{"info": ' + bytes(part.info) + b', "licenses": ' + bytes(part.licenses))
                for kind in ("images", "annotations", "categories"):
                    file.write(f',\n"{kind}": ['.encode())
                    for number, raw in enumerate(getattr(part, kind)):
                        file.write((b",\n" if number else b"\n") + bytes(raw))
                    file.write(b"]")
                file.write(b"}\n")


def _read_raw(path: Path) -> _RawFile:
    data = read_bytes(path)
    try:
        return msgspec.json.decode(data, type=_RawFile)
    except msgspec.DecodeError:  # NaN or broken Unicode somewhere: write such records anew as legal JSON
        value = decode_json(path, data, parse_constant=lambda _: None, parse_float=_finite_or_none)
    if not isinstance(value, dict):
        raise DataError(f"reading {path}: found a {_kind(value)} at the top; needed is a COCO file, an object")
    lists = {key: value.get(key) for key in ("images", "annotations", "categories")}
    raws = {key: [_encode(record) for record in records] for key, records in lists.items() if isinstance(records, list)}
    return _RawFile(_encode(value.get("info", {})), _encode(value.get("licenses", [])), **raws)


def _encode(record: Any) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(record).encode())


def _finite_or_none(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _decode_one(
    raw: msgspec.Raw, decoder: "msgspec.json.Decoder[_R]", lenient: Callable[[Any], "_R | None"]
) -> "_R | None":
    """One record as `read_instances` sees it."""
    try:
        return decoder.decode(raw)
    except msgspec.DecodeError:
        return lenient(json.loads(bytes(raw)))


def _same_image(image: _Image, record: ImageRecord) -> bool:
    return (image.file_name, image.width, image.height) == (record.file_name, record.width, record.height)


def _without_box(annotation: _Annotation, thing: ObjectRecord) -> msgspec.Raw:
    return _encode(
        {
            "id": annotation.id,
            "image_id": annotation.image_id,
            "category_id": annotation.category_id,
            "bbox": [*thing.box_xyxy[:2], 0, 0],
            "area": 0,
            "iscrowd": int(thing.is_crowd),
        }
    )


def _field(raw: msgspec.Raw, key: str, needs: str = "") -> int | None:
    """A whole-number field of a record; None without it, or without the text field `needs`."""
    record = json.loads(bytes(raw))
    if not isinstance(record, dict) or (needs and not isinstance(record.get(needs), str)):
        return None
    return whole(record.get(key))


def _file_fault(image: ImageRecord, folder: Path) -> str:
    """What is wrong with the file of an image; empty if nothing is."""
    try:
        with Image.open(folder / image.file_name) as file:
            size = file.size
            file.draft("RGB", (size[0] // 8 or 1, size[1] // 8 or 1))  # JPEG: every byte is still read, far less work
            file.load()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return _MISSING_FILE
    except _DECODING_FAULTS:
        return _BAD_FILE
    return "" if size == (image.width, image.height) else _OTHER_SIZE


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
        image.id: (image.width, image.height, []) for image in images.values() if image.id not in exclude
    }
    seen: set[int] = set()
    annotations.reverse()
    while annotations:
        annotation = annotations.pop()
        place = places.get(annotation.image_id)
        if place is None:
            if annotation.image_id not in images:
                skipped[_SKIPPED_IMAGE if annotation.image_id in dropped else _NO_IMAGE] += 1
            continue
        name = names.get(annotation.category_id)
        if name is None:
            skipped[_NO_CATEGORY] += 1
            continue
        key = annotation.id
        if key in seen:
            skipped[_SAME_ANNOTATION] += 1
            continue
        seen.add(key)
        width, height, objects = place
        x1, y1, w, h = annotation.bbox
        x2, y2 = x1 + w, y1 + h
        if 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height:
            box = (x1, y1, x2, y2)
        else:
            box, fault = _mend_box((x1, y1, x2, y2), width, height)
            (notes if fault == CLIPPED else skipped)[fault] += 1
        objects.append(ObjectRecord(key, name, box, bool(annotation.iscrowd)))
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
    if key is None or not isinstance(name, str) or not encodable(name):
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
