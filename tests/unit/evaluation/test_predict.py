import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.config import EvaluationConfig, ExperimentConfig, FamilyConfig
from locvlm.errors import ConfigError, DataError
from locvlm.evaluation.asks import Ask, Unanswered
from locvlm.evaluation.predict import Job, Options, predict
from locvlm.evaluation.score import score
from locvlm.evaluation.tasks import TASKS
from locvlm.presets import preset
from locvlm.records import read_json, read_jsonl, write_jsonl


class FakeModel:
    """Answers "left" to everything and remembers what it was asked; `stop_after` interrupts it like Ctrl-C."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.config: ExperimentConfig | FamilyConfig = preset("tiny", ["evaluation.batch_size=4"])
        self.print = "sha256:0"
        self.asked: list[Ask] = []
        self.batches: list[list[str]] = []
        self.decoding: list[EvaluationConfig] = []
        self.opened = 0
        self._stop_after = stop_after

    def identity(self) -> dict[str, Any]:
        return {"model": self.print, "engine": "fake"}

    def describe(self) -> ExperimentConfig | FamilyConfig:
        return self.config

    def receipt(self) -> dict[str, int]:
        return {"steps": 12}

    def open(self) -> "FakeModel":
        self.opened += 1
        return self

    def answers(self, asks: Sequence[Ask], decoding: EvaluationConfig) -> list[str]:
        if self._stop_after is not None and len(self.asked) >= self._stop_after:
            raise KeyboardInterrupt
        for ask in asks:
            ask.open()
        self.asked += asks
        self.batches.append([ask.id for ask in asks])
        self.decoding.append(decoding)
        return [f"It is on the left of {ask.id}" for ask in asks]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Ten images, two questions each."""
    (tmp_path / "images").mkdir()
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
    return Options(**{"images": [world / "images"], **changes})


def test_a_mirrored_question_is_asked_about_the_mirrored_pixels(world: Path) -> None:
    Image.frombytes("L", (2, 1), b"\x00\xff").save(world / "images" / "0.png")
    row = {"id": "0", "image": "0.png", "prompt": "Where?", "reference": "left"}
    write_jsonl(world / "questions.jsonl", [row, {**row, "id": "0-mirrored", "reference": "right", "mirror": True}])
    model = FakeModel()
    predict([job(world)], options(world), model)
    plain, mirrored = model.asked
    assert (list(plain.open().tobytes()), list(mirrored.open().tobytes())) == ([0, 255], [255, 0])
    assert plain.image != mirrored.image  # two images for whoever reads each once
    rows = read_jsonl(world / "out.jsonl")
    assert [row.get("mirror") for row in rows] == [None, True]
    figures = score(TASKS["coco-spatial"], world / "out.jsonl", world / "questions.jsonl")["figures"]
    assert figures["consistency"]["value"] == 0
    assert figures["accuracy"]["value"] == 0.5


def test_rows_hold_what_the_format_promises(world: Path) -> None:
    model = FakeModel()
    predict([job(world)], options(world), model)
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
    assert meta["prompts"] == preset("tiny").prompts.model_dump(mode="json")
    assert sorted(path.name for path in world.glob("out*")) == ["out.jsonl", "out.meta.json"]


def test_an_interrupted_run_continues_and_ends_in_the_same_bytes(world: Path) -> None:
    interrupted = FakeModel(stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        predict([job(world)], options(world), interrupted)
    assert not (world / "out.jsonl").exists()
    partial = world / "out.jsonl.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1 + 8
    with open(partial, "a") as file:
        file.write('{"id": "8", "answ')  # the machine died in the middle of a line
    second = FakeModel()
    predict([job(world)], options(world), second)
    assert [ask.id for ask in second.asked] == [str(n) for n in range(8, 20)]  # no question twice
    assert not partial.exists()
    whole = FakeModel()
    predict([job(world, "whole.jsonl")], options(world), whole)
    assert (world / "whole.jsonl").read_bytes() == (world / "out.jsonl").read_bytes()
    assert (world / "whole.meta.json").read_bytes() == (world / "out.meta.json").read_bytes()
    assert interrupted.batches + second.batches == whole.batches


def test_a_finished_run_is_left_alone_and_the_model_is_not_even_opened(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predict([job(world)], options(world), FakeModel())
    before = (world / "out.jsonl").stat().st_mtime_ns
    again = FakeModel()
    with caplog.at_level("INFO"):
        predict([job(world)], options(world), again)
    assert again.opened == 0
    assert "complete already" in caplog.text
    assert (world / "out.jsonl").stat().st_mtime_ns == before


def test_answers_of_another_model_are_not_mixed_in(world: Path) -> None:
    predict([job(world)], options(world), FakeModel())
    other = FakeModel()
    other.print = "sha256:1"
    with pytest.raises(DataError, match=r"made otherwise.*model.*--overwrite"):
        predict([job(world)], options(world), other)
    with pytest.raises(KeyboardInterrupt):
        predict([job(world)], options(world, overwrite=True), FakeModel(stop_after=4))
    (world / "out.jsonl").unlink()
    with pytest.raises(DataError, match=r"begun otherwise.*limit: there None, asked for 3"):
        predict([job(world)], options(world, limit=3), FakeModel())
    predict([job(world)], options(world, overwrite=True), FakeModel())
    assert len(read_jsonl(world / "out.jsonl")) == 20


def test_a_file_that_predict_did_not_write_is_never_replaced_silently(world: Path) -> None:
    (world / "out.jsonl").write_text("my notes\n")
    with pytest.raises(DataError, match="nothing beside it says how"):
        predict([job(world)], options(world), FakeModel())
    assert (world / "out.jsonl").read_text() == "my notes\n"


def test_an_image_is_not_split_over_batches_and_like_lengths_stand_together(world: Path) -> None:
    rows = [
        {"id": f"{k}-{n}", "image": f"{n}.png", "prompt": "long " * (n % 2) + "Where?", "reference": "left"}
        for k in range(3)
        for n in range(4)
    ]
    write_jsonl(world / "questions.jsonl", rows)
    model = FakeModel()
    predict([job(world)], options(world), model)  # four a batch
    assert model.batches == [[f"{k}-{n}" for k in range(3)] for n in (0, 2, 1, 3)]
    assert [row["id"] for row in read_jsonl(world / "out.jsonl")] == [row["id"] for row in rows]
    wide = FakeModel()
    predict([job(world, "wide.jsonl")], options(world, decoding={"batch_size": 6}), wide)
    assert [len(batch) for batch in wide.batches] == [6, 6]
    assert read_jsonl(world / "wide.jsonl") == read_jsonl(world / "out.jsonl")


class Refusing(FakeModel):
    """Has no answer to some questions."""

    def __init__(self, refused: set[str]) -> None:
        super().__init__()
        self.refused = refused

    def answers(self, asks: Sequence[Ask], decoding: EvaluationConfig) -> list[str | Unanswered]:  # type: ignore[override]
        said = super().answers(asks, decoding)
        return [Unanswered("no time") if a.id in self.refused else text for a, text in zip(asks, said, strict=True)]


def test_failures_up_to_half_are_reported_and_more_stop_the_run(world: Path) -> None:
    predict([job(world)], options(world), Refusing({str(n) for n in range(10)}))
    failed = read_json(world / "out.meta.json")["failed"]
    assert failed == {str(n): "no time" for n in range(10)}
    assert score(TASKS["coco-spatial"], world / "out.jsonl", world / "questions.jsonl")["n_failures"] == 10
    with pytest.raises(
        DataError, match="11 of the 20 questions asked until now failed; the answers until now are kept"
    ):
        predict([job(world, "b.jsonl")], options(world), Refusing({str(n) for n in range(9, 20)}))
    again = FakeModel()
    predict([job(world, "b.jsonl")], options(world), again)
    assert {ask.id for ask in again.asked} >= {str(n) for n in range(9, 20)}  # what failed is asked again
    assert read_json(world / "b.meta.json")["failed"] == {}


def test_the_file_beside_the_answers_says_how_the_model_was_asked(world: Path) -> None:
    model = FakeModel()
    predict([job(world)], options(world), model)
    asked = read_json(world / "out.meta.json")["identity"]["asked"]
    assert (asked["family"], asked["layout"]) == ("locvlm", "USER: <image>\n{question} ASSISTANT:")
    assert asked["geometry"] == {"kind": "squash", "side": 48}
    assert asked["coordinates"]["representation"] == "ivb"


def test_several_tasks_share_one_model(world: Path) -> None:
    rows = [{"id": "0", "image": "0.png", "prompt": "Is there dog in image?", "reference": "yes"}]
    write_jsonl(world / "presence.jsonl", rows)
    model = FakeModel()
    presence = Job(TASKS["presence"], world / "presence.jsonl", world / "b.jsonl")
    predict([job(world), presence], options(world), model)
    assert model.opened == 1
    assert len(read_jsonl(world / "out.jsonl")) == 20
    assert len(read_jsonl(world / "b.jsonl")) == 1


def test_an_unreadable_image_fails_its_questions_and_the_run_goes_on(world: Path) -> None:
    (world / "images" / "3.png").write_bytes(b"not an image")
    (world / "images" / "4.png").unlink()
    model = FakeModel()
    predict([job(world)], options(world), model)
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
    rows[0]["image"] = "../questions.jsonl"
    write_jsonl(world / "questions.jsonl", rows)
    predict([job(world)], options(world), FakeModel())
    assert "leads out" in read_jsonl(world / "out.jsonl")[0]["failure"]


def test_when_every_question_fails_it_is_an_error(world: Path) -> None:
    (world / "empty").mkdir()
    with pytest.raises(DataError, match=r"12 of the 12 questions asked until now failed; the first: .*0\.png"):
        predict([job(world)], options(world, images=[world / "empty"]), FakeModel())
    assert list(world.glob("out*")) == []


def test_decoding_comes_from_the_checkpoint_and_single_values_can_be_changed(world: Path) -> None:
    model = FakeModel()
    predict([job(world)], options(world, decoding={"temperature": 0.7, "batch_size": 20}), model)
    assert model.decoding == [EvaluationConfig(temperature=0.7, max_new_tokens=40, batch_size=20)]
    with pytest.raises(ConfigError, match=r"temperature: .*found -1"):
        predict([job(world, "b.jsonl")], options(world, decoding={"temperature": -1}), model)


def test_a_limited_run_is_scored_on_the_questions_that_were_drawn(world: Path) -> None:
    predict([job(world)], options(world, limit=6), FakeModel())
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
        predict([job(world)], options(world, images=[world / "no"]), FakeModel())
    gone = Job(TASKS["presence"], world / "no.jsonl", world / "out.jsonl")
    with pytest.raises(DataError, match="there is no data"):
        predict([gone], options(world), FakeModel())


def test_a_foreign_partial_file_is_told(world: Path) -> None:
    (world / "out.jsonl.partial.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match="not a partial prediction file"):
        predict([job(world)], options(world), FakeModel())


def test_progress_is_a_line_now_and_then_without_a_terminal(
    world: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locvlm.evaluation.progress._SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO"):
        predict([job(world)], options(world), FakeModel())
    lines = [record.getMessage() for record in caplog.records]
    assert any("4 of 20 answers" in line for line in lines)
    assert lines[-1].startswith("coco-spatial: 20 answers in")
    assert json.loads((world / "out.meta.json").read_text())["n"] == 20
