"""Model folders in the Hugging Face layout plus `locvlm.yaml`, the resolved config that made them.

Evaluation takes coordinates, geometry and prompts from the checkpoint, never from its own flags.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from locvlm.config import EvaluationConfig, ExperimentConfig, GeometryConfig, dump_config, load_config
from locvlm.errors import CheckpointError, ConfigError
from locvlm.model.generate import Request, answers
from locvlm.model.lora import LORA_FOLDER, merge_lora
from locvlm.model.sources import from_llava, from_parts, is_llava, read_tokenizer
from locvlm.model.tokenizer import TextEncoder
from locvlm.model.variants import LocVLM, architecture, new_model, reset_adapter
from locvlm.pixels import PIXEL_MEAN, PIXEL_STD
from locvlm.records import read_json

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
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
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
    """Open a LocVLM checkpoint in fp32, in eval mode, LoRA updates merged. Raises CheckpointError for a folder that is
    not a whole one."""
    folder = Path(path)
    doing = f"loading the model {folder}"
    if not folder.is_dir():
        raise CheckpointError(f"{doing}: there is no such folder; give the output folder of `locvlm train`")
    for name in (CONFIG_FILE, "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{doing}: {name} is missing, so this is not a whole LocVLM checkpoint")
    config = _config_of(folder, doing)
    try:
        model, notes = LocVLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{doing}: {error}; the folder may be cut short, train or copy it again") from None
    absent = sorted(notes["missing_keys"]) + sorted(notes["mismatched_keys"], key=str)
    if absent or notes["unexpected_keys"]:
        raise CheckpointError(
            f"{doing}: the weights do not fit the architecture: missing {absent[:5]}, "
            f"unexpected {sorted(notes['unexpected_keys'])[:5]}"
        )
    if (folder / LORA_FOLDER).is_dir():
        merge_lora(model, folder / LORA_FOLDER)
    elif (folder / "receipt.json").is_file() and read_json(folder / "receipt.json").get("lora"):
        raise CheckpointError(
            f"{doing}: it was trained with LoRA and its folder {LORA_FOLDER}/ is missing: what lies there is the model "
            "before; copy the whole folder again"
        )
    model.eval()
    tokenizer = read_tokenizer(folder)
    try:
        encoder = TextEncoder(tokenizer, config.model.vision.n_tokens)
    except CheckpointError as error:
        raise CheckpointError(f"{doing}: {error}") from None
    return LoadedModel(model, encoder, config, folder)


def start(config: ExperimentConfig, parent: Path | None) -> LoadedModel:
    """The model that a stage begins with, under the stage's own config.

    With `parent`: that checkpoint, ours or a LLaVA one. Without: the foundation of the config (vision tower and
    language model), or else its `model.vision.source` and `model.language.source`, behind a fresh adapter.
    Raises CheckpointError as `load` and `refuse_other_parent`.
    """
    if parent is not None:
        refuse_other_parent(parent, config)
        begun = load(parent) if (parent / CONFIG_FILE).is_file() else from_llava(parent, config)
        return _for_videos(LoadedModel(begun.model, begun.encoder, config, parent))
    if config.model.foundation == "":
        found = from_parts(config)
        return _for_videos(LoadedModel(found.model, found.encoder, config))
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
    return _for_videos(LoadedModel(model, foundation.encoder, config))


def refuse_other_parent(parent: Path, config: ExperimentConfig) -> None:
    """Raises CheckpointError when the parent is no model folder, or when its own config does not go with this one:
    another shape, geometry or prompts, or, where it has learned to write places, other coordinates. Reads no weights.
    """
    doing = f"continuing from {parent}"
    if not parent.is_dir():
        raise CheckpointError(f"{doing}: there is no such folder; give the output folder of `locvlm train`")
    if not (parent / CONFIG_FILE).is_file():
        if not is_llava(parent):
            raise CheckpointError(
                f"{doing}: {CONFIG_FILE} is missing and config.json names no LLaVA model; give the output folder of "
                "`locvlm train`, or a LLaVA checkpoint"
            )
        return
    theirs = _config_of(parent, doing).model_dump(mode="json")
    ours = config.model_dump(mode="json")
    for values in (theirs, ours):  # where weights came from and how they are trained is no part of the shape
        for place in (values["model"], values["model"]["vision"], values["model"]["language"]):
            for key in ("foundation", "source", "lora"):
                place.pop(key, None)
    receipt = parent / "receipt.json"
    knows_places = receipt.is_file() and read_json(receipt).get("stage") in ("instruct", "video")
    sections = ("model", "geometry", "prompts", *(("coordinates",) if knows_places else ()))
    faults = [line for name in sections for line in _differences(name, theirs[name], ours[name])]
    if faults:
        raise CheckpointError(
            f"{doing}: it was trained otherwise than this config trains\n" + "\n".join(faults) + "\n"
            f"use its own config (--config {parent / CONFIG_FILE}) or another checkpoint"
        )


def _config_of(folder: Path, doing: str) -> ExperimentConfig:
    try:
        return load_config(folder / CONFIG_FILE)
    except ConfigError as error:
        raise CheckpointError(
            f"{doing}: its {CONFIG_FILE} cannot be used ({error}); it may be cut short, train or copy it again"
        ) from None


def _differences(place: str, theirs: Any, ours: Any) -> list[str]:
    """One line for each value that two config sections disagree on."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [line for key in theirs for line in _differences(f"{place}.{key}", theirs[key], ours[key])]
    return [] if theirs == ours else [f"  {place}: checkpoint {theirs!r}, config {ours!r}"]


def _for_videos(loaded: LoadedModel) -> LoadedModel:
    """The model told how the config pools videos."""
    video = loaded.config.video
    if video is not None:
        loaded.model.config.video_token_order = video.token_order
        loaded.model.config.video_pad_to = video.n_frames if video.pad else 0
    return loaded


def fresh(config: ExperimentConfig, encoder: TextEncoder, seed: int) -> LocVLM:
    """A model of the config's shape with random weights and a fresh adapter."""
    shape = architecture(config.model, image_token_id=encoder.image_id, special_ids=encoder.special_ids)
    model = new_model(shape, seed)
    reset_adapter(model, seed)
    model.eval()
    return model
