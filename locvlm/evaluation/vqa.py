"""VQAv2 (and OK-VQA, which shares its rule): an answer against the answers of ten people.

The official evaluator compares each person's answer with the prediction: an answer given by m of the others scores
min(1, m / 3), averaged over leaving out each of the ten, which is min(1, 0.3 m). Before that it normalises prediction
and references, except where all ten agree: then raw strings are compared, so that text read off a sign keeps its form,
and "Yes." against ten times "yes" scores 0. `accuracy` follows it to the letter; `accuracy_always_normalised` leaves
the exception out, as many re-implementations do.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from locvlm.errors import DataError
from locvlm.evaluation.metrics import Figure, Floor, Sums
from locvlm.evaluation.questions import (
    Question,
    QuestionSet,
    Rows,
    Scorer,
    Source,
    by_id,
    check_rows,
    joined,
    read_value,
    row_id,
    text_of,
)

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # the official list: apostrophe and colon stay
_HAS_PUNCTUATION = re.compile(f"[{re.escape(_PUNCTUATION)}]")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the official code passes a flag where the count belongs
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
# An answer that lacks one apostrophe of these gets it back. The official table also has keys with a capital I, which
# never match, because the text is lower-cased before.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at in range(len(word)) if word[at] == "'"
} | {"somebody'd": "somebodyd"}  # sic

ANSWER_TYPES = ("yes/no", "number", "other")


def clean(answer: str) -> str:
    """Newlines and tabs as spaces, ends stripped: what the official evaluator does to every answer."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 18)  # answers repeat: 2.1 million references of VQAv2 val are some 150,000 strings
def normalise(answer: str) -> str:
    """The official answer processor: punctuation, number words, articles, contractions. Expects `clean` text."""
    text = answer
    if _HAS_PUNCTUATION.search(answer):
        in_number = _COMMA_IN_NUMBER.search(answer) is not None
        table = {}
        for mark in _PUNCTUATION:
            if mark in answer:
                delete = in_number or f"{mark} " in answer or f" {mark}" in answer
                table[ord(mark)] = "" if delete else " "
        text = answer.translate(table)
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def consensus(matches: int, n: int) -> float:
    """The score of an answer that `matches` of `n` people gave: the mean over all people of min(1, m / 3), m counted
    among the others; min(1, 0.3 m) for ten."""
    if n == 10:
        return min(1.0, 0.3 * matches)
    return (matches * min(1.0, (matches - 1) / 3) + (n - matches) * min(1.0, matches / 3)) / n


def accuracies(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """(official, always normalised) accuracy of one answer."""
    said, given = clean(answer), [clean(reference) for reference in references]
    always = consensus([normalise(text) for text in given].count(normalise(said)), len(given))
    if given.count(given[0]) < len(given):
        return always, always
    return consensus(len(given) if said == given[0] else 0, len(given)), always


def rows(source: Source) -> Rows:
    """The rows of the official questions file with those of the annotations file; of OK-VQA's file, whose records hold
    their answers; of a list or JSON lines in our form. Without annotations the questions can be asked, not scored.

    Raises DataError for a file of another form, and for questions without an annotation.
    """
    document = read_value(source.path)
    official = isinstance(document, dict) and "questions" in document
    found = check_rows(source.path, document["questions"] if official else document)
    subset = str(document.get("data_subtype", "val2014")) if official else "val2014"
    asked = [_asked(row, subset) for row in found]
    if source.split is not None:
        raise DataError(f"reading {source.path}: a VQA file is one split; leave out --split")
    if source.annotations is None:
        return Rows(asked)
    answers = read_value(source.annotations)
    answers = check_rows(source.annotations, answers.get("annotations") if isinstance(answers, dict) else answers)
    kept = ("answers", "answer_type", "question_type")
    records = {
        key: {name: row[name] for name in kept if name in row}
        for key, row in by_id(source.annotations, answers).items()
    }
    return Rows(*joined(source, asked, records))


def question(row: Mapping[str, Any]) -> Question:
    """A row with `answers`, ten texts or records with `answer`, and, optionally, `answer_type`."""
    prompt = text_of(row, "prompt", "question", "text")
    answers = row.get("answers")
    if answers is None:
        return Question(row_id(row), text_of(row, "image"), prompt, None)
    if not isinstance(answers, list):
        raise ValueError("`answers` is not a list")
    texts = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("`answers` is not a list of texts, or is empty")
    reference = {"answers": texts, "answer_type": str(row.get("answer_type", ""))}
    return Question(row_id(row), text_of(row, "image"), prompt, reference)


def result(key: str, answer: str, is_processed: bool) -> dict[str, Any]:
    """A record of the official result file. The answer goes through the processor once: an answer that comes from a
    result file already (`is_processed`) stays as it is, because twice is not the same as once."""
    text = answer if is_processed else normalise(clean(answer))
    return {"question_id": int(key) if key.isdecimal() else key, "answer": text}


class VqaScorer(Scorer):
    """Official accuracy, the same without the exception for agreement, and by type of answer."""

    def __init__(self, questions: QuestionSet) -> None:
        self._references = [question.reference for question in questions.questions if question.reference]
        types = {reference["answer_type"] for reference in self._references} - {""}
        order = [*ANSWER_TYPES, *sorted(types - set(ANSWER_TYPES))]
        self._types = {name: f"accuracy_{re.sub('[^a-z0-9]+', '_', name.lower())}" for name in order if name in types}
        self.figures = ("accuracy", "accuracy_always_normalised", *self._types.values())

    def parse(self, answer: str, question: Question) -> Any:
        """The normalised answer; None for nothing left."""
        return normalise(clean(answer)) or None

    def sums(self, answer: str | None, question: Question) -> Sums:
        """See Scorer."""
        reference = question.reference
        official, always = (0.0, 0.0) if answer is None else accuracies(answer, reference["answers"])
        sums: Sums = {"accuracy": (official, 1.0), "accuracy_always_normalised": (always, 1.0)}
        if reference["answer_type"]:
            sums[self._types[reference["answer_type"]]] = (official, 1.0)
        return sums

    def floors(self) -> dict[str, Floor]:
        """The one answer that scores best on all questions. Types have none: "yes" cannot be right for a number."""
        totals: dict[str, defaultdict[str, float]] = {name: defaultdict(float) for name in self.figures[:2]}
        for reference in self._references:
            given = [clean(text) for text in reference["answers"]]
            unanimous = given.count(given[0]) == len(given)
            for text, n in Counter(map(normalise, given)).items():
                value = consensus(n, len(given))
                totals["accuracy_always_normalised"][text] += value
                if not unanimous or text == given[0]:
                    totals["accuracy"][text] += value
        floors = {}
        for name, scores in totals.items():
            text, total = max(scores.items(), key=lambda pair: (pair[1], pair[0]), default=("", 0))
            floors[name] = Floor(total / max(1, len(self._references)), f"always '{text}'")
        return floors

    def facts(self, figures: Mapping[str, Figure]) -> dict[str, Any]:
        """`by_answer_type`: the official accuracy under the data set's own names of the types."""
        return {"by_answer_type": {name: figures[figure].value for name, figure in self._types.items()}}


def _asked(row: Mapping[str, Any], subset: str) -> Mapping[str, Any]:
    """The row with the name of its image, which official files leave to the reader: COCO_val2014_000000000042.jpg."""
    number = row.get("image_id")
    if "image" in row or not isinstance(number, int):
        return row
    folder = "test2015" if subset.startswith("test") else subset  # test-dev2015 is a part of test2015
    return {**row, "image": f"COCO_{folder}_{number:012d}.jpg"}
