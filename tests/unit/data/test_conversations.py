"""Conversations on disk: exact round trips, honest counts, one clear error for a file that is not one."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locvlm.data.conversations import llava_record, open_conversations, write_conversations
from locvlm.errors import DataError
from locvlm.records import Conversation, Manifest, Turn, write_manifest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBER = st.floats(allow_nan=False)
TURN = st.builds(Turn, TEXT, TEXT, TEXT, st.none() | st.tuples(NUMBER, NUMBER, NUMBER, NUMBER), TEXT, TEXT)
SIZE = st.integers(0, 10_000)
TURNS = st.lists(TURN, min_size=1, max_size=5).map(tuple)
MEDIUM = st.sampled_from(["image", "video"])
CONVERSATION = st.builds(Conversation, TEXT, TEXT, SIZE, SIZE, TEXT, TURNS, MEDIUM)


def example(number: int, objective: str = "loc_pred") -> Conversation:
    turns = (Turn("loc_pred", "dog", "", (1.0, 2.0, number + 3.0, 4.5)), Turn("neg_pred", "cat"))
    return Conversation(f"{number}-{objective}", f"{number // 2}.jpg", 640, 480, objective, turns)


@settings(max_examples=40, deadline=None)
@given(st.lists(CONVERSATION, max_size=6))
def test_whatever_is_written_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("x")
    write_conversations(folder, values)
    stored = open_conversations(folder)
    assert list(stored) == values
    assert [stored[i] for i in range(len(stored))] == values
    assert stored.images == [value.image for value in values]
    assert stored.objectives == [value.objective for value in values]


def test_rows_are_found_across_batches(tmp_path: Path) -> None:
    n = 20_000  # three record batches
    write_conversations(tmp_path, (example(k) for k in range(n)))
    stored = open_conversations(tmp_path)
    assert len(stored) == n
    for k in (0, 8191, 8192, 16383, 16384, n - 1):
        assert stored[k] == example(k)
    assert stored[-1] == example(n - 1)
    assert stored[8190:8194] == [example(k) for k in range(8190, 8194)]
    for k in (n, -n - 1):
        with pytest.raises(IndexError):
            stored[k]
    assert len(stored.images) == len(stored.objectives) == n
    assert stored.images[8192] == "4096.jpg"
    assert len({id(name) for name in stored.objectives}) == 1


def test_a_file_from_before_there_were_videos_opens_and_is_about_images(tmp_path: Path) -> None:
    n = 10_000  # two record batches
    write_conversations(tmp_path, (example(k) for k in range(n)))
    path = tmp_path / "conversations.arrow"
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().drop_columns("medium")
    with pa.ipc.new_file(str(tmp_path / "old.arrow"), table.schema) as writer:
        writer.write_table(table)
    old = open_conversations(tmp_path / "old.arrow")
    assert [old[k] for k in (0, 8191, 8192, n - 1)] == [example(k) for k in (0, 8191, 8192, n - 1)]
    assert list(old) == list(open_conversations(tmp_path))
    assert old.images == open_conversations(path).images


def test_turns_are_counted_by_objective_and_images_once(tmp_path: Path) -> None:
    text = Conversation("t", "0.jpg", 1, 1, "caption", (Turn("caption", question="q", answer="a"),))
    counts = write_conversations(tmp_path, [example(0), example(1), example(2), text])
    assert counts == {"images": 2, "conversations": 4, "loc_pred": 3, "neg_pred": 3, "rev_loc": 0, "caption": 1}


def test_two_writings_are_byte_identical(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_conversations(tmp_path / name, (example(k) for k in range(50)))
    assert (tmp_path / "a/conversations.arrow").read_bytes() == (tmp_path / "b/conversations.arrow").read_bytes()


def test_a_failure_while_writing_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Any:
        yield example(0)
        raise DataError("the source ended")

    with pytest.raises(DataError, match="the source ended"):
        write_conversations(tmp_path, broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Conversation("a", "a.jpg", 1, 1, "text", ()), "no turns"),
        (Conversation("a", "\ud800.jpg", 1, 1, "text", (Turn("text"),)), "cannot be stored"),
        (Conversation("a", "a.jpg", 1, 1, "text", (Turn("text", box_xyxy=(1.0, 2.0)),)), "cannot be stored"),  # type: ignore[arg-type]
        (Conversation("a", "a.jpg", 2**70, 1, "text", (Turn("text"),)), "cannot be stored"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_id(tmp_path: Path, value: Conversation, message: str) -> None:
    with pytest.raises(DataError, match=message) as fault:
        write_conversations(tmp_path, [value])
    assert "'a'" in str(fault.value)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_comes_with_the_file(tmp_path: Path) -> None:
    write_conversations(tmp_path, [example(0)])
    assert open_conversations(tmp_path).manifest is None
    write_manifest(tmp_path, Manifest("localize-instruct", {"images": 1}, seed=5))
    for path in (tmp_path, tmp_path / "conversations.arrow"):
        manifest = open_conversations(path).manifest
        assert manifest is not None
        assert (manifest["dataset"], manifest["seed"]) == ("localize-instruct", 5)


def test_the_manifest_comes_with_a_rendered_list_of_ours_and_with_no_other(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest("localize-instruct", {"images": 1}, seed=5))
    talk = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "There."}]
    for name in ("conversations.json", "theirs.json"):
        (tmp_path / name).write_text(json.dumps([{"id": "a", "image": "a.jpg", "conversations": talk}]))
    for path in (tmp_path, tmp_path / "conversations.json"):
        manifest = open_conversations(path).manifest
        assert manifest is not None
        assert manifest["seed"] == 5
    assert open_conversations(tmp_path / "theirs.json").manifest is None


def test_an_open_file_travels_to_a_worker_process_by_its_path(tmp_path: Path) -> None:
    write_conversations(tmp_path, (example(k) for k in range(1000)))
    packed = pickle.dumps(open_conversations(tmp_path))
    assert len(packed) < 1000
    assert pickle.loads(packed)[999] == example(999)


def test_a_truncated_a_damaged_and_a_foreign_file_give_one_error(tmp_path: Path) -> None:
    write_conversations(tmp_path, (example(k) for k in range(100)))
    path = tmp_path / "conversations.arrow"
    whole = path.read_bytes()
    other = pa.table({"x": [1, 2]})
    with pa.ipc.new_file(str(tmp_path / "other.arrow"), other.schema) as writer:
        writer.write_table(other)
    foreign = (tmp_path / "other.arrow").read_bytes()
    for content in (whole[:-10], whole[: len(whole) // 2], b"", b"ARROW1", b"text" * 99, foreign):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a conversation file of LocVLM, or cut short") as fault:
            open_conversations(tmp_path)
        assert str(path) in str(fault.value)


def test_damage_inside_the_file_is_found_when_it_is_opened(tmp_path: Path) -> None:
    write_conversations(tmp_path, (example(k) for k in range(100)))
    path = tmp_path / "conversations.arrow"
    data = bytearray(path.read_bytes())
    place = data.index(b"loc_predloc_pred")
    data[place : place + 4] = b"\xff\xfe\xff\xfe"
    path.write_bytes(data)
    with pytest.raises(DataError, match="not a conversation file"):
        open_conversations(tmp_path)


def test_a_missing_path_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_conversations(tmp_path / "none")
    with pytest.raises(DataError, match=r"neither conversations\.arrow nor conversations\.json"):
        open_conversations(tmp_path)


def say(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if k % 2 else "human", "value": text} for k, text in enumerate(texts)]


def llava(folder: Path, *records: Any) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps(records))
    return path


GOOD = {"id": "a", "image": "a.jpg", "conversations": say("<image>\nWhat?", "A dog.")}


def test_a_llava_list_becomes_literal_turns_without_the_image_token(tmp_path: Path) -> None:
    after = {"id": 7, "image": "x/b.jpg", "conversations": say("What is it?\n<image>", "A cat.", "Big?", "No.")}
    ours = {**GOOD, "objective": "presence", "width": 64, "height": 48.0}
    bare = {"image": "c.jpg", "conversations": say("<image>", "a bunk room")}
    stored = open_conversations(llava(tmp_path, GOOD, after, ours, bare))
    assert list(stored) == [
        Conversation("a", "a.jpg", 0, 0, "text", (Turn("text", question="What?", answer="A dog."),)),
        Conversation(
            "7",
            "x/b.jpg",
            0,
            0,
            "text",
            (
                Turn("text", question="What is it?", answer="A cat."),
                Turn("text", question="Big?", answer="No."),
            ),
        ),
        Conversation("a", "a.jpg", 64, 48, "presence", (Turn("presence", question="What?", answer="A dog."),)),
        Conversation("row-3", "c.jpg", 0, 0, "text", (Turn("text", question="", answer="a bunk room"),)),
    ]
    assert stored.objectives == ["text", "text", "presence", "text"]
    assert not stored.skipped
    assert stored.manifest is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"id": "b", "conversations": say("Hi", "Hello")}, "text only"),
        ({"id": "b", "image": "a.jpg"}, "without conversations"),
        ({"id": "b", "image": "a.jpg", "conversations": []}, "without conversations"),
        ({**GOOD, "conversations": say("<image>\nA?", "B", "C?")}, "not human and gpt in turn"),
        ({**GOOD, "conversations": say("", "A?", "B")[1:]}, "not human and gpt in turn"),
        ({**GOOD, "conversations": say("<image>\nA?", " ")}, "empty question or answer"),
        ({**GOOD, "conversations": say("<image>\nA?", "B", "", "C")}, "empty question or answer"),
        ({**GOOD, "conversations": say("<image>", "B", "D?", "C")}, "empty question or answer"),
        ({**GOOD, "conversations": say("<image>\nA <image>?", "B")}, "outside the first question"),
        ({**GOOD, "conversations": say("A?", "B</s>")}, "outside the first question"),
        ({**GOOD, "image": "../a.jpg"}, "leads out of the image folder"),
        ({**GOOD, "image": ["a.jpg", "b.jpg"]}, "does not have the form"),
        ({**GOOD, "conversations": [{"from": "human"}]}, "does not have the form"),
        ({**GOOD, "conversations": say("A?", "\ud800")}, "does not have the form"),
        ("text", "does not have the form"),
        (None, "does not have the form"),
    ],
)
def test_a_llava_record_that_cannot_be_used_is_counted(tmp_path: Path, record: Any, reason: str) -> None:
    stored = open_conversations(llava(tmp_path, GOOD, record, GOOD))
    assert len(stored) == 2
    ((found, n),) = stored.skipped.items()
    assert reason in found
    assert n == 1


def test_a_nan_somewhere_in_a_llava_list_does_not_lose_the_file(tmp_path: Path) -> None:
    assert len(open_conversations(llava(tmp_path, GOOD, {**GOOD, "score": float("nan")}))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "list is empty"),
        ("{}", "found a dict at the top"),
        ("[{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "not valid JSON"),
        (json.dumps([GOOD, 1, 2]), "2 of 3 records cannot be used"),
    ],
)
def test_a_file_that_is_no_llava_list_gives_one_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as fault:
        open_conversations(path)
    assert str(path) in str(fault.value)


def test_a_written_llava_record_reads_back_as_the_same_text(tmp_path: Path) -> None:
    conversation = example(4)
    texts = [("Where is the dog?", "It is located at (1,2,3,4)"), ("A cat?", "There is no such object in the image")]
    record = llava_record(conversation, texts)
    assert record["conversations"][0] == {"from": "human", "value": "<image>\nWhere is the dog?"}
    assert [m["from"] for m in record["conversations"]] == ["human", "gpt"] * 2
    assert sum("<image>" in m["value"] for m in record["conversations"]) == 1
    assert record["turns"] == [
        {"objective": "loc_pred", "category": "dog", "box_xyxy": [1.0, 2.0, 7.0, 4.5]},
        {"objective": "neg_pred", "category": "cat"},
    ]
    (back,) = open_conversations(llava(tmp_path, record))
    assert (back.id, back.image, back.width, back.height) == ("4-loc_pred", "2.jpg", 640, 480)
    assert back.objective == "loc_pred"
    assert [(t.objective, t.question, t.answer) for t in back.turns] == [("text", *text) for text in texts]


def test_a_conversation_about_a_video_has_its_own_key_and_token(tmp_path: Path) -> None:
    conversation = replace(example(4), image="v_a.mp4", medium="video")
    texts = [("Where is the dog?", "It is located at (1,2,3,4)"), ("A cat?", "There is no such object in the image")]
    record = llava_record(conversation, texts)
    assert record["conversations"][0] == {"from": "human", "value": "<video>\nWhere is the dog?"}
    assert (record["video"], "image" in record) == ("v_a.mp4", False)
    assert llava_record(example(4), texts)["image"] == "2.jpg"
    (back,) = open_conversations(llava(tmp_path, record))
    assert (back.image, back.medium) == ("v_a.mp4", "video")
    assert [(t.question, t.answer) for t in back.turns] == texts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"video": "../v.mp4"}, "video file name that leads out of the video folder"),
        ({"conversations": say("<video>\nA <video>?", "B")}, "<video> outside the first question"),
        ({"conversations": say("<video>\nA?", "B <image>")}, "<video> outside the first question"),
    ],
)
def test_a_video_record_that_cannot_be_used_is_counted(tmp_path: Path, changes: Any, reason: str) -> None:
    video = {"id": "v", "video": "v.mp4", "conversations": say("What?\n<video>", "A dog.")}
    stored = open_conversations(llava(tmp_path, GOOD, video, {**video, **changes}))
    assert [(c.medium, c.turns[0].question) for c in stored] == [("image", "What?"), ("video", "What?")]
    assert [found for found in stored.skipped if reason in found]


def test_the_real_llava_pretraining_list_opens_whole(realdata: Path) -> None:
    path = realdata / "llava_pretrain" / "blip_laion_cc_sbu_2k_folder00001.json"
    stored = open_conversations(path)
    records = json.loads(path.read_text())
    assert len(stored) == len(records) == 1656
    assert not stored.skipped
    for found, record in zip(stored, records, strict=True):
        question, answer = (message["value"] for message in record["conversations"])
        assert "<image>" in question
        (turn,) = found.turns
        assert (found.id, found.image, turn.answer) == (record["id"], record["image"], answer)
        assert turn.question == question.replace("<image>", "").strip()
