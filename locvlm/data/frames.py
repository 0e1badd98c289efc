"""Videos as the network sees them: frames of the configured number and geometry, or pooled features made once."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from locvlm.config import VideoConfig
from locvlm.data.video import read_frames
from locvlm.errors import DataError
from locvlm.geometry import ImageGeometry
from locvlm.pixels import safe_image_path
from locvlm.records import VIDEO_SUFFIXES, read_manifest

FEATURES = "video-features"


@dataclass(frozen=True, slots=True)
class Seen:
    """One of two: `pixels`, uint8 [frames, side, side, 3], or `features`, pooled tokens float16 [tokens, width]
    before the adapter. `n_tokens`: visual tokens that stand for the video."""

    n_tokens: int
    pixels: npt.NDArray[np.uint8] | None = None
    features: npt.NDArray[np.float16] | None = None


def find_video(folder: Path, name: str) -> Path | None:
    """The file of a video, or where it is not there one of another video format with the same stem: question sets name
    .mp4, downloads come as .mkv or .webm too. None for neither. Raises DataError for a name that leads out."""
    path = safe_image_path(folder, name)
    stand_ins = (path.with_suffix(suffix) for suffix in VIDEO_SUFFIXES)
    return next((file for file in (path, *stand_ins) if file.is_file()), None)


def open_frames(folder: Path, name: str, video: VideoConfig | None) -> list[Image.Image]:
    """The frames of a video that a model is shown, as `video` samples them; without it, for a model of images, the
    middle frame alone (the paper's Table 7). The file is that of `find_video`.

    Raises DataError when there is none, or none that can be read.
    """
    path = find_video(folder, name) or safe_image_path(folder, name)
    if video is None:
        return read_frames(path, 1, "segment_centre").images
    return read_frames(path, video.n_frames, video.frame_sampling, unique=video.short_videos == "fewer").images


class VideoSource:
    """The videos of a folder, or of a folder of features that `locvlm data video-features` made of them."""

    def __init__(self, folder: Path, video: VideoConfig, geometry: ImageGeometry, n_patches: int) -> None:
        if not folder.is_dir():
            raise DataError(f"opening the videos {folder}: there is no such folder")
        self.folder, self.video, self.geometry, self.n_patches = folder, video, geometry, n_patches
        self.cached = (folder / "manifest.json").is_file() and read_manifest(folder).get("dataset") == FEATURES
        if self.cached:
            _refuse_other_form(folder, video, geometry)

    def see(self, name: str) -> Seen:
        """A video by its file name. Raises DataError when it, or its features, cannot be read."""
        if self.cached:
            return self._features(name)
        frames = read_frames(
            safe_image_path(self.folder, name),
            self.video.n_frames,
            self.video.frame_sampling,
            unique=self.video.short_videos == "fewer",
            each=self.geometry.apply,
        )
        pixels = np.stack([np.asarray(image) for image in frames.images])
        return Seen(self.n_tokens(len(pixels)), pixels=pixels)

    def n_tokens(self, n_frames: int) -> int:
        """Visual tokens of a video of that many sampled frames."""
        temporal = max(n_frames, self.video.n_frames) if self.video.pad else n_frames
        return self.n_patches + temporal

    def _features(self, name: str) -> Seen:
        path = safe_image_path(self.folder, f"{name}.npy")
        try:
            features = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise DataError(
                f"reading the features of {name} in {self.folder}: there are none; make them with `locvlm data "
                "video-features`, or give the folder of the videos itself"
            ) from None
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"reading {path}: {error}; remove it and make the features again") from None
        if features.ndim != 2 or features.dtype != np.float16:
            raise DataError(
                f"reading {path}: found {features.dtype} {list(features.shape)}, needed is float16 [tokens, width]"
            )
        return Seen(len(features), features=features)


def _refuse_other_form(folder: Path, video: VideoConfig, geometry: ImageGeometry) -> None:
    """Pooled features depend on these besides the videos and the tower."""
    manifest = read_manifest(folder)
    wanted = {
        "video": video.model_dump(mode="json"),
        "geometry": {"kind": geometry.kind, "side": geometry.side},
    }
    found = {"video": manifest.get("options", {}).get("video"), "geometry": manifest.get("geometry")}
    if found != wanted:
        raise DataError(
            f"opening the video features {folder}: they were made with other settings\n  features: {found}\n"
            f"  config:   {wanted}\nmake them again with this config"
        )
