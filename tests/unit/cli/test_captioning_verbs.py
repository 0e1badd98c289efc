"""`locvlm caption` and `locvlm data prefcoco` end to end, on real images with the tiny model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from locvlm.cli import main
from locvlm.data.conversations import open_conversations
from locvlm.model import load
from locvlm.model.checkpoint import TINY_FOUNDATION
from locvlm.model.export import export
from locvlm.records import read_json, read_jsonl


@pytest.fixture(scope="module")
def real(realdata: Path) -> list[str]:
    """The options that name COCO128: its annotations, and a folder that holds 27 of its 128 images."""
    annotations = realdata / "coco_annotations" / "coco128_instances_train2017.json"
    return ["--annotations", str(annotations), "--images", str(realdata / "coco_images" / "train2017")]


@pytest.fixture(scope="module")
def captions(real: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    assert caption(real, TINY_FOUNDATION, path) == 0
    return path


def caption(real: list[str], model: Path, output: Path, *words: object) -> int:
    return main(["caption", *real, "--model", str(model), "--output", str(output), "--batch-size=16", *map(str, words)])


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """The one message on stderr."""
    text = capsys.readouterr().err
    assert text.startswith("locvlm: ")
    assert "Traceback" not in text
    return text


def test_real_images_are_captioned_and_missing_ones_counted(
    real: list[str], captions: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = read_jsonl(captions)
    assert len(rows) == 70
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert len({row["image_id"] for row in rows}) == 26
    assert all(row["raw"] and row["caption"] for row in rows)
    assert read_json(captions.with_suffix(".meta.json"))["skipped"] == {"object on an image that is missing": 146}
    assert caption(real, TINY_FOUNDATION, tmp_path / "folder") == 0
    assert (tmp_path / "folder" / "captions.jsonl").read_bytes() == captions.read_bytes()
    line = capsys.readouterr().out
    assert line.startswith("caption: images 26, objects 70, captions 70; skipped: object on an image that is missing")
    assert caption(real, TINY_FOUNDATION, tmp_path / "folder") == 0
    assert capsys.readouterr().out.startswith("caption: already done in")


def test_a_stock_llava_says_the_same_as_the_checkpoint_it_was_exported_from(
    real: list[str], captions: Path, tmp_path: Path
) -> None:
    export(load(TINY_FOUNDATION), tmp_path / "llava")
    assert caption(real, tmp_path / "llava", tmp_path / "stock.jsonl", "--engine", "transformers") == 0
    assert (tmp_path / "stock.jsonl").read_bytes() == captions.read_bytes()
    assert read_json(tmp_path / "stock.meta.json")["engine"] == "transformers"


def test_a_round_trip_drops_what_the_model_does_not_find(real: list[str], tmp_path: Path, capsys: Any) -> None:
    assert caption(real, TINY_FOUNDATION, tmp_path / "c.jsonl", "--round-trip", 0.5, "--limit", 40) == 0
    rows = read_jsonl(tmp_path / "c.jsonl")
    dropped = [row for row in rows if "dropped" in row]
    assert dropped  # the foundation has never located anything
    assert all(row["caption"] == "" and row["dropped_caption"] for row in dropped)
    assert all("iou" in row for row in rows)
    assert f"{len(dropped)}; in" in capsys.readouterr().out


def test_prefcoco_is_built_from_the_captions(real: list[str], captions: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["data", "prefcoco", *real[:2], "--captions", str(captions), "--output"]
    assert main([*command, str(tmp_path / "set")]) == 0
    manifest = read_json(tmp_path / "set" / "manifest.json")
    assert manifest["counts"] == {
        "images": 26,
        "conversations": 26,
        "loc_pred": 70,
        "neg_pred": 0,
        "rev_loc": 70,
        "objects": 70,
        "qa_pairs": 140,
    }
    assert manifest["crowd_variants"]["counts"] == {"images": 100, "objects": 216}
    assert set(manifest["crowd_variants"]) == {"counts", "ignored", "singleton_ok", "ignored_singleton_ok"}
    assert manifest["paper"] == {"images": 95_899, "objects": 201_343, "qa_pairs": 402_686}
    assert manifest["skipped"]["object without a caption: left out"] == 146
    assert [source["path"] for source in manifest["sources"]] == ["coco128_instances_train2017.json", captions.name]
    texts = {row["id"]: row["caption"] for row in read_jsonl(captions)}
    turns = [turn for conversation in open_conversations(tmp_path / "set") for turn in conversation.turns]
    assert sorted(turn.description for turn in turns) == sorted([*texts.values()] * 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("prefcoco: images 26, conversations 26, loc_pred 70")
    assert lines[2].split() == ["counts", "(used)", "100", "216", "432"]
    assert lines[-1].split() == ["paper", "(train2017,", "captioned)", "95,899", "201,343", "402,686"]
    assert main([*command, str(tmp_path / "set")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == lines[1:]
    assert main([*command, str(tmp_path / "again")]) == 0
    for name in ("conversations.arrow", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "set" / name).read_bytes()


def test_prefcoco_takes_captions_of_other_forms_and_normalises_them(
    real: list[str], captions: Path, tmp_path: Path
) -> None:
    row = read_jsonl(captions)[0]
    given = {str(row["id"]): f"The {row['category']} in this image is brown. It barks.", "1": "The cat is of nobody."}
    (tmp_path / "given.json").write_text(json.dumps(given))
    command = [
        "data",
        "prefcoco",
        *real[:2],
        "--captions",
        str(tmp_path / "given.json"),
        "--output",
        str(tmp_path / "s"),
    ]
    assert main([*command, "--format", "llava-json"]) == 0
    (conversation,) = open_conversations(tmp_path / "s")
    assert [turn.description for turn in conversation.turns] == [f"{row['category']} that is brown"] * 2
    notes = read_json(tmp_path / "s" / "manifest.json")["notes"]
    assert notes["caption of an annotation that is not in use"] == 1
    (record,) = read_json(tmp_path / "s" / "conversations.json")
    assert record["conversations"][3]["value"] == f"There is a {row['category']} that is brown."


def test_captions_of_other_annotations_give_one_message(real: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "given.json").write_text('{"1": "The cat is of nobody."}')
    command = [
        "data",
        "prefcoco",
        *real[:2],
        "--captions",
        str(tmp_path / "given.json"),
        "--output",
        str(tmp_path / "s"),
    ]
    assert main(command) == 2
    assert "needed is captions of the same annotation file" in message(capsys)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--engine", "transformers"], "locvlm export"),
        (["--model", "/nowhere/at/all"], "there is no such folder"),
        (["--images", "/nowhere/at/all"], "there is no such folder"),
        (["--annotations", "/nowhere/at/all"], "no annotation file"),
        (["--set", "instruct.crowd=never"], "instruct.crowd"),
    ],
)
def test_a_mistake_gives_one_message(
    real: list[str], tmp_path: Path, capsys: Any, words: list[str], fault: str
) -> None:
    assert caption(real, TINY_FOUNDATION, tmp_path / "c.jsonl", *words) == 2
    assert fault in message(capsys)
    assert list(tmp_path.iterdir()) == []


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfrom locvlm.cli import main\n"
        "try: main(['caption', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--round-trip IOU" in done.stdout
