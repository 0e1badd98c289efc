"""Table 14 and the percentages of section 4.2: what a conversation file says, and what the paper counted in
LLaVA-Instruct-80K."""

from collections.abc import Mapping
from typing import Any

from locvlm.data.keywords import PHRASES
from locvlm.evaluation.markdown import aligned
from locvlm.evaluation.tables import paper

_HEADER = ("phrase", "conversations", "of conv.", "of utt.", "any letters", "paper", "of conv.", "of utt.")


def keyword_table(counts: Mapping[str, Any]) -> str:
    """The table as text. `counts`: a keywords.json of `locvlm data keywords`.

    "of utt.": conversations divided by utterances, two a question-answer pair, as section 4.2 has it. "any letters":
    conversations that hold the letters, whole words or not.
    """
    rows = [_HEADER]
    for phrase in PHRASES:  # a file has them sorted
        count = counts["phrases"][phrase]
        rows.append(
            (
                phrase,
                f"{count['conversations']:,}",
                _percent(count["percent_of_conversations"]),
                _percent(count["percent_of_utterances"]),
                f"{count['substring']['conversations']:,}",
                *_printed(phrase),
            )
        )
    head = f"{counts['conversations']:,} conversations, {counts['utterances']:,} utterances"
    stated = paper()["stated_counts"]
    theirs = f"{stated['llava80k_conversations']:,} conversations, {2 * stated['llava80k_qa_pairs']:,} utterances"
    return "\n".join([f"{head} (paper: {theirs})", aligned(rows)])


def _printed(phrase: str) -> tuple[str, str, str]:
    """The paper's count and its two percentages; a dash for what it does not print."""
    for word in ("left", "right"):
        if phrase == word:
            stated = paper()["stated_counts"][f"llava80k_{word}_conversations"]
            of_conversations, of_utterances = stated["percent_of_conversations"], stated["percent_main_text"]
            return f"{stated['count']:,}", _percent(of_conversations), _percent(of_utterances)
        for row in paper()["tables"]["table_14"]["rows"]:
            if phrase == row["template"].format(word):
                return f"{row[f'{word}_count']:,}", _percent(row[f"{word}_percent"]), "-"
    return "-", "-", "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"
