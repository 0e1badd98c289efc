"""Configuration: presets with the paper's numbers, overrides, every fault at once."""

from pathlib import Path

import pytest

from locvlm.cli import main
from locvlm.config import dump_config, load_config, resolve
from locvlm.errors import ConfigError
from locvlm.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_yaml(name: str, tmp_path: Path) -> None:
    config = preset(name)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert load_config(tmp_path / "c.yaml").fingerprint() == config.fingerprint()


@pytest.mark.parametrize(
    ("name", "side", "bins", "adapter", "frames"),
    [
        ("locvlm-b", 224, 224, "linear", None),
        ("locvlm-l", 336, 336, "mlp", None),
        ("locvlm-vid-b", 224, 224, "linear", 100),
        ("locvlm-vid-b-plus", 224, 224, "linear", 8),
    ],
)
def test_presets_hold_the_papers_numbers(name: str, side: int, bins: int, adapter: str, frames: int | None) -> None:
    config = preset(name)
    assert (config.geometry.side, config.coordinates.n_bins, config.model.adapter) == (side, bins, adapter)
    assert config.model.vision.n_tokens == (side // 14) ** 2
    stage = config.stages.instruct
    assert (stage.learning_rate, stage.global_batch, stage.epochs, stage.warmup_ratio) == (2e-5, 64, 10, 0.3)
    assert (config.video.n_frames if config.video else None) == frames
    if config.stages.video:
        assert config.stages.video.trainable == (
            ("adapter", "language") if name == "locvlm-vid-b-plus" else ("adapter",)
        )


def test_overrides_are_typed_and_change_the_fingerprint() -> None:
    config = preset("locvlm-b", ["coordinates.n_bins=112", "stages.instruct.learning_rate=1e-5", "prompts.system=''"])
    assert (config.coordinates.n_bins, config.stages.instruct.learning_rate, config.prompts.system) == (112, 1e-5, "")
    assert config.fingerprint() != preset("locvlm-b").fingerprint()


def test_every_fault_is_reported_with_the_way_out() -> None:
    faulty = [
        "coordinates.n_bin=5",
        "stages.align.epochs=-1",
        "seed=many",
        "model.vision.image_side.x=1",
        "nonsense",
    ]
    with pytest.raises(ConfigError) as caught:
        preset("locvlm-b", faulty)
    message = str(caught.value)
    assert "coordinates.n_bin: there is no such setting; did you mean n_bins?" in message
    assert "stages.align.epochs: input should be greater than 0, found -1" in message
    assert "seed: " in message
    assert "model.vision.image_side is a value, not a section" in message
    assert "--set 'nonsense': the form is key.subkey=value" in message
    assert "5 fault(s)" in message


def test_values_that_do_not_agree_are_found_behind_a_misspelt_key() -> None:
    with pytest.raises(ConfigError) as caught:
        preset("locvlm-b", ["coordinates.n_bin=5", "geometry.side=48"])
    assert "did you mean n_bins?" in str(caught.value)
    assert "geometry.side 48 differs from model.vision.image_side 224" in str(caught.value)


def test_a_stage_needs_exactly_one_length() -> None:
    with pytest.raises(ConfigError, match=r"stages\.instruct: set one of epochs \(10\.0\) and steps \(5\)"):
        preset("locvlm-b", ["stages.instruct.steps=5"])


def test_diga_bins_must_be_whole_anchors() -> None:
    with pytest.raises(ConfigError, match="n_bins 225 is not a multiple of patch 14"):
        preset("locvlm-b", ["coordinates.representation=diga", "coordinates.n_bins=225"])


def test_the_command_prints_yaml_or_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--preset", "tiny", "--set", "seed=4"]) == 0
    import yaml

    assert resolve(yaml.safe_load(capsys.readouterr().out)).seed == 4
    assert main(["config", "--preset", "tinny"]) == 2
    error = capsys.readouterr().err
    assert "must be one of tiny, locvlm-b" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("text", ["[1, 2", "- 1", ""])
def test_a_broken_file_gives_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"reading the configuration .*c\.yaml"):
        load_config(tmp_path / "c.yaml")
