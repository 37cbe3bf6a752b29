"""Images in files, decoded when they are needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedmetanas_core.data.splits import Images, Labels
from fedmetanas_core.errors import RunFailedError

if TYPE_CHECKING:
    from PIL import Image


class FileSplit:
    """Images in files, decoded on demand to (height, width, channels) uint8 and kept if `cache` is set.

    `labels` is int64 of shape (N,). EXIF rotation is not applied, as in torchvision's folders.
    """

    def __init__(self, paths: Sequence[str], labels: Labels, shape: tuple[int, int, int], cache: bool) -> None:
        self.paths = tuple(paths)
        self.labels = labels
        self.shape = shape  # (height, width, channels)
        self._images = np.empty((len(self.paths), *shape), dtype=np.uint8) if cache else None
        self._decoded = np.zeros(len(self.paths), dtype=bool)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """One image (height, width, channels); RunFailedError names the file if it cannot be decoded."""
        if self._images is None:
            return decode_image(self.paths[index], self.shape)
        if not self._decoded[index]:
            self._images[index] = decode_image(self.paths[index], self.shape)
            self._decoded[index] = True
        found: npt.NDArray[np.uint8] = self._images[index]
        return found

    def take(self, indices: npt.NDArray[np.integer]) -> Images:
        """See Split.take; RunFailedError names the first file that cannot be decoded."""
        out = np.empty((len(indices), *self.shape), dtype=np.uint8)
        for row, index in enumerate(indices):
            out[row] = self.image(int(index))
        return out


def decode_image(path: str | Path, shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """The file as uint8 (height, width, channels), 1 or 3 channels: its centre part of that aspect, scaled.

    Sixteen-bit greys lose their lower byte. Raises RunFailedError naming the file if it cannot be decoded.
    """
    from PIL import Image

    height, width, channels = shape
    try:
        with Image.open(path) as image:
            scale = max(width / image.width, height / image.height)
            # Lets a JPEG decode at a half, a quarter or an eighth where that still covers the shape.
            image.draft(None, (round(image.width * scale), round(image.height * scale)))
            picture = _eight_bit(image).convert("L" if channels == 1 else "RGB")
            if picture.size != (width, height):
                box = _centre_box(picture.size, width / height)
                picture = picture.resize((width, height), Image.Resampling.BILINEAR, box)
    except Exception as error:  # Pillow's readers raise many classes for damaged files
        raise RunFailedError(f"image {path} cannot be decoded ({error})".replace("\n", " ")) from error
    return np.asarray(picture, dtype=np.uint8).reshape(height, width, channels)


def _centre_box(size: tuple[int, int], aspect: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the largest centred part of (width, height) with this width per height."""
    width, height = size
    box_width, box_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, min(width, left + box_width), min(height, top + box_height)


def _eight_bit(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    if not image.mode.startswith("I"):
        return image
    # Pillow's own conversion clips at 255 instead of scaling.
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65_535) >> 8
    return Image.fromarray(values.astype(np.uint8))
