"""BLIP-2, InstructBLIP and Kosmos-2 asked as their publishers ask them, with random weights in their layouts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from locvlm.config import EvaluationConfig, GeometryConfig
from locvlm.coordinates import make_location_format
from locvlm.errors import CheckpointError
from locvlm.model.generate import SampleNoise
from locvlm.model.stock import StockModel, load_stock, stock_family
from locvlm.model.tokenizer import word_tokenizer
from locvlm.pixels import open_image
from locvlm.prompts import SHORT_ANSWER_SUFFIX, render_family

CPU = torch.device("cpu")
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
FORMER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 32,
}
N_QUERIES = 4
SPECIAL = 5 + 256  # special tokens and bytes of the word tokenizer


@dataclass(frozen=True)
class Asked:
    id: str
    image: Path
    prompt: str

    def open(self) -> Image.Image:
        return open_image(self.image)


def tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    made = word_tokenizer(["Question Short answer Answer Describe the dog in image cat is on a table left right It"])
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.bos_token_id)]
    )
    made.padding_side = padding_side
    return made


def text_config(kind: str, words: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids: dict[str, Any] = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids |= {"vocab_size": len(words), "tie_word_embeddings": False}
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
        return dict(T5Config(**sizes, **ids, decoder_start_token_id=words.pad_token_id).to_dict())
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "opt":
        return dict(
            OPTConfig(**sizes, **ids, word_embed_proj_dim=32, ffn_dim=48, max_position_embeddings=128).to_dict()
        )
    return dict(LlamaConfig(**sizes, **ids, intermediate_size=48).to_dict())


def stir(model: torch.nn.Module, head: torch.nn.Linear, n_words: int) -> None:
    """Weights so large that prompt and image matter and nothing ties, and a head that says words, no special tokens."""
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.normal_(std=0.3)
        head.weight[:SPECIAL] = head.weight[n_words:] = 0


def blip2(folder: Path, kind: str) -> None:
    words = tokenizer()
    former = Blip2QFormerConfig(**FORMER, vocab_size=100).to_dict()
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=former,
        text_config=text_config(kind, words),
        num_query_tokens=N_QUERIES,
        tie_word_embeddings=False,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    stir(model, model.language_model.lm_head, len(words))
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 28, "width": 28})
    Blip2Processor(images, words, num_query_tokens=N_QUERIES).save_pretrained(folder)


def instructblip(folder: Path, kind: str) -> None:
    words, former_words = tokenizer(), tokenizer("right")
    former = InstructBlipQFormerConfig(**FORMER, vocab_size=len(former_words)).to_dict()
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**VISION).to_dict(),
        qformer_config=former,
        text_config=text_config(kind, words),
        num_query_tokens=N_QUERIES,
        tie_word_embeddings=False,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    model = InstructBlipForConditionalGeneration(config)
    stir(model, model.language_model.lm_head, len(words))
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 28, "width": 28})
    InstructBlipProcessor(images, words, former_words, num_query_tokens=N_QUERIES).save_pretrained(folder)


def kosmos2(folder: Path, _kind: str) -> None:
    words = tokenizer()
    n_words = len(words)
    words.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    images = CLIPImageProcessorPil(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28})
    processor = Kosmos2Processor(images, words)
    config = Kosmos2Config(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "max_position_embeddings": 160,
            "tie_word_embeddings": False,
            "embed_dim": 32,
            "layers": 2,
            "ffn_dim": 48,
            "attention_heads": 2,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        },
        vision_config=VISION,
        latent_query_num=64,
        tie_word_embeddings=False,
    )
    model = Kosmos2ForConditionalGeneration(config)
    stir(model, model.text_model.lm_head, n_words)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


KINDS: dict[str, tuple[Callable[[Path, str], None], str]] = {
    "blip-2 opt": (blip2, "opt"),
    "blip-2 t5": (blip2, "t5"),
    "instructblip llama": (instructblip, "llama"),
    "instructblip t5": (instructblip, "t5"),
    "kosmos-2": (kosmos2, ""),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    made = {name: root / name.replace(" ", "-") for name in KINDS}
    for number, (name, (build, kind)) in enumerate(KINDS.items()):
        torch.manual_seed(number)
        build(made[name], kind)
    return made


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Asked]:
    """Prompts of unlike length about two images, one of them greyscale."""
    folder = tmp_path_factory.mktemp("images")
    waves = Image.linear_gradient("L").resize((60, 40)).rotate(30)
    for number, picture in enumerate((waves.convert("RGB"), Image.radial_gradient("L").resize((90, 31)))):
        picture.save(folder / f"{number}.png")
    prompts = ["Describe the dog in image", "left", "Describe the cat on the table in image, is the dog right or left"]
    return [Asked(f"{i}-{k}", folder / f"{i}.png", prompts[k]) for k in range(3) for i in range(2)]


def opened(folder: Path) -> StockModel:
    return load_stock(folder, stock_family(folder), CPU, torch.float32)


def greedy(**values: Any) -> EvaluationConfig:
    return EvaluationConfig(**{"temperature": 0.0, "max_new_tokens": 5, **values})


@pytest.mark.parametrize("name", KINDS)
def test_answers_are_those_of_transformers_one_by_one(folders: dict[str, Path], asked: list[Asked], name: str) -> None:
    stock = opened(folders[name])
    got = stock.answers(asked, greedy(batch_size=4))
    model, processor = stock.model, stock.processor
    expected = []
    for ask in asked:
        text = ask.prompt if name.startswith("instructblip") else f"Question: {ask.prompt} Answer:"
        inputs = processor(text=[text], images=[ask.open().convert("RGB")], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]
        new = ids[1:] if name.endswith("t5") else ids[inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert got == expected
    assert len(set(got)) > 3
    assert all(got)


@pytest.mark.parametrize("name", KINDS)
def test_answers_depend_neither_on_the_batch_nor_on_the_order(
    folders: dict[str, Path], asked: list[Asked], name: str
) -> None:
    stock = opened(folders[name])
    alone = stock.answers(asked, greedy(temperature=0.7, batch_size=1))
    assert alone == stock.answers(asked[::-1], greedy(temperature=0.7, batch_size=4))[::-1]
    assert alone != stock.answers(asked, greedy(temperature=0.7, batch_size=4, seed=1))


@pytest.mark.parametrize("name", KINDS)
def test_an_image_of_a_batch_goes_through_the_vision_tower_once(
    folders: dict[str, Path], asked: list[Asked], name: str
) -> None:
    stock = opened(folders[name])
    patches = next(module for path, module in stock.model.named_modules() if path.endswith("patch_embedding"))
    seen: list[int] = []
    patches.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    stock.answers(asked[:4], greedy(batch_size=9))
    assert sum(seen) == (4 if name == "kosmos-2" else 2)  # Kosmos-2: texts of two lengths in two batches
    assert not stock.model.vision_model._forward_pre_hooks


def test_each_family_is_asked_in_its_own_form(folders: dict[str, Path]) -> None:
    short = f"What is it?{SHORT_ANSWER_SUFFIX}"
    forms = {
        "blip-2 opt": ("Question: What is it? Answer:", "Question: What is it? Short answer:"),
        "instructblip t5": ("What is it?", "Question: What is it? Short answer:"),
        "kosmos-2": ("Question: What is it? Answer:", f"Question: {short} Answer:"),
    }
    for name, (plain, brief) in forms.items():
        family = stock_family(folders[name])
        assert family.family == name.split()[0]
        assert render_family("What is it?", family) == plain
        assert render_family(short, family) == brief
        assert family.geometry == GeometryConfig(kind="squash", side=28)
    assert stock_family(folders["blip-2 opt"]).coordinates is None


def test_kosmos_reads_and_writes_places_in_its_own_tokens(folders: dict[str, Path], asked: list[Asked]) -> None:
    stock = opened(folders["kosmos-2"])
    family = stock.config
    assert family.coordinates is not None
    location = make_location_format(family.coordinates)
    box = (40.0, 25.0, 70.0, 50.0)
    told = family.rev_loc.replace("{loc}", location.encode(box, 100, 50))
    assert told == "<grounding><phrase> It</phrase><object><patch_index_0524><patch_index_1014></object> is"
    assert render_family(told, family) == told  # nothing is put around a turn of its own
    ids = stock.processor(text=[told], images=[asked[0].open().convert("RGB")])["input_ids"][0]
    names = stock.processor.tokenizer.convert_ids_to_tokens(ids)
    assert names[names.index("<object>") + 1 : names.index("</object>")] == ["<patch_index_0524>", "<patch_index_1014>"]


def speak(stock: StockModel, text: str) -> Callable[[], None]:
    """Make the model say `text`, whatever it is asked, again after each call of the result."""
    said = stock.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    said.append(stock.processor.tokenizer.eos_token_id)
    left: list[int] = []

    def steer(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.zeros_like(logits)
        forced[..., left.pop(0)] = 100.0
        return forced

    stock.model.text_model.lm_head.register_forward_hook(steer)
    return lambda: left.__setitem__(slice(None), said)


def test_kosmos_answers_keep_their_tags_only_where_a_place_was_asked_for(
    folders: dict[str, Path], asked: list[Asked]
) -> None:
    stock = opened(folders["kosmos-2"])
    again = speak(
        stock, "It is<phrase> the dog</phrase><object><patch_index_0044><patch_index_0863></object> on a table"
    )
    it = "<grounding><phrase> It</phrase><object><patch_index_0524><patch_index_1014></object> is"
    answers = []
    for prompt in ("<grounding><phrase> the dog</phrase>", "Describe the dog", it):
        again()
        answers += stock.answers([Asked("0", asked[0].image, prompt)], greedy(max_new_tokens=20))
    where, what, region = answers
    assert what == region == "It is the dog on a table"
    location = make_location_format(stock.config.coordinates)  # type: ignore[arg-type]
    assert location.decode(where, 640, 320) == (0.390625 * 640, 0.046875 * 320, 0.984375 * 640, 0.828125 * 320)


def test_a_family_without_a_chat_template_says_what_is_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "idefics"
    folder.mkdir()
    for file in folders["kosmos-2"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    text = (folder / "config.json").read_text().replace('"kosmos-2"', '"git"')
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"git without a chat template.*chat_template\.jinja"):
        stock_family(folder)


def test_the_noise_of_a_sample_is_its_own() -> None:
    scores = torch.zeros(2, 50)
    first, second = SampleNoise(1.0, 0, ["a", "b"])(scores, scores)
    (alone,) = SampleNoise(1.0, 0, ["b"])(scores[:1], scores[:1])
    assert torch.equal(second, alone)
    assert not torch.equal(first, second)
