"""Run a pipeline on this machine through KFP's local runner, with a calm view of what happens.

The runner prints everything it does and every line of every step; that goes to a file, and a person sees one line a
step. Finished steps are taken from the cache when the same run is started again.
"""

import contextlib
import io
import json
import logging
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kfp import local

from locvlm.cli.steps import exit_code, last_words
from locvlm.errors import LocVLMError

_COLOURS = re.compile(r"\x1b\[\d+m")
_STARTED = re.compile(r"Executing task '(.+)'")
_FINISHED = re.compile(r"Task '(.+)' finished with status SUCCESS")
_CACHED = re.compile(r"Task (\S+) cache hit")
_SAID = re.compile(r"^\s+\d\d:\d\d:\d\d (.+)")  # a log line of a verb
_HEARTBEAT = 30.0  # seconds between signs of life where the output is not a terminal


class StepError(LocVLMError):
    """A step of the pipeline ended without success."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run keeps things: `logs` of its steps, what KFP keeps of them, the log of everything."""

    root: Path

    @property
    def logs(self) -> Path:
        """One file a step."""
        return self.root / "logs"

    @property
    def kfp(self) -> Path:
        """Receipts and KFP's cache."""
        return self.root / "kfp"

    @property
    def log(self) -> Path:
        """Everything that KFP and the steps said."""
        return self.root / "pipeline.log"


def run_pipeline(pipeline: Any, arguments: Mapping[str, Any], folder: RunFolder, out: TextIO) -> None:
    """Run `pipeline` here, one step after the other, and tell the progress on `out`.

    Raises StepError with the step's title, its last words, its log and its exit code (1 or 2).
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    _forget_lost_outputs(folder.kfp)
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder.kfp),
        enable_caching=True,
        cache_root=str(folder.kfp / "cache"),
    )
    with open(folder.log, "a", encoding="utf-8") as file:
        view = _View(_titles(pipeline), file, out)
        with _quiet(view):
            try:
                pipeline(**arguments)
            except RuntimeError as failure:
                raise _failure(view, view.stopped("failed"), folder, failure) from None
            except KeyboardInterrupt:
                view.stopped("stopped")
                raise


def _titles(pipeline: Any) -> dict[str, str]:
    """KFP's name of a step -> its title. Steps inside a condition or an exit handler are components with a DAG."""
    spec = pipeline.pipeline_spec
    dags = [spec.root.dag, *(component.dag for component in spec.components.values())]
    titles: dict[str, str] = {}
    for dag in dags:
        for key, task in dag.tasks.items():
            name = task.component_ref.name
            if not spec.components[name].HasField("dag"):
                titles[key] = titles[name.removeprefix("comp-")] = task.task_info.name or key
    return titles


def _forget_lost_outputs(kfp_folder: Path) -> None:
    """KFP's cache does not see when an output was removed by hand; without its receipt the step runs again."""
    for receipt in kfp_folder.glob("*/*/receipt"):
        if not Path(json.loads(receipt.read_text(encoding="utf-8"))["path"]).exists():
            receipt.unlink()


def _failure(view: "_View", title: str, folder: RunFolder, failure: RuntimeError) -> StepError:
    title = title or "the pipeline"
    places = (folder.logs.glob("*.log"), folder.root.glob("*/logs/*.log"))  # a retraining names the run's folder itself
    logs = [path for place in places for path in place if path.stat().st_mtime >= view.began]
    if not logs:  # it failed before its verb began
        words = "\n".join(view.last_lines) or _COLOURS.sub("", str(failure))
        return StepError(f"{title} failed:\n{_indented(words)}\n  everything it said: {folder.log}", 1)
    log = max(logs, key=lambda path: path.stat().st_mtime)
    code = exit_code(log)
    words = last_words(log)
    if code is None:
        words += "\n(it died there without a word: killed, perhaps for want of memory)"
    return StepError(f"{title} failed:\n{_indented(words)}\n  its log: {log}", 2 if code == 2 else 1)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


@contextlib.contextmanager
def _quiet(view: "_View") -> Any:
    """Send what KFP prints, logs and warns of to the view."""
    root = logging.getLogger()
    handler = logging.StreamHandler(view)  # KFP tells cache hits in the log only
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(view):
            warnings.filterwarnings("ignore", module=r"kfp\.")
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


class _View(io.TextIOBase):
    """Takes every line that KFP prints; writes all to a file and tells a person what matters."""

    def __init__(self, titles: Mapping[str, str], file: TextIO, out: TextIO) -> None:
        self.title = ""
        self.began = 0.0
        self.last_lines: list[str] = []
        self._titles, self._file, self._out = titles, file, out
        self._n_steps = len(set(titles.values()))
        self._n_begun = 0
        self._line = ""
        self._told = 0.0
        self._live = out.isatty()

    def write(self, text: str) -> int:
        self._file.write(_COLOURS.sub("", text))
        self._file.flush()
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._read(_COLOURS.sub("", line))
        return len(text)

    def stopped(self, how: str) -> str:
        """Say how the step that was under way ended, and return its title ("" for none)."""
        title = self.title
        if title:
            self._finish(f"{how} after {_duration(time.time() - self.began)}")
        return title

    def _read(self, line: str) -> None:
        if found := _STARTED.search(line):
            self._begin(found[1])
            self._say(f"{self._head()} ...", lasting=not self._live)
        elif found := _FINISHED.search(line):
            self._finish(_duration(time.time() - self.began))
        elif found := _CACHED.search(line):
            self._begin(found[1])
            self._finish("cached")
        elif self.title and line.strip():
            self.last_lines = [*self.last_lines[-14:], line.strip()]
            if found := _SAID.match(line):
                self._note(found[1])

    def _begin(self, name: str) -> None:
        self.title, self.began, self.last_lines = self._titles.get(name, name), time.time(), []
        self._told = self.began
        self._n_begun += 1

    def _note(self, words: str) -> None:
        now = time.time()
        if self._live:
            self._say(f"{self._head()} {_duration(now - self.began)}  {words}"[:110], lasting=False)
        elif now - self._told >= _HEARTBEAT:
            self._told = now
            self._say(f"{self._head()} {_duration(now - self.began)}  {words}")

    def _finish(self, how: str) -> None:
        self._say(f"{self._head()} {how}")
        self.title = ""

    def _head(self) -> str:
        return f"  [{self._n_begun:2}/{self._n_steps}] {self.title:<32}"

    def _say(self, text: str, *, lasting: bool = True) -> None:
        self._out.write(("\r\x1b[K" if self._live else "") + text + ("\n" if lasting else ""))
        self._out.flush()


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
