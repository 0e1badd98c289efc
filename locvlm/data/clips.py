"""Drawn clips: the scenes of `locvlm.data.scenes` as short videos in which some things move, annotated as COCO does.

What the video stage of the tiny preset is taught and asked about. `file_name` is that of a video, so that `locvlm data
generic`, `localize-instruct`, `hallucination` and `coco-spatial` make conversations and questions about videos of them.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from locvlm.data.scenes import (
    FIRST_TEST_ID,
    GAP,
    MARGIN,
    Blot,
    Drawn,
    Scene,
    Thing,
    annotation,
    compose,
    drawing,
    paint,
    shown_names,
    write_split,
)
from locvlm.records import Manifest, write_manifest

DRAWING = 1  # number of this drawing; raise it when the same seed would give other clips
N_FRAMES = 8

_P_MOVES = 0.4  # share of things that move, where there is a free way
_WAYS = (14, 50)  # pixels from the first frame to the last, both inclusive
_TRIES = 40  # ways tried for a thing before it stays
_RATE = 4  # frames a second
_QUALITY = "12"  # of x264, where 0 loses nothing: flat colours stay within a few levels


def draw_clips(output: Path, seed: int, n_train: int, n_test: int, *, force: bool = False) -> None:
    """Draw `n_train` + `n_test` clips of N_FRAMES frames into the folder `output`.

    The folder gets videos/{train,test}/NNNNNN.mp4, instances_{train,test}.json and captions_{train,test}.json (COCO
    formats; file names relative to videos/) and, last, manifest.json. Two runs give the same annotations.

    A thing that stays is annotated like one of a scene. A thing that moves along has no one place: like a crowd region
    (`iscrowd` 1, the pixels of all frames) it is there, and cannot be asked for by place. A clip depends on (seed,
    split, id) alone. A finished folder of the same seed and sizes is left as it is. Raises DataError for a folder that
    holds something else; `force` replaces it when it is a finished folder of drawn clips, never anything else.
    """
    wanted = {"drawing": DRAWING, "seed": seed, "test": n_test, "train": n_train}
    with drawing(output, "clips", wanted, force) as folder:
        if folder is None:
            return
        counts: Counter[str] = Counter()
        for split, first, n in (("train", 1, n_train), ("test", FIRST_TEST_ID, n_test)):
            counts += _draw_split(folder, seed, split, range(first, first + n))
        found = dict(sorted(counts.items()))
        write_manifest(folder, Manifest("clips", counts=found, seed=seed, extra={"clips": wanted}))


def _draw_split(folder: Path, seed: int, split: str, ids: Sequence[int]) -> Counter[str]:
    (folder / "videos" / split).mkdir(parents=True)
    drawn = []
    n_moving = 0
    for key in ids:
        rng = random.Random(f"{seed}/clips/{split}/{key}")
        scene = compose(rng)
        ways = _ways(rng, scene)
        frames, masks = _film(scene, ways)
        name = f"{split}/{key:06d}.mp4"
        _write(folder / "videos" / name, frames)
        things = [thing if way == (0, 0) else _along(thing, way) for thing, way in _pairs(scene, ways)]
        n_moving += sum(way != (0, 0) for way in ways)
        annotations = [annotation(thing, mask) for thing, mask in zip(things, masks, strict=True)]
        caption = f"A video of {shown_names(scene)}."
        drawn.append(Drawn(key, name, scene.width, scene.height, caption, annotations))
    write_split(folder, split, {"description": "LocVLM drawn clips", "version": str(DRAWING), "seed": seed}, drawn)
    n_objects = sum(len(one.annotations) for one in drawn)
    return Counter({f"clips_{split}": len(drawn), f"objects_{split}": n_objects, f"moving_{split}": n_moving})


def _ways(rng: random.Random, scene: Scene) -> list[tuple[int, int]]:
    """How far each thing moves from the first frame to the last, (x, y) in pixels; (0, 0): it stays. No two things come
    closer than in a scene."""
    swept = [_hull(thing.blots) for thing in scene.things]
    ways = []
    for number, thing in enumerate(scene.things):
        way = (0, 0)
        if not thing.is_crowd and rng.random() < _P_MOVES:
            others = [blot for other, blot in enumerate(swept) if other != number]
            way = _free_way(rng, thing.blots[0], (scene.width, scene.height), others)
            swept[number] = _hull((thing.blots[0], _moved(thing.blots[0], way)))
        ways.append(way)
    return ways


def _free_way(rng: random.Random, blot: Blot, size: tuple[int, int], others: Sequence[Blot]) -> tuple[int, int]:
    for _ in range(_TRIES):
        length = rng.randint(*_WAYS) * rng.choice((-1, 1))
        way = (length, 0) if rng.random() < 0.5 else (0, length)
        end = _moved(blot, way)
        inside = MARGIN <= end.x <= size[0] - MARGIN - end.width and MARGIN <= end.y <= size[1] - MARGIN - end.height
        if inside and all(_hull((blot, end)).is_apart(other, GAP) for other in others):
            return way
    return (0, 0)


def _along(thing: Thing, way: tuple[int, int]) -> Thing:
    """A thing that moves, as it is annotated: its box holds all its places."""
    return replace(thing, is_crowd=True, blots=(thing.blots[0], _moved(thing.blots[0], way)))


def _moved(blot: Blot, way: tuple[int, int]) -> Blot:
    return replace(blot, x=blot.x + way[0], y=blot.y + way[1])


def _hull(blots: Sequence[Blot]) -> Blot:
    left, top = min(blot.x for blot in blots), min(blot.y for blot in blots)
    right, bottom = max(blot.x + blot.width for blot in blots), max(blot.y + blot.height for blot in blots)
    return Blot(left, top, right - left, bottom - top)


def _pairs(scene: Scene, ways: Sequence[tuple[int, int]]) -> "zip[tuple[Thing, tuple[int, int]]]":
    return zip(scene.things, ways, strict=True)


def _film(scene: Scene, ways: Sequence[tuple[int, int]]) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.bool_]]]:
    """The frames [height, width, 3], and where each thing is in any of them [height, width]."""
    frames = []
    seen = [np.zeros((scene.height, scene.width), np.bool_) for _ in scene.things]
    for number in range(N_FRAMES):
        share = Fraction(number, N_FRAMES - 1)
        things = []
        for thing, way in _pairs(scene, ways):
            step = (round(share * way[0]), round(share * way[1]))
            things.append(replace(thing, blots=tuple(_moved(blot, step) for blot in thing.blots)))
        pixels, masks = paint(replace(scene, things=tuple(things)))
        frames.append(pixels)
        for mask, one in zip(seen, masks, strict=True):
            mask |= one
    return frames, seen


def _write(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=_RATE, options={"crf": _QUALITY, "preset": "veryfast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p"  # colours of small shapes stay whole
        stream.codec_context.thread_count = 1
        for pixels in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
