"""A text model of a folder replies to chats."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from locvlm.errors import CheckpointError
from locvlm.evaluation.judges import Case, make_judge
from locvlm.model.text import load_text_model
from locvlm.model.tokenizer import word_tokenizer

TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
CASES = [
    Case("what is it", "dog", "a dog"),
    Case("who is it", "man", "a very tall man in a red coat"),
    Case("?", "x", ""),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of some thousand random weights with a tokenizer."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["what is it dog man yes no score pred"])
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        initializer_range=1.0,  # far from zero, so that the reply depends on the chat
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_replies_do_not_depend_on_the_batch(folder: Path) -> None:
    model = load_text_model(folder)
    chats = [[{"role": "user", "content": text}] for text in ("what is it", "dog dog dog", "man yes no man score", "?")]
    together = model.replies(chats)
    assert together == [model.replies([chat])[0] for chat in chats]
    assert together == load_text_model(folder).replies(chats)
    assert len(set(together)) > 1  # it reads what it is asked


def test_the_chat_takes_the_models_own_form(folder: Path) -> None:
    model = load_text_model(folder)
    chat = [{"role": "system", "content": "judge"}, {"role": "user", "content": "right?"}]
    assert model._render(chat) == "<s>system: judge</s><s>user: right?</s><s>assistant:"
    (folder / "chat_template.jinja").unlink()
    assert load_text_model(folder)._render(chat) == "judge\n\nright?\n\n"


def test_it_serves_as_a_judge_and_its_replies_are_kept(folder: Path, tmp_path: Path) -> None:
    judge = make_judge(f"hf:{folder}", None, tmp_path / "replies.jsonl", load_text_model)
    verdicts = judge.verdicts(CASES)
    assert [verdict.right for verdict in verdicts] == [None] * 3  # random weights say nothing readable
    kept = (tmp_path / "replies.jsonl").read_bytes()
    assert len(kept.splitlines()) == 3
    again = make_judge(f"hf:{folder}", None, tmp_path / "replies.jsonl", load_text_model)
    assert again.verdicts(CASES) == verdicts
    assert (tmp_path / "replies.jsonl").read_bytes() == kept


def test_a_folder_that_is_no_text_model_gives_one_message(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_text_model(folder.parent)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cut short, copy it again"):
        load_text_model(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="loading the text model"):
        load_text_model(folder)
