"""Vision tower -> adapter -> language model: variants, what each stage trains, generation, checkpoints."""

from locvlm.model.checkpoint import LoadedModel, load

__all__ = ["LoadedModel", "load"]
