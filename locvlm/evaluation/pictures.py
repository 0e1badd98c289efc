"""Questions with their pictures: Figures 3 (left or right), 4 (descriptions of regions) and 5 (localization) of the
paper, and the like for the other tasks. What a model has right and what it has wrong stand in rows of their own.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from locvlm.config import VideoConfig
from locvlm.data.frames import open_frames
from locvlm.data.pages import Picture, picture
from locvlm.errors import DataError
from locvlm.evaluation.arms import Arm, Result
from locvlm.evaluation.asks import locate
from locvlm.evaluation.metrics import items_of, meteor
from locvlm.geometry import to_rgb
from locvlm.pixels import ImageSource
from locvlm.records import medium_of

Blur = Callable[[Image.Image], Image.Image]

# task -> kind of question -> number of pictures
_PICTURES = {
    "localization": {"loc_pred": 6, "neg_pred": 3},
    "coco-spatial": {"": 6},
    "coco-spatial-icl": {"": 3},
    "presence": {"": 6},
    "pope": {"": 6},
    "region-description": {"": 6},
    "vqav2": {"": 6},
    "gqa": {"": 6},
    "activitynet-qa": {"": 6},
    "msrvtt-qa": {"": 3},
    "msvd-qa": {"": 3},
    "tgif-qa": {"": 3},
}
_FRAMES = VideoConfig(n_frames=4, frame_sampling="segment_centre")  # of a video that stand for it, two in a row
FIGURES = {
    "coco-spatial": "Figure 3",
    "coco-spatial-icl": "Figure 3",
    "region-description": "Figure 4",
    "localization": "Figure 5",
}  # the paper's pictures that those of a task are like
# the first figure that a question counts for
_RIGHT = {"localization": ("accuracy_iou50", "centre_in_box", "neg_recall")}


@dataclass(frozen=True, slots=True)
class Place:
    """A box or a point to draw, in pixels of the image. `arm` is the arm's number, None for the truth."""

    box: tuple[float, float, float, float] | None
    point: tuple[float, float] | None
    arm: int | None
    label: str


@dataclass(frozen=True, slots=True)
class Said:
    """What one arm said."""

    arm: int
    name: str
    answer: str
    right: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its picture and the answers of all arms; `right`: that of the first of them."""

    question: str
    truth: str
    picture: Picture
    places: tuple[Place, ...]
    said: tuple[Said, ...]
    right: bool


def examples(
    task: str,
    results: Sequence[Result | None],
    arms: Sequence[Arm],
    images: Sequence[ImageSource],
    blur: Blur | None = None,
) -> Iterator[Example]:
    """Questions that all arms with answers answered, every pattern of right and wrong in turn, drawn by a hash of the
    id. `results`: what each arm has of the task; `images`: where a picture is looked for in turn; `blur`: takes the
    faces out of it before it is shown. Of a video four frames are shown."""
    present = [(number, result) for number, result in enumerate(results) if result is not None and result.rows]
    if not present:
        return
    right = {number: _right_answers(task, result.metrics) for number, result in present}
    first = present[0][1].rows
    shared = [key for key in first if all(key in result.rows and key in right[number] for number, result in present)]
    shared.sort(key=lambda key: hashlib.blake2b(key.encode(), digest_size=16).digest())
    seen: set[str] = set()
    for kind, wanted in _PICTURES.get(task, {}).items():
        groups: dict[tuple[bool, ...], list[str]] = {}
        for key in shared:
            if _kind(first[key]) == kind:
                groups.setdefault(tuple(right[number][key] for number, _ in present), []).append(key)
        shown = 0
        for key in _in_turn(groups):
            image = str(first[key].get("image", ""))
            if shown == wanted or image in seen:
                continue
            view = _view(images, image, bool(first[key].get("mirror")), blur)
            if view is None:
                continue
            seen.add(image)
            shown += 1
            answers = [(number, result.rows[key]) for number, result in present]
            yield Example(
                str(first[key].get("prompt") or key),
                _truth(first[key]),
                view,
                tuple(_places(first[key], answers)),
                tuple(
                    Said(number, arms[number].name, str(answer.get("answer", "")), right[number][key])
                    for number, answer in answers
                ),
                right[present[0][0]][key],
            )


def face_blur() -> Blur:
    """What blurs the faces of a picture. Raises DataError when the detector is not installed."""
    from locvlm.data.faces import Blur as Strength
    from locvlm.data.faces import CenterFace, blur_faces

    detect, strength = CenterFace(), Strength()

    def blurred(image: Image.Image) -> Image.Image:
        rgb = to_rgb(image)
        return blur_faces(rgb, [face.box_xyxy for face in detect(rgb)], strength)

    return blurred


def _view(images: Sequence[ImageSource], name: str, mirror: bool, blur: Blur | None) -> Picture | None:
    """None for what cannot be read: no model could see it either, and its question is among the failures."""
    try:
        found = locate(images, name)
        if found is None:
            return None
        source, there = found
        shown = open_frames(source.path, there, _FRAMES) if medium_of(there) == "video" else [source.open(there)]
        image = _in_rows([one if blur is None else blur(one) for one in shown])
        return picture(ImageOps.mirror(image) if mirror else image)
    except DataError:
        return None


def _in_rows(frames: Sequence[Image.Image]) -> Image.Image:
    """The frames in reading order, two in a row; one alone as it is."""
    if len(frames) == 1:
        return frames[0]
    width, height = frames[0].size
    sheet = Image.new("RGB", (2 * width, (len(frames) + 1) // 2 * height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % 2 * width, number // 2 * height))
    return sheet


def _in_turn(groups: Mapping[tuple[bool, ...], Sequence[str]]) -> Iterator[str]:
    """One of each group, then the second of each, and so on."""
    ordered = [groups[key] for key in sorted(groups, reverse=True)]
    for depth in range(max(map(len, ordered), default=0)):
        for group in ordered:
            if depth < len(group):
                yield group[depth]


def _right_answers(task: str, metrics: Mapping[str, Any]) -> dict[str, bool]:
    """By question. A description without a category to name counts as right when its METEOR is at least that of the
    whole corpus."""
    names = _RIGHT.get(task, ("accuracy",))
    right = {}
    for item in items_of(metrics):
        name = next((name for name in names if name in item.sums), None)
        if name is not None:
            right[item.id] = item.sums[name][0] > 0
        elif "meteor" in item.sums:
            right[item.id] = float(meteor(np.array(item.sums["meteor"]))) >= metrics["figures"]["meteor"]["value"]
    return right


def _kind(row: Mapping[str, Any]) -> str:
    reference = row.get("reference")
    return str(reference.get("objective", "")) if isinstance(reference, Mapping) else ""


def _truth(row: Mapping[str, Any]) -> str:
    reference = row.get("reference")
    if not isinstance(reference, Mapping):
        return str(reference)
    if reference.get("objective") == "neg_pred":
        return f"{reference['category']}: not in the image"
    texts = [reference.get("category") or reference.get("answer")]
    texts = texts if texts[0] else [*reference.get("references", ()), *reference.get("answers", ())]
    return ", ".join(dict.fromkeys(map(str, texts)))


def _places(row: Mapping[str, Any], answers: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[Place]:
    for name, box in dict(row.get("boxes") or {}).items():
        yield Place(_four(box), None, None, str(name))
    for number, answer in answers:
        said = answer.get("parsed")
        if not isinstance(said, list) or not all(isinstance(value, int | float) for value in said):
            continue
        if len(said) == 4:
            yield Place(_four(said), None, number, "")
        elif len(said) == 2:
            yield Place(None, (float(said[0]), float(said[1])), number, "")


def _four(box: Sequence[float]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, x2, y2
