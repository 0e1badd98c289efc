"""`locvlm data ...` end to end: what the folders hold, what the user is told, and that nothing half-built stays."""

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.cli import main
from locvlm.coordinates import make_location_format
from locvlm.data.conversations import open_conversations
from locvlm.data.instruct import Renderer
from locvlm.presets import preset
from locvlm.records import fingerprint

CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 8, "name": "cat"}, {"id": 90, "name": "cup"}, {"id": 91, "name": "bee"}]


def instances(n: int = 20) -> dict[str, Any]:
    """Images with a dog on the left and a cat on the right; every third also has a big cup at the left."""
    images, annotations = [], []
    for key in range(1, n + 1):
        images.append({"id": key, "file_name": f"{key}.png", "width": 100, "height": 80})
        boxes = [(3, [5, 10, 20, 20]), (8, [70, 30, 20, 20])]
        boxes += [(90, [0, 0, 30, 79])] if key % 3 == 0 else []
        for category, box in boxes:
            number = len(annotations) + 1
            annotations.append(
                {"id": number, "image_id": key, "category_id": category, "bbox": box, "iscrowd": 0, "area": 400}
            )
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(instances()))
    return path


def data(*words: object) -> int:
    return main(["data", *map(str, words)])


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def refused(capsys: pytest.CaptureFixture[str], output: Path, *words: object) -> str:
    """The one message of a command that must fail as the user's mistake and leave nothing."""
    before = sorted(output.parent.iterdir())
    capsys.readouterr()
    assert data(*words, "--output", output) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("locvlm: ")
    assert err.count("locvlm: ") == 1
    assert "Traceback" not in err
    assert sorted(output.parent.iterdir()) == before
    return err


def test_localize_instruct_builds_conversations_and_a_manifest(tmp_path: Path, coco: Path, capsys: Any) -> None:
    output = tmp_path / "new" / "set"
    assert data("localize-instruct", "--annotations", coco, "--output", output, "--seed", 4) == 0
    found = manifest(output)
    assert found["dataset"] == "localize-instruct"
    assert found["counts"] == {"images": 20, "conversations": 40, "loc_pred": 46, "neg_pred": 20, "rev_loc": 46}
    assert (found["skipped"], found["seed"]) == ({}, 4)
    assert found["sources"] == [{"path": "instances.json", "fingerprint": fingerprint(coco)}]
    assert found["coordinates"] == preset("locvlm-b").coordinates.model_dump(mode="json")
    assert found["geometry"] == {"kind": "squash", "side": 224}
    assert len(open_conversations(output)) == 40
    assert sorted(p.name for p in output.iterdir()) == ["conversations.arrow", "manifest.json"]
    assert sorted(p.name for p in output.parent.iterdir()) == ["set"]
    line = capsys.readouterr().out
    assert line.startswith("localize-instruct: images 20, conversations 40, loc_pred 46")
    assert line.count("\n") == 1


def test_two_builds_are_byte_identical_and_a_gzipped_source_gives_the_same_conversations(
    tmp_path: Path, coco: Path
) -> None:
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(coco.read_bytes()))
    for name, source in (("a", coco), ("b", coco), ("c", packed)):
        command = ["localize-instruct", "--annotations", source, "--output", tmp_path / name, "--format", "llava-json"]
        assert data(*command) == 0
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    for name in ("conversations.arrow", "conversations.json"):
        assert listing(tmp_path / "a")[name] == listing(tmp_path / "c")[name]


def test_presets_files_and_overrides_choose_grouping_coordinates_and_seed(tmp_path: Path, coco: Path) -> None:
    tiny, command = tmp_path / "tiny", ["localize-instruct", "--annotations", coco]
    assert data(*command, "--output", tiny, "--preset", "tiny", "--set", "seed=9") == 0
    found = manifest(tiny)
    assert found["counts"]["conversations"] == 46 + 20 + 46
    assert (found["coordinates"]["n_bins"], found["geometry"]["side"], found["seed"]) == (48, 48, 9)
    assert set(open_conversations(tiny).objectives) == {"loc_pred", "neg_pred", "rev_loc"}
    config, stages = tmp_path / "c.yaml", {"align": {"steps": 1}, "instruct": {"steps": 1}}
    config.write_text(json.dumps({"name": "x", "instruct": {"neg_per_image": 0}, "stages": stages}))
    assert data(*command, "--output", tmp_path / "y", "--config", config) == 0
    assert manifest(tmp_path / "y")["counts"]["neg_pred"] == 0


def test_the_llava_list_holds_the_text_of_the_configured_coordinates(tmp_path: Path, coco: Path) -> None:
    output = tmp_path / "out"
    command = ["localize-instruct", "--annotations", coco, "--output", output, "--format", "llava-json"]
    assert data(*command, "--set", "coordinates.representation=nfp") == 0
    records = json.loads((output / "conversations.json").read_text())
    stored = open_conversations(output)
    config = preset("locvlm-b", ["coordinates.representation=nfp"])
    renderer = Renderer(make_location_format(config.coordinates), config.prompts, 0)
    assert len(records) == len(stored) == 40
    for record, conversation in zip(records, stored, strict=True):
        texts = [message["value"].removeprefix("<image>\n") for message in record["conversations"]]
        assert list(zip(texts[::2], texts[1::2], strict=True)) == renderer.turns(conversation)
    assert any("0.0500,0.1250,0.2500,0.3750" in m["value"] for r in records for m in r["conversations"])


def test_the_same_command_again_finds_the_set_built_and_another_is_refused(
    tmp_path: Path, coco: Path, capsys: Any
) -> None:
    output = tmp_path / "out"
    command = ["localize-instruct", "--annotations", coco, "--output", output]
    assert data(*command) == 0
    stamp = (output / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    assert data(*command) == 0
    assert "already built" in capsys.readouterr().out
    assert (output / "manifest.json").stat().st_mtime_ns == stamp
    before = listing(output)
    for other in (["--seed", 1], ["--limit", 5], ["--preset", "tiny"], ["--set", "instruct.neg_per_image=2"]):
        assert "differs in" in refused(capsys, output, *command[:3], *other)
    coco.write_text(json.dumps(instances(21)))
    assert "differs in sources" in refused(capsys, output, *command[:3])
    assert listing(output) == before
    assert data(*command, "--force") == 0
    assert manifest(output)["counts"]["images"] == 21
    assert sorted(p.name for p in tmp_path.iterdir()) == ["instances.json", "out"]


def test_a_folder_or_file_that_is_no_data_set_is_never_replaced_not_even_with_force(
    tmp_path: Path, coco: Path, capsys: Any
) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter1.txt").write_text("years of work")
    for force in ([], ["--force"]):
        error = refused(capsys, output, "localize-instruct", "--annotations", coco, *force)
        assert "not a finished data set" in error
        assert "not a finished data set" in refused(capsys, coco, "coco-spatial", "--annotations", coco, *force)
        (output / "manifest.json").write_text("[]")
        assert "not a finished data set" in refused(capsys, output, "coco-spatial", "--annotations", coco, *force)
        (output / "manifest.json").unlink()
    assert (output / "chapter1.txt").read_text() == "years of work"


def test_an_empty_folder_is_a_place_to_build_in(tmp_path: Path, coco: Path) -> None:
    (tmp_path / "out").mkdir()
    assert data("localize-instruct", "--annotations", coco, "--output", tmp_path / "out") == 0
    assert manifest(tmp_path / "out")["counts"]["images"] == 20


def test_limit_and_exclude_choose_the_images(tmp_path: Path, coco: Path, capsys: Any) -> None:
    for name, text in (("list.json", "[1, 3, 99]"), ("lines.txt", "1\n3\n\n99\n")):
        exclude, output = tmp_path / name, tmp_path / f"out-{name}"
        exclude.write_text(text)
        command = ["localize-instruct", "--annotations", coco, "--exclude", exclude, "--limit", 4, "--output", output]
        assert data(*command) == 0
        assert sorted(set(open_conversations(output).images)) == ["2.png", "4.png", "5.png", "6.png"]
        assert manifest(output)["notes"] == {"image excluded on request": 2}
    for text in ("one two", '{"a": 1}', "[1.5]", "[[1]]"):
        exclude.write_text(text)
        error = refused(capsys, tmp_path / "x", "localize-instruct", "--annotations", coco, "--exclude", exclude)
        assert "lines.txt" in error
    exclude.write_text("\n".join(map(str, range(30))))
    error = refused(capsys, tmp_path / "x", "localize-instruct", "--annotations", coco, "--exclude", exclude)
    assert "no image" in error


def test_object_captions_describe_the_objects_and_must_fit_the_annotations(
    tmp_path: Path, coco: Path, capsys: Any
) -> None:
    captions, output = tmp_path / "captions.json", tmp_path / "out"
    captions.write_text(json.dumps({"1": "dog that sleeps", "2": "", "999": "a stranger"}))
    assert data("localize-instruct", "--annotations", coco, "--captions", captions, "--output", output) == 0
    turns = open_conversations(output)[0].turns
    assert "dog that sleeps" in [turn.description for turn in turns]
    assert manifest(output)["skipped"] == {"caption that is empty": 1}
    assert manifest(output)["notes"] == {
        "caption of an annotation that is not in use": 1,
        "object without a caption: described by its category name": 45,
        "NegPred turn about a category without a caption: asked for by its name": 20,
    }
    captions.write_text('{"1": "The dog in the image is asleep. It snores."}')
    raw = tmp_path / "raw"
    assert data("localize-instruct", "--annotations", coco, "--captions", captions, "--output", raw) == 0
    assert "dog that is asleep" in [turn.description for turn in open_conversations(raw)[0].turns]
    assert manifest(raw)["notes"]["caption changed by normalisation"] == 1
    captions.write_text('{"999": "a stranger"}')
    command = ["localize-instruct", "--annotations", coco, "--captions", captions]
    assert "none of the 1 annotation ids" in refused(capsys, tmp_path / "x", *command)


def draw_images(folder: Path, keys: Any) -> Path:
    folder.mkdir()
    for key in keys:
        Image.new("RGB", (100, 80), (key, 90, 9)).save(folder / f"{key}.png")
    return folder


def test_images_that_are_missing_or_damaged_are_left_out_and_counted(tmp_path: Path, coco: Path) -> None:
    images = draw_images(tmp_path / "images", range(1, 19))
    (images / "4.png").write_bytes((images / "4.png").read_bytes()[:60])
    Image.new("RGB", (80, 100)).save(images / "5.png")
    output = tmp_path / "out"
    command = ["localize-instruct", "--annotations", coco, "--images", images, "--output", output]
    assert data(*command) == 0
    assert manifest(output)["skipped"] == {
        "image file that is missing": 2,
        "image file that does not decode": 1,
        "image file of another size than annotated": 1,
    }
    assert set(open_conversations(output).images) == {f"{k}.png" for k in range(1, 19) if k not in (4, 5)}
    names = [source["path"] for source in manifest(output)["sources"]]
    assert names == ["instances.json", "images"]
    Image.new("RGB", (100, 80)).save(images / "5.png")
    assert data(*command) == 2  # the images changed: not "already built"
    assert data(*command, "--force") == 0
    assert manifest(output)["counts"]["images"] == 17


def test_a_folder_without_the_images_is_refused(tmp_path: Path, coco: Path, capsys: Any) -> None:
    other = draw_images(tmp_path / "images", range(900, 905))
    for verb in ("coco", "localize-instruct"):
        error = refused(capsys, tmp_path / "x", verb, "--annotations", coco, "--images", other)
        assert "it holds none of the 20 images" in error
        error = refused(capsys, tmp_path / "x", verb, "--annotations", coco, "--images", tmp_path / "none")
        assert "no such folder" in error


def test_coco_checks_and_splits_deterministically_by_image(tmp_path: Path, capsys: Any) -> None:
    coco, captions = tmp_path / "all.json", tmp_path / "captions.json"
    coco.write_text(json.dumps(instances(300)))
    rows = [{"id": k, "image_id": k, "caption": f"text {k}"} for k in range(1, 301)]
    captions.write_text(json.dumps({"images": [], "annotations": rows}))
    for name, n in (("a", 300), ("b", 200)):
        command = ["coco", "--annotations", coco, "--captions", captions, "--output", tmp_path / name, "--limit", n]
        assert data(*command, "--test-fraction", "0.3") == 0
    found = {}
    for name in ("a", "b"):
        parts = [json.loads((tmp_path / name / f"instances_{part}.json").read_text()) for part in ("train", "test")]
        found[name] = [{image["id"] for image in part["images"]} for part in parts]
        said = [json.loads((tmp_path / name / f"captions_{part}.json").read_text()) for part in ("train", "test")]
        assert [{row["image_id"] for row in part["annotations"]} for part in said] == found[name]
    assert not found["a"][0] & found["a"][1]
    assert len(found["a"][0] | found["a"][1]) == 300
    assert 60 < len(found["a"][1]) < 120  # 90 expected
    assert found["b"] == [part & set(range(1, 201)) for part in found["a"]]  # other images move nobody
    counts = manifest(tmp_path / "a")["counts"]
    assert counts["images"] == counts["images_train"] + counts["images_test"] == 300
    assert counts["captions_test"] == counts["images_test"] == len(found["a"][1])
    assert "both parts need one" in refused(capsys, tmp_path / "x", "coco", "--annotations", coco, "--limit", 1)


def test_a_split_part_is_a_file_that_the_other_verbs_take(tmp_path: Path, coco: Path) -> None:
    assert data("coco", "--annotations", coco, "--output", tmp_path / "coco", "--test-fraction", "0.4") == 0
    part = tmp_path / "coco" / "instances_train.json"
    for verb in ("generic", "localize-instruct", "coco-spatial", "hallucination"):
        assert data(verb, "--annotations", part, "--output", tmp_path / verb) == 0
        assert manifest(tmp_path / verb)["counts"]["images"] <= manifest(tmp_path / "coco")["counts"]["images_train"]


def test_scenes_are_drawn_once(tmp_path: Path, capsys: Any) -> None:
    command = ["scenes", "--output", tmp_path / "scenes", "--seed", 3, "--n-train", 3, "--n-test", 2]
    assert data(*command) == 0
    assert capsys.readouterr().out.startswith("scenes: ")
    assert manifest(tmp_path / "scenes")["dataset"] == "scenes"
    assert data(*command) == 0
    assert "already built" in capsys.readouterr().out
    assert "--force" in refused(capsys, tmp_path / "scenes", *command[:1], *command[3:5], "--n-train", 4)


def test_drawn_scenes_go_through_every_verb_with_their_images(tmp_path: Path) -> None:
    scenes = tmp_path / "scenes"
    assert data("scenes", "--output", scenes, "--n-train", 12, "--n-test", 3) == 0
    source = ["--annotations", scenes / "instances_train.json", "--images", scenes / "images"]
    for verb in ("localize-instruct", "generic"):
        assert data(verb, *source, "--output", tmp_path / verb, "--preset", "tiny") == 0
        assert manifest(tmp_path / verb)["counts"]["images"] == 12
        assert "image file that is missing" not in manifest(tmp_path / verb)["skipped"]


def test_generic_uses_the_captions_of_the_same_images(tmp_path: Path, coco: Path, capsys: Any) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"annotations": [{"id": 1, "image_id": 2, "caption": "a dog and a cat"}]}))
    command = ["generic", "--annotations", coco, "--captions", captions]
    assert data(*command, "--output", tmp_path / "out", "--format", "llava-json") == 0
    answers = {c.image: c.turns[0].answer for c in open_conversations(tmp_path / "out") if c.objective == "caption"}
    assert answers["2.png"] == "a dog and a cat"
    counts = manifest(tmp_path / "out")["counts"]
    assert counts["caption"] == 20
    assert counts["loc_pred"] == 0
    again = open_conversations(tmp_path / "out" / "conversations.json")
    assert again.objectives == open_conversations(tmp_path / "out").objectives
    captions.write_text(json.dumps({"annotations": [{"id": 1, "image_id": 77, "caption": "a dog"}]}))
    assert "no caption of the images" in refused(capsys, tmp_path / "x", *command)


def test_coco_spatial_writes_questions_and_balanced_counts(tmp_path: Path, coco: Path, capsys: Any) -> None:
    output = tmp_path / "spatial"
    assert data("coco-spatial", "--annotations", coco, "--output", output) == 0
    assert manifest(output)["counts"] == {"images": 6, "questions": 12, "left": 6, "right": 6}
    assert sum(manifest(output)["skipped"].values()) == 14
    rows = [json.loads(line) for line in (output / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert {(row["prompt"], row["reference"]) for row in rows} == {
        ("Which side of cat is cup located?", "left"),
        ("Which side of cup is cat located?", "right"),
    }
    released = ["coco-spatial", "--annotations", coco, "--rules", "released"]
    assert data(*released, "--output", tmp_path / "released") == 0
    assert manifest(tmp_path / "released")["counts"]["questions"] == 26
    assert data(*released, "--both-orders", "--output", tmp_path / "both") == 0
    assert manifest(tmp_path / "both")["counts"] == {"images": 20, "questions": 52, "left": 26, "right": 26}
    capsys.readouterr()
    mirrored = [*released, "--mirrored", "--output", tmp_path / "mirrored"]
    assert data(*mirrored) == 0
    counts = {"images": 20, "questions": 52, "left": 26, "right": 26, "mirrored": 26}
    assert (manifest(tmp_path / "mirrored")["counts"], manifest(tmp_path / "mirrored")["paper_count"]) == (
        counts,
        26716,
    )
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == ["26", "26,716"]
    vertical = ["coco-spatial", "--annotations", coco, "--axis", "vertical"]
    assert "gave no question" in refused(capsys, tmp_path / "x", *vertical)


def test_frozen_templates_are_the_text_of_the_llava_list_in_every_epoch(tmp_path: Path, coco: Path) -> None:
    command = ["localize-instruct", "--annotations", coco, "--format", "llava-json", "--seed", 3]
    assert data(*command, "--output", tmp_path / "drawn") == 0
    assert data(*command, "--freeze-templates", "--output", tmp_path / "frozen") == 0
    lists = [(tmp_path / name / "conversations.json").read_bytes() for name in ("drawn", "frozen")]
    assert lists[0] == lists[1]
    records = json.loads(lists[1])
    other = Renderer(make_location_format(preset("locvlm-b").coordinates), preset("locvlm-b").prompts, seed=77)
    changed = 0
    for name in ("drawn", "frozen"):
        for record, conversation in zip(records, open_conversations(tmp_path / name), strict=True):
            texts = [message["value"].removeprefix("<image>\n") for message in record["conversations"]]
            for epoch in (0, 1, 5):
                same = other.turns(conversation, epoch) == list(zip(texts[::2], texts[1::2], strict=True))
                assert same or name == "drawn"
                changed += not same
    assert changed > 60
    assert manifest(tmp_path / "frozen")["options"]["templates"] == "frozen"
    assert manifest(tmp_path / "frozen")["counts"] == manifest(tmp_path / "drawn")["counts"]


def test_the_manifest_counts_the_templates_that_the_first_epoch_draws(tmp_path: Path, coco: Path) -> None:
    coco.write_text(json.dumps(instances(200)))
    assert data("localize-instruct", "--annotations", coco, "--output", tmp_path / "out") == 0
    found, counts = manifest(tmp_path / "out")["templates"], manifest(tmp_path / "out")["counts"]
    assert {kind: sum(n) for kind, n in found.items()} == {kind: counts[kind] for kind in found}
    assert {kind: len(n) for kind, n in found.items()} == {"loc_pred": 5, "neg_pred": 5, "rev_loc": 3}
    renderer = Renderer(make_location_format(preset("locvlm-b").coordinates), preset("locvlm-b").prompts, 0)
    texts = [q for c in open_conversations(tmp_path / "out") for q, _ in renderer.turns(c)]
    assert sum(text.startswith("What is at location") for text in texts) == found["rev_loc"][2]
    assert sum(text.startswith("Localize") for text in texts) == found["loc_pred"][2] + found["neg_pred"][2]


@pytest.mark.parametrize("verb", ["coco", "generic", "localize-instruct", "coco-spatial", "hallucination"])
def test_yolo_labels_go_through_the_verbs_like_the_coco_file_they_were_made_of(
    tmp_path: Path, coco: Path, verb: str
) -> None:
    value, labels = instances(), tmp_path / "labels"
    labels.mkdir()
    numbers = {category["id"]: number for number, category in enumerate(CATEGORIES)}
    for image in value["images"]:
        lines = []
        for entry in value["annotations"]:
            if entry["image_id"] == image["id"]:
                x, y, w, h = entry["bbox"]
                lines.append(
                    f"{numbers[entry['category_id']]} {(x + w / 2) / 100} {(y + h / 2) / 80} {w / 100} {h / 80}"
                )
        (labels / f"{image['id']}.txt").write_text("\n".join(lines))
    for name, source in (("coco", [coco]), ("yolo", [labels, "--sizes", coco])):
        assert data(verb, "--annotations", *source, "--output", tmp_path / name) == 0
    ours, theirs = listing(tmp_path / "yolo"), listing(tmp_path / "coco")
    assert manifest(tmp_path / "yolo")["counts"] == manifest(tmp_path / "coco")["counts"]
    assert [source["path"] for source in manifest(tmp_path / "yolo")["sources"]] == ["labels", "instances.json"]
    for name in ("conversations.arrow", "questions.jsonl"):
        assert ours.get(name) == theirs.get(name)


def test_yolo_labels_without_sizes_or_with_others_are_told(tmp_path: Path, coco: Path, capsys: Any) -> None:
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "1.txt").write_text("0 0.5 0.5 0.1 0.1")
    command = ["localize-instruct", "--annotations", labels]
    assert "nothing says these" in refused(capsys, tmp_path / "out", *command)
    images = draw_images(tmp_path / "images", [1])
    assert "class numbers" in refused(capsys, tmp_path / "out", *command, "--images", images)
    assert "reading --sizes" in refused(capsys, tmp_path / "out", *command, "--sizes", tmp_path / "none.json")
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\n")
    assert data(*command, "--images", images, "--class-names", names, "--output", tmp_path / "out") == 0
    assert manifest(tmp_path / "out")["counts"]["loc_pred"] == 1
    (labels / "2.txt").write_text("0 0.5 0.5 0.1 0.1")
    assert "differs in sources" in refused(
        capsys, tmp_path / "out", *command, "--images", images, "--class-names", names
    )


def test_hallucination_writes_as_many_yes_as_no(tmp_path: Path, coco: Path) -> None:
    output = tmp_path / "presence"
    assert data("hallucination", "--annotations", coco, "--output", output, "--per-image", 1) == 0
    assert manifest(output)["counts"] == {"images": 20, "questions": 40, "yes": 20, "no": 20}
    assert len((output / "questions.jsonl").read_text().splitlines()) == 40


def test_real_files_go_through_every_verb_with_the_expected_counts(tmp_path: Path, realdata: Path) -> None:
    folder = realdata / "coco_annotations"
    for name, expected in json.loads((folder / "expected_counts.json").read_text()).items():
        source, output = ["--annotations", folder / name], tmp_path / name
        assert data("localize-instruct", *source, "--output", output / "instruct") == 0
        counts = manifest(output / "instruct")["counts"]
        pairs = expected["image_category_pairs_with_exactly_one_annotation"]
        assert (counts["loc_pred"], counts["rev_loc"]) == (pairs, pairs)
        assert counts["conversations"] == 2 * counts["images"] == 2 * counts["neg_pred"]
        for verb in ("coco", "generic", "coco-spatial", "hallucination"):
            assert data(verb, *source, "--output", output / verb) == 0
            assert 0 < manifest(output / verb)["counts"]["images"] <= expected["images"]


TRUNCATED = json.dumps(instances())[:-200].encode()
HALF_BAD = instances()
for _record in HALF_BAD["annotations"][:24]:
    _record["category_id"] = 44


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("folder", "this is a folder"),
        (b"", "not valid JSON"),
        (TRUNCATED, "cut short"),
        (gzip.compress(TRUNCATED)[:300], "gzip file is cut short"),
        (b"[]", "found a list at the top"),
        (b'{"images": [], "annotations": []}', "no list categories"),
        (json.dumps({**instances(), "images": []}).encode(), "list of images is empty"),
        (json.dumps({**instances(), "annotations": []}).encode(), "gave no "),
        (json.dumps(HALF_BAD).encode(), "24 of 46 annotations cannot be used"),
    ],
)
@pytest.mark.parametrize("verb", ["localize-instruct", "coco-spatial"])
def test_a_bad_annotation_file_gives_one_message_and_no_folder(
    tmp_path: Path, capsys: Any, verb: str, content: Any, message: str
) -> None:
    path = tmp_path / "bad.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    error = refused(capsys, tmp_path / "out", verb, "--annotations", path)
    assert message in error
    assert "bad.json" in error


def test_bad_records_are_reported_in_the_summary_and_the_rest_is_built(tmp_path: Path, capsys: Any) -> None:
    value = instances()
    value["images"] += [{"id": 50, "file_name": "/etc/passwd", "width": 5, "height": 5}, value["images"][0]]
    value["annotations"][0]["bbox"] = [5, 5, 0, 9]
    value["annotations"][2]["bbox"] = [float("nan"), 5, 1, 9]
    value["annotations"][4]["category_id"] = 44
    value["annotations"] += [{**value["annotations"][7], "image_id": 99, "id": 500}, value["annotations"][9]]
    value["annotations"][6]["bbox"] = [-10, 10, 20, 20]
    path = tmp_path / "i.json"
    path.write_text(json.dumps(value))
    assert data("localize-instruct", "--annotations", path, "--output", tmp_path / "out") == 0
    expected = {
        "annotation id that occurred before": 1,
        "annotation of an unknown category id": 1,
        "annotation of an unknown image": 1,
        "box of zero or negative size": 1,
        "box that is not four finite numbers": 1,
        "image file name that leads out of the image folder": 1,
        "image id that occurred before": 1,
    }
    found = manifest(tmp_path / "out")
    assert found["skipped"] == expected
    assert found["notes"] == {"box partly outside the image: clipped": 1}
    assert found["counts"]["loc_pred"] == 46 - 3
    line = capsys.readouterr().out
    assert all(f"{reason} {n}" in line for reason, n in expected.items())


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["localize-instruct"],
        ["localize-instruct", "--annotations", "a.json", "--output", "o", "--limit", "0"],
        ["localize-instruct", "--annotations", "a.json", "--output", "o", "--seed", "x"],
        ["coco", "--annotations", "a.json", "--output", "o", "--test-fraction", "1"],
        ["coco-spatial", "--annotations", "a.json", "--output", "o", "--rules", "mine"],
    ],
)
def test_a_wrong_command_line_ends_with_two(capsys: Any, words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        data(*words)
    assert end.value.code == 2
    assert "usage: locvlm data" in capsys.readouterr().err


def test_an_illegal_setting_is_told_before_anything_is_read(tmp_path: Path, capsys: Any) -> None:
    command = ["localize-instruct", "--annotations", tmp_path / "none", "--set", "instruct.crowd=maybe"]
    assert "instruct.crowd" in refused(capsys, tmp_path / "out", *command)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_forbidden_place_is_the_users_to_mend(tmp_path: Path, coco: Path, capsys: Any) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    error = refused(capsys, tmp_path / "locked" / "out", "localize-instruct", "--annotations", coco)
    assert "Permission denied" in error


def test_a_place_below_a_file_is_the_users_to_mend(coco: Path, capsys: Any) -> None:
    assert data("localize-instruct", "--annotations", coco, "--output", coco / "out") == 2
    assert "writing" in capsys.readouterr().err


def test_the_hash_seed_of_the_interpreter_does_not_reach_the_files(tmp_path: Path, coco: Path) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({str(key): f"thing number {key}" for key in range(1, 30)}))
    found = []
    for hash_seed in ("0", "1"):
        output = tmp_path / hash_seed / "out"
        command = [sys.executable, "-m", "locvlm", "data", "localize-instruct", "--annotations", coco]
        command += ["--captions", captions, "--format", "llava-json", "--output", output]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        found.append(listing(output))
    assert found[0] == found[1]


def test_a_build_that_is_killed_leaves_no_folder_and_is_finished_by_a_rerun(tmp_path: Path) -> None:
    source, output = tmp_path / "instances.json", tmp_path / "out" / "set"
    source.write_text(json.dumps(instances(8000)))
    command = [sys.executable, "-m", "locvlm", "data", "localize-instruct", "--annotations", source]
    command += ["--format", "llava-json", "--output", output]
    # as soon as it has begun, with the Arrow file whole, and in the middle of the list
    for moment in (".set.*", ".set.*/conversations.arrow", ".set.*/.conversations.json.*"):
        before = set(output.parent.glob(moment))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not set(output.parent.glob(moment)) - before:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not output.exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert data("localize-instruct", "--annotations", source, "--format", "llava-json", "--output", tmp_path / "b") == 0
    assert listing(output) == listing(tmp_path / "b")
    assert [path.name for path in output.parent.iterdir()] == ["set"]  # what the killed runs left is gone


def test_the_temporary_folder_of_a_run_under_way_is_left_alone(tmp_path: Path, coco: Path) -> None:
    held, other, abandoned = tmp_path / ".set.abcd_123", tmp_path / ".set.old.abcd_123", tmp_path / ".set.zzzzzzzz"
    for folder in (held, other, abandoned):
        folder.mkdir()
        (folder / "conversations.arrow").write_text("half")
    lock = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert data("localize-instruct", "--annotations", coco, "--output", tmp_path / "set") == 0
    finally:
        os.close(lock)
    assert (held.exists(), other.exists(), abandoned.exists()) == (True, True, False)


def test_the_real_program_fails_without_a_traceback_and_shows_no_bar_in_a_pipe(tmp_path: Path, coco: Path) -> None:
    images = draw_images(tmp_path / "images", range(1, 21))
    command = [sys.executable, "-m", "locvlm", "data", "localize-instruct", "--images", str(images), "--annotations"]
    bad = subprocess.run([*command, str(tmp_path / "none.json"), "--output", str(tmp_path / "a")], capture_output=True)
    assert bad.returncode == 2
    assert bad.stdout == b""
    assert bad.stderr.decode().splitlines() == [
        f"locvlm: reading --annotations {tmp_path}/none.json: there is no such file"
    ]
    good = subprocess.run([*command, str(coco), "--output", str(tmp_path / "a")], capture_output=True)
    assert (good.returncode, good.stderr) == (0, b"")
    assert len(good.stdout.splitlines()) == 1
