"""A plain text model of a Hugging Face folder that replies to chats: the judge of open-ended answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from locvlm.errors import CheckpointError


class TextModel:
    """A causal language model with its tokenizer; greedy, so that equal chats get equal replies."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 64) -> None:
        self._model, self._tokenizer, self._max_new_tokens = model, tokenizer, max_new_tokens

    @torch.inference_mode()
    def replies(self, chats: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
        """One reply a chat (messages with role and content), in order; all chats in one batch."""
        texts = [self._render(chat) for chat in chats]
        has_template = self._tokenizer.chat_template is not None
        encoded = self._tokenizer(
            texts, return_tensors="pt", padding=True, add_special_tokens=not has_template, return_token_type_ids=False
        ).to(self._model.device)
        output = self._model.generate(
            **encoded,
            generation_config=GenerationConfig(
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
                eos_token_id=self._model.generation_config.eos_token_id or self._tokenizer.eos_token_id,
            ),
        )
        new = output[:, encoded["input_ids"].shape[1] :]
        return [text.strip() for text in self._tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _render(self, chat: Sequence[Mapping[str, str]]) -> str:
        """The chat in the model's own form; where it has none, the messages one after the other."""
        if self._tokenizer.chat_template is not None:
            return str(self._tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True))
        return "\n\n".join(message["content"] for message in chat) + "\n\n"


def load_text_model(folder: Path) -> TextModel:
    """Open a folder with config.json, weights and tokenizer, on the accelerator if there is one. No code of the folder
    is run and nothing is downloaded. Raises CheckpointError for a folder that is not a whole text model."""
    doing = f"loading the text model {folder}"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{doing}: config.json is missing; give a folder of a Hugging Face text model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if device == "cuda" else torch.float32, local_files_only=True
        )
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(f"{doing}: {error}; the folder may be cut short, copy it again") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"{doing}: its tokenizer has neither a pad nor a stop token, so chats cannot share a batch"
        )
    return TextModel(model.to(device).eval(), tokenizer)
