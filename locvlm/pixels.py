"""From the name of an image to the network's input: where images lie, how they are decoded, CLIP's numbers.

One path for training and generation, in Pillow and numpy (no torchvision). Images come from an `ImageSource`: a folder
of files, or tar shards with an index `images.arrow` that `locvlm data shard` wrote. The index has a row an image, in
the order of the names: name, shard (a tar file, relative to the index), offset and size of the image's bytes in it.
"""

import io
import os
import struct
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from locvlm.errors import DataError
from locvlm.records import leads_out

# CLIP's normalisation
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

INDEX_NAME = "images.arrow"
INDEX_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("shard", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)

# [3, 256]: what each value of a channel becomes
_NORMALISED = (
    np.arange(256, dtype=np.float32) / np.float32(255) - np.array(PIXEL_MEAN, np.float32)[:, None]
) / np.array(PIXEL_STD, np.float32)[:, None]

# what Pillow raises for missing and damaged files
_DECODING_FAULTS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_OPEN_SHARDS = 64  # descriptors a process holds; CC3M alone is 300 to 3000 shards


class ImageSource(ABC):
    """Images by their names: relative, with forward slashes, as the annotations have them.

    `path`: the folder it was opened from. A source travels to a worker process by its path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def stream(self, name: str) -> BinaryIO:
        """The bytes of an image. Raises FileNotFoundError (and its like) when there is none, OSError when it cannot be
        read, DataError for a name that leads out of the folder."""

    @abstractmethod
    def stored_bytes(self, name: str) -> int | None:
        """The size of an image in bytes; None when there is none. Raises DataError for a name that leads out."""

    @abstractmethod
    def names(self) -> Iterator[str]:
        """The names of all files, sorted."""

    def has(self, name: str) -> bool:
        """Whether there is such an image."""
        return self.stored_bytes(name) is not None

    def open(self, name: str) -> Image.Image:
        """Decode an image, its pixels as stored (no EXIF rotation). Raises DataError that names the file."""
        try:
            with self.stream(name) as file:
                return _decode(file, self.path / name)
        except OSError as error:
            raise _unreadable(self.path / name, error) from None

    def checked_size(self, name: str) -> tuple[int, int]:
        """(width, height) in pixels of an image that decodes, found with as little decoding as shows damage. Raises
        DataError as `open` does."""
        try:
            with self.stream(name) as file, Image.open(file) as image:
                width, height = image.size
                image.draft("RGB", (width // 8 or 1, height // 8 or 1))  # JPEG: every byte is still read, far less work
                image.load()
        except _DECODING_FAULTS as error:
            raise _unreadable(self.path / name, error) from None
        return width, height

    def __reduce__(self) -> tuple[object, ...]:
        return open_images, (self.path,)


def open_images(path: Path) -> ImageSource:
    """The images of a folder: of its shards when it holds an index `images.arrow`, else of its files.

    Raises DataError when there is no such folder, or when the index or one of its shards is missing, damaged or cut
    short.
    """
    if not path.is_dir():
        found = "this is a file" if path.exists() else "there is no such folder"
        raise DataError(
            f"opening the images {path}: {found}; needed is a folder of images, or one that `locvlm data shard` made"
        )
    return _Shards(path) if (path / INDEX_NAME).is_file() else _Folder(path)


class _Folder(ImageSource):
    """A file an image."""

    def stream(self, name: str) -> BinaryIO:
        return open(safe_image_path(self.path, name), "rb")

    def stored_bytes(self, name: str) -> int | None:
        path = safe_image_path(self.path, name)
        try:
            return path.stat().st_size if path.is_file() else None
        except OSError:  # a name too long for the file system
            return None

    def names(self) -> Iterator[str]:
        seen: set[str] = set()
        found: list[str] = []
        for place, folders, files in os.walk(self.path, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:  # a link to a folder above it
                folders.clear()
                continue
            seen.add(real)
            found += [(Path(place) / name).relative_to(self.path).as_posix() for name in files]
        yield from sorted(found)


class _Shards(ImageSource):
    """Tar files and the index into them. The index stays on disk; a look-up is a binary search in it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        table = map_index(path / INDEX_NAME)
        self._n = table.num_rows
        if self._n:
            self._names, self._places, self._offsets, self._sizes = (column.chunk(0) for column in table.columns)
            self._shards: list[str] = self._places.dictionary.to_pylist()
            self._check_shards()
        self._open_shard = lru_cache(_OPEN_SHARDS)(ShardFile)

    def stream(self, name: str) -> BinaryIO:
        row = self._row(name)
        if row is None:
            raise FileNotFoundError(name)
        shard = self.path / self._shards[self._places.indices[row].as_py()]
        size = self._sizes[row].as_py()
        data = self._open_shard(shard).read(self._offsets[row].as_py(), size)
        if len(data) < size:
            raise OSError(f"the shard {shard.name} ends inside it")
        return io.BytesIO(data)

    def stored_bytes(self, name: str) -> int | None:
        row = self._row(name)
        return None if row is None else int(self._sizes[row].as_py())

    def names(self) -> Iterator[str]:
        return (self._names[row].as_py() for row in range(self._n))

    def _row(self, name: str) -> int | None:
        _refuse_leading_out(self.path, name)
        low, high = 0, self._n
        while low < high:
            middle = (low + high) // 2
            if self._names[middle].as_py() < name:
                low = middle + 1
            else:
                high = middle
        return low if low < self._n and self._names[low].as_py() == name else None

    def _check_shards(self) -> None:
        """A shard that is missing or cut short is told now, not in the middle of an epoch."""
        needed = np.zeros(len(self._shards), np.int64)
        np.maximum.at(needed, self._places.indices.to_numpy(), self._offsets.to_numpy() + self._sizes.to_numpy())
        for name, length in zip(self._shards, needed.tolist(), strict=True):
            shard = self.path / name
            found = shard.stat().st_size if shard.is_file() else -1
            if found < length:
                what = f"it has {found} bytes of {length} or more" if found >= 0 else "it is not there"
                raise DataError(
                    f"opening the images {self.path}: the shard {name} is not whole ({what}); fetch it again "
                    "(`dvc pull`), or make the shards anew with `locvlm data shard`"
                )


class ShardFile:
    """A shard open for reading, by many threads at a time; closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes there; fewer at the end of the file."""
        return os.pread(self._descriptor, size, offset)


def map_index(path: Path) -> pa.Table:
    """The rows of an index, mapped and checked. Raises DataError."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if table.schema.equals(INDEX_SCHEMA) and all(column.num_chunks <= 1 for column in table.columns):
            table.validate(full=True)
            return table
        fault = f"its columns are {', '.join(table.schema.names) or 'none'}"
    except (pa.ArrowException, OSError) as error:
        fault = str(error).splitlines()[0]
    raise DataError(
        f"opening the images {path.parent}: {INDEX_NAME} is not an index of `locvlm data shard`, or cut short ({fault})"
        "; make the shards anew"
    )


def safe_image_path(images_dir: Path, file_name: str) -> Path:
    """`images_dir / file_name`. Raises DataError for a name that leads out of `images_dir`."""
    _refuse_leading_out(images_dir, file_name)
    return images_dir / file_name


def _refuse_leading_out(folder: Path, name: str) -> None:
    if leads_out(name):
        raise DataError(
            f"opening the image {name!r} in {folder}: the name leads out of the folder; needed are relative "
            "names with forward slashes and without '..'"
        )


def open_image(path: Path) -> Image.Image:
    """Read and decode one file, its pixels as stored (no EXIF rotation). Raises DataError that names the file."""
    try:
        with open(path, "rb") as file:
            return _decode(file, path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _decode(file: BinaryIO, path: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except _DECODING_FAULTS as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"reading the image {path}: there is no such file; check --images")
    return DataError(f"reading the image {path}: it does not decode ({error}); replace or exclude it")


def to_pixels(image: Image.Image) -> npt.NDArray[np.float32]:
    """An RGB image -> float32 [3, height, width], normalised as CLIP expects."""
    pixels: npt.NDArray[np.float32] = normalised([np.asarray(image)])[0]
    return pixels


def normalised(images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """RGB images of one size, uint8 [height, width, 3] each -> float32 [images, 3, height, width], as CLIP expects."""
    height, width, _ = images[0].shape
    found = np.empty((len(images), 3, height, width), np.float32)
    for image, place in zip(images, found, strict=True):
        for channel, table in enumerate(_NORMALISED):
            np.take(table, image[..., channel], out=place[channel], mode="clip")  # any mode but "raise" is quick
    return found
