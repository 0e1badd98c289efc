"""LocPred and NegPred as a test: where is it, and is it there at all (the learning signal of small models)."""

from collections.abc import Mapping, Sequence
from typing import Any

from locvlm.coordinates import LocationFormat
from locvlm.errors import DataError
from locvlm.evaluation.metrics import Floor, Sums
from locvlm.evaluation.questions import (
    Question,
    QuestionSet,
    Scorer,
    box_of,
    location_format,
    row_id,
    size_of,
    text_of,
)
from locvlm.geometry import box_iou, inside
from locvlm.prompts import says_absent
from locvlm.records import BoxXYXY, Conversation, Turn

OBJECTIVES = ("loc_pred", "neg_pred")
REFUSED = "absent"


def question(row: Mapping[str, Any]) -> Question:
    """A row with `objective`, `category`, `width`, `height` and, for loc_pred, `box` (x1, y1, x2, y2) in pixels."""
    objective = text_of(row, "objective")
    if objective not in OBJECTIVES:
        raise ValueError(f"the objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
    box = box_of(row["box"]) if objective == "loc_pred" else None
    return _question(
        row_id(row),
        text_of(row, "image"),
        text_of(row, "prompt"),
        objective,
        text_of(row, "category"),
        box,
        size_of(row),
    )


def turn_question(key: str, conversation: Conversation, turn: Turn) -> Question | None:
    """A loc_pred or neg_pred turn, without its prompt."""
    if turn.objective not in OBJECTIVES:
        return None
    size = (float(conversation.width), float(conversation.height))
    return _question(key, conversation.image, "", turn.objective, turn.category, turn.box_xyxy, size)


class LocalizationScorer(Scorer):
    """For present objects IoU, IoU >= 0.5, centre of the answer in the true box; for absent ones precision and recall
    of saying so. With point locations the IoU figures do not exist."""

    def __init__(self, questions: QuestionSet) -> None:
        location = location_format(questions)
        if location is None:
            raise DataError(
                f"scoring localization on {questions.name}: nothing says how places are written in the answers; give "
                "the data folder with its manifest.json, keep the .meta.json beside the predictions, or name the "
                "checkpoint's locvlm.yaml with --config"
            )
        self._location: LocationFormat = location
        self._questions = questions.questions
        self._has_boxes = location.kind == "bbox"
        overlap = ("mean_iou", "accuracy_iou50") if self._has_boxes else ()
        self.figures = (
            *overlap,
            "centre_in_box",
            "parse_failure_rate",
            "refusal_rate",
            "neg_precision",
            "neg_recall",
            "neg_f1",
        )

    def parse(self, answer: str, question: Question) -> Any:
        """[x1, y1, x2, y2] or [x, y] in pixels of the image, "absent" for a refusal, or None."""
        place = self._location.decode(answer, question.reference["width"], question.reference["height"])
        if place is not None:
            return list(place)
        return REFUSED if says_absent(answer) else None

    def sums(self, answer: str | None, question: Question) -> Sums:
        """See Scorer. `parse_failure_rate` counts every loc_pred answer without a readable place, refusals included;
        `refusal_rate` counts the refusals among them."""
        said = None if answer is None else self.parse(answer, question)
        refused = said == REFUSED
        negative = question.reference["objective"] == "neg_pred"
        sums: Sums = {"neg_precision": (float(negative), 1.0)} if refused else {}
        if negative or refused:  # F1 = 2 TP / (2 TP + FP + FN)
            sums["neg_f1"] = (2.0, 2.0) if negative and refused else (0.0, 1.0)
        if negative:
            sums["neg_recall"] = (float(refused), 1.0)
            return sums
        place = said if isinstance(said, list) else None
        sums |= _place_sums(place, box_of(question.reference["box"]), self._has_boxes)
        sums["parse_failure_rate"] = (float(place is None), 1.0)
        sums["refusal_rate"] = (float(refused), 1.0)
        return sums

    def floors(self) -> dict[str, Floor]:
        """Always the mean box of these references (as fractions of the image), and always "no such object"."""
        references = [question.reference for question in self._questions]
        present = [reference for reference in references if reference["objective"] == "loc_pred"]
        floors = {}
        if present:
            fractions = [_scaled(reference, 1 / reference["width"], 1 / reference["height"]) for reference in present]
            mean = [sum(values) / len(present) for values in zip(*fractions, strict=True)]
            totals = dict.fromkeys(("mean_iou", "accuracy_iou50", "centre_in_box"), 0.0)
            for reference in present:
                width, height = reference["width"], reference["height"]
                guess = [mean[0] * width, mean[1] * height, mean[2] * width, mean[3] * height]
                for name, (value, _) in _place_sums(guess, box_of(reference["box"]), True).items():
                    totals[name] += value
            floors = {
                name: Floor(total / len(present), "always the mean box of these references")
                for name, total in totals.items()
                if name in self.figures
            }
        share = (len(references) - len(present)) / len(references) if references else 0.0
        floors["neg_precision"] = Floor(share, "always 'no such object'")
        floors["neg_f1"] = Floor(2 * share / (1 + share), "always 'no such object'")
        floors["neg_recall"] = Floor(float(share > 0), "always 'no such object'")
        return floors


def _question(
    key: str,
    image: str,
    prompt: str,
    objective: str,
    category: str,
    box: BoxXYXY | None,
    size: tuple[float, float],
) -> Question:
    reference = {
        "objective": objective,
        "category": category,
        "box": None if box is None else list(box),
        "width": size[0],
        "height": size[1],
    }
    return Question(key, image, prompt, reference, {} if box is None else {category: box})


def _place_sums(place: Sequence[float] | None, truth: BoxXYXY, has_boxes: bool) -> Sums:
    sums: Sums = {}
    if has_boxes:
        iou = 0.0 if place is None else box_iou((place[0], place[1], place[2], place[3]), truth)
        sums = {"mean_iou": (iou, 1.0), "accuracy_iou50": (float(iou >= 0.5), 1.0)}
    if place is None:
        centre = None
    elif len(place) == 2:
        centre = (place[0], place[1])
    else:
        centre = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
    sums["centre_in_box"] = (float(centre is not None and inside(centre, truth)), 1.0)
    return sums


def _scaled(reference: Mapping[str, Any], x: float, y: float) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = reference["box"]
    return x1 * x, y1 * y, x2 * x, y2 * y
