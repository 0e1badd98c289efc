"""The video stage on drawn clips: what the model sees, features made once, and training and answering with them."""

import json
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from locvlm.cli import main
from locvlm.config import EvaluationConfig, ExperimentConfig, resolve
from locvlm.coordinates import make_location_format
from locvlm.data.collate import collate
from locvlm.data.conversations import open_conversations, write_conversations
from locvlm.data.dataset import TrainingData
from locvlm.data.instruct import Renderer
from locvlm.data.video import read_frames
from locvlm.errors import DataError
from locvlm.geometry import make_geometry
from locvlm.model.checkpoint import TINY_FOUNDATION, LoadedModel, start
from locvlm.model.pooling import pool_frames
from locvlm.pixels import open_images
from locvlm.presets import PRESETS
from locvlm.records import Conversation, Turn
from locvlm.training import stage
from locvlm.training.checkpoints import FolderCheckpoints

N_FRAMES = 6
LENGTHS = {"a.mp4": 20, "b.mp4": 12, "short.mp4": 3}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number, (name, length) in enumerate(LENGTHS.items()):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuv420p"
            for at in range(length):
                picture = np.full((48, 64, 3), 40 * number, np.uint8)
                picture[10:30, at : at + 20] = (250, 30, 30)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
    write_conversations(folder / "set", [conversation(name) for name in LENGTHS])
    return folder


def conversation(name: str) -> Conversation:
    turns = (
        Turn("loc_pred", "car", "", (5.0, 10.0, 25.0, 30.0)),
        Turn("text", question="Is it red?", answer="Yes"),
    )
    return Conversation(name, name, 64, 48, "loc_pred", turns, medium="video")


def config(*overrides: str) -> ExperimentConfig:
    values = PRESETS["tiny"]()
    values["video"] = {"n_frames": N_FRAMES}
    values["stages"]["video"] = {
        **values["stages"]["instruct"],
        "mixture": [],
        "steps": 4,
        "global_batch": 3,
        "conversations_per_image": 0,
        "trainable": ["adapter"],
        "precision": "fp32",
    }
    values["cluster"] |= {"num_workers": 0, "checkpoint_every": 2, "log_every": 1}
    return resolve(values, overrides)


def training_data(folder: Path, where: Path, loaded: LoadedModel, settings: ExperimentConfig) -> TrainingData:
    assert settings.stages.video is not None
    geometry = make_geometry(settings.geometry)
    return TrainingData(
        settings.stages.video,
        {"clips": open_conversations(folder / "set")},
        open_images(where),
        Renderer(make_location_format(settings.coordinates, geometry), settings.prompts, 0),
        loaded.encoder,
        geometry,
        512,
        0,
        settings.video,
    )


def samples_by_tokens(data: TrainingData) -> dict[int, int]:
    found = {}
    for index in range(len(data)):
        sample = data.sample(index)
        found[sample.prefix.count(data.encoder.image_id)] = index
    return found


def test_a_video_stands_as_its_patches_and_a_token_a_frame_it_really_has(clips: Path) -> None:
    settings = config()
    loaded = start(settings, TINY_FOUNDATION)
    data = training_data(clips, clips, loaded, settings)
    patches = loaded.encoder.n_image_tokens
    assert sorted(samples_by_tokens(data)) == [patches + len({0, 1}), patches + N_FRAMES]  # 3 frames give 2 places
    padded = training_data(clips, clips, loaded, config("video.pad=true"))
    assert sorted(samples_by_tokens(padded)) == [patches + N_FRAMES]


@pytest.mark.parametrize("order", ["temporal_spatial", "spatial_temporal"])
def test_the_language_model_reads_pooled_features_behind_the_adapter(clips: Path, order: str) -> None:
    settings = config(f"video.token_order={order}")
    loaded = start(settings, TINY_FOUNDATION)
    pixels = torch.randn(N_FRAMES + 1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = loaded.model.visual_tokens(pixels, [N_FRAMES, 0]).pooler_output
        seen = loaded.model.patch_features(pixels)
        first = loaded.model.adapter(pool_frames(seen[:N_FRAMES], order))
        assert torch.allclose(tokens[0], first, atol=1e-5)
        assert torch.allclose(tokens[1], loaded.model.adapter(seen[N_FRAMES]), atol=1e-5)


def test_features_made_once_give_the_loss_of_the_videos(clips: Path, tmp_path: Path) -> None:
    settings = config()
    path = tmp_path / "config.yaml"
    from locvlm.config import dump_config

    path.write_text(dump_config(settings))
    command = ["data", "video-features", "--videos", clips, "--model", TINY_FOUNDATION, "--config", path]
    assert main([*map(str, command), "--output", str(tmp_path / "features")]) == 0
    manifest = json.loads((tmp_path / "features" / "manifest.json").read_text())
    patches = settings.model.vision.n_tokens
    assert manifest["counts"] == {"videos": 3, "tokens": 3 * patches + 2 * N_FRAMES + 2}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    loaded = start(settings, TINY_FOUNDATION)
    losses = []
    for where in (clips, tmp_path / "features"):
        data = training_data(clips, where, loaded, settings)
        batch = collate([data.sample(i) for i in range(3)], loaded.encoder.pad_id)
        with torch.inference_mode():
            losses.append(float(loaded.model.sum_loss(**batch.inputs(torch.device("cpu")))) / batch.n_targets)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)  # float16
    other = config("video.n_frames=5")
    with pytest.raises(DataError, match="made with other settings"):
        training_data(clips, tmp_path / "features", loaded, other).sample(0)


def test_a_batch_may_mix_images_and_videos(clips: Path, tmp_path: Path) -> None:
    settings = config()
    loaded = start(settings, TINY_FOUNDATION)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    still = Conversation("still", "red.png", 40, 40, "text", (Turn("text", question="Colour?", answer="red " * 24),))
    write_conversations(tmp_path / "still", [still])
    assert settings.stages.video is not None
    geometry = make_geometry(settings.geometry)
    data = TrainingData(
        settings.stages.video,
        {"clips": open_conversations(clips / "set"), "still": open_conversations(tmp_path / "still")},
        {"clips": open_images(clips), "still": open_images(tmp_path)},
        Renderer(make_location_format(settings.coordinates, geometry), settings.prompts, 0),
        loaded.encoder,
        geometry,
        512,
        0,
        settings.video,
    )
    samples = [data.sample(i) for i in range(4)]
    together = collate(samples, loaded.encoder.pad_id)
    with torch.inference_mode():
        whole = float(loaded.model.sum_loss(**together.inputs(torch.device("cpu"))))
        alone = [float(loaded.model.sum_loss(**collate([s], 3).inputs(torch.device("cpu")))) for s in samples]
    assert whole == pytest.approx(sum(alone), rel=1e-5)
    texts = [file.text_lengths().max() for file in data.files]
    assert texts[1] > texts[0]
    assert "still" not in data.describe(data.longest(1)[0])  # less text, but its frames count


def test_an_image_preset_refuses_videos_with_one_message(clips: Path) -> None:
    settings = config()
    loaded = start(settings, TINY_FOUNDATION)
    data = training_data(clips, clips, loaded, settings)
    data.video = None
    with pytest.raises(DataError, match="has no section `video`"):
        data.sample(0)


def test_stage_three_trains_the_adapter_and_leaves_a_model_that_answers_about_videos(
    clips: Path, tmp_path: Path
) -> None:
    settings = config()
    job = stage.Job("video", settings, {"clips": clips / "set"}, clips, tmp_path / "vid", TINY_FOUNDATION)
    stage.check(job, 0)
    assert stage.begin(job)
    stage.run(job, FolderCheckpoints(job.folder), torch.device("cpu"))
    trained, before = start(settings, tmp_path / "vid"), start(settings, TINY_FOUNDATION)
    assert trained.model.config.video_token_order == "temporal_spatial"
    theirs = before.model.state_dict()
    moved = {name for name, value in trained.model.state_dict().items() if not torch.equal(value, theirs[name])}
    assert moved == {"model.multi_modal_projector.linear.weight", "model.multi_modal_projector.linear.bias"}

    @dataclass
    class Asked:
        id: str
        image: Path
        prompt: str = "Is it red?"

        def open(self) -> list[Image.Image]:
            return read_frames(self.image, N_FRAMES, unique=True).images

    requests = [Asked(name, clips / name) for name in LENGTHS]
    decoding = EvaluationConfig(temperature=0, max_new_tokens=5, batch_size=4)
    together = trained.answers(requests, decoding)
    assert together == [trained.answers([request], decoding)[0] for request in requests]
