"""An exported checkpoint is a stock Llava with the same answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from locvlm.cli import main
from locvlm.errors import CheckpointError
from locvlm.geometry import make_geometry
from locvlm.model import LoadedModel, load
from locvlm.model.checkpoint import TINY_FOUNDATION, fresh, save
from locvlm.model.export import export
from locvlm.pixels import to_pixels
from locvlm.presets import preset
from locvlm.prompts import render_chat, render_prompt


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 91, 3), dtype=np.uint8))


def checkpoint(*overrides: str) -> LoadedModel:
    config = preset("tiny", overrides)
    foundation = load(TINY_FOUNDATION)
    return LoadedModel(fresh(config, foundation.encoder, 3), foundation.encoder, config)


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
@pytest.mark.parametrize("kind", ["squash", "crop"])
def test_stock_transformers_gives_equal_logits_from_the_picture_and_the_words(
    tmp_path: Path, picture: Image.Image, adapter: str, kind: str
) -> None:
    ours = checkpoint(f"model.adapter={adapter}", f"geometry.kind={kind}")
    export(ours, tmp_path / "stock")
    stock, notes = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    prompt = render_prompt("Where is the red circle?", ours.config.prompts.system)
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    ids = torch.tensor([ours.encoder.encode([prompt])[0].ids])
    pixels = torch.from_numpy(to_pixels(make_geometry(ours.config.geometry).apply(picture)))[None]
    assert torch.equal(inputs["input_ids"], ids)
    assert torch.equal(inputs["pixel_values"], pixels)
    with torch.inference_mode():
        assert torch.equal(stock.eval()(**inputs).logits, ours.model(input_ids=ids, pixel_values=pixels).logits)


@pytest.mark.parametrize("system", ["", 'A "quoted" system text, and it\'s long.'])
def test_the_chat_template_renders_what_training_rendered(tmp_path: Path, system: str) -> None:
    ours = checkpoint()
    config = ours.config.model_copy(update={"prompts": ours.config.prompts.model_copy(update={"system": system})})
    export(LoadedModel(ours.model, ours.encoder, config), tmp_path / "stock")
    processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    turns = [("Where is it?", "It is there"), ("And now?", "No")]
    messages = []
    for number, (question, answer) in enumerate(turns):
        image = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    assert processor.apply_chat_template(messages) == render_chat(turns, system)[0]
    asked = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert asked == render_prompt(turns[0][0], system)


def test_the_verb_writes_a_folder_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(checkpoint(), tmp_path / "model")
    command = ["export", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "stock")]
    assert main(command) == 0
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock").dtype == torch.bfloat16
    assert main(command) == 2
    assert "it exists" in capsys.readouterr().err


def test_letterbox_is_refused_because_no_stock_processor_has_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="letterbox"):
        export(checkpoint("geometry.kind=letterbox"), tmp_path / "stock")
    assert not any(tmp_path.iterdir())
