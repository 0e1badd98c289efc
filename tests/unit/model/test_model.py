"""The model's classes, what each stage trains, checkpoints, generation."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil

from locvlm.config import EvaluationConfig, GeometryConfig
from locvlm.errors import CheckpointError
from locvlm.geometry import make_geometry
from locvlm.model import load
from locvlm.model.checkpoint import image_processor, save, start
from locvlm.model.generate import SampleNoise
from locvlm.model.stages import parts, set_trainable
from locvlm.model.variants import LocVLM, architecture, count_parameters
from locvlm.pixels import open_image, to_pixels
from locvlm.presets import preset
from tests.tiny import World, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("name", "adapter", "tokens"), [("locvlm-b", 4_198_400, 256), ("locvlm-l", 20_979_712, 576)])
def test_the_papers_variants_have_the_papers_parameter_counts(name: str, adapter: int, tokens: int) -> None:
    config = preset(name)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.device("meta"):
        model = LocVLM(architecture(config.model, image_token_id=31_999, special_ids=ids))
    assert count_parameters(model.adapter) == adapter
    assert config.model.vision.n_tokens == tokens
    language = sum(count_parameters(part) for part in parts(model)["language"])
    assert language == 6_738_415_616  # LLaMA-7B


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_a_checkpoint_comes_back_bit_by_bit(adapter: str, tmp_path: Path) -> None:
    world = build_world(tmp_path, f"model.adapter={adapter}")
    first = load(world.foundation)
    save(first, tmp_path / "again")
    second = load(tmp_path / "again")
    before, after = first.model.state_dict(), second.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert len([name for name in saved if "multi_modal_projector" in name]) == (2 if adapter == "linear" else 4)
    again = AutoModelForImageTextToText.from_pretrained(world.foundation, dtype=torch.float32)
    assert type(again) is LocVLM
    assert second.config == world.config


def test_the_features_are_the_last_block_but_one_without_the_class_token(world: World) -> None:
    loaded = load(world.foundation)
    pixels = torch.rand(2, 3, 48, 48)
    tower = loaded.model.model.vision_tower(pixels, output_hidden_states=True)
    expected = loaded.model.adapter(tower.hidden_states[-2][:, 1:])
    got = loaded.model.get_image_features(pixels).pooler_output
    assert torch.equal(torch.stack(list(got)), expected)
    assert expected.shape == (2, 36, 32)


@pytest.mark.parametrize("trainable", [("adapter",), ("adapter", "language")])
def test_a_stage_moves_its_own_tensors_and_no_other(world: World, trainable: tuple[str, ...]) -> None:
    loaded = start(world.config, None)
    set_trainable(loaded.model, trainable)
    names = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    inside = tuple({"adapter": "model.multi_modal_projector", "language": "model.language_model"}[t] for t in trainable)
    if "language" in trainable:
        inside = (*inside, "lm_head")
    assert names == {name for name, _ in loaded.model.named_parameters() if name.startswith(inside)}
    assert not any(name.startswith("model.vision_tower") for name in names)


def test_stage_1_starts_behind_a_fresh_adapter_on_the_foundations_parts(world: World) -> None:
    foundation, begun = load(world.foundation).model.state_dict(), start(world.config, None).model.state_dict()
    other = start(world.config.model_copy(update={"seed": 1}), None).model.state_dict()
    for name, value in begun.items():
        if "multi_modal_projector" in name and name.endswith("weight"):
            assert not torch.equal(value, other[name])
        elif "multi_modal_projector" not in name:
            assert torch.equal(value, foundation[name])


def test_a_broken_folder_gives_one_clear_message(world: World, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in world.foundation.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cut short"):
        load(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        load(copy)


def test_continuing_with_another_shape_is_refused_with_both_values(world: World) -> None:
    other = world.config.model_copy(update={"geometry": GeometryConfig(kind="letterbox", side=48)})
    with pytest.raises(CheckpointError, match="squash"):
        start(other, world.foundation)


def _requests(world: World, n: int) -> list[SimpleNamespace]:
    images = sorted((world.images / "test").iterdir())
    prompts = ["Is there apple in image?", "What is at location (1,2,3,4) in image?", "Which side?"]
    requests = []
    for i in range(n):
        image = images[i % len(images)]
        opener = functools.partial(open_image, image)
        requests.append(SimpleNamespace(id=str(i), image=image, prompt=prompts[i % 3], open=opener))
    return requests


def test_answers_do_not_depend_on_the_batch(world: World) -> None:
    loaded = load(world.foundation)
    requests = _requests(world, 7)
    for temperature in (0.0, 0.7):
        alone = EvaluationConfig(temperature=temperature, max_new_tokens=6, batch_size=1, seed=3)
        together = alone.model_copy(update={"batch_size": 4})
        assert loaded.answers(requests, alone) == loaded.answers(requests, together)


def test_sampling_is_seeded_for_each_sample(world: World) -> None:
    loaded = load(world.foundation)
    requests = _requests(world, 3)
    decoding = EvaluationConfig(temperature=1.0, max_new_tokens=8, seed=0)
    first = loaded.answers(requests, decoding)
    assert first == loaded.answers(list(reversed(requests)), decoding)[::-1]
    assert first != loaded.answers(requests, decoding.model_copy(update={"seed": 1}))


def test_gumbel_noise_samples_the_softmax() -> None:
    ids = [str(i) for i in range(4000)]
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1])).repeat(len(ids), 1) * 0.5
    draws = SampleNoise(0.5, 0, ids)(torch.empty(0), logits).argmax(-1)
    shares = torch.bincount(draws, minlength=3) / len(ids)
    assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)


@pytest.mark.parametrize("kind", ["squash", "crop"])
def test_transformers_processor_sees_the_same_pixels(kind: str) -> None:
    image = Image.linear_gradient("L").resize((131, 97)).convert("RGB")
    config = GeometryConfig.model_validate({"kind": kind, "side": 48})
    ours = to_pixels(make_geometry(config).apply(image))
    processor = image_processor(config)
    assert isinstance(processor, CLIPImageProcessorPil)
    theirs = processor(image, return_tensors="np")["pixel_values"][0]
    assert abs(ours - theirs).max() < (1e-5 if kind == "squash" else 0.1)
