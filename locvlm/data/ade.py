"""ADE20K, the benchmark with 150 classes: which classes an image shows, for Hal-ADE (paper, section 4.4).

An image has an index PNG of its size: value 0 is unlabelled, value i is class i of objectInfo150.txt, whose names are
lists of synonyms; the first one is used.
"""

import os
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from PIL import Image

from locvlm.data.coco import check_images, refuse_if_most_skipped
from locvlm.data.hallucination import Shown
from locvlm.errors import DataError
from locvlm.pixels import open_images
from locvlm.records import ImageRecord

CLASSES_NAME = "objectInfo150.txt"

Overlap = Literal["exact", "near-synonyms"]

# Classes one of whose names is the name of a COCO category.
_EXACT = (
    "bed",
    "person",
    "chair",
    "car",
    "sofa",
    "sink",
    "refrigerator",
    "toilet",
    "book",
    "bench",
    "boat",
    "bus",
    "truck",
    "television",
    "airplane",
    "bottle",
    "oven",
    "microwave",
    "bicycle",
    "vase",
    "traffic light",
    "clock",
)

# Further classes whose things COCO annotates under another name, or which are a kind of one of its categories, or of
# which one of its categories is a kind: table and dining table, van and car, animal and dog.
_NEAR = (
    "table",
    "desk",
    "coffee table",
    "armchair",
    "swivel chair",
    "seat",
    "stool",
    "van",
    "computer",
    "monitor",
    "screen",
    "crt screen",
    "ship",
    "bag",
    "minibike",
    "stove",
    "ball",
    "animal",
    "plant",
    "flower",
    "palm",
    "glass",
    "food",
    "plate",
    "pot",
    "tray",
    "plaything",
    "signboard",
)

OVERLAPS: Mapping[Overlap, tuple[str, ...]] = {"exact": _EXACT, "near-synonyms": _EXACT + _NEAR}

_BAD_FILE = "label map that does not decode"
_BAD_MODE = "label map that is not an 8-bit index image"
_BAD_VALUE = "label map with a value beyond the classes"
_NO_MAP = "photograph without a label map"
_DECODING_FAULTS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def find_classes(maps: Path) -> Path:
    """objectInfo150.txt in the folder of the label maps, or in one of the two above it. Raises DataError."""
    places = [folder / CLASSES_NAME for folder in (maps, *maps.resolve().parents[:2])]
    for path in places:
        if path.is_file():
            return path
    raise DataError(
        f"reading the label maps {maps}: {CLASSES_NAME} lies neither there nor in the two folders above; give the list "
        "of the class names with --classes"
    )


def read_classes(path: Path) -> list[str]:
    """The class names in the order of their values from 1; of a list of synonyms the first.

    Raises DataError for a file that is not the tab-separated list of ADE20K's benchmark.
    """
    needed = "needed is objectInfo150.txt of the scene parsing benchmark: Idx, Ratio, Train, Val, Name between tabs"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"reading the classes {path}: there is no such file; {needed}") from None
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"reading the classes {path}: {fault}; {needed}") from None
    names: list[str] = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = line.split("\t")
        name = cells[-1].split(",")[0].strip()
        if len(cells) < 2 or cells[0].strip() != str(len(names) + 1) or not name or name in names:
            raise DataError(
                f"reading the classes {path}: line {number} is not class {len(names) + 1} with a new name; {needed}"
            )
        names.append(name)
    if not 0 < len(names) < 256:
        raise DataError(f"reading the classes {path}: it lists {len(names)} classes; {needed}")
    return names


def kept_classes(path: Path, overlap: Overlap) -> dict[int, str]:
    """Value -> name of the classes that share nothing with COCO, by the stricter or the laxer list.

    Raises DataError when a class to leave out is not in the list at all: then its names are not those meant here.
    """
    names = read_classes(path)
    unknown = sorted(set(OVERLAPS[overlap]) - set(names))
    if unknown:
        raise DataError(
            f"leaving COCO's categories out of {path}: it has no class {', '.join(unknown)}, so its names are other "
            f"ones; needed is {CLASSES_NAME} of the scene parsing benchmark"
        )
    left_out = set(OVERLAPS[overlap])
    return {value: name for value, name in enumerate(names, 1) if name not in left_out}


def read_label_maps(
    maps: Path,
    classes: Path,
    overlap: Overlap = "near-synonyms",
    limit: int | None = None,
    on_done: Callable[[], object] = lambda: None,
) -> tuple[list[Shown], Counter[str]]:
    """What every image shows of the classes that are kept, by the index PNGs in the folder `maps`, in the order of
    their names; and reason -> number of maps that cannot be used.

    A class is present when one pixel has its value. The photograph of x.png is called x.jpg. `limit`: only the first
    so many; `on_done` is called after each map. Raises DataError when there is no map, or when most cannot be used.
    """
    kept = kept_classes(classes, overlap)
    n_classes = len(read_classes(classes))
    paths = label_maps(maps)[:limit]
    shown: list[Shown] = []
    skipped: Counter[str] = Counter()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the interpreter's lock
        found = pool.map(lambda path: _values(path, n_classes), paths)
        for path, values in zip(paths, found, strict=True):
            if isinstance(values, str):
                skipped[values] += 1
            else:
                counts, size = values
                present = [name for value, name in kept.items() if counts[value]]
                absent = [name for value, name in kept.items() if not counts[value]]
                shown.append(Shown(path.stem, f"{path.stem}.jpg", present, absent, size))
            on_done()
    refuse_if_most_skipped(maps, "label maps", skipped, len(paths))
    return shown, skipped


def check_photographs(
    shown: Sequence[Shown], maps: Path, images: Path, on_done: Callable[[], object] = lambda: None
) -> tuple[list[Shown], Counter[str]]:
    """Those of `shown`, read from `maps`, whose photograph in `images` is sound and of the map's size; reason -> number
    of the others, and of photographs without a map. `on_done` is called after each file. Raises DataError as
    `coco.check_images`."""
    records = [ImageRecord(number, one.file_name, *(one.size or (0, 0))) for number, one in enumerate(shown)]
    sound, skipped = check_images(records, images, on_done)
    known = {f"{path.stem}.jpg" for path in label_maps(maps)}
    photographs = {name for name in open_images(images).names() if name.endswith(".jpg") and "/" not in name}
    if alone := len(photographs - known):
        skipped[_NO_MAP] = alone
    return [shown[image.id] for image in sound], skipped


def label_maps(maps: Path) -> list[Path]:
    """The index PNGs in a folder, by name. Raises DataError when there is none."""
    if not maps.is_dir():
        raise DataError(f"reading the label maps {maps}: there is no such folder")
    paths = sorted(path for path in maps.iterdir() if path.suffix.lower() == ".png" and not path.name.startswith("."))
    if not paths:
        raise DataError(
            f"reading the label maps {maps}: the folder holds no PNG; give the folder with the index images "
            "themselves, for the validation set ADEChallengeData2016/annotations/validation"
        )
    return paths


def _values(path: Path, n_classes: int) -> tuple[list[int], tuple[int, int]] | str:
    """How many pixels have each of the 256 values, and the size; or what is wrong with the map."""
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P"):
                return _BAD_MODE
            counts, size = file.histogram(), file.size
    except _DECODING_FAULTS:
        return _BAD_FILE
    return _BAD_VALUE if any(counts[n_classes + 1 :]) else (counts, size)
