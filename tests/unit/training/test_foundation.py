"""`locvlm foundation` at a few steps: what it leaves, and that a finished lesson is not given twice."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locvlm.cli import main
from locvlm.data.scenes import draw_scenes
from locvlm.errors import ConfigError
from locvlm.model import load
from locvlm.presets import preset
from locvlm.training import foundation, reading
from tests.tiny import SMALL


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lessons") / "scenes"
    draw_scenes(folder, seed=3, n_train=12, n_test=4)
    return folder


def arguments(scenes: Path) -> list[str]:
    argv = ["foundation", "--annotations", str(scenes / "instances_train.json"), "--images", str(scenes / "images")]
    argv += ["--held-out", str(scenes / "instances_test.json")]
    argv += ["--tower-steps", "2", "--reading-steps", "8", "--soft-steps", "4"]
    for setting in (*SMALL, f"model.language.vocab_size={foundation.VOCABULARY}"):
        argv += ["--set", setting]
    return argv


def test_the_verb_leaves_a_model_with_its_recipe(scenes: Path, tmp_path: Path) -> None:
    output = tmp_path / "foundation"
    assert main([*arguments(scenes), "--output", str(output)]) == 0
    recipe = json.loads((output / "recipe.json").read_text())
    assert set(recipe["figures"]["tower"]) == {"category", "ground", "column", "row"}
    for lesson in ("reading", "soft"):
        assert set(recipe["figures"][lesson]) == {field.name for field in fields(reading.ReadingFigures)}
    loaded = load(output)
    assert loaded.config.model.language.vocab_size == foundation.VOCABULARY
    names = recipe["held_out_names"]
    assert len(names) == foundation.N_HELD_OUT_NAMES
    assert not {"apple", "fir", "tree"} & set(names)  # words of the drawn categories are learned
    again = reading.measure(loaded.model, loaded.encoder, names, seed=0)  # weights went through half precision
    assert again.side == pytest.approx(recipe["figures"]["reading"]["side"], abs=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["foundation"]


def test_a_lesson_that_is_finished_is_not_given_again(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    config = preset("tiny", [*SMALL, f"model.language.vocab_size={foundation.VOCABULARY}"])
    files = [scenes / "instances_train.json", scenes / "instances_test.json", scenes / "images"]
    straight = foundation.train_foundation(config, *files, tmp_path / "straight", 2, 8, 4)
    with monkeypatch.context() as patched:
        patched.setattr(reading, "teach_soft", stopped)
        with pytest.raises(KeyboardInterrupt):
            foundation.train_foundation(config, *files, tmp_path / "resumed", 2, 8, 4)
    assert not (tmp_path / "resumed").exists()
    with monkeypatch.context() as patched:
        patched.setattr(foundation.tower, "teach", stopped)
        patched.setattr(reading, "teach", stopped)
        resumed = foundation.train_foundation(config, *files, tmp_path / "resumed", 2, 8, 4)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_lesson_without_steps_is_refused(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(scenes)
    argv[argv.index("--tower-steps") + 1] = "0"
    assert main([*argv, "--output", str(tmp_path / "foundation")]) == 2
    assert "lessons of 0, 8 and 4 steps; each needs at least 1" in capsys.readouterr().err


def test_a_vocabulary_that_is_too_small_is_told(scenes: Path, tmp_path: Path) -> None:
    files = [scenes / "instances_train.json", scenes / "instances_test.json", scenes / "images"]
    with pytest.raises(ConfigError, match=r"add --set model\.language\.vocab_size=2048"):
        foundation.train_foundation(preset("tiny", SMALL), *files, tmp_path / "out", 2, 8)
