"""Untrained panoptic segmentation models of the real classes with the COCO label set, small enough to run in a test."""

import json
import string
from pathlib import Path

import torch
from transformers import (
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessorPil,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    OneFormerImageProcessorPil,
    OneFormerProcessor,
    SwinConfig,
)

from locvlm.data.panoptic import STUFF, THINGS

SIDE = 64
# as the checkpoints write them; which suffix a name has does not matter
LABELS = [*THINGS, *(f"{name}-merged" for name in STUFF)]


def save_segmenter(kind: str, folder: Path, labels: list[str] = LABELS) -> Path:
    """Save a model with its processor, as its publisher does. `kind`: mask2former, maskformer or oneformer."""
    torch.manual_seed(7)
    {"mask2former": _mask2former, "maskformer": _maskformer, "oneformer": _oneformer}[kind](folder, labels)
    return folder


def _backbone() -> SwinConfig:
    return SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=SIDE,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _names(labels: list[str]) -> dict[str, dict[int | str, int | str]]:
    return {"id2label": dict(enumerate(labels)), "label2id": {name: key for key, name in enumerate(labels)}}


def _confident(head: torch.nn.Module) -> None:
    """Untrained scores are near 1/134; a sharp head passes the thresholds."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=30)


def _mask2former(folder: Path, labels: list[str]) -> None:
    config = Mask2FormerConfig(
        backbone_config=_backbone(),
        hidden_size=32,
        feature_size=32,
        mask_feature_size=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_queries=1,
        **_names(labels),
    )
    model = Mask2FormerForUniversalSegmentation(config)
    _confident(model.class_predictor)
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def _maskformer(folder: Path, labels: list[str]) -> None:
    config = MaskFormerConfig(
        fpn_feature_size=32,
        mask_feature_size=32,
        backbone_config=_backbone(),
        decoder_config={
            "model_type": "detr",
            "d_model": 32,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 16,
            "num_queries": 1,
        },
        **_names(labels),
    )
    model = MaskFormerForInstanceSegmentation(config)
    _confident(model.class_predictor)
    model.save_pretrained(folder)
    MaskFormerImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def _oneformer(folder: Path, labels: list[str]) -> None:
    config = OneFormerConfig(
        backbone_config=_backbone(),
        ignore_value=255,
        num_queries=1,
        hidden_dim=32,
        conv_dim=32,
        mask_dim=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        text_encoder_context_length=7,
        text_encoder_vocab_size=64,
        task_seq_len=7,
        max_seq_len=7,
        query_dec_layers=1,
        **_names(labels),
    )
    model = OneFormerForUniversalSegmentation(config)
    _confident(model.model.transformer_module.decoder.class_embed)
    model.save_pretrained(folder)
    letters = list(string.ascii_lowercase)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    words = folder / "words"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    processor = OneFormerProcessor(
        OneFormerImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        CLIPTokenizer.from_pretrained(words, model_max_length=77),
        max_seq_length=7,
        task_seq_length=7,
    )
    processor.save_pretrained(folder)
    # published checkpoints name a file that the hub would have to give
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"] |= {"class_info_file": "coco_panoptic.json", "repo_path": "shi-labs/oneformer_demo"}
    path.write_text(json.dumps(values))
