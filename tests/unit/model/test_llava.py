"""LLaVA v1 and v1.5, Shikra and Video-ChatGPT in LLaVA's own layout, asked as they were trained."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel, LlamaForCausalLM

from locvlm.config import SYSTEM, CoordinateConfig, EvaluationConfig, FamilyConfig, GeometryConfig
from locvlm.coordinates import make_location_format
from locvlm.errors import CheckpointError
from locvlm.geometry import ImageGeometry, make_geometry
from locvlm.model.llava import LlavaModel, llava_family, load_llava
from locvlm.model.pooling import pool_frames
from locvlm.model.sources import llava_shape
from locvlm.pixels import to_pixels
from locvlm.prompts import fill_turn, render_family
from tests.llava import TEXT_WIDTH, make_folder, make_tower, projector, tokenizer

CPU = torch.device("cpu")
IMAGE_MARKS = ("<im_patch>", "<im_start>", "<im_end>")
VIDEO_MARKS = ("<vid_patch>", "<vid_start>", "<vid_end>")


@dataclass(frozen=True)
class Asked:
    id: str
    prompt: str
    shown: Image.Image | Sequence[Image.Image]
    image: Path = Path("0")

    def open(self) -> Image.Image | Sequence[Image.Image]:
        return self.shown


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llava")
    tower = make_tower(root / "tower")
    make_folder(root / "v1", tower, mm_projector_type="linear")
    make_folder(root / "v1.5", tower, mm_projector_type="mlp2x_gelu", image_aspect_ratio="pad")
    make_folder(root / "marked", tower, IMAGE_MARKS, mm_use_im_start_end=True)
    make_folder(root / "shikra", tower, IMAGE_MARKS, model_type="shikra")
    make_folder(root / "video-chatgpt", tower, VIDEO_MARKS, model_type="VideoChatGPT")
    return root


def opened(folder: Path) -> LlavaModel:
    return load_llava(folder, llava_family(folder), CPU, torch.float32)


def greedy(**values: Any) -> EvaluationConfig:
    return EvaluationConfig(**{"temperature": 0.0, "max_new_tokens": 5, **values})


def picture(width: int = 60, height: int = 40) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).rotate(30).convert("RGB")


def by_hand(folder: Path, family: FamilyConfig, text: str, features: torch.Tensor) -> str:
    """The answer of LLaVA's own code: the projected `features` in the place of <image>, then LLaMA, greedy."""
    weights = torch.load(folder / "pytorch_model.bin")
    values = json.loads((folder / "config.json").read_text())
    words = tokenizer(
        *(mark for mark in (*IMAGE_MARKS, *VIDEO_MARKS) if mark in (folder / "tokenizer.json").read_text())
    )
    if values.get("mm_projector_type") == "mlp2x_gelu":
        hidden = features @ weights["model.mm_projector.0.weight"].T + weights["model.mm_projector.0.bias"]
        hidden = torch.nn.functional.gelu(hidden)
        rows = hidden @ weights["model.mm_projector.2.weight"].T + weights["model.mm_projector.2.bias"]
    else:
        rows = features @ weights["model.mm_projector.weight"].T + weights["model.mm_projector.bias"]
    llama = LlamaForCausalLM.from_pretrained(folder.parent / "llama").eval()
    table = llama.get_input_embeddings()
    before, after = text.split("<image>")
    ids = [[words.bos_token_id, *words(before, add_special_tokens=False).input_ids]]
    ids.append(words(after, add_special_tokens=False).input_ids)
    parts = [table(torch.tensor(ids[0])), rows, table(torch.tensor(ids[1]))]
    embedded = torch.cat(parts)[None]
    said: list[int] = []
    never = words.convert_tokens_to_ids("<image>")
    for _ in range(5):
        logits = llama(inputs_embeds=embedded).logits[0, -1]
        logits[never] = -torch.inf
        said.append(int(logits.argmax()))
        if said[-1] == words.eos_token_id:
            break
        embedded = torch.cat([embedded, table(torch.tensor([[said[-1]]]))], dim=1)
    return str(words.decode(said, skip_special_tokens=True)).strip()


def seen(folder: Path, geometry: ImageGeometry, shown: Sequence[Image.Image]) -> torch.Tensor:
    """CLIP's last hidden state but one, without the class token: [pictures, patches, width]."""
    tower = CLIPVisionModel.from_pretrained(folder.parent / "tower").eval()
    pixels = torch.stack([torch.from_numpy(to_pixels(geometry.apply(image))) for image in shown])
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def plain_llama(folder: Path) -> None:
    """The language model of a folder by itself, for `by_hand`."""
    values = json.loads((folder / "config.json").read_text())
    weights = {k: v for k, v in torch.load(folder / "pytorch_model.bin").items() if "mm_projector" not in k}
    llama = folder.parent / "llama"
    llama.mkdir(exist_ok=True)
    torch.save(weights, llama / "pytorch_model.bin")
    kept = {key: value for key, value in values.items() if not key.startswith("mm_")}
    (llama / "config.json").write_text(json.dumps(kept | {"model_type": "llama"}))


@pytest.mark.parametrize("name", ["v1", "v1.5", "marked", "shikra"])
@torch.inference_mode()
def test_answers_are_those_of_the_publishers_own_computation(folders: Path, name: str) -> None:
    folder = folders / name
    model = opened(folder)
    plain_llama(folder)
    assert model.config.geometry is not None
    features = seen(folder, make_geometry(model.config.geometry), [picture()])[0]
    questions = ["Is there a dog?", "left", "Is the cat left of the dog in this image"]
    texts = [render_family(question, model.config) for question in questions]
    expected = [by_hand(folder, model.config, text, features) for text in texts]
    got = model.answers([Asked(str(i), q, picture()) for i, q in enumerate(questions)], greedy())
    assert got == expected
    assert len(set(got)) > 1


@torch.inference_mode()
def test_video_chatgpt_pools_a_hundred_temporal_tokens_and_all_spatial_ones(folders: Path) -> None:
    folder = folders / "video-chatgpt"
    model = opened(folder)
    plain_llama(folder)
    frames = [picture(60, 40 + 7 * number) for number in range(3)]
    features = seen(folder, ImageGeometry("squash", 28), frames)
    tokens = pool_frames(features, "temporal_spatial", 100)
    assert len(tokens) == 100 + 4
    assert torch.equal(tokens[0], features[0].mean(dim=0))
    assert not tokens[3:100].any()
    assert torch.equal(tokens[100], features[:, 0].mean(dim=0))
    question = "Is there a dog?"
    text = render_family(question, model.config)
    assert text == f"{SYSTEM} USER: <vid_start><image><vid_end>\n{question} ASSISTANT:"
    assert model.answers([Asked("0", question, frames)], greedy()) == [by_hand(folder, model.config, text, tokens)]
    assert model.config.video is not None
    assert (model.config.video.n_frames, model.config.video.pad) == (100, True)


def test_the_published_projector_of_video_chatgpt_is_laid_over_its_parent(folders: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "lightning", folders / "tower")
    before = opened(folder).config.family
    known = len(tokenizer())
    overlay = {name: value + 1 for name, value in projector("linear").items()}
    overlay["model.embed_tokens.weight"] = torch.arange(known + 3.0)[:, None].expand(-1, TEXT_WIDTH).clone()
    torch.save(overlay, folder / "video_chatgpt-7B.bin")
    model = opened(folder)
    assert (before, model.config.family) == ("llava-v1", "video-chatgpt")
    assert torch.equal(model.model.adapter.linear.bias, overlay["model.mm_projector.bias"])
    words = model.encoder.tokenizer
    ids = [words.convert_tokens_to_ids(mark) for mark in VIDEO_MARKS]
    assert ids == [known, known + 1, known + 2]
    table = model.model.get_input_embeddings().weight
    assert table[ids, 0].tolist() == ids  # the rows that came with the projector
    assert len(table) == len(model.model.lm_head.weight) == len(words)


def test_each_family_sees_and_writes_as_it_was_trained(folders: Path) -> None:
    families = {name: llava_family(folders / name) for name in ("v1", "v1.5", "marked", "shikra", "video-chatgpt")}
    assert {name: family.geometry for name, family in families.items()} == {
        "v1": GeometryConfig(kind="crop", side=28),
        "v1.5": GeometryConfig(kind="letterbox", side=28),
        "marked": GeometryConfig(kind="crop", side=28),
        "shikra": GeometryConfig(kind="letterbox_white", side=28),
        "video-chatgpt": GeometryConfig(kind="squash", side=28),
    }
    assert families["v1"].coordinates is None
    box, size = (10.0, 120.0, 30.0, 145.0), (512, 256)
    written = {}
    for name in ("v1.5", "shikra"):
        family = families[name]
        assert family.coordinates is not None
        assert family.geometry is not None
        written[name] = make_location_format(family.coordinates, make_geometry(family.geometry)).encode(box, *size)
    # by hand: the square is 512 x 512 and begins 128 pixels above the image
    assert written == {"v1.5": "[0.02, 0.48, 0.06, 0.53]", "shikra": "[0.020,0.484,0.059,0.533]"}


def test_each_family_is_asked_in_its_own_words(folders: Path) -> None:
    families = {name: llava_family(folders / name) for name in ("v1", "v1.5", "marked", "shikra")}
    end = " ASSISTANT:"
    assert render_family("What?", families["v1"]) == f"{SYSTEM} USER: <image>\nWhat?{end}"
    assert render_family("What?", families["marked"]) == f"{SYSTEM} USER: <im_start><image><im_end>\nWhat?{end}"
    shikra = families["shikra"]
    direct = "I want a simple and direct answer to my question: What?"
    assert render_family("What?", shikra) == f"{SYSTEM} USER: For this image <im_start><image><im_end>, {direct}{end}"
    where = fill_turn(shikra.loc_pred, description="the dog <image>")
    assert where == ("In the given <im_start><image><im_end>, could you find and tell me the coordinates of the dog?")
    assert render_family(where, shikra) == f"{SYSTEM} USER: {where}{end}"
    region = fill_turn(families["v1.5"].rev_loc, loc="[0.1, 0.2, 0.3, 0.4]")
    assert region == "<image>\nPlease provide a short description for this region: [0.1, 0.2, 0.3, 0.4]."


def test_turns_of_several_kinds_share_a_batch(folders: Path) -> None:
    model = opened(folders / "shikra")
    prompts = ["Is there a dog?", fill_turn(model.config.loc_pred, description="dog"), "left"]
    asks = [Asked(str(number), prompt, picture()) for number, prompt in enumerate(prompts)]
    together = model.answers(asks, greedy(batch_size=3))
    assert together == [model.answers([ask], greedy())[0] for ask in asks]


def test_the_tower_may_lie_inside_the_folder(folders: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "whole", "tower")
    make_tower(folder / "tower")
    assert llava_shape(folder).vision.image_side == 28
    assert opened(folder).encoder.n_image_tokens == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "shikra"}, "its tokenizer does not know <im_start>, <im_end>"),
        ({"mm_projector_type": "mlp3x_gelu"}, "needed is linear or mlp2x_gelu"),
        ({"mm_vision_select_feature": "cls_patch"}, "keeps the class token"),
        ({"mm_vision_tower": "nobody/nothing"}, "nobody/nothing"),
        ({"num_attention_heads": 5}, "impossible shape"),
    ],
)
def test_a_folder_that_is_no_such_model_is_told(
    folders: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    folder = make_folder(tmp_path / "other", folders / "tower")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(CheckpointError, match=message):
        opened(folder)


def test_a_config_may_say_how_a_model_without_places_writes_them(folders: Path) -> None:
    family = llava_family(folders / "v1").model_copy(update={"coordinates": CoordinateConfig(n_bins=28)})
    assert family.coordinates is not None
    assert load_llava(folders / "v1", family, CPU, torch.float32).config.coordinates == family.coordinates
