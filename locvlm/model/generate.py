"""Answers of a model: batched, left-padded, each sample with its own random numbers (paper, section 4: T = 0.2)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from locvlm.config import EvaluationConfig, ExperimentConfig
from locvlm.geometry import make_geometry
from locvlm.model.tokenizer import TextEncoder
from locvlm.model.variants import LocVLM
from locvlm.pixels import open_image, to_pixels
from locvlm.prompts import render_prompt


class Request(Protocol):
    """One question about one image. `prompt` is the user's words alone; the chat frame is added here."""

    @property
    def id(self) -> str: ...  # noqa: D102

    @property
    def image(self) -> Path: ...  # noqa: D102

    @property
    def prompt(self) -> str: ...  # noqa: D102


class SampleNoise(LogitsProcessor):  # type: ignore[misc]
    """Multinomial sampling by the Gumbel-max trick: arg-max of logits / T + Gumbel noise is a draw from softmax.

    Each row has its own generator, keyed by (seed, request id), so a draw depends on nothing else in the batch.
    """

    def __init__(self, temperature: float, seed: int, ids: Sequence[str]) -> None:
        self.temperature = temperature
        self.generators = []
        for request_id in ids:
            key = hashlib.blake2b(f"{seed}:{request_id}".encode(), digest_size=8).digest()
            self.generators.append(torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [batch, vocabulary]."""
        noise = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        exponential = (-torch.log(noise.clamp_min(1e-20))).clamp_min(1e-20)
        gumbel = -torch.log(exponential)
        return scores.float() / self.temperature + gumbel.to(scores.device)


@torch.inference_mode()
def answers(
    model: LocVLM,
    encoder: TextEncoder,
    config: ExperimentConfig,
    requests: Sequence[Request],
    decoding: EvaluationConfig,
) -> list[str]:
    """One answer a request, in order; batches of `decoding.batch_size`, requests of like length together.

    Raises DataError for an image that cannot be read.
    """
    results = [""] * len(requests)
    texts = [render_prompt(request.prompt, config.prompts.system) for request in requests]
    encoded = [item.ids for item in encoder.encode(texts)]
    order = sorted(range(len(requests)), key=lambda i: (len(encoded[i]), i))
    for begin in range(0, len(order), decoding.batch_size):
        chunk = order[begin : begin + decoding.batch_size]
        batch = [requests[i] for i in chunk]
        pictures = _pictures(batch, config)
        new_ids = _generate(model, encoder, batch, [encoded[i] for i in chunk], pictures, decoding)
        for i, ids in zip(chunk, new_ids, strict=True):
            results[i] = encoder.decode(ids)
    return results


def _pictures(requests: Sequence[Request], config: ExperimentConfig) -> torch.Tensor:
    """[batch, 3, side, side]; an image asked about several times is read once."""
    geometry = make_geometry(config.geometry)
    pixels = {request.image: to_pixels(geometry.apply(open_image(request.image))) for request in requests}
    return torch.stack([torch.from_numpy(pixels[request.image]) for request in requests])


def _generate(
    model: LocVLM,
    encoder: TextEncoder,
    requests: Sequence[Request],
    ids: Sequence[list[int]],
    pixels: torch.Tensor,
    decoding: EvaluationConfig,
) -> list[list[int]]:
    device = model.lm_head.weight.device
    length = max(len(row) for row in ids)
    input_ids = torch.full((len(ids), length), encoder.pad_id)
    mask = torch.zeros((len(ids), length), dtype=torch.long)
    for row, values in enumerate(ids):  # left padding: the answer must follow the prompt directly
        input_ids[row, length - len(values) :] = torch.tensor(values)
        mask[row, length - len(values) :] = 1
    processors = LogitsProcessorList()
    if decoding.temperature > 0:
        processors.append(SampleNoise(decoding.temperature, decoding.seed, [request.id for request in requests]))
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        pixel_values=pixels.to(device, model.lm_head.weight.dtype),
        logits_processor=processors,
        generation_config=GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            suppress_tokens=[encoder.image_id],
            bos_token_id=encoder.bos_id,
            eos_token_id=encoder.stop_id,
            pad_token_id=encoder.pad_id,
        ),
    )
    return [row.tolist() for row in output[:, length:]]
