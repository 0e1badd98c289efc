"""One worker thread that answers what has gathered while it was busy, many queries at a time."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_R = TypeVar("_R")


class Batcher(Generic[_T, _R]):
    """Calls `work` with up to `size` items. After the first one it waits `linger` seconds for more, so that queries
    that come together are answered together; `seen` is told the size of each batch."""

    def __init__(
        self,
        work: Callable[[Sequence[_T]], Sequence[_R]],
        size: int,
        linger: float = 0.005,
        seen: Callable[[int], None] = lambda n: None,
    ) -> None:
        self._work, self._size, self._linger, self._seen = work, size, linger, seen
        self._jobs: queue.SimpleQueue[tuple[_T, Future[_R]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether anything is still answered."""
        return self._thread.is_alive()

    def submit(self, item: _T) -> "Future[_R]":
        """The answer to come. A future that is cancelled in time costs nothing."""
        future: Future[_R] = Future()
        self._jobs.put((item, future))
        return future

    def close(self) -> None:
        """Answer what is waiting, then end."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_:
            batch, open_ = self._gather()
            live = [job for job in batch if job[1].set_running_or_notify_cancel()]
            if live:
                self._seen(len(live))
                self._answer(live)

    def _gather(self) -> tuple[list[tuple[_T, Future[_R]]], bool]:
        """The next batch, and whether more may follow."""
        job = self._jobs.get()
        batch: list[tuple[_T, Future[_R]]] = []
        until = time.monotonic() + self._linger
        while job is not None:
            batch.append(job)
            if len(batch) == self._size:
                return batch, True
            try:
                job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return batch, True
        return batch, False

    def _answer(self, jobs: Sequence[tuple[_T, Future[_R]]]) -> None:
        try:
            results = self._work([item for item, _ in jobs])
        except Exception as fault:
            if len(jobs) > 1:  # one of them is to blame: the others are answered
                for job in jobs:
                    self._answer([job])
                return
            log.exception("a query could not be answered")
            jobs[0][1].set_exception(fault)
            return
        for (_, future), result in zip(jobs, results, strict=True):
            future.set_result(result)
