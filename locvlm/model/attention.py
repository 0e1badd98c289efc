"""Attention as two batched products, for training small models in bf16 on a CPU.

There the way back through PyTorch's fused kernel is slow (`benchmarks/cpu_attention.py`). This holds [batch, heads,
length, length], which is little at a few hundred tokens.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PRODUCTS = "locvlm_products"


def is_faster(device: torch.device) -> bool:
    """Whether to use it: on a CPU under bf16 autocast."""
    return (
        device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def additive(sees: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The mask of all layers: bool [batch, 1, length, length] -> bf16 [batch * heads, length, length], 0 or -inf."""
    bias = torch.zeros(sees.shape, dtype=torch.bfloat16, device=sees.device).masked_fill_(~sees, float("-inf"))
    return bias.expand(-1, n_heads, -1, -1).flatten(0, 1)


def products(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value: [batch, heads, length, head width]; attention_mask: that of `additive`, with a dimension in
    front, since transformers hands on four. Returns [batch, length, heads, head width]."""
    shape = query.shape
    query, key, value = (part.flatten(0, 1).to(attention_mask.dtype) for part in (query, key, value))
    scores = torch.baddbmm(attention_mask[0], query, key.transpose(1, 2), alpha=scaling)
    seen = torch.bmm(scores.softmax(-1, dtype=scores.dtype), value)
    return seen.view(shape).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def used_by(config: PreTrainedConfig) -> Iterator[None]:
    """A language model of this config attends so inside the context; its mask must be that of `additive`."""
    before = config._attn_implementation
    config._attn_implementation = PRODUCTS
    try:
        yield
    finally:
        config._attn_implementation = before


ALL_ATTENTION_FUNCTIONS.register(PRODUCTS, products)
