"""COCO-Spatial (paper, section 4.2): left or right, above or below, asked directly or with two solved examples.

The paper counts an answer as right when the target word occurs in it, so an answer with both words passes; `strict`
wants exactly one of the two. `opposite_reading` scores the other reading of "Which side of X is Y located?".
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from locvlm.evaluation.metrics import Floor, Sums
from locvlm.evaluation.questions import Question, QuestionSet, Scorer, box_of, row_id, text_of
from locvlm.prompts import OPPOSITE
from locvlm.records import BoxXYXY

_WORD = {word: re.compile(rf"\b{word}\b", re.IGNORECASE) for word in OPPOSITE}


def direct_question(row: Mapping[str, Any]) -> Question:
    """A row asked directly."""
    return _question(row, "prompt", "reference", ("subject", "object"))


def icl_question(row: Mapping[str, Any]) -> Question:
    """The same row asked with two solved examples before it."""
    return _question(row, "icl_prompt", "icl_reference", ("subject", "object", "third"))


class SpatialScorer(Scorer):
    """Accuracy by the paper's rule, strict, by class, and under the other reading of the question."""

    def __init__(self, questions: QuestionSet) -> None:
        self._words: Counter[str] = Counter(str(question.reference) for question in questions.questions)
        classes = (word for word in OPPOSITE if self._words[word])
        self.figures = (
            "accuracy",
            "strict",
            *(f"accuracy_{word}" for word in classes),
            "opposite_reading",
            "answered",
        )

    def parse(self, answer: str, question: Question) -> Any:
        """The one word of the pair that occurs; "both"; None when neither does."""
        pair = (str(question.reference), OPPOSITE[str(question.reference)])
        found = [word for word in pair if _WORD[word].search(answer)]
        return "both" if len(found) == 2 else (found[0] if found else None)

    def sums(self, answer: str | None, question: Question) -> Sums:
        """See Scorer."""
        target = str(question.reference)
        said = None if answer is None else self.parse(answer, question)
        right = float(said in (target, "both"))
        return {
            "accuracy": (right, 1.0),
            "strict": (float(said == target), 1.0),
            f"accuracy_{target}": (right, 1.0),
            "opposite_reading": (float(said in (OPPOSITE[target], "both")), 1.0),
            "answered": (float(said is not None), 1.0),
        }

    def floors(self) -> dict[str, Floor]:
        """The commonest word. Classes have none: a constant answer scores 1 on its own class and 0 on the other."""
        word, n = max(self._words.items(), key=lambda pair: (pair[1], pair[0]))
        share = n / self._words.total()
        return {
            "accuracy": Floor(share, f"always '{word}'"),
            "strict": Floor(share, f"always '{word}'"),
            "opposite_reading": Floor(share, f"always '{OPPOSITE[word]}'"),
        }


def _question(row: Mapping[str, Any], prompt: str, reference: str, roles: Sequence[str]) -> Question:
    word = text_of(row, reference).strip().lower()
    if word not in OPPOSITE:
        raise ValueError(f"the {reference} {row[reference]!r} is not one of {', '.join(OPPOSITE)}")
    return Question(row_id(row), text_of(row, "image"), text_of(row, prompt), word, _boxes(row, roles))


def _boxes(row: Mapping[str, Any], roles: Sequence[str]) -> dict[str, BoxXYXY]:
    """The objects of the question, where the row carries them."""
    boxes = {}
    for role in roles:
        thing = row.get(role)
        if isinstance(thing, Mapping) and "box" in thing:
            boxes[str(thing.get("category", role))] = box_of(thing["box"])
    return boxes
