"""The tiny real thing that tests use: drawn scenes, their data sets, an untrained foundation of the real classes."""

import json
from dataclasses import dataclass
from pathlib import Path

from locvlm.config import ExperimentConfig, InstructConfig
from locvlm.data.coco import read_instances
from locvlm.data.conversations import write_conversations
from locvlm.data.generic import build_generic
from locvlm.data.instruct import build_localize_instruct
from locvlm.data.scenes import draw_scenes
from locvlm.model.checkpoint import LoadedModel, fresh, save
from locvlm.model.tokenizer import TextEncoder, word_tokenizer
from locvlm.presets import preset

SMALL = (
    "model.vision.hidden_size=32",
    "model.vision.n_layers=2",
    "model.vision.n_heads=2",
    "model.vision.ffn_size=48",
    "model.language.hidden_size=32",
    "model.language.n_layers=2",
    "model.language.n_heads=2",
    "model.language.ffn_size=48",
    "model.language.vocab_size=512",
    "stages.align.precision=fp32",
    "stages.instruct.precision=fp32",
)


@dataclass(frozen=True)
class World:
    """`config` starts from `foundation`; `data` are sources for --data."""

    config: ExperimentConfig
    foundation: Path
    images: Path
    data: dict[str, Path]


def build_world(folder: Path, *overrides: str) -> World:
    """40 scenes, their generic and Localize-Instruct sets, and a model folder of a few ten thousand parameters."""
    draw_scenes(folder / "scenes", seed=5, n_train=40, n_test=8)
    instances = read_instances(folder / "scenes" / "instances_train.json")
    data = {"generic": folder / "generic", "localize": folder / "localize"}
    for path in data.values():
        path.mkdir()
    write_conversations(data["generic"], build_generic(instances, None, 0, stated_bins=48))
    built = build_localize_instruct(instances, InstructConfig(grouping="qa"), 0, None)
    write_conversations(data["localize"], getattr(built, "conversations", built))
    foundation = folder / "foundation"
    base = preset("tiny", [*SMALL, f"model.foundation={json.dumps(str(foundation))}", *overrides])
    text = (data["generic"] / "conversations.arrow").read_bytes().decode("ascii", "ignore")
    encoder = TextEncoder(word_tokenizer([text[:20000]]), base.model.vision.n_tokens)
    assert len(encoder.tokenizer) <= base.model.language.vocab_size
    save(LoadedModel(fresh(base, encoder, 0), encoder, base), foundation)
    return World(base, foundation, folder / "scenes" / "images", data)
