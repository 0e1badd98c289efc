"""Ids and labels from character offsets."""

import pytest
from transformers import PreTrainedTokenizerFast

from locvlm.errors import CheckpointError, DataError
from locvlm.model.tokenizer import TextEncoder, word_tokenizer
from locvlm.prompts import render_chat, render_plain, render_prompt

TURNS = [("Where is the cat?", "It is located at (4,52,13,63)"), ("Is there dog in image?", "No"), ("How many?", "3")]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(["USER ASSISTANT Where is the cat It located at Is there dog in image No"], ["(x1,y1,x2,y2)"])


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    return TextEncoder(tokenizer, n_image_tokens=5)


def test_supervised_tokens_are_exactly_the_answers_and_their_stop_tokens(encoder: TextEncoder) -> None:
    text, spans = render_chat(TURNS, "A system text.")
    encoded = encoder.encode([text], [spans])[0]
    kept = [i for i, target in zip(encoded.ids, encoded.supervised, strict=True) if target]
    assert encoder.tokenizer.decode(kept) == "".join(f" {answer}</s>" for _, answer in TURNS)
    assert encoded.ids[0] == encoder.bos_id
    assert encoded.ids.count(encoder.bos_id) == 1
    assert encoded.ids.count(encoder.image_id) == 5
    assert not any(t for i, t in zip(encoded.ids, encoded.supervised, strict=True) if i == encoder.image_id)


def test_a_token_is_supervised_when_it_overlaps_a_span(encoder: TextEncoder) -> None:
    text = "The caf\u00e9 \U0001f600 is at <image>(4,52) or\n\u4e2d (13,63)</s>"
    offsets = [(0, 0), *encoder._backend.encode(text, add_special_tokens=False).offsets]
    for start in range(len(text)):
        spans = [(start, start + 1), (start + 4, start + 9)]
        wanted = [any(a < end and b > begin for begin, end in spans) for a, b in offsets]
        at = encoder.encode([text])[0].ids.index(encoder.image_id)
        wanted[at : at + 1] = [False] * 5
        if any(wanted):
            assert encoder.encode([text], [spans])[0].supervised == wanted


def test_the_generation_prompt_is_the_beginning_of_the_training_text(encoder: TextEncoder) -> None:
    text, spans = render_chat(TURNS[:1], "")
    prompt = encoder.encode([render_prompt(TURNS[0][0], "")])[0].ids
    full = encoder.encode([text], [spans])[0]
    assert full.ids[: len(prompt)] == prompt
    assert not any(full.supervised[: len(prompt)])
    assert full.supervised[len(prompt)]


def test_the_plain_form_supervises_the_caption_and_its_newline(encoder: TextEncoder) -> None:
    text, span = render_plain("the cat")
    encoded = encoder.encode([text], [[span]])[0]
    kept = [i for i, target in zip(encoded.ids, encoded.supervised, strict=True) if target]
    assert encoder.tokenizer.decode(kept) == "the cat\n"


@pytest.mark.parametrize("text", ["caf\u00e9 \U0001f600 (12, 3.5)", "  two  spaces ", "Which side of A is B located?"])
def test_every_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_decoding_stops_at_the_stop_token_and_eats_no_letter(encoder: TextEncoder) -> None:
    ids = encoder.tokenizer.backend_tokenizer.encode(" dogs</s> cats", add_special_tokens=False).ids
    assert encoder.decode(ids) == "dogs"


def test_a_sample_without_a_supervised_token_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(DataError, match="no token of it is supervised"):
        encoder.encode(["USER: x ASSISTANT:"], [[]])


def test_a_tokenizer_whose_pad_is_its_stop_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(CheckpointError, match="pad token is its stop token"):
        TextEncoder(tokenizer, 5)
