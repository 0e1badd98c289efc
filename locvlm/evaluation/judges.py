"""Who tells whether a free answer is right: string rules, or a language model asked as Video-ChatGPT's protocol asks.

    exact            equal after VQA normalisation
    lexical          equal, or the reference occurs in the answer as whole words, after VQA normalisation
    openai:MODEL     a model behind an OpenAI-compatible endpoint
    hf:FOLDER        a local Hugging Face text model, pinned by the hash of its files

The same answers judged by two models, or by one model in two months, lie ten points apart: every judge has an id that
goes into metrics.json, and figures of different ids are never compared.

Replies of models are kept in a file as they come in. A killed run continues where it stopped, and a second run asks
nothing.
"""

import ast
import hashlib
import json
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.endpoint import KEY_VARIABLE, OPENAI_URL, Endpoint, Fault, ReplyCache, endpoint_key
from locvlm.evaluation.progress import progress
from locvlm.evaluation.vqa import clean, normalise
from locvlm.records import fingerprint

log = logging.getLogger(__name__)

Message = Mapping[str, str]  # role, content
Replies = Generator[tuple[int, str], None, None]

MAX_SCORE = 5

# Video-ChatGPT, quantitative_evaluation/evaluate_activitynet_qa.py, to the letter: judges react to every word.
SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for "
    "question-answer pairs. Your task is to compare the predicted answer with the correct answer and determine if "
    "they match meaningfully. Here's how you can accomplish the task:------##INSTRUCTIONS: - Focus on the meaningful "
    "match between the predicted answer and the correct answer.\n- Consider synonyms or paraphrases as valid "
    "matches.\n- Evaluate the correctness of the prediction compared to the answer."
)
USER = (
    "Please evaluate the following video-based question-answer pair:\n\nQuestion: {question}\nCorrect Answer: "
    "{answer}\nPredicted Answer: {prediction}\n\nProvide your evaluation only as a yes/no and score where the score "
    "is an integer value between 0 and 5, with 5 indicating the highest meaningful match. Please generate the "
    "response in the form of a Python dictionary string with keys 'pred' and 'score', where value of 'pred' is  a "
    "string of 'yes' or 'no' and value of 'score' is in INTEGER, not STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR "
    "EXPLANATION. Only provide the Python dictionary string. For example, your response should look like this: "
    "{{'pred': 'yes', 'score': 4.8}}."
)

_LOCAL_BATCH = 16
_MAX_REPLY = 4000  # characters; a verdict has some thirty, and the parser must not be fed a book
_DICT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True, slots=True)
class Case:
    """What a judge is asked about."""

    question: str
    answer: str
    prediction: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`right` is None when the judge's reply could not be read; `score` is a whole number from 0 to 5 where given."""

    right: bool | None
    score: int | None = None


class Judge(ABC):
    """`id` goes wherever its figures go. `grades`: whether it also gives scores, and may fail to be understood."""

    id: str
    grades: bool = False

    @abstractmethod
    def verdicts(self, cases: Sequence[Case]) -> list[Verdict]:
        """One verdict a case, in order."""


class ExactJudge(Judge):
    """Equal after VQA normalisation."""

    id = "exact"

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict]:
        """See Judge."""
        return [Verdict(said == wanted) for said, wanted in map(_sides, cases)]


class LexicalJudge(Judge):
    """Equal, or the reference occurs as whole words, after VQA normalisation; needs no network and no model."""

    id = "lexical"

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict]:
        """See Judge."""
        return [Verdict(f" {wanted} " in f" {said} ") for said, wanted in map(_sides, cases)]


class Chat(Protocol):
    """A model that replies to chats."""

    @property
    def id(self) -> str:
        """Which model, where and how: part of the judge's id."""

    def replies(self, chats: Sequence[Sequence[Message]]) -> Replies:
        """(number of the chat, reply) of every chat, in any order, as they come in. Raises DataError to stop."""


class ModelJudge(Judge):
    """A language model under Video-ChatGPT's protocol. `cache`: the file that keeps its replies, created when absent.

    A reply that cannot be read is asked for again, `attempts` times in all, and then stands as unreadable.
    """

    grades = True

    def __init__(self, chat: Chat, cache: Path, attempts: int = 3) -> None:
        self.id = chat.id
        self._chat, self._attempts = chat, attempts
        self._cache = ReplyCache(cache, "--judge-cache")

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict]:
        """See Judge. Raises DataError when the model cannot be reached; what was replied until then is kept."""
        keys = [_key(self.id, case) for case in cases]
        todo = {key: case for key, case in zip(keys, cases, strict=True) if self._is_open(key)}
        if len(todo) < len(set(keys)):
            log.info("%s: %d of %d replies are there already", self.id, len(set(keys)) - len(todo), len(set(keys)))
        with progress(f"judge {self.id}", len(todo), "verdicts") as advance:
            while todo:
                asked = list(todo.items())
                # closed when this loop is left early, so that nothing goes on asking
                with closing(self._chat.replies([messages(case) for _, case in asked])) as replies:
                    for number, reply in replies:
                        key = asked[number][0]
                        self._cache.add(key, reply)
                        if not self._is_open(key):
                            del todo[key]
                            advance(1)
        return [parse_verdict(self._cache.replies[key][-1]) for key in keys]

    def _is_open(self, key: str) -> bool:
        replies = self._cache.replies.get(key, [])
        return len(replies) < self._attempts and (not replies or parse_verdict(replies[-1]).right is None)


def messages(case: Case) -> list[Message]:
    """The two messages of the protocol."""
    user = USER.format(question=case.question, answer=case.answer, prediction=case.prediction)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def parse_verdict(reply: str) -> Verdict:
    """The Python dictionary in a reply: `pred` holds yes or no, `score` is taken as a whole number (4.8 is 4).

    Text around the dictionary is passed over. A reply without a readable `pred` has `right` None; a `score` that is
    missing, no number or outside 0 to 5 is None.
    """
    for span in _DICT.findall(reply[:_MAX_REPLY]):
        try:
            value = ast.literal_eval(span)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if not isinstance(value, dict) or not isinstance(value.get("pred"), str):
            continue
        said = value["pred"].lower()
        if "yes" in said or "no" in said:
            return Verdict("yes" in said, _score(value.get("score")))
    return Verdict(None)


class OpenAIChat:
    """A model behind an OpenAI-compatible endpoint, greedy. A request that gets no reply stops the run."""

    def __init__(self, model: str, url: str, key: str | None, *, pause: float = 1.0, attempts: int = 6) -> None:
        self._endpoint = Endpoint(url, key, "--judge-url", pause=pause, attempts=attempts)
        self.id = f"openai:{model}@{self._endpoint.address}"
        self._model = model

    def replies(self, chats: Sequence[Sequence[Message]]) -> Replies:
        """See Chat."""
        bodies = [{"model": self._model, "messages": list(chat), "temperature": 0} for chat in chats]
        # closed when this is left early, so that nothing goes on asking
        with closing(self._endpoint.outcomes(bodies)) as outcomes:
            for number, outcome in outcomes:
                if isinstance(outcome, Fault):
                    advice = (
                        "the replies until now are kept, run the same command again when the endpoint answers"
                        if outcome.may_pass
                        else f"check the model's name, --judge-url and {KEY_VARIABLE}"
                    )
                    raise DataError(f"asking the judge {self.id}: {outcome.reason}; {advice}")
                yield number, outcome


class LocalChat:
    """A text model of a folder, opened by `open_model` when there is something to ask."""

    def __init__(self, folder: Path, fingerprint_of_files: str, open_model: Callable[[Path], "TextReplier"]) -> None:
        self.id = f"hf:{folder.resolve().name}@{fingerprint_of_files}"
        self._folder, self._open = folder, open_model
        self._model: TextReplier | None = None

    def replies(self, chats: Sequence[Sequence[Message]]) -> Replies:
        """See Chat."""
        if self._model is None:
            self._model = self._open(self._folder)
        # like lengths together; a batch at a time, so that finished ones are kept
        order = sorted(range(len(chats)), key=lambda i: sum(len(message["content"]) for message in chats[i]))
        for begin in range(0, len(order), _LOCAL_BATCH):
            numbers = order[begin : begin + _LOCAL_BATCH]
            yield from zip(numbers, self._model.replies([chats[i] for i in numbers]), strict=True)


class TextReplier(Protocol):
    """A text model in this process."""

    def replies(self, chats: Sequence[Sequence[Message]]) -> list[str]:
        """One reply a chat, in order."""


def make_judge(spec: str, url: str | None, cache: Path, open_model: Callable[[Path], TextReplier]) -> Judge:
    """The judge that `spec` names (see the top of this file), `hf:FOLDER@sha256:...` with the hash that its files must
    have. `url`: the endpoint of an openai judge; `cache`: where replies are kept; `open_model` opens a model folder.

    Raises ConfigError for a spec of another form, DataError for a folder that is missing or holds other files.
    """
    if url is not None and not spec.startswith("openai:"):
        raise ConfigError(f"choosing a judge: --judge-url goes with openai:MODEL, not with {spec!r}; leave one out")
    if spec in _RULES:
        return _RULES[spec]()
    kind, _, name = spec.partition(":")
    if kind == "openai" and name:
        address = url or OPENAI_URL
        return ModelJudge(OpenAIChat(name, address, endpoint_key(address, "--judge-url")), cache)
    if kind == "hf" and name:
        path, _, pin = name.partition("@sha256:")
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise DataError(f"choosing a judge: {folder} is no model folder (no config.json); give a folder on disk")
        found = fingerprint(folder)
        if not found.startswith(f"sha256:{pin}"):
            raise DataError(
                f"choosing a judge: the files of {folder} have the hash {found}, sha256:{pin} was asked for"
            )
        return ModelJudge(LocalChat(folder, found, open_model), cache, attempts=1)  # greedy: asking again is no use
    raise ConfigError(f"choosing a judge: {spec!r} is not one of exact, lexical, openai:MODEL, hf:FOLDER")


_RULES: Mapping[str, Callable[[], Judge]] = {"exact": ExactJudge, "lexical": LexicalJudge}


def _sides(case: Case) -> tuple[str, str]:
    """Prediction and reference as the string rules compare them: normalised, except where nothing would be left of the
    reference ("a", "the"), which an empty answer would equal."""
    said, wanted = clean(case.prediction), clean(case.answer)
    if not normalise(wanted):
        return said.lower(), wanted.lower()
    return normalise(said), normalise(wanted)


def _key(judge: str, case: Case) -> str:
    parts = json.dumps([judge, case.question, case.answer, case.prediction])
    return hashlib.sha256(parts.encode()).hexdigest()


def _score(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if math.isfinite(number) and 0 <= number <= MAX_SCORE else None
