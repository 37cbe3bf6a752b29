"""One client's search: pure, reproducible, right for small clients, and with statistics of what it returns."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from helpers import random_architecture, random_masks, random_one_hot, random_supernet, small_spec, stream
from torch import Tensor, nn

from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.local_search import LocalOptions, Phase, local_search
from fedmetanas_core.search.pruning import PruneRule
from fedmetanas_core.search.relaxation import Relaxation, relax
from fedmetanas_core.search.schedule import Schedule
from fedmetanas_core.search.steps import Fomaml
from fedmetanas_core.search.tasks import OuterOptions
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.edge_weights import EdgeWeights
from fedmetanas_core.space.models import borrow
from fedmetanas_core.space.operations import BatchNorm
from fedmetanas_core.space.spec import PRIMITIVES
from fedmetanas_core.space.supernet import Supernet

SPEC = small_spec()
SCHEDULE = Schedule(num_rounds=20, num_nodes=SPEC.num_nodes, seed=3)
WARM_UP, SEARCH, ONE_HOT = (SCHEDULE.plan(number) for number in (1, 5, 19))
PER_CELL = OuterOptions(relaxation=Relaxation(sample="per_cell"))


def meta(epochs: int, **learner: int) -> tuple[Phase, ...]:
    """So many epochs of the dual learner."""
    return (Phase(Fomaml(**learner), epochs),)


OPTIONS = LocalOptions(phases=meta(2), batch_size=4)


def data_of(count: int, dtype: torch.dtype = torch.float32, label: int | None = None) -> LocalData:
    """Noise plus a class-dependent shade; preparing adds noise where a generator is given, as augmentation would."""
    labels = torch.arange(count) % SPEC.num_classes if label is None else torch.full((count,), label)
    images = torch.rand(count, 1, 8, 8, generator=stream(4), dtype=dtype) + labels.view(-1, 1, 1, 1).to(dtype) / 3

    def prepare(batch: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return batch - 0.5
        return batch - 0.5 + 0.1 * torch.rand(batch.shape, generator=generator, dtype=batch.dtype)

    return LocalData(images, labels, prepare)


def payload_of(
    plan: RoundPlan = SEARCH, architecture: Architecture | None = None, dtype: torch.dtype = torch.float32
) -> Payload:
    architecture = architecture or random_architecture(SPEC, 1, 0.1, dtype)
    supernet = random_supernet(SPEC, architecture.operation_mask, 2, dtype)
    return Payload(supernet.weights.detach().clone(), supernet.statistics.clone(), architecture, plan)


def assert_same(one: ClientUpdate, other: ClientUpdate) -> None:
    for name, tensor in one.named_tensors().items():
        assert torch.equal(tensor, other.named_tensors()[name]), name
    assert one.metrics == other.metrics


def centred(logits: Tensor, mask: Tensor) -> Tensor:
    mean = logits.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
    return (logits - mean).masked_fill(~mask, 0.0).detach()


def test_an_update_says_who_when_and_how_much() -> None:
    update = local_search(payload_of(), 7, data_of(10), OPTIONS)
    assert (update.client, update.round, update.mask_version, update.num_examples) == (7, 5, 0, 10)
    assert update.votes is None
    assert all(bool(torch.isfinite(tensor).all()) for tensor in update.named_tensors().values())
    assert update.metrics["train_loss"] > 0
    assert update.metrics["support_loss"] > 0
    payload = payload_of()
    assert not torch.equal(update.weights, payload.weights)
    for found, (logits, mask) in zip(
        (update.operation_logits, update.input_logits), payload.architecture.rows(), strict=True
    ):
        rows = mask.sum(-1) > 1
        assert bool((found != centred(logits, mask))[rows].any())
        assert not found.requires_grad


@pytest.mark.parametrize("plan", [WARM_UP, SEARCH, ONE_HOT])
@pytest.mark.parametrize("vote", [None, PruneRule()])
def test_nothing_of_the_payload_or_the_data_changes(plan: RoundPlan, vote: PruneRule | None) -> None:
    payload, data = payload_of(plan), data_of(10)
    tensors = [
        payload.weights,
        payload.statistics,
        data.images,
        data.labels,
        *payload.architecture.state_dict().values(),
    ]
    before = [tensor.clone() for tensor in tensors]
    local_search(payload, 0, data, replace(OPTIONS, vote=vote))
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
    assert payload.architecture.version == 0
    assert payload.architecture.operation_logits.grad is None


@pytest.mark.parametrize("sample", ["per_type", "per_cell"])
def test_the_same_plan_and_client_give_the_same_update(sample: str) -> None:
    options = replace(OPTIONS, outer=OuterOptions(relaxation=Relaxation(sample=sample)))
    one, other = (local_search(payload_of(), 3, data_of(10), options) for _ in range(2))
    assert_same(one, other)


def test_another_client_another_round_seed_and_another_sample_draw_differently() -> None:
    base = local_search(payload_of(), 3, data_of(10), OPTIONS).weights
    others = [
        local_search(payload_of(), 4, data_of(10), OPTIONS),
        local_search(payload_of(replace(SEARCH, seed=SEARCH.seed + 1)), 3, data_of(10), OPTIONS),
        local_search(payload_of(), 3, data_of(10), replace(OPTIONS, outer=PER_CELL)),
    ]
    assert not any(torch.equal(base, other.weights) for other in others)


def test_no_global_generator_is_touched() -> None:
    before = torch.random.get_rng_state()
    local_search(payload_of(), 3, data_of(10), OPTIONS)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("plan", [WARM_UP, ONE_HOT])
def test_alphas_are_frozen_outside_the_search_phase_up_to_centring(plan: RoundPlan) -> None:
    payload = payload_of(plan)
    update = local_search(payload, 0, data_of(10), OPTIONS)
    for found, (logits, mask) in zip(
        (update.operation_logits, update.input_logits), payload.architecture.rows(), strict=True
    ):
        torch.testing.assert_close(found, centred(logits, mask), rtol=0, atol=1e-7)
    assert not torch.equal(update.weights, payload.weights)


def test_rows_come_back_centred_over_the_alive() -> None:
    architecture = random_masks(random_architecture(SPEC, 1, 1.0), stream(1), 0.5)
    update = local_search(payload_of(SEARCH, architecture), 0, data_of(10), OPTIONS)
    for found, (_, mask) in zip((update.operation_logits, update.input_logits), architecture.rows(), strict=True):
        assert float(found.sum(-1).abs().max()) < 1e-5
        assert bool((found[~mask] == 0).all())


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_a_client_with_fewer_images_than_two_batches_still_learns(count: int) -> None:
    payload = payload_of()
    update = local_search(payload, 0, data_of(count), replace(OPTIONS, batch_size=32))
    assert update.num_examples == count
    assert not torch.equal(update.weights, payload.weights)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in update.named_tensors().values())


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_a_client_with_one_image_learns_with_the_statistics_it_came_with(inner_steps: int) -> None:
    payload = payload_of()
    update = local_search(payload, 0, data_of(1), replace(OPTIONS, phases=meta(2, inner_steps=inner_steps)))
    assert torch.equal(update.statistics, payload.statistics)
    assert not torch.equal(update.weights, payload.weights)
    assert bool(torch.isfinite(update.weights).all())


def test_a_client_with_a_single_label_learns_it() -> None:
    options = LocalOptions(phases=meta(10), batch_size=4)
    update = local_search(payload_of(WARM_UP), 0, data_of(8, label=2), options)
    start = local_search(payload_of(WARM_UP), 0, data_of(8, label=2), replace(options, phases=meta(1)))
    assert bool(torch.isfinite(update.weights).all())
    assert update.metrics["train_loss"] < start.metrics["train_loss"]


def test_a_client_without_data_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="client 11"):
        local_search(payload_of(), 11, data_of(0), OPTIONS)


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_a_pruned_supernet_is_searched_and_keeps_its_shapes_and_masks(keep: float) -> None:
    architecture = random_masks(random_architecture(SPEC, 1, 0.1), stream(2), keep)
    payload = payload_of(SEARCH, architecture)
    update = local_search(payload, 0, data_of(10), OPTIONS)
    assert update.mask_version == architecture.version == 1
    assert update.weights.shape == payload.weights.shape
    assert len(update.weights) < len(payload_of().weights)
    assert bool((update.operation_logits[~architecture.operation_mask] == 0).all())


def plain_moments(
    update: ClientUpdate,
    architecture: Architecture,
    data: LocalData,
    temperature: float,
    masks: Architecture | None = None,
) -> Tensor:
    """Mean and variance of the input of every batch norm, in one pass over all data, noise-free.

    The network holds what ``architecture`` has alive; the weights are those among what ``masks`` has alive.
    """
    searched = (masks or architecture).clone()
    with torch.no_grad():
        searched.operation_logits.copy_(update.operation_logits)
        searched.input_logits.copy_(update.input_logits)
    supernet = Supernet(SPEC, architecture.operation_mask, dtype=torch.float64)
    supernet.load(update.weights, update.statistics)
    found: dict[str, Tensor] = {}

    def record(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[f"{name}.running_mean"] = inputs[0].mean(dim=(0, 2, 3))
            found[f"{name}.running_var"] = inputs[0].var(dim=(0, 2, 3), correction=0)

        supernet.get_submodule(name).register_forward_pre_hook(hook)

    for name, module in supernet.named_modules():
        if isinstance(module, BatchNorm):
            record(name)
    supernet.collect_moments()  # norms that collect are called one by one, so that the hooks see them
    with torch.no_grad():
        supernet.train().forward_by_modules(data.prepare(data.images, None), relax(searched, temperature))
    return torch.cat([found[name] for name, _ in supernet.statistic_layout.entries])


@pytest.mark.parametrize("plan", [WARM_UP, SEARCH])
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_statistics_are_the_moments_of_the_clients_data_at_the_returned_weights(plan: RoundPlan, keep: float) -> None:
    architecture = random_masks(random_architecture(SPEC, 1, 1.0, torch.float64), stream(5), keep)
    payload, data = payload_of(plan, architecture, torch.float64), data_of(11, torch.float64)
    update = local_search(payload, 0, data, OPTIONS)
    expected = plain_moments(update, architecture, data, plan.temperature)
    torch.testing.assert_close(update.statistics, expected, rtol=1e-9, atol=1e-9)


def test_a_one_hot_supernet_trains_its_weights_and_collects_its_moments() -> None:
    architecture = random_one_hot(random_architecture(SPEC, 1, 1.0, torch.float64), stream(5))
    payload, data = payload_of(ONE_HOT, architecture, torch.float64), data_of(11, torch.float64)
    update = local_search(payload, 0, data, OPTIONS)
    assert not torch.equal(update.weights, payload.weights)
    torch.testing.assert_close(update.statistics, plain_moments(update, architecture, data, 0.1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [2, 4])
def test_a_single_epoch_of_a_single_task_is_the_meta_step_written_out(count: int) -> None:
    # One batch each of one or two images: which ones is known up to the shuffle; no noise, no augmentation. A batch of
    # one image has no moments of its own, so batch norm takes the running ones.
    architecture = random_one_hot(random_architecture(SPEC, 1, 1.0, torch.float64), stream(5))
    payload, data = payload_of(ONE_HOT, architecture, torch.float64), data_of(count, torch.float64)
    data = LocalData(data.images, data.labels, lambda batch, _: batch)
    update = local_search(payload, 0, data, replace(OPTIONS, phases=meta(1)))

    def gradient(at: Tensor, chosen: tuple[int, ...]) -> Tensor:
        supernet = Supernet(SPEC, architecture.operation_mask, dtype=torch.float64)
        supernet.load(at, payload.statistics)
        images, labels = data.images[list(chosen)], data.labels[list(chosen)]
        loss = nn.functional.cross_entropy(supernet.train(count > 2)(images), labels)
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(supernet.parameters()))])
        return flat * min(1.0, 5.0 / float(flat.norm()))

    rate = 0.001 + 0.024 * (1 + torch.cos(torch.tensor(torch.pi * 18 / 20, dtype=torch.float64))) / 2
    candidates = []
    for support in combinations(range(count), count // 2):
        query = tuple(index for index in range(count) if index not in support)
        adapted = payload.weights - 0.01 * gradient(payload.weights, support)
        candidates.append(payload.weights - rate * (gradient(adapted, query) + 3e-4 * payload.weights))
    distances = [float((update.weights - candidate).abs().max()) for candidate in candidates]
    assert min(distances) < 1e-8
    assert sorted(distances)[1] > 1e-6


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batches_of_one_image_do_not_change_what_batch_norm_computes(count: int) -> None:
    """By its own moments a single image would be normalised to nearly nothing, and the network spoilt."""
    architecture = random_one_hot(random_architecture(SPEC, 1, 1.0, torch.float64), stream(5))
    payload, data = payload_of(ONE_HOT, architecture, torch.float64), data_of(count, torch.float64)
    sides = [local_search(payload, 0, data, replace(OPTIONS, batch_size=size)).weights for size in (1, 32)]
    torch.testing.assert_close(*sides)
    seen: list[bool] = []
    original = Supernet.forward

    def spy(self: Supernet, x: Tensor, weights: EdgeWeights | None = None) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(self.training)
        return original(self, x, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supernet, "forward", spy)
        local_search(payload, 0, data, OPTIONS)
    assert seen
    assert not any(seen)


def test_votes_are_keep_bits_within_the_payloads_masks_and_only_where_asked_for() -> None:
    architecture = random_masks(random_architecture(SPEC, 1, 2.0), stream(5), 0.7)
    payload = payload_of(replace(SEARCH, temperature=0.2), architecture)
    update = local_search(payload, 0, data_of(6), replace(OPTIONS, vote=PruneRule()))
    assert update.votes is not None
    for kept, (_, mask) in zip(update.votes, architecture.rows(), strict=True):
        assert not bool((kept & ~mask).any())
        assert bool((mask & ~kept).any())
    assert update.mask_version == architecture.version
    assert update.weights.shape == payload.weights.shape
    warm = local_search(replace(payload, plan=WARM_UP), 0, data_of(6), replace(OPTIONS, vote=PruneRule()))
    assert warm.votes is not None
    assert torch.equal(warm.votes[0], architecture.operation_mask)


def voted_down() -> tuple[Architecture, tuple[int, int, int], int]:
    """One-hot but for one operation far below the threshold; its place, and the operation that stays beside it."""
    architecture = random_one_hot(random_architecture(SPEC, 1, 1.0, torch.float64), stream(5))
    edge = int(architecture.edge_alive()[0].nonzero()[0])
    chosen = int(architecture.operation_mask[0, edge].nonzero()[0])
    other = PRIMITIVES.index("sep_conv_5x5" if PRIMITIVES[chosen] != "sep_conv_5x5" else "sep_conv_3x3")
    architecture.operation_mask[0, edge, other] = True
    with torch.no_grad():
        architecture.operation_logits[0, edge, chosen] = 5.0
        architecture.operation_logits[0, edge, other] = -5.0
    return architecture, (0, edge, other), chosen


def test_operations_that_a_client_voted_off_are_not_computed_as_if_they_were_kept() -> None:
    # The client's own masks become one-hot while its network still holds both operations of one edge.
    architecture, place, _ = voted_down()
    payload = payload_of(replace(SEARCH, temperature=0.1), architecture, torch.float64)
    data = data_of(6, torch.float64)
    update = local_search(payload, 0, data, replace(OPTIONS, vote=PruneRule()))
    assert update.votes is not None
    assert not update.votes[0][place]
    voted = architecture.clone()
    voted.restrict(*update.votes)
    supernet_moments = plain_moments(update, architecture, data, 0.1, voted)
    torch.testing.assert_close(update.statistics, supernet_moments, rtol=1e-6, atol=1e-6)


def test_a_vote_is_never_written_into_a_logit() -> None:
    # The others may keep the operation; the average must then see where this client's training left its logit.
    architecture, place, chosen = voted_down()
    payload = payload_of(replace(SEARCH, temperature=0.1), architecture, torch.float64)
    update = local_search(payload, 0, data_of(6, torch.float64), replace(OPTIONS, vote=PruneRule()))
    gap = update.operation_logits[0, place[1], chosen] - update.operation_logits[place]
    assert float(gap) == pytest.approx(10.0, abs=0.1)


def test_every_inner_step_of_a_task_uses_its_one_support_batch() -> None:
    # M is the number of steps per support batch (equation 6 has one T_s for all m), so M changes no pairing: preparing
    # a batch is seen once per support and once per query batch, whatever M is.
    for steps in (1, 5):
        seen: list[int] = []

        def prepare(batch: Tensor, generator: torch.Generator | None, seen: list[int] = seen) -> Tensor:
            if generator is not None:
                seen.append(len(batch))
            return batch

        data = data_of(32)
        data = LocalData(data.images, data.labels, prepare)
        options = LocalOptions(phases=meta(1, inner_steps=steps), batch_size=4)
        local_search(payload_of(SEARCH), 0, data, options)
        assert seen == [4] * 8


def test_a_search_leaves_nothing_behind_for_the_next_one() -> None:
    """Clients of one process use the same modules in turn."""
    architecture = random_masks(random_architecture(SPEC, 1), stream(5), 0.6)
    payload, data = payload_of(SEARCH, architecture), data_of(11)
    first = local_search(payload, 0, data, OPTIONS)
    kept = {name: tensor.clone() for name, tensor in first.named_tensors().items()}
    local_search(payload, 1, data_of(7, label=1), OPTIONS)
    coloured = LocalData(data.images.repeat(1, 2, 1, 1), data.labels, lambda batch, _: batch)
    with pytest.raises(RuntimeError):
        local_search(payload, 1, coloured, OPTIONS)
    again = local_search(payload, 0, data, OPTIONS)
    for name, tensor in first.named_tensors().items():
        assert torch.equal(tensor, kept[name]), name
        assert torch.equal(again.named_tensors()[name], kept[name]), name


def test_a_borrowed_network_is_made_once_for_a_structure() -> None:
    architecture = random_masks(random_architecture(SPEC, 1), stream(5), 0.6)
    full = Architecture(SPEC)
    borrowed = borrow(SPEC, architecture.operation_mask)
    borrowed.collect_moments()
    assert borrowed.weights.grad is not None
    borrowed.weights.grad.fill_(1.0)
    assert borrow(SPEC, full.operation_mask) is not borrowed
    assert borrow(SPEC, architecture.operation_mask) is borrowed
    assert borrowed.moments is None
    assert not borrowed.weights.grad.any()
    assert borrow(SPEC, architecture.operation_mask, dtype=torch.float64) is not borrowed
