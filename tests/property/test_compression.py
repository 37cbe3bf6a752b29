"""Compressed updates: how much is lost, that it is sent later, and that nothing but an honest stream is read."""

import math
import zlib

import numpy as np
import pytest
import torch
from helpers import random_architecture, random_masks, small_spec, stream
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmetanas_core.config import Config
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.federation.compression import BLOCK, KINDS, Residual, apply_changes, compress, decode, encode
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.supernet import Supernet

FINENESS = {"float16": 2.0**-11, "int8": 0.5 / 127}  # the largest error, as a share of its block's largest value


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(0, 1200),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-30, 30),
    kind=st.sampled_from(KINDS),
)
def test_every_value_comes_back_as_near_as_its_block_allows(count: int, seed: int, exponent: int, kind: str) -> None:
    values = torch.randn(count, generator=stream(seed)) * 10.0**exponent
    back = decode(encode(values, kind), count, kind)
    assert back.shape == values.shape
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        largest = float(values[block].abs().max())
        assert float((back[block] - values[block]).abs().max()) <= 1.001 * FINENESS[kind] * largest


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind: str) -> None:
    values = torch.zeros(BLOCK + 2)
    values[1], values[2], values[3], values[BLOCK] = 127.0, -64.0, 0.4, 0.5
    back = decode(encode(values, kind), BLOCK + 2, kind)
    assert back[:3].tolist() == [0.0, 127.0, pytest.approx(-64.0, rel=1e-3)]
    assert float(back[3]) == (0.0 if kind == "int8" else pytest.approx(0.4, rel=1e-3))
    assert back[BLOCK:].tolist() == [0.5, 0.0]  # the second block has a scale of its own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_has_diverged_stays_recognisable(kind: str, value: float) -> None:
    values = torch.ones(2 * BLOCK)
    values[3] = value
    back = decode(encode(values, kind), len(values), kind)
    assert back[:BLOCK].isnan().all()
    assert torch.allclose(back[BLOCK:], torch.ones(BLOCK))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_is_not_one_is_refused(kind: str) -> None:
    honest = encode(torch.ones(300), kind)
    bomb = np.frombuffer(zlib.compress(bytes(50_000_000)), dtype=np.uint8)
    for stream_of_bytes in (honest[:-3], honest[::-1].copy(), honest[:0], bomb):
        with pytest.raises(FedMetaNASError, match="compressed update"):
            decode(stream_of_bytes, 300, kind)
    with pytest.raises(FedMetaNASError, match="does not hold 600 values"):
        decode(honest, 600, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_small_changes_arrive_in_the_end(kind: str) -> None:
    """A change far below its block's step is lost each time, but not from what has been sent altogether."""
    step = torch.full((BLOCK,), 1e-4)
    step[0] = 1.0
    sent, statistics = torch.zeros(BLOCK), torch.zeros(2)
    lost = torch.zeros(BLOCK)
    for _ in range(200):
        trained = sent + step
        changes, lost = compress((trained, statistics), (sent, statistics), lost, kind)
        sent, _ = apply_changes((sent, statistics), changes, kind)
    torch.testing.assert_close(sent, 200 * step, rtol=0.0, atol=2 * FINENESS[kind])


def test_what_is_kept_shrinks_with_the_network() -> None:
    spec = small_spec()
    full, pruned = Architecture(spec), random_masks(random_architecture(spec, 1), stream(2), 0.4)
    layouts = [Supernet(spec, each.operation_mask, "meta").weight_layout for each in (full, pruned)]
    values = torch.arange(layouts[0].size, dtype=torch.float32)
    kept = Residual(values, full.operation_mask).restricted(spec, pruned.operation_mask)
    assert torch.equal(kept, layouts[0].select(values, layouts[1]))
    regrown = Residual(kept, pruned.operation_mask).restricted(spec, full.operation_mask)
    assert torch.equal(regrown, torch.zeros(layouts[0].size))
    wrong_size = Residual(values[:-1], full.operation_mask).restricted(spec, full.operation_mask)
    assert not wrong_size.any()


def test_the_key_names_the_kinds() -> None:
    for kind in ("none", *KINDS):
        assert Config.from_mapping({"compression": kind}).compression == kind
    with pytest.raises(RefusalError, match="choose one of none, float16, int8"):
        Config.from_mapping({"compression": "int4"})
