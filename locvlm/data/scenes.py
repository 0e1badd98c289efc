"""Drawn scenes in COCO format: pictures, annotations, captions and question-answer pairs that need no download.

The world of the `tiny` preset: flat shapes on a grey ground, one colour a category, so that a model of a million
parameters can learn it in minutes. Boxes are exact: a box is the extent of the painted pixels.
"""

import json
import math
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from locvlm.data.coco import read_instances
from locvlm.data.conversations import llava_record
from locvlm.data.generic import build_generic, joined_names, read_captions
from locvlm.data.shards import pack_images
from locvlm.errors import DataError
from locvlm.pixels import open_images
from locvlm.records import Manifest, atomic_write, read_manifest, write_manifest

DRAWING = 1  # number of this drawing; raise it when the same seed would give other pictures

_SIZES = ((96, 96), (96, 72), (72, 96))  # (width, height) in pixels; the tiny preset squashes all of them to 48 x 48
_SIDES = (18, 28)  # sides of an object in pixels, both inclusive
GAP = 3  # free pixels between two objects
MARGIN = 2  # free pixels at the border
_GREY = (100, 200)  # level of the ground, both inclusive
_N_OBJECTS = ((2, 0.18), (3, 0.36), (4, 0.46))  # objects an image and their shares
_P_DUPLICATE = 0.12  # share of images in which one category occurs twice
_P_CROWD = 0.03  # share of images in which one object is a crowd region
_TRIES = 80  # places tried for one object before it is left out
_SHARD_BYTES = 64 << 20
FIRST_TEST_ID = 500_001  # image ids of the test split start here, whatever the size of the training split


@dataclass(frozen=True, slots=True)
class SceneCategory:
    """One kind of object. `colour` is (red, green, blue); `shape` is square, disc or triangle."""

    id: int
    name: str
    supercategory: str
    shape: str
    colour: tuple[int, int, int]


# Colours are far from each other and from every grey; ids have gaps, as COCO's have.
CATEGORIES = (
    SceneCategory(1, "apple", "food", "disc", (225, 20, 30)),
    SceneCategory(2, "lemon", "food", "disc", (255, 230, 0)),
    SceneCategory(3, "plum", "food", "disc", (110, 10, 150)),
    SceneCategory(5, "tennis ball", "sports", "disc", (165, 250, 30)),
    SceneCategory(6, "book", "indoor", "square", (240, 0, 220)),
    SceneCategory(8, "suitcase", "accessory", "square", (125, 65, 20)),
    SceneCategory(9, "ice cube", "kitchen", "square", (60, 225, 250)),
    SceneCategory(12, "mailbox", "outdoor", "square", (20, 70, 255)),
    SceneCategory(13, "traffic cone", "outdoor", "triangle", (255, 125, 0)),
    SceneCategory(15, "umbrella", "accessory", "triangle", (255, 150, 200)),
    SceneCategory(17, "tent", "outdoor", "triangle", (40, 190, 60)),
    SceneCategory(20, "fir tree", "outdoor", "triangle", (0, 90, 50)),
)


@dataclass(frozen=True, slots=True)
class Blot:
    """One painted shape: (x, y) of its top left pixel, sides in pixels."""

    x: int
    y: int
    width: int
    height: int

    def is_apart(self, other: "Blot", gap: int) -> bool:
        """Whether `gap` pixels or more lie between the two, across or down."""
        return (
            self.x >= other.x + other.width + gap
            or other.x >= self.x + self.width + gap
            or self.y >= other.y + other.height + gap
            or other.y >= self.y + self.height + gap
        )


@dataclass(frozen=True, slots=True)
class Thing:
    """One annotation: a single shape, or the shapes of a crowd region."""

    category: SceneCategory
    blots: tuple[Blot, ...]
    is_crowd: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """What is shown: sides in pixels, the level of the ground, and what stands on it."""

    width: int
    height: int
    grey: int
    things: tuple[Thing, ...]


def draw_scenes(
    output: Path, seed: int, n_train: int, n_test: int, *, shards: bool = False, force: bool = False
) -> None:
    """Draw `n_train` + `n_test` scenes into the folder `output`.

    The folder gets images/{train,test}/NNNNNN.png, instances_{train,test}.json and captions_{train,test}.json (COCO
    formats; file names relative to images/), qa_train.json (a LLaVA list of the generic questions of
    `locvlm.data.generic`) and, last, manifest.json. A scene depends on
    (seed, split, image id) alone, so a larger set begins with the smaller one; two runs give the same bytes.

    With `shards` the images lie in images/ as tar shards with an index (`locvlm.data.shards`) instead of loose files:
    what a data version should hold.
    A finished folder of the same seed and sizes is left as it is. Raises DataError for a folder that holds something
    else; `force` replaces it when it is a finished folder of drawn scenes, never anything else.
    """
    wanted = {"drawing": DRAWING, "seed": seed, "test": n_test, "train": n_train, **({"shards": 1} if shards else {})}
    with drawing(output, "scenes", wanted, force) as folder:
        if folder is None:
            return
        counts: Counter[str] = Counter()
        for split, first_id, n in (("train", 1, n_train), ("test", FIRST_TEST_ID, n_test)):
            counts += _draw_split(folder, seed, split, range(first_id, first_id + n))
        counts += _write_questions(folder, seed)
        counts["images"] = n_train + n_test
        if shards:
            _pack(folder)
        extra = {"scenes": wanted, "categories": [category.name for category in CATEGORIES]}
        write_manifest(folder, Manifest("scenes", counts=dict(sorted(counts.items())), seed=seed, extra=extra))


@contextmanager
def drawing(output: Path, what: str, wanted: dict[str, int], force: bool) -> Iterator[Path | None]:
    """A folder to draw into that takes its place when it is finished; None where that was drawn before. `what`: scenes
    or clips; `wanted`: seed, sizes and what else decides the drawing. Raises DataError as `draw_scenes`."""
    if not (1 <= wanted["train"] < FIRST_TEST_ID and 1 <= wanted["test"] < FIRST_TEST_ID):
        raise DataError(
            f"drawing {what}: {wanted['train']} training and {wanted['test']} test {what} were asked for; "
            f"each must lie between 1 and {FIRST_TEST_ID - 1}"
        )
    if _already_there(output, what, wanted, force):
        yield None
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        folder.chmod(0o755)
        yield folder
        _move_into_place(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _already_there(output: Path, what: str, wanted: dict[str, int], force: bool) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    manifest = read_manifest(output) if (output / "manifest.json").is_file() else {}
    if manifest.get("dataset") != what:
        raise DataError(
            f"drawing {what} into {output}: it exists and is not a finished folder of drawn {what}; "
            "name another folder, or remove it yourself"
        )
    found = manifest.get(what)
    if found == wanted:
        return True
    if not force:
        raise DataError(
            f"drawing {what} into {output}: it holds the {what} {found}, asked for were {wanted}; "
            "name another folder, or pass --force to replace it"
        )
    return False


def _pack(folder: Path) -> None:
    """Put shards in the place of the loose images."""
    loose = folder / "loose"
    (folder / "images").rename(loose)
    (folder / "images").mkdir()
    source = open_images(loose)
    pack_images(source, source.names(), folder / "images", _SHARD_BYTES)
    shutil.rmtree(loose)


def _move_into_place(folder: Path, output: Path) -> None:
    if not output.exists():
        folder.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
    output.rename(old / output.name)
    folder.rename(output)
    shutil.rmtree(old)


def _draw_split(folder: Path, seed: int, split: str, image_ids: Sequence[int]) -> Counter[str]:
    images_dir = folder / "images" / split
    images_dir.mkdir(parents=True)
    drawn = []
    for image_id in image_ids:
        scene = compose(random.Random(f"{seed}/{split}/{image_id}"))
        pixels, masks = paint(scene)
        name = f"{image_id:06d}.png"
        Image.fromarray(pixels).save(images_dir / name, format="PNG", compress_level=6)
        annotations = [annotation(thing, mask) for thing, mask in zip(scene.things, masks, strict=True)]
        caption = f"A photo of {shown_names(scene)}."
        drawn.append(Drawn(image_id, f"{split}/{name}", scene.width, scene.height, caption, annotations))
    write_split(folder, split, {"description": "LocVLM drawn scenes", "version": str(DRAWING), "seed": seed}, drawn)
    n_objects = sum(len(one.annotations) for one in drawn)
    return Counter({f"images_{split}": len(drawn), f"objects_{split}": n_objects})


@dataclass(frozen=True, slots=True)
class Drawn:
    """One image or clip. `annotations`: as `annotation` makes them."""

    id: int
    file_name: str
    width: int
    height: int
    caption: str
    annotations: Sequence[dict[str, Any]]


def write_split(folder: Path, split: str, info: dict[str, Any], drawn: Sequence[Drawn]) -> None:
    """instances_{split}.json and captions_{split}.json, with ids for the annotations from the first image's on."""
    images = [{"id": one.id, "file_name": one.file_name, "width": one.width, "height": one.height} for one in drawn]
    owned = [(one.id, about) for one in drawn for about in one.annotations]
    annotations = [
        {"id": number, "image_id": image_id, **about} for number, (image_id, about) in enumerate(owned, drawn[0].id)
    ]
    captions = [{"id": one.id, "image_id": one.id, "caption": one.caption} for one in drawn]
    licenses = [{"id": 1, "name": "as the project's code", "url": ""}]
    categories = [{"id": c.id, "name": c.name, "supercategory": c.supercategory} for c in CATEGORIES]
    common = {"info": {**info, "split": split}, "licenses": licenses, "images": images}
    _write_compact(folder / f"instances_{split}.json", {**common, "annotations": annotations, "categories": categories})
    _write_compact(folder / f"captions_{split}.json", {**common, "annotations": captions})


def compose(rng: random.Random) -> Scene:
    """What is in a scene and where, from one generator."""
    width, height = rng.choice(_SIZES)
    grey = rng.randint(*_GREY)
    n = rng.choices([n for n, _ in _N_OBJECTS], [share for _, share in _N_OBJECTS])[0]
    kinds = rng.sample(CATEGORIES, n)
    event = rng.random()
    has_crowd = event < _P_CROWD
    if _P_CROWD <= event < _P_CROWD + _P_DUPLICATE:
        kinds[-1] = kinds[0]
    things: list[Thing] = []
    slots: list[Blot] = []
    for number, kind in enumerate(kinds):
        is_crowd = has_crowd and number == 0  # the first object always finds a place
        slot = _find_place(rng, (width, height), slots)
        if slot is not None:
            slots.append(slot)
            things.append(Thing(kind, _crowd_blots(rng, slot) if is_crowd else (slot,), is_crowd))
    return Scene(width, height, grey, tuple(things))


def _find_place(rng: random.Random, size: tuple[int, int], taken: Sequence[Blot]) -> Blot | None:
    """A box that keeps the gap to all others, or None when no try fits."""
    for _ in range(_TRIES):
        width, height = rng.randint(*_SIDES), rng.randint(*_SIDES)
        x = rng.randint(MARGIN, size[0] - MARGIN - width)
        y = rng.randint(MARGIN, size[1] - MARGIN - height)
        blot = Blot(x, y, width, height)
        if all(blot.is_apart(other, GAP) for other in taken):
            return blot
    return None


def _crowd_blots(rng: random.Random, slot: Blot) -> tuple[Blot, ...]:
    """Five small shapes in the nine cells of a slot."""
    cell_width, cell_height = slot.width // 3, slot.height // 3
    cells = sorted(rng.sample(range(9), 5))
    return tuple(
        Blot(slot.x + cell % 3 * cell_width, slot.y + cell // 3 * cell_height, cell_width - 1, cell_height - 1)
        for cell in cells
    )


@cache
def _stencil(shape: str, width: int, height: int) -> NDArray[np.bool_]:
    """Pixels of a shape, [height, width]; every shape touches all four sides, so its box is exact."""
    x = np.abs(np.arange(width) + 0.5 - width / 2)[None, :]
    y = np.arange(height)[:, None]
    if shape == "square":
        return np.ones((height, width), dtype=np.bool_)
    if shape == "disc":
        inside: NDArray[np.bool_] = (2 * x / width) ** 2 + (2 * (y + 0.5) / height - 1) ** 2 <= 1
        return inside
    # a triangle on its base; the tip is at least one pixel wide
    triangle: NDArray[np.bool_] = x <= np.maximum(width / 2 * (y + 1) / height, 0.5)
    return triangle


def paint(scene: Scene) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]]]:
    """The picture [height, width, 3] and the mask [height, width] of every thing."""
    pixels = np.full((scene.height, scene.width, 3), scene.grey, dtype=np.uint8)
    masks = []
    for thing in scene.things:
        mask = np.zeros((scene.height, scene.width), dtype=np.bool_)
        for blot in thing.blots:
            place = (slice(blot.y, blot.y + blot.height), slice(blot.x, blot.x + blot.width))
            mask[place] |= _stencil(thing.category.shape, blot.width, blot.height)
        pixels[mask] = thing.category.colour
        masks.append(mask)
    return pixels, masks


def annotation(thing: Thing, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """What COCO says of a thing, but for the ids of the annotation and of the image. `mask`: where it is painted."""
    x = min(blot.x for blot in thing.blots)
    y = min(blot.y for blot in thing.blots)
    right = max(blot.x + blot.width for blot in thing.blots)
    bottom = max(blot.y + blot.height for blot in thing.blots)
    return {
        "category_id": thing.category.id,
        "bbox": [float(x), float(y), float(right - x), float(bottom - y)],
        "area": float(mask.sum()),
        "iscrowd": int(thing.is_crowd),
        "segmentation": _run_lengths(mask) if thing.is_crowd else [_polygon(thing.category.shape, thing.blots[0])],
    }


def _polygon(shape: str, blot: Blot) -> list[float]:
    """The outline as COCO writes it: x, y, x, y ..."""
    left, top, right, bottom = blot.x, blot.y, blot.x + blot.width, blot.y + blot.height
    if shape == "square":
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        return [float(value) for corner in corners for value in corner]
    if shape == "triangle":
        return [float(value) for value in ((left + right) / 2, top, right, bottom, left, bottom)]
    angles = [math.tau * step / 16 for step in range(16)]
    points = [
        ((left + right) / 2 + blot.width / 2 * math.cos(angle), (top + bottom) / 2 + blot.height / 2 * math.sin(angle))
        for angle in angles
    ]
    return [round(value, 2) for point in points for value in point]


def _run_lengths(mask: NDArray[np.bool_]) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths: column by column, starting with the number of empty pixels."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1  # the first pixel is empty: scenes have a margin
    runs = np.diff(changes, prepend=0, append=mask.size)
    return {"counts": [int(run) for run in runs], "size": [int(side) for side in mask.shape]}


def shown_names(scene: Scene) -> str:
    """The categories by name, each once: no word about places, which only the location objectives may teach."""
    return joined_names({thing.category.name for thing in scene.things})


def _write_questions(folder: Path, seed: int) -> Counter[str]:
    instances = read_instances(folder / "instances_train.json")
    captions = read_captions(folder / "captions_train.json")
    counts: Counter[str] = Counter()

    def lines() -> Iterator[str]:
        for conversation in build_generic(instances, captions, seed):
            counts[conversation.objective] += 1
            turns = [(turn.question, turn.answer) for turn in conversation.turns]
            yield json.dumps(llava_record(conversation, turns))

    with atomic_write(folder / "qa_train.json") as file:
        separator = "[\n"
        for line in lines():
            file.write(separator + line)
            separator = ",\n"
        file.write("\n]\n")
    counts["conversations"] = counts.total()
    return counts


def _write_compact(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, separators=(",", ":"))
        file.write("\n")
