"""8 and 100 uniform frames of a video: ours against Video-ChatGPT's `load_video` (decord).

    python benchmarks/video_frames.py [--video FILE] [--seconds 60] [--rounds 5]

The peer's steps: `VideoReader`, `get_batch` of the segment mid-points, nearest-neighbour resize to 224x224 through
torch. Ours: `read_frames`, each frame shrunk by the same rule. Both run on the same file (by default a drawn one,
640x360 H.264 at 25 frames a second), alternately and each in its own process. The results are compared first: the same
frame numbers, and pixels that on average differ by less than 1 of 255 (two builds of FFmpeg may convert colours
differently); without that there is no figure. Printed are the medians of CPU seconds, all threads and opening included,
imports not, and their ratios. Needs the extra `bench`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

COUNTS = (8, 100)
SIDE = 224
SIZE = (640, 360)
RATE = 25
SEED = 0
CLOSE = 1.0  # of 255, mean absolute difference
REPEATS = 3  # reads in one process; the fastest counts

_Pixels = npt.NDArray[np.uint8]


def generate(path: Path, seconds: int) -> None:
    """A texture that pans, a block that crosses it, noise; x264's default groups of pictures."""
    import av

    rng = np.random.default_rng(SEED)
    width, height = SIZE
    tile = np.kron(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    ground = np.concatenate([tile, tile], axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(seconds * RATE):
            pixels = ground[:, (left := 2 * i % width) : left + width].astype(np.int16)
            x, y = 5 * i % (width - 80), int(height / 2 + height / 3 * np.sin(i / 20))
            pixels[max(0, y - 40) : y + 40, x : x + 80] = (i % 256, 200, 50)
            pixels += rng.integers(-6, 7, (height, width, 1), np.int16)
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def ours(path: Path, n: int) -> tuple[list[int], list[_Pixels]]:
    from PIL import Image

    from locvlm.data.video import read_frames

    def shrink(image: Image.Image) -> Image.Image:  # torch's nearest neighbour: floor(i * scale)
        rows = np.arange(SIDE) * image.height // SIDE
        columns = np.arange(SIDE) * image.width // SIDE
        return Image.fromarray(np.asarray(image)[rows[:, None], columns])

    frames = read_frames(path, n, each=shrink)
    return frames.indices, [np.asarray(image) for image in frames.images]


def peer(path: Path, n: int) -> tuple[list[int], list[_Pixels]]:
    import torch
    from decord import VideoReader, cpu
    from PIL import Image

    reader = VideoReader(str(path), ctx=cpu(0))
    n = min(len(reader), n)
    segment = float(len(reader) - 1) / n
    edges = [int(np.round(segment * i)) for i in range(n + 1)]
    indices = [(start + end) // 2 for start, end in pairwise(edges)]
    batch = torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2).float()
    batch = torch.nn.functional.interpolate(batch, size=(SIDE, SIDE))
    frames = batch.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return indices, [np.asarray(Image.fromarray(frame)) for frame in frames]


SIDES = {"ours": ours, "peer": peer}


def measure(side: str, path: Path, n: int) -> float:
    """CPU seconds of one read in this process, the imports and the first read left out."""
    run = SIDES[side]
    run(path, n)
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        run(path, n)
        times.append(time.process_time() - start)
    return min(times)


def compare(path: Path, n: int) -> float:
    """The mean absolute difference of the pixels; ends the program when the two sides do not do the same."""
    (our_places, our_frames), (peer_places, peer_frames) = ours(path, n), peer(path, n)
    if our_places != peer_places:
        sys.exit(f"the two sides read other frames: {our_places} and {peer_places}")
    pairs = zip(our_frames, peer_frames, strict=True)
    difference = float(np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in pairs]))
    if difference > CLOSE:
        sys.exit(f"the frames differ by {difference:.2f} of 255 on average, so the figures would mean nothing")
    return difference


def child(*words: object) -> Any:
    """What this program prints when run with these words."""
    done = subprocess.run([sys.executable, __file__, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="a video of your own instead of the drawn one")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--frames", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.video, args.frames)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = args.video
        if path is None:
            path = Path(folder, "drawn.mp4")
            generate(path, args.seconds)
            print(f"{args.seconds} s of {SIZE[0]}x{SIZE[1]} H.264, {path.stat().st_size / 1e6:.1f} MB")
        for n in COUNTS:
            difference = compare(path, n)
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(args.rounds):
                for side in SIDES:
                    times[side].append(child("--measure", side, "--video", path, "--frames", n))
            medians = {side: statistics.median(values) for side, values in times.items()}
            print(
                f"{n:3} frames, the same numbers, mean difference {difference:.3f} of 255: "
                f"locvlm {medians['ours']:.3f} s CPU, load_video with decord {medians['peer']:.3f} s CPU, "
                f"ratio (medians of {args.rounds}) {medians['peer'] / medians['ours']:.2f}x"
            )


if __name__ == "__main__":
    main()
