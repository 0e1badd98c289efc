"""An image file -> the network's input. One path for training and generation, in Pillow and numpy (no torchvision)."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from locvlm.errors import DataError

# CLIP's normalisation
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

_MEAN = np.array(PIXEL_MEAN, np.float32)[:, None, None]
_STD = np.array(PIXEL_STD, np.float32)[:, None, None]


def open_image(path: Path) -> Image.Image:
    """Read and decode an image, its pixels as stored (no EXIF rotation). Raises DataError that names the file."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise DataError(f"reading the image {path}: there is no such file; check --images") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"reading the image {path}: it does not decode ({error}); replace or exclude it") from None


def to_pixels(image: Image.Image) -> npt.NDArray[np.float32]:
    """An RGB image -> float32 [3, height, width], normalised as CLIP expects."""
    values = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
    return (values - _MEAN) / _STD
