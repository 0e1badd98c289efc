"""`locvlm data show|card`: what is written, what the user is told, and that nothing is written over."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from locvlm.cli import main

CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 8, "name": "cat"}, {"id": 90, "name": "cup"}]


def data(*words: object) -> int:
    return main(["data", *map(str, words)])


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A Localize-Instruct set of ten images, whose pictures lie in `images`; one is missing and one damaged."""
    (tmp_path / "images").mkdir()
    pictures, annotations = [], []
    for key in range(1, 11):
        pictures.append({"id": key, "file_name": f"{key}.png", "width": 100, "height": 80})
        for category, box in ((3, [5, 10, 20, 20]), (8, [70, 30, 20, 20])):
            row = {"id": len(annotations) + 1, "image_id": key, "category_id": category, "bbox": box, "iscrowd": 0}
            annotations.append({**row, "area": 400})
        Image.new("RGB", (100, 80), (0, 20 * key, 0)).save(tmp_path / "images" / f"{key}.png")
    (tmp_path / "images" / "1.png").unlink()
    (tmp_path / "images" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    coco = tmp_path / "instances_train2017.json"
    coco.write_text(json.dumps({"images": pictures, "annotations": annotations, "categories": CATEGORIES}))
    assert data("localize-instruct", "--annotations", coco, "--output", tmp_path / "set") == 0
    return tmp_path / "set"


def refused(capsys: Any, *words: object) -> str:
    capsys.readouterr()
    assert data(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("locvlm: ") == 1
    assert "Traceback" not in err
    return str(err)


def test_show_writes_a_page_with_pictures_and_counts_those_it_lacks(built: Path, tmp_path: Path, capsys: Any) -> None:
    capsys.readouterr()
    output = tmp_path / "new" / "page.html"
    assert data("show", built, "--n", 20, "--images", tmp_path / "images", "--output", output) == 0
    line = capsys.readouterr().out
    assert line == (f"show: 20 samples; the image file does not decode: 2; the image file is missing: 2; in {output}\n")
    page = output.read_text()
    assert page.count("<article") == 20
    assert page.count('href="data:image/png') == 16
    assert page.count('<rect class="box o0" x="5.00" y="10.00" width="20.00" height="20.00"/>') == 20
    assert "(11,28,56,84)" in page
    assert str(tmp_path) not in page


def test_show_without_images_draws_on_a_canvas_and_names_the_page_after_the_set(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert data("show", "set", "--n", 3) == 0
    page = (tmp_path / "set.html").read_text()
    assert "No image folder was given" in page
    assert page.count('<rect class="canvas" width="100" height="80"/>') == 3
    assert sorted(path.name for path in built.iterdir()) == ["conversations.arrow", "manifest.json"]


def test_show_repeats_byte_for_byte_and_the_seed_chooses(built: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert data("show", built, "--n", 4, "--seed", seed, "--output", tmp_path / f"{name}.html") == 0
    first, again, other = ((tmp_path / f"{name}.html").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_show_writes_places_as_the_configuration_says(built: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert data("show", built, "--set", "coordinates.representation=nfp", "--output", output) == 0
    page = output.read_text()
    assert "(0.0500,0.1250,0.2500,0.3750)" in page
    assert "places as in the configuration locvlm-b: representation nfp" in page


def test_show_takes_a_shard_folder_and_every_question_set(built: Path, tmp_path: Path) -> None:
    annotations = tmp_path / "instances_train2017.json"
    (tmp_path / "images" / "2.png").unlink()
    assert data("shard", "--images", tmp_path / "images", "--output", tmp_path / "shards") == 0
    assert data("hallucination", "--per-image", 1, "--annotations", annotations, "--output", tmp_path / "hal") == 0
    output = tmp_path / "hal.html"
    assert data("show", tmp_path / "hal", "--images", tmp_path / "shards", "--output", output) == 0
    page = output.read_text()
    assert page.count("Is there") >= 20
    assert page.count('href="data:image/png') == 16
    assert re.findall('<h3 class="group">(.*?)</h3>', page) == ["no", "yes"]


def test_show_reads_the_middle_frame_of_a_real_video(realdata: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "list.json"
    turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "a dog"}]
    names = ("dog_eating.mp4", "none.mp4", "../dog_eating.mp4")
    path.write_text(json.dumps([{"id": name, "video": name, "conversations": turns} for name in names]))
    output = tmp_path / "page.html"
    assert data("show", path, "--videos", realdata / "videos", "--output", output) == 0
    assert "2 samples; the video file is missing: 1" in capsys.readouterr().out
    page = output.read_text()
    assert page.count('href="data:image/jpeg') == 1
    assert "640 x 360 px, a middle frame" in page
    assert data("show", path, "--output", output) == 0
    assert "What is it?" in output.read_text()


def test_mistakes_of_show_are_told_and_leave_nothing(built: Path, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "page.html"
    assert "no such file or folder" in refused(capsys, "show", tmp_path / "none", "--output", page)
    assert "no such folder" in refused(capsys, "show", built, "--images", tmp_path / "none", "--output", page)
    assert "no such folder" in refused(capsys, "show", built, "--videos", tmp_path / "none", "--output", page)
    assert "there are loc_pred, neg_pred, rev_loc" in refused(
        capsys, "show", built, "--objective", "caption", "--output", page
    )
    assert "must end in .html" in refused(capsys, "show", built, "--output", built / "manifest.json")
    assert "annotation file" in refused(capsys, "show", tmp_path / "instances_train2017.json", "--output", page)
    assert "writing" in refused(capsys, "show", built, "--output", built / "manifest.json" / "page.html")
    (built / "manifest.json").write_text("[")
    assert "not valid JSON" in refused(capsys, "show", built, "--output", page)
    assert not page.exists()
    with pytest.raises(SystemExit):
        data("show", built, "--n", 0)


def test_card_prints_or_writes_what_the_manifest_says(built: Path, tmp_path: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert data("card", built) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed.split("---\n")[1])["license"] == "unknown"
    assert "it is made of train2017" in printed
    assert "A: It is located at (11,28,56,84)" in printed
    output = tmp_path / "README.md"
    assert data("card", built, "--license", "cc-by-4.0", "--output", output) == 0
    assert capsys.readouterr().out == f"card: in {output}\n"
    assert output.read_text() == printed.replace("license: unknown", "license: cc-by-4.0").replace(
        "Of the annotations and the text: not recorded.",
        "Of the annotations and the text: cc-by-4.0, as given when this card was written.",
    )


def test_mistakes_of_card_are_told(built: Path, tmp_path: Path, capsys: Any) -> None:
    assert "no such file or folder" in refused(capsys, "card", tmp_path / "none")
    assert "not a finished dataset" in refused(capsys, "card", tmp_path / "images")
    assert "must end in .md" in refused(capsys, "card", built, "--output", built / "manifest.json")


def test_a_mirrored_question_is_shown_on_the_mirrored_picture(tmp_path: Path) -> None:
    """The box lies on the mirrored side, and so does what is painted there."""
    import base64
    import io

    (tmp_path / "images").mkdir()
    picture = Image.new("RGB", (300, 200), "white")
    picture.paste((255, 0, 0), (0, 0, 100, 200))
    picture.save(tmp_path / "images" / "a.png")
    row = {"id": "a", "task": "coco-spatial", "image": "a.png", "width": 300, "height": 200, "prompt": "Which side?"}
    row |= {"reference": "right", "subject": {"category": "dog", "box": [200, 0, 300, 200]}, "mirror": True}
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(row) + "\n")
    output = tmp_path / "page.html"
    assert data("show", questions, "--images", tmp_path / "images", "--output", output) == 0
    page = output.read_text()
    _kind, code = re.findall(r'href="data:image/(png|jpeg);base64,([^"]+)"', page)[0]
    shown = Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB")
    assert shown.getpixel((280, 100))[1] < 60  # red is on the right now
    assert shown.getpixel((20, 100))[1] > 200
    assert "mirrored" in page
