"""The shipped foundation sees: it answers presence questions about scenes that it has never seen."""

from pathlib import Path

from locvlm.data.coco import read_instances
from locvlm.data.hallucination import build_presence
from locvlm.data.scenes import draw_scenes
from locvlm.evaluation.asks import Ask
from locvlm.model import load
from locvlm.model.checkpoint import TINY_FOUNDATION
from locvlm.model.variants import count_parameters
from locvlm.pixels import open_images
from locvlm.presets import preset


def test_the_shipped_foundation_answers_nine_of_ten_presence_questions(tmp_path: Path) -> None:
    foundation = load(TINY_FOUNDATION)
    assert foundation.config.model.vision == preset("tiny").model.vision
    assert foundation.config.model.language == preset("tiny").model.language
    assert 1_000_000 < count_parameters(foundation.model) < 2_000_000
    draw_scenes(tmp_path / "scenes", seed=99, n_train=1, n_test=40)
    rows = build_presence(read_instances(tmp_path / "scenes" / "instances_test.json"), seed=0).rows
    images = open_images(tmp_path / "scenes" / "images")
    asks = [Ask(row["id"], images, row["image"], row["prompt"]) for row in rows]
    answers = foundation.answers(asks, preset("tiny").evaluation)
    right = sum(answer.lower().startswith(row["reference"]) for answer, row in zip(answers, rows, strict=True))
    assert len(rows) >= 120
    assert right / len(rows) > 0.9
