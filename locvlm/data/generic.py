"""Generic questions about annotated images: captions, presence, left or right, above or below. All literal turns.

This is the small equal dose that every compared training arm receives, with and without location objectives. The
evaluated question forms (presence, left or right) are in it, so that a small model does not lose the form; because
all arms have it alike, it cannot be what tells them apart. Answers come from the annotations alone.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from locvlm import prompts
from locvlm.data.coco import Instances, absent_categories, usable_objects
from locvlm.errors import DataError
from locvlm.records import Conversation, ImageRecord, ObjectRecord, Turn, read_json

PRESENCE_PER_KIND = 2  # present and absent categories asked for in each image, where there are as many
CLEARLY_APART = 0.15  # centres of a pair differ by at least this share of the image's width (or height)


def build_generic(
    instances: Instances, captions: Mapping[int, Sequence[str]] | None, seed: int
) -> Iterator[Conversation]:
    """Conversations of one question each, image after image: caption, presence, left_right, above_below.

    `captions` maps an image id to its captions, one of which is drawn; without one the answer names the categories in
    the image, each once. An image without annotations and captions gives only questions about absent categories.
    Presence asks for as many present as absent categories (crowd regions count as present). Left_right asks about
    every ordered pair of unique objects whose centres are CLEARLY_APART of the width apart, above_below likewise;
    the answers say where the located object is, seen from the other (the natural reading). Draws are keyed by
    (seed, image id); conversation ids are `{image id}-{objective}-{number}`.
    """
    for image in instances.images:
        rng = random.Random(f"{seed}/generic/{image.id}")
        yield from _caption(image, (captions or {}).get(image.id, ()), rng)
        yield from _presence(image, instances.categories, rng)
        yield from _sides(image, "left_right")
        yield from _sides(image, "above_below")


def read_captions(path: Path) -> dict[int, list[str]]:
    """The captions of a COCO captions file by image id, in the order of their ids. Raises DataError."""
    value = read_json(path)
    rows = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"reading captions from {path}: there is no list 'annotations'; a COCO captions file is needed")
    captions: dict[int, list[tuple[int, str]]] = {}
    for number, row in enumerate(rows):
        try:
            image_id, caption_id, text = int(row["image_id"]), int(row["id"]), str(row["caption"]).strip()
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"reading captions from {path}: annotation {number} needs an integer 'id', an integer 'image_id' and a "
                "text 'caption'; is this a COCO captions file?"
            ) from None
        if text:
            captions.setdefault(image_id, []).append((caption_id, text))
    return {image_id: [text for _, text in sorted(texts)] for image_id, texts in sorted(captions.items())}


def joined_names(names: Iterable[str]) -> str:
    """Sorted names with their article: `an apple, a frog and a traffic cone`."""
    parts = [f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}" for name in sorted(set(names))]
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
