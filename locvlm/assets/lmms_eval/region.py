"""What lmms-eval calls for region description, as `locvlm data lmms-eval` wrote it; needs pycocoevalcap and Java.

METEOR 1.5 of the whole corpus against human expressions, as `locvlm score` reports it; `meteor_stripped` takes the
"There is a" off the answers first.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_PREFIX = re.compile(r"^\s*there (?:is|are)\s+(?:an?\s+)?", re.IGNORECASE)


def visual(doc: Mapping[str, Any]) -> list[Any]:
    """The image of a region."""
    return [doc["image"].convert("RGB")]


def text(doc: Mapping[str, Any], settings: Mapping[str, str] | None = None) -> str:
    """The question, with the box as text, and what the model's settings put around it."""
    settings = settings or {}
    return f"{settings.get('pre_prompt', '')}{doc['prompt']}{settings.get('post_prompt', '')}"


def results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """The answer with its references, for each metric."""
    answer = answers[0] if answers else ""
    references = json.loads(doc["references"])
    return {"meteor": (answer, references), "meteor_stripped": (_PREFIX.sub("", answer), references)}


def meteor(pairs: Sequence[tuple[str, Sequence[str]]]) -> float:
    """METEOR 1.5 of answers against their references."""
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    said = tokenizer.tokenize({n: [{"caption": answer}] for n, (answer, _) in enumerate(pairs)})
    meant = tokenizer.tokenize({n: [{"caption": one} for one in many] for n, (_, many) in enumerate(pairs)})
    return float(Meteor().compute_score(meant, said)[0])
