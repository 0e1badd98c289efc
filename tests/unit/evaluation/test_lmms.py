import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from locvlm.cli import main
from locvlm.evaluation.meteor import Meteor, find_java
from locvlm.evaluation.score import score
from locvlm.evaluation.tasks import TASKS
from locvlm.records import write_jsonl

SAID = ["It is on the LEFT.", "right", "left or right", "below", "leftover", "", "Right of it", "no idea"]


class _Loader(yaml.SafeLoader):
    """Reads `!function utils.name` as its name."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, colour in (("a", 40), ("b", 90)):
        image = Image.new("RGB", (20, 10), (colour, 0, 0))
        image.putpixel((0, 0), (0, 255, 0))
        image.save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def spatial(world: Path, n: int = len(SAID), **more: Any) -> Path:
    rows = [
        {
            "id": str(i),
            "image": "ab"[i % 2] + ".png",
            "prompt": f"Which {i}?",
            "reference": ("left", "right")[i // 2 % 2],
        }
        for i in range(n)
    ]
    write_jsonl(world / "questions.jsonl", [{**row, **more} for row in rows])
    return world / "questions.jsonl"


def regions(world: Path) -> Path:
    size = {"image": "a.png", "width": 20, "height": 10}
    rows = [
        {**size, "id": "0", "box": [0, 0, 10, 5], "references": ["the cat on the left", "a black cat on a chair"]},
        {**size, "id": "1", "box": [5, 5, 20, 10], "references": ["man in red shirt"]},
        {**size, "id": "2", "box": [5, 5, 20, 10], "references": ["left bottle", "the green bottle"]},
    ]
    write_jsonl(world / "refs.jsonl", rows)
    return world / "refs.jsonl"


def export(world: Path, task: str, data: Path, *more: str) -> int:
    paths = ["--data", str(data), "--images", str(world / "images"), "--output", str(world / "out")]
    return main(["data", "lmms-eval", "--task", task, *paths, *more])


def utils_of(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("task_utils", folder / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(folder: Path, name: str, answers: dict[str, str]) -> dict[str, float]:
    """What lmms-eval would do: every answer through process_results, every metric through its aggregation."""
    task = yaml.load((folder / f"{name}.yaml").read_text(), _Loader)
    assert task["task"] == name
    utils, docs = utils_of(folder), pq.read_table(folder / "data").to_pylist()
    for key in ("doc_to_visual", "doc_to_text", "process_results"):
        assert callable(getattr(utils, task[key].removeprefix("utils.")))
    assert task["doc_to_target"] in docs[0]
    values: dict[str, list[Any]] = {}
    for doc in docs:
        for metric, value in utils.results(doc, [answers[doc["id"]]]).items():
            values.setdefault(metric, []).append(value)
    found = {}
    for metric in task["metric_list"]:
        how = metric["aggregation"]
        of = values[metric["metric"]]
        whole = sum(of) / len(of) if how == "mean" else getattr(utils, how.removeprefix("utils."))(of)
        found[metric["metric"]] = whole
    return found


def ours(world: Path, task: str, data: Path, answers: dict[str, str]) -> dict[str, Any]:
    write_jsonl(world / "said.jsonl", [{"id": key, "answer": answer} for key, answer in answers.items()])
    return score(TASKS[task], world / "said.jsonl", data)


def test_spatial_figures_are_those_of_locvlm_score(world: Path) -> None:
    data = spatial(world)
    assert export(world, "coco-spatial", data) == 0
    answers = {str(i): said for i, said in enumerate(SAID)}
    theirs, mine = measured(world / "out", "locvlm_coco_spatial", answers), ours(world, "coco-spatial", data, answers)
    assert theirs == {name: pytest.approx(mine[name]) for name in mine["figures"]}
    assert 0 < theirs["accuracy"] < 1
    assert theirs["strict"] < theirs["accuracy"]


def test_region_answers_meet_their_references(world: Path) -> None:
    assert export(world, "region-description", regions(world)) == 0
    doc = pq.read_table(world / "out" / "data").to_pylist()[2]
    found = utils_of(world / "out").results(doc, ["There is a bottle."])
    references = ["left bottle", "the green bottle"]
    assert found == {"meteor": ("There is a bottle.", references), "meteor_stripped": ("bottle.", references)}


@pytest.mark.slow
def test_region_figures_are_those_of_locvlm_score(world: Path, meteor: Meteor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(find_java()).parent), prepend=":")  # pycocoevalcap takes the java of the PATH
    data = regions(world)
    assert export(world, "region-description", data) == 0
    answers = {"0": "There is a cat that is black.", "1": "man in a red shirt", "2": ""}
    utils, docs = utils_of(world / "out"), pq.read_table(world / "out" / "data").to_pylist()
    theirs = utils.meteor([utils.results(doc, [answers[doc["id"]]])["meteor"] for doc in docs])
    assert theirs == pytest.approx(ours(world, "region-description", data, answers)["meteor"], abs=1e-6)
    assert theirs == pytest.approx(0.27542, abs=1e-5)


def test_places_are_text_in_the_form_of_the_config(world: Path) -> None:
    assert export(world, "region-description", regions(world)) == 0
    docs = pq.read_table(world / "out" / "data").to_pylist()
    assert "(0,0,112,112)" in docs[0]["prompt"]
    assert (docs[0]["x1"], docs[0]["x2"], json.loads(docs[1]["references"])) == (0.0, 10.0, ["man in red shirt"])
    assert (
        export(world, "region-description", regions(world), "--set", "coordinates.representation=nfp", "--force") == 0
    )
    assert "(0.0000,0.0000,0.5000,0.5000)" in pq.read_table(world / "out" / "data").to_pylist()[0]["prompt"]


def test_images_lie_inside_as_hugging_face_reads_them(world: Path) -> None:
    assert export(world, "coco-spatial", spatial(world)) == 0
    table = pq.read_table(world / "out" / "data")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert list(features) == table.column_names
    stored = table.to_pylist()[1]["image"]
    assert (stored["path"], stored["bytes"]) == ("b.png", (world / "images" / "b.png").read_bytes())
    manifest = json.loads((world / "out" / "manifest.json").read_text())
    assert manifest["counts"] == {"images": 2, "questions": len(SAID)}


def test_mirrored_questions_come_with_mirrored_images(world: Path) -> None:
    assert export(world, "coco-spatial", spatial(world, 1, mirror=True)) == 0
    stored = pq.read_table(world / "out" / "data").to_pylist()[0]["image"]["bytes"]
    assert Image.open(io.BytesIO(stored)).getpixel((19, 0)) == (0, 255, 0)


def test_the_prompt_takes_what_a_models_settings_put_around_it(world: Path) -> None:
    assert export(world, "coco-spatial", spatial(world)) == 0
    utils = utils_of(world / "out")
    assert utils.text({"prompt": "Where?"}, {"pre_prompt": "Look. ", "post_prompt": " Say."}) == "Look. Where? Say."
    assert utils.text({"prompt": "Where?"}) == "Where?"


def test_questions_without_a_readable_image_are_counted(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "images" / "b.png").write_bytes(b"nothing")
    assert export(world, "coco-spatial", spatial(world)) == 0
    assert "question whose image is missing or damaged 4" in capsys.readouterr().out
    (world / "images" / "a.png").unlink()
    assert export(world, "coco-spatial", spatial(world), "--force") == 2
    assert "none of its 8 questions has a readable image" in capsys.readouterr().err


def test_what_cannot_be_exported_is_told(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": "0", "image": "a.png", "box": [0, 0, 5, 5], "width": 20, "height": 10, "category": "cat"}
    write_jsonl(world / "refs.jsonl", [row])
    assert export(world, "region-description", world / "refs.jsonl") == 2
    assert "no expression of a person" in capsys.readouterr().err
    assert export(world, "coco-spatial", world / "absent.jsonl") == 2
    assert "no such file" in capsys.readouterr().err
    assert not (world / "out").exists()


def test_the_same_inputs_give_the_same_bytes(world: Path) -> None:
    data = spatial(world)
    assert export(world, "coco-spatial", data, "--dataset-path", "someone/coco-spatial") == 0
    first = {path.name: path.read_bytes() for path in (world / "out").rglob("*") if path.is_file()}
    (world / "out").rename(world / "before")
    assert export(world, "coco-spatial", data, "--dataset-path", "someone/coco-spatial") == 0
    assert {path.name: path.read_bytes() for path in (world / "out").rglob("*") if path.is_file()} == first
    assert 'dataset_path: "someone/coco-spatial"' in (world / "out" / "locvlm_coco_spatial.yaml").read_text()
