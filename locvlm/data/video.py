"""Video files -> upright RGB frames at uniform places (section 4.5), with PyAV.

Frame i is the i-th frame in the order of presentation, as decoding the whole stream would number it. Reading a few of
them need not decode the rest: one pass over the packets finds which packet holds which frame (packets, not times:
variable frame rates, B-frames and containers without a frame count are all the same to it), then only the stretches
from a keyframe to a wanted frame are decoded, without the frames in them that no other needs. Where packets do not
tell the frames (some codecs, a missing or a double time stamp, damage) everything is decoded instead, twice: to count,
and to pick. Either way the pixels are those of plain decoding.

Of several video streams the first is read, as OpenCV and the frame readers of transformers do; cover pictures do not
count as video. Frames are turned and mirrored as the file's display matrix says; pixels that are not square stay so.
A damaged or truncated file gives the frames that precede the damage, and a note that says how many were announced.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.error import FFmpegError, InvalidDataError
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Discard, Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image

from locvlm.errors import DataError

Sampling = Literal["vcgpt", "segment_centre"]

# codecs of which every packet with a time stamp gives one frame (VP8 has hidden frames, MPEG-4 in AVI packs two)
_ONE_FRAME_A_PACKET = frozenset({"h264", "hevc", "av1", "vp9", "mjpeg"})
_MAX_REORDER = 16  # H.264 and HEVC hold back at most 16 frames; more is a jump of the clock
_SEEK_GAP = 64  # packets: reading over fewer costs less than a seek
_TURNS = {  # signs of (a, b, c, d) of the display matrix: x' = a x + c y, y' = b x + d y, y downwards
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What is known of a video.

    `width`, `height`: pixels of a frame as displayed (after the rotation); `rotation`: the file's metadata, degrees
    counter-clockwise; `n_frames`: frames that can be read; `fps`: the average over the file; `duration`: seconds, as
    the container states it; `notes`: what a reader of the frames should know, such as damage.
    """

    width: int
    height: int
    n_frames: int
    fps: float
    duration: float
    rotation: int = 0
    codec: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames(VideoInfo):
    """Frames of one video: `images[k]` (RGB, upright) is frame `indices[k]` of `n_frames`."""

    images: list[Image.Image] = field(repr=False)
    indices: list[int]


def frame_indices(n_frames: int, n: int, sampling: Sampling = "vcgpt", unique: bool = False) -> list[int]:
    """The places of `n` uniform frames among `n_frames`, ascending; of a shorter video `n_frames` places.

    `vcgpt` (section 4.5, the default): mid-points of Video-ChatGPT's segments, `seg = (N - 1) / n`, `index_i =
    (round(seg * i) + round(seg * (i + 1))) // 2`, rounded half to even. Where N is near n a frame comes twice and the
    last one never: (8, 8) gives 0 1 2 3 4 4 5 6. `segment_centre`: floor((i + 1/2) N / n), which never repeats one.
    `unique` leaves out repetitions, so that a model sees the actual number of frames (section 6).
    Raises ValueError unless both numbers are 1 or more.
    """
    if n_frames < 1 or n < 1:
        raise ValueError(f"{n} frames of {n_frames}: both must be 1 or more")
    n = min(n, n_frames)
    if sampling == "segment_centre":
        places = [(2 * i + 1) * n_frames // (2 * n) for i in range(n)]
    else:
        segment = (n_frames - 1) / n
        places = [(round(segment * i) + round(segment * (i + 1))) // 2 for i in range(n)]
    return list(dict.fromkeys(places)) if unique else places


def probe(path: Path, threads: int = 1) -> VideoInfo:
    """What a video holds. Decodes the last stretch, which is where a truncated file is damaged. Raises DataError as
    `read_frames`."""
    frames = _Reader(path, threads, lambda n_frames: [n_frames - 1]).read()
    return VideoInfo(**{name: getattr(frames, name) for name in VideoInfo.__slots__})


def read_frames(
    path: Path,
    n: int,
    sampling: Sampling = "vcgpt",
    *,
    unique: bool = False,
    threads: int = 1,
    each: Callable[[Image.Image], Image.Image] | None = None,
) -> Frames:
    """`n` uniform frames of a video (fewer when it has fewer), at the places of `frame_indices`.

    `threads`: of the decoder; 1 costs the least CPU time. `each` is applied to a frame as soon as it is there (to
    shrink it, say), so that 100 large frames need not be in memory together.
    Raises DataError when there is no such file, no video stream in it, or no frame that decodes.
    """
    return _Reader(path, threads, lambda n_frames: frame_indices(n_frames, n, sampling, unique), each).read()


@contextmanager
def open_video(path: Path, threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """The opened container and its first video stream (`av.container.InputContainer`, `av.video.stream.VideoStream`).

    Raises DataError that names the file when it cannot be opened or has no video stream.
    """
    if not path.is_file():  # FFmpeg would wait at a pipe
        found = "this is no file" if path.exists() else "there is no such file"
        raise DataError(f"reading the video {path}: {found}")
    try:
        # a name with a colon is no protocol; a playlist in disguise reaches no network; tags need not be UTF-8
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (FFmpegError, OSError) as error:
        raise DataError(
            f"reading the video {path}: FFmpeg cannot open it ({error.strerror}); it may be cut short or not be a "
            "video, so copy, download or convert it again, or leave it out"
        ) from None
    with container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
            raise DataError(
                f"reading the video {path}: it has no video stream that can be decoded (streams: {kinds}); leave it out"
            )
        for stream in container.streams:
            if stream is not streams[0]:
                stream.discard = Discard.all
        streams[0].thread_count = threads
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


class _Unclear(Exception):
    """The packets of this file do not tell its frames."""


@dataclass(frozen=True, slots=True)
class _Index:
    """The packets of a stream in the order of decoding: time stamps, and places of the keyframes."""

    pts: list[int]
    keys: list[int]
    shown: list[int]  # time stamps of the frames in the order of presentation
    n_announced: int

    def runs(self, wanted: Iterable[int]) -> list[tuple[int, int]]:
        """Stretches of packets (first, last), ascending, that must be decoded for the frames of these time stamps."""
        place = {pts: i for i, pts in enumerate(self.pts)}
        # always the first packet: it alone may name the encoder (x264 before build 151 is decoded another way in 4:4:4)
        runs = [(0, 0)]
        for last in sorted(place[pts] for pts in wanted):
            # the last keyframe is not enough for frames shown before it but decoded after it (open groups)
            key = bisect_right(self.keys, last) - 1
            while self.pts[self.keys[key]] > self.pts[last]:
                key -= 1
            first = self.keys[key]
            if first <= runs[-1][1] + 1:
                runs[-1] = (runs[-1][0], max(runs[-1][1], last))
            else:
                runs.append((first, last))
        return runs


def _read_index(container: Any, stream: Any) -> _Index:
    """Raises _Unclear when the packets do not tell the frames."""
    if stream.codec_context.codec.canonical_name not in _ONE_FRAME_A_PACKET:
        raise _Unclear
    pts: list[int] = []
    keys: list[int] = []
    shown: list[int] = []
    for packet in _packets(container, stream):
        if packet.dts is None and not packet.size:  # the end of the stream
            break
        if packet.pts is None or packet.is_corrupt or not packet.size:
            raise _Unclear
        if packet.is_keyframe:
            keys.append(len(pts))
        if not packet.is_discard:  # an edit list cuts it away, though others may need it
            shown.append(packet.pts)
        pts.append(packet.pts)
    order = sorted(range(len(pts)), key=pts.__getitem__)
    stamps_lie = stream.codec_context.reorder_depth > 0 and order == list(range(len(pts))) and len(pts) > 1  # as in AVI
    if (
        stamps_lie
        or not shown
        or keys[:1] != [0]
        or order[0] != 0  # frames before the first keyframe, which not every decoder shows
        or len(set(pts)) < len(pts)
        or any(abs(place - rank) > _MAX_REORDER for rank, place in enumerate(order))
    ):
        raise _Unclear
    return _Index(pts, keys, sorted(shown), max(stream.frames, len(pts)) - (len(pts) - len(shown)))


class _Reader:
    """One read of one video. `choose`: number of frames -> the places wanted, ascending."""

    def __init__(
        self,
        path: Path,
        threads: int,
        choose: Callable[[int], list[int]],
        each: Callable[[Image.Image], Image.Image] | None = None,
    ) -> None:
        self._path, self._threads, self._choose, self._each = path, threads, choose, each
        self._to_rgb = VideoReformatter()
        self._size: tuple[int, int] | None = None  # as displayed, of the first frame that is read
        self._rotation = 0
        self._notes: dict[str, None] = {}  # in order, each once

    def read(self) -> Frames:
        frames = self._by_packets()
        return self._by_decoding() if frames is None else frames

    def _by_packets(self) -> Frames | None:
        """None when all must be decoded: the packets are unclear, or a wanted frame does not decode."""
        with open_video(self._path, self._threads) as (container, stream):
            try:
                index = _read_index(container, stream)
                wanted = self._choose(len(index.shown))
                images = self._pick(container, stream, index, {index.shown[i] for i in wanted})
            except (_Unclear, FFmpegError):
                return None
            if len(index.shown) < index.n_announced:
                self._note_damage(index.n_announced, len(index.shown))
            return self._frames(container, stream, len(index.shown), wanted, [images[index.shown[i]] for i in wanted])

    def _by_decoding(self) -> Frames:
        self._size, self._notes = None, {}
        with open_video(self._path, self._threads) as (container, stream):
            count = 0
            with suppress(FFmpegError):
                for count, _ in enumerate(decode_all(container, stream), 1):  # noqa: B007
                    pass
            announced = stream.frames
        if not count:
            raise DataError(
                f"reading the video {self._path}: none of its frames decodes; copy, download or convert it again, or "
                "leave it out"
            )
        wanted = self._choose(count)
        images: dict[int, Image.Image] = {}
        with open_video(self._path, self._threads) as (container, stream):
            chosen = set(wanted)
            for place, frame in enumerate(islice(decode_all(container, stream), max(chosen) + 1)):
                if place in chosen:
                    images[place] = self._image(frame)
            if count < announced:
                self._note_damage(announced, count)
            return self._frames(container, stream, count, wanted, [images[i] for i in wanted])

    def _pick(self, container: Any, stream: Any, index: _Index, wanted: set[int]) -> dict[int, Image.Image]:
        """The images of these time stamps. Raises _Unclear when one of them is not found."""
        context = stream.codec_context
        place = {pts: i for i, pts in enumerate(index.pts)}
        images: dict[int, Image.Image] = {}

        def keep(frames: Sequence[Any]) -> None:
            for frame in frames:
                if frame.pts in wanted and frame.pts not in images:
                    images[frame.pts] = self._image(frame)

        # sub-layers make it unsafe in HEVC; other codecs do not mark such frames
        skips = context.name == "h264"
        container.seek(index.pts[0], stream=stream)
        packets, at = _packets(container, stream), 0
        for first, last in index.runs(wanted):
            if first - at > _SEEK_GAP:
                container.seek(index.pts[first], stream=stream)
                packets = _packets(container, stream)
            for packet in packets:
                at = place.get(packet.pts, len(place))
                if at > last:
                    raise _Unclear  # the seek went too far
                if at < first:
                    continue
                if skips:
                    context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                keep(context.decode(packet))
                if at == last:
                    break
            keep(context.decode(None))
            context.flush_buffers()
            at += 1
        if len(images) < len(wanted):
            raise _Unclear
        return images

    def _image(self, frame: Any) -> Image.Image:
        values = self._to_rgb.reformat(frame, format="rgb24").to_ndarray()
        image = Image.fromarray(values)
        turn = display_turn(frame)
        if turn is not None:
            image = image.transpose(turn)
        if self._size is None:
            self._size, self._rotation = image.size, int(frame.rotation)
        elif image.size != self._size:
            image = image.resize(self._size, Image.Resampling.BICUBIC)
            self._notes["the frame size changes on the way; frames were brought to one size"] = None
        if frame.is_corrupt:
            self._notes["the decoder mended damage in some frames"] = None
        return image if self._each is None else self._each(image)

    def _note_damage(self, announced: int, count: int) -> None:
        self._notes[f"damaged or cut short: {announced} frames announced, {count} can be read"] = None

    def _frames(
        self, container: Any, stream: Any, n_frames: int, indices: list[int], images: list[Image.Image]
    ) -> Frames:
        assert self._size is not None
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        duration = 0.0
        if container.duration:
            duration = container.duration / av.time_base
        elif stream.duration:
            duration = float(stream.duration * stream.time_base)
        elif rate:
            duration = n_frames / rate
        return Frames(
            width=self._size[0],
            height=self._size[1],
            n_frames=n_frames,
            fps=rate or (n_frames / duration if duration else 0.0),
            duration=duration,
            rotation=self._rotation,
            codec=stream.codec_context.codec.canonical_name,
            notes=tuple(self._notes),
            images=images,
            indices=indices,
        )


def display_turn(frame: Any) -> Image.Transpose | None:
    """What brings the pixels of a decoded frame upright; None when they are, or when the display matrix asks for more
    than quarter turns and mirrors."""
    matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return None
    a, b, _, c, d = np.sign(np.frombuffer(matrix, np.dtype("<i4"), 5)).tolist()
    return _TURNS.get((a, b, c, d))


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    try:
        yield from container.demux(stream)
    except IndexError as error:  # PyAV, where damage makes a new stream appear on the way
        raise InvalidDataError(0, f"damaged: {error}") from None


def decode_all(container: Any, stream: Any) -> Iterator[Any]:
    """Every frame (`av.VideoFrame`) in the order of presentation. Raises `av.error.FFmpegError` at the first damage."""
    for packet in _packets(container, stream):
        if packet.size or packet.dts is None:  # an empty packet in the middle would end the decoding
            yield from stream.codec_context.decode(packet if packet.size else None)
