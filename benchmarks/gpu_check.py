"""Speed and memory of training at the paper's size on one GPU: tokens a second, MFU, peak memory.

    python benchmarks/gpu_check.py [--preset locvlm-b --preset locvlm-l] [--steps 6] [--output docs/results/gpu.md]
    python benchmarks/gpu_check.py --device cpu --preset tiny --steps 2       (the same path without a GPU)

Models of the presets' shapes with random weights that are made on the device; nothing is downloaded. The data are
random pixels and token ids of the lengths of the real sets (LocVLM-B: 256 image tokens, 42 of system text, 52 a
question, 4.2 questions a conversation), the rest is `locvlm.training`: the loop, the engines, the loss. Cases:

    align       stage 1, the adapter alone
    instruct    stage 2, adapter and language model; one conversation a sample, or all questions of an image behind one
                image prefix (`shared`); with and without recomputing activations
    trainer     transformers' Trainer on the same model and the same batches of stage 2, logits for every token, bf16
    llava       LLaVA's own model (`llava-torch`) on the same batches: its forward with labels under bf16 autocast,
                backward, clipping, AdamW; needs --peer-python, see `sample_to_batch.py --make-peer`

Each case runs in its own process. The batch of a forward pass is halved until it fits (`--micro-batch` is the first).
MFU: the FLOPs that `locvlm plan` counts (recomputation not counted, attention only where the mask lets it look) over
time and the dense bf16 peak of the data sheet. `matmul` is what a plain product of 8192 x 8192 matrices reaches here.
The table goes to --output with the command that made it.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

WARM = 2  # steps that are not timed, where there are more
LLAVA_IMAGE = -200  # as LLaVA marks the place of an image
IGNORE = -100
SYSTEM, QUESTION, ANSWER, CAPTION = 42, 33, 19, 24  # tokens
QUESTIONS = 4.2  # a conversation
SHARED = 8  # questions behind one prefix
WINDOW = 16  # batches that are sorted together
GIB = 2**30
# what the name of a device holds -> its row in locvlm.plan.GPUS
NAMES = {"H200": "h200", "H100": "h100-80g", "A100": "a100-80g", "L40S": "l40s", "A10G": "a10g"}
CASES = ("align", "instruct", "trainer", "llava")
HEADER = ("preset", "case", "engine", "recompute", "shared", "a pass", "tokens/s", "questions/s", "MFU", "peak GiB")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    preset: str
    case: str
    engine: str
    recompute: bool
    shared: bool
    micro_batch: int
    device: str
    steps: int

    def config(self) -> Any:
        """The preset with this case's settings."""
        from locvlm.presets import preset

        stage = f"stages.{'align' if self.case == 'align' else 'instruct'}"
        return preset(
            self.preset,
            [
                f"{stage}.epochs=null",
                f"{stage}.steps={self.steps}",
                f"{stage}.mixture=[]",
                f"{stage}.conversations_per_image={SHARED if self.shared else 0}",
                f"cluster.engine={self.engine.replace('-', 'ddp')}",
                f"cluster.recompute={str(self.recompute).lower()}",
                f"cluster.micro_batch={self.micro_batch}",
                "cluster.log_every=1",
                "cluster.loader_threads=2",
            ],
        )


class RandomData:
    """What `TrainingData` offers, with random content of realistic lengths."""

    def __init__(self, config: Any, stage: Any) -> None:
        self.config, self.stage, self.seed = config, stage, 0
        side = config.model.vision.image_side
        self.pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        # as long as the tiny preset lets them be, and in full at the paper's size
        self.room = config.model.language.max_length - config.model.vision.n_tokens - SYSTEM - 4

    def __len__(self) -> int:
        return 10_000

    def sample(self, index: int) -> Any:
        from locvlm.data.dataset import Branch, Sample

        rng = np.random.default_rng((1, index))
        image = [image_token(self.config)] * self.config.model.vision.n_tokens
        if self.stage.format == "plain":
            return Sample(self.pixels, [1, *image], (self._branch(rng, Branch, 0, CAPTION),))
        prefix = [*self._ids(rng, SYSTEM), *image, 5]
        if self.stage.conversations_per_image:
            n = min(SHARED, self.room // (QUESTION + ANSWER))
            return Sample(self.pixels, prefix, tuple(self._branch(rng, Branch, QUESTION, ANSWER) for _ in range(n)))
        n = min(1 + int(rng.binomial(8, (QUESTIONS - 1) / 8)), self.room // (QUESTION + ANSWER))
        turns = [self._branch(rng, Branch, QUESTION, ANSWER) for _ in range(n)]
        whole = Branch([i for t in turns for i in t.ids], [s for t in turns for s in t.supervised])
        return Sample(self.pixels, prefix, (whole,))

    def longest(self, n: int) -> list[int]:
        sizes = {index: sum(len(b.ids) for b in self.sample(index).branches) for index in range(256)}
        return sorted(sizes, key=lambda index: -sizes[index])[:n] * -(-n // 256)

    def describe(self, index: int) -> str:
        return f"random sample {index}"

    def questions(self, sample: Any) -> int:
        return max(1, sum(len(branch.ids) for branch in sample.branches) // (QUESTION + ANSWER))

    def _ids(self, rng: np.random.Generator, n: int) -> list[int]:
        return [int(i) for i in rng.integers(5, self.config.model.language.vocab_size - 8, n)]

    def _branch(self, rng: np.random.Generator, kind: Any, asked: int, answered: int) -> Any:
        return kind(self._ids(rng, asked + answered), [False] * asked + [True] * answered)


class Grouped(RandomData):
    """Samples of like length in one batch, as `stage.group_by_length` has them."""

    def __init__(self, config: Any, stage: Any) -> None:
        super().__init__(config, stage)
        self._windows = lru_cache(4)(self._window)  # several threads ask

    def sample(self, index: int) -> Any:
        number, place = divmod(index, WINDOW * self.stage.global_batch)
        return self._windows(number)[place]

    def _window(self, number: int) -> list[Any]:
        batch = self.stage.global_batch
        made = [RandomData.sample(self, number * WINDOW * batch + i) for i in range(WINDOW * batch)]
        made.sort(key=lambda sample: len(sample.branches[0].ids))
        order = np.random.default_rng((2, number)).permutation(WINDOW).tolist()
        return [sample for place in order for sample in made[place * batch : (place + 1) * batch]]


class NoCheckpoints:
    """Nothing is written."""

    def latest(self) -> None:
        return None

    def save(self, step: int, write: Callable[[Path], None], point: Any) -> None:
        pass

    def finish(self) -> None:
        pass

    def preempted(self) -> bool:
        return False


def image_token(config: Any) -> int:
    return int(config.model.language.vocab_size) - 1


def random_model(config: Any, device: torch.device) -> Any:
    """The preset's model with random weights, made where they stay."""
    from locvlm.model.variants import architecture, empty_model

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with device:
        model = empty_model(architecture(config.model, image_token_id=image_token(config), special_ids=special))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=0.02)
    return model


def sample_flops(config: Any, trains_language: bool, sample: Any) -> float:
    """What `locvlm plan` counts, with the attention of branches that do not see each other."""
    from locvlm.plan import flops_per_sample

    visual, language = config.model.vision.n_tokens, config.model.language
    prefix, sizes = len(sample.prefix), [len(branch.ids) for branch in sample.branches]
    n = prefix + sum(sizes)
    seen = prefix**2 / 2 + sum(size * prefix + size**2 / 2 for size in sizes)
    unseen = 4 * (n**2 / 2 - seen) * language.hidden_size * language.n_layers
    whole = flops_per_sample(config.model, trains_language, visual, n - visual, 1)
    return whole - (3 if trains_language else 2) * unseen


def run_ours(case: Case) -> dict[str, Any]:
    """`locvlm.training` for a few steps."""
    from locvlm.model.stages import set_trainable
    from locvlm.training.loop import train
    from locvlm.training.stage import make_engine

    config, device = case.config(), torch.device(case.device)
    stage = config.stages.align if case.case == "align" else config.stages.instruct
    data = (RandomData if case.shared or case.case == "align" else Grouped)(config, stage)
    model = random_model(config, device)
    set_trainable(model, stage.trainable)
    engine = make_engine(model, stage, config.cluster, device)
    points: list[Any] = []
    train(stage, data, engine, NoCheckpoints(), 0, config.cluster, on_point=points.append)
    begin, end = points[warm_steps(case) - 1], points[-1]
    samples = [data.sample(i) for i in range(begin.step * stage.global_batch, end.step * stage.global_batch)]
    return measured(config, case, data, samples, end.seconds - begin.seconds, [p.loss for p in points])


def run_trainer(case: Case) -> dict[str, Any]:
    """transformers' Trainer around the model itself."""
    from shared_prefix import padded_batch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from locvlm.model.stages import set_trainable

    config, device = case.config(), torch.device(case.device)
    stage = config.stages.instruct
    data = Grouped(config, stage)
    model = random_model(config, device)
    set_trainable(model, stage.trainable)
    ticks: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            ticks.append(time.monotonic())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses.extend([float(logs["loss"])] if "loss" in logs else [])

    class InOrder(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return case.steps * int(stage.global_batch)

        def __getitem__(self, index: int) -> Any:
            return data.sample(index)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=case.micro_batch,
            gradient_accumulation_steps=stage.global_batch // case.micro_batch,
            max_steps=case.steps,
            learning_rate=stage.learning_rate,
            bf16=stage.precision == "bf16",
            gradient_checkpointing=case.recompute,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=device.type == "cpu",
            remove_unused_columns=False,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        Trainer(
            model,
            arguments,
            data_collator=lambda samples: padded_batch(samples, 0),
            train_dataset=InOrder(),
            callbacks=[Watch()],
        ).train()
    warm = warm_steps(case)
    samples = [data.sample(i) for i in range(warm * stage.global_batch, case.steps * stage.global_batch)]
    return measured(config, case, data, samples, ticks[-1] - ticks[warm - 1], losses)


def run_llava(case: Case, python: Path) -> dict[str, Any]:
    """LLaVA in its own environment; the batches and the shape of the model go there in a file."""
    config = case.config()
    stage, model = config.stages.instruct, config.model
    data = Grouped(config, stage)
    n_visual = model.vision.n_tokens
    rows = []
    for sample in (data.sample(i) for i in range(case.steps * stage.global_batch)):
        (branch,) = sample.branches
        at = sample.prefix.index(image_token(config))
        prefix = [*sample.prefix[:at], LLAVA_IMAGE, *sample.prefix[at + n_visual :]]
        labels = [token if on else IGNORE for token, on in zip(branch.ids, branch.supervised, strict=True)]
        rows.append({"ids": [*prefix, *branch.ids], "labels": [*[IGNORE] * len(prefix), *labels]})
    job = {
        **asdict(case),
        "rows": rows,
        "batch": stage.global_batch,
        "bf16": stage.precision == "bf16",
        "rate": stage.learning_rate,
        "clip": stage.clip_norm,
        "adapter": model.adapter,
        "vision": model.vision.model_dump(),
        "language": model.language.model_dump(),
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.json").write_text(json.dumps(job))
        command = [str(python), __file__, "--llava-job", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["killed"])[-1]
            return {"fault": last[:200], "too_large": "OutOfMemory" in last or "out of memory" in last}
        found = json.loads(done.stdout.splitlines()[-1])
    warm = warm_steps(case)
    samples = [data.sample(i) for i in range(warm * stage.global_batch, case.steps * stage.global_batch)]
    figures = measured(config, case, data, samples, found["seconds"], found["losses"])
    return {**figures, "gib": found["gib"]}


def llava_job(folder: Path) -> dict[str, Any]:
    """In LLaVA's environment: train its model on the batches of `job.json`."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    job = json.loads((folder / "job.json").read_text())
    vision, device = job["vision"], torch.device(job["device"])
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["ffn_size"],
            num_hidden_layers=vision["n_layers"],
            num_attention_heads=vision["n_heads"],
            image_size=vision["image_side"],
            patch_size=vision["patch_size"],
        )
    ).save_pretrained(folder / "clip")
    CLIPImageProcessor().save_pretrained(folder / "clip")
    model = _llava_model(job, folder / "clip", device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["rate"], weight_decay=0.0, fused=device.type == "cuda" or None)
    side = vision["image_side"]
    pixels = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    losses, ticks, passes = [], [], job["batch"] // job["micro_batch"]
    for step in range(job["steps"]):
        total = torch.zeros((), device=device)
        for number in range(passes):
            first = step * job["batch"] + number * job["micro_batch"]
            inputs = _llava_batch(job["rows"][first : first + job["micro_batch"]], pixels)
            with torch.autocast(device.type, torch.bfloat16, enabled=job["bf16"]):
                loss = model(**inputs).loss / passes
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, job["clip"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
        if device.type == "cuda":
            torch.cuda.synchronize()
        ticks.append(time.monotonic())
    gib = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    return {"seconds": ticks[-1] - ticks[min(WARM, len(ticks) - 1) - 1], "losses": losses, "gib": gib}


def _llava_model(job: dict[str, Any], tower: Path, device: torch.device) -> Any:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    language = job["language"]
    config = LlavaConfig(
        vocab_size=language["vocab_size"],
        hidden_size=language["hidden_size"],
        intermediate_size=language["ffn_size"],
        num_hidden_layers=language["n_layers"],
        num_attention_heads=language["n_heads"],
        max_position_embeddings=language["max_length"],
        mm_vision_tower=str(tower),
        mm_hidden_size=job["vision"]["hidden_size"],
        mm_projector_type="linear" if job["adapter"] == "linear" else "mlp2x_gelu",
        mm_vision_select_layer=job["vision"]["feature_layer"],
        mm_vision_select_feature="patch",
        tokenizer_model_max_length=language["max_length"],
        tokenizer_padding_side="right",
        tune_mm_mlp_adapter=False,
        mm_use_im_start_end=False,
    )
    with device:
        model = LlavaLlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    model.get_vision_tower().load_model()
    model.get_vision_tower().to(device)
    model.config.use_cache = False
    if job["recompute"]:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def _llava_batch(rows: Sequence[dict[str, list[int]]], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(r["ids"]) for r in rows], batch_first=True, padding_value=0).to(pixels.device)
    labels = pad([torch.tensor(r["labels"]) for r in rows], batch_first=True, padding_value=IGNORE).to(pixels.device)
    images = pixels[None].expand(len(rows), -1, -1, -1)
    return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(0), "images": images}


def warm_steps(case: Case) -> int:
    """Steps that are not timed."""
    return min(WARM, case.steps - 1)


def measured(
    config: Any, case: Case, data: Any, samples: Sequence[Any], seconds: float, losses: list[float]
) -> dict[str, Any]:
    """The figures of `samples` trained in `seconds`."""
    flops = sum(sample_flops(config, case.case != "align", sample) for sample in samples)
    tokens = sum(len(s.prefix) + sum(len(b.ids) for b in s.branches) for s in samples)
    peak = peak_flops()
    return {
        "tokens": tokens / seconds,
        "questions": sum(data.questions(sample) for sample in samples) / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "gib": torch.cuda.max_memory_allocated() / GIB if case.device == "cuda" else None,
        "finite": all(math.isfinite(loss) for loss in losses),
    }


def peak_flops() -> float | None:
    """FLOP/s by the device's name; None where it is not known."""
    from locvlm.plan import GPUS

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((GPUS[row][0] * 1e12 for part, row in NAMES.items() if part in name), None)


def matmul_tflops() -> float:
    """A plain bf16 product of 8192 x 8192 matrices of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(times[3:]) / 1e12


def child(case: Case) -> dict[str, Any]:
    """One case in this process; a fault that the user can read instead of figures."""
    from locvlm.errors import LocVLMError

    try:
        if case.engine.startswith("zero"):
            _join_alone(case.device)
        return run_trainer(case) if case.case == "trainer" else run_ours(case)
    except (LocVLMError, torch.OutOfMemoryError, ImportError) as fault:
        too_large = isinstance(fault, torch.OutOfMemoryError) or "does not fit the memory" in str(fault)
        return {"fault": "out of memory" if too_large else str(fault).splitlines()[0], "too_large": too_large}


def _join_alone(device: str) -> None:
    """DeepSpeed wants a process group, also of one."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    store = Path(tempfile.mkdtemp(), "rendezvous")
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)


def run_case(case: Case, peer_python: Path | None) -> tuple[Case, dict[str, Any]]:
    """The case in a process of its own, with half the batch as long as it does not fit."""
    while True:
        found = run_llava(case, peer_python) if case.case == "llava" and peer_python else run_child(case)
        if not found.get("too_large") or case.micro_batch == 1:
            return case, found
        case = Case(**{**asdict(case), "micro_batch": case.micro_batch // 2})


def run_child(case: Case) -> dict[str, Any]:
    """What `child` says in a new process."""
    command = [sys.executable, __file__, "--run", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"fault": (done.stderr.strip().splitlines() or ["killed"])[-1][:200]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def cases(args: argparse.Namespace) -> list[Case]:
    """Every row that was asked for."""
    found = []
    for name in args.preset:
        common = {"micro_batch": args.micro_batch, "device": args.device, "steps": args.steps}
        rows = [
            *(("align", engine, False, False) for engine in args.engine),
            *(("instruct", engine, *two) for engine in args.engine for two in product((False, True), repeat=2)),
            *(("trainer", "-", recompute, False) for recompute in (False, True)),
            *(("llava", "-", recompute, False) for recompute in (False, True)),
        ]
        found += [Case(name, *row, **common) for row in rows if row[0] in args.case]
    return found


def row(case: Case, found: dict[str, Any]) -> list[str]:
    """The cells of a case."""
    yes = {True: "yes", False: "no"}
    head = [case.preset, case.case, case.engine, yes[case.recompute], yes[case.shared], str(case.micro_batch)]
    if "fault" in found:
        return [*head, found["fault"], "", "", ""]
    mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
    gib = "" if found["gib"] is None else f"{found['gib']:.1f}"
    note = "" if found["finite"] else " (loss not finite)"
    return [*head, f"{found['tokens']:,.0f}{note}", f"{found['questions']:,.1f}", mfu, gib]


def page(rows: Sequence[Sequence[str]], device: str, command: str) -> str:
    """The Markdown page."""
    lines = ["# Training on one GPU", "", device, "", "```", command, "```", ""]
    lines += [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    text = (
        "`tokens/s`: text and image tokens, padding not counted. `a pass`: samples of a forward pass; the global batch "
        "is the preset's. MFU: recomputation not counted, against the dense bf16 peak of the data sheet."
    )
    return "\n".join([*lines, "", text, ""])


def describe_device(device: str) -> str:
    if device == "cpu":
        return f"CPU, torch {torch.__version__}: the path is tried, the figures mean nothing."
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    peak = peak_flops()
    known = f", data sheet {peak / 1e12:.0f} TFLOP/s dense bf16" if peak else ""
    return (
        f"{torch.cuda.get_device_name()}, {memory:.0f} GiB{known}, matmul {matmul_tflops():.0f} TFLOP/s; "
        f"torch {torch.__version__}"
    )


def main() -> None:
    if sys.argv[1:2] == ["--llava-job"]:  # locvlm is not there
        print(json.dumps(llava_job(Path(sys.argv[2]))))
        return
    from locvlm.presets import PRESETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", action="append", choices=tuple(PRESETS), help="repeatable (default: -b and -l)")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument(
        "--engine", action="append", choices=("ddp", "zero1", "zero2", "zero3"), help="default: 0, 2, 3"
    )
    parser.add_argument("--steps", type=int, default=6, help="the first two (of 2: the first) are not timed")
    parser.add_argument("--micro-batch", type=int, default=16, help="samples of the first try")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    parser.add_argument("--peer-python", type=Path, metavar="FILE", help="the Python of an environment that has LLaVA")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(child(Case(**json.loads(args.run)))))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: skipped, there is no GPU here (its path without one: --device cpu --preset tiny --steps 2)")
        return
    if args.steps < 2:
        sys.exit(f"gpu-check: --steps is {args.steps}; the first steps are not timed, so give 2 or more")
    args.preset = args.preset or ["locvlm-b", "locvlm-l"]
    args.case = args.case or [case for case in CASES if case != "llava" or args.peer_python]
    if "llava" in args.case and args.peer_python is None:
        sys.exit("gpu-check: the case llava needs --peer-python, the Python of an environment that has llava-torch")
    args.engine = args.engine or ["ddp", "zero2", "zero3"]
    rows = []
    for case in cases(args):
        rows.append(row(*run_case(case, args.peer_python)))
        print("  ".join(rows[-1]), flush=True)
    command = shlex.join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]])
    text = page(rows, describe_device(args.device), command)
    if args.output is None:
        print(f"\n{text}")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
