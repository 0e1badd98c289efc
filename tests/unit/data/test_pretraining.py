"""Published captions and instructions as conversations: the words kept, every loss counted, little memory."""

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.data.coco import BAD_FILE, MISSING_FILE
from locvlm.data.conversations import TEXT_ONLY, literal_conversations, open_conversations
from locvlm.data.pretraining import (
    BAD_CAPTION,
    BAD_QA,
    MISSING_VIDEO,
    NO_CAPTION,
    NO_IMAGE,
    NOT_ONE_CAPTION,
    REPEATED,
    REPEATED_IMAGE,
    Parts,
    dead_links,
    distinct,
    listed_captions,
    stream_list,
    tar_captions,
    video_instructions,
    with_sound_images,
)
from locvlm.data.shards import CUT_SHORT
from locvlm.errors import DataError
from locvlm.pixels import open_images
from locvlm.prompts import BRIEF_REQUESTS, render_plain
from locvlm.records import Conversation, Turn


def encoded(*records: Any) -> list[bytes]:
    return [json.dumps(record).encode() for record in records]


def record(key: str, question: str, caption: str, **more: Any) -> dict[str, Any]:
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    return {"id": key, "image": f"{key}.jpg", "conversations": messages, **more}


@pytest.mark.parametrize("separator", [",", ",\n", " ,\t\r\n "])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_list_is_read_record_by_record_whatever_its_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, block: int
) -> None:
    monkeypatch.setattr("locvlm.data.pretraining._BLOCK", block)
    records = [{"a": '[],{}"\\'}, {"b": ["\u00e9", {"c": None}]}, "text, ]", 12.5, [], {}]
    path = tmp_path / "list.json"
    for text in (separator.join(map(json.dumps, records)), separator.join(json.dumps(r, indent=2) for r in records)):
        path.write_bytes(b"\xef\xbb\xbf" + f" [{text} ]\n".encode())
        assert [json.loads(raw) for raw in stream_list(path)] == records
    path.write_bytes(gzip.compress(json.dumps(records, ensure_ascii=False).encode()))
    assert [json.loads(raw) for raw in stream_list(path)] == records
    path.write_text(" [ ] ")
    assert list(stream_list(path)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"  \n", "it is empty"),
        (b'{"a": 1}', "found '{"),
        (b"[1", "breaks off or is damaged"),
        (b"[1, 2", "breaks off"),
        (b"[1, 2,]", "breaks off or is damaged at ']'"),
        (b"[1 2]", "damaged at '1 2"),
        (b"[1,, 2]", "damaged at ', 2"),
        (b"[{'a': 1}]", "damaged at"),
        (b"[1] [2]", "something after the list"),
        (b'["\xff"]', "can't decode byte 0xff"),
        (b'["\xc3', "breaks off|unexpected end of data"),
        (b"[" * 100_000, "breaks off or is damaged"),
        (b"[" + b"9" * 5000 + b"]", "damaged"),
        (gzip.compress(b"[1, 2]", mtime=0)[:-9], "cut short"),
    ],
)
def test_what_is_no_whole_list_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as fault:
        list(stream_list(path))
    assert str(path) in str(fault.value)
    with pytest.raises(DataError, match="no such file"):
        list(stream_list(tmp_path / "none.json"))


def test_a_record_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locvlm.data.pretraining._LONGEST_RECORD", 4 << 20)
    path = tmp_path / "list.json"
    path.write_bytes(b'[{"a": "' + b"x" * (20 << 20))
    blocks = []
    with pytest.raises(DataError, match="no record ends after"):
        list(stream_list(path, lambda: blocks.append(1)))
    assert len(blocks) < 7


def test_a_llava_caption_is_the_answer_with_the_request_kept(tmp_path: Path) -> None:
    skipped: Counter[str] = Counter()
    found = list(
        listed_captions(
            encoded(
                record("a", "<image>\nDescribe.", "a dog ,\n running "),
                record("b", "What is it?\n<image>", "a cat"),
                record("c", "<image>", "a cup"),
            ),
            skipped,
        )
    )
    assert [(c.id, c.image, c.objective, c.medium) for c in found] == [
        (key, f"{key}.jpg", "caption", "image") for key in "abc"
    ]
    assert [c.turns[0] for c in found] == [
        Turn("caption", question="Describe.", answer="a dog , running"),
        Turn("caption", question="What is it?", answer="a cat"),
        Turn("caption", question="", answer="a cup"),
    ]
    assert render_plain(found[0].turns[0].answer)[0] == "<image>a dog , running\n"
    assert not skipped


def test_records_that_are_no_caption_are_counted() -> None:
    skipped: Counter[str] = Counter()
    two = record("a", "<image>\nA?", "B")
    two["conversations"] *= 2
    text_only = {key: value for key, value in record("a", "A?", "B").items() if key != "image"}
    bad = [two, text_only, record("a", "A?", "  "), record("a", "A?", "B</s>"), 3, record("a", "A?", "\ud800")]
    assert list(listed_captions(encoded(*bad), skipped)) == []
    assert skipped[TEXT_ONLY] == 1
    assert sum(skipped.values()) == 6
    assert "the model is always shown one" in TEXT_ONLY
    skipped.clear()
    two["conversations"][2] = {"from": "human", "value": "C?"}
    assert list(listed_captions(encoded(two), skipped)) == []
    assert skipped == {NOT_ONE_CAPTION: 1}


def test_the_videochat_form_is_a_conversation_too(realdata: Path) -> None:
    pairs = [{"q": "What?", "a": "A dog."}, {"q": "Big?", "a": "No."}]
    (found,) = literal_conversations(encoded({"image": "a.jpg", "QA": pairs}), Counter(), 7)
    assert (found.id, [(turn.question, turn.answer) for turn in found.turns]) == (
        "row-7",
        [("What?", "A dog."), ("Big?", "No.")],
    )
    path = realdata / "llava_instruct" / "videochat_llava_complex_reasoning_2k_first700.json"
    stored, records = open_conversations(path), json.loads(path.read_bytes())
    assert not stored.skipped
    assert [(c.image, [(t.question, t.answer) for t in c.turns]) for c in stored] == [
        (r["image"], [(pair["q"], pair["a"]) for pair in r["QA"]]) for r in records
    ]
    assert len(stored) == 700


def test_the_real_stage_1_list_gives_every_caption_and_the_sizes_of_the_images_there(realdata: Path) -> None:
    folder = realdata / "llava_pretrain"
    path = folder / "blip_laion_cc_sbu_2k_folder00001.json"
    records = json.loads(path.read_bytes())
    skipped: Counter[str] = Counter()
    found = list(listed_captions(stream_list(path), skipped))
    assert not skipped
    assert [(c.image, c.turns[0].answer) for c in found] == [
        (r["image"], " ".join(r["conversations"][1]["value"].split())) for r in records
    ]
    assert not any("<image>" in c.turns[0].question for c in found)
    sound = list(with_sound_images(found, open_images(folder / "images"), skipped))
    assert (len(sound), skipped) == (70, {MISSING_FILE: 1586})
    for conversation in sound:
        assert (conversation.width, conversation.height) == Image.open(folder / "images" / conversation.image).size


def picture(colour: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40 + colour, 30), (colour, 9, 9)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, n: int = 5, first: int = 0) -> Path:
    """As img2dataset writes CC3M: image, caption and a JSON of everything."""
    members: dict[str, bytes] = {}
    for k in range(first, first + n):
        members[f"{k:09d}.jpg"] = picture(k)
        members[f"{k:09d}.json"] = json.dumps(
            {"caption": f"caption {k}", "url": "http://x", "status": "success"}
        ).encode()
        members[f"{k:09d}.txt"] = f"caption {k}".encode()
    return write_tar(path, members)


def read_tar(path: Path, skipped: Counter[str] | None = None) -> list[Conversation]:
    part = path.with_suffix(".part")
    part.mkdir(exist_ok=True)
    return list(tar_captions(path, part, part, Counter() if skipped is None else skipped, seed=0))


def test_a_cc3m_shard_gives_captions_and_an_index_of_its_images(tmp_path: Path) -> None:
    found = read_tar(shard(tmp_path / "00000.tar", 300))
    assert [(c.id, c.image, c.width, c.height, c.turns[0].answer) for c in found] == [
        (f"{k:09d}", f"{k:09d}.jpg", 40 + k, 30, f"caption {k}") for k in range(300)
    ]
    questions = Counter(c.turns[0].question for c in found)
    assert set(questions) == set(BRIEF_REQUESTS)
    images = open_images(tmp_path / "00000.part")
    assert list(images.names()) == [c.image for c in found]
    assert images.open("000000007.jpg").size == (47, 30)


def test_a_caption_comes_from_the_text_or_else_from_the_json(tmp_path: Path) -> None:
    members = {
        "a.b/0.jpg": picture(1),
        "a.b/0.json": b'{"caption": "from json"}',
        "a.b/1.jpg": picture(2),
        "a.b/1.txt": b"  from\ntext ",
        "a.b/2.json": b'{"caption": "before its image"}',
        "a.b/2.png": picture(3, "PNG"),
    }
    found = read_tar(write_tar(tmp_path / "x.tar", members))
    assert [(c.id, c.image, c.turns[0].answer) for c in found] == [
        ("0", "a.b/0.jpg", "from json"),
        ("1", "a.b/1.jpg", "from text"),
        ("2", "a.b/2.png", "before its image"),
    ]


def test_samples_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    good = picture(5)
    members = {
        "0.jpg": good,
        "1.txt": b"no image",
        "2.jpg": good,
        "2.json": b'{"caption": null}',
        "3.jpg": good,
        "3.json": b"{broken",
        "4.jpg": good,
        "4.txt": b"\xff\xfe",
        "5.jpg": good,
        "5.txt": b"  ",
        "6.jpg": good,
        "6.txt": b"a </s> b",
        "7.jpg": good[:60],
        "7.txt": b"damaged image",
        "8.jpg": b"",
        "8.txt": b"empty image",
        "9.jpg": good,
        "9.txt": b"good",
        "10.jpg": good,
        "10.txt": b"x" * ((1 << 20) + 1),
    }
    skipped: Counter[str] = Counter()
    path = write_tar(tmp_path / "x.tar", members)
    assert [c.image for c in read_tar(path, skipped)] == ["9.jpg"]
    assert skipped == {NO_CAPTION: 5, NO_IMAGE: 1, BAD_CAPTION: 2, BAD_FILE: 2}
    assert list(open_images(tmp_path / "x.part").names()) == ["9.jpg"]


def test_a_shard_that_is_cut_short_gives_what_is_whole(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", 10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    skipped: Counter[str] = Counter()
    found = read_tar(path, skipped)
    assert 3 <= len(found) <= 6
    assert skipped[CUT_SHORT] == 1


def test_dead_links_are_told_by_the_statistics_beside_the_shards(tmp_path: Path) -> None:
    tars = [tmp_path / f"{k:05d}.tar" for k in range(4)]
    stats = {"count": 10, "successes": 7, "failed_to_download": 2, "failed_to_resize": 1}
    for k, text in enumerate((json.dumps(stats), json.dumps(stats), "{broken")):
        (tmp_path / f"{k:05d}_stats.json").write_text(text)
    assert dead_links(tars) == 6


def test_what_occurs_again_is_counted_once() -> None:
    def say(image: str, answer: str) -> Conversation:
        return Conversation("x", image, 0, 0, "caption", (Turn("caption", question="Q?", answer=answer),))

    values = [say("a", "1"), say("a", "2"), say("a", "1"), say("b", "1")]
    skipped: Counter[str] = Counter()
    assert list(distinct(values, skipped)) == [values[0], values[1], values[3]]
    assert skipped == {REPEATED: 1}
    skipped.clear()
    assert list(distinct(values, skipped, by_image=True)) == [values[0], values[3]]
    assert skipped == {REPEATED_IMAGE: 2}


def test_parts_are_made_once_and_thrown_away_for_another_data_set(tmp_path: Path) -> None:
    calls: list[str] = []

    def fill(name: str) -> Any:
        def make(_: Path, skipped: Counter[str]) -> list[Conversation]:
            calls.append(name)
            skipped["bad"] += 2
            return list(listed_captions(encoded(record(name, "Q?", name)), skipped))

        return make

    def broken(_: Path, skipped: Counter[str]) -> list[Conversation]:
        raise KeyboardInterrupt

    first = Parts(tmp_path / "parts", "key")
    first.make("0", fill("0"))
    with pytest.raises(KeyboardInterrupt):
        first.make("1", broken)
    second = Parts(tmp_path / "parts", "key")
    for name in ("0", "1"):
        second.make(name, fill(name))
    assert calls == ["0", "1"]
    assert [c.id for c in second.conversations()] == ["0", "1"]
    assert second.skipped() == {"bad": 4}
    other = Parts(tmp_path / "parts", "another key")
    other.make("0", fill("0"))
    assert calls == ["0", "1", "0"]
    other.remove()
    assert list(tmp_path.iterdir()) == []


QUESTIONS = [
    {"q": "What happens?", "a": "A man plays.", "video_id": "v_abc"},
    {"q": "Where?", "a": "On a stage.", "video_id": "v_xyz"},
    {"q": "<video>\nWhy?", "a": "For money.", "video_id": "v_abc"},
]


def test_video_instructions_are_conversations_about_videos(tmp_path: Path) -> None:
    path = tmp_path / "VideoInstruct100K.json"
    path.write_text(json.dumps(QUESTIONS))
    found = list(video_instructions(path, lambda key: f"{key}.mp4", Counter()))
    assert [(c.id, c.image, c.medium, c.objective) for c in found] == [
        ("v_abc-0", "v_abc.mp4", "video", "text"),
        ("v_xyz-0", "v_xyz.mp4", "video", "text"),
        ("v_abc-1", "v_abc.mp4", "video", "text"),
    ]
    assert [(t.question, t.answer) for c in found for t in c.turns] == [
        ("What happens?", "A man plays."),
        ("Where?", "On a stage."),
        ("Why?", "For money."),
    ]
    whole = list(video_instructions(path, lambda key: f"{key}.mp4", Counter(), "video"))
    assert [(c.id, c.image, len(c.turns)) for c in whole] == [("v_abc", "v_abc.mp4", 2), ("v_xyz", "v_xyz.mp4", 1)]
    assert [t.question for t in whole[0].turns] == ["What happens?", "Why?"]


def test_questions_about_missing_videos_and_bad_records_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    bad = [{"q": "A?", "video_id": "v_abc"}, {"q": "A?", "a": " ", "video_id": "v_abc"}, 5]
    path.write_text(json.dumps([*QUESTIONS, *bad, {"q": "A?", "a": "B", "video_id": "../v_abc"}]))
    skipped: Counter[str] = Counter()
    found = list(video_instructions(path, lambda key: None if key == "v_xyz" else f"{key}.mp4", skipped))
    assert [c.id for c in found] == ["v_abc-0", "v_abc-1"]
    assert (skipped[MISSING_VIDEO], skipped[BAD_QA], sum(skipped.values())) == (1, 2, 5)
    assert any("leads out of the video folder" in reason for reason in skipped)
