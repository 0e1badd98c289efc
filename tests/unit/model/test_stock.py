"""Other people's checkpoints as answerers, on a LLaVA of the llava-hf layout with random weights."""

import json
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from locvlm.config import SYSTEM, EvaluationConfig
from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.model.generate import sample_seed
from locvlm.model.stock import StockModel, VllmModel, load_stock, model_type, stock_family
from locvlm.model.tokenizer import word_tokenizer
from locvlm.pixels import open_image
from locvlm.prompts import render_family

CPU = torch.device("cpu")
# the template of llava-hf/llava-1.5-7b-hf for one user turn: no system text
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Asked:
    id: str
    image: Path
    prompt: str

    def open(self) -> Image.Image:
        return open_image(self.image)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of a few ten thousand parameters as llava-hf stores it."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = word_tokenizer(["A chat between USER ASSISTANT Describe the dog in image cat is on a table left right"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.lm_head.weight.data *= 20  # far from ties
    model.lm_head.weight.data[:261] = 0  # words, not special tokens and bytes
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Asked]:
    """Prompts of unlike length about three images: tall, wide, greyscale."""
    folder = tmp_path_factory.mktemp("images")
    noise = Image.effect_noise((60, 40), 90)
    pictures = (noise.convert("RGB").rotate(90, expand=True), Image.radial_gradient("L").resize((90, 31)), noise)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    prompts = ["Describe the dog in image", "left", "Describe the cat on the table in image, is the dog right or left"]
    return [Asked(f"{i}-{k}", folder / f"{i}.png", prompts[k]) for k in range(3) for i in range(3)]


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def opened(folder: Path) -> StockModel:
    return load_stock(folder, stock_family(folder), CPU, torch.float32)


def decoding(**values: Any) -> EvaluationConfig:
    return EvaluationConfig(**{"temperature": 0.0, "max_new_tokens": 6, **values})


def test_answers_are_those_of_transformers_one_by_one(llava: Path, asked: list[Asked]) -> None:
    stock = opened(llava)
    got = stock.answers(asked, decoding(batch_size=4))
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    processor = LlavaProcessor.from_pretrained(llava)
    expected = []
    for ask in asked:
        text = f"USER: <image>\n{ask.prompt} ASSISTANT:"
        inputs = processor(text=[text], images=[ask.open().convert("RGB")], return_tensors="pt")
        assert inputs["input_ids"][0, :2].tolist().count(processor.tokenizer.bos_token_id) == 1
        never = [processor.image_token_id]
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=never)
        new = ids[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert got == expected
    assert len(set(got)) > 1
    assert all(got)


def test_answers_depend_neither_on_the_batch_nor_on_the_order(llava: Path, asked: list[Asked]) -> None:
    stock = opened(llava)
    for temperature in (0.0, 0.7):
        alone = stock.answers(asked, decoding(temperature=temperature, batch_size=1))
        assert alone == stock.answers(asked, decoding(temperature=temperature, batch_size=9))
        assert alone == stock.answers(asked[::-1], decoding(temperature=temperature, batch_size=4))[::-1]
    assert alone != stock.answers(asked, decoding(temperature=0.7, seed=1))


def test_an_answer_ends_at_the_stop_token(llava: Path, asked: list[Asked]) -> None:
    stock = opened(llava)
    ask, tokenizer = asked[0], stock.processor.tokenizer
    (ids,) = stock._generate([ask], [render_family(ask.prompt, stock.config)], decoding())
    assert len(ids) == 6
    stock.model.generation_config.eos_token_id = [ids[2], tokenizer.eos_token_id]
    stopping = StockModel(stock.model, stock.processor, stock.config)
    assert stopping.answers(asked, decoding())[0] == tokenizer.decode(ids[: ids.index(ids[2])]).strip()


def test_a_llava_without_a_chat_template_is_asked_in_the_vicuna_layout(llava: Path, tmp_path: Path) -> None:
    folder = copy(llava, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    asked = render_family("Describe the dog", stock_family(folder))
    assert asked == f"{SYSTEM} USER: <image>\nDescribe the dog ASSISTANT:"
    assert render_family("Describe", stock_family(llava)) == "USER: <image>\nDescribe ASSISTANT:"


def test_a_begin_token_that_the_template_writes_too_stands_once(
    llava: Path, asked: list[Asked], tmp_path: Path
) -> None:
    folder = copy(llava, tmp_path / "begun")
    (folder / "chat_template.jinja").write_text("<s>" + TEMPLATE)
    once = opened(llava).answers(asked, decoding())
    assert opened(folder).answers(asked, decoding()) == once


def test_a_processor_of_the_old_form_learns_the_patch_size_from_the_model(
    llava: Path, asked: list[Asked], tmp_path: Path
) -> None:
    folder = copy(llava, tmp_path / "old")
    values = json.loads((folder / "processor_config.json").read_text())
    for key in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        values.pop(key)
    (folder / "processor_config.json").write_text(json.dumps(values))
    got = opened(folder).answers(asked[:3], decoding())
    assert got == opened(llava).answers(asked[:3], decoding())


def test_a_tokenizer_without_a_pad_token_still_batches(llava: Path, asked: list[Asked]) -> None:
    whole = opened(llava)
    expected = whole.answers(asked, decoding())
    whole.processor.tokenizer.pad_token = None
    assert StockModel(whole.model, whole.processor, whole.config).answers(asked, decoding()) == expected


@dataclass(frozen=True)
class Watched(Asked):
    """A video of three frames."""

    def open(self) -> list[Image.Image]:  # type: ignore[override]
        return [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue", "green")]


def test_of_a_video_the_middle_frame_is_shown(llava: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "blue.png")
    stock = opened(llava)
    (still,) = stock.answers([Asked("0", tmp_path / "blue.png", "Describe")], decoding())
    assert stock.answers([Watched("0", tmp_path / "v.mp4", "Describe")], decoding()) == [still]


def test_an_image_that_cannot_be_read_is_named(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(DataError, match=r"torn\.png"):
        opened(llava).answers([Asked("0", tmp_path / "torn.png", "Describe")], decoding())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
            "says 'gpt2'.*needed is a LocVLM",
        ),
        (lambda folder: cut(folder / "model.safetensors"), "cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cut short"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"), "loading the processor"),
    ],
)
def test_a_folder_that_is_not_whole_gives_one_clear_message(
    llava: Path, tmp_path: Path, harm: Any, message: str
) -> None:
    folder = copy(llava, tmp_path / "harmed")
    harm(folder)
    with pytest.raises(CheckpointError, match=message):
        opened(folder)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "does not name a model_type")]
)
def test_a_config_that_names_no_model_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"its config\.json {message}"):
        model_type(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_missing_weights_are_never_made_up(llava: Path, tmp_path: Path) -> None:
    folder = copy(llava, tmp_path / "holes")
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    state = {name: value for name, value in model.state_dict().items() if "multi_modal_projector" not in name}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(CheckpointError, match="4 weights are missing"):
        opened(folder)


def test_a_folder_of_pictures_only_is_refused(tmp_path: Path) -> None:
    LlavaConfig().save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="needed are its tokenizer and its processor_config"):
        opened(tmp_path)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_one_message_says_what_to_install(llava: Path) -> None:
    with pytest.raises(ConfigError, match="pip install vllm"):
        VllmModel(llava, stock_family(llava))


# the part of vLLM's offline interface that is used, with its names; the model is left out
FAKE_VLLM = """
from dataclasses import dataclass

@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    seed: int

@dataclass
class Completion:
    text: str

@dataclass
class RequestOutput:
    outputs: list

class LLM:
    def __init__(self, *, model, limit_mm_per_prompt, enable_prefix_caching):
        self.options = (model, limit_mm_per_prompt, enable_prefix_caching)

    def generate(self, prompts, params, *, use_tqdm):
        self.seen = list(zip(prompts, params, strict=True))
        return [RequestOutput([Completion(" " + p["prompt"] + "\\n")]) for p in prompts]
"""


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_is_given_prompts_images_and_a_seed_for_each_request(
    llava: Path, asked: list[Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    model = VllmModel(llava, stock_family(llava))
    answers = model.answers(asked, decoding(temperature=0.2, seed=3))
    assert answers == [f"USER: <image>\n{ask.prompt} ASSISTANT:" for ask in asked]
    assert model._engine.options == (str(llava), {"image": 1}, True)
    prompt, parameters = model._engine.seen[4]
    assert prompt["multi_modal_data"]["image"].size == asked[4].open().size
    assert prompt["multi_modal_data"]["image"].mode == "RGB"
    assert (parameters.temperature, parameters.max_tokens) == (0.2, 6)
    assert parameters.seed == sample_seed(3, asked[4].id)
    monkeypatch.delitem(sys.modules, "vllm")
