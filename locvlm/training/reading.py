"""The lesson of the tiny language model: to look things up in a scene that is stated in words, and to compare.

The stand-in for what LLaMA knows before stage 1. A row states a scene ("USER: apple 12 30; tent 40 7;", each name with
the column and row of its centre) where a picture's tokens will stand, and asks about it. The project's presence and
side questions occur, the sentences of LocPred, NegPred and RevLoc do not.

Looking up has to work for any name. So there are hundreds of them, and in the second half of the lesson their rows are
drawn anew all the time: what is learned cannot lean on a name's own weights.

A second lesson states half of the scenes in soft tokens: one vector that is the sum of a name, a column and a row, and
ground between them, as many as a picture has patches. The stand-in for what large language models do unasked: read
vectors that a linear layer put among their words. No picture occurs in it either. Half of its conversations' questions
are told in any words, in no order that means anything: to find the name that is asked about far from the answer.
"""

import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from locvlm import prompts
from locvlm.data.generic import joined_names
from locvlm.model.tokenizer import TextEncoder
from locvlm.model.variants import LocVLM
from locvlm.training.precision import autocast

log = logging.getLogger(__name__)

COLUMNS = 48  # places have whole columns and rows below this
_NAME_STD, _WEIGHT_STD, _OUTPUT_SHARE = 1.0, 0.05, 0.35  # at transformers' own 0.02 nothing is looked up
_REDRAW_RATE = 0.01  # share of the names that get new rows in a step
_RATE, _WARM_UP, _END = 1.2e-3, 200, 0.1
_SOFT_RATE, _SOFT_WARM_UP = 1e-3, 50
_CLIP = 1.0

# kinds of question -> weight, in the parts of the lesson; `pairs` is a row of its own
_SHORT = {"where": 0.2, "presence": 0.25, "steps": 0.1, "side": 0.4, "height": 0.05}
_PARTS: tuple[tuple[float, float, dict[str, float]], ...] = (  # (until this share of the steps, share of pairs, kinds)
    (0.11, 1.0, {}),
    (0.3, 0.3, {"where": 0.45, "presence": 0.3, "steps": 0.25}),
    (0.5, 0.25, _SHORT),
    (1.0, 0.1, _SHORT),
)
_REDRAWN = (0.5, 0.95)  # shares of the steps between which names are drawn anew
# the second lesson
_SOFT_SHARE, _SOFT_PAIRS = 0.5, 0.05  # of rows that state a scene in soft tokens; of rows of pairs
_PLAIN_WORDS = ("the", "of", "is", "in", "to", "image", "object", "located")  # to measure with
_TOLD_SHARE, _FAR = 0.5, 12  # of conversations' questions that are told in any words; how many at most on each side
_KNOWN_SHARE = 0.3  # of scenes of well-known names, which may have two words
_SOFT_REDRAWN = (0.0, 0.9)
_SOFT_NOISE = 0.3  # standard deviation; that of a word's row is about 1
_COPIES = (1, 4)  # soft tokens an object, both inclusive
# Little by little the short questions become the project's: what may stand between a name and whether it is there, and
# around two names and the side.
_ENDS = ("", "", "", " in", " in image", " in image?", f" in image? {prompts.ASSISTANT}")
_SIDES = (
    " side {0} {1}",
    " side {0} {1}",
    " side {0} {1}",
    " side of {0} is {1}",
    " side of {0} is {1} located?",
    f" side of {{0}} is {{1}} located? {prompts.ASSISTANT} The {{1}}",
    f" Which side of {{0}} is {{1}} located? {prompts.ASSISTANT} The {{1}} is located to the",
)


# a name (None: ground), its column, its row
SoftToken = tuple[str | None, int, int]


@dataclass(slots=True)
class Row:
    """A text. `spans`: the characters that the model has to say, (begin, end); `kinds`: of each question; `words`: of
    each the characters of the one word that decides, which is one token; `soft`: what stands where the text has
    an image."""

    text: str
    spans: list[tuple[int, int]]
    kinds: list[str]
    words: list[tuple[int, int]]
    soft: list[SoftToken]


@dataclass(frozen=True, slots=True)
class ReadingFigures:
    """Shares of right words about stated scenes, asked in short and in the project's own words; a side in full given
    the words of the answer before it."""

    presence: float
    side: float
    height: float
    presence_in_full: float
    side_in_full: float
    told: float


class _Scene:
    """Names and their columns and rows."""

    def __init__(self, names: Sequence[str], rng: random.Random) -> None:
        chosen = rng.sample(names, rng.randint(2, 5) + 1)
        self.absent, self.names = chosen[0], chosen[1:]
        self.places = {name: (rng.randrange(COLUMNS), rng.randrange(COLUMNS)) for name in self.names}
        self.rng = rng

    def stated(self) -> str:
        return "".join(f" {name} {x} {y};" for name, (x, y) in self.places.items())

    def soft(self, n: int) -> list[SoftToken]:
        """The scene as `n` soft tokens, shuffled."""
        found: list[SoftToken] = [
            (name, *place) for name, place in self.places.items() for _ in range(self.rng.randint(*_COPIES))
        ]
        found += [(None, self.rng.randrange(COLUMNS), self.rng.randrange(COLUMNS)) for _ in range(n - len(found))]
        self.rng.shuffle(found)
        return found

    def pair(self, axis: int) -> tuple[str, str, str] | None:
        """Two names, and where the second lies as seen from the first; None where they do not differ."""
        first, second = self.rng.sample(self.names, 2)
        a, b = self.places[first][axis], self.places[second][axis]
        if a == b:
            return None
        words = ("left", "right") if axis == 0 else ("above", "below")
        return first, second, words[b > a]


class _Writer:
    """Puts a row together."""

    def __init__(self, text: str, soft: list[SoftToken] | None = None) -> None:
        self.row = Row(text, [], [], [], soft or [])

    def ask(self, question: str) -> None:
        self.row.text += question

    def say(self, answer: str, kind: str, word: str) -> None:
        """`word` is the one of the answer that decides, with the space before it."""
        begin = len(self.row.text)
        at = begin + answer.index(word)
        self.row.text += answer
        self.row.spans.append((begin, len(self.row.text)))
        self.row.kinds.append(kind)
        self.row.words.append((at, at + len(word)))


def pairs_row(names: Sequence[str], rng: random.Random) -> Row:
    """Names with one number each, and some of them again: the first thing to learn."""
    scene = _Scene(names, rng)
    writer = _Writer(f"{prompts.USER}" + "".join(f" {name} {x};" for name, (x, _) in scene.places.items()) + "\n")
    for _ in range(8):
        name = rng.choice(scene.names)
        writer.ask(f" {name}")
        writer.say(f" {scene.places[name][0]}", "pairs", f" {scene.places[name][0]}")
    return writer.row


def short_row(names: Sequence[str], rng: random.Random, kinds: dict[str, float], soft: int = 0) -> Row:
    """A scene, stated in words or in `soft` tokens, and eight short questions."""
    scene = _Scene(names, rng)
    writer = _opened(scene, soft)
    for kind in rng.choices(list(kinds), list(kinds.values()), k=8):
        _ask_short(scene, writer, kind)
    return writer.row


def _opened(scene: _Scene, soft: int) -> _Writer:
    """A scene where the image of a conversation stands."""
    if soft:
        return _Writer(f"{prompts.USER} {prompts.IMAGE}\n", scene.soft(soft))
    return _Writer(f"{prompts.USER}{scene.stated()}\n")


def _ask_short(scene: _Scene, writer: _Writer, kind: str) -> None:
    rng = scene.rng
    if kind == "presence":
        is_there = rng.random() < 0.5
        writer.ask(f" is {rng.choice(scene.names) if is_there else scene.absent}{rng.choice(_ENDS)}")
        word = " yes" if is_there else " no"
        writer.say(word, kind, word)
        return
    found = None if kind == "where" else scene.pair(1 if kind == "height" else 0)
    if found is None:
        name = rng.choice([*scene.names, scene.absent])
        x, y = scene.places.get(name, ("none", ""))
        writer.ask(f" where {name}")
        writer.say(f" {x} {y}".rstrip(), "where", f" {x}")
        return
    first, second, word = found
    forms = {"steps": " steps {0} {1}?", "height": " height {0} {1}", "side": rng.choice(_SIDES)}
    writer.ask(forms[kind].format(first, second))
    worked_out = f" {first} {scene.places[first][0]} {second} {scene.places[second][0]}" if kind == "steps" else ""
    writer.say(f"{worked_out} {word}", kind, f" {word}")


def chat_row(names: Sequence[str], rng: random.Random, soft: int = 0, words: Sequence[str] = (), far: int = 0) -> Row:
    """A scene, stated in words or in `soft` tokens, and four questions in the project's words; where there are `words`,
    half of them in any of these, up to `far` on each side of what counts."""
    scene = _Scene(names, rng)
    writer = _opened(scene, soft)
    for number in range(4):
        if number:
            writer.ask(f"{prompts.USER} ")
        if words and rng.random() < _TOLD_SHARE:
            _ask_in_any_words(scene, writer, words, far)
            continue
        found = scene.pair(0) if rng.random() < 0.6 else None
        if found is None:
            is_there = rng.random() < 0.5
            name = rng.choice(scene.names) if is_there else scene.absent
            question = prompts.hallucination_question(name, "image")
            answer, kind, word = ("Yes" if is_there else "No"), "presence_in_full", (" Yes" if is_there else " No")
        else:
            first, second, side = found
            question = prompts.spatial_direct_question(first, second)
            answer, kind, word = prompts.spatial_answer(second, side, first), "side_in_full", f" {side}"
        writer.ask(f"{question} {prompts.ASSISTANT}")
        writer.say(f" {answer}{prompts.STOP}", kind, word)
    return writer.row


def _ask_in_any_words(scene: _Scene, writer: _Writer, words: Sequence[str], far: int) -> None:
    """Where a name is, or what is at a place, the asked among other words and the answer behind some: an order of words
    means nothing here, only who is asked about and that the answer says it at the end."""
    rng = scene.rng

    def some() -> str:
        return "".join(f" {word}" for word in rng.choices(words, k=rng.randint(0, far)))

    name = rng.choice(scene.names)
    x, y = scene.places[name]
    if rng.random() < 0.7:
        writer.ask(f"{some()} {name}{some()}? {prompts.ASSISTANT}{some()} at")
        writer.say(f" {x} {y}{prompts.STOP}", "told", f" {x}")
    else:
        writer.ask(f"{some()} {x} {y}{some()}? {prompts.ASSISTANT}{some()} is a")
        writer.say(f" {name}{prompts.STOP}", "named", f" {name.split()[0]}")


def caption_row(names: Sequence[str], rng: random.Random, soft: int = 0) -> Row:
    """A scene, stated in words or in `soft` tokens, and its caption in the plain form of stage 1."""
    scene = _Scene(names, rng)
    writer = _Writer(prompts.IMAGE, scene.soft(soft)) if soft else _Writer(scene.stated())
    answer = f"A photo of {joined_names(scene.names)}."
    writer.say(f"{answer}\n", "caption", "A")
    return writer.row


def rows(names: Sequence[str], seed: int, steps: int, n: int) -> Iterator[list[Row]]:
    """The rows of every step of the first lesson."""
    rng = random.Random(f"{seed}/reading")
    for step in range(steps):
        _, share_of_pairs, kinds = next(part for part in _PARTS if step < part[0] * steps)
        is_last = step >= _PARTS[-2][0] * steps
        yield [_one(names, rng, share_of_pairs, kinds, is_last) for _ in range(2 * n if share_of_pairs == 1 else n)]


def _one(names: Sequence[str], rng: random.Random, share_of_pairs: float, kinds: dict[str, float], full: bool) -> Row:
    drawn = rng.random()
    if drawn < share_of_pairs:
        return pairs_row(names, rng)
    if full and drawn > 0.9:
        return caption_row(names, rng)
    if full and drawn > 0.45:
        return chat_row(names, rng)
    return short_row(names, rng, kinds)


def soft_rows(
    names: Sequence[str], known: Sequence[str], words: Sequence[str], seed: int, steps: int, n: int, n_soft: int
) -> Iterator[list[Row]]:
    """The rows of every step of the second lesson; a scene in soft tokens has `n_soft`."""
    rng = random.Random(f"{seed}/soft")
    for step in range(steps):
        far = min(_FAR, 1 + 2 * _FAR * step // steps)
        yield [_one_soft(known if rng.random() < _KNOWN_SHARE else names, rng, n_soft, words, far) for _ in range(n)]


def _one_soft(names: Sequence[str], rng: random.Random, n_soft: int, words: Sequence[str], far: int) -> Row:
    drawn = rng.random()
    if drawn < _SOFT_PAIRS:
        return pairs_row(names, rng)
    soft = n_soft if rng.random() < _SOFT_SHARE else 0
    if drawn > 0.9:
        return caption_row(names, rng, soft)
    if drawn > 0.45:
        return chat_row(names, rng, soft, words, far)
    return short_row(names, rng, _SHORT, soft)


def teach(
    model: LocVLM, encoder: TextEncoder, names: Sequence[str], held_out: Sequence[str], steps: int, seed: int
) -> ReadingFigures:
    """Train the language model of `model` from new weights on scenes in words; returns what it answers about scenes of
    `held_out` names.

    A name is one token behind a space. Raises ValueError for one that is not.
    """
    generator = torch.Generator().manual_seed(seed)
    _begin(model, generator)
    _draw(model, _tokens(encoder, [*names, *held_out]), generator)
    taught = (_tokens(encoder, names), _REDRAWN)
    _train(model, encoder, held_out, (rows(names, seed, steps, 32), steps), (_RATE, _WARM_UP), taught, generator)
    return measure(model, encoder, held_out, seed)


def teach_soft(
    model: LocVLM,
    encoder: TextEncoder,
    names: Sequence[str],
    known: Sequence[str],
    words: Sequence[str],
    held_out: Sequence[str],
    steps: int,
    seed: int,
) -> tuple[ReadingFigures, ReadingFigures]:
    """Go on with scenes half of which are in soft tokens; returns what it answers about scenes of `held_out` names in
    words, and in soft tokens. `known`: names of one word or more whose words are never drawn anew, so that a second
    word is known by its first. `words`: what questions in any words are made of. Raises ValueError for a word that is
    not one token behind a space."""
    generator = torch.Generator().manual_seed(seed)
    lesson = soft_rows(names, known, words, seed, steps, 32, encoder.n_image_tokens)
    kept = {word for name in known for word in name.split()}
    taught = (_tokens(encoder, [name for name in names if name not in kept]), _SOFT_REDRAWN)
    _train(model, encoder, held_out, (lesson, steps), (_SOFT_RATE, _SOFT_WARM_UP), taught, generator)
    return measure(model, encoder, held_out, seed), measure(model, encoder, held_out, seed, soft=True)


def _train(
    model: LocVLM,
    encoder: TextEncoder,
    held_out: Sequence[str],
    lesson: tuple[Iterator[list[Row]], int],
    rate: tuple[float, int],
    redrawn: tuple[torch.Tensor, tuple[float, float]],
    generator: torch.Generator,
) -> None:
    """`held_out`: names to measure on; `lesson`: the rows of every step, and how many steps; `rate`: the highest
    learning rate, steps to reach it; `redrawn`: the tokens that are drawn anew, and between which shares of the
    steps."""
    taught, (begin, end) = redrawn
    steps = lesson[1]
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=rate[0], betas=(0.9, 0.98), weight_decay=0.01)
    begun = time.monotonic()
    for step, texts in enumerate(lesson[0]):
        for group in optimizer.param_groups:
            group["lr"] = rate[0] * min(1, (step + 1) / rate[1]) * (1 - (1 - _END) * step / steps)
        ids, labels = _batch(encoder, texts)
        soft = _soft_tokens(model, encoder, texts, generator)
        loss = nn.functional.cross_entropy(
            _logits(model, ids, soft)[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, _CLIP)
        optimizer.step()
        if begin * steps <= step < end * steps:
            chosen = torch.rand(len(taught), generator=generator) < _REDRAW_RATE
            _draw(model, taught[chosen], generator)
        if (step + 1) % 100 == 0:
            figures = measure(model, encoder, held_out, 0)
            log.info("reading: step %d loss %.4f %s (%.0f s)", step + 1, loss.item(), figures, time.monotonic() - begun)
    _spread_numbers(model, encoder)


@torch.no_grad()
def measure(
    model: LocVLM, encoder: TextEncoder, names: Sequence[str], seed: int, n: int = 100, *, soft: bool = False
) -> ReadingFigures:
    """What it answers about `n` rows of each form, their scenes in words or in soft tokens."""
    rng = random.Random(f"{seed}/reading/measure")
    n_soft = encoder.n_image_tokens if soft else 0
    texts = [chat_row(names, rng, n_soft) for _ in range(n)]
    texts += [chat_row(names, rng, n_soft, _PLAIN_WORDS, _FAR) for _ in range(n)]
    texts += [short_row(names, rng, {"side": 1.0, "height": 1.0, "presence": 1.0}, n_soft) for _ in range(n)]
    ids, labels = _batch(encoder, texts, [row.words for row in texts])
    logits = _logits(model, ids, _soft_tokens(model, encoder, texts, torch.Generator().manual_seed(seed)))[:, :-1]
    wanted = labels[:, 1:]
    apart = torch.arange(logits.shape[-1])
    for number in range(COLUMNS):  # it means the same without a space, see `_spread_numbers`
        apart[_token(encoder, str(number))] = _token(encoder, f" {number}")
    right = (apart[logits.argmax(-1)] == wanted)[wanted != -100].tolist()  # row after row, as the kinds
    kinds = [kind for row in texts for kind in row.kinds]
    found = {
        name: [is_right for kind, is_right in zip(kinds, right, strict=True) if kind == name]
        for name in (field.name for field in fields(ReadingFigures))
    }
    return ReadingFigures(**{name: round(sum(values) / len(values), 4) for name, values in found.items()})


def _soft_tokens(
    model: LocVLM, encoder: TextEncoder, texts: Sequence[Row], generator: torch.Generator
) -> torch.Tensor | None:
    """What stands for the images of the rows, [soft tokens, language width]; None where there is none. A name of
    several words is their sum. The row of a token is that number's word with its halves swapped, so that it cannot be
    taken for the column."""
    tokens = [token for row in texts for token in row.soft]
    if not tokens:
        return None
    table = model.model.language_model.embed_tokens.weight
    order = sorted({name for name, _, _ in tokens if name})
    words = [_tokens(encoder, name.split()) for name in order]
    named = torch.stack([torch.zeros(table.shape[1]), *(table[ids].sum(0) / len(ids) ** 0.5 for ids in words)])
    number = {name: at for at, name in enumerate(order, start=1)}
    numbers = table[_tokens(encoder, [str(column) for column in range(COLUMNS)])]
    columns, downs = (numbers[[token[axis] for token in tokens]] for axis in (1, 2))
    total: torch.Tensor = named[[number[name] if name else 0 for name, _, _ in tokens]]
    total = total + columns + downs.roll(table.shape[1] // 2, 1)
    total = total / 3**0.5
    return total + _SOFT_NOISE * torch.randn(total.shape, generator=generator)


def _begin(model: LocVLM, generator: torch.Generator) -> None:
    """New weights."""
    with torch.no_grad():
        for module in (model.model.language_model, model.lm_head):
            for name, weight in module.named_parameters():
                if weight.ndim < 2:
                    continue
                std = _NAME_STD if "embed_tokens" in name else _WEIGHT_STD
                std *= _OUTPUT_SHARE if "o_proj" in name or "down_proj" in name else 1.0
                weight.normal_(std=std, generator=generator)


def _draw(model: LocVLM, tokens: torch.Tensor, generator: torch.Generator) -> None:
    """New rows for these tokens; what they are said by is what they are read as, so that they can be repeated."""
    with torch.no_grad():
        inputs, outputs = model.model.language_model.embed_tokens.weight, model.lm_head.weight
        fresh = torch.randn(len(tokens), inputs.shape[1], generator=generator) * _NAME_STD
        inputs[tokens], outputs[tokens] = fresh, fresh * _WEIGHT_STD


def _spread_numbers(model: LocVLM, encoder: TextEncoder) -> None:
    """A number means the same without the space before it: places are written without. Which of the two is to be said
    is for stage 2 to learn."""
    with torch.no_grad():
        for weight in (model.model.language_model.embed_tokens.weight, model.lm_head.weight):
            for number in range(COLUMNS):
                weight[_token(encoder, str(number))] = weight[_token(encoder, f" {number}")]


def _tokens(encoder: TextEncoder, names: Sequence[str]) -> torch.Tensor:
    return torch.tensor([_token(encoder, f" {name}") for name in names], dtype=torch.long)


def _token(encoder: TextEncoder, text: str) -> int:
    ids = encoder.encode([text])[0].ids[1:]
    if len(ids) != 1:
        raise ValueError(f"{text!r} takes {len(ids)} tokens, the reading lesson needs one")
    return ids[0]


def _batch(
    encoder: TextEncoder, texts: Sequence[Row], spans: Sequence[Sequence[tuple[int, int]]] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, [rows, length]; -100 where nothing is to be said."""
    encoded = encoder.encode([row.text for row in texts], spans or [row.spans for row in texts])
    length = max(len(row.ids) for row in encoded)
    ids = torch.full((len(texts), length), encoder.pad_id)
    labels = torch.full((len(texts), length), -100)
    for number, row in enumerate(encoded):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        supervised = torch.tensor(row.supervised)
        labels[number, : len(row.ids)] = torch.where(supervised, ids[number, : len(row.ids)], -100)
    return ids, labels


def _logits(model: LocVLM, ids: torch.Tensor, soft: torch.Tensor | None = None) -> torch.Tensor:
    embedded = model.model.language_model.embed_tokens(ids)
    if soft is not None:
        embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], soft)
    with autocast(torch.device("cpu")):
        hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits: torch.Tensor = model.lm_head(hidden)
    return logits
