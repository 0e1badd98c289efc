"""The language model's lesson."""

import random
import re

import pytest
import torch

from locvlm import prompts
from locvlm.model.checkpoint import fresh
from locvlm.model.tokenizer import TextEncoder, word_tokenizer
from locvlm.model.variants import LocVLM
from locvlm.presets import preset
from locvlm.training import reading
from tests.tiny import SMALL

WORDS = ["the", "of", "located", "in"]
NAMES = ["apple", "bell", "coin", "drum", "fox", "goose", "harp"]
KINDS = {"where": 1.0, "presence": 1.0, "steps": 1.0, "side": 1.0, "height": 1.0}


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    corpus = [*NAMES, prompts.SPATIAL_DIRECT, prompts.HALLUCINATION_PROMPT, "Yes No image located to the of left right"]
    corpus += ["USER ASSISTANT where none is yes no steps side height above below A photo of a an and The object at"]
    return TextEncoder(word_tokenizer(corpus, map(str, range(reading.COLUMNS)), n_numbers=100), 36)


@pytest.fixture
def model(encoder: TextEncoder) -> LocVLM:
    return fresh(preset("tiny", [*SMALL, "model.language.vocab_size=1024"]), encoder, 0)


def places(row: reading.Row) -> dict[str, tuple[int, int]]:
    return {name: (int(x), int(y)) for name, x, y in re.findall(r" (\w+) (\d+) (\d+);", row.text)}


def side(first: tuple[int, int], second: tuple[int, int], axis: int) -> str:
    """Where the second lies as seen from the first."""
    return (("left", "right"), ("above", "below"))[axis][second[axis] > first[axis]]


@pytest.mark.parametrize("seed", range(20))
def test_short_answers_follow_from_the_stated_scene(seed: int) -> None:
    row = reading.short_row(NAMES, random.Random(seed), KINDS)
    at = places(row)
    questions = row.text.partition("\n")[2]
    for name, x, y in re.findall(r" where (\w+) (\d+) (\d+)", questions):
        assert at[name] == (int(x), int(y))
    assert not at.keys() & set(re.findall(r" where (\w+) none", questions))
    there = re.findall(r" is (\w+)(?: in(?: image(?:\?(?: ASSISTANT:)?)?)?)? (yes|no)", questions)
    assert len(there) == row.kinds.count("presence")
    for name, answer in there:
        assert (name in at) is (answer == "yes")
    sides = re.findall(
        r" side (?:of )?(\w+) (?:is )?(\w+)(?: located\?)?(?: ASSISTANT: The \2(?: is located to the)?)? (left|right)",
        questions,
    )
    for first, second, word in sides:
        assert word == side(at[first], at[second], 0)
    assert len(sides) == row.kinds.count("side")
    for first, second, word in re.findall(r" height (\w+) (\w+) (\w+)", questions):
        assert word == side(at[first], at[second], 1)
    for first, second, a, x, b, z, word in re.findall(r" steps (\w+) (\w+)\? (\w+) (\d+) (\w+) (\d+) (\w+)", questions):
        assert (a, int(x), b, int(z)) == (first, at[first][0], second, at[second][0])
        assert word == side(at[first], at[second], 0)
    assert len(row.kinds) == len(row.words) == len(row.spans) == 8


@pytest.mark.parametrize("seed", range(20))
def test_chat_answers_are_the_projects_own_and_true(seed: int) -> None:
    row = reading.chat_row(NAMES, random.Random(seed))
    at = places(row)
    sides = re.findall(
        r"Which side of (\w+) is (\w+) located\? ASSISTANT: The (\w+) is located to the (\w+) of (\w+)\.", row.text
    )
    there = re.findall(r"Is there (\w+) in image\? ASSISTANT: (Yes|No)", row.text)
    assert len(sides) + len(there) == 4
    for first, second, subject, word, other in sides:
        assert (subject, other, word) == (second, first, side(at[first], at[second], 0))
    for name, answer in there:
        assert (name in at) is (answer == "Yes")
    assert [row.text[begin:end].strip() for begin, end in row.words if row.text[begin:end].strip() not in ("Yes", "No")]
    assert not any(template.split("{")[0] in row.text for template in (*prompts.LOC_PROMPTS, *prompts.REV_PROMPTS))


@pytest.mark.parametrize("seed", range(20))
def test_questions_in_any_words_ask_for_a_place_or_a_name(seed: int) -> None:
    row = reading.chat_row(NAMES, random.Random(seed), words=WORDS, far=3)
    at, filler = places(row), f"(?: (?:{'|'.join(WORDS)})){{0,3}}"
    told = re.findall(rf"{filler} (\w+){filler}\? ASSISTANT:{filler} at (\d+) (\d+)", row.text)
    named = re.findall(rf"{filler} (\d+) (\d+){filler}\? ASSISTANT:{filler} is a (\w+)", row.text)
    assert (len(told), len(named)) == (row.kinds.count("told"), row.kinds.count("named"))
    assert all(at[name] == (int(x), int(y)) for name, x, y in told)
    assert all(at[name] == (int(x), int(y)) for x, y, name in named)


def test_a_caption_stands_where_stage_1_has_it() -> None:
    row = reading.caption_row(NAMES, random.Random(3))
    begin, end = row.spans[0]
    assert row.text[begin:end].startswith("A photo of a")
    assert row.text[end - 2 :] == ".\n"
    assert all(name in row.text[begin:end] for name in places(row))


def test_the_lesson_begins_with_pairs_and_ends_with_everything() -> None:
    lesson = list(reading.rows(NAMES, 0, 40, 8))
    assert len(lesson) == 40
    assert {kind for row in lesson[0] for kind in row.kinds} == {"pairs"}
    late = {kind for texts in lesson[20:] for row in texts for kind in row.kinds}
    assert late >= {
        "pairs",
        "where",
        "presence",
        "steps",
        "side",
        "height",
        "presence_in_full",
        "side_in_full",
        "caption",
    }
    assert [row.text for row in lesson[7]] == [row.text for row in list(reading.rows(NAMES, 0, 40, 8))[7]]


@pytest.mark.parametrize("seed", range(20))
def test_soft_tokens_state_the_scene_that_is_asked_about(seed: int) -> None:
    row = reading.chat_row(NAMES, random.Random(seed), soft=36)
    assert row.text.startswith("USER: <image>\n")
    assert len(row.soft) == 36
    at: dict[str | None, set[tuple[int, int]]] = {}
    for name, x, y in row.soft:
        at.setdefault(name, set()).add((x, y))
    assert len(at.pop(None)) > 1
    asked = re.findall(r" Is there (\w+) in image\? ASSISTANT: (Yes|No)", row.text)
    assert all((name in at) is (answer == "Yes") for name, answer in asked)
    for subject, word, other in re.findall(r" The (\w+) is located to the (\w+) of (\w+)\.", row.text):
        (first,), (second,) = at[other], at[subject]
        assert word == side(first, second, 0)
    assert reading.caption_row(NAMES, random.Random(seed), soft=36).text.startswith("<image>A photo of ")


def test_a_soft_token_is_the_sum_of_its_words(
    model: LocVLM, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_SOFT_NOISE", 0.0)
    row = reading.Row("<image>", [], [], [], [("apple", 3, 40), (None, 3, 40), ("apple drum", 3, 40)])
    with torch.no_grad():
        found = reading._soft_tokens(model, encoder, [row], torch.Generator())
        words = model.model.language_model.embed_tokens.weight
        apple, drum, three, forty = (
            words[encoder.encode([f" {word}"])[0].ids[1]] for word in ("apple", "drum", "3", "40")
        )
    assert found is not None
    half = len(forty) // 2
    swapped = torch.cat([forty[half:], forty[:half]])
    assert torch.allclose(found[1] * 3**0.5, three + swapped, atol=1e-5)
    assert torch.allclose((found[0] - found[1]) * 3**0.5, apple, atol=1e-5)
    assert torch.allclose((found[2] - found[1]) * 3**0.5, (apple + drum) / 2**0.5, atol=1e-5)


def test_the_second_lesson_states_half_of_its_scenes_in_soft_tokens() -> None:
    known = ["fire bell", "drum", "coin", "dust bin", "kettle drum", "fox"]
    texts = [row for step in reading.soft_rows(NAMES, known, WORDS, 0, 20, 32, 36) for row in step]
    assert 0.4 < sum(len(row.soft) == 36 for row in texts) / len(texts) < 0.55
    kinds = {kind for row in texts for kind in row.kinds}
    assert kinds >= {"side", "presence", "side_in_full", "presence_in_full", "told", "named", "caption", "pairs"}
    assert any("kettle drum" in row.text for row in texts)


def test_the_second_lesson_moves_the_language_model_alone(model: LocVLM, encoder: TextEncoder) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words, soft = reading.teach_soft(model, encoder, NAMES, ["fox drum", *NAMES], WORDS, NAMES, 3, 0)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("model.language_model", "lm_head")) for name in moved)
    assert 0 <= words.side <= 1
    assert 0 <= soft.side_in_full <= 1


def test_the_lesson_moves_the_language_model_alone(model: LocVLM, encoder: TextEncoder) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    figures = reading.teach(model, encoder, NAMES, NAMES, 3, 0)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("model.language_model", "lm_head")) for name in moved)
    assert 0 <= figures.side <= 1


def test_numbers_mean_the_same_with_and_without_a_space(model: LocVLM, encoder: TextEncoder) -> None:
    reading.teach(model, encoder, NAMES, NAMES, 2, 0)
    for weight in (model.model.language_model.embed_tokens.weight, model.lm_head.weight):
        glued, apart = (encoder.encode([text])[0].ids[1] for text in ("31", " 31"))
        assert glued != apart
        assert torch.equal(weight[glued], weight[apart])


def test_a_perfect_reader_scores_1_and_a_constant_one_half(
    model: LocVLM, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured by the words that decide alone."""

    def perfect(_: LocVLM, ids: torch.Tensor, soft: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids.roll(-1, dims=1), 1024)

    monkeypatch.setattr(reading, "_logits", perfect)
    for soft in (False, True):
        assert reading.measure(model, encoder, NAMES, 0, soft=soft) == reading.ReadingFigures(*[1.0] * 6)
    left, yes = (encoder.encode([word])[0].ids[1] for word in (" left", " Yes"))

    def constant(_: LocVLM, ids: torch.Tensor, soft: torch.Tensor | None) -> torch.Tensor:
        scores = torch.zeros(*ids.shape, 1024)
        scores[..., [left, yes]] = 1.0
        scores[..., left] += 1.0
        return scores

    monkeypatch.setattr(reading, "_logits", constant)
    found = reading.measure(model, encoder, NAMES, 0)
    assert found.presence == found.presence_in_full == 0
    assert 0.4 < found.side < 0.6


def test_a_name_of_two_tokens_is_refused(model: LocVLM, encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="' gooseberry' takes"):
        reading.teach(model, encoder, ["gooseberry", *NAMES], NAMES, 1, 0)


def test_a_number_without_a_space_is_right_too(
    model: LocVLM, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    glued = {encoder.encode([f" {n}"])[0].ids[1]: encoder.encode([str(n)])[0].ids[1] for n in range(reading.COLUMNS)}

    def perfect(_: LocVLM, ids: torch.Tensor, soft: torch.Tensor | None) -> torch.Tensor:
        said = ids.roll(-1, dims=1).clone().apply_(lambda token: glued.get(token, token))
        return torch.nn.functional.one_hot(said, 1024)

    monkeypatch.setattr(reading, "_logits", perfect)
    assert reading.measure(model, encoder, NAMES, 0).told == 1.0
