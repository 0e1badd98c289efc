"""Region description (RevLoc): what is at this place?

METEOR 1.5 against human expressions (RefCOCO, RefCOCO+, RefCOCOg: Table 10 of the paper), of the whole corpus and not
the mean of its segments. `meteor_stripped` takes the "There is a" off the answers first, with which every answer in the
words of the RevLoc template begins.

Where the regions have a category, also the category-level score for models that answer with category names: right when
the answer names the region's category and no other.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from locvlm.coordinates import LocationFormat
from locvlm.data.coco import read_bytes
from locvlm.data.refcoco import Ref, read_refs
from locvlm.errors import DataError
from locvlm.evaluation.meteor import MeteorUnavailable, Segments, shared
from locvlm.evaluation.metrics import Figure, Floor, Sums
from locvlm.evaluation.metrics import meteor as meteor_of
from locvlm.evaluation.questions import (
    Question,
    QuestionSet,
    Rows,
    Scorer,
    Source,
    box_of,
    plain_rows,
    read_rows,
    row_id,
    size_of,
    text_of,
)
from locvlm.prompts import rev_question
from locvlm.records import BoxXYXY, Conversation, Turn

METEOR_FIGURES = ("meteor", "meteor_stripped")
CATEGORY_FIGURES = ("accuracy", "names_category", "names_nothing")
_PREFIX = re.compile(r"^\s*there (?:is|are)\s+(?:an?\s+)?", re.IGNORECASE)


def question(row: Mapping[str, Any]) -> Question:
    """A row with `box` (x1, y1, x2, y2) in pixels and `references`, `category`, or both; `width` and `height` of the
    image where the prompt is still to be written."""
    category = text_of(row, "category") if row.get("category") is not None or "references" not in row else ""
    references = row.get("references") or [category]
    if not isinstance(references, list) or not all(isinstance(text, str) and text.strip() for text in references):
        raise ValueError("`references` is not a list of texts, or holds an empty one")
    prompt = text_of(row, "prompt") if "prompt" in row else ""
    image = text_of(row, "image") if "image" in row else row_id(row)  # without an image each region is its own cluster
    size = size_of(row) if "width" in row or "height" in row else None
    # a ref whose box is not known can be scored, not asked
    box = None if row.get("box") is None and "references" in row else box_of(row["box"])
    return _question(row_id(row), image, prompt, category, references, box, size)


def turn_question(key: str, conversation: Conversation, turn: Turn) -> Question | None:
    """A rev_loc turn, without its prompt."""
    if turn.objective != "rev_loc" or turn.box_xyxy is None:
        return None
    return _question(key, conversation.image, "", turn.category, [turn.category], turn.box_xyxy, None)


def prompt_of(question: Question, location: LocationFormat) -> str:
    """The paper's first RevLoc prompt about the region, for sets that come without prompts. Raises DataError when the
    size of the image is not known."""
    reference = question.reference
    if "width" not in reference or reference["box"] is None:
        raise DataError(
            f"writing the prompt of region {question.id!r}: its box or the size of its image is not known; rows need "
            "box, width and height, and a pickle of refs needs instances.json beside it"
        )
    return rev_question(0, location.encode(box_of(reference["box"]), reference["width"], reference["height"]))


def rows(source: Source) -> Rows:
    """The rows of a questions file, or one split of an official `refs(...).p`, or MiniGPT-4's list of a split.

    Raises DataError for a file of several splits where none was named, and for a split that it does not hold.
    """
    if _is_ours(source.path):
        return plain_rows(source)
    if source.annotations is not None:
        raise DataError(f"reading {source.path}: the expressions are in this file; drop --annotations")
    refs = read_refs(source.path)
    splits = sorted({ref.split for ref in refs.rows})
    wanted = source.split or (splits[0] if len(splits) == 1 else None)
    if wanted not in splits:
        names = ", ".join(split or "(unnamed)" for split in splits)
        found = "none was named" if wanted is None else f"{wanted!r} was asked for"
        raise DataError(f"reading {source.path}: it holds the splits {names}, {found}; name one with --split")
    chosen = [_ref_row(ref) for ref in refs.rows if ref.split == wanted]
    return Rows(chosen, {reason: n for reason, n in refs.skipped.items() if n})


class RegionScorer(Scorer):
    """METEOR where the references are more than category names; the category rules where there are categories.

    `accuracy`: the right category and no other; `names_category`: the right one, whatever else is named.
    """

    def __init__(self, questions: QuestionSet) -> None:
        self._questions = questions.questions
        references = [question.reference for question in self._questions]
        names = sorted(questions.categories, key=lambda name: (-len(name), name))
        # longest first, so that "hot dog" is not also a dog
        self._names = {name.lower(): name for name in names}
        self._pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, self._names))})\b") if names else None
        self._categories = Counter(reference["category"] for reference in references if reference["category"])
        self._statistics: dict[str, dict[str, tuple[float, ...]]] = {}
        self._floors: dict[str, Floor] = {}
        self._why_not = ""
        has_expressions = any(reference["references"] != [reference["category"]] for reference in references)
        categories = CATEGORY_FIGURES if self._categories else ()
        self.figures = (*(METEOR_FIGURES if has_expressions else ()), *categories)

    def prepare(self, answers: Mapping[str, str | None]) -> None:
        """Ask METEOR about all answers, once as they are and once without their prefix, and about the commonest
        expression in their place. Without Java the other figures go on; raises UserError when there is none."""
        if METEOR_FIGURES[0] not in self.figures:
            return
        references = [question.reference["references"] for question in self._questions]
        said = [answers[question.id] or "" for question in self._questions]
        counts = Counter(text for texts in references for text in texts)
        constant = max(counts, key=lambda text: (counts[text], text))
        asked = [said, [constant] * len(said)]
        asked = [answers for form in asked for answers in (form, [_PREFIX.sub("", answer) for answer in form])]
        try:
            found = shared().statistics(*(Segments(answers, references) for answers in asked))
        except MeteorUnavailable as fault:
            self.figures = tuple(name for name in self.figures if name not in METEOR_FIGURES)
            if not self.figures:
                raise
            self._why_not = str(fault)
            return
        for name, statistics, blind in zip(METEOR_FIGURES, found[:2], found[2:], strict=True):
            ids = (question.id for question in self._questions)
            self._statistics[name] = dict(zip(ids, statistics, strict=True))
            self._floors[name] = Floor(float(meteor_of(np.sum(blind, axis=0))), f"always '{constant}'")

    def parse(self, answer: str, question: Question) -> Any:
        """The categories of the set that the answer names as whole words, in order of appearance; None for none."""
        if self._pattern is None:
            return None
        found = self._pattern.findall(" ".join(answer.lower().split()))
        return list(dict.fromkeys(self._names[name] for name in found)) or None

    def sums(self, answer: str | None, question: Question) -> Sums:
        """See Scorer. A question without an answer is an empty hypothesis."""
        sums: Sums = {name: statistics[question.id] for name, statistics in self._statistics.items()}
        if not self._categories:
            return sums
        named = (None if answer is None else self.parse(answer, question)) or []
        target = question.reference["category"]
        return sums | {
            "accuracy": (float(named == [target]), 1.0),
            "names_category": (float(target in named), 1.0),
            "names_nothing": (float(not named), 1.0),
        }

    def floors(self) -> dict[str, Floor]:
        """Always the commonest category, and for METEOR the commonest expression (known after `prepare`)."""
        if not self._categories:
            return self._floors
        name, n = max(self._categories.items(), key=lambda pair: (pair[1], pair[0]))
        floor = Floor(n / self._categories.total(), f"always '{name}'")
        return {"accuracy": floor, "names_category": floor, **self._floors}

    def facts(self, figures: Mapping[str, Figure]) -> dict[str, Any]:
        """Null and the reason for METEOR that could not be computed."""
        if not self._why_not:
            return {}
        missing = dict.fromkeys(METEOR_FIGURES)
        return {**missing, "not_computed": dict.fromkeys(METEOR_FIGURES, self._why_not)}


def _question(
    key: str,
    image: str,
    prompt: str,
    category: str,
    references: Sequence[str],
    box: BoxXYXY | None,
    size: tuple[float, float] | None,
) -> Question:
    reference: dict[str, Any] = {"category": category, "references": list(references)}
    reference["box"] = None if box is None else list(box)
    if size is not None:
        reference |= {"width": size[0], "height": size[1]}
    return Question(key, image, prompt, reference, {} if box is None else {category or "region": box})


def _is_ours(path: Path) -> bool:
    """Whether the file is JSON and not a list in MiniGPT-4's form; a pickle is not."""
    if read_bytes(path).lstrip()[:1] not in (b"[", b"{"):
        return False
    first = next(iter(read_rows(path)))
    return not {"sents", "bbox"} <= first.keys()


def _ref_row(ref: Ref) -> dict[str, Any]:
    row: dict[str, Any] = {"id": ref.ref_id, "image": ref.file_name, "references": list(ref.sentences)}
    row["box"] = None if ref.box_xyxy is None else list(ref.box_xyxy)
    if ref.category:
        row["category"] = ref.category
    return row | ({"width": ref.width, "height": ref.height} if ref.width > 0 and ref.height > 0 else {})
