"""The one engine behind every method, on a client: its training, what it keeps for itself, the model it would use."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedmetanas_core.federation.update import RENEWAL, ClientUpdate, Evaluation, Payload, RoundPlan, ServerState
from fedmetanas_core.methods.method import Method, final_space
from fedmetanas_core.search.evaluation import accuracy, refresh_statistics
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.local_search import local_search
from fedmetanas_core.search.pruning import propose
from fedmetanas_core.search.relaxation import Relaxation
from fedmetanas_core.space.architecture import CHANGING, Architecture
from fedmetanas_core.space.models import borrow, layouts
from fedmetanas_core.space.parts import part_layout
from fedmetanas_core.space.spec import CELL_KINDS, SpaceSpec

Memory = dict[str, Tensor]  # what a client keeps for itself, by name
_MASKS = ("operation_mask", "input_mask")


def local_update(
    method: Method, payload: Payload, client: int, data: LocalData, memory: Memory | None = None
) -> tuple[ClientUpdate, Memory]:
    """A client's share of the round, and what it keeps for itself from now on."""
    memory = memory or {}
    if payload.plan.phase == RENEWAL:
        return _renewed(payload, client, data), memory
    whole = completed(method, payload, memory, method.recipe.share.resumes)
    update = local_search(whole, client, data, method.stage(payload.plan).local)
    if method.recipe.personal.masks is not None:
        update = replace(update, touched=whole.architecture.operation_mask.clone())
    return _given_away(method, update, payload, whole.architecture), _kept(method, update, whole, memory)


def _renewed(payload: Payload, client: int, data: LocalData) -> ClientUpdate:
    """The statistics that the client's images give a one-hot network, and nothing else."""
    architecture, device = payload.architecture, data.images.device
    network = borrow(architecture.spec, architecture.operation_mask, device)
    network.load(payload.weights, payload.statistics)
    refresh_statistics(network, data)
    return ClientUpdate(
        client,
        payload.plan.round,
        architecture.version,
        len(data),
        torch.empty(0),
        network.statistics.clone().cpu(),
        metrics={"train_loss": 0.0, "support_loss": 0.0},
    )


def _given_away(method: Method, update: ClientUpdate, sent: Payload, architecture: Architecture) -> ClientUpdate:
    """An update without what does not travel."""
    full = layouts(architecture.spec, architecture.operation_mask)
    wanted = method.returned_layouts(architecture, update)
    weights, statistics = (
        flat if layout == part else layout.select(flat, part)
        for layout, part, flat in zip(full, wanted, (update.weights, update.statistics), strict=True)
    )
    operations, pairs = update.alpha_gradient or (update.operation_logits, update.input_logits)
    return replace(
        update,
        weights=weights,
        statistics=statistics,
        operation_logits=operations if sent.alphas and operations is not None and operations.numel() else None,
        input_logits=pairs if sent.alphas and pairs is not None and pairs.numel() else None,
        alpha_gradient=None,
    )


def completed(method: Method, payload: Payload, memory: Mapping[str, Tensor], resumes: bool) -> Payload:
    """A payload with everything that its network has: with what the client keeps, or how all began in its place."""
    share, plan = method.recipe.share, payload.plan
    if share.kept == "all" and ((resumes and memory) or share.down == "none"):
        return _own(method, payload, memory)
    if method.recipe.personal.masks is not None:
        return _with_own_masks(payload, memory)
    if share.down == "all":
        return payload
    spec, mask = payload.architecture.spec, payload.architecture.operation_mask
    begin = method.beginning(plan.stage)
    flats = []
    for name, layout, came in zip(
        ("weights", "statistics"), layouts(spec, mask), (payload.weights, payload.statistics), strict=True
    ):
        fresh: Tensor = getattr(begin, name)
        views, sources = layout.views(fresh), [(part_layout(layout, share.down, spec), came)]
        if resumes and name in memory:
            sources.append((part_layout(layout, share.kept, spec), memory[name]))
        for part, flat in sources:
            for key, value in part.views(flat).items():
                views[key].copy_(value)
        flats.append(fresh)
    return replace(payload, weights=flats[0], statistics=flats[1])


def _own(method: Method, payload: Payload, memory: Mapping[str, Tensor]) -> Payload:
    """The client's own state, as far as it has come, in the plan's stage."""
    plan, state = payload.plan, None
    if memory:
        stage = int(memory["stage"])
        architecture = Architecture(method.recipe.stages[stage].space)
        architecture.load_state_dict({**architecture.state_dict(), **{key: memory[key] for key in CHANGING}})
        state = ServerState(architecture.spec, memory["weights"], memory["statistics"], architecture, stage=stage)
    state = method.enter(method.initial_state() if state is None else state, plan)
    state.architecture.version = payload.architecture.version
    return Payload(state.weights, state.statistics, state.architecture, plan, alphas=False)


def _with_own_masks(payload: Payload, memory: Mapping[str, Tensor]) -> Payload:
    """What came, without the operations of the personal cells that the client has pruned."""
    if "operation_mask" not in memory:
        return payload
    own = payload.architecture.clone()
    operations, pairs = (mask.clone() for mask in (own.operation_mask, own.input_mask))
    first = len(CELL_KINDS)
    operations[first:] &= memory["operation_mask"][first:]
    pairs[first:] &= memory["input_mask"][first:]
    own.restrict(operations, pairs)
    own.version = payload.architecture.version
    return _selected(payload, own)


def _selected(payload: Payload, architecture: Architecture) -> Payload:
    """A payload pruned to the masks of this architecture, with its logits."""
    spec = architecture.spec
    old, new = (layouts(spec, each.operation_mask) for each in (payload.architecture, architecture))
    return replace(
        payload,
        weights=old[0].select(payload.weights, new[0]),
        statistics=old[1].select(payload.statistics, new[1]),
        architecture=architecture,
    )


def _kept(method: Method, update: ClientUpdate, whole: Payload, memory: Memory) -> Memory:
    """What the client stores after its training."""
    part, architecture = method.recipe.share.kept, whole.architecture
    if method.recipe.personal.masks is not None:
        return {**memory, **own_masks(method, _trained(architecture, update), whole.plan)}
    if part == "none":
        return memory
    spec = architecture.spec
    kept: Memory = {}
    for name, layout in zip(("weights", "statistics"), layouts(spec, architecture.operation_mask), strict=True):
        kept[name] = layout.select(getattr(update, name), part_layout(layout, part, spec))
    if part == "all":
        kept.update({name: getattr(architecture, name).clone() for name in _MASKS})
        kept.update({name: getattr(update, name) for name in ("operation_logits", "input_logits")})
        kept["stage"] = torch.tensor(whole.plan.stage)
    return kept


def _trained(architecture: Architecture, update: ClientUpdate) -> Architecture:
    """The architecture with the logits that training has left."""
    own = architecture.clone()
    with torch.no_grad():
        for name in ("operation_logits", "input_logits"):
            getattr(own, name).copy_(getattr(update, name))
    return own


def own_masks(method: Method, architecture: Architecture, plan: RoundPlan) -> Memory:
    """Masks after the client's own prune of its personal cells in this round, by the caps that hold in it."""
    rule, own = method.recipe.personal.masks, architecture.clone()
    if rule is not None and plan.stage_round >= method.recipe.personal.masks_from:
        kept, _ = propose(own, plan.temperature, rule, plan.operation_cap, plan.pair_caps)
        own.restrict(*kept)
    return {name: getattr(own, name) for name in _MASKS}


def measure(payload: Payload, relaxation: Relaxation, data: LocalData) -> float:
    """Accuracy of what is there, as it is."""
    device = data.images.device
    architecture = payload.architecture.clone().to(device)
    network = borrow(architecture.spec, architecture.operation_mask, device)
    network.load(payload.weights, payload.statistics)
    network.eval()
    with torch.no_grad():
        weights = relaxation.expected(architecture, payload.plan.temperature)
    return accuracy(lambda images: network(images, weights), data)


def personal_model(
    method: Method, payload: Payload, client: int, data: LocalData, memory: Mapping[str, Tensor]
) -> Payload:
    """The model that the client would use, made of what it has by training on its own images."""
    personal = method.recipe.personal
    whole = completed(method, payload, memory, resumes=True)
    if personal.search is not None:
        plan = replace(whole.plan, adapts_architecture=True)
        update = local_search(replace(whole, plan=plan), client, data, personal.search)
        whole = _after(whole, update)
    if personal.derive is not None:
        genotype, architecture = personal.derive(whole.architecture, client), whole.architecture.clone()
        architecture.restrict(*genotype.masks(architecture.spec))  # type: ignore[arg-type]
        whole = _selected(whole, architecture)
    if personal.tune is not None:
        plan = replace(whole.plan, adapts_architecture=False)
        whole = _after(whole, local_search(replace(whole, plan=plan), client, data, personal.tune))
    return whole


def _after(payload: Payload, update: ClientUpdate) -> Payload:
    return replace(
        payload,
        weights=update.weights,
        statistics=update.statistics,
        architecture=_trained(payload.architecture, update),
    )


def evaluate_client(
    method: Method,
    payload: Payload,
    client: int,
    data: LocalData,
    held_out: LocalData,
    memory: Mapping[str, Tensor],
) -> Evaluation:
    """Accuracy on held-out images of what the server sent and of the client's own model, trained on ``data``.

    A network of an architecture of its own goes along, for the run folder.
    """
    relaxation = method.stage(payload.plan).local.outer.relaxation
    before = measure(completed(method, payload, memory, method.recipe.share.resumes), relaxation, held_out)
    own = personal_model(method, payload, client, data, memory)
    metrics = {"accuracy": before, "accuracy_adapted": measure(own, relaxation, held_out)}
    metrics["accuracy_used"] = metrics["accuracy_adapted" if method.recipe.personal.is_the_point else "accuracy"]
    if not method.recipe.personal.own_architecture:
        return Evaluation(client, len(held_out), metrics)
    genotype, spec = method.stage(payload.plan).derive, own.architecture.spec
    assert genotype is not None
    assert isinstance(spec, SpaceSpec)
    mask = own.architecture.operation_mask
    weights, statistics = (
        own_layout.select(flat, layout)
        for own_layout, layout, flat in zip(
            layouts(spec, mask), layouts(final_space(spec), mask), (own.weights, own.statistics), strict=True
        )
    )
    return Evaluation(client, len(held_out), metrics, genotype(own.architecture).to_json(), weights, statistics)
