"""LoRA: a start that changes nothing, peft's own format on disk, merged again when a folder is opened."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from locvlm.cli import main
from locvlm.config import LoraConfig
from locvlm.errors import CheckpointError, ConfigError
from locvlm.model import LoadedModel, load
from locvlm.model.checkpoint import save, start
from locvlm.model.lora import add_lora, check_lora, is_lora, write_lora
from locvlm.model.stages import set_trainable
from locvlm.model.variants import LocVLM
from locvlm.presets import preset

LORA = LoraConfig(rank=4, alpha=8, dropout=0.1)


def begun() -> LoadedModel:
    return start(preset("tiny"), None)


def logits(model: torch.nn.Module, loaded: LoadedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, *[loaded.encoder.image_id] * 36, *range(20, 40)]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.randn(1, 3, 48, 48, generator=generator)).logits


def trained() -> LoadedModel:
    """Updates that change something."""
    loaded = begun()
    set_trainable(loaded.model, ("adapter", "language"), LORA)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    loaded.model.eval()
    return loaded


def write(loaded: LoadedModel, folder: Path) -> None:
    """As a stage writes its output: the base, and the updates beside it."""
    updates = {name: p.detach() for name, p in loaded.model.named_parameters() if is_lora(name)}
    save(begun(), folder, complete=lambda inner: write_lora(inner / "lora", LORA, updates))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    loaded = trained()
    folder = tmp_path_factory.mktemp("lora") / "model"
    write(loaded, folder)
    return folder, logits(loaded.model, loaded)


def test_fresh_updates_change_nothing_and_leave_the_random_state(tmp_path: Path) -> None:
    loaded = begun()
    before, state = logits(loaded.model, loaded), torch.get_rng_state()
    add_lora(loaded.model, LORA, seed=0)
    loaded.model.eval()
    assert torch.equal(logits(loaded.model, loaded), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_start_hangs_on_the_seed_alone() -> None:
    first, again, other = (begun().model for _ in range(3))
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        add_lora(model, LORA, seed)
        torch.rand(1)
    a, b, c = ({n: p for n, p in model.named_parameters() if "lora_A" in n} for model in (first, again, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_the_vision_tower_has_no_updates_though_its_layers_have_the_same_names() -> None:
    loaded = begun()
    add_lora(loaded.model, LORA, 0)
    assert all(n.startswith("model.language_model.layers.") for n, _ in loaded.model.named_parameters() if is_lora(n))
    assert any("q_proj" in name for name, _ in loaded.model.model.vision_tower.named_parameters())


def test_a_folder_opens_with_its_updates_merged(written: tuple[Path, torch.Tensor]) -> None:
    folder, expected = written
    state = torch.get_rng_state()
    loaded = load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded.model) is LocVLM
    assert loaded.model.state_dict().keys() == begun().model.state_dict().keys()
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    # logits of this untrained model reach 10 and more
    assert float((logits(loaded.model, loaded) - expected).abs().max() / expected.abs().max()) < 1e-5
    base = begun()
    assert float((logits(base.model, base) - expected).abs().max()) > 0.5  # the updates do change it


def test_peft_alone_reads_the_folder(written: tuple[Path, torch.Tensor]) -> None:
    folder, expected = written
    loaded = begun()
    alone = PeftModel.from_pretrained(LocVLM.from_pretrained(folder), folder / "lora").eval()
    assert torch.equal(logits(alone, loaded), expected)
    values = json.loads((folder / "lora" / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"], values["lora_alpha"]) == ("LORA", 4, 8)


def test_export_merges(written: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = written
    command = ["export", "--model", str(folder), "--output", str(tmp_path / "stock"), "--dtype", "float32"]
    assert main(command) == 0
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock").eval()
    assert float((logits(stock, begun()) - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_merged_model_is_saved_without_updates(written: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    loaded = load(written[0])
    save(loaded, tmp_path / "merged")
    assert not (tmp_path / "merged" / "lora").exists()
    again = load(tmp_path / "merged")
    assert torch.equal(logits(again.model, again), logits(loaded.model, loaded))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget_a_layer(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "layers.0.self_attn.q_proj" not in name}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lora: cut(lora / "adapter_model.safetensors"), "cut short"),
        (lambda lora: cut(lora / "adapter_config.json"), "cut short"),
        (lambda lora: (lora / "adapter_model.safetensors").unlink(), "cut short"),
        (forget_a_layer, "do not fit the model: missing"),
    ],
)
def test_damaged_updates_are_told(
    written: tuple[Path, torch.Tensor], tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(written[0], tmp_path / "model")
    damage(tmp_path / "model" / "lora")
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path / "model")
    assert str(tmp_path / "model" / "lora") in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_4bit_base_without_bitsandbytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="bitsandbytes is not installed; install bitsandbytes, which runs on a GPU"):
        check_lora(LORA.model_copy(update={"base": "4bit"}))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_4bit_base_stays_close_and_trains_its_updates_alone() -> None:
    loaded = begun()
    before = logits(loaded.model, loaded)
    set_trainable(loaded.model, ("adapter", "language"), LORA.model_copy(update={"base": "4bit", "dropout": 0.0}))
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    layer = loaded.model.model.language_model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == torch.uint8
    after = logits(loaded.model, loaded)
    assert float((after - before).abs().mean() / before.abs().mean()) < 0.3
    trains = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert all(is_lora(name) or "multi_modal_projector" in name for name in trains)
