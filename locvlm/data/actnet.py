"""Pseudo-ActNet and Localize-ActivityNet (paper, section 3.4): boxes of a few frames a video, and LocPred, NegPred and
RevLoc turns about the objects that do not move.

Pseudo-ActNet is a folder with `videos.jsonl`, a `VideoLabels` a line by the name of the video; `labelling` makes it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePosixPath

import msgspec
import numpy as np

from locvlm.config import InstructConfig
from locvlm.data.coco import Instances
from locvlm.data.instruct import LOST_BY_CROP, build_localize_instruct
from locvlm.data.panoptic import CATEGORIES, THINGS, Segment
from locvlm.errors import DataError
from locvlm.geometry import ImageGeometry
from locvlm.records import BoxXYXY, Conversation, ImageRecord, ObjectRecord, read_manifest

VIDEOS_NAME = "videos.jsonl"
DATASET = "pseudo-actnet"
TOLERANCE = 5.0  # network pixels

SEVERAL = "category with several instances or a crowd in one frame"
MOVING = "object that moves"
NO_STATIC = "video without an object that stays in place"

_VIDEOS_AT_A_TIME = 1024
_ROUNDING = 1e-9  # a centre exactly at the tolerance is inside


@dataclass(frozen=True, slots=True)
class VideoLabels:
    """The segments of the sampled frames of one video.

    `video`: its file, relative to the video folder; `width`, `height` of its frames in pixels; `indices`: the numbers
    of the frames; `frames`: the segments of each that are large enough; `absent`: the COCO panoptic categories of which
    no frame has a segment of any size; `notes`: what the reader of the frames said, such as damage.
    """

    video: str
    width: int
    height: int
    indices: tuple[int, ...]
    frames: tuple[tuple[Segment, ...], ...]
    absent: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_labels(folder: Path) -> Iterator[VideoLabels]:
    """The videos of a Pseudo-ActNet folder, by name. Raises DataError when it is not one, or is damaged."""
    manifest = read_manifest(folder)
    if manifest.get("dataset") != DATASET:
        raise DataError(
            f"reading the labels {folder}: it holds the data set {manifest.get('dataset')!r}; needed is one built by "
            f"`locvlm data {DATASET}`"
        )
    return _read_lines(folder / VIDEOS_NAME)


def present_and_absent(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(video, categories with a segment, categories without) of a Pseudo-ActNet folder: what presence questions about
    videos (Hal-Act, section 4.4) are made of. A category with small segments only is in neither list.

    Raises DataError as `read_labels`.
    """
    for labels in read_labels(folder):
        seen = {segment.category for frame in labels.frames for segment in frame}
        yield labels.video, [name for name in CATEGORIES if name in seen], list(labels.absent)


def static_objects(
    labels: VideoLabels,
    geometry: ImageGeometry,
    tolerance: float = TOLERANCE,
    categories: Sequence[str] = THINGS,
) -> tuple[dict[str, BoxXYXY], Counter[str]]:
    """The objects of a video that stay in place (category -> box in pixels of the frame), and the others by reason.

    An object is a category with at most one segment in every frame. It stays if it occurs in one frame only, or if in
    every frame where it occurs its centre is, in either direction, within `tolerance` network pixels (after `geometry`)
    of the mean of its centres. The box is the mean over these frames. Frames in which a crop loses it do not count.
    """
    kept: dict[str, BoxXYXY] = {}
    skipped: Counter[str] = Counter()
    by_category: dict[str, list[list[Segment]]] = {}
    for frame in labels.frames:
        found: dict[str, list[Segment]] = {}
        for segment in frame:
            found.setdefault(segment.category, []).append(segment)
        for name, segments in found.items():
            by_category.setdefault(name, []).append(segments)
    for name in categories:
        frames = by_category.get(name, [])
        if any(len(segments) > 1 or segments[0].is_crowd for segments in frames):
            skipped[SEVERAL] += 1
            continue
        boxes = [segments[0].box_xyxy for segments in frames]
        mapped = [geometry.map_box(box, labels.width, labels.height) for box in boxes]
        seen = [(box, inside) for box, inside in zip(boxes, mapped, strict=True) if inside is not None]
        if not seen:
            if boxes:
                skipped[LOST_BY_CROP] += 1
            continue
        corners = np.array([inside for _, inside in seen])
        centres = (corners[:, :2] + corners[:, 2:]) / 2
        if np.abs(centres - centres.mean(axis=0)).max() > tolerance + _ROUNDING:
            skipped[MOVING] += 1
            continue
        x1, y1, x2, y2 = np.array([box for box, _ in seen]).mean(axis=0).tolist()
        kept[name] = (x1, y1, x2, y2)
    return kept, skipped


class LocalizeActivityNet(Iterator[Conversation]):
    """The conversations, in the order of the videos. `skipped` and `notes` fill up while it is read through."""

    def __init__(
        self,
        labels: Iterable[VideoLabels],
        config: InstructConfig,
        seed: int,
        geometry: ImageGeometry,
        tolerance: float = TOLERANCE,
        categories: Sequence[str] = THINGS,
        absent: Sequence[str] = THINGS,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._config, self._seed, self._geometry = config, seed, geometry
        self._tolerance, self._categories, self._absent = tolerance, categories, absent
        self._conversations = self._build(labels)

    def __next__(self) -> Conversation:
        return next(self._conversations)

    def _build(self, labels: Iterable[VideoLabels]) -> Iterator[Conversation]:
        images = self._images(labels)
        while some := list(islice(images, _VIDEOS_AT_A_TIME)):
            instances = Instances(some, list(self._absent))
            built = build_localize_instruct(instances, self._config, self._seed, geometry=self._geometry)
            for conversation in built:
                name = PurePosixPath(conversation.image).stem + conversation.id.lstrip("0123456789")
                yield replace(conversation, id=name, medium="video")
            self.skipped += built.skipped
            self.notes += built.notes

    def _images(self, labels: Iterable[VideoLabels]) -> Iterator[ImageRecord]:
        for video in labels:
            objects, skipped = static_objects(video, self._geometry, self._tolerance, self._categories)
            self.skipped += skipped
            if objects:
                yield _as_image(video, objects)
            else:
                self.skipped[NO_STATIC] += 1


def build_localize_activitynet(
    labels: Iterable[VideoLabels],
    config: InstructConfig,
    seed: int,
    geometry: ImageGeometry,
    tolerance: float = TOLERANCE,
    categories: Sequence[str] = THINGS,
    absent: Sequence[str] = THINGS,
) -> LocalizeActivityNet:
    """Localize-ActivityNet (section 3.4) from the labels of Pseudo-ActNet; iterate to get the conversations.

    The objects are those of `static_objects` among `categories`. They are put together as `build_localize_instruct`
    does for an image: a LocPred conversation with NegPred turns, and a RevLoc conversation, described by the category
    name. A NegPred turn names one of the categories `absent` that no frame shows. Draws are keyed by (seed, video).
    """
    return LocalizeActivityNet(labels, config, seed, geometry, tolerance, categories, absent)


def _as_image(video: VideoLabels, objects: dict[str, BoxXYXY]) -> ImageRecord:
    """The video as an annotated image. A category that is there but gives no object has a box of zero size, which makes
    it neither usable nor absent."""
    absent = set(video.absent)
    names = [name for name in CATEGORIES if name not in absent]
    things = [ObjectRecord(k, name, objects.get(name, (0.0, 0.0, 0.0, 0.0))) for k, name in enumerate(names)]
    key = int.from_bytes(blake2b(video.video.encode(), digest_size=8).digest(), "big") >> 1
    return ImageRecord(key, video.video, video.width, video.height, tuple(things))


def _read_lines(path: Path) -> Iterator[VideoLabels]:
    decoder = msgspec.json.Decoder(VideoLabels)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    labels = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as fault:
                    raise DataError(
                        f"reading {path}: line {number} is not the labels of a video ({fault}); build it again with "
                        f"`locvlm data {DATASET}`"
                    ) from None
                yield labels
    except OSError as error:
        raise DataError(
            f"reading {path}: {error.strerror or error}; the data set is not whole, build it again"
        ) from None
