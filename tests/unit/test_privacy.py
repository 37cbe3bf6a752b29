"""Clipping, noise and the accountant, with numbers by hand; what would break the guarantee is refused."""

from dataclasses import replace
from itertools import chain, repeat
from math import log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_spec, stream
from local_grid import LocalGrid, run_all

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.federation.privacy import Privacy, epsilon
from fedmetanas_core.federation.update import ClientUpdate, Payload
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.runs import begin_run
from server_app.roster import Roster

PRIVATE = {"dp_clip": 1.0, "dp_noise": 1.0, "weighting": "equal"}
NO_VARIANCES = torch.empty(0, dtype=torch.long)


def sent_and_learned() -> tuple[Payload, ClientUpdate]:
    """Changes of 3 in one weight and of 4 in one alpha: together of length 5."""
    method = make_method(Config.from_mapping({"num_rounds": 10}).resolve(8, 8, 100), small_spec())
    state = method.initial_state()
    sent = method.payload(state, 0, method.plan(4))
    update = ClientUpdate(
        client=0,
        round=4,
        mask_version=0,
        num_examples=64,
        weights=state.weights.clone(),
        statistics=state.statistics.clone(),
        operation_logits=state.architecture.operation_logits.detach().clone(),
        input_logits=state.architecture.input_logits.detach().clone(),
        metrics={"train_loss": 0.7, "support_loss": 0.9, "seconds": 1.0},
    )
    update.weights[5] += 3.0
    assert update.operation_logits is not None
    update.operation_logits[0, 0, 2] += 4.0
    return sent, update


def length(sent: Payload, update: ClientUpdate) -> float:
    before = (sent.weights, sent.statistics, *(logits.detach() for logits, _ in sent.architecture.rows()))
    return sqrt(
        sum(
            float((now - then).square().sum())
            for now, then in zip(update.named_tensors().values(), before, strict=True)
        )
    )


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 1.0), (2.5, 2.5), (10.0, 5.0)])
def test_the_whole_change_is_clipped_to_one_length(clip: float, expected: float) -> None:
    sent, update = sent_and_learned()
    found = Privacy(clip, 0.0, 4).protect(update, sent, NO_VARIANCES)
    assert length(sent, found) == pytest.approx(expected, rel=1e-4)
    factor = expected / 5.0
    assert float(found.weights[5] - sent.weights[5]) == pytest.approx(3.0 * factor, rel=1e-4)
    assert found.operation_logits is not None
    logit = float(found.operation_logits[0, 0, 2] - sent.architecture.operation_logits[0, 0, 2].detach())
    assert logit == pytest.approx(4.0 * factor, rel=1e-4)


def test_each_of_four_clients_adds_half_the_deviation() -> None:
    """noise 3, clip 2, 4 clients: 3 * 2 / sqrt(4) = 3 for every value, so that the sum of four has 6."""
    sent, update = sent_and_learned()
    found = Privacy(2.0, 3.0, 4).protect(update, sent, NO_VARIANCES, stream(1))
    without = Privacy(2.0, 0.0, 4).protect(update, sent, NO_VARIANCES)
    noise = torch.cat(
        [
            (a - b).flatten()
            for a, b in zip(found.named_tensors().values(), without.named_tensors().values(), strict=True)
        ]
    )
    assert abs(float(noise.mean())) < 4 * 3.0 / sqrt(len(noise))
    assert float(noise.std()) == pytest.approx(3.0, abs=4 * 3.0 / sqrt(2 * len(noise)))


def test_noise_cannot_be_drawn_again_and_figures_stay_at_home() -> None:
    sent, update = sent_and_learned()
    one, two = (Privacy(1.0, 1.0, 4).protect(update, sent, NO_VARIANCES) for _ in range(2))
    assert not torch.equal(one.weights, two.weights)
    assert (one.num_examples, one.metrics["train_loss"], one.metrics["support_loss"]) == (1, 0.0, 0.0)
    assert one.metrics["seconds"] == 1.0


def test_variances_stay_above_zero() -> None:
    sent, update = sent_and_learned()
    every = torch.arange(len(update.statistics))
    found = Privacy(1.0, 50.0, 1).protect(update, sent, every, stream(2))
    assert float(found.statistics.min()) == 0.0


def test_the_accountant_agrees_with_the_gaussian_mechanism_by_hand() -> None:
    """All 4 of 4 clients, once: Renyi epsilon a / (2 s^2) at order a, with s = noise / 2, converted at the best order.

    The classical conversion, a / (2 s^2) + log(1/delta) / (a - 1), bounds it from above.
    """
    delta, noise = 1e-5, 8.0
    s = noise / 2
    bound = min(a / (2 * s * s) + log(1 / delta) / (a - 1) for a in (1 + x / 10 for x in range(1, 640)))
    found = epsilon(Privacy(1.0, noise, 4), [4], 4, delta)
    assert 0.5 * bound < found <= bound


def test_more_rounds_cost_more_more_noise_and_rarer_sampling_less_and_missing_noise_more() -> None:
    privacy = Privacy(1.0, 2.0, 5)
    once = epsilon(privacy, [5] * 10, 100, 1e-5)
    assert epsilon(privacy, [5] * 20, 100, 1e-5) > once
    assert epsilon(replace(privacy, noise=4.0), [5] * 10, 100, 1e-5) < once
    assert epsilon(privacy, [5] * 10, 1000, 1e-5) < once
    assert epsilon(privacy, [3] * 10, 100, 1e-5) > once, "two left out, and their noise with them"
    assert epsilon(privacy, [5] * 10 + [0] * 5, 100, 1e-5) == once, "a void round publishes nothing"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dp_noise": 0.0}, "dp_noise: 0 gives no privacy"),
        ({"weighting": "examples"}, "weighting"),
        ({"averaging": "median"}, "averaging"),
        ({"compression": "int8"}, "compression"),
        ({"prune_score": "perturb"}, "prune_score"),
        ({"prune_rule": "client_vote"}, "send more than one whole, clipped change"),
        ({"method": "fedrlnas"}, "clients of fedrlnas send more"),
        ({"method": "fedrep"}, "clients of fedrep send more"),
        ({"method": "meta_dnas"}, "clients of meta_dnas send more"),
        ({"dp_clip": 0.0}, "dp_noise: noise without a clipping norm"),
    ],
)
def test_what_would_break_the_promise_is_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match=words):
        prepare_experiment(Config.from_mapping({**PRIVATE, **keys}), tmp_path)


def test_a_private_run_tells_what_it_has_spent_and_no_losses(tmp_path: Path) -> None:
    small = {"num_clients": 6, "clients_per_round": 3, "num_rounds": 4, "init_channels": 2, "num_nodes": 2}
    experiment = prepare_experiment(Config.from_mapping({**PRIVATE, **small, "local_epochs": 1}), tmp_path)
    run = begin_run(tmp_path, "run", experiment, tmp_path)
    summary = run_all(run, LocalGrid(6))
    rows = run.folder.rounds.read()
    spent = [row["epsilon"] for row in rows]
    assert spent == sorted(spent)
    assert spent[-1] == summary["epsilon"] == epsilon(Privacy(1.0, 1.0, 3), [3] * 4, 6, 1e-5)
    assert {row["train_loss"] for row in rows} == {None}
    assert summary["updates_excluded"] == 0


def test_the_accountant_goes_by_the_fewest_clients_that_a_round_was_drawn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever knows that two of six were away knows more of who took part."""
    small = {"num_clients": 6, "clients_per_round": 3, "num_rounds": 3, "init_channels": 2, "num_nodes": 2}
    experiment = prepare_experiment(Config.from_mapping({**PRIVATE, **small, "local_epochs": 1}), tmp_path)
    run, there = begin_run(tmp_path, "run", experiment, tmp_path), chain([6, 4], repeat(6))
    monkeypatch.setattr(Roster, "free", lambda roster: roster.connected()[: next(there)])
    run_all(run, LocalGrid(6))
    privacy = Privacy(1.0, 1.0, 3)
    assert [row["epsilon"] for row in run.folder.rounds.read()] == [
        epsilon(privacy, [3], 6, 1e-5),
        epsilon(privacy, [3] * 2, 4, 1e-5),
        epsilon(privacy, [3] * 3, 4, 1e-5),
    ]
