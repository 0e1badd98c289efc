"""Questions about places in the form of models that others trained, and their scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from locvlm.config import CoordinateConfig, EvaluationConfig, FamilyConfig, GeometryConfig, PromptConfig
from locvlm.data.conversations import write_conversations
from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.evaluation.asks import Ask
from locvlm.evaluation.predict import Job, Options, predict
from locvlm.evaluation.score import score
from locvlm.evaluation.tasks import TASKS, read_set
from locvlm.evaluation.wording import OUT_OF_SIGHT
from locvlm.presets import preset
from locvlm.prompts import KOSMOS_LOC, KOSMOS_REV, SHIKRA_LOC, SHIKRA_REV
from locvlm.records import Conversation, Manifest, Turn, read_json, read_jsonl, write_jsonl, write_manifest

SIZE = (640, 320)
BOX = (250.0, 15.0, 630.0, 265.0)  # patches 44 to 863 of Kosmos-2's grid, up to half a patch
FAR = (0.0, 100.0, 40.0, 140.0)  # what the central square loses
KOSMOS = FamilyConfig(
    family="kosmos-2",
    question="Question: {question} Answer:",
    loc_pred=KOSMOS_LOC,
    rev_loc=KOSMOS_REV,
    coordinates=CoordinateConfig(representation="patches", n_bins=32),
    geometry=GeometryConfig(kind="squash", side=224),
)
SHIKRA = FamilyConfig(
    family="shikra",
    loc_pred=SHIKRA_LOC,
    rev_loc=SHIKRA_REV,
    coordinates=CoordinateConfig(representation="nfp", decimals=3, brackets="[]"),
    geometry=GeometryConfig(kind="letterbox_white", side=224),
)
CROPPED = FamilyConfig(
    family="llava-v1", coordinates=CoordinateConfig(n_bins=224), geometry=GeometryConfig(kind="crop", side=224)
)


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Two images, a LocPred, a NegPred and a RevLoc turn each; the data set's own form is IVB."""
    folder = tmp_path / "localize"
    folder.mkdir()
    found = []
    for name, box in (("a", BOX), ("b", FAR)):
        where = Turn("loc_pred", "dog", "dog that is brown", box)
        absent = Turn("neg_pred", "cow")
        what = Turn("rev_loc", "dog", "dog that is brown", box)
        found.append(Conversation(f"{name}-loc", f"{name}.png", *SIZE, "loc_pred", (where, absent)))
        found.append(Conversation(f"{name}-rev", f"{name}.png", *SIZE, "rev_loc", (what,)))
    write_conversations(folder, found)
    ours = preset("tiny")
    sections = {name: getattr(ours, name).model_dump(mode="json") for name in ("coordinates", "geometry")}
    write_manifest(folder, Manifest("localize", {"conversations": 4}, seed=0, **sections))
    return folder


def prompts(task: str, path: Path, family: FamilyConfig) -> dict[str, str]:
    return {question.id: question.prompt for question in read_set(TASKS[task], path, family).questions}


def test_turns_are_asked_in_the_words_and_tokens_of_kosmos(conversations: Path) -> None:
    assert prompts("localization", conversations, KOSMOS) == {
        "a-loc#0": "<grounding><phrase> dog that is brown</phrase>",
        "a-loc#1": "<grounding><phrase> cow</phrase>",
        "b-loc#0": "<grounding><phrase> dog that is brown</phrase>",
        "b-loc#1": "<grounding><phrase> cow</phrase>",
    }
    asked = prompts("region-description", conversations, KOSMOS)
    assert asked["a-rev#0"] == (
        "<grounding><phrase> It</phrase><object><patch_index_0044><patch_index_0863></object> is"
    )


def test_turns_are_asked_in_the_words_and_square_of_shikra(conversations: Path) -> None:
    asked = prompts("region-description", conversations, SHIKRA)
    # the square is 640 x 640 and begins 160 pixels above the image
    where = "[0.391,0.273,0.984,0.664]"
    assert asked["a-rev#0"] == f"For the given image <image>, can you provide a unique description of the area {where}?"
    asked = prompts("localization", conversations, SHIKRA)
    assert asked["a-loc#1"] == "In the given <image>, could you find and tell me the coordinates of cow?"


def test_without_words_of_its_own_a_family_is_asked_in_the_papers(conversations: Path) -> None:
    asked = prompts("localization", conversations, CROPPED)
    assert "dog that is brown" in asked["a-loc#0"]
    assert "(x1,y1,x2,y2) bbox" in asked["a-loc#0"]
    assert asked["b-loc#0"] == ""  # the crop loses this dog
    assert "cow" in asked["b-loc#1"]
    asked = prompts("region-description", conversations, CROPPED)
    assert asked == {"a-rev#0": asked["a-rev#0"], "b-rev#0": ""}


def test_rows_are_worded_anew_from_what_they_are_about(tmp_path: Path) -> None:
    row = {"image": "a.png", "width": 640, "height": 320, "box": list(BOX)}
    write_jsonl(
        tmp_path / "regions.jsonl", [{"id": "0", **row, "references": ["a dog"], "prompt": "What is at (1,2)?"}]
    )
    assert prompts("region-description", tmp_path / "regions.jsonl", KOSMOS)["0"].startswith("<grounding><phrase> It")
    paper = CROPPED.model_copy(update={"geometry": None})
    asked = prompts("region-description", tmp_path / "regions.jsonl", paper)
    assert asked == {"0": "Describe the object located at (88,10,220,186)?"}
    where = {"id": "0", **row, "objective": "loc_pred", "category": "dog", "prompt": "Where is dog in (x1,y1)?"}
    write_jsonl(tmp_path / "places.jsonl", [where])
    assert prompts("localization", tmp_path / "places.jsonl", KOSMOS) == {"0": "<grounding><phrase> dog</phrase>"}
    assert prompts("localization", tmp_path / "places.jsonl", paper)["0"].startswith(
        "Where is the object described dog"
    )
    write_jsonl(tmp_path / "sizeless.jsonl", [{"id": "0", "image": "a", "box": list(BOX), "references": ["a dog"]}])
    with pytest.raises(DataError, match="rows need box, width and height"):
        prompts("region-description", tmp_path / "sizeless.jsonl", KOSMOS)


def test_a_form_that_nobody_named_is_told_and_ours_is_still_refused(conversations: Path) -> None:
    with pytest.raises(ConfigError, match=r"asking a blip-2 model.*name a config"):
        prompts("localization", conversations, FamilyConfig(family="blip-2"))
    with pytest.raises(CheckpointError, match="writes places otherwise"):
        read_set(TASKS["localization"], conversations, preset("locvlm-b"))


def test_other_tasks_are_asked_as_they_stand(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "q.jsonl", [{"id": "0", "image": "a.png", "prompt": "Is there dog?", "reference": "yes"}])
    assert prompts("presence", tmp_path / "q.jsonl", FamilyConfig(family="blip-2")) == {"0": "Is there dog?"}


class Speaker:
    """A model of a family that says one thing."""

    def __init__(self, family: FamilyConfig, text: str) -> None:
        self.config, self.text = family, text
        self.prompts: list[str] = []

    def identity(self) -> dict[str, Any]:
        return {"model": "sha256:0"}

    def describe(self) -> FamilyConfig:
        return self.config

    def receipt(self) -> None:
        return None

    def open(self) -> "Speaker":
        return self

    def answers(self, asks: Sequence[Ask], decoding: EvaluationConfig) -> list[str]:
        self.prompts += [ask.prompt for ask in asks]
        return [self.text] * len(asks)


@pytest.mark.parametrize("with_data", [True, False])
def test_answers_in_kosmos_tokens_are_scored_as_boxes(conversations: Path, tmp_path: Path, with_data: bool) -> None:
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", SIZE).save(tmp_path / "images" / f"{name}.png")
    output = tmp_path / "out.jsonl"
    said = "<object><patch_index_0044><patch_index_0863></object> on a table"
    job = Job(TASKS["localization"], conversations, output)
    predict([job], Options([tmp_path / "images"]), Speaker(KOSMOS, said))
    rows = {row["id"]: row for row in read_jsonl(output)}
    assert rows["a-loc#0"]["answer"] == said
    assert rows["a-loc#0"]["parsed"] == [250.0, 15.0, 630.0, 265.0]
    metrics = score(TASKS["localization"], output, conversations if with_data else None)
    assert metrics["mean_iou"] == 0.5  # one of the two dogs, to the patch
    assert metrics["neg_recall"] == 0.0
    meta = read_json(tmp_path / "out.meta.json")
    asked = meta["identity"]["asked"]
    assert (asked["family"], asked["question"]) == ("kosmos-2", "Question: {question} Answer:")
    assert asked["geometry"] == {"kind": "squash", "side": 224}
    assert (asked["coordinates"]["representation"], asked["coordinates"]["n_bins"]) == ("patches", 32)
    assert meta["config"]["family"] == "kosmos-2"


def test_what_the_crop_loses_is_a_failure_and_not_asked(conversations: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", SIZE).save(tmp_path / "images" / f"{name}.png")
    model = Speaker(CROPPED, "(1,2,3,4)")
    job = Job(TASKS["region-description"], conversations, tmp_path / "out.jsonl")
    predict([job], Options([tmp_path / "images"]), model)
    assert len(model.prompts) == 1
    failed = read_json(tmp_path / "out.meta.json")["failed"]
    assert failed == {"b-rev#0": OUT_OF_SIGHT}


def test_another_way_of_asking_is_another_run(conversations: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", SIZE).save(tmp_path / "images" / f"{name}.png")
    job = Job(TASKS["localization"], conversations, tmp_path / "out.jsonl")
    predict([job], Options([tmp_path / "images"]), Speaker(KOSMOS, "no"))
    other = KOSMOS.model_copy(update={"prompts": PromptConfig(system="Be brief.")})
    with pytest.raises(DataError, match=r"made otherwise.*asked"):
        predict([job], Options([tmp_path / "images"]), Speaker(other, "no"))
