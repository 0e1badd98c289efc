"""Named experiments. Each differs from another by a few lines; numbers cite the paper or the recipe they follow."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from locvlm.config import ExperimentConfig, resolve
from locvlm.errors import ConfigError


def _locvlm_b() -> dict[str, Any]:
    """LocVLM-B: CLIP ViT-L/14 at 224, a linear adapter, LLaMA-7B."""
    return {
        "name": "locvlm-b",
        "coordinates": {"representation": "ivb", "n_bins": 224, "patch": 14},  # n_b = 224 (section 3.2)
        "geometry": {"kind": "squash", "side": 224},
        "model": {
            "adapter": "linear",
            "vision": {"source": "openai/clip-vit-large-patch14", "image_side": 224},
            "language": {"source": "lmsys/vicuna-7b-v1.1"},
        },
        "stages": {
            # LLaVA v1 stage 1 on CC3M-595K: the paper's phase 1 "following [38]"
            "align": {
                "trainable": ["adapter"],
                "format": "plain",
                "learning_rate": 2e-3,
                "global_batch": 128,
                "epochs": 1,
                "warmup_ratio": 0.03,
            },
            # the paper, section 4: AdamW, 2e-5, batch 64, 10 epochs, warm-up 0.3, cosine
            "instruct": {
                "trainable": ["adapter", "language"],
                "learning_rate": 2e-5,
                "global_batch": 64,
                "epochs": 10,
                "warmup_ratio": 0.3,
                "group_by_length": True,
            },
        },
        # 16 bytes a parameter do not fit 80 GB: LLaVA trains with ZeRO and recomputes activations too
        "cluster": {"engine": "zero2", "recompute": True},
    }


def _locvlm_l() -> dict[str, Any]:
    """LocVLM-L: CLIP ViT-L/14-336, an MLP adapter, LLaMA-2 (Vicuna-7B v1.5)."""
    values = _locvlm_b()
    values["name"] = "locvlm-l"
    values["coordinates"]["n_bins"] = 336
    values["geometry"]["side"] = 336
    values["model"] = {
        "adapter": "mlp",
        "vision": {"source": "openai/clip-vit-large-patch14-336", "image_side": 336},
        "language": {"source": "lmsys/vicuna-7b-v1.5"},
    }
    values["stages"]["align"] |= {"learning_rate": 1e-3, "global_batch": 256}  # LLaVA v1.5 stage 1
    return values


def _locvlm_vid_b() -> dict[str, Any]:
    """LocVLM-Vid-B: LocVLM-B plus Video-ChatGPT's tuning of the adapter on 100 frames."""
    values = _locvlm_b()
    values["name"] = "locvlm-vid-b"
    values["video"] = {"n_frames": 100}
    values["stages"]["video"] = {  # Video-ChatGPT: 3 epochs, 2e-5, batch 32, cosine, warm-up 0.03
        "trainable": ["adapter"],
        "learning_rate": 2e-5,
        "global_batch": 32,
        "epochs": 3,
        "warmup_ratio": 0.03,
    }
    return values


def _locvlm_vid_b_plus() -> dict[str, Any]:
    """LocVLM-Vid-B+: video objectives too, adapter and language model, 8 frames."""
    values = _locvlm_vid_b()
    values["name"] = "locvlm-vid-b-plus"
    values["video"] = {"n_frames": 8}
    values["stages"]["video"]["trainable"] = ["adapter", "language"]
    return values


def _tiny() -> dict[str, Any]:
    """The laptop's model: the same classes at about a million parameters, on drawn scenes of 48 pixels."""
    return {
        "name": "tiny",
        "coordinates": {"representation": "ivb", "n_bins": 48, "patch": 8},
        "geometry": {"kind": "squash", "side": 48},
        "prompts": {"system": ""},
        "instruct": {"grouping": "qa"},
        "model": {
            "foundation": "tiny",
            "adapter": "linear",
            "vision": {
                "image_side": 48,
                "patch_size": 8,
                "hidden_size": 128,
                "n_layers": 3,
                "n_heads": 4,
                "ffn_size": 256,
            },
            "language": {
                "vocab_size": 2048,
                "hidden_size": 128,
                "n_layers": 4,
                "n_heads": 4,
                "ffn_size": 384,
                "max_length": 512,
            },
        },
        "stages": {
            "align": {
                "trainable": ["adapter"],
                "format": "plain",
                "mixture": [{"source": "generic", "objective": "caption"}],
                "learning_rate": 1e-2,
                "global_batch": 32,
                "steps": 400,
                "warmup_ratio": 0.05,
                "conversations_per_image": 1,
                "precision": "bf16",
            },
            "instruct": {
                "trainable": ["adapter", "language"],
                "mixture": [
                    {"source": "generic", "objective": "caption", "weight": 0.05},
                    {"source": "generic", "objective": "presence", "weight": 0.05},
                    {"source": "generic", "objective": "stated_left_right", "weight": 0.20},
                    {"source": "localize", "objective": "loc_pred", "weight": 0.30},
                    {"source": "localize", "objective": "neg_pred", "weight": 0.10},
                    {"source": "localize", "objective": "rev_loc", "weight": 0.30},
                ],
                "learning_rate": 1.5e-3,
                "global_batch": 32,
                "steps": 500,
                "warmup_ratio": 0.1,
                "betas": [0.9, 0.98],
                "conversations_per_image": 8,
                "precision": "bf16",
            },
        },
        "cluster": {
            "num_workers": 2,
            "cpus_per_worker": 1,
            "checkpoint_every": 200,
            "log_every": 10,
            "loader_threads": 0,
        },
        "gate": {"must_beat_floor": ["presence/accuracy", "localization/mean_iou"]},
        "evaluation": {"temperature": 0.0, "max_new_tokens": 40, "batch_size": 64},
    }


def _plus_llava_instruct(name: str, base: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`base` with LLaVA-Instruct-80K in stage 2, which the paper leaves open ("primarily" Localize-Instruct-200K). The
    weights are the numbers of conversations, so that an epoch has each once; `base` alone is the literal reading."""
    values = base()
    values["name"] = name
    values["stages"]["instruct"]["mixture"] = [
        {"source": "localize", "weight": 191_798},
        {"source": "llava", "weight": 80_000},
    ]
    return values


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "tiny": _tiny,
    "locvlm-b": _locvlm_b,
    "locvlm-b-plus-llava": lambda: _plus_llava_instruct("locvlm-b-plus-llava", _locvlm_b),
    "locvlm-l": _locvlm_l,
    "locvlm-l-plus-llava": lambda: _plus_llava_instruct("locvlm-l-plus-llava", _locvlm_l),
    "locvlm-vid-b": _locvlm_vid_b,
    "locvlm-vid-b-plus": _locvlm_vid_b_plus,
}


def preset(name: str, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """The named experiment with `a.b=c` overrides. Raises ConfigError for an unknown name or an illegal value."""
    if name not in PRESETS:
        raise ConfigError(f"looking up the preset {name!r}: it must be one of {', '.join(PRESETS)}")
    return resolve(copy.deepcopy(PRESETS[name]()), overrides)
