"""Conversations -> training samples: the mixture, its order, ids, labels and pixels.

The order is a pure function of (seed, epoch), so a run resumes at the exact sample from its step number alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from locvlm.config import MixtureEntry, StageConfig
from locvlm.data.coco import safe_image_path
from locvlm.data.conversations import ConversationFile
from locvlm.data.instruct import Renderer
from locvlm.errors import ConfigError, DataError
from locvlm.geometry import ImageGeometry
from locvlm.pixels import open_image, to_pixels
from locvlm.prompts import render_chat, render_plain

Ints = npt.NDArray[np.int64]


class EncodedText(Protocol):
    """Token ids with the training targets marked."""

    @property
    def ids(self) -> list[int]: ...  # noqa: D102

    @property
    def supervised(self) -> list[bool]: ...  # noqa: D102


class Encoder(Protocol):
    """What `TextEncoder` of the model package offers."""

    image_id: int
    n_image_tokens: int

    def encode(  # noqa: D102
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]] | None = None
    ) -> Sequence[EncodedText]: ...


@dataclass(frozen=True, slots=True)
class Branch:
    """The tokens of one conversation after the image prefix. `supervised` marks the targets."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and one or more conversations about it that share its prefix. `pixels`: float32 [3, side, side]."""

    pixels: npt.NDArray[np.float32]
    prefix: list[int]
    branches: tuple[Branch, ...]


class TrainingData:
    """All samples of a stage.

    With `stage.conversations_per_image` = 0 a sample is one conversation, and an epoch is every conversation of the
    mixture (weights repeat or thin out the sources). With k > 0 a sample is an image with k of its conversations, each
    drawn by the weights among the entries that the image has anything of; an epoch is every image once.
    """

    def __init__(
        self,
        stage: StageConfig,
        sources: Mapping[str, ConversationFile],
        images: Path,
        renderer: Renderer,
        encoder: Encoder,
        geometry: ImageGeometry,
        max_length: int,
        seed: int,
    ) -> None:
        entries = stage.mixture or tuple(MixtureEntry(source=name) for name in sources)
        unknown = sorted({entry.source for entry in entries} - set(sources))
        if unknown:
            raise ConfigError(
                f"preparing the training data: the mixture names the source(s) {', '.join(unknown)}, but --data gave "
                f"{', '.join(sorted(sources)) or 'none'}; add --data {unknown[0]}=PATH or change stages.*.mixture"
            )
        self.stage, self.seed, self.max_length = stage, seed, max_length
        self.images, self.renderer, self.encoder, self.geometry = images, renderer, encoder, geometry
        self.files = [sources[entry.source] for entry in entries]
        self.weights = np.array([entry.weight for entry in entries])
        if not stage.mixture:  # all conversations alike: a source counts by its size
            self.weights = np.array([float(len(file)) for file in self.files])
        self.rows = [_rows_of(file, entry) for file, entry in zip(self.files, entries, strict=True)]
        self.by_image: list[dict[str, Ints]] = []
        self.image_names: list[str] = []
        if stage.conversations_per_image:
            self.by_image = [_group(file, rows) for file, rows in zip(self.files, self.rows, strict=True)]
            self.image_names = sorted(set().union(*self.by_image))
        self._plan_epoch = -1
        self._plan: npt.NDArray[np.int64] = np.empty((0, 2), np.int64)

    def __len__(self) -> int:
        """Samples an epoch."""
        if self.stage.conversations_per_image:
            return len(self.image_names)
        return sum(len(rows) for rows in self.rows)

    def sample(self, index: int) -> Sample:
        """The `index`-th sample since the start of training; epochs follow one another, each in its own order."""
        epoch, place = divmod(index, len(self))
        if epoch != self._plan_epoch:
            self._plan, self._plan_epoch = self._order(epoch), epoch
        if self.stage.conversations_per_image:
            picks = self._draw(epoch, self.image_names[self._plan[place, 1]])
        else:
            picks = [(int(self._plan[place, 0]), int(self._plan[place, 1]))]
        return self._build(picks, epoch)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """[samples, 2]: entry and row (or, packed, 0 and image number) of each place of the epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.stage.conversations_per_image:
            images = rng.permutation(len(self.image_names))
            return np.stack([np.zeros_like(images), images], axis=1)
        total = len(self)
        shares = np.floor(np.cumsum(self.weights / self.weights.sum()) * total + 0.5).astype(np.int64)
        counts = np.diff(shares, prepend=0)
        pairs = []
        for entry, (rows, count) in enumerate(zip(self.rows, counts, strict=True)):
            repeats = -(-int(count) // len(rows))
            chosen = np.concatenate([rng.permutation(rows) for _ in range(repeats)] or [rows[:0]])[:count]
            pairs.append(np.stack([np.full(count, entry), chosen], axis=1))
        return rng.permutation(np.concatenate(pairs))

    def _draw(self, epoch: int, image: str) -> list[tuple[int, int]]:
        """(entry, row) of the conversations of one packed sample: by weight, each once while there is choice."""
        rng = np.random.default_rng((self.seed, epoch, *image.encode()))
        pools = {entry: rng.permutation(rows[image]) for entry, rows in enumerate(self.by_image) if image in rows}
        entries = np.array(list(pools))
        odds = self.weights[entries] / self.weights[entries].sum()
        used = dict.fromkeys(pools, 0)
        picks = []
        for entry in rng.choice(entries, size=self.stage.conversations_per_image, p=odds).tolist():
            picks.append((entry, int(pools[entry][used[entry] % len(pools[entry])])))
            used[entry] += 1
        return picks

    def _build(self, picks: Sequence[tuple[int, int]], epoch: int) -> Sample:
        conversations = [self.files[entry][row] for entry, row in picks]
        texts, spans = [], []
        for conversation in conversations:
            turns = self.renderer.turns(conversation, epoch)
            text, ranges = self._fit(turns)
            texts.append(text)
            spans.append(ranges)
        encoded = self.encoder.encode(texts, spans)
        prefix_length = _prefix_length(encoded[0].ids, self.encoder.image_id, self.stage.format)
        prefix = encoded[0].ids[:prefix_length]
        for item in encoded[1:]:
            if item.ids[:prefix_length] != prefix:
                raise DataError(
                    f"packing the conversations of image {conversations[0].image}: their prompts do not begin with the "
                    "same tokens, so they cannot share one image prefix; set conversations_per_image to 0"
                )
        path = safe_image_path(self.images, conversations[0].image)
        pixels = to_pixels(self.geometry.apply(open_image(path)))
        branches = tuple(Branch(item.ids[prefix_length:], item.supervised[prefix_length:]) for item in encoded)
        return Sample(pixels, prefix, branches)

    def _fit(self, turns: list[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """Render, dropping whole trailing turns until the conversation fits `max_length`."""
        if self.stage.format == "plain":
            text, span = render_plain(turns[0][1])
            return text, [span]
        for n_turns in range(len(turns), 0, -1):
            text, spans = render_chat(turns[:n_turns], self.renderer.prompts.system)
            # a token covers at least one byte: encode only when that bound does not settle it
            bound = len(text.encode()) + self.encoder.n_image_tokens + 1
            if bound <= self.max_length or len(self.encoder.encode([text])[0].ids) <= self.max_length:
                return text, spans
        raise DataError(
            f"rendering a conversation: its first turn alone is longer than max_length {self.max_length} tokens: "
            f"{turns[0][0][:80]!r}"
        )


def _rows_of(file: ConversationFile, entry: MixtureEntry) -> Ints:
    rows = np.arange(len(file))
    if entry.objective:
        rows = rows[np.array(file.objectives, dtype=object) == entry.objective]
    if len(rows) == 0:
        raise DataError(
            f"preparing the training data: source {entry.source!r} has no conversation"
            + (f" of objective {entry.objective!r}; it has {sorted(set(file.objectives))}" if entry.objective else "")
        )
    return rows


def _group(file: ConversationFile, rows: Ints) -> dict[str, Ints]:
    """Rows of each image."""
    names = np.array(file.images, dtype=object)[rows]
    values, codes = np.unique(names.astype(str), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(values) + 1))
    return {str(v): rows[order[starts[i] : starts[i + 1]]] for i, v in enumerate(values)}


def _prefix_length(ids: Sequence[int], image_id: int, kind: str) -> int:
    """Tokens up to the end of the image block and, in chat form, the newline after it."""
    last = len(ids) - 1 - list(reversed(ids)).index(image_id)
    return last + 1 + (kind == "chat")
