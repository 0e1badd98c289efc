"""`locvlm data hallucination --source ...|pope|keywords|exclusions|overlap` as a user runs them."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from locvlm.cli import main
from locvlm.data.actnet import VIDEOS_NAME, VideoLabels
from locvlm.data.conversations import open_conversations
from locvlm.data.panoptic import CATEGORIES, Segment
from locvlm.evaluation.tables import paper_numbers


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The output of a command that must succeed."""
    capsys.readouterr()
    code = main(list(map(str, words)))
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one message of a command that must fail as the user's mistake."""
    capsys.readouterr()
    assert main(list(map(str, words))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("locvlm: ") == 1
    assert "Traceback" not in err
    return err


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def score(folder: Path, task: str, tmp_path: Path, wrong: int) -> dict[str, Any]:
    """The metrics of answers of which the first `wrong` are wrong."""
    answers = []
    for number, row in enumerate(rows(folder)):
        label = row.get("reference") or row["label"]
        said = {"yes": "no", "no": "yes"}[label] if number < wrong else label
        answers.append({"id": str(row.get("id") or row["question_id"]), "answer": said.capitalize()})
    predictions, output = tmp_path / "p.jsonl", tmp_path / "m.json"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in answers))
    command = ["score", "--task", task, "--data", folder, "--predictions", predictions, "--output", output]
    assert main(list(map(str, command))) == 0
    return dict(read(output))


@pytest.fixture
def actnet(tmp_path: Path) -> Path:
    folder = tmp_path / "pseudo-actnet"
    folder.mkdir()
    box = (1.0, 2.0, 30.0, 40.0)
    person, dog = (Segment(category=name, is_thing=True, box_xyxy=box, area=900) for name in ("person", "dog"))
    frames = ((person, dog), (person,))
    absent = tuple(name for name in CATEGORIES if name not in ("person", "dog", "cat"))
    labels = [
        VideoLabels("validation/v_a.mp4", 64, 48, (0, 1), frames, absent),
        VideoLabels("validation/v_b.mp4", 64, 48, (0,), ((person,),), absent),
    ]
    (folder / VIDEOS_NAME).write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in labels))
    (folder / "manifest.json").write_text(json.dumps({"dataset": "pseudo-actnet"}))
    return folder


def test_hal_ade_from_the_real_label_maps(realdata: Path, tmp_path: Path, capsys: Any) -> None:
    ade, output = realdata / "ade20k", tmp_path / "ade"
    command = ("data", "hallucination", "--source", "ade", "--annotations", ade, "--images", ade, "--output", output)
    assert run(capsys, *command).startswith("hal-ade: images 2, questions 8, yes 4, no 4; in ")
    found = read(output / "manifest.json")
    assert found["dataset"] == "hal-ade"
    assert found["options"] == {"source": "ade", "per_image": 2, "overlap": "near-synonyms", "limit": None}
    assert [source["path"] for source in found["sources"]] == ["objectInfo150.txt", "ade20k", "ade20k"]
    (first, *_) = rows(output)
    assert (first["image"], first["width"], first["height"]) == ("ADE_val_00000001.jpg", 683, 512)
    assert "already built" in run(capsys, *command)
    metrics = score(output, "presence", tmp_path, wrong=2)
    assert (metrics["accuracy"], metrics["n"], metrics["dataset"]) == (0.75, 8, "hal-ade")


def test_hal_act_asks_about_videos(actnet: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "act"
    out = run(capsys, "data", "hallucination", "--source", "act", "--annotations", actnet, "--output", output)
    assert out.startswith("hal-act: videos 1, questions 4, yes 2, no 2; skipped: fewer categories present")
    found = rows(output)
    assert {row["prompt"] for row in found if row["reference"] == "yes"} == {
        "Is there person in video?",
        "Is there dog in video?",
    }
    assert {(row["image"], row["medium"]) for row in found} == {("validation/v_a.mp4", "video")}
    assert not {"cat", "person", "dog"} & {row["category"] for row in found if row["reference"] == "no"}
    assert score(output, "presence", tmp_path, wrong=1)["accuracy"] == 0.75


def test_every_hal_set_has_the_papers_column(tmp_path: Path) -> None:
    told = [
        paper_numbers("presence", "accuracy", ["accuracy"], name) for name in ("hallucination", "hal-ade", "hal-act")
    ]
    assert [(one.baseline, one.ours) for one in told] == [
        (pytest.approx(0.619), pytest.approx(0.883)),
        (pytest.approx(0.538), pytest.approx(0.752)),
        (pytest.approx(0.506), pytest.approx(0.687)),
    ]


def test_options_of_another_source_are_refused(actnet: Path, realdata: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "ids.txt").write_text("1")
    command = ("data", "hallucination", "--annotations", actnet, "--output", tmp_path / "out")
    assert "--exclude lists images of COCO" in refused(
        capsys, *command, "--source", "act", "--exclude", tmp_path / "ids.txt"
    )
    assert "leave it out" in refused(capsys, *command, "--source", "act", "--images", tmp_path)
    assert "this is a folder" in refused(capsys, *command)
    assert "objectInfo150.txt lies neither there" in refused(capsys, *command, "--source", "ade")
    classes = realdata / "ade20k" / "objectInfo150.txt"
    assert "holds no PNG" in refused(capsys, *command, "--source", "ade", "--classes", classes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["random", "popular", "adversarial"])
def test_pope_is_built_and_scored(realdata: Path, tmp_path: Path, capsys: Any, strategy: str) -> None:
    annotations, output = realdata / "coco_annotations" / "instances_val2014_100.json", tmp_path / "pope"
    command = (
        "data",
        "pope",
        "--annotations",
        annotations,
        "--strategy",
        strategy,
        "--images-n",
        40,
        "--output",
        output,
    )
    assert run(capsys, *command).startswith(f"pope-{strategy}: images 40, questions 240, yes 120, no 120; skipped: ")
    assert read(output / "manifest.json")["notes"]["image that was not drawn"] == 12
    again = tmp_path / "again"
    run(capsys, *command[:-1], again)
    assert (again / "questions.jsonl").read_bytes() == (output / "questions.jsonl").read_bytes()
    metrics = score(output, "pope", tmp_path, wrong=24)
    assert (metrics["accuracy"], metrics["yes_ratio"], metrics["dataset"]) == (0.9, 0.5, f"pope-{strategy}")
    official_form = tmp_path / f"coco_pope_{strategy}.json"
    official_form.write_bytes((output / "questions.jsonl").read_bytes())
    command = ("score", "--task", "pope", "--data", official_form, "--predictions", tmp_path / "p.jsonl")
    run(capsys, *command, "--output", tmp_path / "m.json")
    assert read(tmp_path / "m.json")["accuracy"] == 0.9


def test_pope_says_when_there_are_too_few_images(realdata: Path, tmp_path: Path, capsys: Any) -> None:
    annotations = realdata / "coco_annotations" / "instances_val2014_100.json"
    command = ("data", "pope", "--annotations", annotations, "--strategy", "random", "--output", tmp_path / "out")
    assert "ask for fewer with --images-n" in refused(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_the_official_pope_file_is_scored_to_the_published_f1(realdata: Path, tmp_path: Path, capsys: Any) -> None:
    questions = realdata / "pope" / "coco_pope_random.json"
    lines = (realdata / "pope" / "llava-v1.5-13b_answers_random.jsonl").read_text().splitlines()
    ids = [json.loads(line)["question_id"] for line in questions.read_text().splitlines()]
    answers = [{"question_id": key, "answer": json.loads(line)["text"]} for key, line in zip(ids, lines, strict=True)]
    (tmp_path / "p.json").write_text(json.dumps(answers))
    command = ("score", "--task", "pope", "--data", questions, "--predictions", tmp_path / "p.json")
    run(capsys, *command, "--output", tmp_path / "m.json")
    expected = read(realdata / "pope" / "expected_pope.json")["random"]
    metrics = read(tmp_path / "m.json")
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert metrics[name] == pytest.approx(expected[name])
    assert (metrics["n"], metrics["counts"]["TP"], metrics["counts"]["FN"]) == (2910, 1182, 318)


def test_keywords_writes_a_file_or_a_folder_and_shows_the_table(realdata: Path, tmp_path: Path, capsys: Any) -> None:
    path = realdata / "llava_instruct" / "videochat_llava_complex_reasoning_2k_first700.json"
    out = run(capsys, "data", "keywords", "--conversations", path, "--output", tmp_path / "k.json")
    assert out.startswith("700 conversations, 1,400 utterances (paper: 80,000 conversations, 442,666 utterances)")
    assert "1,619    2.02 %   0.37 %" in out
    told = read(tmp_path / "k.json")
    assert (told["phrases"]["left"]["conversations"], told["source"]["path"]) == (15, path.name)
    folder = tmp_path / "k"
    command = ("data", "keywords", "--conversations", path, "--output", folder)
    run(capsys, *command)
    assert read(folder / "keywords.json")["phrases"] == told["phrases"]
    assert read(folder / "manifest.json")["counts"] == {"conversations": 700, "qa_pairs": 700, "utterances": 1400}
    assert "already built" in run(capsys, *command)
    message = refused(capsys, "data", "keywords", "--conversations", tmp_path / "none", "--output", tmp_path / "n.json")
    assert "no such file" in message


def test_what_exclusions_writes_is_what_exclude_reads(realdata: Path, tmp_path: Path, capsys: Any) -> None:
    annotations = realdata / "coco_annotations" / "coco_mini_instances_train2017.json"
    pope, okvqa = realdata / "pope" / "coco_pope_random.json", realdata / "vqa" / "okvqa_test_split.json"
    listed = []
    for name in ("ids.txt", "ids.json"):
        command = ("data", "exclusions", "--pope", pope, "--vqav2", okvqa, "--output", tmp_path / name)
        out = run(capsys, *command)
        assert "pope coco_pope_random.json: 500 images, 500 of them new" in out
        meta = read(tmp_path / "ids.meta.json")
        assert [one["ids"] for one in meta["sources"]] == [500, 4445]
        output = tmp_path / f"set-{name}"
        build = ("data", "localize-instruct", "--annotations", annotations, "--exclude", tmp_path / name)
        run(capsys, *build, "--output", output)
        assert read(output / "manifest.json")["notes"] == {"image excluded on request": 1}
        assert "shared: 0 images" in run(capsys, "data", "overlap", output, pope)
        assert "shared: 0 images" in run(capsys, "data", "overlap", output, okvqa)
        listed.append({conversation.image for conversation in open_conversations(output)})
    ids = read(tmp_path / "ids.json")
    assert ids == sorted(map(int, (tmp_path / "ids.txt").read_text().split()))
    assert len(ids) == meta["ids"]
    assert listed[0] == listed[1]


def test_exclusions_of_gqa_need_visual_genome(realdata: Path, tmp_path: Path, capsys: Any) -> None:
    gqa = realdata / "gqa" / "gqa_questions_official_format9.json"
    command = ("data", "exclusions", "--gqa", gqa, "--output", tmp_path / "ids.txt")
    assert "image_data.json" in refused(capsys, *command)
    assert not list(tmp_path.iterdir())
    (tmp_path / "image_data.json").write_text('[{"image_id": 2320168, "coco_id": 42}]')
    out = run(capsys, *command, "--visual-genome", tmp_path / "image_data.json")
    assert "1 images, 1 of them new, 6 without a COCO id" in out
    assert (tmp_path / "ids.txt").read_text() == "42\n"
    assert "no file was given" in refused(capsys, "data", "exclusions", "--output", tmp_path / "x.txt")


def test_overlap_counts_both_ways_and_lists_the_images(realdata: Path, tmp_path: Path, capsys: Any) -> None:
    folder = realdata / "coco_annotations"
    first, second = folder / "coco128_instances_train2017.json", folder / "instances_val2014_100.json"
    lines = run(capsys, "data", "overlap", first, second, "--output", tmp_path / "o.json").splitlines()
    assert lines == [
        "coco128_instances_train2017.json: 128 images (128 by COCO id), of which 33.59 % shared",
        "instances_val2014_100.json: 100 images (100 by COCO id), of which 43.00 % shared",
        "shared: 43 images",
    ]
    assert len(read(tmp_path / "o.json")["images"]["coco"]) == 43
    assert "no such file" in refused(capsys, "data", "overlap", first, tmp_path / "none.json")
