import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from locvlm.coordinates import make_location_format
from locvlm.data.card import NOT_RECORDED, dataset_card
from locvlm.data.conversations import open_conversations, write_conversations
from locvlm.data.instruct import Renderer
from locvlm.errors import DataError
from locvlm.presets import preset
from locvlm.records import Conversation, Manifest, Turn, write_json, write_jsonl, write_manifest

CONFIG = preset("locvlm-b")
RENDERER = Renderer(make_location_format(CONFIG.coordinates), CONFIG.prompts, 0)
TRAIN = {"path": "instances_train2017.json", "fingerprint": "sha256:abc"}
SECTIONS = [
    "How it was built",
    "Sources",
    "Counts",
    "Left out",
    "Places",
    "Splits and overlap",
    "An example",
    "How to load it",
    "Licence",
    "Intended use and limits",
    "Citation",
]


def build(folder: Path, name: str = "{:012d}.jpg", **manifest: Any) -> Path:
    rows = [
        Conversation(f"{key}-loc_pred", name.format(key), 640, 480, "loc_pred", turns)
        for key in range(1, 4)
        for turns in [(Turn("loc_pred", "dog", "", (64.0, 48.0, 320.0, 240.0)), Turn("neg_pred", "cat"))]
    ]
    counts = write_conversations(folder, rows)
    given = {
        "skipped": {"image file that is missing": 1234},
        "seed": 5,
        "sources": [TRAIN],
        "coordinates": CONFIG.coordinates.model_dump(mode="json"),
        "geometry": CONFIG.geometry.model_dump(mode="json"),
        "extra": {"options": {"limit": None, "instruct": {"crowd": "counts"}}, "notes": {}},
    }
    write_manifest(folder, Manifest(**{"dataset": "localize-instruct", "counts": counts, **given, **manifest}))
    return folder


def header(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_header_is_what_the_hub_reads(tmp_path: Path) -> None:
    card = dataset_card(build(tmp_path / "set"), renderer=RENDERER)
    assert header(card) == {
        "pretty_name": "localize-instruct",
        "license": "unknown",
        "language": ["en"],
        "task_categories": ["visual-question-answering"],
        "size_categories": ["n<1K"],
        "tags": ["locvlm", "localization", "spatial-reasoning"],
    }
    assert header(dataset_card(tmp_path / "set", "cc-by-4.0"))["license"] == "cc-by-4.0"
    assert re.findall(r"^## (.*)$", card, flags=re.MULTILINE) == SECTIONS


def test_it_tells_how_the_set_was_built_and_what_was_left_out(tmp_path: Path) -> None:
    card = dataset_card(build(tmp_path / "set"), renderer=RENDERER)
    built = section(card, "How it was built")
    assert "`locvlm data localize-instruct`" in built
    for row in ("| seed | 5 |", "| instruct.crowd | counts |", "| limit | null |"):
        assert row in built
    assert "| instances_train2017.json | sha256:abc |" in section(card, "Sources")
    assert "| loc_pred | 3 |" in section(card, "Counts")
    assert "3 distinct image files" in section(card, "Counts")
    assert "| image file that is missing | 1 234 |" in section(card, "Left out")
    places = section(card, "Places")
    assert "| coordinates.n_bins | 224 |" in places
    assert "| geometry.kind | squash |" in places


@pytest.mark.parametrize(("name", "verb"), [("hal-act", "hallucination"), ("pope-random", "pope")])
def test_questions_are_told_by_the_verb_that_built_them(tmp_path: Path, name: str, verb: str) -> None:
    row = {"id": "v-0", "image": "v.mp4", "medium": "video", "prompt": "Is there dog in video?", "reference": "yes"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    write_manifest(tmp_path, Manifest(name, {"questions": 1}))
    card = dataset_card(tmp_path)
    assert f"`locvlm data {verb}`, with" in card
    assert "1 distinct video files" in card


def test_what_is_not_recorded_is_called_so_and_never_guessed(tmp_path: Path) -> None:
    card = dataset_card(build(tmp_path / "set", "x{}.jpg", sources=[], extra={}))
    assert f"The sources are {NOT_RECORDED}." in card
    assert f"Whether faces were blurred is {NOT_RECORDED}." in card
    assert f"| version of the code | {NOT_RECORDED} |" in card
    assert f"| options | {NOT_RECORDED} |" in card
    assert f"Of the annotations and the text: {NOT_RECORDED}." in card
    assert "Neither the sources nor the images have names of COCO" in card
    assert "train2017" not in card
    assert "CC BY" not in card


def test_faces_and_version_are_told_where_the_manifest_has_them(tmp_path: Path) -> None:
    faces = {**TRAIN, "faces_blurred": "CenterFace, threshold 0.2"}
    card = dataset_card(build(tmp_path / "set", sources=[faces], extra={"version": "0.1.0"}))
    assert "Faces: blurred by CenterFace, threshold 0.2." in card
    assert "| version of the code | 0.1.0 |" in card


def test_the_overlap_follows_from_the_names(tmp_path: Path) -> None:
    overlap = section(dataset_card(build(tmp_path / "a")), "Splits and overlap")
    assert "3 of the 3 image names are COCO's" in overlap
    assert "made of train2017" in overlap
    assert "RefCOCO" in overlap
    assert "VQAv2" in overlap
    other = build(tmp_path / "b", "COCO_val2014_{:012d}.jpg", sources=[{"path": "a.json"}])
    overlap = section(dataset_card(other), "Splits and overlap")
    assert "By the names of its images, it is made of val2014" in overlap
    unknown = build(tmp_path / "c", sources=[{"path": "a.json"}], extra={"notes": {"image excluded on request": 7}})
    overlap = section(dataset_card(unknown), "Splits and overlap")
    assert "Of which split they are is not recorded" in overlap
    assert "7 images were excluded on request" in overlap


def test_the_example_is_the_first_record_and_its_text(tmp_path: Path) -> None:
    folder = build(tmp_path / "set")
    card = dataset_card(folder, renderer=RENDERER)
    example = section(card, "An example")
    record = json.loads(example.split("```json\n")[1].split("\n```")[0])
    assert record["id"] == "1-loc_pred"
    assert record["turns"][0]["box_xyxy"] == [64, 48, 320, 240]
    for question, answer in RENDERER.turns(open_conversations(folder)[0]):
        assert f"Q: {question}\nA: {answer}" in example


def test_the_lines_that_load_it_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write_jsonl(tmp_path / "asked" / "questions.jsonl", [{"id": "1", "image": "1.jpg", "prompt": "a?"}] * 2)
    write_manifest(tmp_path / "asked", Manifest("coco-spatial", {"questions": 2}))
    monkeypatch.chdir(tmp_path)
    for name, folder in (("table", build(tmp_path / "set")), ("rows", tmp_path / "asked")):
        load = section(dataset_card(folder), "How to load it")
        scope: dict[str, Any] = {}
        exec(load.split("```python\n")[1].split("\n```")[0], scope)
        assert len(scope[name]) == {"table": 3, "rows": 2}[name]
    assert "3 Conversation" in capsys.readouterr().out


def test_question_sets_and_annotated_images_have_cards(tmp_path: Path) -> None:
    rows = [{"id": str(key), "image": f"{key}.jpg", "prompt": "a?"} for key in range(1500)]
    write_jsonl(tmp_path / "asked" / "questions.jsonl", rows)
    write_manifest(tmp_path / "asked", Manifest("pope-random", {"questions": 1500}))
    found = header(dataset_card(tmp_path / "asked"))
    assert found["size_categories"] == ["1K<n<10K"]
    assert found["configs"] == [{"config_name": "default", "data_files": "questions.jsonl"}]
    write_json(tmp_path / "coco" / "instances_train.json", {})
    write_manifest(tmp_path / "coco", Manifest("coco", {"images_train": 40, "images_test": 10}))
    card = dataset_card(tmp_path / "coco")
    assert "read_instances" in card
    assert "Images of its own splits: test 10, train 40." in card
    assert "task_categories" not in header(card)


def test_a_hostile_manifest_stays_text(tmp_path: Path) -> None:
    evil = "x\n---\nlicense: mit\n# h <script> | [a](b) `c`"
    folder = build(
        tmp_path / "set", dataset=evil, sources=[{"path": evil, "fingerprint": evil}], skipped={evil: 1, "\ud800": 2}
    )
    card = dataset_card(folder, license_id="a: b\nc")
    assert header(card)["license"] == "a: b\nc"
    assert re.findall(r"^## (.*)$", card, flags=re.MULTILINE) == SECTIONS
    assert "<script>" not in card.replace("\\<script\\>", "")
    assert "\nlicense: mit" not in card
    card.encode()


def test_code_fences_cannot_be_closed_by_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    turn = Turn("caption", question="a?", answer="x\n```\n# out")
    counts = write_conversations(folder, [Conversation("1", "1.jpg", 9, 9, "caption", (turn,))])
    write_manifest(folder, Manifest("generic", counts))
    example = section(dataset_card(folder), "An example")
    assert "````text\nQ: a?\nA: x\n```\n# out\n````" in example


def test_the_card_repeats_byte_for_byte_and_names_no_machine_path(tmp_path: Path) -> None:
    folder = build(tmp_path / "set")
    assert dataset_card(folder, renderer=RENDERER) == dataset_card(folder, renderer=RENDERER)
    assert str(tmp_path) not in dataset_card(folder)


def test_a_folder_that_is_no_finished_data_set_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        dataset_card(tmp_path)
    folder = build(tmp_path / "set")
    (folder / "conversations.arrow").write_bytes((folder / "conversations.arrow").read_bytes()[:200])
    with pytest.raises(DataError, match="cut short"):
        dataset_card(folder)
