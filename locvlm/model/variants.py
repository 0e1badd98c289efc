"""LocVLM as a transformers model: CLIP vision tower, adapter, Llama decoder (paper, sections 3.1 and 4).

LocVLM-B has one linear layer as its adapter, which transformers' Llava cannot express. A module swapped on an instance
is lost at the next from_pretrained, so the choice is a field of the config and the swap is part of construction.
"""

from typing import Any

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

from locvlm.config import ModelConfig


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

    def sum_loss(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        sources: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Sum (not mean) of the token cross-entropies over the supervised tokens.

        input_ids, position_ids: [batch, length]; pixel_values: [batch, 3, side, side]; attention_mask: bool
        [batch, 1, length, length]; sources: [tokens], flat positions (row * length + column) of the hidden state that
        predicts each supervised token; targets: [tokens], its id. Logits are computed at `sources` only.
        """
        hidden = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        logits = self.lm_head(hidden.flatten(0, 1).index_select(0, sources))
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


AutoConfig.register("locvlm", LocVLMConfig)
AutoModel.register(LocVLMConfig, LocVLM)
AutoModelForImageTextToText.register(LocVLMConfig, LocVLM)


def architecture(config: ModelConfig, *, image_token_id: int, special_ids: dict[str, int]) -> LocVLMConfig:
    """The transformers config of a new model. `special_ids`: bos_token_id, eos_token_id, pad_token_id."""
    vision, language = config.vision, config.language
    return LocVLMConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.ffn_size,
            num_hidden_layers=vision.n_layers,
            num_attention_heads=vision.n_heads,
            image_size=vision.image_side,
            patch_size=vision.patch_size,
            projection_dim=vision.hidden_size,
        ),
        text_config=LlamaConfig(
            vocab_size=language.vocab_size,
            hidden_size=language.hidden_size,
            intermediate_size=language.ffn_size,
            num_hidden_layers=language.n_layers,
            num_attention_heads=language.n_heads,
            num_key_value_heads=language.n_heads,
            max_position_embeddings=language.max_length,
            tie_word_embeddings=False,
            **special_ids,
        ),
        image_token_index=image_token_id,
        image_seq_length=vision.n_tokens,
        vision_feature_layer=vision.feature_layer,
        adapter_type=config.adapter,
        tie_word_embeddings=False,
        **special_ids,
    )


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
