import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.config import EvaluationConfig, ExperimentConfig
from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.evaluation.predict import Ask, Job, Options, predict
from locvlm.evaluation.score import score
from locvlm.evaluation.tasks import TASKS
from locvlm.presets import preset
from locvlm.records import read_json, read_jsonl, write_jsonl


class FakeModel:
    """Answers "left" to everything and remembers what it was asked; `stop_after` interrupts it like Ctrl-C."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.config: ExperimentConfig = preset("tiny", ["evaluation.batch_size=4"])
        self.asked: list[Ask] = []
        self.batches: list[list[str]] = []
        self.decoding: list[EvaluationConfig] = []
        self.opened = 0
        self._stop_after = stop_after

    def open(self, _folder: Path) -> "FakeModel":
        self.opened += 1
        return self

    def answers(self, asks: Sequence[Ask], decoding: EvaluationConfig) -> list[str]:
        if self._stop_after is not None and len(self.asked) >= self._stop_after:
            raise KeyboardInterrupt
        self.asked += asks
        self.batches.append([ask.id for ask in asks])
        self.decoding.append(decoding)
        return [f"It is on the left of {ask.id}" for ask in asks]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Ten images, two questions each, a model folder."""
    (tmp_path / "images").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "locvlm.yaml").write_text("name: tiny\n")
    (tmp_path / "model" / "receipt.json").write_text('{"steps": 12}')
    for number in range(10):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    rows = [
        {"id": str(n), "image": f"{n // 2}.png", "prompt": f"question {n}", "reference": ("left", "right")[n % 2]}
        for n in range(20)
    ]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    return tmp_path


def job(world: Path, output: str = "out.jsonl", task: str = "coco-spatial") -> Job:
    return Job(TASKS[task], world / "questions.jsonl", world / output)


def options(world: Path, **changes: Any) -> Options:
    return Options(**{"model": world / "model", "images": world / "images", **changes})


def test_rows_hold_what_the_format_promises(world: Path) -> None:
    model = FakeModel()
    predict([job(world)], options(world), model.open)
    rows = read_jsonl(world / "out.jsonl")
    assert rows[0] == {
        "id": "0",
        "task": "coco-spatial",
        "image": "0.png",
        "prompt": "question 0",
        "answer": "It is on the left of 0",
        "parsed": "left",
        "reference": "left",
    }
    assert [row["id"] for row in rows] == [str(n) for n in range(20)]
    assert [len(batch) for batch in model.batches] == [4] * 5
    meta = read_json(world / "out.meta.json")
    assert meta["decoding"]["temperature"] == 0.0
    assert meta["model"]["receipt"] == {"steps": 12}
    assert meta["prompts"] == {"system": "", "clean_templates": False, "answer_convention": "natural"}
    assert sorted(path.name for path in world.glob("out*")) == ["out.jsonl", "out.meta.json"]


def test_an_interrupted_run_continues_and_ends_in_the_same_bytes(world: Path) -> None:
    interrupted = FakeModel(stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        predict([job(world)], options(world), interrupted.open)
    assert not (world / "out.jsonl").exists()
    partial = world / "out.jsonl.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1 + 8
    with open(partial, "a") as file:
        file.write('{"id": "8", "answ')  # the machine died in the middle of a line
    second = FakeModel()
    predict([job(world)], options(world), second.open)
    assert [ask.id for ask in second.asked] == [str(n) for n in range(8, 20)]  # no question twice
    assert not partial.exists()
    whole = FakeModel()
    predict([job(world, "whole.jsonl")], options(world), whole.open)
    assert (world / "whole.jsonl").read_bytes() == (world / "out.jsonl").read_bytes()
    assert (world / "whole.meta.json").read_bytes() == (world / "out.meta.json").read_bytes()
    assert interrupted.batches + second.batches == whole.batches


def test_a_finished_run_is_left_alone_and_the_model_is_not_even_opened(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predict([job(world)], options(world), FakeModel().open)
    before = (world / "out.jsonl").stat().st_mtime_ns
    again = FakeModel()
    with caplog.at_level("INFO"):
        predict([job(world)], options(world), again.open)
    assert again.opened == 0
    assert "complete already" in caplog.text
    assert (world / "out.jsonl").stat().st_mtime_ns == before


def test_answers_of_another_model_are_not_mixed_in(world: Path) -> None:
    predict([job(world)], options(world), FakeModel().open)
    (world / "model" / "locvlm.yaml").write_text("name: other\n")
    with pytest.raises(DataError, match=r"made otherwise.*model.*--overwrite"):
        predict([job(world)], options(world), FakeModel().open)
    with pytest.raises(KeyboardInterrupt):
        predict([job(world)], options(world, overwrite=True), FakeModel(stop_after=4).open)
    (world / "out.jsonl").unlink()
    with pytest.raises(DataError, match=r"begun otherwise.*limit: there None, asked for 3"):
        predict([job(world)], options(world, limit=3), FakeModel().open)
    predict([job(world)], options(world, overwrite=True), FakeModel().open)
    assert len(read_jsonl(world / "out.jsonl")) == 20


def test_a_file_that_predict_did_not_write_is_never_replaced_silently(world: Path) -> None:
    (world / "out.jsonl").write_text("my notes\n")
    with pytest.raises(DataError, match="nothing beside it says how"):
        predict([job(world)], options(world), FakeModel().open)
    assert (world / "out.jsonl").read_text() == "my notes\n"


def test_several_tasks_share_one_model(world: Path) -> None:
    rows = [{"id": "0", "image": "0.png", "prompt": "Is there dog in image?", "reference": "yes"}]
    write_jsonl(world / "presence.jsonl", rows)
    model = FakeModel()
    presence = Job(TASKS["presence"], world / "presence.jsonl", world / "b.jsonl")
    predict([job(world), presence], options(world), model.open)
    assert model.opened == 1
    assert len(read_jsonl(world / "out.jsonl")) == 20
    assert len(read_jsonl(world / "b.jsonl")) == 1


def test_an_unreadable_image_fails_its_questions_and_the_run_goes_on(world: Path) -> None:
    (world / "images" / "3.png").write_bytes(b"not an image")
    (world / "images" / "4.png").unlink()
    model = FakeModel()
    predict([job(world)], options(world), model.open)
    rows = read_jsonl(world / "out.jsonl")
    failed = {row["id"]: row["failure"] for row in rows if "failure" in row}
    assert sorted(failed) == ["6", "7", "8", "9"]
    assert "3.png" in failed["6"]
    assert str(world) not in failed["6"]
    assert all(row["answer"] == "" and row["parsed"] is None for row in rows if row["id"] in failed)
    assert read_json(world / "out.meta.json")["failed"] == failed
    metrics = score(TASKS["coco-spatial"], world / "out.jsonl", world / "questions.jsonl")
    assert metrics["n"] == 20
    assert metrics["accuracy"] == 8 / 20  # ten lefts, two of them not asked
    assert set(metrics["failures"]["failed"]) == {"6", "7", "8", "9"}


def test_a_name_that_leaves_the_image_folder_is_a_failure(world: Path) -> None:
    rows = read_jsonl(world / "questions.jsonl")
    rows[0]["image"] = "../model/locvlm.yaml"
    write_jsonl(world / "questions.jsonl", rows)
    predict([job(world)], options(world), FakeModel().open)
    assert "leads out" in read_jsonl(world / "out.jsonl")[0]["failure"]


def test_when_every_question_fails_it_is_an_error(world: Path) -> None:
    (world / "empty").mkdir()
    with pytest.raises(DataError, match=r"none of the 20 questions could be asked.*check --images"):
        predict([job(world)], options(world, images=world / "empty"), FakeModel().open)
    assert list(world.glob("out*")) == []


def test_decoding_comes_from_the_checkpoint_and_single_values_can_be_changed(world: Path) -> None:
    model = FakeModel()
    predict([job(world)], options(world, decoding={"temperature": 0.7, "batch_size": 20}), model.open)
    assert model.decoding == [EvaluationConfig(temperature=0.7, max_new_tokens=40, batch_size=20)]
    with pytest.raises(ConfigError, match=r"temperature: .*found -1"):
        predict([job(world, "b.jsonl")], options(world, decoding={"temperature": -1}), model.open)


def test_a_limited_run_is_scored_on_the_questions_that_were_drawn(world: Path) -> None:
    predict([job(world)], options(world, limit=6), FakeModel().open)
    rows = read_jsonl(world / "out.jsonl")
    assert len(rows) == 6
    assert [row["id"] for row in rows] != [str(n) for n in range(6)]  # not the first six
    with_data = score(TASKS["coco-spatial"], world / "out.jsonl", world / "questions.jsonl")
    without = score(TASKS["coco-spatial"], world / "out.jsonl")
    assert with_data["n"] == without["n"] == 6
    assert with_data["limit"] == 6
    assert with_data["accuracy"] == without["accuracy"] == sum(row["reference"] == "left" for row in rows) / 6


def test_missing_folders_are_told(world: Path) -> None:
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        predict([job(world)], options(world, images=world / "no"), FakeModel().open)
    with pytest.raises(CheckpointError, match="no such folder"):
        predict([job(world)], options(world, model=world / "no"), FakeModel().open)
    with pytest.raises(CheckpointError, match=r"locvlm\.yaml is missing"):
        predict([job(world)], options(world, model=world / "images"), FakeModel().open)
    gone = Job(TASKS["presence"], world / "no.jsonl", world / "out.jsonl")
    with pytest.raises(DataError, match="there is no data"):
        predict([gone], options(world), FakeModel().open)


def test_a_foreign_partial_file_is_told(world: Path) -> None:
    (world / "out.jsonl.partial.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match="not a partial prediction file"):
        predict([job(world)], options(world), FakeModel().open)


def test_progress_is_a_line_now_and_then_without_a_terminal(
    world: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locvlm.evaluation.predict._SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO"):
        predict([job(world)], options(world), FakeModel().open)
    lines = [record.getMessage() for record in caplog.records]
    assert any("4 of 20 answers" in line for line in lines)
    assert lines[-1].startswith("coco-spatial: 20 answers in")
    assert json.loads((world / "out.meta.json").read_text())["n"] == 20
