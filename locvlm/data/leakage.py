"""Which images two data sets share, and the list of images that a clean training run leaves out: RefCOCO, VQAv2 and
POPE ask about images of COCO train2017, from which Localize-Instruct is built.

An image is recognised by its COCO id, its Visual Genome id, or its file name (see `names.image_key`).
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from locvlm.data.coco import refuse_if_most_skipped, whole
from locvlm.data.conversations import ARROW_NAME, LLAVA_NAME, open_conversations
from locvlm.data.names import COCO, NAME, VISUAL_GENOME, ImageKey, image_key, is_picture
from locvlm.data.refcoco import read_refs
from locvlm.data.rows import decode_row, split_rows
from locvlm.errors import DataError
from locvlm.pixels import open_images

BENCHMARKS = ("refcoco", "pope", "vqav2", "gqa")

_NO_IMAGE = "record that names no image"
_PICKLES = (".p", ".pkl", ".pickle")
_ROW_FILES = ("questions.jsonl", "videos.jsonl", LLAVA_NAME)


@dataclass(slots=True)
class ImageSet:
    """The images that a file or folder names. `skipped`: reason -> records that name none."""

    name: str
    keys: frozenset[ImageKey]
    skipped: Counter[str] = field(default_factory=Counter)

    def ids(self, kind: str) -> set[int | str]:
        """Those that are recognised in one way: `names.COCO`, VISUAL_GENOME or NAME."""
        return {value for known, value in self.keys if known == kind}


class _Row(msgspec.Struct, gc=False):
    """The fields under which data sets name an image."""

    image: Any = None
    file_name: Any = None
    img_id: Any = None
    video: Any = None
    video_name: Any = None
    image_id: Any = None
    gqa_id: Any = msgspec.field(name="imageId", default=None)
    video_id: Any = None


class _Document(msgspec.Struct, gc=False):
    """The lists of COCO and VQA files."""

    images: list[msgspec.Raw] | None = None
    questions: list[msgspec.Raw] | None = None
    annotations: list[msgspec.Raw] | None = None
    data_type: Any = None


class _VisualGenomeImage(msgspec.Struct, gc=False):
    image_id: int
    coco_id: int | None = None


def read_images(path: Path, visual_genome: Mapping[int, int] | None = None) -> ImageSet:
    """The images of a dataset folder of ours, of a folder of images or videos, of a question, annotation or
    conversation file (JSON, JSON lines; COCO, VQA, GQA, POPE, RefCOCO, LLaVA, VideoChat ...), or of an official
    RefCOCO pickle.

    With `visual_genome` (Visual Genome id -> COCO id) images of Visual Genome that are COCO's count as such.
    Raises DataError when the path cannot be read or names no image, or when most of its records name none.
    """
    keys, skipped, total = _keys(path)
    refuse_if_most_skipped(path, "records", skipped, total)
    if not keys:
        raise DataError(
            f"reading the images of {path}: it names none; needed are records that say which image they mean"
        )
    if visual_genome is not None:
        keys = {_as_coco(key, visual_genome) for key in keys}
    return ImageSet(path.name or path.resolve().name, frozenset(keys), skipped)


def read_visual_genome(path: Path) -> dict[int, int]:
    """Visual Genome image id -> COCO image id, from Visual Genome's image_data.json; images from elsewhere are left
    out. Raises DataError when the file is another one."""
    raws = split_rows(path)
    images = [image for raw in raws if (image := decode_row(raw, _VisualGenomeImage)) is not None]
    if 2 * len(images) <= len(raws):
        raise DataError(
            f"reading the Visual Genome images {path}: {len(raws) - len(images)} of {len(raws)} records have no whole-"
            "number image_id; needed is image_data.json of Visual Genome: [{image_id, coco_id, ...}]"
        )
    return {image.image_id: image.coco_id for image in images if image.coco_id is not None}


@dataclass(frozen=True, slots=True)
class Overlap:
    """The images of two sets that are the same."""

    first: ImageSet
    second: ImageSet
    shared: frozenset[ImageKey]

    def to_dict(self) -> dict[str, Any]:
        """Counts both ways, and the shared images sorted: COCO and Visual Genome ids as numbers."""
        return {
            "first": _described(self.first, self.shared),
            "second": _described(self.second, self.shared),
            "shared": len(self.shared),
            "images": {
                COCO: sorted(value for kind, value in self.shared if kind == COCO and isinstance(value, int)),
                VISUAL_GENOME: sorted(v for kind, v in self.shared if kind == VISUAL_GENOME and isinstance(v, int)),
                NAME: sorted(value for kind, value in self.shared if kind == NAME and isinstance(value, str)),
            },
        }


def overlap(first: ImageSet, second: ImageSet) -> Overlap:
    """The images that two sets share."""
    return Overlap(first, second, first.keys & second.keys)


@dataclass(frozen=True, slots=True)
class Source:
    """What one file adds to an exclusion list. `images`: all it names; `ids`: their COCO ids; `without`: images that
    have none; `new`: ids that no file before it had."""

    benchmark: str
    path: Path
    images: int
    ids: frozenset[int]
    without: int
    new: int


def exclusions(
    files: Mapping[str, Sequence[Path]],
    visual_genome: Mapping[int, int] | None = None,
    splits: Collection[str] = (),
) -> list[Source]:
    """The COCO ids of every image that the files of `files` (one of BENCHMARKS -> paths) ask about, file by file.

    `visual_genome`: Visual Genome id -> COCO id, without which GQA's images have none. `splits`: of an official RefCOCO
    pickle only the refs of these splits (none given: all that are not for training).
    Raises DataError for a file that cannot be read, or whose images are not COCO's.
    """
    sources: list[Source] = []
    known: set[int] = set()
    for benchmark, paths in files.items():
        for path in paths:
            keys = _benchmark_keys(benchmark, path, visual_genome, splits)
            ids = frozenset(value for kind, value in keys if kind == COCO and isinstance(value, int))
            if not ids and benchmark != "gqa":
                first = min(str(value) for _, value in keys)
                raise DataError(
                    f"listing the images of the {benchmark} file {path}: none of its {len(keys)} images is one of COCO "
                    f"(the first is {first}); needed are names like COCO_val2014_000000000042.jpg, or COCO's image_id"
                )
            sources.append(Source(benchmark, path, len(keys), ids, len(keys) - len(ids), len(ids - known)))
            known |= ids
    return sources


def _benchmark_keys(
    benchmark: str, path: Path, visual_genome: Mapping[int, int] | None, splits: Collection[str]
) -> Collection[ImageKey]:
    if benchmark == "refcoco":
        return _refcoco_keys(path, splits)
    keys = read_images(path).keys
    if benchmark != "gqa":
        return keys
    if visual_genome is None:
        raise DataError(
            f"listing the images of the gqa file {path}: GQA numbers its images as Visual Genome does, and nothing "
            "says which of them are COCO's; give image_data.json of Visual Genome with --visual-genome"
        )
    return {_as_coco(_as_visual_genome(key), visual_genome) for key in keys}


def _as_visual_genome(key: ImageKey) -> ImageKey:
    """A file that is known to be GQA's names images by their Visual Genome number alone."""
    number = _number(key[1]) if key[0] == NAME else None
    return key if number is None else (VISUAL_GENOME, number)


def _refcoco_keys(path: Path, splits: Collection[str]) -> set[ImageKey]:
    refs = read_refs(path).rows
    found = {ref.split for ref in refs}
    wanted = set(splits) or found - {"train"}
    missing = set(splits) - found
    if found != {""} and (missing or not wanted):
        lacking = ", ".join(sorted(missing)) or "but train"
        raise DataError(
            f"listing the images of the refcoco file {path}: it has no split {lacking}, its splits are "
            f"{', '.join(sorted(found))}; name those to leave out with --splits"
        )
    return {(COCO, ref.image_id) for ref in refs if ref.split in wanted or ref.split == ""}


def _keys(path: Path) -> tuple[set[ImageKey], Counter[str], int]:
    """The images that a file or folder names, records that name none by reason, and the number of records."""
    if path.is_dir():
        if (path / ARROW_NAME).is_file():
            return _of_conversations(path)
        for name in _ROW_FILES:
            if (path / name).is_file():
                return _keys(path / name)
        names = [name for name in open_images(path).names() if is_picture(name)]
        return _collect(image_key(name) for name in names)
    if path.suffix == ".arrow":
        return _of_conversations(path)
    if path.suffix in _PICKLES:
        refs = read_refs(path)
        keys: set[ImageKey] = {(COCO, ref.image_id) for ref in refs.rows}
        return keys, refs.skipped, len(refs.rows) + refs.skipped.total()
    raws = split_rows(path)
    if len(raws) == 1:
        document = decode_row(raws[0], _Document)
        if document is not None and (document.images or document.questions or document.annotations):
            return _of_document(document)
        by_id = decode_row(raws[0], dict[str, _Row])
        if by_id is not None:  # GQA: {question id: record}
            return _collect(_row_key(row) for row in by_id.values())
    return _collect(_row_key(decode_row(raw, _Row)) for raw in raws)


def _of_conversations(path: Path) -> tuple[set[ImageKey], Counter[str], int]:
    conversations = open_conversations(path)
    return {image_key(name) for name in set(conversations.images)}, Counter(), len(conversations)


def _of_document(document: _Document) -> tuple[set[ImageKey], Counter[str], int]:
    """A COCO file by the names of its images, which tell whether they are COCO's; a VQA file by its image ids, which
    are COCO's unless the file says that it is about drawn scenes."""
    if document.images:
        return _collect(_name_key(decode_row(raw, _Row)) for raw in document.images)
    rows = [decode_row(raw, _Row) for raw in document.questions or document.annotations or []]
    if document.data_type in (None, "mscoco"):
        return _collect(_row_key(row) for row in rows)
    ids = [None if row is None else whole(row.image_id) for row in rows]
    return _collect(None if number is None else (NAME, f"{document.data_type}-{number}") for number in ids)


def _collect(found: Iterable[ImageKey | None]) -> tuple[set[ImageKey], Counter[str], int]:
    counted = Counter(found)
    total = counted.total()
    missing = counted.pop(None, 0)
    return {key for key in counted if key is not None}, Counter({_NO_IMAGE: missing} if missing else {}), total


def _name_key(row: _Row | None) -> ImageKey | None:
    """The key of the first name in a row. (A number as `video_id` is MSR-VTT's, whose files are video<number>.mp4.)"""
    if row is None:
        return None
    video = f"video{row.video_id}" if whole(row.video_id) is not None else row.video_id
    names = (row.image, row.file_name, row.img_id, row.video, row.video_name, video)
    name = next((name for name in names if isinstance(name, str) and name.strip()), None)
    return None if name is None else image_key(name)


def _row_key(row: _Row | None) -> ImageKey | None:
    """The key of a row by GQA's imageId, else by its name, else by COCO's image_id."""
    if row is None:
        return None
    if row.gqa_id is not None:
        number = _number(row.gqa_id)
        return (NAME, str(row.gqa_id)) if number is None else (VISUAL_GENOME, number)
    named = _name_key(row)
    if named is not None:
        return named
    number = _number(row.image_id)
    return None if number is None else (COCO, number)


def _number(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() else None
    number = whole(value)
    return number if number is not None and number >= 0 else None


def _as_coco(key: ImageKey, visual_genome: Mapping[int, int]) -> ImageKey:
    kind, value = key
    if kind == VISUAL_GENOME and isinstance(value, int) and value in visual_genome:
        return COCO, visual_genome[value]
    return key


def _described(images: ImageSet, shared: Collection[ImageKey]) -> dict[str, Any]:
    return {
        "name": images.name,
        "images": len(images.keys),
        "coco": len(images.ids(COCO)),
        "visual_genome": len(images.ids(VISUAL_GENOME)),
        "by_name": len(images.ids(NAME)),
        "fraction_shared": round(len(shared) / len(images.keys), 6) if images.keys else 0.0,
        "skipped": dict(sorted(images.skipped.items())),
    }
