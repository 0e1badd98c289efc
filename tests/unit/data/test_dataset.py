"""Training samples: the images of a source may be a folder or shards, and every source may have its own."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from locvlm.config import MixtureEntry, StageConfig
from locvlm.coordinates import make_location_format
from locvlm.data.collate import collate
from locvlm.data.conversations import ConversationFile, open_conversations, write_conversations
from locvlm.data.dataset import Branch, Sample, TrainingData
from locvlm.data.instruct import Renderer
from locvlm.data.shards import pack_images
from locvlm.errors import ConfigError, DataError
from locvlm.geometry import make_geometry
from locvlm.model.tokenizer import TextEncoder, word_tokenizer
from locvlm.pixels import ImageSource, open_images, to_pixels
from locvlm.presets import preset
from locvlm.records import Conversation, Turn

NAMES = [f"{k}.png" for k in range(6)]
CONFIG = preset("tiny")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(word_tokenizer(["what is it ? a red blue thing 0 1 2 3 4 5"]), 36)


def draw_folder(folder: Path, red: int) -> ImageSource:
    folder.mkdir()
    for k, name in enumerate(NAMES):
        Image.new("RGB", (48, 48), (red, 40 * k, 0)).save(folder / name)
    return open_images(folder)


def write_source(folder: Path, colour: str, n: int = 2) -> ConversationFile:
    """`n` questions about each image; the answer names the colour of the source and the image."""
    folder.mkdir()
    write_conversations(
        folder,
        (
            Conversation(
                f"{k}-{j}", name, 48, 48, "text", (Turn("text", question="what is it ?", answer=f"{colour} {k}"),)
            )
            for k, name in enumerate(NAMES)
            for j in range(n)
        ),
    )
    return open_conversations(folder)


def make(
    encoder: TextEncoder,
    sources: Mapping[str, ConversationFile],
    images: ImageSource | Mapping[str, ImageSource],
    **stage: object,
) -> TrainingData:
    settings = StageConfig.model_validate({"learning_rate": 1e-3, "global_batch": 4, "epochs": 1, **stage})
    renderer = Renderer(make_location_format(CONFIG.coordinates), CONFIG.prompts, 0)
    return TrainingData(settings, sources, images, renderer, encoder, make_geometry(CONFIG.geometry), 512, 3)


def red_of(sample: Sample) -> bool:
    return bool(sample.pixels[..., 0].mean() > 100)


def words(encoder: TextEncoder, sample: Sample) -> list[str]:
    return [encoder.decode(branch.ids) for branch in sample.branches]


@pytest.mark.parametrize("per_image", [0, 2])
def test_shards_give_the_samples_that_the_folder_gives(tmp_path: Path, encoder: TextEncoder, per_image: int) -> None:
    loose = draw_folder(tmp_path / "images", 200)
    (tmp_path / "shards").mkdir()
    pack_images(loose, loose.names(), tmp_path / "shards", 2000)
    sources = {"a": write_source(tmp_path / "a", "red")}
    ours, theirs = (
        make(encoder, sources, images, conversations_per_image=per_image)
        for images in (loose, open_images(tmp_path / "shards"))
    )
    assert len(ours) == len(theirs) == (6 if per_image else 12)
    for index in range(2 * len(ours)):
        left, right = ours.sample(index), theirs.sample(index)
        assert np.array_equal(left.pixels, right.pixels)
        assert (left.prefix, left.branches) == (right.prefix, right.branches)


@pytest.mark.parametrize("per_image", [0, 3])
def test_each_source_shows_its_own_images_though_their_names_are_the_same(
    tmp_path: Path, encoder: TextEncoder, per_image: int
) -> None:
    images = {"a": draw_folder(tmp_path / "red", 200), "b": draw_folder(tmp_path / "blue", 0)}
    sources = {"a": write_source(tmp_path / "a", "red"), "b": write_source(tmp_path / "b", "blue")}
    data = make(encoder, sources, images, conversations_per_image=per_image)
    assert len(data) == (12 if per_image else 24)
    seen: Counter[str] = Counter()
    for index in range(len(data)):
        sample = data.sample(index)
        answers = words(encoder, sample)
        for answer in answers:
            colour, number = ("red" if "red" in answer else "blue"), next(k for k in range(6) if str(k) in answer)
            assert (colour == "red") == red_of(sample)
            assert sample.pixels[..., 1].mean() == 40 * number
            seen[colour] += 1
    assert seen["red"] == seen["blue"] == len(data) * max(1, per_image) // 2


def test_sources_that_share_their_images_are_packed_together(tmp_path: Path, encoder: TextEncoder) -> None:
    shared = draw_folder(tmp_path / "images", 200)
    sources = {"a": write_source(tmp_path / "a", "red"), "b": write_source(tmp_path / "b", "blue")}
    one = make(encoder, sources, shared, conversations_per_image=4)
    each = make(encoder, sources, dict.fromkeys(sources, shared), conversations_per_image=4)
    assert len(one) == len(each) == 6
    for index in range(12):
        assert one.sample(index).branches == each.sample(index).branches
    assert any(
        {"red", "blue"}
        == {word for text in words(encoder, one.sample(index)) for word in ("red", "blue") if word in text}
        for index in range(6)
    )


def test_the_mixture_with_llava_instruct_shows_every_conversation_once_an_epoch(
    tmp_path: Path, encoder: TextEncoder
) -> None:
    for name in ("locvlm-b", "locvlm-l"):
        literal, plus = preset(name).stages.instruct, preset(f"{name}-plus-llava").stages.instruct
        assert literal.mixture == ()
        assert plus.mixture == (
            MixtureEntry(source="localize", weight=191_798),
            MixtureEntry(source="llava", weight=80_000),
        )
        assert plus.model_copy(update={"mixture": ()}) == literal
    sources = {"localize": write_source(tmp_path / "a", "red", 24), "llava": write_source(tmp_path / "b", "blue", 10)}
    images = {"localize": draw_folder(tmp_path / "red", 200), "llava": draw_folder(tmp_path / "blue", 0)}
    data = make(encoder, sources, images, mixture=plus.model_dump()["mixture"])
    found = Counter(red_of(data.sample(index)) for index in range(len(data)))
    assert len(data) == 204
    assert found[True] == pytest.approx(144, abs=1)
    with pytest.raises(ConfigError, match="add --data llava=PATH"):
        make(encoder, {"localize": sources["localize"]}, images, mixture=plus.model_dump()["mixture"])


def test_an_image_that_is_missing_is_named_with_its_folder(tmp_path: Path, encoder: TextEncoder) -> None:
    images = draw_folder(tmp_path / "images", 200)
    data = make(encoder, {"a": write_source(tmp_path / "a", "red")}, images)
    for name in NAMES:
        (tmp_path / "images" / name).unlink()
    with pytest.raises(DataError, match=r"images/\d\.png: there is no such file"):
        data.sample(0)


def test_a_batch_carries_bytes_and_is_normalised_bit_by_bit_as_an_image_is() -> None:
    """All values of a byte in all channels."""
    bytes_ = np.stack(
        [np.roll(np.arange(256, dtype=np.uint8), shift).reshape(16, 16) for shift in (0, 85, 170)], axis=-1
    )
    branch = Branch([1, 2], [False, True])
    batch = collate([Sample(bytes_, [1], (branch,)), Sample(np.stack([bytes_, 255 - bytes_]), [1], (branch,))], 0)
    assert batch.pixel_values is not None
    assert batch.pixel_values.dtype == torch.uint8
    wanted = np.stack([to_pixels(Image.fromarray(picture)) for picture in (bytes_, bytes_, 255 - bytes_)])
    assert np.array_equal(batch.inputs(torch.device("cpu"))["pixel_values"].numpy(), wanted)
    assert batch.frames == (0, 2)
