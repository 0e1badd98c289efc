"""GQA: one short answer a question.

The official figure is string equality. LLaVA lower-cases the answer and takes the final period off first, and published
numbers of LLaVA-like models come from that: `accuracy`. A model that answers in sentences scores near 0 under it;
`contains` asks whether the reference occurs in the answer as whole words.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
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

KINDS = ("structural", "semantic")


def as_llava(answer: str) -> str:
    """The answer as LLaVA's conversion hands it to the official evaluator."""
    return answer.strip().rstrip(".").lower()


def contains(answer: str, reference: str) -> bool:
    """Whether the reference occurs in the answer as whole words, in any case."""
    words = " ".join(answer.lower().split())
    return re.search(rf"(?<!\w){re.escape(' '.join(reference.lower().split()))}(?!\w)", words) is not None


def rows(source: Source) -> Rows:
    """The rows of an official question file {id: record}, of a list of its records, or of LLaVA's JSON lines, which
    have no answers: an official file as annotations brings those. Questions outside the balanced set are skipped,
    since the official accuracy leaves them out.

    Raises DataError for a file of another form, and for questions without a record among the annotations.
    """
    if source.split is not None:
        raise DataError(f"reading {source.path}: a GQA file is one split; leave out --split")
    found = _records(source.path, read_value(source.path))
    skipped: dict[str, int] = {}
    if source.annotations is not None:
        answers = by_id(source.annotations, _records(source.annotations, read_value(source.annotations)))
        kept = ("answer", "types", "isBalanced")
        records = {key: {name: row[name] for name in kept if name in row} for key, row in answers.items()}
        found, skipped = joined(source, found, records)
    balanced = [row for row in found if row.get("isBalanced") is not False]
    if len(balanced) < len(found):
        skipped = {**skipped, "not in the balanced set": len(found) - len(balanced)}
    return Rows(balanced, skipped)


def question(row: Mapping[str, Any]) -> Question:
    """A row with `question` and `answer`, and `types` with `structural` and `semantic` where known."""
    image = text_of(row, "image") if "image" in row else f"{text_of(row, 'imageId')}.jpg"
    prompt = text_of(row, "prompt", "question", "text")
    # in rows of predictions `answer` is what the model said, unless the reference came as a whole record
    answer = row["reference"] if isinstance(row.get("reference"), str) else row.get("answer")
    if answer is None:
        return Question(row_id(row), image, prompt, None)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"the answer {answer!r} is not a text")
    types = row["types"] if isinstance(row.get("types"), Mapping) else row
    known = {kind: types[kind] for kind in KINDS if isinstance(types.get(kind), str)}
    return Question(row_id(row), image, prompt, {"answer": answer, **known})


def result(key: str, answer: str, is_processed: bool) -> dict[str, Any]:
    """A record of the official result file."""
    return {"questionId": key, "prediction": answer if is_processed else as_llava(answer)}


class GqaScorer(Scorer):
    """Equality and containment; equality also for binary and open questions and by structural and semantic type."""

    def __init__(self, questions: QuestionSet) -> None:
        references = [question.reference for question in questions.questions if question.reference]
        self._answers: Counter[str] = Counter(as_llava(reference["answer"]) for reference in references)
        self._kinds = {kind: sorted({r[kind] for r in references if kind in r}) for kind in KINDS}
        groups = [f"{kind}_{name}" for kind, names in self._kinds.items() for name in names]
        halves = [name for name in ("binary", "open") if any(_half(reference) == name for reference in references)]
        self.figures = ("accuracy", "contains", *(f"accuracy_{name}" for name in (*halves, *groups)))

    def parse(self, answer: str, question: Question) -> Any:
        """The answer as it is compared; None for nothing left."""
        return as_llava(answer) or None

    def sums(self, answer: str | None, question: Question) -> Sums:
        """See Scorer."""
        reference = question.reference
        target = reference["answer"]
        equal = float(answer is not None and as_llava(answer) == as_llava(target))
        sums: Sums = {
            "accuracy": (equal, 1.0),
            "contains": (float(answer is not None and contains(answer, target)), 1.0),
        }
        if half := _half(reference):
            sums[f"accuracy_{half}"] = (equal, 1.0)
        for kind in KINDS:
            if kind in reference:
                sums[f"accuracy_{kind}_{reference[kind]}"] = (equal, 1.0)
        return sums

    def floors(self) -> dict[str, Floor]:
        """Always the commonest answer; containment has none, since one could recite a dictionary."""
        answer, n = max(self._answers.items(), key=lambda pair: (pair[1], pair[0]))
        return {"accuracy": Floor(n / self._answers.total(), f"always '{answer}'")}

    def facts(self, figures: Mapping[str, Figure]) -> dict[str, Any]:
        """`exact` (the accuracy again) and the accuracy by type, under the data set's own names of the types."""
        by_type = {
            f"by_{kind}": {name: figures[f"accuracy_{kind}_{name}"].value for name in names}
            for kind, names in self._kinds.items()
        }
        return {"exact": figures["accuracy"].value, **by_type}


def _half(reference: Mapping[str, Any]) -> str:
    """The official division: questions of structure `query` are open, all others binary."""
    structural = reference.get("structural")
    if structural is None:
        return ""
    return "open" if structural == "query" else "binary"


def _records(path: Path, value: Any) -> list[Mapping[str, Any]]:
    """The official {id: record} form as rows with their id; any other form as it is. Raises DataError."""
    if isinstance(value, dict) and value and all(isinstance(record, dict) for record in value.values()):
        return [{"id": key, **record} for key, record in value.items()]
    return list(check_rows(path, value))
