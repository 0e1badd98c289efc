"""Annotated images as columns: what 118,287 images with 860,001 objects are held and counted in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from locvlm.records import BoxXYXY, ImageRecord, ObjectRecord

CrowdRule = Literal["counts", "ignored", "singleton_ok", "ignored_singleton_ok"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_IMAGES_AT_A_TIME = 4096


@dataclass(frozen=True, eq=False)
class ImageTable(Sequence[ImageRecord]):
    """Images by number; one becomes an ImageRecord when it is asked for, and a slice is a table again.

    Of n images: `ids` [n], `file_names`, `widths` and `heights` [n] in pixels. Image i has the objects `starts[i]` to
    `starts[i + 1]` (`starts` is [n + 1] and begins with 0). Of m objects: `object_ids` [m], `codes` [m] (places in
    `vocabulary`, whose names differ), `boxes` [m, 4] float64 `(x1, y1, x2, y2)` in pixels, `crowd` [m].
    """

    ids: Ints
    file_names: Sequence[str]
    widths: Ints
    heights: Ints
    starts: Ints
    object_ids: Ints
    codes: Ints
    boxes: npt.NDArray[np.float64]
    crowd: Bools
    vocabulary: Sequence[str]

    @classmethod
    def of(cls, images: Sequence[ImageRecord]) -> "ImageTable":
        """The table of `images`, which is `images` itself where it is one."""
        if isinstance(images, ImageTable):
            return images
        objects = [thing for image in images for thing in image.objects]
        codes = {name: code for code, name in enumerate(dict.fromkeys(thing.category for thing in objects))}
        return cls(
            np.array([image.id for image in images], np.int64),
            [image.file_name for image in images],
            np.array([image.width for image in images], np.int64),
            np.array([image.height for image in images], np.int64),
            np.array(list(accumulate((len(image.objects) for image in images), initial=0)), np.int64),
            np.array([thing.id for thing in objects], np.int64),
            np.array([codes[thing.category] for thing in objects], np.int64),
            np.array([thing.box_xyxy for thing in objects], np.float64).reshape(-1, 4),
            np.array([thing.is_crowd for thing in objects], np.bool_),
            list(codes),
        )

    @cached_property
    def rows(self) -> Ints:
        """The image number of every object, [m]."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def usable(self, crowd: CrowdRule = "counts") -> Bools:
        """`coco.usable_objects` of all images at once: whether each object is usable, [m]."""
        keys = self.rows * len(self.vocabulary) + self.codes
        n_keys = len(self) * len(self.vocabulary)
        alone = np.bincount(keys, minlength=n_keys)[keys] == 1
        if crowd == "counts":
            chosen = alone & ~self.crowd
        elif crowd == "singleton_ok":
            chosen = alone
        else:
            chosen = ~self.crowd & (np.bincount(keys[~self.crowd], minlength=n_keys)[keys] == 1)
            if crowd == "ignored_singleton_ok":
                chosen |= alone & self.crowd
        x1, y1, x2, y2 = self.boxes.T
        return np.asarray(chosen & (x2 > x1) & (y2 > y1))

    def take(self, numbers: Ints) -> "ImageTable":
        """The table of these images, in this order."""
        sizes = np.diff(self.starts)[numbers]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        objects = np.arange(starts[-1]) + np.repeat(self.starts[:-1][numbers] - starts[:-1], sizes)
        return ImageTable(
            self.ids[numbers],
            [self.file_names[number] for number in numbers.tolist()],
            self.widths[numbers],
            self.heights[numbers],
            starts,
            self.object_ids[objects],
            self.codes[objects],
            self.boxes[objects],
            self.crowd[objects],
            self.vocabulary,
        )

    def only(self, chosen: Bools) -> "ImageTable":
        """All images, with those of their objects that the mask `chosen`, [m], names."""
        starts = np.concatenate(([0], np.cumsum(chosen)))[self.starts]
        objects = (self.object_ids[chosen], self.codes[chosen], self.boxes[chosen], self.crowd[chosen])
        return ImageTable(self.ids, self.file_names, self.widths, self.heights, starts, *objects, self.vocabulary)

    def parts(self) -> Iterator["ImageTable"]:
        """The table in pieces of a few thousand images, so that what is worked out from one stays small."""
        for start in range(0, len(self), _IMAGES_AT_A_TIME):
            yield self._part(start, min(start + _IMAGES_AT_A_TIME, len(self)))

    def _part(self, start: int, stop: int) -> "ImageTable":
        """A run of images; nothing is copied but the starts."""
        first, last = self.starts[start], self.starts[stop]
        return ImageTable(
            self.ids[start:stop],
            self.file_names[start:stop],
            self.widths[start:stop],
            self.heights[start:stop],
            self.starts[start : stop + 1] - first,
            self.object_ids[first:last],
            self.codes[first:last],
            self.boxes[first:last],
            self.crowd[first:last],
            self.vocabulary,
        )

    def _records(self) -> Iterator[ImageRecord]:
        names = [self.vocabulary[code] for code in self.codes.tolist()]
        boxes: list[BoxXYXY] = list(map(tuple, self.boxes.tolist()))
        objects = tuple(map(ObjectRecord, self.object_ids.tolist(), names, boxes, self.crowd.tolist()))
        starts = self.starts.tolist()
        columns = zip(self.ids.tolist(), self.file_names, self.widths.tolist(), self.heights.tolist(), strict=True)
        for number, image in enumerate(columns):
            yield ImageRecord(*image, objects[starts[number] : starts[number + 1]])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        """The image of one number, or the table of a slice. Raises IndexError beyond the last image."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._part(start, max(start, stop))
            return self.take(np.arange(start, stop, step))
        number = range(len(self))[index]
        return next(self._part(number, number + 1)._records())

    def __iter__(self) -> Iterator[ImageRecord]:
        for part in self.parts():
            yield from part._records()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{field.name} {len(getattr(self, field.name))}" for field in fields(self))
        return f"ImageTable({sizes})"
