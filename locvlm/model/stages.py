"""What each stage trains: decided here and nowhere else (paper, section 4: stage 1 the adapter, stage 2 also the LLM).

The vision tower is frozen in every stage.
"""

import logging
from collections.abc import Sequence

from torch import nn

from locvlm.model.variants import LocVLM, count_parameters

log = logging.getLogger(__name__)


def parts(model: LocVLM) -> dict[str, list[nn.Module]]:
    """The three parts of the model; the language model includes its output head."""
    return {
        "vision": [model.model.vision_tower],
        "adapter": [model.adapter],
        "language": [model.model.language_model, model.lm_head],
    }


def set_trainable(model: LocVLM, trainable: Sequence[str]) -> None:
    """Freeze everything but the named parts; frozen parts also go to eval mode."""
    for name, modules in parts(model).items():
        for module in modules:
            module.requires_grad_(name in trainable)
            module.train(name in trainable)
    log.info(
        "training %s: %s of %s parameters",
        " + ".join(trainable),
        f"{count_parameters(model, trainable_only=True):,}",
        f"{count_parameters(model):,}",
    )
