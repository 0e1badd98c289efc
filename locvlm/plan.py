"""What a run will take before it takes it: samples, tokens, steps, FLOPs, GPU hours, memory a GPU, cost.

Counts of parameters and FLOPs are exact for the architecture; tokens rest on averages that are stated beside them;
memory counts weights, gradients, optimizer states, activations and logits, and leaves a stated reserve for the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from locvlm.config import ExperimentConfig, ModelConfig, StageConfig, VideoConfig
from locvlm.errors import ConfigError

# (dense bf16 peak in TFLOP/s, memory in GiB): the makers' data sheets
GPUS = {
    "a100-40g": (312.0, 40),
    "a100-80g": (312.0, 80),
    "h100-80g": (989.0, 80),
    "h200": (989.0, 141),
    "l40s": (362.0, 48),
    "a10g": (70.0, 24),
}
DEFAULT_MFU = 0.4

# Conversations an epoch where --samples does not say: LLaVA's CC3M-595K, 2 x 95,899 (paper, appendix), VideoInstruct
PAPER_SAMPLES = {"align": 595_375, "instruct": 191_798, "video": 100_010}
# Tokens of text a conversation: a short caption; system text and 2.1 turns of 52; an instruction and its answer
TEXT_TOKENS = {"align": 24, "instruct": 152, "video": 160}
# DeepSpeed's defaults, in values: a bucket of the exchange (one reduces, one gathers); whole weights alive in ZeRO 3
_ZERO_BUCKET, _ZERO_GATHERED = 500_000_000, 1_000_000_000
RESERVE_GIB = 3.0  # CUDA context, NCCL buffers, fragmentation


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage. `tokens` and `flops` of the whole stage; `memory_gib`: ZeRO stage -> GiB a GPU, at `micro_batch`
    samples a forward pass; `fits`: the ZeRO stages that fit the GPU."""

    stage: str
    samples: int
    steps: int
    tokens_per_sample: int
    tokens: int
    flops: float
    gpu_hours: float
    hours: float
    micro_batch: int
    memory_gib: dict[str, float]
    fits: tuple[str, ...]
    cost: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run on `gpus` GPUs of `gpu_type`, at a model-FLOPs utilisation of `mfu`."""

    preset: str
    gpus: int
    gpu_type: str
    mfu: float
    price: float | None
    parameters: dict[str, int]
    stages: tuple[StagePlan, ...]
    gpu_hours: float
    cost: float | None


def make_plan(
    config: ExperimentConfig,
    gpus: int,
    gpu_type: str,
    samples: Sequence[str] = (),
    mfu: float | None = None,
    price: float | None = None,
) -> Plan:
    """The plan of every stage of `config`. `samples`: STAGE=N entries that replace the paper's sizes.

    Raises ConfigError for an unknown GPU or stage, or for numbers out of range.
    """
    faults = []
    if gpus < 1:
        faults.append(f"--gpus {gpus}: at least 1 is needed")
    if gpu_type not in GPUS:
        faults.append(f"--gpu-type {gpu_type!r}: it must be one of {', '.join(GPUS)}")
    if mfu is not None and not 0 < mfu <= 1:
        faults.append(f"--mfu {mfu}: it must lie in (0, 1]")
    if price is not None and price < 0:
        faults.append(f"--price {price}: it must not be negative")
    stages = {name: stage for name in PAPER_SAMPLES if (stage := getattr(config.stages, name)) is not None}
    sizes = {name: PAPER_SAMPLES[name] for name in stages}
    for entry in samples:
        name, _, number = entry.partition("=")
        if name not in stages or not number.isdigit() or int(number) < 1:
            faults.append(f"--samples {entry}: the form is STAGE=N with STAGE one of {', '.join(stages)}")
        else:
            sizes[name] = int(number)
    for name, stage in stages.items():
        if gpus >= 1 and stage.global_batch % gpus:
            legal = [n for n in range(1, stage.global_batch + 1) if stage.global_batch % n == 0]
            faults.append(f"--gpus {gpus}: stages.{name}.global_batch {stage.global_batch} needs one of {legal}")
    if faults:
        raise ConfigError("planning a run:\n" + "\n".join(f"  - {fault}" for fault in faults))
    share = DEFAULT_MFU if mfu is None else mfu
    planned = tuple(
        _plan_stage(name, stage, config, sizes[name], gpus, gpu_type, share, price) for name, stage in stages.items()
    )
    hours = sum(stage.gpu_hours for stage in planned)
    cost = None if price is None else hours * price
    return Plan(config.name, gpus, gpu_type, share, price, count_parameters(config.model), planned, hours, cost)


def count_parameters(model: ModelConfig) -> dict[str, int]:
    """Scalars of each part: vision, adapter, language (with embeddings and output head), as the classes have them."""
    v, t = model.vision, model.language
    vision_block = 4 * v.hidden_size * (v.hidden_size + 1) + 2 * v.hidden_size * v.ffn_size + v.ffn_size + v.hidden_size
    vision_block += 4 * v.hidden_size  # two layer norms
    embedding = (3 * v.patch_size**2 + 1 + v.n_tokens + 1) * v.hidden_size  # patches (no bias), class token, positions
    vision = embedding + v.n_layers * vision_block + 4 * v.hidden_size  # layer norms before and after
    first = (v.hidden_size + 1) * t.hidden_size
    adapter = first if model.adapter == "linear" else first + (t.hidden_size + 1) * t.hidden_size
    block = 4 * t.hidden_size**2 + 3 * t.hidden_size * t.ffn_size + 2 * t.hidden_size
    language = 2 * t.vocab_size * t.hidden_size + t.n_layers * block + t.hidden_size
    return {"vision": vision, "adapter": adapter, "language": language}


def flops_per_sample(model: ModelConfig, trains_language: bool, visual: int, text: int, images: int) -> float:
    """Floating-point operations of one training sample, recomputation not counted.

    Vision tower: forward only, up to the layer that feeds the adapter. Language model: 2 a parameter and token forward,
    as much again for the gradient of the activations, and as much for that of the weights where it is trained; causal
    attention counted once.
    """
    v, t = model.vision, model.language
    patches = v.n_tokens + 1
    layers = v.n_layers + 1 + v.feature_layer if v.feature_layer < 0 else v.feature_layer
    weights = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.ffn_size
    vision = images * layers * (2 * weights * patches + 4 * patches**2 * v.hidden_size)
    parts = count_parameters(model)
    adapter = 6 * parts["adapter"] * visual
    tokens = visual + text
    dense = parts["language"] - t.vocab_size * t.hidden_size  # the input embedding is a look-up
    attention = 2 * tokens**2 * t.hidden_size * t.n_layers  # half of 4 n^2 d: causal
    language = (3 if trains_language else 2) * (2 * dense * tokens + attention)
    return float(vision + adapter + language)


def memory_gib(
    model: ModelConfig,
    stage: StageConfig,
    tokens: int,
    micro_batch: int,
    gpus: int,
    zero: int,
    *,
    images: int = 1,
    recompute: bool = True,
) -> float:
    """GiB a GPU: states, activations (of one block and all block inputs with `recompute`, else of all blocks), and the
    logits of the supervised half.

    States without ZeRO: fp32 weights, gradients and AdamW moments, and autocast's bf16 copy of the weights. With ZeRO,
    as DeepSpeed keeps them: weights and gradients in the stage's precision, an fp32 master with its gradient and
    moments spread over the GPUs, and the buffers of the exchange; ZeRO 2 spreads the gradients too, 3 the weights too.
    """
    parts = count_parameters(model)
    total = sum(parts.values())
    trained = sum(parts[name] for name in stage.trainable)
    bytes_per_value = 2 if stage.precision == "bf16" else 4
    if zero:
        weights = bytes_per_value * total / (gpus if zero >= 3 else 1)
        gradients = bytes_per_value * trained / (gpus if zero >= 2 else 1)
        spread = (4 + 4 + 8) * trained / gpus
        gathered = min(total, _ZERO_GATHERED) if zero >= 3 else 0
        buffers = bytes_per_value * (2 * min(trained, _ZERO_BUCKET) + gathered)
        states = weights + gradients + spread + buffers
    else:
        states = 4.0 * total + (4 + 8) * trained + (2.0 * total if stage.precision == "bf16" else 0.0)
    t, v = model.language, model.vision
    positions = micro_batch * tokens
    # what a block keeps for its way back: 10 and 3 to 4 tensors of the two widths, as measured (test_plan.py)
    block = positions * (10 * t.hidden_size + 4 * t.ffn_size) * bytes_per_value
    inputs = positions * t.hidden_size * t.n_layers * bytes_per_value
    blocks = inputs + block if recompute else t.n_layers * block
    logits = positions / 2 * t.vocab_size * (4 + 4 + bytes_per_value)
    vision = micro_batch * images * (v.n_tokens + 1) * (6 * v.hidden_size + v.ffn_size) * bytes_per_value
    return (states + blocks + logits + vision) / 2**30


def visual_tokens(config: ExperimentConfig, stage: str) -> tuple[int, int]:
    """(visual tokens, images encoded) of one sample."""
    n = config.model.vision.n_tokens
    video: VideoConfig | None = config.video
    return (n + video.n_frames, video.n_frames) if stage == "video" and video is not None else (n, 1)


def render_plan(plan: Plan) -> str:
    """The plan as text for a terminal."""
    peak, memory = GPUS[plan.gpu_type]
    millions = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in plan.parameters.items())
    lines = [
        f"{plan.preset} on {plan.gpus} x {plan.gpu_type} ({peak:g} TFLOP/s, {memory} GiB), MFU {plan.mfu:.0%}",
        f"parameters: {millions}",
        "",
        f"{'stage':10}{'samples':>12}{'steps':>9}{'tokens':>11}{'FLOPs':>10}{'GPU hours':>11}{'hours':>8}"
        f"{'micro':>7}  GiB a GPU",
    ]
    for stage in plan.stages:
        sizes = ", ".join(
            f"ZeRO-{zero} {gib:.0f}{'' if zero in stage.fits else '!'}" for zero, gib in stage.memory_gib.items()
        )
        lines.append(
            f"{stage.stage:10}{stage.samples:>12,}{stage.steps:>9,}{stage.tokens / 1e9:>9.2f} G{stage.flops:>10.1e}"
            f"{stage.gpu_hours:>11.1f}{stage.hours:>8.1f}{stage.micro_batch:>7}  {sizes}"
        )
    cost = "" if plan.cost is None else f", {plan.cost:,.0f} at {plan.price:g} a GPU hour"
    lines += [
        "",
        f"in all {plan.gpu_hours:,.1f} GPU hours{cost}",
        "! does not fit the GPU with the reserve of "
        f"{RESERVE_GIB:g} GiB; samples are the paper's unless --samples says otherwise",
    ]
    return "\n".join(lines)


def _plan_stage(
    name: str,
    stage: StageConfig,
    config: ExperimentConfig,
    samples: int,
    gpus: int,
    gpu_type: str,
    mfu: float,
    price: float | None,
) -> StagePlan:
    visual, images = visual_tokens(config, name)
    tokens = min(visual + TEXT_TOKENS[name], config.model.language.max_length)
    steps = stage.steps if stage.steps is not None else math.ceil((stage.epochs or 0) * samples / stage.global_batch)
    seen = steps * stage.global_batch
    flops = seen * flops_per_sample(config.model, "language" in stage.trainable, visual, tokens - visual, images)
    peak, memory = GPUS[gpu_type]
    gpu_hours = flops / (peak * 1e12 * mfu) / 3600
    share = stage.global_batch // gpus
    micro, sizes, fits = _largest_micro_batch(
        config.model, stage, tokens, share, gpus, memory, images, recompute=config.cluster.recompute
    )
    cost = None if price is None else gpu_hours * price
    return StagePlan(
        name, seen, steps, tokens, seen * tokens, flops, gpu_hours, gpu_hours / gpus, micro, sizes, fits, cost
    )


def _largest_micro_batch(
    model: ModelConfig,
    stage: StageConfig,
    tokens: int,
    share: int,
    gpus: int,
    memory: int,
    images: int,
    *,
    recompute: bool,
) -> tuple[int, dict[str, float], tuple[str, ...]]:
    """The largest divisor of a GPU's share with which some ZeRO stage fits (1 if none does)."""
    for micro in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
        sizes = {
            str(zero): memory_gib(model, stage, tokens, micro, gpus, zero, images=images, recompute=recompute)
            for zero in (0, 1, 2, 3)
        }
        fits = tuple(zero for zero, gib in sizes.items() if gib + RESERVE_GIB <= memory)
        if fits or micro == 1:
            return micro, sizes, fits
    raise AssertionError("unreachable: a share has the divisor 1")
