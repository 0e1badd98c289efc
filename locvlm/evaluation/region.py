"""Region description (RevLoc): what is at this place? Right when the answer names the region's category and no other.

This is the category-level score for models whose references are category names. METEOR against human expressions is
another measure and is not computed here.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from locvlm.evaluation.metrics import Floor, Sums
from locvlm.evaluation.questions import Question, QuestionSet, Scorer, box_of, row_id, text_of
from locvlm.records import BoxXYXY, Conversation, Turn


def question(row: Mapping[str, Any]) -> Question:
    """A row with `category`, `box` (x1, y1, x2, y2) in pixels and, optionally, `references`."""
    category = text_of(row, "category")
    references = row.get("references") or [category]
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise ValueError("`references` is not a list of texts")
    box = box_of(row["box"])
    return _question(row_id(row), text_of(row, "image"), text_of(row, "prompt"), category, references, box)


def turn_question(key: str, conversation: Conversation, turn: Turn) -> Question | None:
    """A rev_loc turn, without its prompt."""
    if turn.objective != "rev_loc" or turn.box_xyxy is None:
        return None
    return _question(key, conversation.image, "", turn.category, [turn.category], turn.box_xyxy)


class RegionScorer(Scorer):
    """`accuracy`: the right category and no other; `names_category`: the right one, whatever else is named."""

    figures = ("accuracy", "names_category", "names_nothing")

    def __init__(self, questions: QuestionSet) -> None:
        names = sorted(questions.categories, key=lambda name: (-len(name), name))
        # longest first, so that "hot dog" is not also a dog
        self._names = {name.lower(): name for name in names}
        self._pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, self._names))})\b") if names else None
        self._categories = Counter(question.reference["category"] for question in questions.questions)

    def parse(self, answer: str, question: Question) -> Any:
        """The categories of the set that the answer names as whole words, in order of appearance; None for none."""
        if self._pattern is None:
            return None
        found = self._pattern.findall(" ".join(answer.lower().split()))
        return list(dict.fromkeys(self._names[name] for name in found)) or None

    def sums(self, answer: str | None, question: Question) -> Sums:
        """See Scorer."""
        named = (None if answer is None else self.parse(answer, question)) or []
        target = question.reference["category"]
        return {
            "accuracy": (float(named == [target]), 1.0),
            "names_category": (float(target in named), 1.0),
            "names_nothing": (float(not named), 1.0),
        }

    def floors(self) -> dict[str, Floor]:
        """Always the commonest category."""
        name, n = max(self._categories.items(), key=lambda pair: (pair[1], pair[0]))
        floor = Floor(n / self._categories.total(), f"always '{name}'")
        return {"accuracy": floor, "names_category": floor}


def _question(key: str, image: str, prompt: str, category: str, references: list[str], box: BoxXYXY) -> Question:
    reference = {"category": category, "references": references, "box": list(box)}
    return Question(key, image, prompt, reference, {category: box})
