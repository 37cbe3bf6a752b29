"""What the server measures of a state: accuracy, what pruning and derivation cost, what the clients report."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from fedmetanas_core.errors import FedMetaNASError
from fedmetanas_core.federation.averaging import moment_positions
from fedmetanas_core.federation.update import Evaluation, RoundPlan, ServerState
from fedmetanas_core.methods.global_model import Model, global_model
from fedmetanas_core.methods.method import Method, final_space
from fedmetanas_core.preflight import Experiment
from fedmetanas_core.search.evaluation import accuracy, confusion, count_correct, logits_of
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.pruning import PruneReport
from fedmetanas_core.seeds import torch_stream
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.genotype import Genotype, darts_genotype, pairwise_genotype
from fedmetanas_core.space.network import Network
from fedmetanas_core.space.spec import SpaceSpec

NOISE_IMAGES = 64
MOST_ANSWERS = 100  # classes whose answers are told one by one: a table of ten thousand numbers


class Measuring:
    """Measures states of one run on its test images. Where the server has none, what would be measured is None."""

    def __init__(self, method: Method, experiment: Experiment) -> None:
        self.method, self.experiment = method, experiment
        self.has_images = len(experiment.dataset.test) > 0
        self.test_subset = experiment.test_sample(experiment.config.evaluation_images)
        self.device = str(self.test_subset.images.device)

    def model(self, state: ServerState, plan: RoundPlan, always_mixes: bool = False) -> Model:
        """The noise-free global model at the plan's temperature. ``always_mixes`` weighs what is one-hot as well."""
        return global_model(self.method, state, plan, self.device, always_mixes)

    def global_accuracy(self, state: ServerState, plan: RoundPlan) -> float | None:
        """Accuracy on the test images used between rounds; None where there is no global model."""
        if self.method.recipe.is_local or not self.has_images:
            return None
        return accuracy(self.model(state, plan), self.test_subset)

    def prune_event(
        self, before: ServerState, after: ServerState, plan: RoundPlan, report: PruneReport
    ) -> dict[str, Any]:
        """What a prune event removed and cost, beside what DARTS' hard rule would have cost at the same moment."""
        return {
            "round": plan.round,
            "kind": "pruning",
            "before": self.global_accuracy(before, plan),
            "after": self.global_accuracy(after, plan),
            "hard_darts_rule": self._cut(before, darts_genotype),
            **self._for_budget(before),
            **asdict(report),
            "alive_operations": after.architecture.alive_operations(),
        }

    def _for_budget(self, state: ServerState) -> dict[str, float | None]:
        """What the network would be good for if it were cut out now: by its alphas alone, and within its budget."""
        budget = self.method.recipe.budget
        if budget is None or state.spec.max_pairs == 0:
            return {}
        own = partial(budget.within, rule=pairwise_genotype)
        return {"cut_freely": self._cut(state, pairwise_genotype), "cut_within_budget": self._cut(state, own)}

    def _cut(self, state: ServerState, rule: Callable[[Architecture], Genotype]) -> float | None:
        """Accuracy of the network that this rule would cut out of a state, with its weights."""
        if not self.has_images:
            return None
        assert isinstance(state.spec, SpaceSpec)
        hard = Network(rule(state.architecture), state.spec, self.device)
        hard.inherit(state.network(self.device))  # type: ignore[arg-type]
        hard.eval()
        return accuracy(hard, self.test_subset)

    def derivation_event(self, state: ServerState, plan: RoundPlan, renewed: TrainableNetwork | None) -> dict[str, Any]:
        """What the end of a stage costs: the whole test split before, and with the derived genotype's own weights.

        ``renewed`` is the same with its running statistics computed anew: much of a loss can be theirs.
        """
        supernet, genotype = self.model(state, plan), self.method.extract(state)
        return {
            "round": plan.round,
            "kind": "derivation",
            "before": self._whole_accuracy(supernet),
            "after": self.whole_accuracy(genotype),
            "recalibrated": None if renewed is None else self.whole_accuracy(renewed),
            "genotype": self._genotype(state),
        }

    def _genotype(self, state: ServerState) -> dict[str, Any] | None:
        genotype = self.method.derive(state)
        return None if genotype is None else genotype.to_dict()

    def placed(self, network: TrainableNetwork) -> TrainableNetwork:
        """A copy of a network on the device that measures, in evaluation mode."""
        return copy.deepcopy(network).to(self.device).eval()

    def whole_accuracy(self, network: TrainableNetwork) -> float | None:
        """Over the whole test split."""
        return self._whole_accuracy(self.placed(network))

    def _whole_accuracy(self, model: Model) -> float | None:
        right = images = 0
        for chunk in self.experiment.test_chunks() if self.has_images else ():
            right, images = right + count_correct(logits_of(model, chunk), chunk), images + len(chunk)
        return right / images if images else None

    def compare(self, network: TrainableNetwork, state: ServerState, plan: RoundPlan) -> dict[str, Any]:
        """Accuracy over the whole test split of the extracted network and of the supernet it was cut from.

        The supernet computes its mixture also where the masks are one-hot, so that the two are computed differently.
        A fixed model was cut from nothing. ``test_classes`` is what the extracted network says of each class.
        """
        placed, names = self.placed(network), self.experiment.dataset.class_names
        cut = isinstance(state.spec, SpaceSpec)
        supernet = self.model(state, plan, always_mixes=True) if cut else None
        answers, right_before, difference = torch.zeros(len(names), len(names), dtype=torch.int64), 0, 0.0
        for chunk in self.experiment.test_chunks() if self.has_images else (self._noise(),):
            logits = logits_of(placed, chunk)
            answers += confusion(logits, chunk)
            if supernet is not None:
                before = logits_of(supernet, chunk)
                right_before += count_correct(before, chunk)
                difference = max(difference, float((logits - before).abs().max()))
        images = int(answers.sum())
        return {
            "test_accuracy": int(answers.trace()) / images if self.has_images else None,
            "test_accuracy_supernet": right_before / images if self.has_images and cut else None,
            "max_logit_difference": difference if cut else None,
            "test_classes": by_class(names, answers) if self.has_images else None,
        }

    def _noise(self) -> LocalData:
        """Images of noise: two networks that agree on these compute the same."""
        generator = torch_stream(self.experiment.config.seed, "images of noise")
        images = torch.rand(NOISE_IMAGES, *self.experiment.dataset.image_shape, generator=generator)
        labels = torch.zeros(NOISE_IMAGES, dtype=torch.int64)
        return LocalData(images.to(self.device), labels.to(self.device), self.test_subset.prepare)

    def mean_accuracy(self, networks: Sequence[TrainableNetwork]) -> float | None:
        """The mean of the networks' accuracies on the test images used between rounds."""
        if not self.has_images:
            return None
        return fmean(accuracy(self.placed(network), self.test_subset) for network in networks)


def by_class(names: Sequence[str], answers: Tensor) -> list[dict[str, Any]]:
    """Of every class its name, test images, how many were recognised, and what they were taken for, by class.

    ``answers`` (classes, classes) counts images by their class and by what was said. Of more than MOST_ANSWERS classes
    is not told what they were taken for.
    """
    found: list[dict[str, Any]] = []
    for number, (name, said) in enumerate(zip(names, answers, strict=True)):
        own = {"name": name, "images": int(said.sum()), "right": int(said[number])}
        found.append(own | ({"answers": said.tolist()} if len(names) <= MOST_ANSWERS else {}))
    return found


def describe_clients(
    evaluations: Sequence[Evaluation], excluded: Sequence[dict[str, Any]], seen: int
) -> dict[str, Any]:
    """All clients' accuracy with the model that they got, the one they made of it, and the one they would use.

    Clients from number ``seen`` on never trained; theirs stand apart. ``adaptation_seconds`` is the mean compute of a
    client that makes and measures them.
    """
    figures: dict[str, Any] = {
        "clients_evaluated": len(evaluations),
        "clients_not_evaluated": list(excluded),
        "adaptation_seconds": fmean(each.metrics["compute_seconds"] for each in evaluations),
    }
    groups = {
        "client": [each for each in evaluations if each.client < seen],
        "unseen_client": [each for each in evaluations if each.client >= seen],
    }
    for name, members in groups.items():
        for suffix in ("accuracy", "accuracy_adapted", "accuracy_used"):
            values = [each.metrics[suffix] for each in members]
            if values or name == "client":
                figures[f"{name}_{suffix}"] = values
                figures[f"{name}_{suffix}_mean"] = fmean(values) if values else None
                figures[f"{name}_{suffix}_std"] = pstdev(values) if values else None
    return figures


def heard(row: Mapping[str, Any]) -> set[int]:
    """The clients of a round's row whose updates counted."""
    return set(row["clients"]) - {each["client"] for each in row["excluded"]}


def personal_network(evaluation: Evaluation, space: SpaceSpec) -> Network:
    """The network that a client sent as its own; FedMetaNASError unless it is one of this space."""
    if evaluation.genotype is None or evaluation.weights is None or evaluation.statistics is None:
        raise FedMetaNASError("sent no network of its own")
    network = Network(Genotype.from_json(evaluation.genotype), final_space(space))
    for name, tensor, place in (
        ("weights", evaluation.weights, network.weights),
        ("statistics", evaluation.statistics, network.statistics),
    ):
        if tensor.shape != place.shape or tensor.dtype != place.dtype or not bool(tensor.isfinite().all()):
            raise FedMetaNASError(
                f"the {name} of its own network, {tuple(tensor.shape)} of {tensor.dtype}, do not fit or are not finite"
            )
    if bool((evaluation.statistics[moment_positions(network.statistic_layout)[1]] < 0).any()):
        raise FedMetaNASError("a variance among the statistics of its own network is negative")
    network.load(evaluation.weights, evaluation.statistics)
    network.eval()
    return network
