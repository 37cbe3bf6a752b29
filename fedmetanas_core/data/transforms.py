"""From stored pixels to a batch of tensors, and its augmentation; normalising belongs to the network's image format."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SMALLEST_AUGMENTED_SIDE = 32  # pixels; moving an 8×8 digit by 4 would move it out of sight


def to_tensor(images: npt.NDArray[Any]) -> Tensor:
    """(N, height, width, channels) uint8 or float in [0, 1] to (N, channels, height, width) float32 in [0, 1]."""
    channels_first = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))  # always a copy
    if channels_first.dtype == torch.uint8:
        return channels_first.to(torch.float32).div_(255.0)
    return channels_first.to(torch.float32)


def augment(batch: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """A random crop of each zero-padded image and a mirror image of every second one on average.

    `batch` is (N, channels, height, width) in [0, 1], before normalisation: the padding is then black, whereas zeros
    around normalised images would be the channels' mean. Every image draws its own shift and side from `generator`;
    the same generator state gives the same result on every device.
    """
    count, channels, height, width = batch.shape
    shifts = torch.randint(2 * padding + 1, (2, count), generator=generator, device=generator.device)
    mirrored = torch.randint(2, (count, 1), generator=generator, device=generator.device).bool()
    rows = torch.arange(height, device=generator.device) + shifts[0].unsqueeze(1)  # (N, height)
    columns = torch.arange(width, device=generator.device) + shifts[1].unsqueeze(1)  # (N, width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(batch.device), columns.to(batch.device)
    padded = torch.nn.functional.pad(batch, (padding, padding, padding, padding))
    image = torch.arange(count, device=batch.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=batch.device).view(1, -1, 1, 1)
    return padded[image, channel, rows.view(count, 1, height, 1), columns.view(count, 1, 1, width)]


def augmentation_for(image_shape: tuple[int, int, int]) -> bool:
    """Whether "auto" augments images of shape (channels, height, width): colour and at least 32 pixels a side.

    Greyscale sets are digits and the like, where a mirror image is another thing or nothing.
    """
    channels, height, width = image_shape
    return channels > 1 and min(height, width) >= SMALLEST_AUGMENTED_SIDE
