"""The lesson of the tiny language model: to look things up in a scene that is stated in words, and to compare.

The stand-in for what LLaMA knows before stage 1. A row states a scene ("USER: apple 12 30; tent 40 7;", each name with
the column and row of its centre) where a picture's tokens will stand, and asks about it. The words of the project's
presence and side questions occur, those of LocPred, NegPred and RevLoc do not.

Looking up has to work for any name. So there are hundreds of them, and in the second half of the lesson their rows are
drawn anew all the time: what is learned cannot lean on a name's own weights.
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

log = logging.getLogger(__name__)

COLUMNS = 48  # places have whole columns and rows below this
_NAME_STD, _WEIGHT_STD, _OUTPUT_SHARE = 1.0, 0.05, 0.35  # at transformers' own 0.02 nothing is looked up
_REDRAW_RATE = 0.01  # share of the names that get new rows in a step
_RATE, _WARM_UP, _END = 1.2e-3, 200, 0.1
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


@dataclass(slots=True)
class Row:
    """A text. `spans`: the characters that the model has to say, (begin, end); `kinds`: of each question; `words`: of
    each the characters of the one word that decides, which is one token."""

    text: str
    spans: list[tuple[int, int]]
    kinds: list[str]
    words: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ReadingFigures:
    """Shares of right words about stated scenes, asked in short and in the project's own words; a side in full given
    the words of the answer before it."""

    presence: float
    side: float
    height: float
    presence_in_full: float
    side_in_full: float


class _Scene:
    """Names and their columns and rows."""

    def __init__(self, names: Sequence[str], rng: random.Random) -> None:
        chosen = rng.sample(names, rng.randint(2, 5) + 1)
        self.absent, self.names = chosen[0], chosen[1:]
        self.places = {name: (rng.randrange(COLUMNS), rng.randrange(COLUMNS)) for name in self.names}
        self.rng = rng

    def stated(self) -> str:
        return "".join(f" {name} {x} {y};" for name, (x, y) in self.places.items())

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

    def __init__(self, text: str) -> None:
        self.row = Row(text, [], [], [])

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


def short_row(names: Sequence[str], rng: random.Random, kinds: dict[str, float]) -> Row:
    """A stated scene and eight short questions."""
    scene = _Scene(names, rng)
    writer = _Writer(f"{prompts.USER}{scene.stated()}\n")
    for kind in rng.choices(list(kinds), list(kinds.values()), k=8):
        _ask_short(scene, writer, kind)
    return writer.row


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


def chat_row(names: Sequence[str], rng: random.Random) -> Row:
    """A stated scene where the image stands, and four questions in the project's words."""
    scene = _Scene(names, rng)
    writer = _Writer(f"{prompts.USER}{scene.stated()}\n")
    for number in range(4):
        if number:
            writer.ask(f"{prompts.USER} ")
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


def caption_row(names: Sequence[str], rng: random.Random) -> Row:
    """A stated scene and its caption in the plain form of stage 1."""
    scene = _Scene(names, rng)
    writer = _Writer(scene.stated())
    answer = f"A photo of {joined_names(scene.names)}."
    writer.say(f"{answer}\n", "caption", "A")
    return writer.row


def rows(names: Sequence[str], seed: int, steps: int, n: int) -> Iterator[list[Row]]:
    """The rows of every step."""
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


def teach(
    model: LocVLM, encoder: TextEncoder, names: Sequence[str], held_out: Sequence[str], steps: int, seed: int
) -> ReadingFigures:
    """Train the language model of `model` from new weights; returns what it answers about scenes of `held_out` names.

    A name is one token behind a space. Raises ValueError for one that is not.
    """
    generator = torch.Generator().manual_seed(seed)
    _begin(model, generator)
    taught, others = _tokens(encoder, names), _tokens(encoder, held_out)
    _draw(model, torch.cat([taught, others]), generator)
    trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    begun = time.monotonic()
    for step, texts in enumerate(rows(names, seed, steps, 32)):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1, (step + 1) / _WARM_UP) * (1 - (1 - _END) * step / steps)
        ids, labels = _batch(encoder, texts)
        loss = nn.functional.cross_entropy(
            _logits(model, ids)[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, _CLIP)
        optimizer.step()
        if _REDRAWN[0] * steps <= step < _REDRAWN[1] * steps:
            chosen = torch.rand(len(taught), generator=generator) < _REDRAW_RATE
            _draw(model, taught[chosen], generator)
        if (step + 1) % 100 == 0:
            figures = measure(model, encoder, held_out, seed)
            log.info("reading: step %d loss %.4f %s (%.0f s)", step + 1, loss.item(), figures, time.monotonic() - begun)
    _spread_numbers(model, encoder)
    return measure(model, encoder, held_out, seed)


@torch.no_grad()
def measure(model: LocVLM, encoder: TextEncoder, names: Sequence[str], seed: int, n: int = 100) -> ReadingFigures:
    """What it answers about `n` rows of each form."""
    rng = random.Random(f"{seed}/reading/measure")
    texts = [chat_row(names, rng) for _ in range(n)] + [
        short_row(names, rng, {"side": 1.0, "height": 1.0, "presence": 1.0}) for _ in range(n)
    ]
    ids, labels = _batch(encoder, texts, [row.words for row in texts])
    said = _logits(model, ids).argmax(-1)
    decides = labels != -100
    right = (said[:, :-1] == labels[:, 1:])[decides[:, 1:]].tolist()  # row after row, as the kinds
    kinds = [kind for row in texts for kind in row.kinds]
    found = {
        name: [is_right for kind, is_right in zip(kinds, right, strict=True) if kind == name]
        for name in (field.name for field in fields(ReadingFigures))
    }
    return ReadingFigures(**{name: round(sum(values) / len(values), 4) for name, values in found.items()})


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
    return torch.tensor([_token(encoder, f" {name}") for name in names])


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


def _logits(model: LocVLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
        logits: torch.Tensor = model.lm_head(hidden)
    return logits
