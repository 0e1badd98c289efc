"""Other people's visual LLMs as answerers: any image-text-to-text folder of transformers, by transformers or by vLLM.

A folder is read as it is: its processor makes the pixels, and `stock_family` says how a question is framed: as its
publishers do for BLIP-2, InstructBLIP and Kosmos-2, by its chat template for any other (a LLaVA folder without one: the
Vicuna v1 layout). Weights are never made up: a folder that does not fill its architecture is an error.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, LogitsProcessorList
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import ModelOutput

from locvlm.config import SYSTEM, CoordinateConfig, EvaluationConfig, FamilyConfig, GeometryConfig, PromptConfig
from locvlm.errors import CheckpointError, ConfigError
from locvlm.geometry import to_rgb
from locvlm.model.generate import Request, SampleNoise, batch_order, sample_seed
from locvlm.model.llava import LLAVA_PLACES
from locvlm.prompts import (
    BLIP_QUESTION,
    BLIP_SHORT_QUESTION,
    IMAGE,
    KOSMOS_LOC,
    KOSMOS_QUESTION,
    KOSMOS_REV,
    LLAVA_LOC,
    LLAVA_REV,
    VICUNA_LAYOUT,
    is_own_turn,
    render_family,
)

_BROKEN = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
_KOSMOS_SIDE = 32  # patches, of its 1024 location tokens
_KOSMOS_TAGS = re.compile(r"<object>.*?</object>|<[^<>]*>")
_TOWERS = ("vision_model", "model.vision_tower")  # the modules that see one image a row and nothing else


class StockModel:
    """A folder of transformers. `config` says how it is asked."""

    def __init__(self, model: Any, processor: Any, config: FamilyConfig) -> None:
        self.model = model
        self.processor = processor
        self.config = config
        text = model.config.get_text_config(decoder=True)
        self._writes_apart = bool(text.is_encoder_decoder)  # the answer does not begin with the prompt
        tokenizer = processor.tokenizer
        # the answer must follow the prompt directly; an encoder counts places from the image, which stands in front
        tokenizer.padding_side = "right" if self._writes_apart else "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        stops = model.generation_config.eos_token_id
        stops = text.eos_token_id if stops is None else stops
        image_id = getattr(model.config, "image_token_id", None)
        self._never = [] if image_id is None else [image_id]  # its output row is not trained
        self._stops = [tokenizer.eos_token_id] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        self._start = text.decoder_start_token_id if self._writes_apart else None

    @torch.inference_mode()
    def answers(self, requests: Sequence[Request], decoding: EvaluationConfig) -> list[str]:
        """One answer a request, in order; batches of `decoding.batch_size`, an image of a batch is read once and, where
        the model has a vision tower of its own, goes through it once.

        Raises DataError for an image that cannot be read.
        """
        results = [""] * len(requests)
        texts = [render_family(request.prompt, self.config) for request in requests]
        order = batch_order(requests, [len(text) for text in texts])
        for begin in range(0, len(order), decoding.batch_size):
            for chunk in self._batches(order[begin : begin + decoding.batch_size], texts):
                new_ids = self._generate([requests[i] for i in chunk], [texts[i] for i in chunk], decoding)
                for i, ids in zip(chunk, new_ids, strict=True):
                    results[i] = self._decode(ids, requests[i].prompt)
        return results

    def _batches(self, chunk: list[int], texts: Sequence[str]) -> list[list[int]]:
        """The chunk as it is, but for Kosmos-2: transformers' class counts padding into the places of new tokens, so
        that only texts of one length may share a batch."""
        if self.config.family != "kosmos-2":
            return [chunk]
        alike: dict[int, list[int]] = {}
        for i in chunk:
            alike.setdefault(len(self.processor.tokenizer(texts[i]).input_ids), []).append(i)
        return list(alike.values())

    def _generate(
        self, requests: Sequence[Request], texts: Sequence[str], decoding: EvaluationConfig
    ) -> list[list[int]]:
        pictures = _pictures(requests)
        images = [[pictures[request.image]] for request in requests]
        inputs = self._inputs(texts, images)
        processors = LogitsProcessorList()
        if decoding.temperature > 0:
            processors.append(SampleNoise(decoding.temperature, decoding.seed, [request.id for request in requests]))
        names = list(pictures)
        with _seen_once(self.model, [names.index(request.image) for request in requests]):
            output = self.model.generate(
                **inputs,
                logits_processor=processors,
                generation_config=GenerationConfig(
                    max_new_tokens=decoding.max_new_tokens,
                    do_sample=False,
                    suppress_tokens=self._never or None,
                    eos_token_id=self._stops,
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                    decoder_start_token_id=self._start,
                ),
            )
        begin = 1 if self._writes_apart else inputs["input_ids"].shape[1]
        return [row.tolist() for row in output[:, begin:]]

    def _inputs(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
        """The batch as the model takes it. Kosmos-2's and BLIP's processors take one flat list of images."""
        flat = self.config.family in _OWN_FRAMES
        shown = [image for row in images for image in row] if flat else [list(row) for row in images]
        inputs = self.processor(text=list(texts), images=shown, padding=True, return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)  # the dtype of the pixels; ids stay whole numbers

    def _decode(self, ids: list[int], prompt: str) -> str:
        end = next((place for place, token in enumerate(ids) if token in self._stops), len(ids))
        text = str(self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True))
        if self.config.family == "kosmos-2":
            asks_place = is_own_turn(prompt, self.config.loc_pred) and not is_own_turn(prompt, self.config.rev_loc)
            text = text if asks_place else _KOSMOS_TAGS.sub("", text)
        return text.strip()


class VllmModel:
    """The same folder behind vLLM, which batches by itself and shares the image prefix of equal images.

    Sampled answers are seeded for each request, but by vLLM's own generator: they differ from those of transformers.
    """

    def __init__(self, folder: Path, config: FamilyConfig) -> None:
        if find_spec("vllm") is None:
            raise ConfigError(
                f"loading the model {folder} with vLLM: the package vllm is not installed; install it where the GPU is "
                "(pip install vllm), or use --engine transformers"
            )
        self.config = config
        self._vllm = import_module("vllm")
        self._engine = self._vllm.LLM(model=str(folder), limit_mm_per_prompt={"image": 1}, enable_prefix_caching=True)

    def answers(self, requests: Sequence[Request], decoding: EvaluationConfig) -> list[str]:
        """One answer a request, in order. Raises DataError for an image that cannot be read."""
        pictures = _pictures(requests)
        prompts = [
            {
                "prompt": render_family(request.prompt, self.config),
                "multi_modal_data": {"image": pictures[request.image]},
            }
            for request in requests
        ]
        parameters = [
            self._vllm.SamplingParams(
                temperature=decoding.temperature,
                max_tokens=decoding.max_new_tokens,
                seed=sample_seed(decoding.seed, request.id),
            )
            for request in requests
        ]
        outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
        return [str(output.outputs[0].text).strip() for output in outputs]


# the families whose processors put the image in front of the text by themselves
_OWN_FRAMES: dict[str, dict[str, Any]] = {
    "blip-2": {"question": BLIP_QUESTION, "short_question": BLIP_SHORT_QUESTION},
    "instructblip": {"question": "{question}", "short_question": BLIP_SHORT_QUESTION},
    "kosmos-2": {
        "question": KOSMOS_QUESTION,
        "loc_pred": KOSMOS_LOC,
        "rev_loc": KOSMOS_REV,
        "coordinates": CoordinateConfig(representation="patches", n_bins=_KOSMOS_SIDE),
    },
}


def stock_family(folder: Path) -> FamilyConfig:
    """How the model of a folder is asked; reads its config and processor, no weights. Raises CheckpointError for a
    folder whose model nothing says how to ask."""
    refuse_unknown(folder)
    name = model_type(folder)
    processor = _processor(folder)
    geometry = _geometry(processor.image_processor)
    pixels = "" if geometry is not None else type(processor.image_processor).__name__
    if name in _OWN_FRAMES:
        return FamilyConfig(family=name, geometry=geometry, pixels=pixels, **_OWN_FRAMES[name])
    own: dict[str, Any] = {}
    if name == "llava":
        own = {"loc_pred": LLAVA_LOC, "rev_loc": LLAVA_REV, "coordinates": LLAVA_PLACES}
    if not processor.chat_template and name == "llava":
        layout = VICUNA_LAYOUT.replace("{system}", SYSTEM).replace("{turn}", f"{IMAGE}\n{{turn}}")
        layout, system = layout.replace(IMAGE, processor.image_token), SYSTEM
    elif processor.chat_template:
        layout, system = _template_layout(processor), ""
    else:
        raise CheckpointError(
            f"loading the model {folder}: it is a {name} without a chat template, so nothing says how it is asked; "
            "add the chat_template.jinja of its publisher to the folder (known without one: llava, "
            f"{', '.join(_OWN_FRAMES)})"
        )
    return FamilyConfig(
        family="llava-hf" if name == "llava" else name,
        layout=layout,
        question="{question}",
        geometry=geometry,
        pixels=pixels,
        prompts=PromptConfig(system=system),
        **own,
    )


def refuse_unknown(folder: Path) -> None:
    """Raises CheckpointError for a folder whose model is of no kind that can be asked about images."""
    name = model_type(folder)
    if name not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise CheckpointError(
            f"opening the model {folder}: its config.json says {name!r}, which is no visual LLM that is known here; "
            "needed is a LocVLM checkpoint; LLaVA, Shikra or Video-ChatGPT in LLaVA's own layout; an "
            "image-text-to-text model of transformers (llava, blip-2, instructblip, kosmos-2, or another with a chat "
            "template); or an endpoint, openai:NAME with --url"
        )


def _template_layout(processor: Any) -> str:
    """The chat template around one user turn of an image and `{turn}`."""
    content = [{"type": "image"}, {"type": "text", "text": "{turn}"}]
    turns = [{"role": "user", "content": content}]
    text = str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    begin = processor.tokenizer.bos_token or ""
    puts_it = processor.tokenizer("a").input_ids[:1] == [processor.tokenizer.bos_token_id]
    return text.removeprefix(begin) if puts_it else text  # some templates write it too: it must not stand there twice


def _geometry(images: Any) -> GeometryConfig | None:
    """What an image processor does, as one of our geometries; None when it is none of them."""
    size, crop = images.size, getattr(images, "crop_size", None)
    short, height, width = (getattr(size, name, None) for name in ("shortest_edge", "height", "width"))
    crops = bool(getattr(images, "do_center_crop", False))
    pads = bool(getattr(images, "do_pad", False))
    side = height if height is not None and height == width else short
    if not getattr(images, "do_resize", False) or side is None:
        return None
    if crops and (crop is None or not crop.height == crop.width == side):
        return None
    if pads:
        return GeometryConfig(kind="letterbox", side=side)
    if short is None:
        return GeometryConfig(kind="squash", side=side)
    return GeometryConfig(kind="crop", side=side) if crops else None


@contextmanager
def _seen_once(model: Any, rows: Sequence[int]) -> Iterator[None]:
    """Inside, an image that several rows of a batch share goes through the vision tower once. rows: the number of each
    row's image, counted in order of appearance. Models without one of `_TOWERS` see every row."""
    tower = next((module for name, module in model.named_modules() if name in _TOWERS), None)
    firsts = [rows.index(number) for number in range(max(rows) + 1)]
    if tower is None or len(firsts) == len(rows):
        yield
        return

    def only_firsts(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0][firsts], *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": kwargs["pixel_values"][firsts]}

    def for_all(_module: Any, _args: Any, output: Any) -> Any:
        return _spread(output, torch.tensor(rows, device=model.device))

    hooks = [tower.register_forward_pre_hook(only_firsts, with_kwargs=True), tower.register_forward_hook(for_all)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _spread(output: Any, rows: torch.Tensor) -> Any:
    """The rows of every tensor of a model's output."""
    if isinstance(output, torch.Tensor):
        return output.index_select(0, rows)
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _spread(value, rows) for name, value in output.items()})
    return tuple(_spread(value, rows) for value in output) if isinstance(output, tuple) else output


def load_stock(folder: Path, config: FamilyConfig, device: torch.device, dtype: torch.dtype) -> StockModel:
    """Open a folder in eval mode, to be asked as `config` says. Raises CheckpointError for one that is not whole, or
    that transformers does not know as an image-text-to-text model."""
    doing = f"loading the model {folder}"
    processor = _processor(folder)
    try:
        model, notes = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except _BROKEN as error:
        raise CheckpointError(f"{doing}: {_first_line(error)}; the folder may be cut short, copy it again") from None
    absent = sorted(notes["missing_keys"]) + sorted(notes["mismatched_keys"], key=str)
    if absent:
        raise CheckpointError(
            f"{doing}: {len(absent)} weights are missing or of another shape, {absent[:3]}; the folder is cut short or "
            "is another model"
        )
    return StockModel(model.to(device).eval(), _completed(processor, model.config), config)


def model_type(folder: Path) -> str:
    """What config.json says the model is. Raises CheckpointError when nothing says so."""
    try:
        values = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"loading the model {folder}: its config.json cannot be read ({_first_line(error)}); needed is a model "
            "folder in the Hugging Face layout"
        ) from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise CheckpointError(f"loading the model {folder}: its config.json does not name a model_type")
    return str(values["model_type"])


def _processor(folder: Path) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except _BROKEN as error:
        raise CheckpointError(
            f"loading the processor of {folder}: {_first_line(error)}; needed are its tokenizer and its "
            "processor_config.json or preprocessor_config.json"
        ) from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise CheckpointError(
            f"loading the processor of {folder}: it is a {type(processor).__name__}, which prepares no images and text "
            "together; copy processor_config.json and preprocessor_config.json of the publisher into the folder"
        )
    return processor


def _completed(processor: Any, config: Any) -> Any:
    """Folders of before transformers 4.46 leave out how many tokens an image takes; the model's config has it."""
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token
    return processor


def _pictures(requests: Sequence[Request]) -> dict[Path, Image.Image]:
    """The image of each request, read once. Of a video, which these models are shown as one frame, the middle one."""
    shown = {request.image: request.open() for request in {request.image: request for request in requests}.values()}
    return {
        name: to_rgb(opened if isinstance(opened, Image.Image) else opened[len(opened) // 2])
        for name, opened in shown.items()
    }


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
