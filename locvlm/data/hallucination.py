"""Presence questions with known answers (the paper's Hal sets, section 4.4): is there a dog in the image?"""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from locvlm.data.coco import Instances, absent_categories
from locvlm.errors import DataError
from locvlm.prompts import hallucination_question

FEW_PRESENT = "fewer categories in the image than questions asked about present ones"
FEW_ABSENT = "fewer categories missing from the image than questions asked about absent ones"


@dataclass(frozen=True, slots=True)
class PresenceSet:
    """`rows`: the lines of questions.jsonl. `counts`: images, questions, yes, no. `skipped`: reason -> images."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]
    skipped: Counter[str] = field(default_factory=Counter)


def build_presence(instances: Instances, seed: int, per_image: int = 2) -> PresenceSet:
    """`per_image` present and as many absent categories asked for in every image, so that chance is one half.

    Both are drawn without replacement, absent ones uniformly from the categories of the file; a crowd region makes
    its category present. An image with too few of either is skipped. Draws are keyed by (seed, image id).
    Raises DataError when `per_image` is below 1.
    """
    if per_image < 1:
        raise DataError(
            f"building presence questions: {per_image} an image and answer were asked for, at least 1 is needed"
        )
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    n_images = 0
    for image in instances.images:
        present = sorted({thing.category for thing in image.objects})
        absent = absent_categories(image, instances.categories)
        if min(len(present), len(absent)) < per_image:
            skipped[FEW_PRESENT if len(present) < per_image else FEW_ABSENT] += 1
            continue
        n_images += 1
        rng = random.Random(f"{seed}/presence/{image.id}")
        asked = [(name, "yes") for name in rng.sample(present, per_image)]
        asked += [(name, "no") for name in rng.sample(absent, per_image)]
        rows += [
            {
                "id": f"{image.id}-presence-{number}",
                "task": "presence",
                "image": image.file_name,
                "width": image.width,
                "height": image.height,
                "prompt": hallucination_question(name),
                "reference": reference,
                "category": name,
            }
            for number, (name, reference) in enumerate(asked)
        ]
    half = n_images * per_image
    return PresenceSet(rows, {"images": n_images, "questions": 2 * half, "yes": half, "no": half}, skipped)
