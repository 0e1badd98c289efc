"""What lmms-eval calls for COCO-Spatial, as `locvlm data lmms-eval` wrote it; needs nothing but Python.

An answer is right when the target word occurs in it (so one with both words passes); `strict` wants exactly one of the
two; `opposite_reading` scores the other reading of the question. The figures are those of `locvlm score`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def visual(doc: Mapping[str, Any]) -> list[Any]:
    """The image of a question."""
    return [doc["image"].convert("RGB")]


def text(doc: Mapping[str, Any], settings: Mapping[str, str] | None = None) -> str:
    """The question with what the model's settings put around it."""
    settings = settings or {}
    return f"{settings.get('pre_prompt', '')}{doc['prompt']}{settings.get('post_prompt', '')}"


def results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """What one answer adds to each metric."""
    answer, target = (answers[0] if answers else ""), doc["target"]
    said = {word for word in (target, OPPOSITE[target]) if re.search(rf"\b{word}\b", answer, re.IGNORECASE)}
    right = float(target in said)
    return {
        "accuracy": right,
        "strict": float(said == {target}),
        "opposite_reading": float(OPPOSITE[target] in said),
        "answered": float(bool(said)),
        **{f"accuracy_{word}": (target == word, right) for word in OPPOSITE},
    }


def mean_of_class(pairs: Iterable[tuple[bool, float]]) -> float:
    """The mean over the questions whose target is the metric's word."""
    values = [right for counts, right in pairs if counts]
    return sum(values) / len(values) if values else 0.0
