"""Greedy answers about images, tokens and time: ours against one question at a time, and with the image shared or not.

    python benchmarks/batched_answers.py [--questions 64] [--rounds 3] [--batch 32]

The peer is the pattern of LLaVA's model_vqa_loader.py (which asserts a batch of one): transformers' stock Llava class,
`generate` for each question, `use_cache`, greedy. Ours is the same model under `locvlm predict`'s engine. The model is
small and has random weights: hidden size 256, 6 layers.

Two claims, each with its own work:

    batch    24 new tokens after 16 visual ones: reading the prompt is a tenth of the work, about as for a 7B model on a
             GPU; every question has an image of its own, so that sharing has no part in it
             The ratio is that size's: reading the image and the prompt is bound by arithmetic and costs an answer of a
             batch as much as a question alone; only writing gets cheaper (7 to 12 times). With 64 visual tokens, where
             reading is half of our time, the same work went 3.8 to 4.6 times as fast, with 256 2.2 times.
    share    8 new tokens after 256 visual ones (LocVLM-B's), four questions an image: ours, the same batches, every
             question's image passing through tower and decoder by itself, or one pass for all four

Both sides of a claim run alternately, each in its own process on one thread, reading and preparing images included. The
token ids are compared first: without equal ones there is no figure.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from locvlm.config import EvaluationConfig, ExperimentConfig
from locvlm.geometry import make_geometry
from locvlm.model.checkpoint import LoadedModel, fresh
from locvlm.model.export import stock_model
from locvlm.model.tokenizer import TextEncoder, word_tokenizer
from locvlm.pixels import open_image, to_pixels
from locvlm.presets import preset
from locvlm.prompts import render_prompt

SIZES = (
    "model.adapter=mlp",
    "model.vision.patch_size=14",
    "model.vision.hidden_size=128",
    "model.vision.n_layers=4",
    "model.vision.n_heads=4",
    "model.vision.ffn_size=512",
    "model.language.hidden_size=256",
    "model.language.n_layers=6",
    "model.language.n_heads=8",
    "model.language.ffn_size=688",
    "model.language.max_length=512",
    "model.language.vocab_size=2048",
)
WORDS = "What is the colour of dog cat left right on a table in this image how many people are there where who"
QUESTIONS = (
    "Is there a dog in this image?",
    "What is the colour of the cat on the table?",
    "How many people are there?",
    "Where is the dog, left or right of the table in this image?",
)
IMAGE_SIDE = {"peer": 56, "ours": 56, "apart": 224, "together": 224}  # pixels; a patch has 14
BRIEF, LONG = 8, 24  # new tokens


@dataclass(frozen=True)
class Asked:
    """A question about the image of a file; `image` tells it from others."""

    id: str
    image: Path
    prompt: str
    file: Path

    def open(self) -> Image.Image:
        return open_image(self.file)


class Ids(TextEncoder):
    """Writes an answer as its token ids, which is what is compared."""

    def decode(self, ids: Sequence[int]) -> str:
        kept = list(ids)
        return " ".join(map(str, kept[: kept.index(self.stop_id)] if self.stop_id in kept else kept))


def make_model(image_side: int) -> LoadedModel:
    """The same model in every process."""
    sides = (f"{name}={image_side}" for name in ("geometry.side", "coordinates.n_bins", "model.vision.image_side"))
    config: ExperimentConfig = preset("tiny", [*SIZES, *sides])
    encoder = Ids(word_tokenizer([WORDS]), config.model.vision.n_tokens)
    model = fresh(config, encoder, seed=0)
    model.lm_head.weight.data *= 40  # far from ties, which rounding could break either way
    for value in model.model.language_model.layers.parameters():
        value.data *= 3 if value.dim() > 1 else 1  # the question must matter beside the image
    return LoadedModel(model, encoder, config)


def draw(folder: Path, n: int) -> list[Path]:
    """Noise of the size of a small photograph, as JPEG."""
    rng = np.random.default_rng(0)
    files = [folder / f"{number}.jpg" for number in range(n)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(file, quality=90)
    return files


def one_by_one(loaded: LoadedModel, asks: Sequence[Asked], n_tokens: int) -> list[str]:
    """LLaVA's loop: open, prepare, generate, next."""
    stock = stock_model(loaded.model)
    geometry = make_geometry(loaded.config.geometry)
    found = []
    for ask in asks:
        ids = loaded.encoder.encode([render_prompt(ask.prompt, loaded.config.prompts.system)])[0].ids
        pixels = torch.from_numpy(to_pixels(geometry.apply(ask.open())))[None]
        with torch.inference_mode():
            output = stock.generate(
                torch.tensor([ids]),
                pixel_values=pixels,
                use_cache=True,
                generation_config=GenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=n_tokens,
                    suppress_tokens=[loaded.encoder.image_id],
                    eos_token_id=loaded.encoder.stop_id,
                    pad_token_id=loaded.encoder.pad_id,
                ),
            )
        found.append(loaded.encoder.decode(output[0, len(ids) :].tolist()))
    return found


def in_batches(loaded: LoadedModel, asks: Sequence[Asked], n_tokens: int, size: int) -> list[str]:
    """Ours; a call for each batch, so that its make-up does not depend on what is shared."""
    decoding = EvaluationConfig(temperature=0.0, max_new_tokens=n_tokens, batch_size=size)
    batches = [asks[begin : begin + size] for begin in range(0, len(asks), size)]
    return [answer for batch in batches for answer in loaded.answers(batch, decoding)]


def measure(side: str, folder: Path, n: int, size: int) -> dict[str, object]:
    """Run one side in this process."""
    torch.set_num_threads(1)
    loaded = make_model(IMAGE_SIDE[side])
    files = sorted(folder.iterdir(), key=lambda file: int(file.stem))
    alone = [Asked(str(i), files[i], QUESTIONS[i % 4], files[i]) for i in range(n)]
    apart = [Asked(str(i), Path(str(i)), QUESTIONS[i % 4], files[i // 4]) for i in range(n)]
    together = [Asked(ask.id, ask.file, ask.prompt, ask.file) for ask in apart]
    work: dict[str, Callable[[], list[str]]] = {
        "peer": lambda: one_by_one(loaded, alone, LONG),
        "ours": lambda: in_batches(loaded, alone, LONG, size),
        "apart": lambda: in_batches(loaded, apart, BRIEF, size),
        "together": lambda: in_batches(loaded, together, BRIEF, size),
    }
    in_batches(loaded, alone[:2], 2, size)  # first calls set things up
    begin = time.process_time()
    answers = work[side]()
    return {"cpu": time.process_time() - begin, "answers": answers}


def compare(slow: str, quick: str, args: argparse.Namespace, folder: Path) -> None:
    """Run two sides in turn and print what they took; ends the program when their tokens differ."""
    runs: dict[str, list[dict[str, object]]] = {slow: [], quick: []}
    for _ in range(args.rounds):
        for side in runs:
            command = [sys.executable, __file__, "--measure", side, "--folder", str(folder)]
            command += ["--questions", str(args.questions), "--batch", str(args.batch)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    first, *others = [run["answers"] for side in runs.values() for run in side]
    if any(other != first for other in others):
        sys.exit(f"{slow} and {quick} give other tokens, so the times would mean nothing")
    n_kinds = len(set(first))  # type: ignore[call-overload]
    print(f"{args.questions} answers, {n_kinds} of them different, the same tokens on both sides")
    medians = {side: statistics.median(float(str(run["cpu"])) for run in done) for side, done in runs.items()}
    names = {
        "peer": "one at a time (stock Llava)",
        "ours": f"locvlm, batches of {args.batch}",
        "apart": "locvlm, each image by itself",
        "together": "locvlm, the image shared",
    }
    for side, cpu in medians.items():
        print(f"{names[side]:32} {cpu:7.2f} s CPU  {args.questions / cpu:7.1f} answers/s")
    print(f"ratio (medians of {args.rounds}): {medians[slow] / medians[quick]:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--measure", choices=("peer", "ours", "apart", "together"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder, args.questions, args.batch)))
        return
    with tempfile.TemporaryDirectory() as name:
        draw(Path(name), args.questions)
        compare("peer", "ours", args, Path(name))
        compare("apart", "together", args, Path(name))


if __name__ == "__main__":
    main()
