"""Questions about videos, asked of a model that takes frames and of one that takes images."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from locvlm.config import EvaluationConfig, VideoConfig
from locvlm.data.frames import open_frames
from locvlm.errors import DataError
from locvlm.evaluation.asks import Ask, Unanswered, ask_all, locate
from locvlm.pixels import open_images
from locvlm.presets import preset


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Twelve frames that grow brighter, as a .mkv."""
    with av.open(str(tmp_path / "v_one.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for at in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * at, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return tmp_path


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image).mean())


def test_a_video_model_is_shown_its_frames_and_an_image_model_the_middle_one(clip: Path) -> None:
    images = open_images(clip)
    frames = Ask("1", images, "v_one.mp4", "What?", video=VideoConfig(n_frames=4)).open()
    assert isinstance(frames, list)
    assert [brightness(f) for f in frames] == sorted(brightness(f) for f in frames)
    assert len(frames) == 4
    middle = Ask("1", images, "v_one.mp4", "What?").open()
    assert isinstance(middle, Image.Image)
    assert brightness(middle) == pytest.approx(6 * 20, abs=12)


def test_another_format_of_the_same_name_stands_in_and_a_missing_video_is_an_error(clip: Path) -> None:
    assert len(open_frames(clip, "v_one.webm", VideoConfig(n_frames=3))) == 3
    with pytest.raises(DataError, match="v_two"):
        open_frames(clip, "v_two.mp4", None)
    with pytest.raises(DataError, match="leads out"):
        open_frames(clip, "../v_one.mkv", None)


def test_a_gif_is_a_video(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), (25 * at, 0, 0)) for at in range(10)]
    frames[0].save(tmp_path / "tumblr_1.gif", save_all=True, append_images=frames[1:], duration=100)
    shown = Ask("1", open_images(tmp_path), "tumblr_1.gif", "What?", video=VideoConfig(n_frames=4)).open()
    assert isinstance(shown, list)
    assert len({brightness(frame) for frame in shown}) == 4


class Seer:
    """Says how many pictures it was shown."""

    config = preset("tiny")

    def answers(self, asks: Sequence[Ask], decoding: EvaluationConfig) -> list[str]:
        return [str(ask.open()) for ask in asks]


def test_a_damaged_video_costs_the_batch_nothing_else(clip: Path) -> None:
    (clip / "v_bad.mp4").write_bytes(b"no video")
    images = open_images(clip)
    asks = [Ask(name, images, name, "What?") for name in ("v_one.mkv", "v_bad.mp4", "v_gone.mp4")]
    good, bad, gone = ask_all(Seer(), asks, EvaluationConfig())
    assert isinstance(good, str)
    assert isinstance(bad, Unanswered)
    assert isinstance(gone, Unanswered)
    assert "v_gone.mp4" in gone.reason


def test_images_are_looked_for_in_turn_and_under_their_other_coco_name(tmp_path: Path) -> None:
    for name in ("one/000000000042.jpg", "two/COCO_val2014_000000000042.jpg", "two/n7.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    one, two = (open_images(tmp_path / name) for name in ("one", "two"))
    assert locate([one, two], "COCO_val2014_000000000042.jpg") == (two, "COCO_val2014_000000000042.jpg")
    assert locate([one, two], "COCO_train2014_000000000042.jpg") == (one, "000000000042.jpg")
    assert locate([one, two], "n7.jpg") == (two, "n7.jpg")
    assert locate([one, two], "n8.jpg") is None
    assert locate([one, two], "../two/n7.jpg") is None
