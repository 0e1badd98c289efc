"""Open-ended video QA: ActivityNet-QA, MSRVTT-QA, MSVD-QA and the open part of TGIF-QA, told right by a judge.

Which judge decides moves the figure by ten points, so a figure belongs to its judge (`locvlm.evaluation.judges`).
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from locvlm.errors import DataError
from locvlm.evaluation.judges import MAX_SCORE, Case, ExactJudge, Judge, Verdict
from locvlm.evaluation.metrics import Figure, Floor, Item, Sums
from locvlm.evaluation.questions import (
    Question,
    QuestionSet,
    Rows,
    Scorer,
    Source,
    by_id,
    check_rows,
    joined,
    read_rows,
    read_text,
    read_value,
    row_id,
    text_of,
)
from locvlm.evaluation.vqa import clean, normalise

_QUESTION_WORDS = ("what", "who", "how", "when", "where")  # how MSVD-QA and MSRVTT-QA divide their questions
_MAPPING_FILE = "youtube_mapping.txt"


def activitynet_rows(source: Source) -> Rows:
    """val_q.json with val_a.json as annotations; without annotations the questions can be asked, not scored."""
    _refuse_split(source)
    asked = [
        {**row, "image": f"v_{row['video_name']}.mp4"} if isinstance(row.get("video_name"), str) else row
        for row in check_rows(source.path, read_value(source.path))
    ]
    if source.annotations is None:
        return Rows(asked)
    answers = by_id(source.annotations, check_rows(source.annotations, read_value(source.annotations)))
    kept = {key: {name: row[name] for name in ("answer", "type") if name in row} for key, row in answers.items()}
    return Rows(*joined(source, asked, kept))


def msrvtt_rows(source: Source) -> Rows:
    """val_qa.json, or the table video,question,answer,qid,type."""
    return _with_videos(source, lambda number: f"video{number}.mp4")


def msvd_rows(source: Source) -> Rows:
    """val_qa.json. With youtube_mapping.txt ("NAME vid42") beside it the videos are named NAME.avi, else vid42.avi."""
    names = _youtube_names(source.path.parent / _MAPPING_FILE)
    return _with_videos(source, lambda number: f"{names.get(f'vid{number}', f'vid{number}')}.avi")


def tgif_rows(source: Source) -> Rows:
    """Test_frameqa_question.csv and its like, which are tab-separated in spite of the name."""
    _refuse_annotations(source)
    found = []
    for row in _table(source.path, "\t", ("gif_name", "question", "answer", "vid_id")):
        about = {"id": row["vid_id"], "image": f"{row['gif_name']}.gif", "type": row.get("type", "")}
        found.append({**about, "question": row["question"], "answer": row["answer"]})
    return Rows(found)


def question(row: Mapping[str, Any]) -> Question:
    """A row with `question`, `answer` and, optionally, `type`; without one the question word where it is one of the
    five of MSVD-QA."""
    asked = text_of(row, "prompt", "question")
    # in rows of predictions `answer` is what the model said, unless the reference came as a whole record
    answer = row["reference"] if isinstance(row.get("reference"), str) else row.get("answer")
    if answer is None:
        return Question(row_id(row), text_of(row, "image"), asked, None)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"the answer {answer!r} is not a text")
    kind = row.get("type")
    if kind is None or kind == "":
        first = next(iter(asked.lower().split()), "")
        kind = first if first in _QUESTION_WORDS else ""
    reference = {"question": asked, "answer": answer, "type": str(kind)}
    return Question(row_id(row), text_of(row, "image"), asked, reference)


class VideoQaScorer(Scorer):
    """`accuracy`: the share of all questions that the judge calls right, also by type of question.

    Judges that are models add `accuracy_of_judged` (the share among the replies that could be read, which is how the
    protocol's own script counts), and `judge_score`, the mean of their whole-number scores over their maximum.
    """

    def __init__(self, questions: QuestionSet, judge: Judge | None = None) -> None:
        self._judge = judge or ExactJudge()
        self._questions = questions.questions
        references = [question.reference for question in questions.questions if question.reference]
        self._answers: Counter[str] = Counter(normalise(clean(reference["answer"])) for reference in references)
        kinds = sorted({reference["type"] for reference in references} - {""}, key=lambda kind: (len(kind), kind))
        self._kinds = {kind: f"accuracy_type_{re.sub('[^a-z0-9]+', '_', kind.lower())}" for kind in kinds}
        graded = ("accuracy_of_judged", "judge_score") if self._judge.grades else ()
        self.figures = ("accuracy", *graded, *self._kinds.values())
        self._verdicts: dict[str, Verdict] = {}

    def prepare(self, answers: Mapping[str, str | None]) -> None:
        """Ask the judge about every answer; a question without one is wrong without asking."""
        answered = [(question, answers[question.id]) for question in self._questions]
        cases = {
            question.id: Case(question.reference["question"], question.reference["answer"], answer)
            for question, answer in answered
            if answer is not None
        }
        self._verdicts = dict(zip(cases, self._judge.verdicts(list(cases.values())), strict=True))

    def parse(self, answer: str, question: Question) -> Any:
        """The normalised answer; None for nothing left."""
        return normalise(clean(answer)) or None

    def sums(self, answer: str | None, question: Question) -> Sums:
        """See Scorer. An answer that the judge gave no readable reply on counts as wrong."""
        verdict = self._verdicts.get(question.id) if answer is not None else None
        right = float(verdict is not None and verdict.right is True)
        sums: Sums = {"accuracy": (right, 1.0)}
        if kind := question.reference["type"]:
            sums[self._kinds[kind]] = (right, 1.0)
        if not self._judge.grades:
            return sums
        if answer is None:
            sums["accuracy_of_judged"] = (0.0, 1.0)
        elif verdict is not None and verdict.right is not None:
            sums["accuracy_of_judged"] = (right, 1.0)
        score = verdict.score if verdict is not None else 0
        if score is not None:
            sums["judge_score"] = (score / MAX_SCORE, 1.0)
        return sums

    def floors(self) -> dict[str, Floor]:
        """Always the commonest answer, compared as the exact judge does; other judges have their own mind."""
        if not isinstance(self._judge, ExactJudge):
            return {}
        answer, n = max(self._answers.items(), key=lambda pair: (pair[1], pair[0]))
        return {"accuracy": Floor(n / self._answers.total(), f"always '{answer}'")}

    def counts(self, items: Sequence[Item]) -> dict[str, int]:
        """What the judge said: yes, no, and replies that could not be read."""
        said = Counter(verdict.right for verdict in self._verdicts.values())
        return {"yes": said[True], "no": said[False], "unreadable": said[None]}

    def facts(self, figures: Mapping[str, Figure]) -> dict[str, Any]:
        """`judge` (its id), `by_type` under the data set's own names, `mean_score` (0 to 5) where there is one."""
        by_type = {kind: figures[figure].value for kind, figure in self._kinds.items()}
        facts: dict[str, Any] = {"judge": self._judge.id, "by_type": by_type}
        if self._judge.grades:
            facts["mean_score"] = figures["judge_score"].value * MAX_SCORE
        return facts


def _with_videos(source: Source, name: Callable[[Any], str]) -> Rows:
    """Rows of the JSON or of the comma-separated form with the names of their videos."""
    _refuse_annotations(source)
    if read_text(source.path).lstrip()[:1] in ("[", "{"):
        rows: Sequence[Mapping[str, Any]] = read_rows(source.path)
        return Rows([row if "image" in row else {**row, "image": name(row.get("video_id"))} for row in rows])
    found = []
    for row in _table(source.path, ",", ("video", "question", "answer", "qid")):
        about = {"id": row["qid"], "image": name(row["video"]), "type": row.get("type", "")}
        found.append({**about, "question": row["question"], "answer": row["answer"]})
    return Rows(found)


def _table(path: Path, separator: str, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table with a header line. Raises DataError for other columns and for a row that is cut short."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=separator)
    missing = [name for name in needed if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(
            f"reading {path}: its first line has no column {', '.join(missing)}; needed are {', '.join(needed)}, "
            f"separated by {'tabs' if separator == chr(9) else 'commas'}"
        )
    rows = []
    try:
        for number, row in enumerate(reader, 1):
            if any(row[name] is None for name in needed):
                raise DataError(f"reading {path}: row {number} has too few columns; the file may be cut short")
            rows.append(row)
    except csv.Error as fault:
        raise DataError(f"reading {path}: {fault}; a table of texts was needed") from None
    if not rows:
        raise DataError(f"reading {path}: the table has no rows")
    return rows


def _youtube_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    pairs = (line.split() for line in read_text(path).splitlines())
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _refuse_annotations(source: Source) -> None:
    _refuse_split(source)
    if source.annotations is not None:
        raise DataError(f"reading {source.path}: this set has its answers beside its questions; drop --annotations")


def _refuse_split(source: Source) -> None:
    if source.split is not None:
        raise DataError(f"reading {source.path}: each split of this set is a file of its own; drop --split")
