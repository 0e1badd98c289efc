"""Which tensors move in each stage of each of the paper's variants, at a tiny size, by taking real steps."""

import pytest
import torch

from locvlm.config import LoraConfig, StageConfig
from locvlm.coordinates import make_location_format
from locvlm.data.collate import collate
from locvlm.data.conversations import open_conversations
from locvlm.data.dataset import TrainingData
from locvlm.data.instruct import Renderer
from locvlm.geometry import make_geometry
from locvlm.model.checkpoint import LoadedModel, start
from locvlm.model.stages import set_trainable
from locvlm.pixels import open_images
from locvlm.presets import preset
from locvlm.training.engine import TorchEngine
from tests.tiny import World, build_world

CPU = torch.device("cpu")
N_LAYERS = 2
ADAPTER = {"linear": ("linear",), "mlp": ("linear_1", "linear_2")}
LINEAR_LAYERS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
# preset, stage, the parts of the model that the paper trains in it
STAGES = [
    ("locvlm-b", "align", ("adapter",)),
    ("locvlm-b", "instruct", ("adapter", "language")),
    ("locvlm-l", "align", ("adapter",)),
    ("locvlm-l", "instruct", ("adapter", "language")),
    ("locvlm-vid-b", "video", ("adapter",)),
    ("locvlm-vid-b-plus", "video", ("adapter", "language")),
]


def adapter_tensors(kind: str) -> set[str]:
    return {f"model.multi_modal_projector.{name}.{part}" for name in ADAPTER[kind] for part in ("weight", "bias")}


def language_tensors() -> set[str]:
    norms = ("input_layernorm", "post_attention_layernorm")
    layers = {
        f"model.language_model.layers.{layer}.{name}.weight"
        for layer in range(N_LAYERS)
        for name in (*LINEAR_LAYERS, *norms)
    }
    return layers | {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "lm_head.weight"}


def lora_tensors() -> set[str]:
    return {
        f"model.language_model.layers.{layer}.{name}.lora_{factor}.default.weight"
        for layer in range(N_LAYERS)
        for name in LINEAR_LAYERS
        for factor in "AB"
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """One with each kind of adapter."""
    return {kind: build_world(tmp_path_factory.mktemp(kind), f"model.adapter={kind}") for kind in ADAPTER}


def moved(world: World, settings: StageConfig, lora: LoraConfig | None = None) -> tuple[LoadedModel, set[str]]:
    """The model after three steps of the stage, and the names of the tensors that are not what they were."""
    loaded = start(world.config, None)
    set_trainable(loaded.model, settings.trainable, lora)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    geometry = make_geometry(world.config.geometry)
    data = TrainingData(
        settings.model_copy(update={"mixture": (), "precision": "fp32"}),
        {"generic": open_conversations(world.data["generic"])},
        open_images(world.images),
        Renderer(make_location_format(world.config.coordinates, geometry), world.config.prompts, 0),
        loaded.encoder,
        geometry,
        world.config.model.language.max_length,
        0,
    )
    engine = TorchEngine(loaded.model, data.stage, CPU)
    for step in range(3):
        batch = collate([data.sample(2 * step), data.sample(2 * step + 1)], loaded.encoder.pad_id)
        engine.accumulate(batch, 1 / batch.n_targets, last=True)
        engine.update(1e-2)
    after = loaded.model.state_dict()
    return loaded, {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(("name", "stage", "trained"), STAGES)
def test_a_stage_moves_exactly_its_own_tensors(
    worlds: dict[str, World], name: str, stage: str, trained: tuple[str, ...]
) -> None:
    config = preset(name)
    kind = config.model.adapter
    assert kind == ("mlp" if name == "locvlm-l" else "linear")
    loaded, names = moved(worlds[kind], getattr(config.stages, stage))
    expected = adapter_tensors(kind) | (language_tensors() if "language" in trained else set())
    assert names == expected
    assert {n for n, p in loaded.model.named_parameters() if p.requires_grad} == expected
    assert not loaded.model.model.vision_tower.training


@pytest.mark.parametrize("kind", ADAPTER)
def test_with_lora_only_the_updates_and_the_adapter_move(worlds: dict[str, World], kind: str) -> None:
    settings = preset("locvlm-b").stages.instruct
    loaded, names = moved(worlds[kind], settings, LoraConfig(rank=2, dropout=0))
    assert names == adapter_tensors(kind) | lora_tensors()
    assert {n for n, p in loaded.model.named_parameters() if p.requires_grad} == names


def test_a_stage_of_the_adapter_alone_gets_no_lora(worlds: dict[str, World]) -> None:
    _, names = moved(worlds["linear"], preset("locvlm-b").stages.align, LoraConfig(rank=2))
    assert names == adapter_tensors("linear")


def test_lora_goes_into_the_layers_that_are_named(worlds: dict[str, World]) -> None:
    loaded = start(worlds["linear"].config, None)
    set_trainable(loaded.model, ("language",), LoraConfig(rank=2, targets=("q_proj", "v_proj")))
    names = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert names == {n for n in lora_tensors() if "q_proj" in n or "v_proj" in n}


def test_the_adapter_may_learn_at_its_own_rate(worlds: dict[str, World]) -> None:
    """AdamW's first step moves every weight by about the learning rate."""
    settings = preset("locvlm-b", ["stages.instruct.adapter_learning_rate=2e-6"]).stages.instruct
    loaded = start(worlds["mlp"].config, None)
    set_trainable(loaded.model, ("adapter", "language"))
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    engine = TorchEngine(loaded.model, settings, CPU)
    for parameter in loaded.model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    engine.update(settings.learning_rate)
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            rate = 2e-6 if name.startswith("model.multi_modal_projector") else 2e-5
            assert float((parameter.detach() - before[name]).abs().max()) == pytest.approx(rate, rel=0.05)
