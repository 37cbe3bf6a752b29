"""The run configuration: one frozen value, its defaults, and refusals that name the key, the value and a fix.

Form and range are checked here; whether a method or a dataset exists is for their registries to say.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from fedmetanas_core.config_values import AUTO, checked, choice, count, number, text
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.space.fixed import FIXED_MODELS
from fedmetanas_core.space.spec import MOST_CELLS, MOST_CHANNELS, MOST_NODES

__all__ = ["AUTO", "PRESETS", "Config", "defaults", "describe_keys", "text_keys"]

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "noise": "fade",
        "task": "epoch_pairs",
        "inner_steps": 1,
        "inner": "joint",
        "task_alpha_optimizer": "adam",
        "meta_alpha_optimizer": "adam",
        "prune_rule": "server_mean",
        "prune_cap": "linear",
        "none_policy": "drop_first",
    },
    "paper_literal": {
        "noise": "full",
        "task": "single_pair",
        "inner_steps": 5,
        "inner": "alternate",
        "task_alpha_optimizer": "sgd",
        "meta_alpha_optimizer": "sgd",
        "prune_rule": "client_vote",
        "prune_cap": "off",
        "none_policy": "legal",
    },
}


@dataclass(frozen=True)
class Config:
    """Every run-config key. A key whose default is ``auto`` also takes a value of its kind."""

    method: str = text("fedmetanas", "which algorithm runs")
    preset: str = choice("recommended", "reading of the paper that fills the auto keys of the search", *PRESETS)

    dataset: str = text(
        "digits",
        "digits, mnist, cifar10, cifar100, imagenet, nodes (each its own), an .npz, or a folder of class folders",
    )
    data_root: str = text("data", "where torchvision data lies or is downloaded to")
    image_size: int | str = count(AUTO, "side in pixels to which images are cropped and scaled", least=8, most=1024)
    class_names: str = text(AUTO, "classes under dataset=nodes, with commas between; auto: all that any node has")
    image_shape: str = text(AUTO, "channels x height x width under dataset=nodes; auto: what the nodes' images allow")
    pixel_mean: str = text(AUTO, "mean of each channel under dataset=nodes, of pixels in [0, 1]; auto: over all nodes")
    pixel_std: str = text(AUTO, "standard deviation likewise")
    test_data: str = text(
        "", "images at the server that measure the network under dataset=nodes; empty: the nodes' own, at the end"
    )
    augment: str = choice(AUTO, "random crop and flip; auto: colour images of at least 32 pixels", AUTO, "on", "off")
    protocol: str = choice(
        "overlap",
        "whether clients may share images; disjoint sets a fifth of each share aside",
        "overlap",
        "disjoint",
    )
    partition: str = choice("dirichlet", "how classes are spread over clients", "dirichlet", "label_skew", "iid")
    dir_alpha: float = number(0.3, "Dirichlet concentration; smaller is more skewed", above=True)
    classes_per_client: int = count(4, "classes per client under label_skew")
    samples_per_client: int | str = count(AUTO, "training images per client")

    num_clients: int = count(100, "clients in the federation", most=100_000)
    unseen_clients: int = count(
        0, "how many of the clients, the last ones, never train and are only evaluated", least=0
    )
    clients_per_round: int = count(5, "clients that search in a round")
    min_clients: int | str = count(AUTO, "connected nodes without which no run begins; auto: num_clients")
    num_rounds: int | str = count(AUTO, "communication rounds")
    local_epochs: int | str = count(AUTO, "epochs over a client's images per round (E)")
    batch_size: int | str = count(AUTO, "images per support or query batch (B)")

    init_channels: int | str = count(AUTO, "channels of the first cell (C)", least=2, most=MOST_CHANNELS)
    num_cells: int | str = count(AUTO, "cells of the network (L)", most=MOST_CELLS)
    num_nodes: int | str = count(AUTO, "intermediate nodes per cell (n)", most=MOST_NODES)
    stem: str = choice(
        AUTO,
        "first layers, of stride 1, 2 or 8; auto: by image size, cifar where init_channels is given",
        AUTO,
        "cifar",
        "stride2",
        "imagenet",
    )

    model: str = choice("mobilenet_v3_large", "network of the methods that search none", *FIXED_MODELS)
    norm: str = choice("batch", "normalisation inside the cells of the supernet", "batch", "group")

    relaxation: str = choice(
        "gumbel", "how alphas weigh operations in training", "gumbel", "gumbel_st", "softmax", "dirichlet"
    )
    noise: str = choice(AUTO, "Gumbel noise: fading out, or full throughout", AUTO, "fade", "full")
    sample: str = choice("per_type", "one Gumbel draw per cell type or per cell", "per_type", "per_cell")
    search_fraction: float | str = number(
        AUTO,
        "share of the rounds after which the network is one-hot; auto: 0.8, and about 0.4 up to 200 rounds",
        above=True,
        most=1,
    )
    temperature_start: float = number(1.0, "temperature during warm-up", above=True)
    temperature_end: float = number(0.1, "temperature when the search ends", above=True)
    task: str = choice(AUTO, "tasks per epoch: all pairs of batches, or one", AUTO, "epoch_pairs", "single_pair")
    inner: str = choice(AUTO, "inner step: with one backward pass, or as equation 6", AUTO, "joint", "alternate")
    inner_steps: int | str = count(AUTO, "inner steps per task (M)")
    task_lr_weights: float = number(0.01, "inner SGD rate of weights", above=True)
    task_lr_alphas: float = number(1e-3, "inner rate of alphas")
    task_alpha_optimizer: str = choice(AUTO, "inner step of alphas", AUTO, "adam", "sgd")
    meta_lr_weights: float | str = number(
        AUTO, "outer SGD rate of weights at the start; auto: 0.025, and 0.1 up to 200 rounds above 16x16", above=True
    )
    meta_lr_weights_end: float = number(0.001, "outer SGD rate of weights at the end of the cosine")
    meta_lr_alphas: float | str = number(AUTO, "outer rate of alphas; auto: 0.0003, and 0.003 up to 200 rounds")
    meta_alpha_optimizer: str = choice(AUTO, "outer optimiser of alphas", AUTO, "adam", "sgd")
    momentum: float = number(0.9, "momentum of the outer SGD", most=0.999)
    weight_decay: float = number(3e-4, "weight decay of the outer SGD")
    alpha_weight_decay: float = number(1e-3, "weight decay of alphas (adam) before the first prune event")
    beta_decay: float = number(0.0, "weight of the logsumexp of an edge's alphas in the loss (beta-DARTS)")
    clip: float = number(5.0, "largest gradient norm of weights", above=True)

    prune_rule: str = choice(AUTO, "who prunes", AUTO, "server_mean", "client_vote")
    prune_threshold: float = number(0.01, "weight below which a choice is pruned", most=0.5)
    prune_cap: str = choice(AUTO, "bound on choices per row, falling to one", AUTO, "linear", "off")
    prune_temperature: str = choice("current", "temperature of the threshold", "current", "min")
    prune_score: str = choice(
        "magnitude", "what ranks operations: their weight, or the loss without them (DARTS-PT)", "magnitude", "perturb"
    )
    max_macs: int = count(
        0, "most multiply-adds an image that the found network may need; 0: any number", least=0, most=10**15
    )
    max_parameters: int = count(
        0, "most parameters that the found network may have; 0: any number", least=0, most=10**15
    )
    max_payload: int = count(
        0, "most bytes of the found network's weights and running statistics; 0: any number", least=0, most=10**15
    )
    max_latency_ms: float = number(
        0.0, "most milliseconds that the found network may take for one image on one core; 0: any number", most=10**15
    )
    latency_table: str = text(
        AUTO, "microseconds of each operation where the network will run; auto: measured before the search"
    )
    budget_penalty: float = number(
        0.0, "weight in the loss of alphas of the share by which the expected cost exceeds a budget; meta_dnas has 1"
    )
    skip_cap: int = count(0, "most skip connections in a cell, from the first prune event on; 0: any number", least=0)
    collapse_watch: str = choice("off", "log skip share and entropy of the alphas, and warn", "off", "on")
    none_policy: str = choice(AUTO, "what becomes of none", AUTO, "drop_first", "absent", "legal")

    retrain_fraction: float = number(
        0.5, "share of the rounds in which fednas and local_darts retrain", above=True, most=0.99
    )
    drop_path: float | str = number(
        AUTO, "chance to lose an operation while these retrain; auto: 0.5, and 0 up to 200 rounds", most=0.9
    )
    per_fedavg: str = choice("first_order", "gradient of per_fedavg", "first_order", "hessian_free")
    policy_lr: float | str = number(
        AUTO, "Adam rate of fedrlnas' policy; auto: 0.003, and 0.3 up to 200 rounds", above=True
    )
    personal_policy_lr: float = number(0.5, "Adam rate of perfedrlnas' policies", above=True)
    fedpnas_lr: float | str = number(
        AUTO, "rate of Adam and of the step ahead in fedpnas; auto: 0.002, and 0.02 up to 200 rounds", above=True
    )
    meta_dnas_lr: float | str = number(
        AUTO,
        "Adam rate of meta_dnas' server, a tenth of its clients'; auto: 0.001, and 0.01 up to 200 rounds",
        above=True,
    )
    feddsnas_lr: float | str = number(
        AUTO, "Adam rate of alphas in feddsnas; auto: 0.001, and 0.03 up to 200 rounds", above=True
    )
    fedpnas_samples: int = count(5, "architectures whose predictions a training pass of fedpnas averages", most=100)
    policy_explore: float = number(0.0, "chance that a policy draws uniformly", most=1.0)

    evaluate_every: int = count(10, "rounds between evaluations of the global model")
    evaluation_images: int = count(1000, "test images of an evaluation between rounds; the last ones use all")
    adapt_epochs: int | str = count(
        AUTO, "epochs of local adaptation before the adapted client accuracy; auto: 1, or as the method has it"
    )

    averaging: str = choice(
        "mean",
        "how updates become one; the mean alone weights clients by their examples",
        "mean",
        "median",
        "trimmed_mean",
        "krum",
    )
    byzantine_share: float = number(
        0.2, "share of a round's clients whose updates trimmed_mean and krum take to be false", above=True, most=0.49
    )
    norm_ratio: float = number(
        10.0, "updates that change this many times as much as the median's are excluded; 0: none"
    )
    opposed: str = choice(
        "keep", "updates that point against what the others have in common, over all rounds", "keep", "exclude"
    )
    weighting: str = choice("examples", "what a client's update weighs in the mean", "examples", "equal")
    dp_clip: float = number(0.0, "L2 norm to which a client clips its whole change for differential privacy; 0: off")
    dp_noise: float = number(0.0, "deviation of the noise of a round's sum, in units of dp_clip")
    dp_delta: float = number(1e-5, "delta of the (epsilon, delta) in the ledger", above=True, most=0.1)
    compression: str = choice(
        "none", "what a client sends: weights, or their changes in few bits", "none", "float16", "int8"
    )

    seed: int = count(0, "seed of every random stream", least=0, most=2**63 - 1)
    device: str = choice(AUTO, "where tensors live; auto: cuda if there is one", AUTO, "cpu", "cuda")
    precision: str = choice(
        "float32", "numbers of the network's passes on a GPU; alphas are float32 anyhow", "float32", "bfloat16"
    )
    workers: int | str = count(AUTO, "Ray workers of `fedmetanas search`; auto: from the cores", most=1024)
    ray_address: str = text(
        "",
        "host:port of a running Ray cluster, this machine a part of it, on which `fedmetanas search` runs its clients; "
        "none: a run begun on one goes on without",
    )
    round_timeout_s: float = number(3600.0, "seconds a round waits for its clients", above=True)
    node_timeout_s: float = number(
        600.0,
        "seconds without enough connected nodes, at the start or between rounds, that end a run; a new node that came "
        "by then has five minutes to answer",
        above=True,
    )
    track: str = text("", "where figures go as well: tensorboard, wandb, mlflow, or several with commas between")
    run_name: str = text("", "name of the run folder; empty: method, dataset and time")
    runs_dir: str = text("", "where run folders go; empty: $FEDMETANAS_RUNS, else runs/ under the launch directory")
    resume: str = text("", "a run folder to go on with, alone or with ray_address: all other keys are that run's")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Config":
        """Check form and range of every value; raises RefusalError for the first that does not fit."""
        known = {spec.name: spec for spec in fields(cls)}
        for key in values:
            if isinstance(values[key], dict):
                raise RefusalError(f"{key}: keys are not grouped in tables", "write every key at the top level")
            if key not in known:
                parts = [name for name in known if key in name.split("_")]
                near = parts or get_close_matches(key, known, n=1, cutoff=0.0)
                raise RefusalError(f"{key}: unknown key", f"did you mean {' or '.join(near[:4])}?")
        config = cls(**{key: checked(known[key], value) for key, value in values.items()})
        config._check_together()
        return config

    @property
    def ray_cluster(self) -> str:
        """The address of the cluster that clients run on; empty for workers of this machine alone."""
        return "" if self.ray_address == "none" else self.ray_address

    def _check_together(self) -> None:
        if self.clients_per_round > self.num_clients:
            raise RefusalError(
                f"clients_per_round: {self.clients_per_round} is more than num_clients={self.num_clients}",
                f"set clients_per_round to at most {self.num_clients}",
            )
        if self.unseen_clients > self.num_clients - self.clients_per_round:
            raise RefusalError(
                f"unseen_clients: {self.unseen_clients} of {self.num_clients} leave fewer than "
                f"clients_per_round={self.clients_per_round}",
                f"set unseen_clients to at most {self.num_clients - self.clients_per_round}",
            )
        if self.min_clients != AUTO and int(self.min_clients) > self.num_clients:
            raise RefusalError(
                f"min_clients: {self.min_clients} is more than num_clients={self.num_clients}",
                f"set min_clients to at most {self.num_clients}",
            )
        if self.min_clients != AUTO and 2 * int(self.min_clients) < self.clients_per_round:
            raise RefusalError(
                f"min_clients: with {self.min_clients}, no round of {self.clients_per_round} clients can begin",
                f"set it to at least {(self.clients_per_round + 1) // 2}",
            )
        if self.workers != AUTO and self.ray_cluster:
            raise RefusalError("workers: a Ray cluster has as many as it has cores", "leave it at auto")
        if self.workers != AUTO and int(self.workers) > self.clients_per_round:
            raise RefusalError(
                f"workers: {self.workers} is more than clients_per_round={self.clients_per_round}",
                f"no more clients search at once; set workers to at most {self.clients_per_round}, or auto",
            )
        if self.temperature_end > self.temperature_start:
            raise RefusalError(
                f"temperature_end: {self.temperature_end} is above temperature_start={self.temperature_start}",
                "let the temperature fall",
            )
        if self.relaxation in ("dirichlet", "softmax") and self.sample == "per_cell":
            raise RefusalError(
                f"sample: 'per_cell' has no say where relaxation={self.relaxation!r}", "set sample to per_type"
            )
        rule = PRESETS[self.preset]["prune_rule"] if self.prune_rule == AUTO else self.prune_rule
        if rule == "client_vote" and self.prune_score == "perturb":
            raise RefusalError(
                "prune_score: 'perturb' has no say where clients vote (prune_rule)",
                "set prune_rule to server_mean, or prune_score to magnitude",
            )
        others = [spec.name for spec in fields(self) if getattr(self, spec.name) != spec.default]
        given = next((name for name in others if name not in ("resume", "ray_address")), None)
        if self.resume and given:
            raise RefusalError(f"{given}: a resumed run has its own", "give resume alone, or with ray_address")

    def resolve(self, height: int, width: int, num_images: int) -> "Config":
        """Replace every ``auto`` by a value for images of this size and a training set of this many."""
        choices = {**PRESETS[self.preset], **_scale(height, width, num_images)}
        if min(height, width) >= 96:
            choices["stem"] = "imagenet"
        elif self.init_channels != AUTO:
            choices["stem"] = "cifar"  # whoever asks for a size gets that network as DARTS has it
        if (choices["num_rounds"] if self.num_rounds == AUTO else int(self.num_rounds)) > 200:
            choices.update({"meta_lr_alphas": 3e-4, "meta_lr_weights": 0.025, "search_fraction": 0.8})
            choices.update({"policy_lr": 3e-3, "fedpnas_lr": 2e-3, "meta_dnas_lr": 1e-3, "feddsnas_lr": 1e-3})
            choices["drop_path"] = 0.5
        filled = {key: value for key, value in choices.items() if getattr(self, key) == AUTO}
        return replace(self, **filled)

    def to_dict(self) -> dict[str, Any]:
        """Key to value."""
        return asdict(self)


def defaults() -> dict[str, Any]:
    """Key to default value, in order."""
    return {spec.name: spec.default for spec in fields(Config) if spec.default is not MISSING}


def text_keys() -> set[str]:
    """Keys whose value is text, whatever it looks like."""
    return {spec.name for spec in fields(Config) if spec.metadata["kind"] is str}


def describe_keys() -> list[tuple[str, Any, str]]:
    """(key, default, what it is) of every key, for the documentation."""
    return [(spec.name, spec.default, _about(spec.metadata)) for spec in fields(Config)]


def _about(metadata: Mapping[str, Any]) -> str:
    about, choices = str(metadata["about"]), [name for name in metadata.get("choices", ()) if name != AUTO]
    return f"{about} ({', '.join(choices)})" if choices else about


def _scale(height: int, width: int, num_images: int) -> dict[str, Any]:
    """Sizes at which a default search ends within an hour on two cores, up to 60,000 images of 28x28.

    Rates are for these short searches, compared on held-out training images; the share of rounds given to the search
    and the rates of alphas and policies in other methods than fedmetanas were compared so on digits only.
    """
    small, few = height * width <= 16 * 16, num_images <= 5000
    return {
        # At most a quarter of a small set: clients that hold everything would all be the same client.
        "samples_per_client": min(64 if few else 600, max(1, num_images // 4)),
        "num_rounds": 150 if small else 140,
        # The found network is cheap to train, so most rounds go to it.
        "search_fraction": 0.45 if small else 0.4,
        # Shares of 64 images would be 4 steps a round of 2 epochs and batches of 32: 0.47 instead of 0.59 on
        # photographs (240 of each of 5 classes of CIFAR-10, 2,000 others to measure; two seeds).
        "local_epochs": 5 if small or few else 2,
        "batch_size": 16 if small or few else 32,
        "meta_lr_weights": 0.025 if small else 0.1,
        "meta_lr_alphas": 3e-3,
        "policy_lr": 0.3,
        "fedpnas_lr": 2e-2,
        "meta_dnas_lr": 1e-2,
        "feddsnas_lr": 3e-2,
        "drop_path": 0.0,
        "stem": "stride2" if not small and min(height, width) >= 16 else "cifar",
        "init_channels": 4,
        "num_cells": 3,
        "num_nodes": 3,
    }
