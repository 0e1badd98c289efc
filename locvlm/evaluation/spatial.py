"""COCO-Spatial (paper, section 4.2): left or right, above or below, asked directly or with two solved examples.

The paper counts an answer as right when the target word occurs in it, so an answer with both words passes; `strict`
wants exactly one of the two. `opposite_reading` scores the other reading of "Which side of X is Y located?".

A set that asks its questions about the mirrored images as well has two more figures, over pairs of a question and its
twin. `consistency`: both are answered rightly. `flips`: each answer has one of the two words, and the second is to the
first as it should be, right or wrong: the other one for left and right, the same for above and below.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from locvlm.data.spatial import MIRRORED
from locvlm.evaluation.metrics import Floor, Sums
from locvlm.evaluation.questions import Question, QuestionSet, Scorer, box_of, row_id, text_of
from locvlm.prompts import OPPOSITE, said_side
from locvlm.records import BoxXYXY


def direct_question(row: Mapping[str, Any]) -> Question:
    """A row asked directly."""
    return _question(row, "prompt", "reference", ("subject", "object"))


def icl_question(row: Mapping[str, Any]) -> Question:
    """The same row asked with two solved examples before it. Raises ValueError for a set without a third object."""
    if row.get("icl_prompt", "") is None:
        raise ValueError("it has no in-context form (the released rules choose no third object); ask coco-spatial")
    return _question(row, "icl_prompt", "icl_reference", ("subject", "object", "third"))


class SpatialScorer(Scorer):
    """Accuracy by the paper's rule, strict, by class, and under the other reading of the question."""

    def __init__(self, questions: QuestionSet) -> None:
        self._words: Counter[str] = Counter(str(question.reference) for question in questions.questions)
        by_id = {question.id: question for question in questions.questions if not question.mirror}
        twins = {question.id.removesuffix(MIRRORED): question for question in questions.questions if question.mirror}
        self._twins = {key: twin for key, twin in twins.items() if key in by_id}
        self._alike = [twin for key, twin in self._twins.items() if by_id[key].reference == twin.reference]
        self._answers: Mapping[str, str | None] = {}
        classes = (word for word in OPPOSITE if self._words[word])
        self.figures = (
            "accuracy",
            "strict",
            *(f"accuracy_{word}" for word in classes),
            *(("consistency", "flips") if self._twins else ()),
            "opposite_reading",
            "answered",
        )

    def prepare(self, answers: Mapping[str, str | None]) -> None:
        """See Scorer."""
        self._answers = answers

    def parse(self, answer: str, question: Question) -> Any:
        """The one word of the pair that occurs; "both"; None when neither does."""
        return said_side(answer, str(question.reference))

    def sums(self, answer: str | None, question: Question) -> Sums:
        """See Scorer."""
        target = str(question.reference)
        said = None if answer is None else self.parse(answer, question)
        right = float(said in (target, "both"))
        return self._pair_sums(question, said) | {
            "accuracy": (right, 1.0),
            "strict": (float(said == target), 1.0),
            f"accuracy_{target}": (right, 1.0),
            "opposite_reading": (float(said in (OPPOSITE[target], "both")), 1.0),
            "answered": (float(said is not None), 1.0),
        }

    def _pair_sums(self, question: Question, said: Any) -> Sums:
        """What a question with a twin adds to the figures over pairs."""
        twin = self._twins.get(question.id)
        if twin is None or question.mirror:
            return {}
        answer = self._answers.get(twin.id)
        turned = None if answer is None else self.parse(answer, twin)
        first, second = str(question.reference), str(twin.reference)
        both = said in (first, "both") and turned in (second, "both")
        fits = (said, turned) in ((first, second), (OPPOSITE[first], OPPOSITE[second]))
        return {"consistency": (float(both), 1.0), "flips": (float(fits), 1.0)}

    def floors(self) -> dict[str, Floor]:
        """The commonest word. Classes have none: a constant answer scores 1 on its own class and 0 on the other."""
        word, n = max(self._words.items(), key=lambda pair: (pair[1], pair[0]))
        share = n / self._words.total()
        pairs = {}
        if self._twins:
            # one and the same word can be right twice where the mirror changes nothing, and cannot where it does
            alike = Counter(str(twin.reference) for twin in self._alike)
            often, times = max(alike.items(), key=lambda pair: (pair[1], pair[0]), default=(word, 0))
            pairs["consistency"] = Floor(times / len(self._twins), f"always '{often}'")
            pairs["flips"] = Floor(len(self._alike) / len(self._twins), f"always '{word}'")
        return pairs | {
            "accuracy": Floor(share, f"always '{word}'"),
            "strict": Floor(share, f"always '{word}'"),
            "opposite_reading": Floor(share, f"always '{OPPOSITE[word]}'"),
        }


def _question(row: Mapping[str, Any], prompt: str, reference: str, roles: Sequence[str]) -> Question:
    word = text_of(row, reference).strip().lower()
    if word not in OPPOSITE:
        raise ValueError(f"the {reference} {row[reference]!r} is not one of {', '.join(OPPOSITE)}")
    mirror = row.get("mirror") is True
    return Question(row_id(row), text_of(row, "image"), text_of(row, prompt), word, _boxes(row, roles), mirror)


def _boxes(row: Mapping[str, Any], roles: Sequence[str]) -> dict[str, BoxXYXY]:
    """The objects of the question, where the row carries them."""
    boxes = {}
    for role in roles:
        thing = row.get(role)
        if isinstance(thing, Mapping) and "box" in thing:
            boxes[str(thing.get("category", role))] = box_of(thing["box"])
    return boxes
