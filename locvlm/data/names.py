"""What the name of an image says: which image of COCO or of Visual Genome it is."""

import re
from pathlib import PurePosixPath

ImageKey = tuple[str, int | str]

COCO = "coco"
VISUAL_GENOME = "visual-genome"
NAME = "name"

_COCO = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})|COCO_(?:train|val|test)20\d\d_(\d{12})_\d+", re.ASCII)
_VISUAL_GENOME_FOLDERS = {"VG_100K", "VG_100K_2", "gqa"}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif"}


def coco_image_id(name: str) -> int | None:
    """The COCO image id in a file name, in any of its forms, or None: COCO_train2014_000000000042.jpg,
    coco/train2017/000000000042.jpg, and COCO_train2014_000000000042_7 (RefCOCO: image and running number)."""
    match = _COCO.fullmatch(_stem(name))
    return int(match[1] or match[2]) if match else None


def image_key(name: str) -> ImageKey:
    """What an image is recognised by: its COCO id, its Visual Genome id (where the folder tells that the number is
    one), and otherwise its file name without folder and extension."""
    coco = coco_image_id(name)
    if coco is not None:
        return COCO, coco
    stem = _stem(name)
    if stem.isascii() and stem.isdigit() and _VISUAL_GENOME_FOLDERS.intersection(PurePosixPath(name).parts[:-1]):
        return VISUAL_GENOME, int(stem)
    return NAME, stem


def is_picture(name: str) -> bool:
    """Whether a file name is one of an image or a video."""
    return f".{name.lower().rpartition('.')[2]}" in _SUFFIXES


def _stem(name: str) -> str:
    last = name.replace("\\", "/").rpartition("/")[2]
    head, dot, suffix = last.rpartition(".")
    return head if head and f".{suffix.lower()}" in _SUFFIXES and dot else last
