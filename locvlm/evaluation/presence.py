"""Is there a dog in the image? The Hal sets and POPE, answers mapped by POPE's official rule."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from locvlm.evaluation.metrics import Floor, Item, Sums
from locvlm.evaluation.questions import Question, QuestionSet, Scorer, row_id, text_of

_READABLE = re.compile(r"\b(?:yes|no|not)\b", re.IGNORECASE)


def question(row: Mapping[str, Any]) -> Question:
    """A row of ours (id, image, prompt, reference) or of POPE (question_id, image, text, label)."""
    label = text_of(row, "reference", "label").strip().lower()
    if label not in ("yes", "no"):
        raise ValueError(f"the reference {label!r} is neither yes nor no")
    return Question(row_id(row), text_of(row, "image"), text_of(row, "prompt", "text"), label)


def pope_official(answer: str) -> str:
    """The answer as POPE's own script maps it: "no" if a word before the first period is exactly No, no or not.

    Kept to the letter, because published numbers come from it: an empty answer, "NO" and "cannot" are all "yes".
    """
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "no", "not") for word in words) else "yes"


class PresenceScorer(Scorer):
    """Accuracy, and precision, recall and F1 with yes as positive."""

    figures = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsable_rate")

    def __init__(self, questions: QuestionSet) -> None:
        labels = [question.reference for question in questions.questions]
        self._share_yes = labels.count("yes") / len(labels) if labels else 0.0

    def parse(self, answer: str, question: Question) -> Any:
        """yes or no; every answer is one of them under the official rule."""
        return pope_official(answer)

    def sums(self, answer: str | None, question: Question) -> Sums:
        """See Scorer. A failure is the wrong label, so the four counts always add up to the questions; it adds
        nothing to the yes ratio, because nobody said yes."""
        positive = question.reference == "yes"
        said_yes = (not positive) if answer is None else pope_official(answer) == "yes"
        hit = said_yes and positive
        sums: Sums = {
            "accuracy": (float(said_yes == positive), 1.0),
            "yes_ratio": (float(said_yes and answer is not None), 1.0),
            "unparsable_rate": (float(answer is not None and _READABLE.search(answer) is None), 1.0),
        }
        if said_yes:
            sums["precision"] = (float(hit), 1.0)
        if positive:
            sums["recall"] = (float(hit), 1.0)
        if said_yes or positive:  # F1 = 2 TP / (2 TP + FP + FN)
            sums["f1"] = (2.0 if hit else 0.0, 2.0 if hit else 1.0)
        return sums

    def floors(self) -> dict[str, Floor]:
        """The better of always yes and always no, figure by figure."""
        share = self._share_yes
        return {
            "accuracy": Floor(max(share, 1 - share), "always 'yes'" if share >= 0.5 else "always 'no'"),
            "precision": Floor(share, "always 'yes'"),
            "recall": Floor(float(share > 0), "always 'yes'"),
            "f1": Floor(2 * share / (1 + share), "always 'yes'"),
        }

    def counts(self, items: Sequence[Item]) -> dict[str, int]:
        """The confusion matrix (TP, FP, TN, FN) and the answers in which neither yes, no nor not occurs."""
        counts = {"TP": 0, "FP": 0, "TN": 0, "FN": 0, "unparsable": 0}
        for item in items:
            cell = "T" if item.sums["accuracy"][0] else "F"
            counts[cell + ("P" if "precision" in item.sums else "N")] += 1
            counts["unparsable"] += int(item.sums["unparsable_rate"][0])
        return counts
