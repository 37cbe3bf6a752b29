"""Scaling, augmentation and normalisation, on images small enough to check by eye."""

import numpy as np
import torch

from fedmetanas_core.data.transforms import augment, augmentation_for, to_tensor
from fedmetanas_core.seeds import torch_stream


def test_to_tensor_moves_channels_first_and_scales_bytes() -> None:
    images = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    x = to_tensor(images)
    assert x.shape == (1, 3, 2, 2)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    # Channel 1 of the pixels 0…3, 3…5, 6…8, 9…11.
    assert torch.equal(x[0, 1] * 255, torch.tensor([[1.0, 4.0], [7.0, 10.0]]))


def test_to_tensor_keeps_floats_and_the_original() -> None:
    images = np.full((2, 3, 3, 1), 0.25, dtype=np.float32)
    x = to_tensor(images)
    x += 1
    assert torch.equal(x, torch.full((2, 1, 3, 3), 1.25))
    assert images.max() == 0.25


def _numbered(count: int, side: int = 6) -> torch.Tensor:
    """Images whose pixels all differ and are never 0, so that a crop shows where it came from."""
    return torch.arange(1, 1 + count * 2 * side * side, dtype=torch.float32).view(count, 2, side, side)


def test_augment_is_a_shifted_or_mirrored_crop_of_each_image() -> None:
    batch, padding = _numbered(40), 2
    out = augment(batch, torch_stream(0, "augmentation"), padding)
    padded = torch.nn.functional.pad(batch, (padding,) * 4)
    seen = set()
    for image, result in zip(padded, out, strict=True):
        crops = {
            (top, left, mirrored): image[:, top : top + 6, left : left + 6].flip(2)
            if mirrored
            else image[:, top : top + 6, left : left + 6]
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
        }
        matches = [key for key, crop in crops.items() if torch.equal(crop, result)]
        assert len(matches) == 1
        seen.update(matches)
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert {top for top, _, _ in seen} == set(range(5)) == {left for _, left, _ in seen}


def test_augment_without_padding_only_mirrors() -> None:
    batch = _numbered(64)
    out = augment(batch, torch_stream(1, "augmentation"), padding=0)
    same = (out == batch).flatten(1).all(1)
    mirrored = (out == batch.flip(3)).flatten(1).all(1)
    assert torch.equal(same, ~mirrored)
    assert 16 <= int(same.sum()) <= 48


def test_padding_is_black_not_the_mean() -> None:
    white = torch.ones(50, 1, 4, 4)
    assert set(augment(white, torch_stream(2, "augmentation")).unique().tolist()) == {0.0, 1.0}


def test_same_generator_state_gives_the_same_result_and_leaves_the_batch() -> None:
    batch = _numbered(8)
    before = batch.clone()
    first = augment(batch, torch_stream(3, "augmentation"))
    generator = torch_stream(3, "augmentation")
    second, third = augment(batch, generator), augment(batch, generator)
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(batch, before)


def test_augment_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    augment(_numbered(4), torch_stream(4, "augmentation"))
    assert torch.equal(state, torch.get_rng_state())


def test_auto_augments_colour_images_of_at_least_32_pixels() -> None:
    assert augmentation_for((3, 32, 32))
    assert augmentation_for((3, 224, 160))
    assert not augmentation_for((3, 31, 64))
    assert not augmentation_for((1, 28, 28))
    assert not augmentation_for((1, 224, 224))
