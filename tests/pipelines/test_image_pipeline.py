"""The image pipeline: what its two arms share and where they differ."""

from typing import Any

import pytest
import yaml

from locvlm.config import MixtureEntry
from locvlm.presets import preset
from workflows.compile import package
from workflows.image_pipeline import BASELINE


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    spec = next(yaml.safe_load_all(package("image").read_text(encoding="utf-8")))
    return dict(spec["root"]["dag"]["tasks"])


def test_both_arms_start_from_the_same_aligned_model_and_train_alike(tasks: dict[str, Any]) -> None:
    arms = [task["inputs"]["parameters"] for name, task in sorted(tasks.items()) if name.startswith("train-stage")][1:]
    assert [arm["name"]["runtimeValue"]["constant"] for arm in arms] == ["locvlm", "baseline"]
    for arm in arms:
        assert arm["parent"]["runtimeValue"]["constant"] == "align"
        assert arm["stage"]["runtimeValue"]["constant"] == "instruct"
    differ = {key for key in arms[0] if arms[0][key] != arms[1][key]}
    assert differ == {"name", "data", "overrides"}


def test_the_baseline_differs_in_its_mixture_alone() -> None:
    """Location objectives have 70 %, half of it to captions and half to presence questions: 0.05 each before."""
    ours, baseline = preset("tiny"), preset("tiny", [BASELINE])
    mixture = baseline.stages.instruct.mixture
    assert mixture == (
        MixtureEntry(source="generic", objective="caption", weight=0.4),
        MixtureEntry(source="generic", objective="presence", weight=0.4),
        MixtureEntry(source="generic", objective="stated_left_right", weight=0.2),
    )
    stage = ours.stages.instruct.model_copy(update={"mixture": mixture})
    assert baseline == ours.model_copy(update={"stages": ours.stages.model_copy(update={"instruct": stage})})
