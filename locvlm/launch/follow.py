"""The submitter's log, followed in a thread of its own."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from locvlm.launch.client import QUICK, ApiError, RayJobs, faults_translated

logger = logging.getLogger(__name__)

LAST_LINES = 30
LOG_OVERLAP_SECONDS = 300  # asked for again after a break; repeated lines are recognised by their time stamps


@dataclass(slots=True)
class _Position:
    """How far one pod's log has been written: the last time stamp and the number of lines that carry it."""

    at: tuple[datetime, str] | None = None
    n_at: int = 0
    n_unstamped: int = 0
    read_at: float = 0.0


class LogFollower:
    """Writes the submitter's log, each line once, in a thread of its own; a broken stream is opened again.

    The log is shown for people. No fault here ends a launch.
    """

    def __init__(self, jobs: RayJobs, name: str, write: Callable[[str], None], poll_seconds: float) -> None:
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._jobs, self._name, self._write, self._poll_seconds = jobs, name, write, poll_seconds
        self._positions: dict[tuple[str, str], _Position] = {}
        self._pod: tuple[str, str] | None = None
        self._stream: Any = None
        self._unwritable = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"log of {name}", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def finish(self) -> None:
        """Stop following and write what is left; does nothing when it never started."""
        if self._thread.ident is None:
            return
        self._stop.set()
        stream = self._stream
        if stream is not None:
            # the reader may close the stream at this very moment, then there is nothing to shut
            with contextlib.suppress(ValueError, RuntimeError, OSError):
                stream.shutdown()
        self._thread.join(timeout=sum(QUICK))
        if not self._thread.is_alive():
            self._attempt(follow=False)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._attempt(follow=True)
            self._stop.wait(self._poll_seconds)

    def _attempt(self, *, follow: bool) -> None:
        try:
            pod = self._jobs.submitter_pod(self._name)
            before, self._pod = self._pod, pod
            if before not in (None, pod):  # a new submitter: first the rest of the old one
                self._read_rest(before)
            self._read(pod, follow=follow)
        except ApiError as fault:
            if not self._stop.is_set():
                logger.info("job %s: its log cannot be read now (%s)", self._name, fault)

    def _read_rest(self, pod: tuple[str, str] | None) -> None:
        """What was left of a pod's log, if it is still there: a retry or a preemption deletes it."""
        try:
            self._read(pod, follow=False)
        except ApiError as fault:
            logger.info("job %s: the end of the log of its earlier submitter is lost (%s)", self._name, fault)

    def _read(self, pod: tuple[str, str] | None, *, follow: bool) -> None:
        if pod is None:
            return
        position = self._positions.setdefault(pod, _Position())
        since = int(time.monotonic() - position.read_at) + LOG_OVERLAP_SECONDS if position.at else None
        stream = self._jobs.open_log(pod, follow=follow, since_seconds=since)
        self._stream = stream
        known = _Position(position.at, position.n_at, position.n_unstamped)
        rest = b""
        try:
            if follow and self._stop.is_set():
                return
            with faults_translated():
                for chunk in stream.stream():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        self._line(line, position, known)
            if not follow and rest:  # while following, half a line is a broken stream and comes again
                self._line(rest, position, known)
        finally:
            self._stream = None
            stream.close()

    def _line(self, raw: bytes, position: _Position, known: _Position) -> None:
        """Write one line unless `known`, what had been written before this stream was opened, has it."""
        line = raw.decode(errors="replace")
        stamp, _, text = line.partition(" ")
        try:
            at = (_instant(stamp), stamp)
        except ValueError:  # something on the way took the stamps off, then such a stream begins at the beginning
            known.n_unstamped -= 1
            if known.n_unstamped < 0:
                position.n_unstamped += 1
                self._show(line)
            return
        if known.at is not None and at < known.at:
            return
        if at == known.at and known.n_at > 0:
            known.n_at -= 1
            return
        position.n_at = position.n_at + 1 if at == position.at else 1
        position.at, position.read_at = at, time.monotonic()
        self._show(text)

    def _show(self, text: str) -> None:
        self.last_lines.append(text)
        try:
            self._write(text)
        except (OSError, UnicodeError) as fault:  # nobody reads any more (`| head`), or the disk is full
            if not self._unwritable:
                logger.warning("job %s: its log cannot be written here (%s); the job goes on", self._name, fault)
            self._unwritable = True


def _instant(stamp: str) -> datetime:
    """A log line's time. Raises ValueError for a date in the line itself, which has no time zone."""
    instant = datetime.fromisoformat(stamp)
    if instant.tzinfo is None:
        raise ValueError(stamp)
    return instant
