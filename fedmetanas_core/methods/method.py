"""The one engine behind every method, on the server: it puts a recipe's parts to work from round to round."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from fedmetanas_core.errors import FedMetaNASError
from fedmetanas_core.federation.averaging import Combine, moment_positions, places, pooled_statistics, weighted_mean
from fedmetanas_core.federation.policy import Sent
from fedmetanas_core.federation.robust import krum
from fedmetanas_core.federation.update import RENEWAL, ClientUpdate, Payload, RoundPlan, ServerState
from fedmetanas_core.methods.recipe import Recipe, Stage
from fedmetanas_core.search.local_search import returned_mask
from fedmetanas_core.search.pruning import PruneReport
from fedmetanas_core.seeds import derive_seed, torch_stream
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.fixed import Space
from fedmetanas_core.space.flat import Layout
from fedmetanas_core.space.genotype import Genotype
from fedmetanas_core.space.models import build, layouts
from fedmetanas_core.space.network import Network
from fedmetanas_core.space.parts import part_layout
from fedmetanas_core.space.spec import SpaceSpec


def final_space(space: SpaceSpec) -> SpaceSpec:
    """The space of networks that are cut out: without what serves training alone."""
    return replace(space, auxiliary=False)


class Method:
    """An algorithm as a value: state in, state out. ``seed`` is the run's.

    ``combine`` makes one value of the clients' values; with ``krum_share``, of those that Krum keeps where so large a
    share may be false. ``weighs_equally``: not by examples.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        combine: Combine = weighted_mean,
        krum_share: float | None = None,
        weighs_equally: bool = False,
    ) -> None:
        self.recipe, self.seed, self.combine = recipe, seed, combine
        self.krum_share, self.weighs_equally = krum_share, weighs_equally
        self.num_rounds = sum(stage.rounds for stage in recipe.stages)
        self._beginnings: dict[int, ServerState] = {}

    # ---- what happens when

    def plan(self, round_number: int) -> RoundPlan:
        """What happens in this round, counted from 1.

        Stages that continue each other count their rounds together, so that rates do not start anew.
        """
        stages = self.recipe.stages
        starts = [0, *accumulate(stage.rounds for stage in stages[:-1])]
        index = max(place for place, first in enumerate(starts) if first < round_number)
        stage, before = stages[index], starts[index]
        start = max(first for first, each in zip(starts[: index + 1], stages, strict=False) if not each.continues)
        more = takewhile(lambda later: later.continues, stages[index + 1 :])
        return replace(
            stage.planner.plan(round_number - before),
            round=round_number,
            num_rounds=self.num_rounds,
            stage=index,
            stage_round=round_number - start,
            stage_rounds=before + stage.rounds - start + sum(later.rounds for later in more),
            seed=derive_seed(self.seed, "round", round_number),
        )

    def stage(self, plan: RoundPlan) -> Stage:
        """The stage that a plan belongs to."""
        return self.recipe.stages[plan.stage]

    def space_of(self, plan: RoundPlan) -> Space:
        """The space in which a round takes place."""
        return self.stage(plan).space

    # ---- the server

    def initial_state(self) -> ServerState:
        """The state before round 1."""
        return self.beginning(0)

    def beginning(self, index: int) -> ServerState:
        """The first state of a stage that begins with nothing, drawn once for all who ask."""
        if index not in self._beginnings:
            self._beginnings[index] = self._begin(index, None)
        kept = self._beginnings[index]
        return replace(kept.copy(), weights=kept.weights.clone(), statistics=kept.statistics.clone())

    def enter(self, state: ServerState, plan: RoundPlan) -> ServerState:
        """The state with which this round begins: another one where it opens a new stage."""
        if state.stage == plan.stage:
            return state
        if self.recipe.stages[plan.stage].continues:
            return replace(state, stage=plan.stage)
        fresh = self._begin(plan.stage, self.derive(state))
        fresh.architecture.version = state.architecture.version + 1
        return replace(fresh, round=state.round, evaluations=list(state.evaluations))

    def _begin(self, index: int, genotype: Genotype | None) -> ServerState:
        """A stage's first state: random weights and nearly equal alphas, each from a stream of its own."""
        stage, indices = self.recipe.stages[index], [index] if index else []
        architecture = Architecture(stage.space)
        if stage.draw is not None and isinstance(stage.space, SpaceSpec):
            genotype = stage.draw(stage.space, torch_stream(self.seed, "random genotype"))
        if genotype is not None and isinstance(stage.space, SpaceSpec):
            architecture.restrict(*genotype.masks(stage.space))
        if stage.without_none:
            architecture.without_none()
        architecture.version = 0
        architecture.initialise(torch_stream(self.seed, "initial alphas", *indices))
        network = build(stage.space, architecture.operation_mask)
        network.initialise(torch_stream(self.seed, "initial weights", *indices))
        weights = network.weights.detach().clone()
        state = ServerState(stage.space, weights, network.statistics.clone(), architecture, stage=index)
        stage.architect.begin(state)
        return state

    def payload(self, state: ServerState, client: int, plan: RoundPlan) -> Payload:
        """What a client gets in this round."""
        return self._payload(state, self.stage(plan).architect.assign(state, client, plan), plan)

    def final_payload(self, state: ServerState, client: int, plan: RoundPlan) -> Payload:
        """What a client gets after the last round, to make its own model of."""
        return self._payload(state, self.stage(plan).architect.final(state, client), plan)

    def _payload(self, state: ServerState, architecture: Architecture, plan: RoundPlan) -> Payload:
        weights, statistics = state.weights, state.statistics
        if architecture is not state.architecture:
            weights, statistics = state.selected(architecture.operation_mask)
        whole = Payload(weights, statistics, architecture, plan, self.stage(plan).architect.travels)
        return self._reduced(whole, self.recipe.share.down)

    def _reduced(self, payload: Payload, part: str) -> Payload:
        if part == "all":
            return payload
        spec, mask = payload.architecture.spec, payload.architecture.operation_mask
        weights, statistics = (
            layout.select(flat, part_layout(layout, part, spec))
            for layout, flat in zip(layouts(spec, mask), (payload.weights, payload.statistics), strict=True)
        )
        return replace(payload, weights=weights, statistics=statistics, alphas=payload.alphas and part != "none")

    def expected(self, sent: Payload, update: ClientUpdate) -> dict[str, Tensor]:
        """Tensors of the shapes and dtypes that an answer must have, by name.

        FedMetaNASError for an answer whose own mask fits no network, or that lacks the reward it was asked for.
        """
        if update.touched is not None and update.touched.shape != sent.architecture.operation_mask.shape:
            raise FedMetaNASError(f"its mask has shape {tuple(update.touched.shape)}")
        if sent.plan.phase == RENEWAL:
            return {"weights": torch.empty(0), "statistics": sent.statistics}
        held_out = self.stage(sent.plan).local.held_out
        if held_out is not None and held_out.role == "reward" and "reward" not in update.metrics:
            raise FedMetaNASError("reward is missing")
        weights, statistics = self.returned_layouts(sent.architecture, update)
        like = {"weights": torch.empty(weights.size), "statistics": torch.empty(statistics.size)}
        if sent.alphas:
            rows = zip(("operation_logits", "input_logits"), sent.architecture.rows(), strict=True)
            like.update({name: logits.detach() for name, (logits, _) in rows if logits.numel()})
        return like

    def variances(self, sent: Payload, update: ClientUpdate) -> Tensor:
        """Positions of the variances among the statistics that came back."""
        if sent.plan.phase == RENEWAL:
            layout = layouts(sent.architecture.spec, sent.architecture.operation_mask)[1]
        else:
            layout = self.returned_layouts(sent.architecture, update)[1]
        return moment_positions(layout)[1]

    def changes(self, sent: Payload, update: ClientUpdate) -> dict[str, Tensor]:
        """What the client has changed of what it got, flat, by kind; of alphas the gradient, where that came."""
        spec, architecture = sent.architecture.spec, sent.architecture
        whole = layouts(spec, architecture.operation_mask)
        back, before, after = (
            self.returned_layouts(architecture, update),
            (sent.weights, sent.statistics),
            (update.weights, update.statistics),
        )
        found = {}
        for index, name in enumerate(("weights", "statistics")):
            old = part_layout(whole[index], self.recipe.share.down, spec).views(before[index])
            new = back[index].views(after[index])
            pieces = [(view - old[key]).reshape(-1) for key, view in new.items() if key in old]
            if pieces:
                found[name] = torch.cat(pieces)
        logits = (update.operation_logits, update.input_logits)
        pairs = [(now, then) for now, (then, _) in zip(logits, architecture.rows(), strict=True) if now is not None]
        if pairs:
            gradient = self.stage(sent.plan).architect.takes_gradients
            found["alphas"] = torch.cat([(now if gradient else now - then.detach()).reshape(-1) for now, then in pairs])
        return found

    def returned_layouts(self, architecture: Architecture, update: ClientUpdate) -> tuple[Layout, Layout]:
        """How the weights and statistics that travel back lie in their flat tensors."""
        spec, mask = architecture.spec, returned_mask(update, architecture)
        weights, statistics = (part_layout(each, self.recipe.share.up, spec) for each in layouts(spec, mask))
        return weights, statistics

    def aggregate(
        self, state: ServerState, sent: Sent, updates: Sequence[ClientUpdate], plan: RoundPlan
    ) -> ServerState:
        """The state after averaging the updates, given in client order: by N_k, batch-norm moments pooled.

        Every weight is averaged over those clients that had it.
        """
        updates = self._kept_by_krum(sent, updates)
        if self.weighs_equally:
            updates = [replace(update, num_examples=1) for update in updates]
        sizes = [float(update.num_examples) for update in updates]
        whole = layouts(state.spec, state.architecture.operation_mask)
        parts = [self.returned_layouts(sent[update.client].architecture, update) for update in updates]
        held = places([weights for weights, _ in parts], whole[0])
        fresh = replace(
            state.copy(),
            weights=self.combine([update.weights for update in updates], sizes, held, state.weights),
            statistics=pooled_statistics(
                [update.statistics for update in updates],
                sizes,
                whole[1],
                [statistics for _, statistics in parts],
                state.statistics,
                self.combine,
            ),
            round=plan.round,
            evaluations=list(state.evaluations),
        )
        self.stage(plan).architect.learn(fresh, sent, updates, plan, self.combine)
        return fresh

    def _kept_by_krum(self, sent: Sent, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        """Those that are to be averaged; all, unless Krum chooses among them."""
        if self.krum_share is None:
            return updates
        flat = [self.flat_change(sent[update.client], update) for update in updates]
        return [updates[at] for at in krum(flat, self.krum_share)]

    def flat_change(self, sent: Payload, update: ClientUpdate) -> Tensor:
        """What an update changes in weights and alphas, as one vector; of one length where all share everything."""
        changes = self.changes(sent, update)
        return torch.cat([changes[name] for name in ("weights", "alphas") if name in changes])

    def prune(self, state: ServerState, updates: Sequence[ClientUpdate], plan: RoundPlan) -> PruneReport | None:
        """Prune ``state`` in place if it is time; what was removed, or None if nothing was."""
        pruning = self.stage(plan).pruning
        return None if pruning is None else pruning(state, updates, plan)

    def renewal(self, state: ServerState, plan: RoundPlan) -> Payload:
        """What asks a client for the statistics of the network that the state would be cut down to."""
        genotype = self.derive(state)
        assert genotype is not None
        assert isinstance(state.spec, SpaceSpec)
        architecture = Architecture(state.spec)
        architecture.restrict(*genotype.masks(state.spec))
        asking = replace(plan, phase=RENEWAL)
        return Payload(*state.selected(architecture.operation_mask), architecture, asking, alphas=False)

    def ends_stage(self, plan: RoundPlan) -> bool:
        """Whether the next round begins with a network that is derived now."""
        return plan.stage_round == plan.stage_rounds and plan.round < plan.num_rounds

    def derive(self, state: ServerState) -> Genotype | None:
        """The genotype that the state stands for; None for a fixed model."""
        derive = self.recipe.stages[state.stage].derive
        return None if derive is None else derive(state.architecture)

    def extract(self, state: ServerState) -> TrainableNetwork:
        """The discrete network that the state stands for, with inherited weights, in evaluation mode."""
        genotype = self.derive(state)
        network = state.network()
        if genotype is None or not isinstance(state.spec, SpaceSpec):
            return network
        extracted = Network(genotype, final_space(state.spec)).inherit(network)  # type: ignore[arg-type]
        extracted.eval()
        return extracted
