"""Text -> token ids with the image block and the supervised tokens marked.

Labels come from character offsets of the rendered string, so no tokenizer can shift them (protocol: supervise exactly
the answers and their closing stop token). The tiny preset's own tokenizer is made here too.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from locvlm.errors import CheckpointError, DataError
from locvlm.model.words import SPACE, WordEncoder, goes_word_by_word
from locvlm.prompts import IMAGE, STOP

_end = itemgetter(1)
_ASCII_BYTE = re.compile("<0x([0-7][0-9A-F])>")

SPECIAL_TOKENS = ("<unk>", "<s>", STOP, "<pad>", IMAGE)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and, beside each, whether it is a training target. Image placeholders are already expanded."""

    ids: list[int]
    supervised: list[bool]


class TextEncoder:
    """A tokenizer plus the number of visual tokens that one `<image>` stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, n_image_tokens: int) -> None:
        for name, token in (
            ("stop", tokenizer.eos_token),
            ("pad", tokenizer.pad_token),
            ("begin", tokenizer.bos_token),
        ):
            if token is None:
                raise CheckpointError(
                    f"preparing the tokenizer: it has no {name} token; training needs begin, stop and pad tokens"
                )
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise CheckpointError(
                f"preparing the tokenizer: its pad token is its stop token ({tokenizer.eos_token!r}), so it "
                "could never be learned; set another pad token (for LLaMA: the unk token)"
            )
        if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
            raise CheckpointError(f"preparing the tokenizer: it does not know {IMAGE}; add it as a special token")
        self.tokenizer = tokenizer
        self.n_image_tokens = n_image_tokens
        self.image_id: int = tokenizer.convert_tokens_to_ids(IMAGE)
        self.bos_id: int = tokenizer.bos_token_id
        self.stop_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id
        backend = tokenizer.backend_tokenizer
        if backend.truncation is not None or backend.padding is not None:
            backend.no_truncation()
            backend.no_padding()
        self._backend = backend
        self._words = WordEncoder(backend) if goes_word_by_word(backend) else None
        self._spelling = [
            _spelled(backend.id_to_token(number)) for number in range(max(backend.get_vocab().values()) + 1)
        ]

    @property
    def special_ids(self) -> dict[str, int]:
        """bos_token_id, eos_token_id and pad_token_id, as transformers' configs call them."""
        return {"bos_token_id": self.bos_id, "eos_token_id": self.stop_id, "pad_token_id": self.pad_id}

    def encode(
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        n_image_tokens: int | None = None,
    ) -> list[Encoded]:
        """Encode rendered conversations; `spans` are the supervised character ranges of each.

        `n_image_tokens`: what `<image>` stands for where it is not one image: the tokens of a video.
        A token is supervised when it overlaps a span. Raises DataError for a sample without a supervised token.
        """
        encoded = []
        n_visual = self.n_image_tokens if n_image_tokens is None else n_image_tokens
        for number, ids in enumerate(self._ids(texts)):
            supervised = [False] * (len(ids) + 1)
            for first, last in self._targets(ids, texts[number], spans[number]) if spans is not None else ():
                supervised[first + 1 : last + 1] = [True] * (last - first)
            ids = [self.bos_id, *ids]
            at = 0
            for _ in range(ids.count(self.image_id)):
                at = ids.index(self.image_id, at)
                ids[at : at + 1] = [self.image_id] * n_visual
                supervised[at : at + 1] = [False] * n_visual
                at += n_visual
            if spans is not None and True not in supervised:
                raise DataError(f"encoding a training sample: no token of it is supervised; text: {texts[number]!r}")
            encoded.append(Encoded(ids, supervised))
        return encoded

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self._words is not None:
            return [self._words.encode(text) for text in texts]
        return [item.ids for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _targets(self, ids: list[int], text: str, spans: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """The tokens of each span, from the first to before the last."""
        found = self._answers(ids, text, spans)
        if found is None:
            # in the order of the text: the tokens of a span are neighbours
            offsets = self._backend.encode(text, add_special_tokens=False).offsets
            found = [(bisect_right(offsets, start, key=_end), bisect_left(offsets, (end,))) for start, end in spans]
        return found

    def _answers(self, ids: list[int], text: str, spans: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]] | None:
        """The tokens of spans that end with the stop token, one span a stop token, read backwards from there: they must
        spell the span. None where they do not. Offsets of a whole conversation take longer than all the rest."""
        if ids.count(self.stop_id) != len(spans):
            return None
        found, last = [], 0
        for start, end in spans:
            first = last = ids.index(self.stop_id, last) + 1
            missing = end - start
            while missing > 0 and first > 0:
                first -= 1
                missing -= len(self._spelling[ids[first]])
            if missing or "".join([self._spelling[i] for i in ids[first:last]]) != text[start:end]:
                return None
            found.append((first, last))
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The answer text of generated ids: everything before the stop token, special tokens dropped, stripped."""
        ids = list(ids)
        if self.stop_id in ids:
            ids = ids[: ids.index(self.stop_id)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _spelled(token: str | None) -> str:
    """What a token stands for in the text, if it is one of a sentencepiece vocabulary."""
    if token is not None and (byte := _ASCII_BYTE.fullmatch(token)):
        return chr(int(byte[1], 16))
    return (token or "").replace(SPACE, " ")


def word_tokenizer(corpus: Iterable[str], whole: Iterable[str] = (), n_numbers: int = 0) -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny preset: every word of `corpus` is one token, with and without a leading space. So is
    every whole number below `n_numbers`, without one; digits of others are single. Anything else falls back to
    characters and bytes, so no text is out of vocabulary. `whole` are strings kept in one piece after a space (such as
    '(x1,y1,x2,y2)'). Nothing is trained: equal input, equal tokenizer.
    """
    words = sorted({word for text in corpus for word in re.findall(r"[A-Za-z']+", text) if len(word) > 1})
    vocabulary: list[tuple[str, float]] = [(token, 0.0) for token in SPECIAL_TOKENS]
    vocabulary += [(f"<0x{byte:02X}>", -50.0) for byte in range(256)]
    vocabulary += [(character, -10.0) for character in ["\n", "\u2581", *map(chr, range(33, 127))]]
    vocabulary += [(str(number), -10.0) for number in range(10, n_numbers)]
    vocabulary += [("\u2581(", -10.0), *(("\u2581" + text, -10.0) for text in sorted(whole))]
    vocabulary += [(prefix + word, -10.0) for word in words for prefix in ("\u2581", "")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    # LLaMA's own way with spaces, but without the dummy space in front: text and tokens correspond one to one
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    specials: dict[str, Any] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": STOP, "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **specials, additional_special_tokens=[IMAGE], clean_up_tokenization_spaces=False
    )
