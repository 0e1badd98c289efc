"""Folders in LLaVA's own layout with random weights: LLaVA v1 and v1.5, Shikra, Video-ChatGPT."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from locvlm.model.tokenizer import word_tokenizer

SIDE, PATCH, WIDTH, TEXT_WIDTH = 28, 14, 32, 48
WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER ASSISTANT In the given could you find and tell me the "
    "coordinates of For this image I want a simple direct answer my question provide unique description area Is there "
    "dog cat left"
)


def tokenizer(*marks: str) -> PreTrainedTokenizerFast:
    """LLaMA's special tokens and no more, then the marks of a family. Its pad token is the unk token."""
    made = word_tokenizer([WORDS])
    made.pad_token = made.unk_token
    if marks:
        made.add_special_tokens({"additional_special_tokens": list(marks)}, replace_extra_special_tokens=False)
    return made


def make_tower(folder: Path) -> Path:
    """A CLIP vision tower."""
    torch.manual_seed(1)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)).save_pretrained(folder)
    return folder


def make_folder(folder: Path, tower: Path | str, marks: tuple[str, ...] = (), **values: Any) -> Path:
    """A checkpoint that names `tower`. `values`: of its config.json (model_type, mm_projector_type, ...); `marks`: what
    its tokenizer has beside LLaMA's own."""
    words = tokenizer(*marks)
    torch.manual_seed(2)
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(text)
    for value in model.parameters():
        if value.dim() > 1:
            value.data.normal_(std=0.3)  # so large that prompt and image matter and nothing ties
    model.lm_head.weight.data[: 5 + 256] = 0  # words, not special tokens and bytes
    weights = dict(model.state_dict())
    weights |= projector(str(values.get("mm_projector_type", "linear")))
    folder.mkdir(parents=True)
    torch.save(weights, folder / "pytorch_model.bin")
    known = {"mm_vision_tower": str(tower), "mm_hidden_size": WIDTH, "use_mm_proj": True, "mm_vision_select_layer": -2}
    (folder / "config.json").write_text(json.dumps(text.to_dict() | known | {"model_type": "llava"} | values))
    words.save_pretrained(folder)
    return folder


def projector(kind: str) -> dict[str, torch.Tensor]:
    """Its weights under LLaVA's names."""
    made = torch.Generator().manual_seed(3)
    shapes = {"weight": (TEXT_WIDTH, WIDTH), "bias": (TEXT_WIDTH,)}
    if kind == "mlp2x_gelu":
        shapes = {f"0.{name}": shape for name, shape in shapes.items()}
        shapes |= {"2.weight": (TEXT_WIDTH, TEXT_WIDTH), "2.bias": (TEXT_WIDTH,)}
    return {f"model.mm_projector.{name}": torch.randn(shape, generator=made) for name, shape in shapes.items()}
