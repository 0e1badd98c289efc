"""Images in tar shards instead of a hundred thousand files: packing a folder, indexing tar files that exist already.

`locvlm.pixels.open_images` reads what is written here. Copying, versioning (DVC) and network file systems cost per
file, so CC3M or COCO move many times quicker as shards; the index makes every image as near as in a folder.
"""

import hashlib
import io
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from locvlm.errors import DataError
from locvlm.pixels import INDEX_NAME, INDEX_SCHEMA, ImageSource, ShardFile, map_index
from locvlm.records import atomic_write, leads_out

SHARD_NAME = "images-{:05d}.tar"

NOT_AN_IMAGE = "file that is not an image by its name"
REPEATED = "image whose name occurred before"
CUT_SHORT = "tar file that is damaged or cut short: its members up to there are used"
BAD_MEMBER = "tar member whose name leads out of the folder or cannot be a file name"
SPECIAL_MEMBER = "tar member that is not a plain file (link, device)"
EMPTY = "image file that is empty"
UNREADABLE = "image file that cannot be read"

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, RecursionError)


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in a tar file: its bytes are `tar[offset : offset + size]`."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class Packed:
    """What `pack_images` wrote. `fingerprint` is over the bytes of all shards."""

    images: int = 0
    shards: int = 0
    n_bytes: int = 0
    fingerprint: str = ""
    skipped: Counter[str] = field(default_factory=Counter)


class IndexWriter:
    """Collects the rows of an index and writes it sorted by name."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._places = array("q")  # shard number, offset and size of each image
        self._shards: dict[str, int] = {}

    def add(self, shard: str, member: Member) -> None:
        """One image; `shard` is the path of its tar file, relative to the folder of the index."""
        number = self._shards.setdefault(shard, len(self._shards))
        self._names.append(member.name)
        self._places.extend((number, member.offset, member.size))

    def add_index(self, folder: Path) -> None:
        """All rows of `folder/images.arrow`, their shards as they are named there."""
        table = map_index(folder / INDEX_NAME)
        for name, shard, offset, size in zip(*(column.to_pylist() for column in table.columns), strict=True):
            self.add(shard, Member(name, offset, size))

    def write(self, folder: Path) -> int:
        """Write `folder/images.arrow`; of images with the same name the first is kept. Returns the number of rows."""
        names = pa.array(self._names, pa.string())
        order = pc.sort_indices(names).to_numpy()  # stable, and in the order of Python's strings
        names = names.take(pa.array(order))
        first = np.ones(len(names), bool)
        first[1:] = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
        places = np.array(self._places, np.int64).reshape(-1, 3)[order[first]]
        shards = pa.DictionaryArray.from_arrays(
            pa.array(places[:, 0].astype(np.int32)), pa.array(list(self._shards), pa.string())
        )
        columns = [names.filter(pa.array(first)), shards, pa.array(places[:, 1]), pa.array(places[:, 2])]
        with atomic_write(folder / INDEX_NAME, "wb") as file, pa.ipc.new_file(file, INDEX_SCHEMA) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=INDEX_SCHEMA))
        return int(first.sum())


class TarMembers(ImageSource):
    """Some members of one tar file as images."""

    def __init__(self, path: Path, members: Iterable[Member]) -> None:
        super().__init__(path)
        self._file = ShardFile(path)
        self._members = {member.name: member for member in members}

    def stream(self, name: str) -> BinaryIO:
        """The bytes of a member. Raises FileNotFoundError when it is none of those given."""
        if name not in self._members:
            raise FileNotFoundError(name)
        return io.BytesIO(self._file.read(self._members[name].offset, self._members[name].size))

    def stored_bytes(self, name: str) -> int | None:
        """The size of a member; None when it is none of those given."""
        return self._members[name].size if name in self._members else None

    def names(self) -> Iterator[str]:
        """The names, sorted."""
        return iter(sorted(self._members))


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(_SUFFIXES)


def pack_images(
    source: ImageSource,
    names: Iterable[str],
    folder: Path,
    shard_bytes: int,
    on_done: Callable[[], object] = lambda: None,
) -> Packed:
    """Copy the images `names` (sorted, each once) of a source into `folder`: images-00000.tar ... and their index.

    A shard stays within `shard_bytes` unless one image alone is larger. Only names, sizes and bytes of the images go in
    (no time, owner or mode), so the same images give the same shards. An image's bytes are copied as they are; what
    cannot be read, is empty or is no image by its name is counted as skipped. `on_done` is called after each name.
    """
    packed, index = Packed(), IndexWriter()
    shards = _ShardWriter(folder, shard_bytes)
    with shards:
        for name in names:
            data = _image_bytes(source, name, packed.skipped)
            if data:
                shard, offset = shards.add(name, data)
                index.add(shard, Member(name, offset, len(data)))
            on_done()
    packed.images, packed.shards, packed.n_bytes = index.write(folder), shards.number, shards.total
    packed.fingerprint = f"sha256:{shards.digest.hexdigest()}"
    return packed


def _image_bytes(source: ImageSource, name: str, skipped: Counter[str]) -> bytes:
    """The bytes of an image that can be packed; empty when it is skipped."""
    if not is_image_name(name):
        skipped[NOT_AN_IMAGE] += 1
        return b""
    if leads_out(name):
        skipped[BAD_MEMBER] += 1
        return b""
    try:
        size = source.stored_bytes(name)
        data = source.stream(name).read() if size else b""
    except OSError:
        size, data = None, b""
    if not data:
        skipped[EMPTY if size == 0 else UNREADABLE] += 1
    return data


class _ShardWriter:
    """Tar files one after the other. `digest`: of all their bytes; `total`: how many those are."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.number, self.total, self.digest = 0, 0, hashlib.sha256()
        self._folder, self._limit = folder, limit
        self._file: BinaryIO | None = None
        self._name, self._length = "", 0

    def add(self, name: str, data: bytes) -> tuple[str, int]:
        """Append a file; returns its shard and the offset of its bytes there."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8")
        padding = bytes(-len(data) % _BLOCK)
        grown = self._length + len(header) + len(data) + len(padding) + len(_END)
        if self._file is None or (self._length and grown > self._limit):
            self._close()
            self._file = self._open_next()
        offset = self._length + len(header)
        self._write(self._file, header + data + padding)
        return self._name, offset

    def _open_next(self) -> BinaryIO:
        self._name = SHARD_NAME.format(self.number)
        self.number += 1
        return open(self._folder / self._name, "wb")

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _write(self, file: BinaryIO, data: bytes) -> None:
        file.write(data)
        self.digest.update(data)
        self._length += len(data)
        self.total += len(data)

    def _close(self) -> None:
        if self._file is not None:
            self._write(self._file, _END)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file, self._length = None, 0


def index_tars(
    tars: Sequence[Path], folder: Path, final: Path, on_done: Callable[[], object] = lambda: None
) -> tuple[dict[str, int], Counter[str]]:
    """Index the images in tar files where they lie (CC3M as img2dataset writes it, any webdataset), copying nothing.

    The index goes into `folder`, which will be at `final`; it names the tar files relative to `final`, so both move
    together. Returns counts (images, shards) and reason -> number of members that were left out. `on_done` is called
    after each tar file. Raises DataError for a file that is no tar file, or when there is no image in any.
    """
    index, skipped = IndexWriter(), Counter[str]()
    found = 0
    for path in tars:
        shard = shard_path(path, final)
        for member in tar_members(path, skipped):
            if is_image_name(member.name):
                index.add(shard, member)
                found += 1
            else:
                skipped[NOT_AN_IMAGE] += 1
        on_done()
    if not found:
        raise DataError(f"indexing {tars[0]}: there is no image in {'it' if len(tars) == 1 else 'any tar file'}")
    images = index.write(folder)
    if images < found:
        skipped[REPEATED] = found - images
    return {"images": images, "shards": len(tars)}, skipped


def shard_path(tar: Path, folder: Path) -> str:
    """How an index in `folder` names a tar file that lies elsewhere."""
    return Path(os.path.relpath(tar.resolve(), folder.resolve())).as_posix()


def tar_members(path: Path, skipped: Counter[str]) -> Iterator[Member]:
    """The plain files in an uncompressed tar file, in their order; the rest is counted in `skipped` by reason.

    Nothing is unpacked. A name that is absolute or has '..', a link or a device is passed over; of a file that is cut
    short the whole members are given. Raises DataError when it is not a tar file at all.
    """
    with _open_tar(path) as tar:
        length = path.stat().st_size
        last = -1
        while (info := _next_info(tar, last, skipped)) is not None:
            last = info.offset_data
            if info.isdir():
                continue
            if not info.isreg() or info.sparse is not None:
                skipped[SPECIAL_MEMBER] += 1
            elif leads_out(info.name):
                skipped[BAD_MEMBER] += 1
            elif info.offset_data + info.size > length:
                skipped[CUT_SHORT] += 1
                return
            else:
                yield Member(PurePosixPath(info.name).as_posix(), info.offset_data, info.size)


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except _DAMAGE as fault:
        raise DataError(
            f"reading {path}: not a tar file ({fault}); needed is an uncompressed one, so unpack .tar.gz first"
        ) from None


def _next_info(tar: tarfile.TarFile, last: int, skipped: Counter[str]) -> tarfile.TarInfo | None:
    """The next header; None at the end, which is counted as damage unless the end mark stands there."""
    try:
        info = tar.next()
        tar.members.clear()  # type: ignore[attr-defined]
        if info is not None and info.size >= 0 and info.offset_data > last:
            return info
        if info is None:
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(_BLOCK) == bytes(_BLOCK):
                return None
    except _DAMAGE:
        pass
    skipped[CUT_SHORT] += 1
    return None
