import io
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from locvlm.data.refcoco import NO_BOX, read_refs
from locvlm.errors import DataError


@pytest.fixture
def official(realdata: Path) -> Path:
    return realdata / "refcoco" / "refer_format_refcocog_umd_tiny"


def _ref(number: int = 1, **changes: Any) -> dict[str, Any]:
    sentences = [{"sent": "the  left cat", "raw": "The left cat!", "sent_id": 5, "tokens": ["the", "left", "cat"]}]
    record = {"ref_id": number, "ann_id": 10 + number, "image_id": 42, "split": "val", "sentences": sentences}
    return {**record, **changes}


def _write(path: Path, value: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def test_the_official_files_give_refs_with_boxes(official: Path) -> None:
    found = read_refs(official / "refs(umd).p")
    assert (len(found.rows), found.skipped, found.notes) == (15, {}, {})
    assert {ref.split for ref in found.rows} == {"train", "val", "test"}
    assert len({ref.image_id for ref in found.rows}) == 15
    first = found.rows[0]
    assert (first.ref_id, first.ann_id, first.image_id, first.category) == (40373, 251837, 122469, "person")
    assert first.file_name == "COCO_train2014_000000122469.jpg"
    assert (first.width, first.height) == (334, 500)
    assert first.sentences[1] == "a woman wearing black dress"
    boxes = {a["id"]: a["bbox"] for a in json.loads((official / "instances.json").read_text())["annotations"]}
    for ref in found.rows:
        x, y, w, h = boxes[ref.ann_id]  # type: ignore[index]
        assert ref.box_xyxy == pytest.approx((x, y, x + w, y + h))


def test_without_the_instances_file_refs_have_no_box(tmp_path: Path, official: Path) -> None:
    path = tmp_path / "refs(umd).p"
    path.write_bytes((official / "refs(umd).p").read_bytes())
    found = read_refs(path)
    assert len(found.rows) == 15
    assert {ref.box_xyxy for ref in found.rows} == {None}
    assert found.rows[0].file_name == "COCO_train2014_000000122469.jpg"
    assert not found.notes


@pytest.mark.parametrize(
    ("name", "objects", "images", "sentences"),
    [
        ("refcoco_testA", 1975, 750, 5657),
        ("refcoco+_testA", 1975, 750, 5726),
        ("refcocog_val", 2573, 1300, 4896),
    ],
)
def test_complete_splits_in_minigpt4_form_have_the_published_number_of_objects(
    realdata: Path, name: str, objects: int, images: int, sentences: int
) -> None:
    found = read_refs(realdata / "refcoco" / f"{name}.json")
    assert len(found.rows) == objects
    assert len({ref.image_id for ref in found.rows}) == images
    assert sum(len(ref.sentences) for ref in found.rows) == sentences
    assert not found.skipped
    for ref in found.rows:
        x1, y1, x2, y2 = ref.box_xyxy or (0, 0, 0, 0)
        assert 0 <= x1 < x2 <= ref.width
        assert 0 <= y1 < y2 <= ref.height


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    (ref,) = read_refs(_write(tmp_path / "refs.p", [_ref(extra=(1.5, None, True, 2**70, ()))], protocol)).rows
    assert (ref.ref_id, ref.ann_id, ref.image_id, ref.split, ref.sentences) == (1, 11, 42, "val", ("the left cat",))


def test_python_2_text_is_read_as_latin_1(tmp_path: Path) -> None:
    record = b"(dp0\nS'ref_id'\nI3\nsS'ann_id'\nL4L\nsS'image_id'\nI5\nsS'split'\nS'val'\nsS'sentences'\n"
    record += b"(lp1\n(dp2\nS'sent'\nS'caf\\xe9'\nsas"
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"(lp9\n" + record + b"a.")
    assert [ref.sentences for ref in read_refs(path).rows] == [("caf\u00e9",)]


class _Hostile:
    """Unpickled as usual, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "made"
    path = _write(tmp_path / "refs.p", [_ref(), _Hostile(target)], protocol)
    with pytest.raises(DataError, match="nothing of it was run"):
        read_refs(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02]q\x00\x82\x01.",  # an object of the extension registry
        b"\x80\x02]P1\n.",  # a persistent id
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",  # a byte array that claims a terabyte
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo place that would cost the C unpickler 32 GB
        b"\x80\x02}}s.",  # a dict as a key
        b"\x80\x02.",
        b".",
        b"\x80\x09]",
        b"(lp0\n",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f].",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"I" + b"9" * 5000 + b"\n.",
        b"plain text",
        b"\x00" * 100,
        b"",
    ],
)
def test_bytes_that_are_no_refs_give_one_message(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(data)
    with pytest.raises(DataError, match="reading the refs"):
        read_refs(path)


def test_a_pickle_cut_short_anywhere_gives_one_message(tmp_path: Path, official: Path) -> None:
    data = (official / "refs(umd).p").read_bytes()
    path = tmp_path / "refs.p"
    for end in range(1, len(data), 97):
        path.write_bytes(data[:end])
        with pytest.raises(DataError):
            read_refs(path)


def test_refs_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    refs = [_ref(n) for n in range(1, 9)]
    bad = [
        "text",
        _ref(20, ref_id="x"),
        _ref(21, image_id=None),
        _ref(22, sentences=[]),
        _ref(23, sentences=[{"sent": " "}]),
        _ref(24, split=3),
        _ref(25, image_id=-1),
        _ref(1),
    ]
    found = read_refs(_write(tmp_path / "refs.p", refs + bad))
    assert [ref.ref_id for ref in found.rows] == list(range(1, 9))
    assert sorted(found.skipped.values()) == [1, 7]
    with pytest.raises(DataError, match="7 of 8 refs cannot be used"):
        read_refs(_write(tmp_path / "refs.p", bad))


def test_a_ref_whose_annotation_is_missing_or_has_no_box_is_kept_without_one(tmp_path: Path) -> None:
    annotation = {"id": 11, "image_id": 42, "category_id": 1, "bbox": [1, 2, 3, 4]}
    annotations = [annotation, {**annotation, "id": 12, "bbox": [1, 2, 0, 4]}, {**annotation, "id": 14, "image_id": 43}]
    images = [{"id": key, "file_name": f"{key}.jpg", "width": 100, "height": 80} for key in (42, 43)]
    file = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "instances.json").write_text(json.dumps(file))
    found = read_refs(_write(tmp_path / "refs.p", [_ref(n) for n in (1, 2, 3, 4)]))
    assert [ref.box_xyxy for ref in found.rows] == [(1, 2, 4, 6), None, None, None]
    assert found.notes == {NO_BOX: 3}


def test_lists_with_records_of_other_forms_are_counted(tmp_path: Path) -> None:
    good = {"img_id": "COCO_train2014_000000000042_1", "sents": " left  cat", "bbox": [1, 2, 30, 40]}
    good |= {"height": 20, "width": 25}
    bad = [
        {**good, "img_id": "42"},
        {**good, "img_id": 42},
        {**good, "sents": ""},
        {**good, "bbox": [1, 2, 3]},
        {**good, "bbox": [1, 2, float("nan"), 4]},
        {**good, "bbox": [50, 2, 3, 4]},
        {**good, "bbox": [1, 2, 10**400, 4]},
        {**good, "width": None},
        "text",
    ]
    path = tmp_path / "split.json"
    path.write_text(json.dumps([good] * 10 + bad))
    found = read_refs(path)
    assert [(ref.image_id, ref.sentences, ref.box_xyxy) for ref in found.rows] == [
        (42, ("left cat",) * 10, (1, 2, 25, 20))
    ]
    assert found.skipped.total() == len(bad)
    path.write_text(json.dumps(bad))
    with pytest.raises(DataError, match="9 of 9 records"):
        read_refs(path)


def test_a_file_that_is_not_there_gives_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_refs(tmp_path / "refs.p")
    with pytest.raises(DataError, match="folder"):
        read_refs(tmp_path)


def test_the_hostile_class_is_really_hostile(tmp_path: Path) -> None:
    target = tmp_path / "made"
    pickle.load(io.BytesIO(pickle.dumps(_Hostile(target))))
    assert target.exists()
