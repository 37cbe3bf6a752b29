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
from fedmetanas_core.federation.compression import (
    BLOCK,
    KINDS,
    RESIDUAL_KIND,
    Residual,
    apply_changes,
    compress,
    decode,
    encode,
)
from fedmetanas_core.federation.feedback import compressed
from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan
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
@pytest.mark.parametrize("feeds_back", [True, False])
def test_small_changes_arrive_in_the_end(kind: str, feeds_back: bool) -> None:
    """A change far below its block's step is lost each time, but with feedback not from all that has been sent."""
    step = torch.full((BLOCK,), FINENESS[kind] / 3 if kind == "int8" else 1.0 + FINENESS[kind] / 3)
    step[0] = 1.0 if kind == "int8" else 1.9
    sent, statistics, lost = torch.zeros(BLOCK), torch.zeros(2), torch.zeros(BLOCK)
    for _ in range(200):
        changes, lost = compress((sent + step, statistics), sent, lost if feeds_back else torch.zeros(BLOCK), kind)
        sent, _ = apply_changes((sent, statistics), changes, kind)
    error = float((sent.double() - 200 * step.double()).abs().max())
    assert (error <= 8 * FINENESS[kind]) == feeds_back


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_arrive_as_they_are(kind: str) -> None:
    """Also in the first round, where variances fall from 1 to almost nothing beside means that move far."""
    statistics = torch.tensor([3.0, 1e-4, -2.5, 2e-4, 0.0, 1e-3, 4.0, 9.0])
    changes, _ = compress((torch.zeros(4), statistics), torch.zeros(4), torch.zeros(4), kind)
    _, arrived = apply_changes((torch.zeros(4), torch.ones(8)), changes, kind)
    torch.testing.assert_close(arrived, statistics, rtol=1e-3, atol=3e-7)  # batch norm itself adds 1e-5 to variances


def update_of(payload: Payload, weights: torch.Tensor, statistics: torch.Tensor | None = None) -> ClientUpdate:
    architecture = payload.architecture
    return ClientUpdate(
        client=3,
        round=1,
        mask_version=0,
        num_examples=5,
        weights=weights,
        statistics=payload.statistics if statistics is None else statistics,
        operation_logits=architecture.operation_logits.detach(),
        input_logits=architecture.input_logits.detach(),
    )


def payload_for(architecture: Architecture) -> Payload:
    net = Supernet(architecture.spec, architecture.operation_mask)
    plan = RoundPlan(1, 9, 0, 1, 9, "search", 1.0, 0.0, True, False, 8, (1,), 0.0, 0)
    return Payload(net.weights.detach(), net.statistics, architecture, plan)


def sent_weights(update: ClientUpdate, payload: Payload, kind: str) -> torch.Tensor:
    assert update.changes is not None
    return apply_changes((payload.weights, payload.statistics), update.changes, kind)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_sends_later_what_it_has_lost(kind: str) -> None:
    spec = small_spec()
    full, pruned = Architecture(spec), random_masks(random_architecture(spec, 1), stream(2), 0.4)
    before, after = payload_for(full), payload_for(pruned)
    layouts = [Supernet(spec, each.operation_mask, "meta").weight_layout for each in (full, pruned)]
    change = torch.randn(layouts[0].size, generator=stream(3))
    first, kept = compressed(update_of(before, change), before, kind, {})
    lost = layouts[0].select(change - sent_weights(first, before, kind), layouts[1])
    assert float(lost.abs().max()) > 0
    # Nothing was learned the second time, by a smaller network: what travels is what was lost.
    second, _ = compressed(update_of(after, torch.zeros(layouts[1].size)), after, kind, kept)
    torch.testing.assert_close(
        sent_weights(second, after, kind), lost, rtol=0.0, atol=3 * FINENESS["int8"] * float(lost.abs().max())
    )


@pytest.mark.parametrize("what", ["weights", "statistics"])
def test_what_has_diverged_is_not_kept_for_later(what: str) -> None:
    payload = payload_for(Architecture(small_spec()))
    good = update_of(payload, torch.randn(len(payload.weights), generator=stream(1)))
    _, kept = compressed(good, payload, "int8", {"private/weights": torch.ones(1)})
    assert set(kept) == {"private/weights", "compression/stream", "compression/mask"}
    bad = {"weights": payload.weights.clone(), "statistics": payload.statistics.clone()}
    bad[what][0] = math.nan
    update, now = compressed(update_of(payload, bad["weights"], bad["statistics"]), payload, "int8", kept)
    assert sent_weights(update, payload, "int8").isnan().any() == (what == "weights")
    assert all(torch.equal(kept[name], now[name]) for name in kept)


def test_what_is_kept_shrinks_with_the_network() -> None:
    spec = small_spec()
    full, pruned = Architecture(spec), random_masks(random_architecture(spec, 1), stream(2), 0.4)
    layouts = [Supernet(spec, each.operation_mask, "meta").weight_layout for each in (full, pruned)]
    stored = encode(torch.arange(layouts[0].size, dtype=torch.float32), RESIDUAL_KIND)
    values = decode(stored, layouts[0].size, RESIDUAL_KIND)
    kept = Residual(stored, full.operation_mask).restricted(spec, pruned.operation_mask)
    assert torch.equal(kept, layouts[0].select(values, layouts[1]))
    regrown = Residual(encode(kept, RESIDUAL_KIND), pruned.operation_mask).restricted(spec, full.operation_mask)
    assert torch.equal(regrown, torch.zeros(layouts[0].size))


def test_the_key_names_the_kinds() -> None:
    for kind in ("none", *KINDS):
        assert Config.from_mapping({"compression": kind}).compression == kind
    with pytest.raises(RefusalError, match="choose one of none, float16, int8"):
        Config.from_mapping({"compression": "int4"})
