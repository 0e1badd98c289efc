"""COCO annotation files -> image records, the unique-object filter, absent categories.

`segmentation` and every other field that nothing here reads is skipped by the decoder and never becomes an object; the
rest goes into columns at once, and becomes records image by image where records are asked for.
"""

import gc
import gzip
import json
import math
import mmap
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from locvlm.data.columns import Bools, CrowdRule, ImageTable, Ints
from locvlm.errors import DataError
from locvlm.pixels import ImageSource, open_images
from locvlm.records import BoxXYXY, ImageRecord, ObjectRecord, atomic_write, encodable, leads_out

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

MISSING_FILE = "image file that is missing"
BAD_FILE = "image file that does not decode"
_OTHER_SIZE = "image file of another size than annotated"

_R = TypeVar("_R")

_NAN_BOX: BoxXYXY = (math.nan, math.nan, math.nan, math.nan)
_NEEDED = (
    "needed is a COCO instances file: an object with the lists images [{id, file_name, width, height}], "
    "annotations [{id, image_id, category_id, bbox [x, y, w, h]}] and categories [{id, name}]"
)


@dataclass(slots=True)
class Instances:
    """Annotated images.

    `images` (a table, or any sequence) ascend by image id, their objects by annotation id; boxes are
    `(x1, y1, x2, y2)` pixels inside the image. `categories`: names in the order of the category ids.
    `skipped`: reason -> number of records that cannot be used.
    `notes`: reason -> number of records that were used, but not as they stood (clipped boxes), or left out on request.

    An annotation whose box cannot be used is skipped as a place, not as a fact: its object stays in the image with a
    box of zero size, so that it still counts when instances are counted and its category is never called absent.
    """

    images: Sequence[ImageRecord]
    categories: list[str]
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


_Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # what a column holds


class _Image(msgspec.Struct, gc=False):
    id: _Int
    file_name: str
    width: _Int
    height: _Int


class _Box(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    x: float
    y: float
    width: float
    height: float


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: _Box
    iscrowd: int | bool = 0


@dataclass(frozen=True, slots=True)
class _Annotations:
    """Annotations as columns. `boxes`: two corners, [n, 4]."""

    ids: Ints
    image_ids: Ints
    categories: Ints
    boxes: npt.NDArray[np.float64]
    crowd: Bools

    def where(self, chosen: "Ints | Bools") -> "_Annotations":
        """Those of a mask or of numbers."""
        ids, image_ids, categories = self.ids[chosen], self.image_ids[chosen], self.categories[chosen]
        return _Annotations(ids, image_ids, categories, self.boxes[chosen], self.crowd[chosen])


class _Category(msgspec.Struct, gc=False):
    id: _Int
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
    data = _mapped(path)
    skipped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    with collector_paused():
        try:
            file = msgspec.json.decode(data, type=_File)
            n_images, n_annotations = len(file.images), len(file.annotations)
            found = _annotation_columns(file.annotations)
        except (
            msgspec.DecodeError,
            OverflowError,
            RecursionError,
        ):  # somewhere a record is out of the ordinary; find out which
            file, n_images, n_annotations = _decode_record_by_record(path, data[:], skipped)
            found = _annotation_columns(file.annotations)
        del data
        names = _category_names(path, file.categories)
        if n_images == 0:
            raise DataError(f"reading {path}: the list of images is empty; {_NEEDED}")
        usable, dropped = _usable_images(file.images, skipped)
    refuse_if_most_skipped(path, "images", {r: skipped[r] for r in _IMAGE_FAULTS}, n_images)
    images = [image for image in sorted(usable.values(), key=_id) if image.id not in exclude]
    if len(images) < len(usable):
        notes[EXCLUDED] = len(usable) - len(images)
    others = dict.fromkeys(dropped, _SKIPPED_IMAGE) | dict.fromkeys(usable.keys() & set(exclude), "")
    table = _table(images, found, names, others, skipped, notes)
    refuse_if_most_skipped(path, "annotations", {r: skipped[r] for r in _ANNOTATION_FAULTS}, n_annotations)
    return Instances(table, list(table.vocabulary), skipped, notes)


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
    source = open_images(folder)
    sound: list[ImageRecord] = []
    skipped: Counter[str] = Counter()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter's lock
        for image, fault in zip(images, pool.map(lambda image: _file_fault(image, source), images), strict=True):
            if fault:
                skipped[fault] += 1
            else:
                sound.append(image)
            on_done()
    there = {fault: n for fault, n in skipped.items() if fault != MISSING_FILE}
    refuse_if_most_skipped(folder, "image files", there, len(images) - skipped[MISSING_FILE])
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


def _mapped(path: Path) -> "bytes | mmap.mmap":
    """The bytes of a file as `read_bytes` gives them; those of a plain JSON object are not copied into memory."""
    try:
        with open(path, "rb") as file:
            if file.read(1) == b"{":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        pass  # read_bytes says what is wrong, or reads what cannot be mapped
    return read_bytes(path)


def decode_json(path: Path, data: bytes, **hooks: Any) -> Any:
    """Any JSON value from the bytes of the file `path`; `hooks` go to `json.loads`.

    Raises DataError that names the file and the fault.
    """
    try:
        return json.loads(data, **hooks)
    except ValueError as fault:  # also bytes that are no text, and a whole number of thousands of digits
        raise DataError(
            f"reading {path}: not valid JSON ({fault}); the file may be cut short, copy or download it again"
        ) from None
    except RecursionError:
        raise DataError(
            f"reading {path}: nested too deeply for a file of annotations or questions; check that it is the right one"
        ) from None


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
    except (msgspec.DecodeError, RecursionError):
        # NaN or broken Unicode somewhere: write such records anew as legal JSON
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


def _file_fault(image: ImageRecord, source: ImageSource) -> str:
    """What is wrong with the file of an image; empty if nothing is."""
    if not source.has(image.file_name):
        return MISSING_FILE
    try:
        size = source.checked_size(image.file_name)
    except DataError:
        return BAD_FILE
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


def _annotation_columns(annotations: list[_Annotation]) -> _Annotations:
    """The annotations as columns, in file order; empties the list, so that memory is not held twice.

    Raises OverflowError for an id beyond 64 bits.
    """
    n = len(annotations)

    def column(name: str, kind: "type[np.generic]") -> npt.NDArray[Any]:
        return np.fromiter(map(attrgetter(name), annotations), kind, n)

    numbers = chain.from_iterable(map(msgspec.structs.astuple, map(attrgetter("bbox"), annotations)))
    boxes = np.fromiter(numbers, np.float64, 4 * n).reshape(n, 4)
    boxes[:, 2:] += boxes[:, :2]
    ids, image_ids, categories = column("id", np.int64), column("image_id", np.int64), column("category_id", np.int64)
    crowd = column("iscrowd", np.bool_)
    annotations.clear()
    return _Annotations(ids, image_ids, categories, boxes, crowd)


def _table(
    images: Sequence[_Image],
    found: _Annotations,
    names: Mapping[int, str],
    others: Mapping[int, str],
    skipped: Counter[str],
    notes: Counter[str],
) -> ImageTable:
    """`images`, which ascend by id, with their annotations. `others`: images that are known but not among them, and
    for what their annotations are skipped (empty: not a fault)."""
    keys = np.array([image.id for image in images], np.int64)
    found, rows = _of_images(found, keys, others, skipped)
    vocabulary = list(dict.fromkeys(names[key] for key in sorted(names)))
    code_of = {name: code for code, name in enumerate(vocabulary)}
    category_ids = np.array(sorted(names), np.int64)
    places, known = _places(found.categories, category_ids)
    if n := int(np.count_nonzero(~known)):
        skipped[_NO_CATEGORY] += n
        found, rows, places = found.where(known), rows[known], places[known]
    codes = np.array([code_of[names[key]] for key in sorted(names)], np.int64)[places]
    order = np.argsort(found.ids, kind="stable")
    ordered = found.ids[order]
    repeats = order[1:][ordered[1:] == ordered[:-1]]  # all but the first in the file
    if repeats.size:
        skipped[_SAME_ANNOTATION] += repeats.size
        order = order[~np.isin(order, repeats)]
    order = order[np.argsort(rows[order], kind="stable")]
    found, rows, codes = found.where(order), rows[order], codes[order]
    widths = np.array([image.width for image in images], np.int64)
    heights = np.array([image.height for image in images], np.int64)
    _mend_boxes(found.boxes, widths[rows], heights[rows], skipped, notes)
    starts = np.searchsorted(rows, np.arange(len(images) + 1))
    file_names = [image.file_name for image in images]
    return ImageTable(keys, file_names, widths, heights, starts, found.ids, codes, found.boxes, found.crowd, vocabulary)


def _of_images(
    found: _Annotations, keys: Ints, others: Mapping[int, str], skipped: Counter[str]
) -> tuple[_Annotations, Ints]:
    """The annotations of the images `keys`, and the place of each one's image in `keys`."""
    rows, known = _places(found.image_ids, keys)
    if known.all():
        return found, rows
    for image_id in found.image_ids[~known].tolist():
        if fault := others.get(image_id, _NO_IMAGE):
            skipped[fault] += 1
    return found.where(known), rows[known]


def _places(values: Ints, ordered: Ints) -> tuple[Ints, Bools]:
    """Where each value stands in `ordered`, and whether it does."""
    if not len(ordered):
        return np.zeros(len(values), np.int64), np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return places, ordered[places] == values


def _mend_boxes(
    boxes: npt.NDArray[np.float64], widths: Ints, heights: Ints, skipped: Counter[str], notes: Counter[str]
) -> None:
    """Bring the boxes that are not sound into their images, in place."""
    x1, y1, x2, y2 = boxes.T
    sound = (x1 >= 0) & (x1 < x2) & (x2 <= widths) & (y1 >= 0) & (y1 < y2) & (y2 <= heights)
    for number in np.flatnonzero(~sound).tolist():
        box, fault = mend_box(tuple(boxes[number].tolist()), int(widths[number]), int(heights[number]))
        (notes if fault == CLIPPED else skipped)[fault] += 1
        boxes[number] = box


def mend_box(box: BoxXYXY, width: int, height: int) -> tuple[BoxXYXY, str]:
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
    key = _whole_64(record.get("id")) if isinstance(record, dict) else None
    name = record.get("name") if isinstance(record, dict) else None
    if key is None or not isinstance(name, str) or not encodable(name):
        raise DataError(f"reading {path}: category {str(record)[:80]} has no whole-number id or no name; {_NEEDED}")
    return _Category(key, name)


def _image(record: Any) -> _Image | None:
    if not isinstance(record, dict):
        return None
    key, width, height = (_whole_64(record.get(name)) for name in ("id", "width", "height"))
    file_name = record.get("file_name")
    if key is None or width is None or height is None or not isinstance(file_name, str):
        return None
    return _Image(key, file_name, width, height)


def _annotation(record: Any) -> _Annotation | None:
    if not isinstance(record, dict):
        return None
    key, image, category = (_whole_64(record.get(name)) for name in ("id", "image_id", "category_id"))
    if key is None or image is None or category is None:
        return None
    return _Annotation(key, image, category, _Box(*_box(record.get("bbox"))), bool(record.get("iscrowd")))


def _whole_64(value: Any) -> int | None:
    """As `whole`, within 64 bits."""
    number = whole(value)
    return number if number is not None and -(2**63) <= number < 2**63 else None


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
def collector_paused() -> Iterator[None]:
    """No cyclic garbage is made here, and a million small records would be walked again and again for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
