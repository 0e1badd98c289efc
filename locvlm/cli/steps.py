"""What a pipeline step does: run one verb in this process, keep what it says in a log, leave a small receipt."""

import contextlib
import io
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from locvlm import claims, identity
from locvlm.records import atomic_write, fingerprint, read_json, write_json

LAST_LINES = 15
END = "ended with exit code "  # the last line of a log; a log without it belongs to a step that was killed


def run_step(
    argv: Sequence[str],
    log: str,
    *,
    printed: str = "",
    runner: str = "local",
    image: str = "",
    gpus: int = 0,
    is_last: bool = False,
) -> None:
    """Run `locvlm <argv>`; what it says goes on to this process's own output and is added to the file `log`.

    `printed`: a file that receives what the verb prints on stdout, under its final name only if the verb succeeds.
    `runner`: "local" runs the verb here, "kuberay" has `locvlm launch` run it as a RayJob of `image`, named after the
    log, so that a retried step follows the job of the first try; `gpus`: GPUs of the verb's own process there (0: its
    Ray workers hold them). The verb works for the run in whose folder `log` lies (<run>/logs/<step>.log); `is_last`:
    its success ends that run. Raises RuntimeError with the verb's last words when it ends with another code than 0.
    """
    path = Path(log)
    root = path.parent.parent
    path.parent.mkdir(parents=True, exist_ok=True)
    command = list(argv) if runner == "local" else _launched(argv, path, image, gpus)
    began = time.monotonic()
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"$ locvlm {shlex.join(command)}\n")
        file.flush()  # who is killed before the first word did begin
        with _told_to(file) as out, _at_work(root):
            code = _main(command)
        file.write(f"{END}{code} after {time.monotonic() - began:.1f} s\n")
    if code:
        identity.end(root, "FAILED", f"{path.stem}: {last_words(path)}")
        raise RuntimeError(f"locvlm {argv[0]} ended with exit code {code}: {last_words(path)} (its log: {path})")
    if printed:
        with atomic_write(Path(printed)) as target:
            target.write(out.getvalue())
    if is_last:
        identity.end(root, "FINISHED")


def file_stems(tasks: Sequence[str], benchmarks: Sequence[Mapping[str, str]]) -> list[str]:
    """The stems of the files of a model's answers and figures: of each task, then of each benchmark. A benchmark is
    called by its "name", else by its task, with a number where a task or another benchmark is called so already."""
    stems = list(tasks)
    for known in benchmarks:
        wanted = known.get("name") or known["task"]
        numbered = (f"{wanted}-{number}" for number in count(2))
        stems.append(wanted if wanted not in stems else next(stem for stem in numbered if stem not in stems))
    return stems


@contextlib.contextmanager
def _at_work(root: Path) -> Iterator[None]:
    """Work for the run in `root`: under its name, and with its claim, if it has one, in use."""
    known = identity.read(root)
    owners = known.kfp_runs if known is not None else ()
    with identity.working_for(root), claims.kept(root.parent, root.name, owners):
        yield


def write_receipt(output: str, receipt: str) -> str:
    """Write to the file `receipt` where a step's `output` (file or folder) lies and what it is; returns the hash.

    A trained model's folder knows its fingerprint (receipt.json); of anything else the bytes are hashed.
    """
    path = Path(output)
    content: Any = None
    for name in ("receipt.json", "manifest.json"):
        if (path / name).is_file():
            content = read_json(path / name)
            break
    known = content.get("fingerprint") if isinstance(content, dict) else None
    digest = str(known or fingerprint(path))
    write_json(Path(receipt), {"path": output, "fingerprint": digest, "content": content})
    return digest


def last_words(log: Path) -> str:
    """The message a failed verb ended with: its error, or else the last lines of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    starts = [number for number, line in enumerate(lines) if line.startswith("$ locvlm ")]
    lines = [line for line in lines[starts[-1] + 1 if starts else 0 :] if line.strip() and not line.startswith(END)]
    errors = [number for number, line in enumerate(lines) if line.startswith(("locvlm: ", "locvlm "))]
    is_internal = bool(errors) and "internal error" in lines[errors[-1]]
    if errors and not is_internal:
        lines = lines[errors[-1] :]
    return "\n".join(lines[-LAST_LINES:]) or "it said nothing"


def exit_code(log: Path) -> int | None:
    """The exit code a log ends with; None when the step died before it could write one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    if not lines or not lines[-1].startswith(END):
        return None
    return int(lines[-1].removeprefix(END).split()[0])


class _Tee(io.TextIOBase):
    """Writes to several streams at once, line by line: what was said before a crash is in the log."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
            stream.flush()
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def fileno(self) -> int:
        return self._streams[0].fileno()


def _launched(argv: Sequence[str], log: Path, image: str, gpus: int) -> list[str]:
    from locvlm.launch import job_name

    options = ["--name", job_name(str(log.parent), log.stem)]
    if image:
        options += ["--image", image]
    if gpus:
        options += ["--workers", "1", "--gpus-per-worker", str(gpus), "--entrypoint-gpus", str(gpus)]
    return ["launch", *options, "--", *argv]


def _main(command: Sequence[str]) -> int:
    from locvlm.cli import main

    try:
        return main(command)
    except SystemExit as end:  # argparse: a command line that is not legal
        return end.code if isinstance(end.code, int) else 2


@contextlib.contextmanager
def _told_to(file: TextIO) -> Iterator[io.StringIO]:
    """Send stdout, stderr and log records to `file` as well; yields a copy of what went to stdout."""
    out = io.StringIO()
    told, said = _Tee(sys.stderr, file), _Tee(sys.stdout, file, out)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # kfp's executor has put its own there; the verb then puts one on the tee
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        try:
            yield out
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
