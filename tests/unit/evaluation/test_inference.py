"""Choosing an engine, sharing an image between its prompts, work on batches without Ray."""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from locvlm.cli.captioning import ENGINE_NAMES
from locvlm.config import EvaluationConfig, FamilyConfig
from locvlm.errors import CheckpointError, ConfigError, DataError
from locvlm.evaluation.asks import Ask, Engine
from locvlm.evaluation.inference import ENGINES, choose_engine, model_folder, open_engine, run_batches
from locvlm.geometry import make_geometry
from locvlm.model import LoadedModel
from locvlm.pixels import open_images, to_pixels
from locvlm.presets import preset
from locvlm.prompts import render_prompt
from tests.llava import make_folder, make_tower
from tests.tiny import World, build_world

PROMPTS = ("Is there apple in image?", "Which side of apple is bee located?", "Describe the image.", "What?")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def asks(world: World) -> list[Ask]:
    """Four prompts about each of three images, the images taking turns."""
    images = open_images(world.images / "test")
    names = list(images.names())[:3]
    return [Ask(f"{k}-{i}", images, name, prompt) for k, prompt in enumerate(PROMPTS) for i, name in enumerate(names)]


@pytest.fixture
def other(tmp_path: Path) -> Callable[[str], Path]:
    """A folder that says it is a model of some type."""

    def make(model_type: str) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return tmp_path

    return make


def decoding(**values: Any) -> EvaluationConfig:
    return EvaluationConfig(**{"temperature": 0.0, "max_new_tokens": 8, **values})


def count_pictures(model: Any, run: Callable[[], Any]) -> tuple[Any, int, int]:
    """What `run` gives, the images that went through the vision tower, and the tokens that the decoder read."""
    counts = {"images": 0, "tokens": 0}

    def seen(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts["images"] += len(args[0] if args else kwargs["pixel_values"])

    def read(_module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows, length = kwargs["inputs_embeds"].shape[:2]
        counts["tokens"] += rows * length

    hooks = [
        model.model.vision_tower.register_forward_pre_hook(seen, with_kwargs=True),
        model.model.language_model.register_forward_pre_hook(read, with_kwargs=True),
    ]
    try:
        return run(), counts["images"], counts["tokens"]
    finally:
        for hook in hooks:
            hook.remove()


def one_by_one(loaded: LoadedModel, asks: Sequence[Ask], n_tokens: int) -> list[str]:
    """Transformers' own way: every prompt alone with its own image."""
    texts = []
    for ask in asks:
        ids = loaded.encoder.encode([render_prompt(ask.prompt, loaded.config.prompts.system)])[0].ids
        pixels = torch.from_numpy(to_pixels(make_geometry(loaded.config.geometry).apply(ask.open())))[None]
        config = GenerationConfig(
            max_new_tokens=n_tokens,
            do_sample=False,
            suppress_tokens=[loaded.encoder.image_id],
            eos_token_id=loaded.encoder.stop_id,
            pad_token_id=loaded.encoder.pad_id,
        )
        with torch.inference_mode():
            output = loaded.model.generate(torch.tensor([ids]), pixel_values=pixels, generation_config=config)
        texts.append(loaded.encoder.decode(output[0, len(ids) :].tolist()))
    return texts


def test_an_image_is_encoded_once_for_all_its_prompts_and_the_tokens_are_the_same(
    world: World, asks: list[Ask]
) -> None:
    engine = open_engine(world.foundation)
    assert isinstance(engine, LoadedModel)
    alone, n_alone, tokens_alone = count_pictures(engine.model, lambda: one_by_one(engine, asks, 8))
    shared, n_shared, tokens_shared = count_pictures(
        engine.model, lambda: engine.answers(asks, decoding(batch_size=12))
    )
    assert shared == alone
    assert len(set(alone)) > 3
    assert (n_alone, n_shared) == (12, 3)
    assert tokens_alone - tokens_shared > 0.6 * 9 * world.config.model.vision.n_tokens  # nine prefixes, less padding


def test_prompts_of_an_image_stay_together_when_the_batch_is_smaller(world: World, asks: list[Ask]) -> None:
    engine = open_engine(world.foundation)
    assert isinstance(engine, LoadedModel)
    texts, n_images, _ = count_pictures(engine.model, lambda: engine.answers(asks, decoding(batch_size=4)))
    assert n_images == 3
    assert texts == one_by_one(engine, asks, 8)
    assert texts[::-1] == engine.answers(asks[::-1], decoding(batch_size=5))


def test_auto_takes_our_engine_for_our_checkpoints(world: World) -> None:
    assert choose_engine(world.foundation) == "locvlm"
    engine = open_engine(world.foundation)
    assert engine.config == world.config


def test_auto_takes_transformers_for_others_where_vllm_or_a_gpu_is_missing(other: Callable[[str], Path]) -> None:
    expected = "vllm" if find_spec("vllm") is not None and torch.cuda.is_available() else "transformers"
    assert choose_engine(other("llava")) == expected
    assert choose_engine(other("llava"), "vllm") == "vllm"


def test_auto_takes_our_classes_for_llavas_own_layout(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "shikra", make_tower(tmp_path / "tower"), model_type="shikra")
    assert choose_engine(folder) == "llava"
    with pytest.raises(ConfigError, match="it is a model in LLaVA's own layout; use --engine auto"):
        choose_engine(folder, "vllm")
    family = model_folder(folder).describe()
    assert isinstance(family, FamilyConfig)
    assert family.family == "shikra"
    config = preset("locvlm-b", ["coordinates.representation=nfp"])
    other = model_folder(folder, places=config).describe()
    assert other.coordinates == config.coordinates
    assert isinstance(other, FamilyConfig)
    assert (other.loc_pred, other.rev_loc, other.geometry) == ("", "", family.geometry)


def test_a_folder_of_an_unknown_kind_is_told_with_what_is_known(other: Callable[[str], Path]) -> None:
    with pytest.raises(
        CheckpointError, match=r"says 'mamba'.*LocVLM checkpoint; LLaVA, Shikra.*kosmos-2.*openai:NAME with --url"
    ):
        choose_engine(other("mamba"))


def test_our_checkpoints_say_how_they_are_asked(world: World, tmp_path: Path) -> None:
    folder = model_folder(world.foundation)
    assert folder.describe() == world.config
    assert folder.receipt() is None
    assert folder.identity()["engine"] == "locvlm"
    with pytest.raises(ConfigError, match="drop --config"):
        model_folder(world.foundation, places=world.config).describe()
    (tmp_path / "config.json").write_text('{"model_type": "locvlm"}')
    with pytest.raises(CheckpointError, match=r"locvlm\.yaml: there is no such file"):
        model_folder(tmp_path).describe()


def test_an_engine_that_cannot_run_the_folder_is_refused(world: World, other: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"is a LocVLM checkpoint.*locvlm export"):
        choose_engine(world.foundation, "vllm")
    with pytest.raises(ConfigError, match="no LocVLM checkpoint"):
        choose_engine(other("llava"), "locvlm")
    with pytest.raises(ConfigError, match="'onnx' is not one of auto"):
        choose_engine(world.foundation, "onnx")


def test_a_folder_that_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        choose_engine(tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        open_engine(tmp_path)


def test_the_command_line_offers_every_engine() -> None:
    assert ENGINE_NAMES == ENGINES


class Echo:
    """Answers with the prompt."""

    config = FamilyConfig(family="echo")

    def answers(self, asks: Sequence[Ask], decoding: EvaluationConfig) -> list[str]:
        return [ask.prompt for ask in asks]


def double(_engine: Engine, batch: Sequence[int]) -> int:
    if 13 in batch:
        raise DataError("thirteen")
    return 2 * sum(batch)


def test_batches_are_worked_through_in_order_by_one_model() -> None:
    opened = []

    def open_model() -> Engine:
        opened.append(1)
        return Echo()

    assert list(run_batches(open_model, double, [[1, 2], [3], []], 0)) == [(0, 6), (1, 6), (2, 0)]
    assert len(opened) == 1
    assert list(run_batches(open_model, double, [], 1)) == []
    assert len(opened) == 1  # no model for nothing


def test_what_was_done_before_a_failure_has_been_handed_over() -> None:
    results = run_batches(Echo, double, [[1], [13]], 1)
    assert next(results) == (0, 2)
    with pytest.raises(DataError, match="thirteen"):
        next(results)
