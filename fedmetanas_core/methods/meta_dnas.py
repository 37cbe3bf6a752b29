"""Meta-DNAS: meta-learned alphas, adapted by every client within a compute budget of its own."""

from dataclasses import replace

from fedmetanas_core.config import Config
from fedmetanas_core.federation.policy import Adam, MetaGradient
from fedmetanas_core.methods.budgets import budget_of, within
from fedmetanas_core.methods.parts import outer_options, own_training, plain_sgd, search_schedule, training
from fedmetanas_core.methods.recipe import Personal, Recipe, Stage
from fedmetanas_core.search.local_search import HeldOut
from fedmetanas_core.search.penalties import ComputeBudgets
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.budget import Demand, budgeted_genotype
from fedmetanas_core.space.cost import by_group, edge_costs
from fedmetanas_core.space.genotype import Genotype, pairwise_genotype
from fedmetanas_core.space.spec import SpaceSpec

CLIENT_TO_SERVER = 10.0  # rates of Adam on alphas (published: 0.01 and 0.001)
QUERY = 0.5  # of a client's training images


def recipe(config: Config, spec: SpaceSpec) -> Recipe:
    """Clients adapt weights and alphas; the alphas' gradient there goes to the server's Adam, weights are averaged."""
    budgets, given = ComputeBudgets(config.seed), budget_of(config, spec)
    rate = float(config.meta_dnas_lr)
    outer = replace(
        outer_options(config, budget=given, budget_penalty=1.0),
        alpha_rate=CLIENT_TO_SERVER * rate,
        alpha_optimizer="adam",
    )
    local = replace(training(config, plain_sgd(config), outer), held_out=HeldOut("query", QUERY))
    local = replace(local, budgets=budgets if given is None else None)  # drawn where none is given
    stage = Stage(
        name="search",
        rounds=int(config.num_rounds),
        space=spec,
        planner=replace(search_schedule(config, spec), caps=False),
        local=local,
        architect=MetaGradient(Adam(rate)),
        derive=within(given, pairwise_genotype),
        # It costs nothing, so alphas would keep to the budget by it, and nothing prunes it here: no genotype has it.
        without_none=config.none_policy != "legal",
    )

    def within_budget(architecture: Architecture, client: int) -> Genotype:
        if given is not None:
            return given.within(architecture, pairwise_genotype)
        demand = Demand(by_group(spec, edge_costs(spec)), budgets.of(client, spec).budget)
        return budgeted_genotype(architecture, [demand])

    personal = Personal(
        search=local, derive=within_budget, tune=own_training(config), is_the_point=True, own_limits=True
    )
    return Recipe((stage,), personal, budget=given)
