"""FedMetaNAS (arXiv 2504.06457): Gumbel supernet, first-order MAML on weights and alphas, soft pruning."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmetanas_core.config import Config
from fedmetanas_core.federation.averaging import pooled_statistics, weighted_mean
from fedmetanas_core.federation.update import ClientUpdate, Payload, RoundPlan, ServerState
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.local_search import SearchOptions, local_search
from fedmetanas_core.search.pruning import PruneReport, PruneRule, propose, tally
from fedmetanas_core.search.schedule import Schedule
from fedmetanas_core.search.steps import TaskLearner
from fedmetanas_core.search.tasks import OuterOptions
from fedmetanas_core.seeds import torch_stream
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.genotype import pairwise_genotype
from fedmetanas_core.space.network import Network
from fedmetanas_core.space.spec import SpaceSpec
from fedmetanas_core.space.supernet import Supernet, layouts


class FedMetaNAS:
    """See methods.method.Method."""

    def __init__(self, config: Config, spec: SpaceSpec) -> None:
        self.config, self.spec = config, spec
        self.schedule = Schedule.with_search_fraction(
            float(config.search_fraction),
            num_rounds=int(config.num_rounds),
            num_nodes=spec.num_nodes,
            seed=config.seed,
            temperature_start=config.temperature_start,
            temperature_end=config.temperature_end,
            noise_fades=config.noise == "fade",
            caps=config.prune_cap == "linear",
            alpha_weight_decay=config.alpha_weight_decay,
        )
        self.rule = PruneRule(config.prune_threshold, config.none_policy)

    def initial_state(self) -> ServerState:
        """Random weights and nearly equal alphas, each from a stream of its own."""
        architecture = Architecture(self.spec)
        if self.config.none_policy == "absent":
            architecture.without_none()
            architecture.version = 0
        architecture.initialise(torch_stream(self.config.seed, "initial alphas"))
        supernet = Supernet(self.spec, architecture.operation_mask)
        supernet.initialise(torch_stream(self.config.seed, "initial weights"))
        return ServerState(self.spec, supernet.weights.detach().clone(), supernet.statistics.clone(), architecture)

    def plan(self, round_number: int) -> RoundPlan:
        """See Schedule."""
        return self.schedule.plan(round_number)

    def local_update(self, payload: Payload, client: int, data: LocalData) -> ClientUpdate:
        """The dual learner on the client's tasks."""
        return local_search(payload, client, data, self._options())

    def _options(self) -> SearchOptions:
        config = self.config
        votes = config.prune_rule == "client_vote"
        return SearchOptions(
            local_epochs=int(config.local_epochs),
            batch_size=int(config.batch_size),
            single_task=config.task == "single_pair",
            learner=TaskLearner(
                weight_rate=config.task_lr_weights,
                alpha_rate=config.task_lr_alphas,
                alpha_optimizer=config.task_alpha_optimizer,
                inner_steps=int(config.inner_steps),
                alternate=config.inner == "alternate",
                clip=config.clip,
            ),
            outer=OuterOptions(
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                alpha_rate=float(config.meta_lr_alphas),
                alpha_optimizer=config.meta_alpha_optimizer,
                sample=config.sample,
                precision=config.precision,
            ),
            meta_weight_rate=float(config.meta_lr_weights),
            meta_weight_rate_end=config.meta_lr_weights_end,
            vote=self.rule if votes else None,
            vote_temperature=config.temperature_end if config.prune_temperature == "min" else None,
        )

    def aggregate(self, state: ServerState, updates: Sequence[ClientUpdate], plan: RoundPlan) -> ServerState:
        """Weights and logits averaged by N_k over the participants, batch-norm moments pooled."""
        sizes = [float(update.num_examples) for update in updates]
        architecture = state.architecture.clone()
        with torch.no_grad():
            architecture.operation_logits.copy_(weighted_mean([u.operation_logits for u in updates], sizes))
            architecture.input_logits.copy_(weighted_mean([u.input_logits for u in updates], sizes))
        _, layout = layouts(self.spec, architecture.operation_mask)
        return ServerState(
            spec=self.spec,
            weights=weighted_mean([update.weights for update in updates], sizes),
            statistics=pooled_statistics([update.statistics for update in updates], sizes, layout),
            architecture=architecture,
            round=plan.round,
            evaluations=list(state.evaluations),
        )

    def prune(self, state: ServerState, updates: Sequence[ClientUpdate], plan: RoundPlan) -> PruneReport | None:
        """By threshold and cap on the averaged logits, or by the clients' votes."""
        before = state.architecture.operation_mask.clone()
        if self.config.prune_rule == "client_vote":
            report = PruneReport()
            votes = [update.votes for update in updates if update.votes is not None]
            if votes and plan.phase != "warm-up":
                sizes = [float(update.num_examples) for update in updates if update.votes is not None]
                report = tally(votes, sizes, state.architecture)
            if plan.prunes and self.schedule.caps:
                capped = replace(self.rule, threshold=0.0)
                kept, forced = propose(state.architecture, plan.temperature, capped, plan.operation_cap, plan.pair_caps)
                state.architecture.restrict(*kept)
                report += forced
        elif plan.prunes:
            temperature = self.config.temperature_end if self.config.prune_temperature == "min" else plan.temperature
            kept, report = propose(state.architecture, temperature, self.rule, plan.operation_cap, plan.pair_caps)
            state.architecture.restrict(*kept)
        else:
            return None
        if not report.total:
            return None
        state.architecture.centre()
        state.prune_weights(before)
        return report

    def extract(self, state: ServerState) -> Network:
        """The pairwise genotype and its weights; exact once the masks are one-hot."""
        genotype = pairwise_genotype(state.architecture)
        network = Network(genotype, self.spec).inherit(state.supernet())
        network.eval()
        return network
