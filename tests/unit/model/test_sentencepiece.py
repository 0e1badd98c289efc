"""Folders with a sentencepiece model only, as LLaMA, Vicuna and LLaVA came first: ids against sentencepiece itself."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers

from locvlm.config import SYSTEM
from locvlm.errors import CheckpointError
from locvlm.model.sources import read_tokenizer
from locvlm.model.tokenizer import TextEncoder
from locvlm.model.words import WordEncoder, goes_word_by_word
from locvlm.prompts import IMAGE, render_chat, render_plain

CORPUS = [
    f"{SYSTEM} USER: Where is the object described cat located in image in terms of (x1,y1,x2,y2) bbox? ASSISTANT:",
    "It is located at (4,52,13,63) There is no such object in the image Describe the object? a dog that is lying down",
]
TURNS = [
    ("Where is the cat?", "It is located at (4,52,13,63)"),
    ("What's in the caf\u00e9 at 0?", "A dog,  lying\ndown"),
    ("And \u4e2d \U0001f600?", "no"),
]
MARKS = re.compile("(</s>|<image>)")


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.model` with LLaMA's settings."""
    folder = tmp_path_factory.mktemp("spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def folder_of(spiece: Path, folder: Path, settings: dict[str, Any] | None) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(spiece.read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    return folder


def encoder_of(folder: Path) -> TextEncoder:
    tokenizer = read_tokenizer(folder)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return TextEncoder(tokenizer, 3)


def by_sentencepiece(spiece: Path, text: str, image_id: int, *, legacy: bool) -> list[int]:
    """The rule of LLaMA's tokenizer: `legacy` puts the dummy space in front of each part between special tokens, else
    only the text begins with one."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(spiece.read_bytes())
    with_space = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    proto.normalizer_spec.add_dummy_prefix = False
    without = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    ids = [with_space.bos_id()]
    for number, part in enumerate(MARKS.split(text)):
        if part == IMAGE:
            ids += [image_id] * 3
        elif part == "</s>":
            ids.append(with_space.eos_id())
        elif part:
            ids += (with_space if legacy or number == 0 else without).encode(part)
    return ids


@pytest.mark.parametrize(
    ("settings", "legacy"),
    [({"legacy": True}, True), ({"legacy": False}, False), ({"legacy": None}, True), ({}, True), (None, True)],
    ids=["legacy", "not legacy", "null", "not said", "no settings"],
)
def test_ids_are_those_the_model_was_trained_with(
    spiece: Path, tmp_path: Path, settings: dict[str, Any] | None, legacy: bool
) -> None:
    """Where the folder does not say it, LLaMA's first way holds (transformers 5 would take the other)."""
    encoder = encoder_of(folder_of(spiece, tmp_path / "folder", settings))
    for text, spans in (render_chat(TURNS, SYSTEM), *((text, [span]) for text, span in [render_plain("a dog")])):
        encoded = encoder.encode([text], [spans])[0]
        assert encoded.ids == by_sentencepiece(spiece, text, encoder.image_id, legacy=legacy)
        answers = [i for i, target in zip(encoded.ids, encoded.supervised, strict=True) if target]
        said = "".join(text[start:end] for start, end in spans).replace("</s> ", "</s>")  # decoding drops that space
        assert encoder.tokenizer.decode(answers).replace("</s> ", "</s>").strip() == said.strip()


@pytest.mark.parametrize("legacy", [True, False])
def test_word_by_word_is_the_same_as_at_once(spiece: Path, tmp_path: Path, legacy: bool) -> None:
    backend = encoder_of(folder_of(spiece, tmp_path / "folder", {"legacy": legacy}))._backend
    assert goes_word_by_word(backend)
    words, rng = WordEncoder(backend), random.Random(0)
    parts = [
        " ",
        "  ",
        "a",
        "cat",
        " dog",
        "0",
        "12",
        "(",
        "),",
        "\n",
        "\u00e9",
        "\u4e2d",
        "\U0001f600",
        "</s>",
        "USER:",
    ]
    parts += [IMAGE, "\u2581", "<s>", "\t", "\u00a0", "<0x0A>", "</", "s>", "object"]
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randint(0, 14)))
        assert words.encode(text) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("token", ["a\u2581b", "1a", "12", "a\u2581"])
def test_a_vocabulary_that_reaches_over_words_is_taken_at_once(spiece: Path, tmp_path: Path, token: str) -> None:
    backend = encoder_of(folder_of(spiece, tmp_path / "folder", {}))._backend
    settings = json.loads(backend.to_str())
    settings["model"]["vocab"][token] = len(settings["model"]["vocab"]) + 10
    assert not goes_word_by_word(Tokenizer.from_str(json.dumps(settings)))


@pytest.mark.parametrize("change", ["ignore_merges", "split", "lstrip", "unigram"])
def test_a_tokenizer_of_another_kind_is_taken_at_once(spiece: Path, tmp_path: Path, change: str) -> None:
    backend = encoder_of(folder_of(spiece, tmp_path / "folder", {}))._backend
    settings = json.loads(backend.to_str())
    if change == "unigram":
        other = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
        other.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    else:
        place = {
            "ignore_merges": settings["model"],
            "split": settings["pre_tokenizer"],
            "lstrip": settings["added_tokens"][0],
        }
        place[change][change] = True
        other = Tokenizer.from_str(json.dumps(settings))
    assert not goes_word_by_word(other)


def test_a_folder_without_a_tokenizer_says_what_is_missing(spiece: Path, tmp_path: Path) -> None:
    folder = folder_of(spiece, tmp_path / "folder", {})
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read_tokenizer(folder)


@pytest.mark.parametrize("left", [0, 100])
def test_a_sentencepiece_model_cut_short_is_one_message(spiece: Path, tmp_path: Path, left: int) -> None:
    folder = folder_of(spiece, tmp_path / "folder", {})
    (folder / "tokenizer.model").write_bytes(spiece.read_bytes()[:left])
    with pytest.raises(CheckpointError, match="copy or download it again"):
        read_tokenizer(folder)
