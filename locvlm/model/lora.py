"""LoRA and QLoRA through peft: low-rank updates beside the frozen linear layers of the language model.

A folder of weights that were trained so holds the base weights as they were and, under `lora/`, the updates in peft's
own format; `locvlm.model.load` merges them. peft is imported here only.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from locvlm.config import LoraConfig
from locvlm.errors import CheckpointError, ConfigError
from locvlm.model.variants import LocVLM

LORA_FOLDER = "lora"

_MARK = ".lora_"
_ADAPTER = ".default"  # peft's name of the one set of updates, in the names of a model that carries it
_PREFIX = "base_model.model."  # peft's, in the names of a file


def check_lora(lora: LoraConfig) -> None:
    """Raises ConfigError when a package that the section needs is not installed."""
    needed = {"peft": "the extra `lora` of this package"}
    if lora.base == "4bit":
        needed["bitsandbytes"] = "bitsandbytes, which runs on a GPU; or set model.lora.base to full"
    for name, remedy in needed.items():
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training with model.lora (base {lora.base}): the package {name} is not installed; install {remedy}"
            )


def add_lora(model: LocVLM, lora: LoraConfig, seed: int) -> None:
    """Put updates beside the linear layers that `lora` names, in place; they alone are trainable then.

    The model computes what it did before (one of the two factors begins at zero). The same seed gives the same start;
    the global random state is left as it was. Raises ConfigError as `check_lora`.
    """
    check_lora(lora)
    from peft import inject_adapter_in_model

    if lora.base == "4bit":
        _quantize(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(lora), model)


def is_lora(name: str) -> bool:
    """Whether the weight of that name is an update."""
    return _MARK in name


def write_lora(folder: Path, lora: LoraConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Write updates, named as in the model that carries them, in peft's format."""
    folder.mkdir()
    config = _peft_config(lora)
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {_PREFIX + name.replace(_ADAPTER, ""): value.contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merge_lora(model: LocVLM, folder: Path) -> None:
    """Add the updates of a folder in peft's format into the weights, in place. Raises CheckpointError."""
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            f"merging {folder}: the package peft is not installed; install the extra `lora` of this package"
        )
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        stored = load_peft_weights(str(folder), device="cpu").keys()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of is an error below
            carrier = PeftModel.from_pretrained(model, folder)
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"merging {folder}: {error}; the folder may be cut short, copy it again") from None
    wanted = get_peft_model_state_dict(carrier).keys()
    if stored != wanted:
        raise CheckpointError(
            f"merging {folder}: its updates do not fit the model: missing {sorted(wanted - stored)[:3]}, unexpected "
            f"{sorted(stored - wanted)[:3]}; copy the folder again"
        )
    carrier.merge_and_unload()
    model.requires_grad_(True)


def _peft_config(lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # a pattern, since the vision tower has layers of the same names
        target_modules=rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(lora.targets)})",
        bias="none",
    )


def _quantize(model: LocVLM) -> None:
    """The linear layers of the decoder as 4-bit NormalFloat with double quantization (QLoRA); bitsandbytes packs the
    weights when they move to their device."""
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    kind = {"compress_statistics": True, "quant_type": "nf4"}
    for module in list(model.model.language_model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                packed = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, torch.bfloat16, **kind
                )
                packed.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, **kind)
                packed.bias = child.bias
                setattr(module, name, packed)
    model.is_loaded_in_4bit = True  # what peft asks
