"""LocVLM as a transformers model: CLIP vision tower, adapter, Llama decoder (paper, sections 3.1 and 4).

LocVLM-B has one linear layer as its adapter, which transformers' Llava cannot express. A module swapped on an instance
is lost at the next from_pretrained, so the choice is a field of the config and the swap is part of construction.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPooling

from locvlm.config import ModelConfig, VideoConfig
from locvlm.model import attention
from locvlm.model.pooling import pool_frames

_PICTURES_AT_ONCE = 128  # through the vision tower: 100 frames a video must not fill the memory


def _fused_loss() -> Callable[..., torch.Tensor] | None:
    """Liger's linear layer and cross-entropy in one kernel, summed, where the package is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")  # type: ignore[no-any-return]


FUSED_LOSS = _fused_loss()


class LinearAdapter(nn.Module):
    """The adapter of LocVLM-B: visual width -> language width, one linear layer with bias."""

    def __init__(self, visual_width: int, language_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(visual_width, language_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[..., visual_width] -> [..., language_width]."""
        return self.linear(features)  # type: ignore[no-any-return]


class LocVLMConfig(LlavaConfig):  # type: ignore[misc]
    """LlavaConfig plus the kind of adapter: `linear` (LocVLM-B) or `mlp` (LocVLM-L, Llava's own)."""

    model_type = "locvlm"
    adapter_type: str = "mlp"
    video_token_order: str = "temporal_spatial"
    video_pad_to: int = 0


class LocVLM(LlavaForConditionalGeneration):  # type: ignore[misc]
    """The model. `forward` and `generate` are Llava's; `sum_loss` is what training calls."""

    config_class = LocVLMConfig

    def __init__(self, config: LocVLMConfig) -> None:
        super().__init__(config)
        if config.adapter_type == "linear":
            adapter = LinearAdapter(config.vision_config.hidden_size, config.text_config.hidden_size)
            self.model.multi_modal_projector = adapter
            self._init_weights(adapter.linear)

    @property
    def adapter(self) -> nn.Module:
        """The adapter, under Llava's name for it."""
        return self.model.multi_modal_projector  # type: ignore[no-any-return]

    def enable_recompute(self) -> None:
        """Keep only the inputs of the language model's blocks and compute the rest again on the way back."""
        self.model.language_model.activation_checkpointing_enable()

    def sum_loss(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        sources: torch.Tensor,
        targets: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        owners: torch.Tensor | None = None,
        frames: Sequence[int] | None = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum (not mean) of the token cross-entropies over the supervised tokens.

        input_ids, position_ids: [batch, length]; pixel_values, frames, features: see `visual_tokens`; sources:
        [tokens], flat positions (row * length + column) of the hidden state that predicts each supervised token;
        targets: [tokens], its id. Logits are computed at `sources` only.
        owners: [batch, length], the conversation of each token: 0 the shared image prefix, 1.. the conversations, -1
        padding; a token sees the past of its own conversation and the prefix. None: one conversation a row.
        """
        mask = None if owners is None else self._block_mask(owners)
        text = self.model.language_model
        how: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if mask is not None and attention.is_faster(input_ids.device) and not text.is_activation_checkpointing:
            mask = attention.additive(mask, text.config.num_attention_heads)[None]
            how = attention.used_by(text.config)
        with how:
            hidden = self.model(
                input_ids=input_ids,
                mm_encoder_outputs={"image": self.visual_tokens(pixel_values, frames, features)},
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state
        supervised = hidden.flatten(0, 1).index_select(0, sources)
        if supervised.is_cuda and FUSED_LOSS is not None:
            return FUSED_LOSS(self.lm_head.weight, supervised, targets)
        return nn.functional.cross_entropy(self.lm_head(supervised).float(), targets, reduction="sum")

    def visual_tokens(
        self,
        pixel_values: torch.Tensor | None,
        frames: Sequence[int] | None = None,
        features: torch.Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """The visual tokens of a batch behind the adapter, as `LlavaModel.forward` takes them (`pooler_output`: a
        [tokens, language width] a row).

        pixel_values: [pictures, 3, side, side], images and the frames of videos in the order of the rows. frames, a
        number a row: 0 an image, n > 0 a video of n frames, -n a video of n pooled tokens out of `features`
        ([tokens, visual width], those of all such rows). None: every row is an image.
        """
        parts: list[torch.Tensor] = []
        seen = None if pixel_values is None else self.patch_features(pixel_values)
        at = taken = 0
        for n in frames if frames is not None else (0,) * (0 if seen is None else len(seen)):
            if n < 0:
                assert features is not None
                parts.append(features[taken : taken - n])
                taken -= n
                continue
            assert seen is not None
            if n == 0:
                parts.append(seen[at])
            else:
                parts.append(pool_frames(seen[at : at + n], self.config.video_token_order, self.config.video_pad_to))
            at += n or 1
        sizes = [len(part) for part in parts]
        adapted = self.adapter(torch.cat(parts).to(self.lm_head.weight.dtype))
        return BaseModelOutputWithPooling(pooler_output=list(torch.split(adapted, sizes, dim=0)))

    def patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[pictures, 3, side, side] -> [pictures, patches, visual width]: the output of the block that feeds the
        adapter, the class token dropped (Llava's `vision_feature_layer`)."""
        layer = self.config.vision_feature_layer
        found = [  # only that layer is kept
            self.model.vision_tower(part, output_hidden_states=layer).hidden_states[layer][:, 1:]
            for part in torch.split(pixel_values, _PICTURES_AT_ONCE)
        ]
        return torch.cat(found)

    def _block_mask(self, owners: torch.Tensor) -> Any:
        """FlexAttention's block mask where the language model uses it, else bool [batch, 1, length, length]."""
        length = owners.shape[1]
        if self.model.language_model.config._attn_implementation == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                same = owners[batch, query] == owners[batch, key]
                return (query >= key) & (same | (owners[batch, key] == 0))

            return create_block_mask(sees, len(owners), None, length, length, device=str(owners.device))
        causal = torch.ones(length, length, dtype=torch.bool, device=owners.device).tril()
        return (causal & ((owners[:, :, None] == owners[:, None, :]) | (owners[:, None, :] == 0)))[:, None]


@torch.inference_mode()
def pool_pixels(model: LocVLM, pixels: npt.NDArray[np.float32], video: VideoConfig) -> npt.NDArray[np.float16]:
    """The pooled tokens of one video before the adapter, float16 [tokens, visual width], as `VideoConfig` wants them.
    pixels: [frames, 3, side, side]."""
    weight = model.lm_head.weight
    features = model.patch_features(torch.from_numpy(pixels).to(weight.device, weight.dtype))
    pooled = pool_frames(features, video.token_order, video.n_frames if video.pad else 0)
    return pooled.to("cpu", torch.float16).numpy()


AutoConfig.register("locvlm", LocVLMConfig)
AutoModel.register(LocVLMConfig, LocVLM)
AutoModelForImageTextToText.register(LocVLMConfig, LocVLM)


def architecture(config: ModelConfig, *, image_token_id: int, special_ids: dict[str, int]) -> LocVLMConfig:
    """The transformers config of a new model. `special_ids`: bos_token_id, eos_token_id, pad_token_id."""
    vision, language = config.vision, config.language
    return combine(
        CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.ffn_size,
            num_hidden_layers=vision.n_layers,
            num_attention_heads=vision.n_heads,
            image_size=vision.image_side,
            patch_size=vision.patch_size,
            projection_dim=vision.hidden_size,
        ),
        LlamaConfig(
            vocab_size=language.vocab_size,
            hidden_size=language.hidden_size,
            intermediate_size=language.ffn_size,
            num_hidden_layers=language.n_layers,
            num_attention_heads=language.n_heads,
            num_key_value_heads=language.n_heads,
            max_position_embeddings=language.max_length,
        ),
        config.adapter,
        vision.feature_layer,
        image_token_id,
        special_ids,
    )


def combine(
    vision: CLIPVisionConfig,
    text: LlamaConfig,
    adapter: str,
    feature_layer: int,
    image_token_id: int,
    special_ids: dict[str, int],
) -> LocVLMConfig:
    """The config of the model made of a vision tower, an adapter and a language model. Embeddings are never tied:
    the input row of `<image>` is not used and its output row is never sampled."""
    text.tie_word_embeddings = False
    text.update(special_ids)
    return LocVLMConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=feature_layer,
        adapter_type=adapter,
        tie_word_embeddings=False,
        **special_ids,
    )


def empty_model(architecture_config: LocVLMConfig) -> LocVLM:
    """A model whose weights are not set: the caller fills every one."""
    with no_init_weights():
        return LocVLM(architecture_config)


def new_model(architecture_config: LocVLMConfig, seed: int) -> LocVLM:
    """A model with random weights, the same for the same seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LocVLM(architecture_config)


def reset_adapter(model: LocVLM, seed: int) -> None:
    """Give the adapter fresh weights: stage 1 starts without one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.adapter.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)


def count_parameters(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of scalars; works on the meta device too."""
    parameters: Any = module.parameters()
    return sum(p.numel() for p in parameters if p.requires_grad or not trainable_only)
