"""Token ids word by word, remembered: for tokenizers in which no token reaches over the border of a word.

LLaMA's tokenizer takes a text between two special tokens as one piece, so that nothing of it is remembered, while the
sentences of a data set are made of few words. Its vocabulary holds no token with a space behind another character and
none with a digit beside another one, so merges never cross there: ids of words, one after another, are the ids of the
text.
"""

import json
import re
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

SPACE = "\u2581"  # sentencepiece's

_WORD = re.compile("[^ 0-9]+| +[^ 0-9]+| *[0-9]| +")
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_IN_ONE_WORD = re.compile(f"{SPACE}*([^{SPACE}0-9]*|[0-9])")
_REMEMBERED = 50_000  # words; some ten MB


class WordEncoder:
    """Ids of a text without offsets, as `backend` gives them without begin and end tokens."""

    def __init__(self, backend: Tokenizer) -> None:
        special = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        longest_first = sorted(special, key=len, reverse=True)
        self._special = {text: [number] for text, number in special.items()}
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split
        # what the beginning of a text, and of a part behind a special token, is given in front differs
        self._first = _Known(backend, "")
        self._behind_special = _Known(backend, longest_first[0])
        self._inside = _Known(backend, "0")

    def encode(self, text: str) -> list[int]:
        """The ids."""
        ids: list[int] = []
        first = self._first
        for part in self._split(text):
            if part in self._special:
                ids += self._special[part]
                first = self._behind_special
            elif part:
                words = _WORD.findall(part)
                ids += first[words[0]]
                ids += chain.from_iterable(map(self._inside.__getitem__, words[1:]))
        return ids


class _Known(dict[str, list[int]]):
    """Word -> its ids behind the text `before`."""

    def __init__(self, backend: Tokenizer, before: str) -> None:
        super().__init__()
        self._backend, self._before = backend, before
        self._n_before = len(self._ids(before))

    def __missing__(self, word: str) -> list[int]:
        if len(self) >= _REMEMBERED:
            self.clear()
        self[word] = found = self._ids(self._before + word)[self._n_before :]
        return found

    def _ids(self, text: str) -> list[int]:
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)


def goes_word_by_word(backend: Tokenizer) -> bool:
    """Whether a tokenizer is of LLaMA's kind: sentencepiece BPE with bytes for what it does not know, single digits,
    and nothing that depends on the words around."""
    settings: dict[str, Any] = json.loads(backend.to_str())
    model, before = settings["model"], settings["pre_tokenizer"]
    if model["type"] != "BPE" or model["dropout"] or model.get("ignore_merges") or not model["byte_fallback"]:
        return False
    if before is not None and (before["type"] != "Metaspace" or before["split"] or before["replacement"] != SPACE):
        return False
    if not settings["added_tokens"] or not all(map(_is_literal, settings["added_tokens"])):
        return False
    special = {token["content"] for token in settings["added_tokens"]}
    plain = [token for token in model["vocab"] if token not in special]
    bytes_ = [token for token in plain if _BYTE.fullmatch(token)]
    return (
        _only_spaces(settings["normalizer"], before is not None)
        and len(bytes_) == 256
        and all(_IN_ONE_WORD.fullmatch(token) for token in set(plain) - set(bytes_))
    )


def _is_literal(token: dict[str, Any]) -> bool:
    return not (token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"])


def _only_spaces(normalizer: dict[str, Any] | None, is_replaced: bool) -> bool:
    """Whether a normalizer does nothing but put one space in front and write spaces as sentencepiece does."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replacing = [step for step in steps if step == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    putting = [step for step in steps if step == {"type": "Prepend", "prepend": SPACE}]
    return len(replacing) + len(putting) == len(steps) and bool(replacing) != is_replaced
