"""Samples -> one padded batch.

Several conversations of an image sit behind one image prefix and cannot see each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from locvlm.data.dataset import Sample
from locvlm.errors import DataError
from locvlm.pixels import PIXEL_MEAN, PIXEL_STD


@dataclass(frozen=True, slots=True)
class Batch:
    """See `LocVLM.sum_loss` for the shapes; but `pixel_values` are uint8 [pictures, side, side, 3] until `inputs`, a
    quarter of what they become. `n_targets`: supervised tokens; `n_tokens`: all tokens but padding."""

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    position_ids: torch.Tensor | None
    owners: torch.Tensor | None
    sources: torch.Tensor
    targets: torch.Tensor
    n_tokens: int
    n_conversations: int
    frames: tuple[int, ...] | None = None
    features: torch.Tensor | None = None

    @property
    def n_targets(self) -> int:
        """Supervised tokens."""
        return len(self.targets)

    def pinned(self) -> "Batch":
        """The same in page-locked memory, from which a GPU fetches it while it computes."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **pinned)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """The arguments of `sum_loss`, tensors on `device`; the pixels are normalised there."""
        found: dict[str, Any] = {"pixel_values": None}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                found[field.name] = value.to(device, non_blocking=True)
        if found["pixel_values"] is not None:
            found["pixel_values"] = _normalised(found["pixel_values"])
        return found if self.frames is None else {**found, "frames": self.frames}


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Right-pad and stack. Positions of each conversation go on from the prefix as if it were alone; `owners` lets a
    token see the prefix and its own conversation's past, nothing else.

    Where every sample is one conversation there is nothing to keep apart: padding stands on the right, which a causal
    model never looks at, so `owners` and `position_ids` are None and the plain causal kernels serve.
    """
    if not samples:
        raise DataError("collating a batch: it is empty")
    lengths = [len(s.prefix) + sum(len(b.ids) for b in s.branches) for s in samples]
    size = (len(samples), max(lengths))
    ids = np.full(size, pad_id, np.int64)
    sources, targets = [], []
    for row, sample in enumerate(samples):
        n = len(sample.prefix)
        ids[row, :n] = sample.prefix
        at = n
        for branch in sample.branches:
            end = at + len(branch.ids)
            ids[row, at:end] = branch.ids
            places = at + np.flatnonzero(branch.supervised)
            # the first token of a branch is predicted by the last token of the prefix
            sources.append(row * size[1] + np.where(places == at, n, places) - 1)
            targets.append(ids[row, places])
            at = end
    owners, positions = _apart(samples, size) if any(len(s.branches) > 1 for s in samples) else (None, None)
    return Batch(
        input_ids=torch.from_numpy(ids),
        pixel_values=_pictures(samples),
        position_ids=positions,
        owners=owners,
        sources=torch.from_numpy(np.concatenate(sources)),
        targets=torch.from_numpy(np.concatenate(targets)),
        n_tokens=sum(lengths),
        n_conversations=sum(len(s.branches) for s in samples),
        frames=_frames(samples),
        features=_features(samples),
    )


def _apart(samples: Sequence[Sample], size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The conversation of each token (0 the prefix, 1.. the branches, -1 padding) and its position."""
    owners = np.full(size, -1, np.int64)
    positions = np.zeros(size, np.int64)
    for row, sample in enumerate(samples):
        at = n = len(sample.prefix)
        owners[row, :n] = 0
        positions[row, :n] = np.arange(n)
        for number, branch in enumerate(sample.branches, 1):
            end = at + len(branch.ids)
            owners[row, at:end] = number
            positions[row, at:end] = np.arange(n, n + end - at)
            at = end
    return torch.from_numpy(owners), torch.from_numpy(positions)


def _pictures(samples: Sequence[Sample]) -> torch.Tensor | None:
    """[pictures, side, side, 3]: images and frames one after another."""
    pictures = [s.pixels if s.pixels.ndim == 4 else s.pixels[None] for s in samples if s.pixels is not None]
    return torch.from_numpy(np.concatenate(pictures)) if pictures else None


def _normalised(pictures: torch.Tensor) -> torch.Tensor:
    """As CLIP expects, float32 [pictures, 3, side, side]; bit by bit what `locvlm.pixels.normalised` gives."""
    mean, std = (torch.tensor(v, device=pictures.device)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    values = pictures.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(255).sub_(mean).div_(std)


def _frames(samples: Sequence[Sample]) -> tuple[int, ...] | None:
    """What each row is, as `LocVLM.visual_tokens` takes it; None when all are images."""
    found = []
    for sample in samples:
        if sample.features is not None:
            found.append(-len(sample.features))
        else:
            assert sample.pixels is not None
            found.append(len(sample.pixels) if sample.pixels.ndim == 4 else 0)
    return tuple(found) if any(found) else None


def _features(samples: Sequence[Sample]) -> torch.Tensor | None:
    pooled = [s.features for s in samples if s.features is not None]
    return torch.from_numpy(np.concatenate(pooled)).float() if pooled else None
