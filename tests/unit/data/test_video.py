"""Frames of videos: which ones, that they are those of plain decoding, and what a bad file brings."""

import contextlib
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.error import FFmpegError
from PIL import Image

from locvlm.data.video import Frames, frame_indices, probe, read_frames
from locvlm.errors import DataError

SIZE = (96, 64)
N_FRAMES = 60

VIDEOS = {
    "arm_wrestling.mp4",
    "cockatoo.mp4",
    "corrupted.mp4",
    "dog_eating.mp4",
    "flipping_a_pancake.mkv",
    "nasa_13013.mp4",
    "playing_guitar.mp4",
    "var_fps_video.mp4",
    "video_0.mov",
    "video_90.mov",
}
# name -> encoder and its options; what is hard in them stands in the name
ENCODINGS = {
    "b-frames.mp4": ("libx264", {"g": "12", "bf": "3"}),
    "open-gop.mp4": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "open-gop.ts": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "intra-refresh.mp4": ("libx264", {"g": "20", "x264-params": "intra-refresh=1"}),
    "interlaced.mp4": ("libx264", {"g": "12", "x264-params": "interlaced=1:bframes=2"}),
    "only-keyframes.mp4": ("libx264", {"g": "1"}),
    "stamps-lie.avi": ("libx264", {"g": "12", "bf": "2"}),
    "no-container.h264": ("libx264", {"g": "12", "bf": "3"}),
    "two-frames-a-packet.avi": ("mpeg4", {"g": "12", "bf": "2"}),
    "hidden-frames.webm": ("libvpx", {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5"}),
    "vp9.webm": ("libvpx-vp9", {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
    "no-keyframes.mov": ("mjpeg", {}),
    "animation.gif": ("gif", {}),
}
PIXEL_FORMATS = {"mjpeg": "yuvj420p", "gif": "rgb8"}


def draw(i: int) -> np.ndarray:
    """Frame i of the drawn videos: a texture that pans, a band whose brightness is 4 i."""
    ground = np.random.default_rng(0).integers(0, 256, (SIZE[1], 200, 3), np.uint8)
    pixels = np.ascontiguousarray(ground[:, i : i + SIZE[0]])
    pixels[:16] = 4 * i
    return pixels


def encode(
    path: Path, codec: str = "libx264", options: dict[str, str] | None = None, turn: float = 0, **mux: str
) -> Path:
    with av.open(str(path), "w", options=mux) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = SIZE
        stream.pix_fmt = PIXEL_FORMATS.get(codec, "yuv420p")
        stream.thread_count = 1
        if turn:
            stream.set_display_rotation(turn)
        for i in range(N_FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(i), format="rgb24")))
        container.mux(stream.encode())
    return path


def decoded(path: Path) -> list[av.VideoFrame]:
    """Every frame in order, up to the first error, as stored."""
    frames = []
    with av.open(str(path)) as container, contextlib.suppress(FFmpegError):
        frames.extend(container.decode(video=0))
    return frames


def check(found: Frames, every: list[av.VideoFrame], n: int, turn: Image.Transpose | None = None) -> None:
    assert found.n_frames == len(every)
    assert len(found.images) == len(found.indices) == min(n, len(every))
    for place, image in zip(found.indices, found.images, strict=True):
        stored = every[place].to_image()
        assert image == (stored if turn is None else stored.transpose(turn)), f"frame {place}"
        assert (image.mode, image.size) == ("RGB", (found.width, found.height))


@pytest.mark.parametrize(
    ("n_frames", "n", "places"),
    [
        (100, 8, [6, 18, 31, 43, 56, 68, 80, 93]),
        (300, 8, [18, 56, 93, 131, 168, 205, 243, 280]),
        (8, 8, [0, 1, 2, 3, 4, 4, 5, 6]),
        (100, 1, [49]),
        (1, 8, [0]),
    ],
)
def test_the_indices_are_the_mid_points_of_video_chatgpt(n_frames: int, n: int, places: list[int]) -> None:
    assert frame_indices(n_frames, n) == places


@pytest.mark.parametrize(("n_frames", "n"), [(3, 8), (8, 8), (9, 8), (100, 100), (101, 100), (1500, 100), (7, 1)])
def test_segment_centres_and_unique_indices_repeat_no_frame(n_frames: int, n: int) -> None:
    centres = frame_indices(n_frames, n, "segment_centre")
    assert centres == [int((i + 0.5) * n_frames / len(centres)) for i in range(min(n, n_frames))]
    for places in (centres, frame_indices(n_frames, n, unique=True)):
        assert places == sorted(set(places))
        assert set(places) <= set(range(n_frames))
    assert set(frame_indices(n_frames, n, unique=True)) == set(frame_indices(n_frames, n))


@pytest.mark.parametrize(("n_frames", "n"), [(0, 8), (8, 0), (-1, 1)])
def test_no_frames_have_no_indices(n_frames: int, n: int) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        frame_indices(n_frames, n)


def test_every_real_video_is_expected(realdata: Path) -> None:
    assert set(json.loads((realdata / "videos" / "expected_videos.json").read_text())["videos"]) == VIDEOS


@pytest.mark.parametrize("name", sorted(VIDEOS))
def test_8_and_100_frames_of_real_videos_equal_plain_decoding(realdata: Path, name: str) -> None:
    expected = json.loads((realdata / "videos" / "expected_videos.json").read_text())["videos"][name]
    path = realdata / "videos" / name
    every = decoded(path)
    turn = Image.Transpose.ROTATE_270 if expected["rotation_metadata"] == -90 else None
    for n in (8, 100):
        found = read_frames(path, n)
        check(found, every, n, turn)
        assert found.indices == frame_indices(expected["frames_decoded"], n)
        assert found.rotation == expected["rotation_metadata"]
        assert found.duration == pytest.approx(expected["duration_s"], abs=0.01)
        assert found.fps == pytest.approx(expected["first_stream_fps"])
        size = tuple(expected["video_streams"][0][2:])  # of the first stream, whatever the others are
        assert (found.width, found.height) == (size[::-1] if turn else size)
        assert bool(found.notes) == (name == "corrupted.mp4")


def test_a_damaged_video_gives_what_decodes_and_says_so(realdata: Path) -> None:
    path = realdata / "videos" / "corrupted.mp4"
    note = "damaged or cut short: 50 frames announced, 28 can be read"
    assert read_frames(path, 8).notes == (note,)
    assert (probe(path).n_frames, probe(path).notes) == (28, (note,))


@pytest.mark.parametrize("name", ENCODINGS)
def test_frames_of_every_kind_of_file_equal_plain_decoding(tmp_path: Path, name: str) -> None:
    codec, options = ENCODINGS[name]
    path = encode(tmp_path / name, codec, options)
    every = decoded(path)
    assert len(every) == N_FRAMES
    for n in (1, 3, 8, 100):
        for sampling in ("vcgpt", "segment_centre"):
            check(read_frames(path, n, sampling), every, n)  # type: ignore[arg-type]
    check(read_frames(path, 8, threads=2), every, 8)
    assert probe(path).n_frames == N_FRAMES


@pytest.mark.parametrize(
    ("degrees", "turn"),
    [(90, Image.Transpose.ROTATE_90), (-90, Image.Transpose.ROTATE_270), (180, Image.Transpose.ROTATE_180)],
)
def test_frames_stand_upright(tmp_path: Path, degrees: int, turn: Image.Transpose) -> None:
    path = encode(tmp_path / "turned.mp4", turn=degrees)
    found = read_frames(path, 4)
    assert abs(found.rotation) == abs(degrees)
    check(found, decoded(path), 4, turn)


def test_a_mirrored_video_is_mirrored_back(tmp_path: Path) -> None:
    path = tmp_path / "mirrored.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = SIZE
        stream.set_display_matrix([-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(0), format="rgb24")))
        container.mux(stream.encode())
    check(read_frames(path, 1), decoded(path), 1, Image.Transpose.FLIP_LEFT_RIGHT)


def test_a_file_cut_in_its_middle_gives_the_frames_before_the_cut(tmp_path: Path) -> None:
    path = encode(tmp_path / "whole.mp4", options={"g": "12"}, movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    every = decoded(path)
    assert 0 < len(every) < N_FRAMES
    found = read_frames(path, 8)
    check(found, every, 8)
    (note,) = found.notes
    assert note == f"damaged or cut short: {N_FRAMES} frames announced, {len(every)} can be read"


def test_each_frame_can_be_shrunk_as_it_comes(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4")
    found = read_frames(path, 3, each=lambda image: image.resize((8, 8)))
    assert [image.size for image in found.images] == [(8, 8)] * 3
    assert (found.width, found.height) == SIZE


def test_a_name_with_a_colon_a_space_or_odd_letters_is_no_protocol(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4")
    for name in ("http:a b.mp4", "concat:\u00e9.mp4", "%d.mp4"):
        assert probe(path.rename(tmp_path / name)).n_frames == N_FRAMES
        path = tmp_path / name


def _bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = encode(folder / "whole.mp4").read_bytes()
    sound, cover = folder / "sound.mp4", folder / "cover.mp4"
    for path in (sound, cover):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            if path is cover:
                picture = container.add_stream("mjpeg", rate=1)
                picture.width, picture.height, picture.pix_fmt = *SIZE, "yuvj420p"
                picture.disposition = av.stream.Disposition.attached_pic
                container.mux(picture.encode(av.VideoFrame.from_ndarray(draw(0), format="rgb24")))
                container.mux(picture.encode())
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 16000
            container.mux(stream.encode(samples))
            container.mux(stream.encode())
    start, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    bad = {
        "empty": b"",
        "text": b"not a video\n" * 50,
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "no index": whole[: len(whole) // 2],
        "head only": whole[:40],
        "no picture": whole[:start] + bytes(end - start) + whole[end:],
    }
    for name, content in bad.items():
        (folder / f"{name}.mp4").write_bytes(content)
    return {
        "sound": (sound, "no video stream"),
        "cover": (cover, "no video stream"),
        "folder": (folder, "this is no file"),
        "missing": (folder / "missing.mp4", "there is no such file"),
        "no picture": (folder / "no picture.mp4", "none of its frames decodes"),
        **{name: (folder / f"{name}.mp4", "cannot open it") for name in bad if name != "no picture"},
    }


def test_a_file_that_is_no_video_gives_one_clear_message(tmp_path: Path, capfd: Any) -> None:
    for path, words in _bad_files(tmp_path).values():
        for read in (probe, lambda path: read_frames(path, 8)):
            with pytest.raises(DataError, match=words) as caught:
                read(path)
            assert str(path) in str(caught.value)
    assert capfd.readouterr().err == ""
