"""Conversations -> training samples: the mixture, its order, ids, labels and pixels.

The order is a pure function of (seed, epoch), so a run resumes at the exact sample from its step number alone.
"""

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from locvlm.config import MixtureEntry, StageConfig, VideoConfig
from locvlm.data.conversations import ConversationFile
from locvlm.data.frames import Seen, VideoSource
from locvlm.data.instruct import Renderer
from locvlm.errors import ConfigError, DataError
from locvlm.geometry import ImageGeometry
from locvlm.pixels import ImageSource
from locvlm.prompts import render_chat, render_plain
from locvlm.records import Conversation

Ints = npt.NDArray[np.int64]

_WINDOW = 50  # batches that are sorted together
_LOOKED_AT = 256  # samples among which the longest is looked for
# where an image is (the first mixture entry with images there) and its name
ImageKey = tuple[int, str]


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
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        n_image_tokens: int | None = None,
    ) -> Sequence[EncodedText]: ...


@dataclass(frozen=True, slots=True)
class Branch:
    """The tokens of one conversation after the image prefix. `supervised` marks the targets."""

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image or video and one or more conversations about it that share its prefix.

    `pixels`: RGB as the geometry gives it, uint8 [side, side, 3], of a video [frames, side, side, 3]; or None and
    `features`: the pooled tokens of a video, float16 [tokens, visual width].
    """

    pixels: npt.NDArray[np.uint8] | None
    prefix: list[int]
    branches: tuple[Branch, ...]
    features: npt.NDArray[np.float16] | None = None


class TrainingData:
    """All samples of a stage.

    With `stage.conversations_per_image` = 0 a sample is one conversation, and an epoch is every conversation of the
    mixture (weights repeat or thin out the sources). With k > 0 a sample is an image with k of its conversations, each
    drawn by the weights among the entries that the image has anything of; an epoch is every image once.

    `images`: where the images of all sources are, or of each source by its name. The same name in two places is two
    images.
    """

    def __init__(
        self,
        stage: StageConfig,
        sources: Mapping[str, ConversationFile],
        images: ImageSource | Mapping[str, ImageSource],
        renderer: Renderer,
        encoder: Encoder,
        geometry: ImageGeometry,
        max_length: int,
        seed: int,
        video: VideoConfig | None = None,
    ) -> None:
        entries = stage.mixture or tuple(MixtureEntry(source=name) for name in sources)
        unknown = sorted({entry.source for entry in entries} - set(sources))
        if unknown:
            raise ConfigError(
                f"preparing the training data: the mixture names the source(s) {', '.join(unknown)}, but --data gave "
                f"{', '.join(sorted(sources)) or 'none'}; add --data {unknown[0]}=PATH or change stages.*.mixture"
            )
        self.stage, self.seed, self.max_length = stage, seed, max_length
        self.renderer, self.encoder, self.geometry = renderer, encoder, geometry
        self.files = [sources[entry.source] for entry in entries]
        self.images = [images if isinstance(images, ImageSource) else images[entry.source] for entry in entries]
        self.weights = np.array([entry.weight for entry in entries])
        if not stage.mixture:  # all conversations alike: a source counts by its size
            self.weights = np.array([float(len(file)) for file in self.files])
        self.rows = [_rows_of(file, entry) for file, entry in zip(self.files, entries, strict=True)]
        self.by_image: list[dict[ImageKey, Ints]] = []
        self.image_keys: list[ImageKey] = []
        if stage.conversations_per_image:
            places = [self.images.index(source) for source in self.images]
            self.by_image = [
                {(place, name): rows for name, rows in _group(file, rows).items()}
                for place, file, rows in zip(places, self.files, self.rows, strict=True)
            ]
            self.image_keys = sorted(set().union(*self.by_image))
        self.video = video
        self._videos: dict[int, VideoSource] = {}
        self._plans: dict[int, Ints] = {}
        self._lock = threading.Lock()  # samples are made by several threads

    def __len__(self) -> int:
        """Samples an epoch."""
        if self.stage.conversations_per_image:
            return len(self.image_keys)
        return sum(len(rows) for rows in self.rows)

    def sample(self, index: int) -> Sample:
        """The `index`-th sample since the start of training; epochs follow one another, each in its own order."""
        return self._build(self._picks(index), index // len(self))

    def describe(self, index: int) -> str:
        """The `index`-th sample in words: image and conversation ids."""
        conversations = [self.files[entry][row] for entry, row in self._picks(index)]
        return f"{conversations[0].image}: {', '.join(conversation.id for conversation in conversations)}"

    def longest(self, n: int) -> list[int]:
        """The indices of the `n` samples of the first epoch whose text is longest, as far as that shows unrendered."""
        likely = [int(index) for index in self._likely_long()]
        size = {index: sum(self._lengths[entry][row] for entry, row in self._picks(index)) for index in likely}
        found = sorted(likely, key=lambda index: (-size[index], index))[:n]
        return (found * -(-n // len(found)))[:n]

    @functools.cached_property
    def _lengths(self) -> list[Ints]:
        # a video has a token a frame more than an image, about four characters each
        frames = 4 * self.video.n_frames if self.video is not None else 0
        return [file.text_lengths() + frames * file.about_videos() for file in self.files]

    def _likely_long(self) -> Ints:
        """The samples of the first epoch to look at for the longest: all, or (packed) those of the richest images."""
        plan = self._order_of(0)
        if not self.stage.conversations_per_image:
            size = np.array([self._lengths[entry][row] for entry, row in plan])
        else:
            best = np.zeros(len(self.image_keys), np.int64)
            for lengths, rows_of in zip(self._lengths, self.by_image, strict=True):
                for number, key in enumerate(self.image_keys):
                    if key in rows_of:
                        best[number] = max(best[number], lengths[rows_of[key]].max())
            size = best[plan[:, 1]]
        return np.argsort(-size, kind="stable")[:_LOOKED_AT]

    def _picks(self, index: int) -> list[tuple[int, int]]:
        """(entry, row) of the conversations of a sample."""
        epoch, place = divmod(index, len(self))
        entry, row = (int(value) for value in self._order_of(epoch)[place])
        return self._draw(epoch, self.image_keys[row]) if self.stage.conversations_per_image else [(entry, row)]

    def _order_of(self, epoch: int) -> Ints:
        with self._lock:
            if epoch not in self._plans:
                self._plans = {old: plan for old, plan in self._plans.items() if old >= epoch - 1}
                self._plans[epoch] = self._order(epoch)
            return self._plans[epoch]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """[samples, 2]: entry and row (or, packed, 0 and image number) of each place of the epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.stage.conversations_per_image:
            images = rng.permutation(len(self.image_keys))
            return np.stack([np.zeros_like(images), images], axis=1)
        total = len(self)
        shares = np.floor(np.cumsum(self.weights / self.weights.sum()) * total + 0.5).astype(np.int64)
        counts = np.diff(shares, prepend=0)
        pairs = []
        for entry, (rows, count) in enumerate(zip(self.rows, counts, strict=True)):
            repeats = -(-int(count) // len(rows))
            chosen = np.concatenate([rng.permutation(rows) for _ in range(repeats)] or [rows[:0]])[:count]
            pairs.append(np.stack([np.full(count, entry), chosen], axis=1))
        plan = rng.permutation(np.concatenate(pairs))
        return self._grouped(plan, epoch, rng) if self.stage.group_by_length else plan

    def _grouped(self, plan: Ints, epoch: int, rng: np.random.Generator) -> Ints:
        """The plan with conversations of like length in one global batch: sorted within windows of many batches, the
        batches of a window shuffled. What belongs to a batch that reaches into another epoch stays where it is."""
        batch = self.stage.global_batch
        first = -(epoch * len(self)) % batch
        grouped = plan.copy()
        lengths = np.array([self._lengths[entry][row] for entry, row in plan])
        for start in range(first, len(plan) - batch + 1, batch * _WINDOW):
            n_batches = min(_WINDOW, (len(plan) - start) // batch)
            order = np.argsort(lengths[start : start + n_batches * batch], kind="stable").reshape(n_batches, batch)
            grouped[start : start + n_batches * batch] = plan[start + rng.permutation(order).ravel()]
        return grouped

    def _draw(self, epoch: int, image: ImageKey) -> list[tuple[int, int]]:
        """(entry, row) of the conversations of one packed sample: by weight, each once while there is choice."""
        place, name = image
        rng = np.random.default_rng((self.seed, epoch, *name.encode(), *([256 + place] if place else [])))
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
        seen = self._see(picks[0][0], conversations[0])
        texts, spans = [], []
        for conversation in conversations:
            turns = self.renderer.turns(conversation, epoch)
            text, ranges = self._fit(turns, seen.n_tokens)
            texts.append(text)
            spans.append(ranges)
        encoded = self.encoder.encode(texts, spans, seen.n_tokens)
        prefix_length = _prefix_length(encoded[0].ids, self.encoder.image_id, self.stage.format)
        prefix = encoded[0].ids[:prefix_length]
        for item in encoded[1:]:
            if item.ids[:prefix_length] != prefix:
                raise DataError(
                    f"packing the conversations of image {conversations[0].image}: their prompts do not begin with the "
                    "same tokens, so they cannot share one image prefix; set conversations_per_image to 0"
                )
        branches = tuple(Branch(item.ids[prefix_length:], item.supervised[prefix_length:]) for item in encoded)
        return Sample(seen.pixels, prefix, branches, seen.features)

    def _see(self, entry: int, conversation: Conversation) -> Seen:
        """The image, or the video, that the conversation is about."""
        if conversation.medium != "video":
            image = self.images[entry].open(conversation.image)
            return Seen(self.encoder.n_image_tokens, pixels=np.asarray(self.geometry.apply(image)))
        if self.video is None:
            raise DataError(
                f"reading the conversation {conversation.id!r}: it is about the video {conversation.image}, and the "
                "configuration has no section `video`; train a video preset, or leave this source out"
            )
        if entry not in self._videos:
            folder = self.images[entry].path
            self._videos[entry] = VideoSource(folder, self.video, self.geometry, self.encoder.n_image_tokens)
        return self._videos[entry].see(conversation.image)

    def _fit(self, turns: list[tuple[str, str]], n_visual: int) -> tuple[str, list[tuple[int, int]]]:
        """Render, dropping whole trailing turns until the conversation fits `max_length`."""
        if self.stage.format == "plain":
            text, span = render_plain(turns[0][1])
            return text, [span]
        for n_turns in range(len(turns), 0, -1):
            text, spans = render_chat(turns[:n_turns], self.renderer.prompts.system)
            # a token covers at least one byte: encode only when that bound does not settle it
            bound = len(text.encode()) + n_visual + 1
            if bound <= self.max_length:
                return text, spans
            if len(self.encoder.encode([text], n_image_tokens=n_visual)[0].ids) <= self.max_length:
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
    last = len(ids) - 1 - ids[::-1].index(image_id)
    return last + 1 + (kind == "chat")
