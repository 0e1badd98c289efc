"""Answers of a model: batched, an image shared by its prompts, each sample with its own random numbers (section 4)."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPooling

from locvlm.config import EvaluationConfig, ExperimentConfig, FamilyConfig
from locvlm.geometry import make_geometry
from locvlm.model.cache import with_room
from locvlm.model.tokenizer import TextEncoder
from locvlm.model.variants import LocVLM
from locvlm.pixels import to_pixels
from locvlm.prompts import render_family, render_prompt


class Request(Protocol):
    """One question about one image or video. `image` tells it from others, `open` decodes it: the picture, or the
    sampled frames of a video (DataError if it cannot be read).

    `prompt` is the user's words alone; the chat frame is added here.
    """

    @property
    def id(self) -> str: ...  # noqa: D102

    @property
    def image(self) -> Path: ...  # noqa: D102

    @property
    def prompt(self) -> str: ...  # noqa: D102

    def open(self) -> Image.Image | Sequence[Image.Image]: ...  # noqa: D102


class SampleNoise(LogitsProcessor):  # type: ignore[misc]
    """Multinomial sampling by the Gumbel-max trick: arg-max of logits / T + Gumbel noise is a draw from softmax.

    Each row has its own generator, keyed by (seed, request id), so a draw depends on nothing else in the batch.
    """

    def __init__(self, temperature: float, seed: int, ids: Sequence[str]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(sample_seed(seed, request_id)) for request_id in ids]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [batch, vocabulary]."""
        noise = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        exponential = (-torch.log(noise.clamp_min(1e-20))).clamp_min(1e-20)
        gumbel = -torch.log(exponential)
        return scores.float() / self.temperature + gumbel.to(scores.device)


def sample_seed(seed: int, request_id: str) -> int:
    """The seed of one request's own random numbers, below 2**63."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{request_id}".encode(), digest_size=8).digest(), "big") >> 1


@torch.inference_mode()
def answers(
    model: LocVLM,
    encoder: TextEncoder,
    config: ExperimentConfig | FamilyConfig,
    requests: Sequence[Request],
    decoding: EvaluationConfig,
) -> list[str]:
    """One answer a request, in order; batches of `decoding.batch_size`. `config`: the one that the model was trained
    with, or how a model that others trained in LLaVA's architecture is asked (which must have a geometry).

    Requests about one image stand together: their batch reads and encodes it once. Beyond that, prompts of like length
    share a batch. Raises DataError for an image that cannot be read.
    """
    results = [""] * len(requests)
    if isinstance(config, FamilyConfig):
        texts = [render_family(request.prompt, config) for request in requests]
    else:
        texts = [render_prompt(request.prompt, config.prompts.system) for request in requests]
    encoded = [item.ids for item in encoder.encode(texts, n_image_tokens=1)]
    order = batch_order(requests, [len(ids) for ids in encoded])
    for begin in range(0, len(order), decoding.batch_size):
        chunk = order[begin : begin + decoding.batch_size]
        shown = {requests[i].image: requests[i] for i in chunk}
        seen = dict(zip(shown, _look(model, config, list(shown.values())), strict=True))
        groups: dict[tuple[int, ...], list[int]] = {}  # one, but for videos of odd lengths and turns of several kinds
        for i in chunk:
            before = encoded[i][: encoded[i].index(encoder.image_id)]
            groups.setdefault((len(seen[requests[i].image]), *before), []).append(i)
        for alike in groups.values():
            batch = [requests[i] for i in alike]
            new_ids = _generate(model, encoder, batch, [encoded[i] for i in alike], seen, decoding)
            for i, ids in zip(alike, new_ids, strict=True):
                results[i] = encoder.decode(ids)
    return results


def batch_order(requests: Sequence[Request], lengths: Sequence[int]) -> list[int]:
    """The numbers of the requests image by image; the images by their longest prompt, so that batches hold little
    padding. `lengths`: of the prompts, in any unit."""
    longest: dict[Path, int] = {}
    for request, length in zip(requests, lengths, strict=True):
        longest[request.image] = max(length, longest.get(request.image, 0))
    place = {image: number for number, image in enumerate(longest)}
    images = [request.image for request in requests]
    return sorted(range(len(requests)), key=lambda i: (longest[images[i]], place[images[i]], lengths[i], i))


def _look(model: LocVLM, config: ExperimentConfig | FamilyConfig, shown: Sequence[Request]) -> list[torch.Tensor]:
    """The visual tokens of each image or video, [tokens, language width]; each is read and encoded once."""
    assert config.geometry is not None
    geometry = make_geometry(config.geometry)
    pictures: list[torch.Tensor] = []
    frames: list[int] = []
    for request in shown:
        opened = request.open()
        images = [opened] if isinstance(opened, Image.Image) else list(opened)
        frames.append(0 if isinstance(opened, Image.Image) else len(images))
        pictures += [torch.from_numpy(to_pixels(geometry.apply(image))) for image in images]
    weight = model.lm_head.weight
    return list(model.visual_tokens(torch.stack(pictures).to(weight.device, weight.dtype), frames).pooler_output)


def _visual_prefix(
    model: LocVLM, prefix: Sequence[int], visual: Sequence[torch.Tensor], rows: Sequence[int], room: int
) -> Cache:
    """The language model's keys and values for `prefix`, the tokens up to the end of the image block, which all prompts
    share, with room for as many tokens more. Each image passes through once; row i of the result is that of
    `visual[rows[i]]`."""
    device = model.lm_head.weight.device
    cache: Cache = model.model(
        input_ids=torch.tensor([list(prefix)] * len(visual), device=device),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(visual))},
        use_cache=True,
    ).past_key_values
    return with_room(cache, torch.tensor(rows, device=device), room)


def _generate(
    model: LocVLM,
    encoder: TextEncoder,
    requests: Sequence[Request],
    unexpanded: Sequence[list[int]],
    seen: Mapping[Path, torch.Tensor],
    decoding: EvaluationConfig,
) -> list[list[int]]:
    """`unexpanded`: prompts in which one token stands for the image; all images of the batch have as many tokens."""
    device = model.lm_head.weight.device
    images = list(dict.fromkeys(request.image for request in requests))
    place = unexpanded[0].index(encoder.image_id)
    n_visual = len(seen[images[0]])
    ids = [[*row[:place], *[encoder.image_id] * n_visual, *row[place + 1 :]] for row in unexpanded]
    n_prefix = place + n_visual
    rows = [images.index(request.image) for request in requests]
    length = max(len(row) for row in ids)
    room = length - n_prefix + decoding.max_new_tokens
    cache = _visual_prefix(model, ids[0][:n_prefix], [seen[image] for image in images], rows, room)
    input_ids = torch.full((len(ids), length), encoder.pad_id)
    mask = torch.zeros((len(ids), length), dtype=torch.long)
    for row, values in enumerate(ids):  # padding behind the image: the answer must follow the prompt directly
        question = values[n_prefix:]
        input_ids[row, :n_prefix] = torch.tensor(values[:n_prefix])
        input_ids[row, length - len(question) :] = torch.tensor(question)
        mask[row, :n_prefix] = 1
        mask[row, length - len(question) :] = 1
    processors = LogitsProcessorList()
    if decoding.temperature > 0:
        processors.append(SampleNoise(decoding.temperature, decoding.seed, [request.id for request in requests]))
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        past_key_values=cache,
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
