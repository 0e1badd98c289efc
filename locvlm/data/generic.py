"""Generic questions about annotated images: captions, presence, left or right, above or below. All literal turns.

This is what every compared training arm receives, with and without location objectives. Answers come from the
annotations alone. Two objectives are no question about the image: they state a scene in words and ask for a side there,
to keep alive what a small language model could do before it saw images, its skill and its form.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path

from locvlm import prompts
from locvlm.data.coco import Instances, absent_categories, decode_json, read_bytes, usable_objects, whole
from locvlm.data.stated import AXIS_WORDS, names_beside, stated_turns
from locvlm.errors import DataError
from locvlm.records import Conversation, ImageRecord, Medium, ObjectRecord, Turn, medium_of

PRESENCE_PER_KIND = 2  # present and absent categories asked for in each image, where there are as many
CLEARLY_APART = 0.15  # centres of a pair differ by at least this share of the image's width (or height)


def build_generic(
    instances: Instances, captions: Mapping[int, Sequence[str]] | None, seed: int, stated_bins: int = 0
) -> Iterator[Conversation]:
    """Conversations of one question each, image after image: caption, presence, left_right, above_below and, with
    `stated_bins`, stated_left_right, stated_above_below.

    - caption: one of LLaVA's requests for a short description. `captions` maps an image id to its captions, one of
      which is drawn; without one the answer names the categories in the image, each once.
    - presence: the paper's question about as many present as absent categories, at most PRESENCE_PER_KIND of each,
      answered Yes or No. A crowd region counts as present.
    - left_right: the paper's direct question for every ordered pair of unique objects whose centres are at least
      CLEARLY_APART of the width apart; the answer says where the object asked for lies (the natural reading).
    - above_below: likewise with the height. The paper asks both axes in the same words, so a training mixture takes
      left_right or above_below, not both.
    - stated_left_right, stated_above_below: see `locvlm.data.stated`; nothing in them is about the image.

    A file name of a video makes them conversations about a video. Objects come from `usable_objects`. An image without
    annotations gives at most a caption. Draws are keyed by (seed, image id); a conversation is called
    `{image id}-{objective}-{number}`.
    """
    names = names_beside(instances.categories)
    for image in instances.images:
        rng = random.Random(f"{seed}/generic/{image.id}")
        medium = medium_of(image.file_name)
        turns = [
            *_caption(image, (captions or {}).get(image.id, ()), rng),
            *_presence(image, instances.categories, rng, medium),
            *_sides(image, "left_right"),
            *_sides(image, "above_below"),
        ]
        if stated_bins:
            turns += stated_turns(names, stated_bins, rng)
        numbers: Counter[str] = Counter()
        for turn in turns:
            name = f"{image.id}-{turn.objective}-{numbers[turn.objective]}"
            numbers[turn.objective] += 1
            yield Conversation(name, image.file_name, image.width, image.height, turn.objective, (turn,), medium)


def read_captions(path: Path) -> dict[int, list[str]]:
    """The captions of a COCO captions file (JSON, plain or gzip) by image id, in the order of their own ids.

    Empty captions are left out. Raises DataError for a file of another form.
    """
    value = decode_json(path, read_bytes(path))
    rows = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"reading captions from {path}: there is no list 'annotations'; a COCO captions file is needed")
    captions: dict[int, list[tuple[int, str]]] = {}
    for number, row in enumerate(rows):
        record = row if isinstance(row, dict) else {}
        image_id, caption_id, text = whole(record.get("image_id")), whole(record.get("id")), record.get("caption")
        if image_id is None or caption_id is None or not isinstance(text, str):
            raise DataError(
                f"reading captions from {path}: annotation {number} needs a whole-number id and image_id and a text "
                "'caption'; is this a COCO captions file?"
            )
        if text.strip():
            captions.setdefault(image_id, []).append((caption_id, text.strip()))
    return {image_id: [text for _, text in sorted(texts)] for image_id, texts in sorted(captions.items())}


def joined_names(names: Iterable[str]) -> str:
    """Each name once, sorted, with its article: `an apple, a frog and a traffic cone`."""
    parts = [f"{'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}" for name in sorted(set(names))]
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def _caption(image: ImageRecord, captions: Sequence[str], rng: random.Random) -> Iterator[Turn]:
    question = rng.choice(prompts.BRIEF_REQUESTS)
    if captions:
        yield Turn("caption", question=question, answer=rng.choice(captions))
    elif image.objects:
        names = joined_names(thing.category for thing in image.objects)
        yield Turn("caption", question=question, answer=f"A photo of {names}.")


def _presence(image: ImageRecord, categories: Sequence[str], rng: random.Random, medium: Medium) -> Iterator[Turn]:
    present = sorted({thing.category for thing in image.objects})
    absent = absent_categories(image, categories)
    n = min(PRESENCE_PER_KIND, len(present), len(absent))
    for names, answer in ((present, "Yes"), (absent, "No")):
        for name in rng.sample(names, n):
            yield Turn("presence", category=name, question=prompts.hallucination_question(name, medium), answer=answer)


def _sides(image: ImageRecord, objective: str) -> Iterator[Turn]:
    axis, length = (0, image.width) if objective == "left_right" else (1, image.height)
    for seen_from, located in permutations(usable_objects(image), 2):
        shift = centre(located, axis) - centre(seen_from, axis)
        if abs(shift) < CLEARLY_APART * length:
            continue
        question = prompts.spatial_direct_question(seen_from.category, located.category)
        answer = prompts.spatial_answer(located.category, AXIS_WORDS[axis][shift > 0], seen_from.category)
        yield Turn(objective, category=located.category, question=question, answer=answer)


def centre(thing: ObjectRecord, axis: int) -> float:
    """Of the object's box, in pixels: from the left (`axis` 0) or from the top (1)."""
    return (thing.box_xyxy[axis] + thing.box_xyxy[axis + 2]) / 2
