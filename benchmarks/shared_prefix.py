"""Questions a second in training: all of an image behind one image prefix, against one question a sample.

    python benchmarks/shared_prefix.py [--images 8] [--rounds 3]

One small Llava at the proportions of LocVLM-B (256 image tokens, LLaVA's system text, 4.2 objects an image, each asked
for in both directions), the same questions on all sides, in text from the Localize-Instruct builder:

    padded     one question a sample, right-padded batches of 16 with labels, through transformers' Llava forward: as
               LLaVA collates and trains
    single     the same samples through our own loss, which computes logits for supervised tokens only
    grouped    our multi-turn conversations (LocPred and RevLoc of an image), batches of like length
    shared     ours: all questions of an image behind one image prefix, none seeing another

The losses are compared first: those of every supervised token of `padded`, `single` and `shared` agree within 1e-5;
without that there is no figure. (`grouped` sees earlier turns, so its loss is another.) The sides run alternately on
one thread: forward and backward of all questions once, batches made before. Printed are the medians of CPU time.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sample_to_batch import make_data, open_ours

SIDE = 224
BATCH = 16  # samples a forward pass of `padded`, `single` and `grouped`
IMAGES_A_PASS = 4  # of `shared`: about as many tokens
CLOSE = 1e-5
IGNORE = -100


def small_model(encoder: Any) -> Any:
    """LocVLM-B's form; the language model is large enough for attention not to outweigh the rest."""
    from locvlm.config import LanguageConfig, ModelConfig, VisionConfig
    from locvlm.model.stages import set_trainable
    from locvlm.model.variants import architecture, new_model

    vision = VisionConfig(hidden_size=64, n_layers=2, n_heads=2, ffn_size=128, image_side=SIDE)
    language = LanguageConfig(vocab_size=len(encoder.tokenizer), hidden_size=256, n_layers=3, n_heads=4, ffn_size=688)
    config = ModelConfig(vision=vision, language=language)
    model = new_model(architecture(config, image_token_id=encoder.image_id, special_ids=encoder.special_ids), 0)
    set_trainable(model, ("adapter", "language"))
    return model


def samples_of(data: Any) -> list[tuple[str, Any]]:
    """(image, sample) of every sample of an epoch."""
    return sorted(((data.describe(i).partition(": ")[0], data.sample(i)) for i in range(len(data))), key=lambda x: x[0])


def shared(singles: Sequence[tuple[str, Any]]) -> list[Any]:
    """The samples of each image as one."""
    images: dict[str, list[Any]] = {}
    for image, sample in singles:
        images.setdefault(image, []).append(sample)
    return [dataclasses.replace(s[0], branches=tuple(b for one in s for b in one.branches)) for s in images.values()]


def padded_batch(samples: Sequence[Any], pad_id: int) -> dict[str, torch.Tensor]:
    """LLaVA's collation: ids, labels and mask of every sample, padded on the right."""
    from locvlm.pixels import normalised

    rows = [s.prefix + s.branches[0].ids for s in samples]
    labels = [
        [IGNORE] * len(s.prefix)
        + [t if on else IGNORE for t, on in zip(s.branches[0].ids, s.branches[0].supervised, strict=True)]
        for s in samples
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id),
        "labels": pad([torch.tensor(row) for row in labels], batch_first=True, padding_value=IGNORE),
        "attention_mask": pad([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True),
        "pixel_values": torch.from_numpy(normalised([s.pixels for s in samples])),
    }


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class Sides:
    """The batches of every side, made beforehand, and how a side computes the loss sum of one."""

    def __init__(self, folder: Path, n_images: int) -> None:
        from locvlm.data.collate import collate

        make_data(folder, n_images, "qa", "conversation")
        questions = open_ours(folder, "qa", "squash", SIDE)
        turns = open_ours(folder, "conversation", "squash", SIDE)
        self.model, pad_id = small_model(questions.encoder), questions.encoder.pad_id
        singles = samples_of(questions)
        alone = [sample for _, sample in singles]
        multi = sorted((s for _, s in samples_of(turns)), key=lambda s: len(s.branches[0].ids))
        self.n_questions = len(alone)
        self.batches: dict[str, list[Any]] = {
            "padded": [padded_batch(part, pad_id) for part in chunks(alone, BATCH)],
            "single": [collate(part, pad_id) for part in chunks(alone, BATCH)],
            "grouped": [collate(part, pad_id) for part in chunks(multi, BATCH)],
            "shared": [collate(part, pad_id) for part in chunks(shared(singles), IMAGES_A_PASS)],
        }
        self.n_tokens = {
            side: sum(b["input_ids"].numel() if isinstance(b, dict) else b.input_ids.numel() for b in batches)
            for side, batches in self.batches.items()
        }

    def loss(self, batch: Any) -> torch.Tensor:
        """Summed over supervised tokens."""
        if isinstance(batch, dict):
            return self.model(**batch).loss * (batch["labels"] != IGNORE).sum()
        return self.model.sum_loss(**batch.inputs(torch.device("cpu")))

    def token_losses(self, side: str) -> torch.Tensor:
        """[tokens]: the loss of every supervised token, in the order of the samples."""
        logits: list[torch.Tensor] = []
        hook = self.model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
        found = []
        with torch.no_grad():
            for batch in self.batches[side]:
                self.loss(batch)
                last = logits.pop()
                if isinstance(batch, dict):
                    labels = batch["labels"][:, 1:]
                    last, targets = last[:, :-1][labels != IGNORE], labels[labels != IGNORE]
                else:
                    targets = batch.targets
                found.append(torch.nn.functional.cross_entropy(last, targets, reduction="none"))
        hook.remove()
        return torch.cat(found)

    def step(self, side: str) -> float:
        """CPU seconds of forward and backward of everything."""
        self.model.zero_grad(set_to_none=True)
        start = time.process_time()
        for batch in self.batches[side]:
            self.loss(batch).backward()
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), args.images)
    losses = {side: sides.token_losses(side) for side in ("padded", "single", "shared")}
    gap = max(float((losses[side] - losses["padded"]).abs().max()) for side in ("single", "shared"))
    if not gap <= CLOSE:
        sys.exit(f"the losses of a token differ by up to {gap:g}, so the figures would mean nothing")
    print(
        f"{sides.n_questions} questions about {args.images} images, {len(losses['shared'])} supervised tokens: losses "
        f"a token within {gap:.0e}",
        flush=True,
    )
    runs: dict[str, list[float]] = {side: [] for side in sides.batches}
    for _ in range(args.rounds):
        for side, done in runs.items():
            done.append(sides.step(side))
    medians = {side: statistics.median(done) for side, done in runs.items()}
    for side, seconds in medians.items():
        print(f"{side:8} {sides.n_questions / seconds:7.1f} questions/s of CPU, {sides.n_tokens[side]:7,} tokens")
    ratios = ", ".join(f"{medians[side] / medians['shared']:.2f}x {side}" for side in medians if side != "shared")
    print(f"shared (medians of {args.rounds}): {ratios}")


if __name__ == "__main__":
    main()
