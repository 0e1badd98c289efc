"""Captions of a COCO file: rows, failures, the round trip, interruption."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.config import EvaluationConfig, ExperimentConfig, dump_config
from locvlm.coordinates import make_location_format
from locvlm.data.captions import CaptionRequest
from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.evaluation.asks import Ask, Engine
from locvlm.evaluation.captioning import CaptionJob, image_batches, write_captions
from locvlm.presets import preset
from locvlm.records import read_json, read_jsonl

BOX = (10.0, 10.0, 30.0, 30.0)


class FakeEngine:
    """Says "The <category> is number <id>.", or what `says` holds for the id, and, asked where something is, what
    `places` holds. `stop_after` interrupts it like Ctrl-C."""

    def __init__(
        self,
        stop_after: int | None = None,
        places: dict[str, str] | None = None,
        says: dict[str, str] | None = None,
    ) -> None:
        self.config: ExperimentConfig | None = preset("tiny")
        self.asked: list[str] = []
        self.batches: list[list[str]] = []
        self.decoding: list[EvaluationConfig] = []
        self.opened = 0
        self._stop_after, self._places, self._says = stop_after, places or {}, says or {}

    def open(self, _folder: Path, _name: str) -> Engine:
        self.opened += 1
        return self

    def answers(self, asks: Sequence[Ask], decoding: EvaluationConfig) -> list[str]:
        for ask in asks:
            ask.open()  # as a real engine does
        if self._stop_after is not None and len(self.asked) >= self._stop_after:
            raise KeyboardInterrupt
        self.asked += [ask.id for ask in asks]
        self.batches.append([ask.id for ask in asks])
        self.decoding.append(decoding)
        return [self._answer(ask) for ask in asks]

    def _answer(self, ask: Ask) -> str:
        if ask.id.endswith("-place"):
            return self._places.get(ask.id.removesuffix("-place"), "I do not know")
        category = ask.prompt.removeprefix("Describe the ").partition(" in this image")[0]
        return self._says.get(ask.id, f"The {category} in the image is number {ask.id}. It waits.")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Six images with a dog (ids 1, 3, ..) and a cat (2, 4, ..) each; the ids descend with the images."""
    (tmp_path / "images").mkdir()
    annotations = []
    for number in range(1, 7):
        Image.new("RGB", (48, 48), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        for category in (1, 2):
            key = 2 * (6 - number) + category
            box = [BOX[0], BOX[1], BOX[2] - BOX[0], BOX[3] - BOX[1]]
            annotations.append({"id": key, "image_id": number, "category_id": category, "bbox": box})
    images = [{"id": n, "file_name": f"{n}.png", "width": 48, "height": 48} for n in range(1, 7)]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    value = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(value))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "locvlm"}')
    (tmp_path / "model" / "locvlm.yaml").write_text(dump_config(preset("tiny")))
    return tmp_path


def job(world: Path, name: str = "captions.jsonl", **values: Any) -> CaptionJob:
    return CaptionJob(
        world / "instances.json", world / "images", world / "model", world / name, **{"batch_size": 4, **values}
    )


def request(key: int, image_id: int) -> CaptionRequest:
    return CaptionRequest(key, image_id, f"{image_id}.png", 48, 48, "dog", BOX)


def test_rows_hold_the_raw_and_the_normalised_answer_by_annotation_id(world: Path) -> None:
    engine = FakeEngine()
    report = write_captions(job(world), engine.open)
    rows = read_jsonl(world / "captions.jsonl")
    assert [row["id"] for row in rows] == list(range(1, 13))
    assert rows[0] == {
        "id": 1,
        "image_id": 6,
        "image": "6.png",
        "category": "dog",
        "raw": "The dog in the image is number 1. It waits.",
        "caption": "dog that is number 1",
    }
    assert report is not None
    assert (report.images, report.objects, report.captions) == (6, 12, 12)
    assert (report.skipped, report.failed, report.dropped) == ({}, {}, {})
    assert {(d.temperature, d.max_new_tokens) for d in engine.decoding} == {(0.0, 64)}
    meta = read_json(world / "captions.meta.json")
    assert meta["counts"] == {"images": 6, "objects": 12, "captions": 12}
    assert meta["engine"] == "locvlm"
    assert sorted(path.name for path in world.glob("captions*")) == ["captions.jsonl", "captions.meta.json"]


def test_batches_hold_whole_images_in_order(world: Path) -> None:
    engine = FakeEngine()
    write_captions(job(world, batch_size=5), engine.open)
    assert engine.batches == [["11", "12", "9", "10"], ["7", "8", "5", "6"], ["3", "4", "1", "2"]]


def test_an_image_with_more_objects_than_a_batch_is_one_batch() -> None:
    requests = [request(1, 1), *(request(n, 2) for n in range(2, 7)), request(7, 3), request(8, 4)]
    assert [[r.id for r in batch] for batch in image_batches(requests, 2)] == [[1], [2, 3, 4, 5, 6], [7, 8]]
    assert image_batches([], 2) == []


def test_an_interrupted_run_asks_nothing_twice_and_ends_in_the_same_bytes(world: Path) -> None:
    first = FakeEngine(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        write_captions(job(world), first.open)
    assert not (world / "captions.jsonl").exists()
    partial = world / "captions.jsonl.partial.jsonl"
    with open(partial, "a") as file:
        file.write('{"rows": [{"id": 7, "im')  # the machine died in the middle of a line
    second = FakeEngine()
    write_captions(job(world), second.open)
    assert not partial.exists()
    assert sorted(first.asked + second.asked, key=int) == [str(n) for n in range(1, 13)]
    whole = FakeEngine()
    write_captions(job(world, "whole.jsonl"), whole.open)
    assert whole.batches == first.batches + second.batches
    for suffix in (".jsonl", ".meta.json"):
        assert (world / f"whole{suffix}").read_bytes() == (world / f"captions{suffix}").read_bytes()


def test_a_finished_run_is_left_alone_and_no_model_is_opened(world: Path) -> None:
    write_captions(job(world), FakeEngine().open)
    again = FakeEngine()
    assert write_captions(job(world), again.open) is None
    assert again.opened == 0


def test_captions_made_otherwise_are_not_mixed_in(world: Path) -> None:
    write_captions(job(world), FakeEngine().open)
    with pytest.raises(DataError, match=r"made otherwise.*max_new_tokens: there 64, asked for 5.*--overwrite"):
        write_captions(job(world, max_new_tokens=5), FakeEngine().open)
    (world / "captions.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt):
        write_captions(job(world), FakeEngine(stop_after=4).open)
    with pytest.raises(DataError, match=r"begun otherwise.*crowd: there 'counts', asked for 'ignored'"):
        write_captions(job(world, crowd="ignored"), FakeEngine().open)
    report = write_captions(job(world, crowd="ignored", overwrite=True), FakeEngine().open)
    assert report is not None
    assert report.captions == 12


def test_a_missing_image_is_counted_and_a_damaged_one_fails_its_objects_only(world: Path) -> None:
    (world / "images" / "1.png").unlink()
    (world / "images" / "2.png").write_bytes(b"not an image")
    engine = FakeEngine()
    report = write_captions(job(world), engine.open)
    assert report is not None
    assert report.skipped == {"object on an image that is missing": 2}
    assert report.failed == {"object on an image that does not decode": 2}
    rows = {row["id"]: row for row in read_jsonl(world / "captions.jsonl")}
    assert sorted(rows) == list(range(1, 11))
    assert rows[9]["failure"] == "object on an image that does not decode"
    assert (rows[9]["raw"], rows[9]["caption"]) == ("", "")
    assert rows[7]["caption"] == "dog that is number 7"  # of the same batch


def test_a_damaged_image_is_tried_again_when_the_run_is(world: Path) -> None:
    sound = (world / "images" / "1.png").read_bytes()
    (world / "images" / "1.png").write_bytes(sound[:20])
    with pytest.raises(KeyboardInterrupt):
        write_captions(job(world), FakeEngine(stop_after=4).open)
    (world / "images" / "1.png").write_bytes(sound)
    second = FakeEngine()
    report = write_captions(job(world), second.open)
    assert report is not None
    assert (report.captions, report.failed) == (12, {})
    assert second.batches[0] == ["11", "12"]


def test_empty_answers_are_failures(world: Path) -> None:
    report = write_captions(job(world), FakeEngine(says={"2": "...", "4": "", "6": "It is </s> here"}).open)
    assert report is not None
    assert report.failed == {
        "object of which the model said <image> or </s>": 1,
        "object of which the model said nothing": 2,
    }
    row = read_jsonl(world / "captions.jsonl")[1]
    assert (row["raw"], row["caption"], row["failure"]) == ("...", "", "object of which the model said nothing")


def test_when_more_than_half_fails_the_run_stops(world: Path) -> None:
    for number in range(1, 5):
        (world / "images" / f"{number}.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"8 of 12 objects to caption cannot be used\n.*does not decode: 8"):
        write_captions(job(world), FakeEngine().open)
    assert not (world / "captions.jsonl").exists()


def test_a_model_that_says_nothing_is_stopped(world: Path) -> None:
    engine = FakeEngine(says={str(n): "" for n in range(5, 13)})
    with pytest.raises(DataError, match=r"the model said nothing: 8"):
        write_captions(job(world), engine.open)
    assert len(engine.batches) == 2  # the rest is not asked


def test_the_round_trip_keeps_what_the_model_finds_again(world: Path) -> None:
    config = preset("tiny")
    location = make_location_format(config.coordinates)
    right, half, far = (location.encode(box, 48, 48) for box in (BOX, (10, 10, 30, 20), (40, 40, 48, 48)))
    places = {str(n): f"It is located at {right}" for n in range(1, 13)}
    places |= {"1": f"It is located at {half}", "2": f"It is located at {far}", "3": "There is no such object"}
    engine = FakeEngine(places=places)
    report = write_captions(job(world, round_trip=0.5), engine.open)
    rows = {row["id"]: row for row in read_jsonl(world / "captions.jsonl")}
    assert report is not None
    assert report.captions == 10
    assert report.dropped == {"round trip: the model looked elsewhere": 1, "round trip: the model named no box": 1}
    assert rows[1]["iou"] == pytest.approx(0.5)
    assert rows[1]["caption"] == "dog that is number 1"
    assert (rows[2]["iou"], rows[2]["caption"]) == (0.0, "")
    assert rows[2]["dropped_caption"] == "cat that is number 2"
    assert (rows[3]["iou"], rows[3]["place"]) == (None, "There is no such object")
    assert rows[4]["iou"] == pytest.approx(1.0)
    assert read_json(world / "captions.meta.json")["dropped"] == report.dropped


def test_the_round_trip_asks_for_the_caption_in_the_words_of_training(world: Path) -> None:
    prompts: list[str] = []

    class Listening(FakeEngine):
        def _answer(self, ask: Ask) -> str:
            prompts.append(ask.prompt)
            return super()._answer(ask)

    write_captions(job(world, round_trip=0.5), Listening().open)
    asked = "Where is the object described dog that is number 11 located in image in terms of (x1,y1,x2,y2) bbox?"
    assert asked in prompts


def test_a_round_trip_needs_a_model_that_says_how_it_writes_boxes(world: Path) -> None:
    points = preset("tiny", ["coordinates.location=point"])
    (world / "model" / "locvlm.yaml").write_text(dump_config(points))
    with pytest.raises(ConfigError, match="it writes points, not boxes"):
        write_captions(job(world, round_trip=0.5), FakeEngine().open)
    (world / "model" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ConfigError, match="nothing in it says how it writes places"):
        write_captions(job(world, round_trip=0.5, engine="transformers"), FakeEngine().open)


def test_only_the_first_images_are_captioned_on_request(world: Path) -> None:
    report = write_captions(job(world, limit=2), FakeEngine().open)
    assert report is not None
    assert [row["image_id"] for row in read_jsonl(world / "captions.jsonl")] == [2, 2, 1, 1]


def test_missing_inputs_are_told(world: Path) -> None:
    engine = FakeEngine()
    with pytest.raises(DataError, match="no annotation file"):
        write_captions(replace(job(world), annotations=world / "no.json"), engine.open)
    with pytest.raises(DataError, match="no such folder"):
        write_captions(replace(job(world), images=world / "no"), engine.open)
    with pytest.raises(CheckpointError, match="no such folder"):
        write_captions(replace(job(world), model=world / "no"), engine.open)
    (world / "empty").mkdir()
    with pytest.raises(DataError, match="holds none of the 6 images"):
        write_captions(replace(job(world), images=world / "empty"), engine.open)
    crowded = json.loads((world / "instances.json").read_text())
    crowded["annotations"] = [{**row, "iscrowd": 1} for row in crowded["annotations"]]
    (world / "instances.json").write_text(json.dumps(crowded))
    with pytest.raises(DataError, match="none of its 6 images has an object"):
        write_captions(job(world), engine.open)
    assert engine.opened == 0
    assert list(world.glob("captions*")) == []
