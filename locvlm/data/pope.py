"""POPE, polling-based object probing (Li et al., EMNLP 2023): six yes/no questions an image, three about objects that
are there and three about objects that are not, which the strategy chooses to be ever easier to imagine.

The rules are those of the official generator (RUCAIBox/POPE). Its object lists also draw on captions; here an object is
in an image when an annotation says so, crowd regions included.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from locvlm.data.coco import Instances
from locvlm.errors import DataError

Strategy = Literal["random", "popular", "adversarial"]
STRATEGIES: tuple[Strategy, ...] = ("random", "popular", "adversarial")

FEW_OBJECTS = "image with fewer categories than questions about present ones"
FEW_ABSENT = "image with fewer absent categories than questions about them"
NOT_DRAWN = "image that was not drawn"

_VOWELS = "aeiou"


@dataclass(frozen=True, slots=True)
class PopeSet:
    """`rows`: question_id, image, text, label, as in the official files. `counts`: images, questions, yes, no.
    `skipped`: reason -> images that could not be asked about; `notes`: reason -> images left out by the draw."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


def pope_question(name: str) -> str:
    """The question about one object; "an" before a, e, i, o and u, as in the released files ("a skis" included)."""
    article = "an" if name[:1].lower() in _VOWELS else "a"
    return f"Is there {article} {name} in the image?"


def build_pope(instances: Instances, strategy: Strategy, seed: int, n_images: int = 500, per_image: int = 6) -> PopeSet:
    """`per_image` questions, present and absent in turn, about `n_images` images drawn from those that show at least
    half as many categories (three, as in the released files).

    The present ones are drawn from the image's. Absent ones, none twice in an image:
    `random`: drawn uniformly;
    `popular`: those found in most images of the whole file;
    `adversarial`: for each present one asked about, the one found in most images together with it.
    Ties go by the order of the categories; where no category ever occurs with the present one, `adversarial` draws.
    The images and the present categories are the same for the three strategies. Draws are keyed by the seed and the
    image. Raises DataError for an odd or too small `per_image`, and when the file has fewer such images.
    """
    if per_image < 2 or per_image % 2:
        raise DataError(
            f"building POPE: {per_image} questions an image were asked for; needed is an even number from 2"
        )
    half = per_image // 2
    skipped: Counter[str] = Counter()
    shown: dict[int, list[str]] = {}
    for image in instances.images:
        present = sorted({thing.category for thing in image.objects})
        if min(len(present), len(instances.categories) - len(present)) < half:
            skipped[FEW_OBJECTS if len(present) < half else FEW_ABSENT] += 1
        else:
            shown[image.id] = present
    if len(shown) < n_images:
        raise DataError(
            f"building POPE: {n_images} images with at least {half} categories, and as many absent ones, were asked "
            f"for; the annotations have {len(shown)}; ask for fewer with --images-n"
        )
    ids = sorted(random.Random(f"{seed}/pope").sample(sorted(shown), n_images))
    files = {image.id: image.file_name for image in instances.images}
    choose = _chooser(instances, strategy)
    asked = [
        (files[key], name, label)
        for key in ids
        for name, label in _asked(shown[key], instances.categories, half, choose, random.Random(f"{seed}/pope/{key}"))
    ]
    rows = [
        {"question_id": number, "image": file_name, "text": pope_question(name), "label": label}
        for number, (file_name, name, label) in enumerate(asked, 1)
    ]
    notes = Counter({NOT_DRAWN: len(shown) - n_images} if len(shown) > n_images else {})
    counts = {"images": n_images, "questions": len(rows), "yes": len(rows) // 2, "no": len(rows) // 2}
    return PopeSet(rows, counts, skipped, notes)


# (the present category just asked about, the absent ones that are left, the generator of the image) -> the next one
_Choose = Callable[[str, Sequence[str], random.Random], str]


def _asked(
    present: Sequence[str], categories: Sequence[str], half: int, choose: _Choose, rng: random.Random
) -> Iterator[tuple[str, str]]:
    """The categories to ask about in one image, and their labels."""
    absent = [name for name in categories if name not in present]
    for name in rng.sample(present, half):
        yield name, "yes"
        other = choose(name, absent, rng)
        absent.remove(other)
        yield other, "no"


def _chooser(instances: Instances, strategy: Strategy) -> _Choose:
    if strategy == "random":
        return lambda name, absent, rng: rng.choice(absent)
    images: Counter[str] = Counter()
    together: dict[str, Counter[str]] = {name: Counter() for name in instances.categories}
    for image in instances.images:
        present = {thing.category for thing in image.objects}
        images.update(present)
        for name in present:
            together[name].update(present)
    if strategy == "popular":
        return lambda name, absent, rng: max(absent, key=images.__getitem__)  # max takes the first of equals

    def adversarial(name: str, absent: Sequence[str], rng: random.Random) -> str:
        best = max(absent, key=together[name].__getitem__)
        return best if together[name][best] else rng.choice(absent)

    return adversarial
