"""What each stage trains: decided here and nowhere else (paper, section 4: stage 1 the adapter, stage 2 also the LLM).

The vision tower is frozen in every stage.
"""

import logging
from collections.abc import Sequence

from torch import nn

from locvlm.config import LoraConfig
from locvlm.model.lora import add_lora, is_lora
from locvlm.model.variants import LocVLM, count_parameters

log = logging.getLogger(__name__)


def parts(model: LocVLM) -> dict[str, list[nn.Module]]:
    """The three parts of the model; the language model includes its output head."""
    return {
        "vision": [model.model.vision_tower],
        "adapter": [model.adapter],
        "language": [model.model.language_model, model.lm_head],
    }


def set_trainable(model: LocVLM, trainable: Sequence[str], lora: LoraConfig | None = None, seed: int = 0) -> None:
    """Freeze everything but the named parts; frozen parts also go to eval mode.

    With `lora` a language model that trains gets low-rank updates, drawn by `seed`, and they alone train of it.
    """
    updates = lora if "language" in trainable else None
    if updates is not None:
        add_lora(model, updates, seed)
    for name, modules in parts(model).items():
        for module in modules:
            module.requires_grad_(name in trainable and not (name == "language" and updates is not None))
            module.train(name in trainable)
    for name, parameter in model.named_parameters():
        if is_lora(name):
            parameter.requires_grad_(True)
    log.info(
        "training %s%s: %s of %s parameters",
        " + ".join(trainable),
        " (LoRA)" if updates is not None else "",
        f"{count_parameters(model, trainable_only=True):,}",
        f"{count_parameters(model):,}",
    )
