"""Spatio-temporal pooling of video features (paper, section 3.4, after Video-ChatGPT): 256 + n_f tokens a video."""

from typing import Literal

import torch

TokenOrder = Literal["temporal_spatial", "spatial_temporal"]


def pool_frames(features: torch.Tensor, order: TokenOrder = "temporal_spatial", pad_to: int = 0) -> torch.Tensor:
    """Features of the frames of one video, before the adapter -> its visual tokens.

    features: [frames, patches, width]. Returns [frames + patches, width]: a temporal token a frame (the mean over its
    patches) and a spatial token a patch (the mean over the frames). `pad_to`: zero rows after the temporal tokens up
    to that number, as Video-ChatGPT has them for short videos; 0 adds none.
    """
    temporal, spatial = features.mean(dim=1), features.mean(dim=0)
    if pad_to > len(temporal):
        temporal = torch.cat([temporal, temporal.new_zeros(pad_to - len(temporal), temporal.shape[1])])
    parts = (temporal, spatial) if order == "temporal_spatial" else (spatial, temporal)
    return torch.cat(parts)
