"""The nouns of the project, and how they lie on disk: images, objects, conversations, predictions, manifests.

Boxes are `(x1, y1, x2, y2)` float pixels of the original image, top-left origin, x2 = x + w (no -1).
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from locvlm.errors import DataError

BoxXYXY = tuple[float, float, float, float]
Medium = Literal["image", "video"]

# the first wins where a video is there twice
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")


def medium_of(file_name: str) -> Medium:
    """What a file is by its name; animated GIFs are videos (TGIF-QA)."""
    return "video" if file_name.lower().endswith((*VIDEO_SUFFIXES, ".gif")) else "image"


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """One annotated object. `is_crowd` marks a COCO crowd region (one annotation for many things)."""

    id: int
    category: str
    box_xyxy: BoxXYXY
    is_crowd: bool = False


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image with every annotation on it, crowd regions included. `width`, `height` in pixels."""

    id: int
    file_name: str
    width: int
    height: int
    objects: tuple[ObjectRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer.

    Either structured (`objective` loc_pred, neg_pred or rev_loc; the text is rendered when the turn is read, from
    `category`, `description` and `box_xyxy`) or literal (any other objective; `question` and `answer` are the text).
    `description` replaces the category name in the text where pseudo-captions are used. A structured turn that
    has `question` and `answer` as well is worded once and for all (a frozen set).
    """

    objective: str
    category: str = ""
    description: str = ""
    box_xyxy: BoxXYXY | None = None
    question: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns about one image or video. `objective` is the one the conversation was built for (a loc_pred conversation
    may hold a neg_pred turn). `width`, `height`: size of the original image or frame in pixels; `image` is relative
    to the image folder, or with `medium` "video" to the video folder."""

    id: str
    image: str
    width: int
    height: int
    objective: str
    turns: tuple[Turn, ...]
    medium: str = "image"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer of a model. `answer` is raw text; `parsed` is what the task read from it (None: unreadable)."""

    id: str
    prompt: str
    answer: str
    parsed: Any = None
    reference: Any = None


@dataclass(slots=True)
class Manifest:
    """What a dataset folder holds and where it came from; written last, so a folder with a manifest is complete."""

    dataset: str
    counts: dict[str, int]
    skipped: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    sources: list[dict[str, str]] = field(default_factory=list)
    coordinates: dict[str, Any] = field(default_factory=dict)
    geometry: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `extra` is merged into the top level."""
        value = asdict(self)
        extra = value.pop("extra")
        return {**value, **extra}


def leads_out(file_name: str) -> bool:
    """Whether a file name of a dataset would leave the folder it is relative to, or cannot be a file name at all."""
    if file_name.isascii() and file_name.replace("_", "").replace(".", "", 1).isalnum():
        return False  # the common case: one plain component
    if not file_name or "\0" in file_name or "\\" in file_name or not encodable(file_name):
        return True
    name = PurePosixPath(file_name)
    return name.is_absolute() or ".." in name.parts or not name.parts


def encodable(text: str) -> bool:
    """Whether the text can be written as UTF-8; JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` under its final name in one step."""
    with atomic_write(folder / "manifest.json") as file:
        json.dump(manifest.to_dict(), file, indent=1, sort_keys=True)
        file.write("\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a dataset folder. Raises DataError when the folder is not a finished dataset."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"opening the dataset {folder}: there is no manifest.json, so it is not a finished dataset; "
            "build it with `locvlm data ...`"
        )
    return dict(read_json(path))


def read_json(path: Path) -> Any:
    """Parse one JSON file. Raises DataError that names the file and the place of the fault."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"reading {path}: there is no such file") from None
    except IsADirectoryError:
        raise DataError(f"reading {path}: this is a folder, a JSON file was needed") from None
    except PermissionError:
        raise DataError(f"reading {path}: permission denied") from None
    except (ValueError, RecursionError) as fault:
        raise DataError(
            f"reading {path}: not valid JSON ({fault}); the file may be cut short, copy or download it again"
        ) from None


def fingerprint(path: Path) -> str:
    """`sha256:...` of a file's bytes, or of the names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def source(path: Path) -> dict[str, str]:
    """A manifest's entry for an input file: its name and fingerprint (no machine path)."""
    return {"path": path.name, "fingerprint": fingerprint(path)}


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path` and rename it to `path` on success; on an error nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file under its final name in one step, keys sorted."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.write("\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line under the final name in one step; returns the number of lines."""
    n = 0
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            n += 1
    return n


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. Raises DataError that names the file and the line."""
    if not path.is_file():
        raise DataError(f"reading {path}: there is no such file")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as fault:
                raise DataError(f"reading {path}: line {number} is not valid JSON ({fault})") from None
            if not isinstance(row, dict):
                raise DataError(f"reading {path}: line {number} is not a JSON object")
            rows.append(row)
    return rows
