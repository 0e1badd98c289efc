"""New models out of other people's folders: CLIP + Llama, and LLaVA in both layouts, with random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from locvlm.config import ExperimentConfig
from locvlm.errors import CheckpointError
from locvlm.model import load
from locvlm.model.checkpoint import save, start
from locvlm.presets import preset
from locvlm.prompts import render_chat

VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    projection_dim=16,
)


def text_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped queries must come through as they are
        max_position_embeddings=256,
        rope_theta=500_000.0,
    )


def config(vision: Path | str, language: Path | str, adapter: str = "linear", *more: str) -> ExperimentConfig:
    sizes = {
        "geometry.side": 28,
        "coordinates.n_bins": 28,
        "model.adapter": adapter,
        "model.vision.source": vision,
        "model.vision.image_side": 28,
        "model.vision.hidden_size": 32,
        "model.vision.n_layers": 3,
        "model.vision.n_heads": 2,
        "model.vision.ffn_size": 64,
        "model.language.source": language,
        "model.language.hidden_size": 48,
        "model.language.n_layers": 2,
        "model.language.n_heads": 4,
        "model.language.ffn_size": 64,
        "model.language.max_length": 256,
    }
    return preset("locvlm-b", [f"{key}={value}" for key, value in sizes.items()] + list(more))


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """LLaMA's way: byte fallback, the dummy space in front, <unk>/<s>/</s>, no pad token."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -50.0) for byte in range(256)]
    pieces += [(c, -10.0) for c in ["\u2581", "\n", *map(chr, range(33, 127))]]
    pieces += [("\u2581" + word, -8.0) for word in ("It", "is", "located", "at", "USER", "ASSISTANT", "There")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = llama_tokenizer()
    text = text_config(len(tokenizer))
    clip = CLIPModel(
        CLIPConfig(
            vision_config=VISION.to_dict(),
            text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
            projection_dim=16,
        )
    )
    clip.save_pretrained(root / "clip")
    CLIPVisionModel(VISION).save_pretrained(root / "tower")
    LlamaForCausalLM(text).save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    # llava-hf: <image> and <pad> added, rows padded beyond the tokenizer
    with_image = llama_tokenizer()
    with_image.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    wide = text_config(len(with_image) + 7)
    hf = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=VISION,
            text_config=wide,
            image_token_index=with_image.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
        )
    )
    hf.save_pretrained(root / "llava-hf")
    with_image.save_pretrained(root / "llava-hf")
    original_llava(root / "llava-v1.5", hf, text, "mlp2x_gelu")
    original_llava(root / "llava-v1", hf, text, "linear")
    return root


def original_llava(folder: Path, hf: LlavaForConditionalGeneration, text: LlamaConfig, projector: str) -> None:
    """LLaVA's own layout: Llama names, `mm_projector`, no vision tower."""
    folder.mkdir()
    rows = text.vocab_size
    weights = {}
    for name, value in hf.state_dict().items():
        if name.startswith("model.language_model."):
            name = "model." + name.removeprefix("model.language_model.")
        elif name.startswith("model.multi_modal_projector.linear_"):
            if projector == "linear":
                if "linear_2" in name:
                    continue
                name = name.replace("multi_modal_projector.linear_1", "mm_projector")
            else:
                name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
                name = name.replace("multi_modal_projector.linear_2", "mm_projector.2")
        elif name.startswith("model.vision_tower"):
            continue
        if "embed_tokens" in name or "lm_head" in name:
            value = value[:rows]
        weights[name] = value.clone().to(torch.float16)
    half = dict(list(weights.items())[: len(weights) // 2])
    rest = {name: value for name, value in weights.items() if name not in half}
    torch.save(half, folder / "pytorch_model-00001-of-00002.bin")
    torch.save(rest, folder / "pytorch_model-00002-of-00002.bin")
    index = {name: f"pytorch_model-0000{1 if name in half else 2}-of-00002.bin" for name in weights}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    values = text.to_dict() | {
        "model_type": "llava",
        "mm_vision_tower": "nobody/has-this-tower",
        "mm_hidden_size": 32,
        "mm_projector_type": projector,
    }
    (folder / "config.json").write_text(json.dumps(values))
    llama_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("tower", ["clip", "tower"])
def test_clip_and_llama_folders_make_a_new_model_with_their_weights(folders: Path, tower: str) -> None:
    loaded = start(config(folders / tower, folders / "llama"), None)
    theirs = LlamaForCausalLM.from_pretrained(folders / "llama").eval()
    ids = torch.tensor([[1, 20, 300, 7]])
    hidden = loaded.model.model.language_model(ids).last_hidden_state
    rows = theirs.config.vocab_size
    assert torch.equal(loaded.model.lm_head(hidden)[..., :rows], theirs(ids).logits)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    vision = CLIPVisionModel.from_pretrained(folders / tower).eval()
    ours = loaded.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(ours, vision(pixels, output_hidden_states=True).hidden_states[-2])
    assert loaded.model.config.text_config.num_key_value_heads == 2


def test_the_tokenizer_gets_an_image_token_and_the_unk_token_as_pad(folders: Path) -> None:
    loaded = start(config(folders / "clip", folders / "llama"), None)
    encoder, tokenizer = loaded.encoder, loaded.encoder.tokenizer
    assert encoder.image_id == len(tokenizer) - 1 == len(loaded.model.lm_head.weight) - 1
    assert encoder.pad_id == tokenizer.unk_token_id != encoder.stop_id
    table = loaded.model.lm_head.weight
    assert torch.allclose(table[-1], table[:-1].mean(dim=0), atol=1e-6)
    text, spans = render_chat([("Where?", "It is located at (1,2,3,4)"), ("And?", "There")], "System.")
    encoded = encoder.encode([text], [spans])[0]
    assert encoded.ids.count(encoder.image_id) == 4
    answers = tokenizer.decode([i for i, target in zip(encoded.ids, encoded.supervised, strict=True) if target])
    assert answers.replace(" ", "") == "Itislocatedat(1,2,3,4)</s>There</s>"


def test_a_fresh_adapter_depends_on_the_seed_alone(folders: Path) -> None:
    first, again, other = (
        start(config(folders / "clip", folders / "llama", "linear", f"seed={seed}"), None).model.adapter.linear.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_checkpoint_made_of_parts_comes_back_whole(folders: Path, tmp_path: Path) -> None:
    loaded = start(config(folders / "clip", folders / "llama"), None)
    save(loaded, tmp_path / "checkpoint")
    back = load(tmp_path / "checkpoint")
    ours, theirs = loaded.model.state_dict(), back.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert start(loaded.config, tmp_path / "checkpoint").encoder.image_id == loaded.encoder.image_id


def test_a_llava_hf_checkpoint_is_continued_with_equal_logits(folders: Path) -> None:
    loaded = start(config("", "", "mlp"), folders / "llava-hf")
    theirs = LlavaForConditionalGeneration.from_pretrained(folders / "llava-hf").eval()
    ids = torch.tensor([[1, 30, *[loaded.encoder.image_id] * 4, 40, 41]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        loaded.model(input_ids=ids, pixel_values=pixels).logits, theirs(input_ids=ids, pixel_values=pixels).logits
    )


@pytest.mark.parametrize(("name", "adapter"), [("llava-v1.5", "mlp"), ("llava-v1", "linear")])
def test_the_original_llava_layout_is_read_with_the_tower_of_the_config(folders: Path, name: str, adapter: str) -> None:
    loaded = start(config(folders / "clip", "", adapter), folders / name)
    stored = torch.load(folders / name / "pytorch_model-00001-of-00002.bin")
    stored |= torch.load(folders / name / "pytorch_model-00002-of-00002.bin")
    first = loaded.model.adapter.linear if adapter == "linear" else loaded.model.adapter.linear_1
    prefix = "model.mm_projector" if adapter == "linear" else "model.mm_projector.0"
    assert torch.equal(first.weight, stored[f"{prefix}.weight"].float())
    layer = loaded.model.model.language_model.layers[1].mlp.up_proj.weight
    assert torch.equal(layer, stored["model.layers.1.mlp.up_proj.weight"].float())
    tower = load_file(folders / "clip" / "model.safetensors")
    ours = loaded.model.model.vision_tower.state_dict()["pre_layrnorm.weight"]
    assert torch.equal(ours, tower["vision_model.pre_layrnorm.weight"])


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})


def pad_is_eos(folder: Path) -> None:
    tokenizer = llama_tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(folder)


def another_type(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "may be cut short"),
        (drop_a_weight, "missing ['model.language_model.layers.0.mlp.up_proj.weight'] (1)"),
        (pad_is_eos, "pad token is its stop token"),
        (lambda f: (f / "tokenizer.json").unlink(), "neither tokenizer.json nor tokenizer.model"),
        (lambda f: (f / "model.safetensors").unlink(), "there are no weights"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (another_type, "needed is llama"),
    ],
)
def test_a_damaged_folder_gives_one_message(
    folders: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    for file in (folders / "llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        start(config(folders / "clip", folder), None)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava-v1.5", {"mm_use_im_start_end": True}, "trained with marks around the image"),
        ("llava-v1.5", {"mm_vision_select_layer": -1}, "set model.vision.feature_layer=-1"),
        ("llava-v1.5", {"mm_vision_select_feature": "cls_patch"}, "it keeps the class token ('cls_patch')"),
        ("llava-hf", {"vision_feature_layer": -1}, "set model.vision.feature_layer=-1"),
        ("llava-hf", {"vision_feature_select_strategy": "full"}, "it keeps the class token ('full')"),
        ("llava-hf", {"projector_hidden_act": "relu"}, "between the layers of its projector is 'relu'"),
    ],
)
def test_a_llava_that_reads_images_otherwise_is_no_parent(
    folders: Path, tmp_path: Path, name: str, changes: dict[str, object], message: str
) -> None:
    parent = shutil.copytree(folders / name, tmp_path / name)
    path = parent / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError) as error:
        start(config(folders / "clip" if name == "llava-v1.5" else "", "", "mlp"), parent)
    assert message in str(error.value)


def test_another_shape_names_every_difference(folders: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        start(config(folders / "clip", folders / "llama", "linear", "model.language.n_layers=4"), None)
    assert "model.language.n_layers is 4, there 2" in str(error.value)
    with pytest.raises(CheckpointError, match=r"model\.adapter is linear, there mlp"):
        start(config("", "", "linear"), folders / "llava-hf")


def test_a_source_that_is_nowhere_says_where_it_was_looked_for() -> None:
    with pytest.raises(CheckpointError, match=r"model\.vision\.source 'nobody/nothing'"):
        start(config("nobody/nothing", "x"), None)
    with pytest.raises(CheckpointError, match=r"model\.vision\.source is empty"):
        start(config("", ""), None)
