import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from locvlm.data.conversations import write_conversations
from locvlm.data.keywords import PHRASES, count_keywords, phrases_in, read_keywords
from locvlm.errors import DataError
from locvlm.evaluation.keywords import keyword_table
from locvlm.records import Conversation, Turn

TOY = [
    [
        ("Where is the cat?", "The cat is on the LEFT side, to the left of the dog."),
        ("And the dog?", "To the\n right."),
    ],
    [
        ("What is left over?", "Leftovers, a bright light and a copyright notice."),
        ("Is it right?", "Right; the right."),
    ],
    [("Is it high?", "It hangs above the door, not below the shelf.")],
    [("Hello?", "Nothing here.")],
]


def _llava(corpus: Any = TOY) -> list[dict[str, Any]]:
    return [
        {
            "id": str(number),
            "image": f"{number}.jpg",
            "conversations": [
                {"from": sender, "value": text}
                for pair in pairs
                for sender, text in zip(("human", "gpt"), pair, strict=True)
            ],
        }
        for number, pairs in enumerate(corpus)
    ]


def _videochat() -> list[dict[str, Any]]:
    return [{"image": f"{n}.jpg", "QA": [{"q": q, "a": a} for q, a in pairs]} for n, pairs in enumerate(TOY)]


def test_a_toy_corpus_has_the_counts_made_by_hand() -> None:
    counts = count_keywords([[text for pair in pairs for text in pair] for pairs in TOY])
    assert (counts.conversations, counts.utterances) == (4, 12)
    found = {p: (c.conversations, c.utterances) for p, c in counts.phrases.items() if c.conversations}
    assert found == {
        "left": (2, 2),
        "right": (2, 3),
        "above": (1, 1),
        "below": (1, 1),
        "the left": (1, 1),
        "the right": (2, 2),
        "left side": (1, 1),
        "to the left": (1, 1),
        "to the right": (1, 1),
    }
    letters = {p: (c.substring_conversations, c.substring_utterances) for p, c in counts.phrases.items()}
    assert (letters["left"], letters["right"]) == ((2, 3), (2, 4))  # Leftovers; bright, copyright


def test_the_main_text_divides_by_twice_the_question_answer_pairs(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(_llava()))
    told = read_keywords(path).to_dict()
    assert (told["conversations"], told["qa_pairs"], told["utterances"]) == (4, 6, 2 * 6)
    left = told["phrases"]["left"]
    assert (left["percent_of_conversations"], left["percent_of_utterances"]) == (50.0, round(100 * 2 / 12, 4))


def test_the_papers_own_percentages_follow_from_its_counts() -> None:
    counts = count_keywords([])
    counts.conversations, counts.utterances = 80_000, 2 * 221_333
    counts.phrases["left"].conversations, counts.phrases["right"].conversations = 1_619, 5_001
    told = counts.to_dict()["phrases"]
    assert [round(told[w]["percent_of_conversations"], 2) for w in ("left", "right")] == [2.02, 6.25]
    assert [round(told[w]["percent_of_utterances"], 2) for w in ("left", "right")] == [0.37, 1.13]


def test_every_form_of_the_same_corpus_gives_the_same_counts(tmp_path: Path) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in _llava())
    (tmp_path / "llava.json").write_text(json.dumps(_llava(), indent=1))
    (tmp_path / "llava.jsonl").write_text(lines)
    (tmp_path / "videochat.json").write_text(json.dumps(_videochat()))
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(lines.encode()))
    write_conversations(
        tmp_path / "folder",
        [
            Conversation(str(n), f"{n}.jpg", 8, 8, "text", tuple(Turn("text", question=q, answer=a) for q, a in pairs))
            for n, pairs in enumerate(TOY)
        ],
    )
    found = [read_keywords(tmp_path / name).to_dict() for name in sorted(p.name for p in tmp_path.iterdir())]
    assert len(found) == 5
    assert all(one == found[0] for one in found)
    assert found[0]["phrases"]["the right"]["conversations"] == 2


def test_structured_turns_are_counted_by_the_text_they_are_rendered_to(tmp_path: Path) -> None:
    turns = (
        Turn("loc_pred", "cat", "cat that sits to the left of a dog", (1.0, 1.0, 5.0, 5.0)),
        Turn("neg_pred", "cup"),
    )
    write_conversations(tmp_path / "d", [Conversation("1", "1.jpg", 8, 8, "loc_pred", turns)])
    told = read_keywords(tmp_path / "d").to_dict()
    assert (told["conversations"], told["utterances"]) == (1, 4)
    assert told["phrases"]["to the left"]["utterances"] == 1
    assert told["phrases"]["right"]["substring"]["conversations"] == 0


def test_words_end_where_letters_end() -> None:
    assert phrases_in("Left-hand, right_hand and LEFT.")[0] == {"left"}
    assert phrases_in("to  the\tright-most")[0] == {"right", "the right", "to the right"}
    assert phrases_in("bright alright belower")[0] == set()
    assert phrases_in("bright alright belower")[1] == {"right", "below"}
    assert phrases_in("") == (set(), set())
    assert len(PHRASES) == len(set(PHRASES)) == 16


def test_single_texts_and_single_pairs_are_records_too(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"q": "left?", "a": "no", "video_id": "v"}\n\n{"text": "on the right"}\n')
    counts = read_keywords(path)
    assert (counts.conversations, counts.utterances) == (2, 3)
    assert (counts.phrases["left"].conversations, counts.phrases["the right"].conversations) == (1, 1)


def test_records_without_text_are_counted_and_too_many_refused(tmp_path: Path) -> None:
    bad: list[Any] = [
        {},
        7,
        None,
        {"conversations": []},
        {"conversations": [{"from": "human"}]},
        {"QA": [3]},
        {"q": "left", "a": None},
    ]
    path = tmp_path / "c.json"
    path.write_text(json.dumps(_llava() * 2 + bad))
    counts = read_keywords(path)
    assert (counts.conversations, counts.skipped.total()) == (8, 7)
    assert counts.to_dict()["skipped"] == dict(counts.skipped)
    path.write_text(json.dumps(bad))
    with pytest.raises(DataError, match="7 of 7 records"):
        read_keywords(path)


def test_nan_and_half_surrogates_cost_nothing_but_themselves(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('[{"text": "left", "score": NaN}, {"text": "right", "name": "\\ud800"}, {"text": "above"}]')
    assert [p for p, c in read_keywords(path).phrases.items() if c.conversations] == ["left", "above"]
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "left", "score": NaN}\n{"text": "below"\n{"text": "right"}\n')
    counts = read_keywords(path)
    assert [p for p, c in counts.phrases.items() if c.conversations] == ["left", "right"]
    assert counts.skipped.total() == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" \n",
        b"[]",
        b"[{]",
        b'{"text": "cut',
        b"\xff\xfe\x00",
        b"left and right",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_a_file_that_is_no_json_gives_one_message(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"c\.json"):
        read_keywords(path)


def test_real_files_have_counts_that_a_plain_loop_finds_too(realdata: Path) -> None:
    path = realdata / "llava_instruct" / "videochat_llava_complex_reasoning_2k_first700.json"
    counts = read_keywords(path)
    assert (counts.conversations, counts.utterances, counts.skipped) == (700, 1400, {})
    expected: Counter[str] = Counter()
    for record in json.loads(path.read_text()):
        words = " ".join(pair[key] for pair in record["QA"] for key in "qa").lower()
        cleaned = "".join(letter if letter.isalnum() else " " for letter in words).split()
        expected.update({word for word in ("left", "right", "above", "below") if word in cleaned})
    assert {word: counts.phrases[word].conversations for word in expected} == expected
    for name, n in (("coco2014_val_qa90_questions.jsonl", 90), ("coco2014_val_qa90_gpt4_answer.jsonl", 90)):
        assert read_keywords(path.parent / name).conversations == n


def test_the_pretraining_list_is_counted_whole(realdata: Path) -> None:
    counts = read_keywords(realdata / "llava_pretrain" / "blip_laion_cc_sbu_2k_folder00001.json")
    assert (counts.conversations, counts.utterances) == (1656, 3312)


def test_the_table_shows_the_papers_numbers_beside_ours() -> None:
    counts = count_keywords([[text for pair in pairs for text in pair] for pairs in TOY]).to_dict()
    lines = [" ".join(line.split()) for line in keyword_table(counts).splitlines()]
    assert lines[0] == "4 conversations, 12 utterances (paper: 80,000 conversations, 442,666 utterances)"
    assert "left 2 50.00 % 16.67 % 2 1,619 2.02 % 0.37 %" in lines
    assert "the right 2 50.00 % 16.67 % 2 1,314 1.54 % -" in lines
    assert "to the left 1 25.00 % 8.33 % 1 80 0.10 % -" in lines
    assert "above 1 25.00 % 8.33 % 1 - - -" in lines
    assert len(lines) == 2 + 16
    assert "-" in keyword_table(count_keywords([]).to_dict()).splitlines()[2]
