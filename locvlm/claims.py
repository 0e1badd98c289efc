"""Who works on a run: a small file beside its folder, so that two runs that would make the same never do so at once.

A claim is given back when its run ends, however it ends, and renewed while a step of the run is at work; one that was
neither (a machine that died, a run that was terminated by hand) is void after some hours.
"""

import fcntl
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from locvlm.errors import DataError
from locvlm.records import read_json, write_json

SUFFIX = ".claim"
RENEWED_EVERY = 900.0  # seconds; far below the hours after which a claim is void

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """`owner`: the id of the pipeline run that has it; `since`: seconds since 1970."""

    owner: str
    since: float


def take(runs: Path, run: str, owner: str, hours: float) -> Claim:
    """Claim `run`, one of the folders in `runs`, for `owner`; returns whose claim it is now.

    It is another's only if that one is younger than `hours`; the owner's own claim is renewed, so a retried step has
    it still. Raises DataError when the file cannot be read or written.
    """
    with _locked(runs):
        path = runs / f"{run}{SUFFIX}"
        found = _read(path)
        if found is not None and found.owner != owner and time.time() - found.since < hours * 3600:
            return found
        claim = Claim(owner, time.time())
        write_json(path, {"owner": claim.owner, "since": claim.since})
        return claim


def renew(runs: Path, run: str, owners: Sequence[str]) -> bool:
    """Say that the claim on `run` is in use, if one of `owners` has it. Raises DataError."""
    with _locked(runs):
        path = runs / f"{run}{SUFFIX}"
        found = _read(path)
        if found is None or found.owner not in owners:
            return False
        write_json(path, {"owner": found.owner, "since": time.time()})
        return True


@contextmanager
def kept(runs: Path, run: str, owners: Sequence[str]) -> Iterator[None]:
    """Renew the claim on `run` while the body works; nothing where it has none, or another has it."""
    if not (runs / f"{run}{SUFFIX}").is_file():
        yield
        return
    done = threading.Event()

    def work() -> None:
        while True:
            try:
                renew(runs, run, owners)
            except DataError as fault:  # the step itself is worth more
                log.warning("the claim on %s could not be renewed: %s", run, fault)
            if done.wait(RENEWED_EVERY):
                return

    thread = threading.Thread(target=work, name=f"claim on {run}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def give_back(runs: Path, owner: str) -> list[str]:
    """Give back all claims that `owner` has in `runs`; returns the names of their runs."""
    with _locked(runs):
        mine = [path for path in sorted(runs.glob(f"*{SUFFIX}")) if (_read(path) or Claim("", 0)).owner == owner]
        for path in mine:
            path.unlink()
    return [path.name.removesuffix(SUFFIX) for path in mine]


def _read(path: Path) -> Claim | None:
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        return Claim(str(content["owner"]), float(content["since"]))
    except (KeyError, TypeError, ValueError) as fault:
        raise DataError(
            f"reading the claim {path}: {fault!r}; needed is JSON with owner and since; remove the file if no run is "
            "under way"
        ) from None


@contextmanager
def _locked(runs: Path) -> Iterator[None]:
    """One process at a time looks and writes."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with open(runs / ".claims.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as fault:
        raise DataError(f"claiming a run in {runs}: {fault}; the folder has to exist and be writable") from None
