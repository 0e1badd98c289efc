"""Pseudo-ActNet from videos (paper, section 3.4): a few frames of each, their panoptic segments, their boxes.

Labelling a video takes seconds, so each finished one goes into a journal, from which an interrupted run goes on. What
is written at the end depends neither on where a run was interrupted nor on the number of worker processes.
"""

import fcntl
import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Any, Protocol, Self

import msgspec

from locvlm.data.actnet import VIDEOS_NAME, VideoLabels
from locvlm.data.coco import decode_json, read_bytes
from locvlm.data.panoptic import (
    CATEGORIES,
    MIN_SHARE,
    IdMap,
    Label,
    Segmenter,
    check_label_names,
    clean_category,
    large_segments,
    read_id_map,
    read_panoptic,
    segment_boxes,
)
from locvlm.data.video import Sampling, frame_indices, read_frames
from locvlm.errors import DataError, LocVLMError
from locvlm.records import VIDEO_SUFFIXES, atomic_write, encodable

log = logging.getLogger(__name__)

MISSING = "video of the list whose file is missing"
SAME_STEM = "video file of the same name as another but for folder or extension"
BAD_NAME = "video whose file name is not valid UTF-8"
NO_LABELS = "video without a panoptic file"
UNREADABLE = "video that cannot be read"
DAMAGED = "video with a note on its frames, such as damage: see the notes in videos.jsonl"
BAD_LABELS = "video whose panoptic files cannot be used"

_TASKS_A_WORKER = 4


class LabelSource(Protocol):
    """Where the labels of a video come from; it travels to the worker processes. `fault` is the reason that counts a
    video for which labelling raises DataError, `lacking` that of one without a stamp."""

    @property
    def fault(self) -> str: ...  # noqa: D102

    @property
    def lacking(self) -> str: ...  # noqa: D102

    def stamp(self, video: str) -> str | None:
        """Changes when the files that the labels are made from do; None when they are not there."""
        ...

    def start(self, worker: int) -> Callable[[str], VideoLabels]:
        """The labelling function of one process (`worker` counts from 0); a model is loaded here."""
        ...


@dataclass(frozen=True)
class FromSegmenter:
    """`n_frames` uniform frames of each video in `folder`, segmented. `load` makes the segmenter of a worker, `origin`
    names it in a message; segments below `min_share` of the frame give no box."""

    folder: Path
    load: Callable[[int], Segmenter]
    origin: str
    n_frames: int = 8
    sampling: Sampling = "vcgpt"
    min_share: float = MIN_SHARE
    fault: str = UNREADABLE
    lacking: str = MISSING

    def stamp(self, video: str) -> str | None:
        """See LabelSource."""
        return _stamp(self.folder / video)

    def start(self, worker: int) -> Callable[[str], VideoLabels]:
        """Raises CheckpointError when the segmenter's labels are not the COCO panoptic categories."""
        segmenter = self.load(worker)
        check_label_names(segmenter.label_names, self.origin)
        return lambda video: self._label(segmenter, video)

    def _label(self, segmenter: Segmenter, video: str) -> VideoLabels:
        frames = read_frames(self.folder / video, self.n_frames, self.sampling, unique=True)
        found = segmenter.segment(frames.images)
        width, height = frames.width, frames.height
        maps: list[tuple[IdMap, Mapping[int, Label]]] = []
        for id_map, names in found:
            if id_map.shape != (height, width):
                raise LocVLMError(
                    f"segmenting {video} with {self.origin}: the id map has the shape {id_map.shape}, the frame is "
                    f"{height} x {width}"
                )
            maps.append((id_map, {key: Label(clean_category(name)) for key, name in names.items()}))
        return _labels(video, width, height, frames.indices, maps, self.min_share, frames.notes)


@dataclass(frozen=True)
class FromPanoptic:
    """Ready labels: for a video `v_x.mp4` the COCO panoptic file `folder/v_x.json`, whose images are its frames in the
    order of their ids, with the PNGs in `folder/v_x/`. Of more than `n_frames`, `n_frames` uniform ones are used."""

    folder: Path
    n_frames: int = 8
    sampling: Sampling = "vcgpt"
    min_share: float = MIN_SHARE
    fault: str = BAD_LABELS
    lacking: str = NO_LABELS

    def stamp(self, video: str) -> str | None:
        """See LabelSource."""
        return _stamp(self._file(video))

    def start(self, worker: int) -> Callable[[str], VideoLabels]:
        """See LabelSource."""
        return self._label

    def _label(self, video: str) -> VideoLabels:
        file = self._file(video)
        images = read_panoptic(file)
        chosen = list(range(len(images)))
        if len(images) > self.n_frames:
            chosen = frame_indices(len(images), self.n_frames, self.sampling, unique=True)
        frames = [images[number] for number in chosen]
        if len({(image.width, image.height) for image in frames}) > 1:
            raise DataError(f"reading {file}: its frames differ in size; needed are the frames of one video")
        width, height = frames[0].width, frames[0].height
        maps = [(read_id_map(image, file.with_suffix("")), image.labels) for image in frames]
        return _labels(video, width, height, chosen, maps, self.min_share)

    def _file(self, video: str) -> Path:
        return (self.folder / video).with_suffix(".json")


class _Entry(msgspec.Struct):
    """One line of a journal: the labels of a video, or why it has none."""

    video: str
    stamp: str
    labels: VideoLabels | None = None
    fault: str = ""


class Journal:
    """The finished videos of a run that may be interrupted at any moment: one line each, at once on disk.

    Only one process at a time has it open. Raises DataError when another one does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115  (closed by __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise DataError(
                f"labelling the videos: another process is at it (it holds {path}); wait for it to end"
            ) from None
        self._places: dict[str, tuple[str, int]] = {}
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._places:
            self.path.unlink()
        self._file.close()

    def stamp(self, video: str) -> str | None:
        """The stamp that a video had when it was labelled, "" if it could not be; None for an unknown video."""
        return self._places.get(video, (None, 0))[0]

    def entry(self, video: str) -> _Entry:
        """What is known of a finished video."""
        self._file.seek(self._places[video][1])
        return msgspec.json.decode(self._file.readline(), type=_Entry)

    def add(self, entry: _Entry) -> None:
        """Note a finished video."""
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(msgspec.json.encode(entry) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._places[entry.video] = (_done_stamp(entry), place)

    def _read(self) -> None:
        """Find the lines; what follows the last whole one was being written when the run was killed."""
        decoder = msgspec.json.Decoder(_Entry)
        end = self._file.seek(0)
        for line in self._file:
            try:
                entry = decoder.decode(line)
            except msgspec.DecodeError:
                break
            if not line.endswith(b"\n"):
                break
            self._places[entry.video] = (_done_stamp(entry), end)
            end += len(line)
        self._file.truncate(end)


def _done_stamp(entry: _Entry) -> str:
    return "" if entry.fault else entry.stamp  # what failed is tried again by the next run


def find_videos(folder: Path, names: Sequence[str] | None = None) -> tuple[list[str], Counter[str]]:
    """The video files below `folder`, sorted, as paths relative to it, and what was left out, by reason.

    With `names` (ActivityNet ids) only those called `v_<name>` or `<name>`, with any extension of a video.
    Raises DataError when there is none.
    """
    if not folder.is_dir():
        raise DataError(f"looking for videos in {folder}: there is no such folder")
    skipped: Counter[str] = Counter()
    by_stem: dict[str, str] = {}
    for video in sorted(_video_files(folder), key=lambda name: (VIDEO_SUFFIXES.index(_suffix(name)), name)):
        if not encodable(video):
            skipped[BAD_NAME] += 1
            continue
        stem = PurePosixPath(video).stem
        if stem in by_stem:
            skipped[SAME_STEM] += 1
        else:
            by_stem[stem] = video
    if names is None:
        found = sorted(by_stem.values())
    else:
        paths = {name: by_stem.get(f"v_{name}", by_stem.get(name)) for name in names}
        found = sorted(path for path in paths.values() if path is not None)
        if len(found) < len(paths):
            skipped[MISSING] += len(paths) - len(found)
    if not found:
        raise DataError(
            f"looking for videos in {folder}: found none"
            + ("" if names is None else f" of the {len(names)} in the list, called v_<id> or <id>")
            + f"; needed are files ending in {', '.join(VIDEO_SUFFIXES)}"
        )
    return found, skipped


def read_activitynet(path: Path, subset: str | None = None) -> list[str]:
    """The video ids of an ActivityNet file (activity_net.v1-3.min.json), of one subset (training, validation, testing)
    or of all. Raises DataError when the file is not one, or has no video of that subset."""
    value = decode_json(path, read_bytes(path))
    database = value.get("database") if isinstance(value, dict) else None
    if not isinstance(database, dict) or not all(isinstance(video, dict) for video in database.values()):
        raise DataError(
            f"reading {path}: not an ActivityNet file; needed is an object {{database: {{id: {{subset, ...}}}}}}"
        )
    ids = [name for name, video in database.items() if subset is None or video.get("subset") == subset]
    if not ids:
        found = sorted({str(video.get("subset")) for video in database.values()})
        raise DataError(
            f"reading {path}: it has no video of the subset {subset}; it has {', '.join(found) or 'no video'}"
        )
    return ids


def label_videos(
    videos: Sequence[str],
    source: LabelSource,
    journal: Journal,
    n_workers: int = 1,
    on_done: Callable[[], object] = lambda: None,
) -> Counter[str]:
    """Label the videos that the journal does not have; `on_done` is called once a video.

    Returns the videos without labels, by reason. With `n_workers` above 1 each worker process has its own segmenter.
    """
    lacking = 0
    todo: list[tuple[str, str]] = []
    for video in videos:
        stamp = source.stamp(video)
        if stamp is not None and journal.stamp(video) != stamp:
            todo.append((video, stamp))
            continue
        lacking += stamp is None
        on_done()
    for entry in _labelled(todo, source, n_workers):
        journal.add(entry)
        on_done()
    skipped: Counter[str] = Counter()
    if lacking:
        skipped[source.lacking] = lacking
    skipped.update(entry.fault for entry in _entries(videos, journal) if entry.fault)
    return skipped


def write_labels(folder: Path, videos: Sequence[str], journal: Journal) -> tuple[dict[str, int], Counter[str]]:
    """Write `folder/videos.jsonl`. Returns counts (videos, frames, segments, and categories that occur) and notes."""
    counts = Counter(videos=0, frames=0, segments=0)
    notes: Counter[str] = Counter()
    categories: set[str] = set()
    with atomic_write(folder / VIDEOS_NAME, "wb") as file:
        for entry in _entries(videos, journal):
            if entry.labels is None:
                continue
            file.write(msgspec.json.encode(entry.labels) + b"\n")
            counts["videos"] += 1
            counts["frames"] += len(entry.labels.frames)
            if entry.labels.notes:
                notes[DAMAGED] += 1
            for frame in entry.labels.frames:
                counts["segments"] += len(frame)
                categories.update(segment.category for segment in frame)
    return {**counts, "categories": len(categories)}, notes


def _labels(
    video: str,
    width: int,
    height: int,
    indices: Sequence[int],
    maps: Iterable[tuple[IdMap, Mapping[int, Label]]],
    min_share: float,
    notes: tuple[str, ...] = (),
) -> VideoLabels:
    found = [segment_boxes(id_map, labels) for id_map, labels in maps]
    seen = {segment.category for segments in found for segment in segments}
    frames = tuple(tuple(large_segments(segments, width, height, min_share)) for segments in found)
    absent = tuple(name for name in CATEGORIES if name not in seen)
    return VideoLabels(video, width, height, tuple(indices), frames, absent, notes)


def _stamp(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return f"{status.st_size}-{status.st_mtime_ns}"


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _video_files(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and _suffix(name) in VIDEO_SUFFIXES:
                yield Path(place, name).relative_to(folder).as_posix()


def _entries(videos: Iterable[str], journal: Journal) -> Iterator[_Entry]:
    return (journal.entry(video) for video in sorted(videos) if journal.stamp(video) is not None)


def _labelled(todo: Sequence[tuple[str, str]], source: LabelSource, n_workers: int) -> Iterator[_Entry]:
    """The entries in the order in which they are finished."""
    if not todo:
        return
    n_workers = min(n_workers, len(todo))
    if n_workers == 1:
        label = source.start(0)
        for video, stamp in todo:
            yield _label(label, source.fault, video, stamp)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    worker_number = context.Value("i", 0)
    pool = ProcessPoolExecutor(n_workers, context, _begin_worker, (source, worker_number))
    rest = iter(todo)
    try:
        running: set[Future[_Entry]] = set()
        while True:
            free = n_workers * _TASKS_A_WORKER - len(running)
            running |= {pool.submit(_label_in_worker, *task) for task in islice(rest, free)}
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise LocVLMError(
            "labelling the videos: a worker process died, perhaps for lack of memory; the finished videos are kept, "
            "run the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _label(label: Callable[[str], VideoLabels], fault: str, video: str, stamp: str) -> _Entry:
    try:
        return _Entry(video, stamp, label(video))
    except DataError as error:
        log.warning("%s", error)
        return _Entry(video, stamp, fault=fault)


class _Worker:
    """What a worker process keeps between videos; the segmenter is loaded with the first, so that its error arrives."""

    source: LabelSource
    number: int
    label: Callable[[str], VideoLabels] | None = None


def _begin_worker(source: LabelSource, next_number: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.source = source
    with next_number.get_lock():
        _Worker.number = next_number.value
        next_number.value += 1


def _end_with_parent() -> None:
    """Without this a worker would outlive a killed parent, and keep its GPU."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _label_in_worker(video: str, stamp: str) -> _Entry:
    if _Worker.label is None:
        _Worker.label = _Worker.source.start(_Worker.number)
    return _label(_Worker.label, _Worker.source.fault, video, stamp)
