"""How far a long piece of work is: a bar on a terminal, else a line now and then."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 20.0


@contextmanager
def progress(name: str, total: int, noun: str = "answers") -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line now and then; call the value with the number of things just done."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total)
            yield lambda n: bar.advance(task, n)
        return
    done = 0
    begin = last = time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and 0 < done < total:
            last = now
            rate = done / (now - begin)
            left = (total - done) / rate
            log.info("%s: %d of %d %s, %.1f a second, %.0f s to go", name, done, total, noun, rate, left)

    yield advance
