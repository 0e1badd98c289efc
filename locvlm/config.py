"""Every configuration section: what a value means and which values are legal. Numbers live in presets.py.

Sections are frozen. Unknown keys are refused with the closest legal names; all faults are reported together.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from locvlm.errors import ConfigError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CoordinateConfig(Section):
    """How a place is written in text (paper, section 3.2)."""

    representation: Literal["ivb", "nfp", "diga", "patches"] = Field(
        "ivb", description="patches: the location tokens of Kosmos-2, which our own models do not have"
    )
    n_bins: int = Field(
        224, ge=2, le=10_000, description="bins an axis (IVB, DIGA; labels 0..n_bins are grid lines); patches: a side"
    )
    decimals: int = Field(4, ge=1, le=6, description="of a fraction (NFP); the paper's 4, Shikra's 3, LLaVA-1.5's 2")
    patch: int = Field(14, ge=1, description="side of a DIGA anchor in bins; n_bins must be a multiple")
    location: Literal["bbox", "point"] = "bbox"
    diga_sign: Literal["signed", "unsigned_paper"] = "signed"
    brackets: Literal["()", "[]"] = "()"
    separator: Literal[",", ", "] = ","

    @model_validator(mode="after")
    def _anchors_fit(self) -> Self:
        if self.representation == "diga" and self.n_bins % self.patch:
            raise ValueError(f"n_bins {self.n_bins} is not a multiple of patch {self.patch}, which DIGA needs")
        return self


class GeometryConfig(Section):
    """How an image becomes the square that the vision tower sees; boxes follow the same map."""

    kind: Literal["squash", "letterbox", "letterbox_white", "crop"] = "squash"
    side: int = Field(224, ge=8, le=4096, description="side of the network's input in pixels")


class PromptConfig(Section):
    """The words around the templates."""

    system: str = SYSTEM
    clean_templates: bool = Field(False, description="mend the typos of the paper's templates")
    video_word: Literal["image", "video"] = Field("image", description="what the templates call a video")
    answer_convention: Literal["natural", "icl_example"] = "natural"


class InstructConfig(Section):
    """How Localize-Instruct conversations are put together."""

    grouping: Literal["conversation", "qa"] = Field(
        "conversation", description="one multi-turn conversation an image and objective, or one a question"
    )
    neg_per_image: int = Field(1, ge=0, description="NegPred turns an image")
    crowd: Literal["counts", "ignored", "singleton_ok", "ignored_singleton_ok"] = Field(
        "counts",
        description="counts: a crowd annotation counts as an instance and is never used; ignored: it does not count; "
        "..singleton_ok: a lone crowd annotation is usable",
    )


class VisionConfig(Section):
    """The vision tower: a CLIP vision transformer."""

    source: str = Field("", description="local folder or hub id; empty: from the foundation or from scratch")
    image_side: int = Field(224, ge=8)
    patch_size: int = Field(14, ge=1)
    hidden_size: int = Field(1024, ge=8)
    n_layers: int = Field(24, ge=2)
    n_heads: int = Field(16, ge=1)
    ffn_size: int = Field(4096, ge=8)
    feature_layer: int = Field(-2, description="hidden state that feeds the adapter; -2 = the last block but one")

    @property
    def n_tokens(self) -> int:
        """Visual tokens an image, class token dropped."""
        return (self.image_side // self.patch_size) ** 2

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if self.image_side % self.patch_size:
            raise ValueError(f"image_side {self.image_side} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of n_heads {self.n_heads}")
        return self


class LanguageConfig(Section):
    """The language model: a Llama decoder."""

    source: str = Field("", description="local folder or hub id; empty: from the foundation or from scratch")
    vocab_size: int = Field(32_000, ge=16)
    hidden_size: int = Field(4096, ge=8)
    n_layers: int = Field(32, ge=1)
    n_heads: int = Field(32, ge=1)
    ffn_size: int = Field(11_008, ge=8)
    max_length: int = Field(2048, ge=16, description="tokens of one conversation after image expansion")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of n_heads {self.n_heads}")
        return self


class LoraConfig(Section):
    """Low-rank updates beside frozen linear layers of the language model, in the stages that train it. The defaults are
    LLaVA's recipe; with it go a learning rate of 2e-4 and, for the adapter, of 2e-5."""

    rank: int = Field(128, ge=1)
    alpha: float = Field(256, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    base: Literal["full", "4bit"] = Field(
        "full", description="4bit: the frozen layers as NF4 while training (QLoRA; needs bitsandbytes)"
    )


class ModelConfig(Section):
    """Vision tower -> adapter -> language model."""

    foundation: str = Field("", description="'tiny' (shipped with the package), a folder, or empty")
    adapter: Literal["linear", "mlp"] = "linear"
    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    lora: LoraConfig | None = Field(None, description="null: the language model trains whole")


class MixtureEntry(Section):
    """One share of a training mixture: conversations of `source` (a name given with --data name=path), only those of
    `objective` if it is not empty, drawn with `weight`."""

    source: str
    objective: str = ""
    weight: float = Field(1.0, gt=0)


class StageConfig(Section):
    """One training stage. Exactly one of `epochs` and `steps` is set."""

    trainable: tuple[Literal["adapter", "language"], ...] = ("adapter",)
    format: Literal["plain", "chat"] = Field("chat", description="plain: '<image>caption\\n'; chat: USER/ASSISTANT")
    mixture: tuple[MixtureEntry, ...] = Field((), description="empty: all conversations of all sources alike")
    learning_rate: float = Field(2e-5, gt=0)
    adapter_learning_rate: float | None = Field(None, gt=0, description="the adapter's own; null: as the rest")
    global_batch: int = Field(64, ge=1, description="samples a step, all workers and accumulation together")
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    schedule: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = Field(1.0, gt=0)
    conversations_per_image: int = Field(
        0, ge=0, description="0: a sample is one conversation; k: an image with k conversations behind one image prefix"
    )
    group_by_length: bool = Field(
        False, description="conversations of like length in one batch (with conversations_per_image 0): less padding"
    )
    precision: Literal["fp32", "bf16"] = "bf16"

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"set one of epochs ({self.epochs}) and steps ({self.steps}), and only one")
        return self


class VideoConfig(Section):
    """Frames and pooling of the video stage (paper, section 3.4)."""

    n_frames: int = Field(100, ge=1)
    token_order: Literal["temporal_spatial", "spatial_temporal"] = "temporal_spatial"
    frame_sampling: Literal["vcgpt", "segment_centre"] = "vcgpt"
    short_videos: Literal["fewer", "repeat"] = Field(
        "fewer", description="a video with about as few frames as n_frames: every frame once, or as frame_sampling says"
    )
    pad: bool = Field(False, description="zero rows for missing temporal tokens, so that all videos have as many")


class StagesConfig(Section):
    """The three stages; `video` is None for an image model."""

    align: StageConfig
    instruct: StageConfig
    video: StageConfig | None = None


class ClusterConfig(Section):
    """How a stage is spread over machines."""

    num_workers: int = Field(8, ge=0, description="Ray Train workers; 0: train in this process, without Ray")
    min_workers: int = Field(
        0, ge=0, description="0: always num_workers; else the run is elastic: it goes on with any number from here up"
    )
    cpus_per_worker: float = Field(8, gt=0)
    max_failures: int = Field(2, ge=0, description="restarts of the worker group before the stage fails")
    checkpoint_every: int = Field(500, ge=1, description="steps")
    log_every: int = Field(10, ge=1, description="steps")
    validate_every: int = Field(500, ge=1, description="steps between looks at the held-out data, where it is given")
    validate_samples: int = Field(256, ge=1, description="conversations of each held-out set whose loss is measured")
    validate_questions: int = Field(64, ge=0, description="questions of each kind and held-out set that are asked")
    keep_best: Literal["last", "loss", "loc_iou", "loc_acc50", "neg_accuracy", "spatial_accuracy"] = Field(
        "last", description="the weights that become the output: the final ones, or the best by a validation figure"
    )
    engine: Literal["ddp", "zero1", "zero2", "zero3"] = Field(
        "ddp",
        description="plain DistributedDataParallel, or DeepSpeed: ZeRO spreads optimizer states (1), gradients "
        "(2) and weights (3) over the workers",
    )
    offload: bool = Field(False, description="ZeRO: optimizer states in the memory of the host")
    micro_batch: int = Field(
        0, ge=0, description="samples a forward pass and worker (0: all at once); accumulation follows from it"
    )
    loader_threads: int = Field(4, ge=0, description="threads a worker that make samples ahead; 0: none")
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="kernel of packed samples: flex (GPU only) skips what the block mask hides; auto: flex on GPUs",
    )
    recompute: bool = Field(False, description="activation checkpointing: less memory, a third more work")

    @model_validator(mode="after")
    def _workers_agree(self) -> Self:
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        if self.offload and self.engine == "ddp":
            raise ValueError("offload needs a ZeRO engine; set engine to zero1, zero2 or zero3")
        return self


class EvaluationConfig(Section):
    """Decoding (paper, section 4: T = 0.2, the full distribution)."""

    temperature: float = Field(0.2, ge=0, description="0: greedy")
    max_new_tokens: int = Field(128, ge=1)
    batch_size: int = Field(32, ge=1)
    seed: int = 0


class FamilyConfig(Section):
    """How a model is asked that was not trained here; it lies beside the answers. `{}` parts of the templates are
    filled in, `<image>` is where the image goes.

    A prompt that begins as `loc_pred` or `rev_loc` do is whole; any other becomes a turn by `question`.
    """

    family: str = Field(description="llava-v1.5, shikra, blip-2, ...; else the model_type of its config.json")
    layout: str = Field("{turn}", description="the text around the user's {turn}")
    question: str = Field("<image>\n{question}", description="a turn that asks a {question}")
    short_question: str = Field("", description="the same where a short answer is wanted; empty: `question`")
    loc_pred: str = Field("", description="a turn that asks for the place of {description}; empty: the paper's words")
    rev_loc: str = Field("", description="a turn that asks what is at {loc}; empty: the paper's words")
    coordinates: CoordinateConfig | None = Field(None, description="how it writes places; None: nothing says so")
    geometry: GeometryConfig | None = Field(None, description="None: the pixels are made otherwise, see `pixels`")
    pixels: str = Field("", description="what prepares its images where `geometry` does not say it")
    video: VideoConfig | None = Field(None, description="how it takes videos; None: images only")
    prompts: PromptConfig = PromptConfig(system="")
    evaluation: EvaluationConfig = EvaluationConfig()


class GateConfig(Section):
    """What a model must show before it becomes champion: every gated figure lies above its floor, and the low end of
    the interval of `primary`'s difference to the champion at -`tolerance` or above (0: as good at least; an identical
    model holds). Figures are written `task/figure`."""

    primary: str = "coco-spatial/accuracy"
    must_beat_floor: tuple[str, ...] = ()
    tolerance: float = Field(0.0, ge=0)


class ExperimentConfig(Section):
    """A whole run, resolved before anything expensive happens and saved beside every output."""

    name: str
    seed: int = 0
    coordinates: CoordinateConfig = CoordinateConfig()
    geometry: GeometryConfig = GeometryConfig()
    prompts: PromptConfig = PromptConfig()
    instruct: InstructConfig = InstructConfig()
    model: ModelConfig = ModelConfig()
    stages: StagesConfig
    video: VideoConfig | None = None
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        faults = []
        if self.geometry.side != self.model.vision.image_side:
            faults.append(
                f"geometry.side {self.geometry.side} differs from model.vision.image_side "
                f"{self.model.vision.image_side}; set both"
            )
        lora = self.model.lora
        if lora is not None and lora.base == "4bit" and self.cluster.engine != "ddp":
            faults.append(
                f"model.lora.base is 4bit, which cluster.engine {self.cluster.engine} cannot spread; set "
                "cluster.engine to ddp or model.lora.base to full"
            )
        if (self.stages.video is None) != (self.video is None):
            faults.append("stages.video and video belong together: set both or none")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def fingerprint(self) -> str:
        """Short hash of every value; equal configs have equal fingerprints."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]


def resolve(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Build a config from nested values and `a.b=c` overrides. Raises ConfigError that lists every fault."""
    merged = json.loads(json.dumps(values))
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            faults.append(f"--set {override!r}: the form is key.subkey=value")
            continue
        try:
            value = _parse_scalar(text)
        except yaml.YAMLError:
            faults.append(f"--set {override!r}: the value is not valid YAML")
            continue
        _set_path(merged, key.strip().split("."), value, faults)
    config = _validate(merged, faults)
    if faults or config is None:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(f"resolving the configuration: {len(faults)} fault(s)\n{lines}")
    return config


def _validate(values: dict[str, Any], faults: list[str]) -> ExperimentConfig | None:
    """The config, or None with every fault added.

    pydantic checks how values agree only where each is legal by itself: take unknown keys out and look again.
    """
    try:
        return ExperimentConfig.model_validate(values)
    except ValidationError as error:
        found = error.errors()
    described = [_describe(fault) for fault in found]
    faults.extend(text for text in described if text not in faults)
    unknown = [fault["loc"] for fault in found if fault["type"] == "extra_forbidden"]
    rest = json.loads(json.dumps(values))
    if [_remove(rest, place) for place in unknown].count(True):
        _validate(rest, faults)
    return None


def _remove(tree: Any, place: tuple[int | str, ...]) -> bool:
    *path, last = place
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return False  # inside a list: leave it at what was found
        tree = tree[key]
    return isinstance(tree, dict) and tree.pop(last, tree) is not tree


def load_config(path: Path, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Read a YAML file as written by `locvlm config`. Raises ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"reading the configuration {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reading the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"reading the configuration {path}: not valid YAML ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"reading the configuration {path}: expected sections, found {type(values).__name__}")
    return resolve(values, overrides)


def dump_config(config: ExperimentConfig) -> str:
    """The YAML form; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse_scalar(text: str) -> Any:
    if not text.strip():
        return ""  # YAML reads nothing as null; `--set a.b=` means the empty string
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 2e-5 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _set_path(tree: dict[str, Any], keys: list[str], value: Any, faults: list[str]) -> None:
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            faults.append(f"--set {'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is a value, not a section")
            return
        node = child
    node[keys[-1]] = value


def _describe(fault: Any) -> str:
    place = [str(part) for part in fault["loc"]]
    where = ".".join(place) or "the whole"
    if fault["type"] == "extra_forbidden":
        legal = _legal_names(place[:-1])
        close = difflib.get_close_matches(place[-1], legal, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"legal names here: {', '.join(sorted(legal))}"
        return f"{where}: there is no such setting; {hint}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message[0].lower() + message[1:]}, found {fault.get('input')!r}"


def _legal_names(place: list[str]) -> list[str]:
    section: Any = ExperimentConfig
    for key in place:
        if key.isdigit():
            continue
        section = _section_of(section.model_fields[key].annotation)
    return list(section.model_fields)


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
