"""Samples -> one padded batch.

Several conversations of an image sit behind one image prefix and cannot see each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from locvlm.data.dataset import Sample
from locvlm.errors import DataError


@dataclass(frozen=True, slots=True)
class Batch:
    """See `LocVLM.sum_loss` for the shapes. `n_targets`: supervised tokens; `n_tokens`: all tokens but padding."""

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    n_tokens: int
    n_conversations: int

    @property
    def n_targets(self) -> int:
        """Supervised tokens."""
        return len(self.targets)

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors, by the names of `sum_loss`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Right-pad and stack. Positions of each conversation go on from the prefix as if it were alone; the mask lets a
    token see the prefix and its own conversation's past, nothing else."""
    if not samples:
        raise DataError("collating a batch: it is empty")
    lengths = [len(s.prefix) + sum(len(b.ids) for b in s.branches) for s in samples]
    size = (len(samples), max(lengths))
    ids = np.full(size, pad_id, np.int64)
    positions = np.zeros(size, np.int64)
    owner = np.full(size, -1, np.int64)  # conversation of each token: 0 the prefix, 1.. the branches, -1 padding
    sources: list[int] = []
    targets: list[int] = []
    for row, sample in enumerate(samples):
        n = len(sample.prefix)
        ids[row, :n] = sample.prefix
        positions[row, :n] = np.arange(n)
        owner[row, :n] = 0
        at = n
        for number, branch in enumerate(sample.branches, 1):
            end = at + len(branch.ids)
            ids[row, at:end] = branch.ids
            positions[row, at:end] = np.arange(n, n + end - at)
            owner[row, at:end] = number
            for offset in np.flatnonzero(branch.supervised).tolist():
                # the first token of a branch is predicted by the last token of the prefix
                sources.append(row * size[1] + (at + offset - 1 if offset else n - 1))
                targets.append(branch.ids[offset])
            at = end
    causal = np.tri(size[1], dtype=bool)
    own = owner[:, :, None] == owner[:, None, :]
    mask = causal & (own | (owner[:, None, :] == 0))
    return Batch(
        input_ids=torch.from_numpy(ids),
        pixel_values=torch.from_numpy(np.stack([s.pixels for s in samples])),
        attention_mask=torch.from_numpy(mask[:, None]),
        position_ids=torch.from_numpy(positions),
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
        n_tokens=sum(lengths),
        n_conversations=sum(len(s.branches) for s in samples),
    )
