"""How often training conversations say where things are (paper, section 4.2 and appendix F, table 14).

The paper counts conversations in which a phrase occurs at least once, and divides by the conversations (table 14) or by
the utterances, two a question-answer pair (section 4.2): 1,619 conversations with "left" are 2.02 % or 0.37 %.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locvlm.config import CoordinateConfig, PromptConfig
from locvlm.coordinates import make_location_format
from locvlm.data.coco import refuse_if_most_skipped
from locvlm.data.conversations import open_conversations
from locvlm.data.instruct import Renderer
from locvlm.data.rows import decode_row, split_rows

WORDS = ("left", "right", "above", "below")
TEMPLATES = ("the {}", "{} side", "to the {}")
PHRASES = (*WORDS, *(template.format(word) for template in TEMPLATES for word in WORDS))

_NO_TEXT = "record without a text of one of the known forms"


@dataclass(slots=True)
class PhraseCount:
    """Conversations and utterances that hold a phrase: as whole words in any case, and as a mere run of letters ("the
    left" in "the leftover")."""

    conversations: int = 0
    utterances: int = 0
    substring_conversations: int = 0
    substring_utterances: int = 0


@dataclass(slots=True)
class KeywordCounts:
    """`phrases`: a count for each of PHRASES. `skipped`: reason -> records without text."""

    conversations: int = 0
    utterances: int = 0
    phrases: dict[str, PhraseCount] = field(default_factory=lambda: {phrase: PhraseCount() for phrase in PHRASES})
    skipped: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the two percentages of the paper for every phrase (None of an empty file)."""
        return {
            "conversations": self.conversations,
            "utterances": self.utterances,
            "qa_pairs": self.utterances // 2,
            "phrases": {
                phrase: {
                    "conversations": count.conversations,
                    "utterances": count.utterances,
                    "percent_of_conversations": _percent(count.conversations, self.conversations),
                    "percent_of_utterances": _percent(count.conversations, self.utterances),
                    "substring": {
                        "conversations": count.substring_conversations,
                        "utterances": count.substring_utterances,
                    },
                }
                for phrase, count in self.phrases.items()
            },
            "skipped": dict(sorted(self.skipped.items())),
        }


def count_keywords(conversations: Iterable[list[str]]) -> KeywordCounts:
    """Count PHRASES in conversations, each the list of its utterances."""
    counts = KeywordCounts()
    for utterances in conversations:
        counts.conversations += 1
        counts.utterances += len(utterances)
        whole: Counter[str] = Counter()
        inside: Counter[str] = Counter()
        for text in utterances:
            words, letters = phrases_in(text)
            whole.update(words)
            inside.update(letters)
        for phrase, n in inside.items():
            count = counts.phrases[phrase]
            count.substring_conversations += 1
            count.substring_utterances += n
            count.conversations += phrase in whole
            count.utterances += whole[phrase]
    return counts


def phrases_in(text: str) -> tuple[set[str], set[str]]:
    """The phrases that occur in a text as whole words, and those that occur as a run of letters (all of the first are
    among the second). Case and the kind of white space between words do not matter."""
    lowered = text.lower()
    if not any(word in lowered for word in WORDS):  # nearly every text
        return set(), set()
    line = " ".join(lowered.split())
    letters = {phrase for phrase in PHRASES if phrase in line}
    return {phrase for phrase in letters if _PATTERNS[phrase].search(line)}, letters


def read_keywords(path: Path) -> KeywordCounts:
    """The counts of one file or folder: a LLaVA list, VideoChat's `[{image, QA: [{q, a}]}]`, question-answer records
    (`q`, `a`), single texts (`text`), each as a JSON list or as JSON lines; or a folder of `locvlm data ...`.

    Raises DataError when it cannot be read, or when most of its records have no text.
    """
    if path.is_dir() or path.suffix == ".arrow":
        return count_keywords(_stored(path))
    raws = split_rows(path)
    skipped: Counter[str] = Counter()
    counts = count_keywords(_texts(raws, skipped))
    counts.skipped = skipped
    refuse_if_most_skipped(path, "records", skipped, len(raws))
    return counts


def _texts(raws: Iterable[Any], skipped: Counter[str]) -> Iterator[list[str]]:
    for raw in raws:
        utterances = _utterances(decode_row(raw, dict[str, Any]) or {})
        if utterances:
            yield utterances
        else:
            skipped[_NO_TEXT] += 1


def _utterances(record: dict[str, Any]) -> list[str]:
    """The texts of one record, human and model in turn; empty when it has none of the known forms."""
    values: list[Any]
    if isinstance(record.get("conversations"), list):
        values = [turn.get("value") if isinstance(turn, dict) else None for turn in record["conversations"]]
    elif isinstance(record.get("QA"), list):
        pairs = [pair if isinstance(pair, dict) else {} for pair in record["QA"]]
        values = [text for pair in pairs for text in (pair.get("q"), pair.get("a"))]
    elif "q" in record:
        values = [record["q"], record.get("a")]
    else:
        values = [record.get("text")]
    return list(values) if all(isinstance(value, str) for value in values) else []


def _stored(path: Path) -> Iterator[list[str]]:
    """The conversations of a data set of ours. No template holds a phrase that is counted, and places are numbers, so
    it is one which of them the text is rendered with."""
    renderer = Renderer(make_location_format(CoordinateConfig()), PromptConfig(), seed=0)
    for conversation in open_conversations(path):
        yield [text for turn in renderer.turns(conversation) for text in turn]


def _percent(n: int, total: int) -> float | None:
    return round(100 * n / total, 4) if total else None


_PATTERNS = {phrase: re.compile(rf"\b{re.escape(phrase)}\b") for phrase in PHRASES}
