"""Model folders in the Hugging Face layout plus `locvlm.yaml`, the resolved config that made them.

Evaluation takes coordinates, geometry and prompts from the checkpoint, never from its own flags.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from locvlm.config import EvaluationConfig, ExperimentConfig, GeometryConfig, dump_config, load_config
from locvlm.errors import CheckpointError, ConfigError
from locvlm.model.generate import Request, answers
from locvlm.model.tokenizer import TextEncoder
from locvlm.model.variants import LocVLM, architecture, new_model, reset_adapter
from locvlm.pixels import PIXEL_MEAN, PIXEL_STD

TINY_FOUNDATION = Path(__file__).resolve().parent.parent / "assets" / "tiny_foundation"
CONFIG_FILE = "locvlm.yaml"

transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with all that is needed to talk to it. `config` is the one it was trained with."""

    model: LocVLM
    encoder: TextEncoder
    config: ExperimentConfig
    path: Path | None = None

    def answers(self, requests: Sequence[Request], decoding: EvaluationConfig) -> list[str]:
        """One answer a request, in order; see `locvlm.model.generate.answers`."""
        return answers(self.model, self.encoder, self.config, requests, decoding)


def save(
    loaded: LoadedModel,
    folder: Path,
    dtype: torch.dtype | None = None,
    complete: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the checkpoint under its final name in one step; an existing folder of that name is replaced.

    `dtype`: store the weights in it; `complete` adds files to the folder before it gets its name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        state = loaded.model.state_dict()
        if dtype is not None:
            state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        loaded.model.save_pretrained(temporary, state_dict=state)
        loaded.encoder.tokenizer.save_pretrained(temporary)
        image_processor(loaded.config.geometry).save_pretrained(temporary)
        (temporary / CONFIG_FILE).write_text(dump_config(loaded.config), encoding="utf-8")
        complete(temporary)
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def image_processor(geometry: GeometryConfig) -> CLIPImageProcessorPil:
    """transformers' processor for the same pixels as `ImageGeometry` gives; letterbox is what it cannot express."""
    side = geometry.side
    square = {"height": side, "width": side}
    return CLIPImageProcessorPil(
        size={"shortest_edge": side} if geometry.kind == "crop" else square,
        do_center_crop=geometry.kind == "crop",
        crop_size=square,
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )


def load(path: Path | str) -> LoadedModel:
    """Open a LocVLM checkpoint in fp32, in eval mode. Raises CheckpointError for a folder that is not a whole one."""
    folder = Path(path)
    doing = f"loading the model {folder}"
    if not folder.is_dir():
        raise CheckpointError(f"{doing}: there is no such folder; give the output folder of `locvlm train`")
    for name in (CONFIG_FILE, "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{doing}: {name} is missing, so this is not a whole LocVLM checkpoint")
    try:
        config = load_config(folder / CONFIG_FILE)
    except ConfigError as error:
        raise CheckpointError(f"{doing}: {error}") from None
    try:
        model, notes = LocVLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{doing}: {error}; the folder may be cut short, train or copy it again") from None
    absent = sorted(notes["missing_keys"]) + sorted(notes["mismatched_keys"], key=str)
    if absent or notes["unexpected_keys"]:
        raise CheckpointError(
            f"{doing}: the weights do not fit the architecture: missing {absent[:5]}, "
            f"unexpected {sorted(notes['unexpected_keys'])[:5]}"
        )
    model.eval()
    return LoadedModel(model, TextEncoder(tokenizer, config.model.vision.n_tokens), config, folder)


def start(config: ExperimentConfig, parent: Path | None) -> LoadedModel:
    """The model that a stage begins with, under the stage's own config.

    With `parent`: that checkpoint. Without: the foundation of the config (vision tower and language model) behind a
    fresh adapter. Raises CheckpointError when the shapes or the coordinate text of the parent differ from the config.
    """
    if parent is not None:
        loaded = load(parent)
        for section in ("model", "geometry", "prompts"):
            ours, theirs = getattr(config, section), getattr(loaded.config, section)
            if ours != theirs:
                raise CheckpointError(
                    f"continuing from {parent}: its {section} section differs from the config's\n"
                    f"  checkpoint: {theirs}\n  config:     {ours}\nuse the checkpoint's config or another checkpoint"
                )
        return LoadedModel(loaded.model, loaded.encoder, config, parent)
    if config.model.foundation == "":
        raise CheckpointError(
            "starting a model: model.foundation is empty and no --model was given; give a checkpoint folder with "
            "--model, or set model.foundation to 'tiny' or to a folder"
        )
    folder = TINY_FOUNDATION if config.model.foundation == "tiny" else Path(config.model.foundation)
    foundation = load(folder)
    if (
        foundation.config.model.vision != config.model.vision
        or foundation.config.model.language != config.model.language
    ):
        raise CheckpointError(
            f"starting from the foundation {folder}: its vision or language shape differs from the config's\n"
            f"  foundation: {foundation.config.model}\n  config:     {config.model}"
        )
    model = fresh(config, foundation.encoder, config.seed)
    weights = {
        name: value
        for name, value in foundation.model.state_dict().items()
        if not name.startswith("model.multi_modal_projector.")
    }
    model.load_state_dict(weights, strict=False)
    return LoadedModel(model, foundation.encoder, config)


def fresh(config: ExperimentConfig, encoder: TextEncoder, seed: int) -> LocVLM:
    """A model of the config's shape with random weights and a fresh adapter."""
    specials = {"bos_token_id": encoder.bos_id, "eos_token_id": encoder.stop_id, "pad_token_id": encoder.pad_id}
    model = new_model(architecture(config.model, image_token_id=encoder.image_id, special_ids=specials), seed)
    reset_adapter(model, seed)
    model.eval()
    return model
