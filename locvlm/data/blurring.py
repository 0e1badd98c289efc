"""A folder of images or videos -> the same folder with the faces blurred, by several processes, resumable.

Work goes on in `.NAME.partial` beside the output folder NAME: `data/` becomes NAME at the end, in one rename;
`journal.jsonl` has a line for each file that is done; `options.json` says with what options (others start anew). A file
is known by the hash of its content, so after a kill, or with a finished NAME and changed inputs, the same command does
only what is missing, and takes the rest from there. The result depends on the inputs and options alone.

NAME holds the files under their own names, `faces.jsonl` (a row for each input file, by name: `file`, `sha256` of the
input, `bytes` of the output and `faces`; or `file` and `skipped`, the reason) and `manifest.json`. A file that is
skipped is not there: nothing that was not searched gets in.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from locvlm.data.faces import (
    DATASET,
    RECORD,
    Blur,
    FaceDetector,
    Unusable,
    blur_image_file,
    blur_video_file,
    hash_file,
)
from locvlm.errors import DataError
from locvlm.records import (
    Manifest,
    atomic_write,
    encodable,
    read_json,
    read_jsonl,
    write_json,
    write_manifest,
)

Medium = Literal["images", "videos"]
Row = dict[str, Any]

ROWS_NAME = "faces.jsonl"
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "images": (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    "videos": (".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
}
_AHEAD = 4  # files a process may have waiting


@dataclass(frozen=True, slots=True)
class BlurTask:
    """What to blur and how. `make_detector` is called once in each process, so it must be picklable."""

    folder: Path
    medium: Medium
    make_detector: Callable[[], FaceDetector]
    blur: Blur


def blur_folder(
    task: BlurTask,
    output: Path,
    workers: int,
    force: bool = False,
    progress: Callable[[str, int], AbstractContextManager[Callable[[], None]]] | None = None,
) -> tuple[dict[str, Any], bool]:
    """Blur the faces of all images or videos below a folder into the folder `output`.

    Returns the manifest, and whether anything was done (False: all was there and up to date). `force` replaces a
    finished data set at `output` that was made with other options.
    Raises DataError when there is nothing to blur, more than half of the files cannot be used, `output` is something
    else, lies in the input or holds it, or another run works at it.
    """
    folder, output = task.folder.resolve(), output.resolve()
    if not folder.is_dir():
        raise DataError(f"reading --{task.medium} {task.folder}: there is no such folder")
    if folder == output or folder in output.parents or output in folder.parents:
        raise DataError(f"building {output}: it lies in the folder {folder} or holds it; name another folder")
    names, n_other = _list_files(folder, task.medium)
    if not names:
        raise DataError(
            f"reading --{task.medium} {folder}: no file below it is one by its name ({' '.join(SUFFIXES[task.medium])})"
        )
    options = {"medium": task.medium, "blur": asdict(task.blur), RECORD: task.make_detector().describe()}
    before = _finished(output, options, force)
    with _staging(output, options) as staging:
        run = _Run(task, staging, output if before else None)
        rows, fresh = run.all(names, before, workers, progress)
        skipped = Counter(str(row["skipped"]) for row in rows if "skipped" in row)
        if skipped.total() > len(rows) / 2:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(skipped.items()))
            raise DataError(
                f"blurring {folder}: {skipped.total()} of {len(rows)} files cannot be used ({reasons}); mend or remove "
                "them and run the same command again, which keeps what is done"
            )
        manifest = _manifest(folder, options, rows, skipped, n_other)
        if not fresh and list(before.values()) == rows:
            return dict(read_json(output / "manifest.json")), False
        _finish(staging, output, rows, manifest)
    return manifest.to_dict(), True


def _list_files(folder: Path, medium: Medium) -> tuple[list[str], int]:
    """Names below a folder, sorted, and the number of files that are something else by their names."""
    names, n_other = [], 0
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES[medium]:
                names.append(path.relative_to(folder).as_posix())
            else:
                n_other += 1
    return sorted(names), n_other


def _finished(output: Path, options: Mapping[str, Any], force: bool) -> dict[str, Row]:
    """The rows of a finished output of these options, by name; none when there is no output, or one to replace."""
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return {}
    path = output / "manifest.json"
    found = read_json(path) if path.is_file() else None
    if not isinstance(found, dict) or "dataset" not in found:
        raise DataError(
            f"building {output}: it exists and is not a finished data set; name another folder, or remove it yourself"
        )
    if found["dataset"] == DATASET and found.get("options") == options:
        return {row["file"]: row for row in read_jsonl(output / ROWS_NAME)}
    if not force:
        raise DataError(
            f"building {output}: it holds a finished data set ({found['dataset']}) made with other options; name "
            "another folder, or pass --force to replace it"
        )
    return {}


@contextmanager
def _staging(output: Path, options: Mapping[str, Any]) -> Iterator[Path]:
    """The folder to work in, locked; it goes when the work is done and stays when it is not."""
    staging = output.with_name(f".{output.name}.partial")
    staging.mkdir(parents=True, exist_ok=True)
    with open(staging / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"building {output}: another run works at it (in {staging}); wait for it") from None
        noted = None
        with suppress(DataError):  # none yet
            noted = read_json(staging / "options.json")
        if noted != options:
            for path in staging.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            write_json(staging / "options.json", options)
        (staging / "data").mkdir(exist_ok=True)
        yield staging
        shutil.rmtree(staging)


class _Run:
    def __init__(self, task: BlurTask, staging: Path, previous: Path | None) -> None:
        self._task, self._staging, self._previous = task, staging, previous

    def all(
        self,
        names: list[str],
        before: Mapping[str, Row],
        workers: int,
        progress: Callable[[str, int], AbstractContextManager[Callable[[], None]]] | None,
    ) -> tuple[list[Row], bool]:
        """The rows of all files by name, and whether one of them is not from the finished output."""
        journal = _read_journal(self._staging)
        jobs = [(name, [row for row in (journal.get(name), before.get(name)) if row is not None]) for name in names]
        worker = _Worker(self._task, self._staging / "data", self._previous)
        rows: dict[str, Row] = {}
        fresh = False
        with (
            open(self._staging / "journal.jsonl", "a", encoding="utf-8") as file,
            _results(worker, jobs, min(workers, len(jobs))) as results,
            _counted(progress, f"blurring faces in {self._task.medium}", len(jobs)) as advance,
        ):
            for row, is_old in results:
                rows[row["file"]] = row
                fresh = fresh or not is_old
                file.write(json.dumps(row) + "\n")
                file.flush()
                advance()
        return [rows[name] for name in names], fresh


def _read_journal(staging: Path) -> dict[str, Row]:
    """What is done, by name. The last line may be cut; the file is left without it."""
    path = staging / "journal.jsonl"
    rows: dict[str, Row] = {}
    if path.is_file():
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                rows[row["file"]] = row
    with atomic_write(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows.values())
    return rows


@contextmanager
def _counted(
    progress: Callable[[str, int], AbstractContextManager[Callable[[], None]]] | None, text: str, total: int
) -> Iterator[Callable[[], None]]:
    if progress is None:
        yield lambda: None
        return
    with progress(text, total) as advance:
        yield advance


class _Worker:
    """Blurs single files; one in each process."""

    def __init__(self, task: BlurTask, data: Path, previous: Path | None) -> None:
        self._task, self._data, self._previous = task, data, previous
        self._detector: FaceDetector | None = None

    def __call__(self, name: str, known: list[Row]) -> tuple[Row, bool]:
        """The row of a file, and whether it is as it was in the finished output. `known`: rows of the same name."""
        try:
            if not encodable(name):
                raise Unusable("file whose name is not UTF-8")
            digest = hash_file(self._task.folder / name)
            for row in known:
                if row.get("sha256") == digest and (place := self._take(row)) is not None:
                    return row, place == self._previous
            return self._blur(name, digest), False
        except Unusable as reason:
            row = {"file": name, "skipped": str(reason)}
            return row, row in known

    def _take(self, row: Row) -> Path | None:
        """Where the blurred file was found that this row tells of; afterwards it is in the new data."""
        target = self._data / row["file"]
        for place in (self._data, self._previous):
            if place is None:
                continue
            path = place / row["file"]
            if not path.is_file() or path.stat().st_size != row["bytes"]:
                continue
            if place != self._data:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                os.link(path, target)
            return place
        return None

    def _blur(self, name: str, digest: str) -> Row:
        if self._detector is None:
            self._detector = self._task.make_detector()
        blur_file = blur_image_file if self._task.medium == "images" else blur_video_file
        target = self._data / name
        done = blur_file(self._task.folder / name, target, self._detector, self._task.blur)
        row: Row = {"file": name, "sha256": digest, "bytes": target.stat().st_size, "faces": done.faces}
        if done.n_frames is not None:
            row["frames"] = done.n_frames
        return row | ({"note": done.note} if done.note else {})


_worker: _Worker | None = None  # of this process


def _start_worker(worker: _Worker) -> None:
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent must not leave processes behind that go on writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(name: str, known: list[Row]) -> tuple[Row, bool]:
    assert _worker is not None
    return _worker(name, known)


@contextmanager
def _results(
    worker: _Worker, jobs: Iterable[tuple[str, list[Row]]], workers: int
) -> Iterator[Iterator[tuple[Row, bool]]]:
    """What `worker` makes of all jobs, in the order in which they finish; in this process when one worker is asked."""
    if workers == 1:
        yield (worker(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(worker,)
    )
    try:
        yield _as_completed(pool, iter(jobs), workers * _AHEAD)
    finally:
        pool.shutdown(cancel_futures=True)


def _as_completed(
    pool: ProcessPoolExecutor, jobs: Iterator[tuple[str, list[Row]]], ahead: int
) -> Iterator[tuple[Row, bool]]:
    running: set[Future[tuple[Row, bool]]] = set()
    try:
        while True:
            running |= {pool.submit(_do, *job) for job in islice(jobs, ahead - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise DataError(
            "blurring faces: a worker process died, perhaps for want of memory; run the same command again with fewer "
            "--workers, which keeps what is done"
        ) from None


def _manifest(
    folder: Path, options: Mapping[str, Any], rows: list[Row], skipped: Counter[str], n_other: int
) -> Manifest:
    used = [row for row in rows if "skipped" not in row]
    content = hashlib.sha256(b"".join(os.fsencode(f"{row['file']}\0{row.get('sha256')}\0") for row in rows))
    counts = {str(options["medium"]): len(used), "with_faces": sum(1 for row in used if row["faces"])}
    counts["faces"] = sum(len(row["faces"]) for row in used)
    if options["medium"] == "videos":
        counts["frames"] = sum(row["frames"] for row in used)
    notes = Counter(str(row["note"]) for row in used if "note" in row)
    if n_other:
        notes["file left out, which is something else by its name"] = n_other
    return Manifest(
        DATASET,
        counts,
        dict(sorted(skipped.items())),
        sources=[{"path": folder.name, "fingerprint": f"names-contents:sha256:{content.hexdigest()}"}],
        extra={"options": dict(options), RECORD: options[RECORD], "notes": dict(sorted(notes.items()))},
    )


def _finish(staging: Path, output: Path, rows: list[Row], manifest: Manifest) -> None:
    """Sweep what does not belong, write the rows and the manifest, and give `data` its final name."""
    data = staging / "data"
    used = {row["file"] for row in rows if "skipped" not in row}
    for place, _, files in os.walk(data, topdown=False):
        for name in files:
            path = Path(place, name)
            if path.relative_to(data).as_posix() not in used:
                path.unlink()
        if place != str(data) and not any(Path(place).iterdir()):
            Path(place).rmdir()
    with atomic_write(data / ROWS_NAME) as rows_file:  # ASCII: a name that is not UTF-8 is only skipped
        rows_file.writelines(json.dumps(row) + "\n" for row in rows)
    write_manifest(data, manifest)
    if output.exists() and any(output.iterdir()):  # put the old one aside, where it is removed with the staging folder
        old = staging / "old"
        if old.exists():
            shutil.rmtree(old)
        output.rename(old)
    data.rename(output)
