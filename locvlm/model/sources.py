"""Where a new model's weights come from: CLIP and Llama folders, LLaVA checkpoints in both of their layouts, and those
of LLaVA's descendants that keep its layout (Shikra, Video-ChatGPT).

Every layout is renamed to one set of names, those of `LocVLM` in memory, and checked whole: a weight that is missing,
left over or of another shape is an error, never a random initialisation.
"""

import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
)

from locvlm.config import ExperimentConfig, LanguageConfig, ModelConfig, VisionConfig
from locvlm.errors import CheckpointError
from locvlm.model.tokenizer import TextEncoder
from locvlm.model.variants import LocVLM, LocVLMConfig, combine, empty_model, reset_adapter
from locvlm.prompts import IMAGE

Weights = dict[str, torch.Tensor]

_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_WANTED = ["*.json", "*.safetensors", "*.bin", "*.model"]

# first match wins; None: not a weight of ours
_VISION_NAMES: Sequence[tuple[str, str | None]] = (
    (r"(text_model|text_projection|visual_projection|logit_scale).*", None),
    (r".*position_ids", None),
    (r"(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
)
_LANGUAGE_NAMES: Sequence[tuple[str, str | None]] = (
    (r".*rotary_emb\.inv_freq", None),
    (r"lm_head\.(.+)", r"lm_head.\1"),
    (r"model\.(.+)", r"model.language_model.\1"),
)
_LLAVA_NAMES: Sequence[tuple[str, str | None]] = (
    (r".*(rotary_emb\.inv_freq|position_ids)", None),
    (r"(?:model\.)?(?:vision_tower\.)+(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"model.multi_modal_projector.\1"),
    (r"model\.mm_projector\.0\.(.+)", r"model.multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(.+)", r"model.multi_modal_projector.linear_2.\1"),
    (r"model\.mm_projector\.(weight|bias)", r"model.multi_modal_projector.linear.\1"),
    (r"(?:language_model\.)?lm_head\.(.+)", r"lm_head.\1"),
    (r"(?:model\.)?language_model\.(?:model\.)?(.+)", r"model.language_model.\1"),
    (r"model\.(.+)", r"model.language_model.\1"),
)
# Video-ChatGPT adds these to its parent's tokenizer, in this order, and publishes their rows with its projector in a
# file of its own
_VIDEO_CHATGPT_TOKENS = ("<vid_patch>", "<vid_start>", "<vid_end>")
_VIDEO_CHATGPT_FILES = "video_chatgpt*.bin"
_ADAPTERS: dict[str, Literal["linear", "mlp"]] = {"linear": "linear", "mlp2x_gelu": "mlp"}


@dataclass(frozen=True, slots=True)
class Assembled:
    """A model put together from other people's folders, with its text encoder."""

    model: LocVLM
    encoder: TextEncoder


def from_parts(config: ExperimentConfig) -> Assembled:
    """A new model: the vision tower of `model.vision.source`, the language model and tokenizer of
    `model.language.source` (local folders or hub ids), and a fresh adapter.

    The tokenizer gets `<image>` (its row is the mean of the others) and, where it has none, a pad token (the unk
    token). Raises CheckpointError for a folder that is not whole or whose shape differs from the config's.
    """
    vision_folder = find_folder(config.model.vision.source, "model.vision.source")
    language_folder = find_folder(config.model.language.source, "model.language.source")
    vision, text = _vision_config(vision_folder), _text_config(language_folder)
    weights = _renamed(vision_folder, _VISION_NAMES) | _renamed(language_folder, _LANGUAGE_NAMES)
    if text.tie_word_embeddings and "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    found = f"{vision_folder} + {language_folder}"
    tokenizer = read_tokenizer(language_folder)
    kind = config.model.adapter
    assembled = _assemble(found, config.model, vision, text, kind, weights, tokenizer, adapter=False)
    reset_adapter(assembled.model, config.seed)
    return assembled


def is_llava(folder: Path) -> bool:
    """Whether the folder is a LLaVA checkpoint, in the layout of llava-hf or in LLaVA's own."""
    values = _config_values(folder)
    return values.get("model_type") in ("llava", "llava_llama") or "mm_vision_tower" in values


def is_own_layout(folder: Path) -> bool:
    """Whether the folder is in LLaVA's own layout, not in that of llava-hf: the vision tower lies elsewhere."""
    return "mm_vision_tower" in _config_values(folder)


def is_video_chatgpt(folder: Path) -> bool:
    """Whether the folder is Video-ChatGPT: saved whole, or its published projector laid into the folder of its parent
    LLaVA."""
    return _config_values(folder).get("model_type") == "VideoChatGPT" or any(folder.glob(_VIDEO_CHATGPT_FILES))


def from_llava(folder: Path, config: ExperimentConfig) -> Assembled:
    """The model of a LLaVA checkpoint, adapter included: the llava-hf layout, or the original one, whose vision tower
    lies elsewhere (`mm_vision_tower`; `model.vision.source` of the config stands in for it).

    Raises CheckpointError for a folder that is not whole, whose shape or adapter differs from the config's, or that was
    trained on other features of the tower or with marks around the image.
    """
    values = _config_values(folder)
    layer = _feature_layer(folder, values)
    if layer != config.model.vision.feature_layer:
        raise CheckpointError(
            f"loading the LLaVA checkpoint {folder}: its adapter reads layer {layer} of the vision tower, the config's "
            f"layer {config.model.vision.feature_layer}; set model.vision.feature_layer={layer}"
        )
    if values.get("mm_use_im_start_end"):
        raise CheckpointError(
            f"loading the LLaVA checkpoint {folder}: it was trained with marks around the image (mm_use_im_start_end), "
            "which our template does not write; needed is one without, as LLaVA-1.5 is"
        )
    return _from_llava(folder, config.model)


def _feature_layer(folder: Path, values: Mapping[str, Any]) -> int:
    """The layer of the tower that the adapter reads. Raises CheckpointError when it also reads the class token."""
    kept = values.get("mm_vision_select_feature", values.get("vision_feature_select_strategy", "default"))
    if kept not in ("patch", "default"):
        raise CheckpointError(
            f"loading the LLaVA checkpoint {folder}: it keeps the class token ({kept!r}); needed is one that drops it "
            "(mm_vision_select_feature patch, vision_feature_select_strategy default)"
        )
    return int(values.get("mm_vision_select_layer", values.get("vision_feature_layer", -2)))


def open_llava(folder: Path) -> tuple[Assembled, ModelConfig]:
    """The model of a LLaVA checkpoint as it is, and its shape. Raises CheckpointError for a folder that is not whole or
    whose parts are not those of LLaVA."""
    shape = llava_shape(folder)
    return _from_llava(folder, shape), shape


def llava_shape(folder: Path) -> ModelConfig:
    """The model section of a config that fits a LLaVA checkpoint, from its config.json and that of its vision tower.
    Raises CheckpointError when they are no LLaVA's."""
    values = _config_values(folder)
    try:
        vision, text, kind, tower = _llava_parts(folder, values, "")
    except StrictDataclassError as fault:
        raise _impossible(folder, fault) from None
    layer = _feature_layer(folder, values)
    try:
        return ModelConfig(
            adapter=kind,
            vision=VisionConfig(
                source="" if tower is None else str(tower),
                image_side=vision.image_size,
                patch_size=vision.patch_size,
                hidden_size=vision.hidden_size,
                n_layers=vision.num_hidden_layers,
                n_heads=vision.num_attention_heads,
                ffn_size=vision.intermediate_size,
                feature_layer=layer,
            ),
            language=LanguageConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.hidden_size,
                n_layers=text.num_hidden_layers,
                n_heads=text.num_attention_heads,
                ffn_size=text.intermediate_size,
                max_length=text.max_position_embeddings,
            ),
        )
    except ValidationError as fault:
        raise _impossible(folder, fault) from None


def _impossible(folder: Path, fault: Exception) -> CheckpointError:
    reason = " ".join(str(fault).split())
    return CheckpointError(
        f"loading the LLaVA checkpoint {folder}: its config.json has an impossible shape ({reason}); copy it again"
    )


def _from_llava(folder: Path, shape: ModelConfig) -> Assembled:
    values = _config_values(folder)
    weights = _renamed(folder, _LLAVA_NAMES)
    tokenizer = read_tokenizer(folder)
    if is_video_chatgpt(folder):
        weights |= _video_chatgpt_weights(folder)
        # those that are there already keep their ids
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(_VIDEO_CHATGPT_TOKENS)}, replace_extra_special_tokens=False
        )
    vision, text, kind, tower = _llava_parts(folder, values, shape.vision.source)
    if tower is not None and not any(name.startswith("model.vision_tower.") for name in weights):
        weights |= _renamed(tower, _VISION_NAMES)
    return _assemble(str(folder), shape, vision, text, kind, weights, tokenizer, adapter=True)


def _llava_parts(
    folder: Path, values: Mapping[str, Any], source: str
) -> tuple[CLIPVisionConfig, LlamaConfig, Literal["linear", "mlp"], Path | None]:
    """Vision tower, language model, adapter and, in LLaVA's own layout, the folder of the tower: `source`, or what the
    config.json names, relative to the checkpoint's folder or not."""
    if "mm_vision_tower" not in values:
        if values.get("projector_hidden_act", "gelu") != "gelu":
            raise CheckpointError(
                f"loading the LLaVA checkpoint {folder}: between the layers of its projector is "
                f"{values['projector_hidden_act']!r}; needed is 'gelu'"
            )
        return CLIPVisionConfig(**values["vision_config"]), LlamaConfig(**values["text_config"]), "mlp", None
    named = source or str(values["mm_vision_tower"])
    tower = folder / named if (folder / named).is_dir() else find_folder(named, "model.vision.source")
    text = LlamaConfig(**{key: value for key, value in values.items() if not key.startswith("mm_")})
    return _vision_config(tower), text, _adapter(folder, values), tower


def _adapter(folder: Path, values: Mapping[str, Any]) -> Literal["linear", "mlp"]:
    name = str(values.get("mm_projector_type", "linear"))
    if name not in _ADAPTERS:
        raise CheckpointError(
            f"loading the LLaVA checkpoint {folder}: its projector is {name!r}; needed is {' or '.join(_ADAPTERS)}"
        )
    return _ADAPTERS[name]


def _video_chatgpt_weights(folder: Path) -> Weights:
    """What the published file of Video-ChatGPT lays over its parent; nothing for a folder that was saved whole."""
    weights: Weights = {}
    for file in sorted(folder.glob(_VIDEO_CHATGPT_FILES)):
        for name, value in _read_weights(file):
            ours = _rename(name, _LLAVA_NAMES)
            if ours is not None:
                weights[ours] = value
    return weights


def find_folder(source: str, setting: str) -> Path:
    """The local folder of a source; a hub id is downloaded (or found in the cache). Raises CheckpointError."""
    if not source:
        raise CheckpointError(
            f"starting a model: {setting} is empty; give a folder or hub id in the Hugging Face layout, a checkpoint "
            "with --model, or set model.foundation to 'tiny' or to a folder"
        )
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=_WANTED))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"looking for {setting} {source!r}: there is no such folder here, and the hub does not give it ({reason}); "
            "set it to a local folder, or make the hub reachable (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE=0)"
        ) from None


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder. Raises CheckpointError when its files are missing or broken."""
    doing = f"reading the tokenizer of {folder}"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{doing}: neither tokenizer.json nor tokenizer.model is there; copy the whole folder")
    if (folder / "tokenizer.json").is_file():  # the library raises a bare Exception for one that is cut short
        try:
            json.loads((folder / "tokenizer.json").read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{doing}: tokenizer.json cannot be read ({error}); copy it again") from None
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
        else:
            tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=_is_legacy(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{doing}: {error}; copy or download it again") from None
    if not tokenizer.is_fast:
        raise CheckpointError(f"{doing}: it has no fast form, which the training labels need; convert it first")
    if tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) < len(tokenizer.all_special_tokens):
        raise CheckpointError(f"{doing}: its vocabulary is empty, so a file is cut short; copy or download it again")
    return tokenizer


def _is_legacy(folder: Path) -> bool:
    """Whether a sentencepiece tokenizer puts a space behind each special token too, as LLaMA's first ones do. Where
    nothing is said it does: so it was when those models were trained; transformers 5 would take the opposite."""
    settings = folder / "tokenizer_config.json"
    said = json.loads(settings.read_bytes()).get("legacy") if settings.is_file() else None
    return said is not False


def _assemble(
    found: str,
    shape: ModelConfig,
    vision: CLIPVisionConfig,
    text: LlamaConfig,
    kind: str,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter: bool,
) -> Assembled:
    _refuse_other_shape(found, shape, vision, text, kind)
    if tokenizer.pad_token is None and tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token  # LLaMA has no pad token
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    encoder = TextEncoder(tokenizer, shape.vision.n_tokens)
    tables = [name for name in ("model.language_model.embed_tokens.weight", "lm_head.weight") if name in weights]
    text.vocab_size = max([len(tokenizer), *(len(weights[name]) for name in tables)])
    for name in tables:
        weights[name] = _with_rows(weights[name], text.vocab_size)
    architecture = combine(vision, text, kind, shape.vision.feature_layer, encoder.image_id, encoder.special_ids)
    return Assembled(_filled(found, architecture, weights, adapter=adapter), encoder)


def _filled(found: str, architecture: LocVLMConfig, weights: Weights, *, adapter: bool) -> LocVLM:
    model = empty_model(architecture)
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if not adapter:
        ours = {name: shape for name, shape in ours.items() if not name.startswith("model.multi_modal_projector.")}
    missing = sorted(ours.keys() - weights.keys())
    unknown = sorted(weights.keys() - ours.keys())
    other = sorted(name for name in ours.keys() & weights.keys() if ours[name] != tuple(weights[name].shape))
    if missing or unknown or other:
        raise CheckpointError(
            f"loading {found}: the weights do not fit the architecture: missing {missing[:3]} ({len(missing)}), "
            f"unexpected {unknown[:3]} ({len(unknown)}), of another shape {other[:3]} ({len(other)}); the folder is "
            "cut short or is another model"
        )
    model.load_state_dict({name: weights[name].float() for name in ours}, strict=False, assign=True)
    model.eval()
    return model


def _refuse_other_shape(
    found: str, config: ModelConfig, vision: CLIPVisionConfig, text: LlamaConfig, kind: str
) -> None:
    pairs = {
        "vision.image_side": (config.vision.image_side, vision.image_size),
        "vision.patch_size": (config.vision.patch_size, vision.patch_size),
        "vision.hidden_size": (config.vision.hidden_size, vision.hidden_size),
        "vision.n_layers": (config.vision.n_layers, vision.num_hidden_layers),
        "vision.n_heads": (config.vision.n_heads, vision.num_attention_heads),
        "vision.ffn_size": (config.vision.ffn_size, vision.intermediate_size),
        "language.hidden_size": (config.language.hidden_size, text.hidden_size),
        "language.n_layers": (config.language.n_layers, text.num_hidden_layers),
        "language.n_heads": (config.language.n_heads, text.num_attention_heads),
        "language.ffn_size": (config.language.ffn_size, text.intermediate_size),
        "adapter": (config.adapter, kind),
    }
    faults = [f"model.{name} is {ours}, there {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if config.language.max_length > text.max_position_embeddings:
        faults.append(
            f"model.language.max_length is {config.language.max_length}, the language model has "
            f"{text.max_position_embeddings} positions"
        )
    if faults:
        raise CheckpointError(
            f"loading {found}: its shape differs from the config's: {'; '.join(faults)}; use another preset or folder"
        )


def _with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """[old, width] -> [max(old, rows), width]; new rows are the mean of the old ones."""
    if len(table) >= rows:
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def _config_values(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"loading {folder}: config.json is missing, so it is no model folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"loading {folder}: config.json cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"loading {folder}: config.json is not an object")
    return values


def _vision_config(folder: Path) -> CLIPVisionConfig:
    values = _config_values(folder)
    if values.get("model_type") not in ("clip", "clip_vision_model"):
        raise CheckpointError(
            f"loading the vision tower {folder}: its model_type is {values.get('model_type')!r}; needed is a CLIP model"
        )
    return CLIPVisionConfig.from_pretrained(folder)


def _text_config(folder: Path) -> LlamaConfig:
    values = _config_values(folder)
    if values.get("model_type") != "llama":
        raise CheckpointError(
            f"loading the language model {folder}: its model_type is {values.get('model_type')!r}; needed is llama"
        )
    return AutoConfig.from_pretrained(folder)


def _renamed(folder: Path, rules: Sequence[tuple[str, str | None]]) -> Weights:
    """All weights of a folder under the names of `LocVLM`."""
    weights: Weights = {}
    for name, value in _stored(folder):
        ours = _rename(name, rules)
        if ours is not None:
            weights[ours] = value
    return weights


def _rename(name: str, rules: Sequence[tuple[str, str | None]]) -> str | None:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return None if replacement is None else match.expand(replacement)
    return name


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight file of a folder, safetensors before pickles."""
    for file in _weight_files(folder):
        yield from _read_weights(file)


def _read_weights(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a weight file; tensors stay on disk till used. Raises CheckpointError."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    yield name, tensors.get_tensor(name)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"loading {file}: it cannot be read ({reason}); it may be cut short, copy or download it again"
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    for name in _INDEX:
        if (folder / name).is_file():
            listed: Mapping[str, str] = json.loads((folder / name).read_text())["weight_map"]
            files = [folder / part for part in sorted(set(listed.values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                raise CheckpointError(f"loading {folder}: {', '.join(absent)} of {name} is missing; copy it again")
            return files
    for name in _SINGLE:
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(f"loading {folder}: there are no weights; needed is one of {', '.join(_SINGLE + _INDEX)}")
