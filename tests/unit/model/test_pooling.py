"""Pooling over space and time: token counts, order, and where it stands towards the adapter."""

import pytest
import torch
from torch import nn

from locvlm.model.pooling import pool_frames


@pytest.mark.parametrize(("frames", "tokens"), [(100, 356), (8, 264)])
def test_the_papers_models_see_256_tokens_and_one_a_frame(frames: int, tokens: int) -> None:
    assert pool_frames(torch.zeros(frames, 256, 4)).shape == (tokens, 4)


def test_temporal_tokens_are_means_of_frames_and_spatial_ones_of_places() -> None:
    features = torch.arange(2 * 3 * 1, dtype=torch.float32).reshape(2, 3, 1)  # frames 0: 0 1 2, 1: 3 4 5
    assert pool_frames(features).ravel().tolist() == [1, 4, 1.5, 2.5, 3.5]
    assert pool_frames(features, "spatial_temporal").ravel().tolist() == [1.5, 2.5, 3.5, 1, 4]
    assert pool_frames(features, pad_to=4).ravel().tolist() == [1, 4, 0, 0, 1.5, 2.5, 3.5]


def test_pooling_before_a_linear_adapter_equals_pooling_after_it_and_not_for_an_mlp() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 9, 6, generator=generator, dtype=torch.float64)
    linear = nn.Linear(6, 8).double()
    mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8)).double()
    assert torch.allclose(linear(pool_frames(features)), pool_frames(linear(features)))
    assert not torch.allclose(mlp(pool_frames(features)), pool_frames(mlp(features)))
