"""The run configuration: one frozen value, its defaults, and refusals that name the key, the value and a fix.

Form and range are checked here; whether a method or a dataset exists is for their registries to say.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any

from fedmetanas_core.errors import RefusalError
from fedmetanas_core.space.fixed import FIXED_MODELS

AUTO = "auto"
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


def _key(default: Any, about: str, **limits: Any) -> Any:
    return field(default=default, metadata={"about": about, **limits})


def _count(default: int | str, about: str, least: int = 1, most: int = 10**9) -> Any:
    return _key(default, about, kind=int, least=least, most=most)


def _number(default: float | str, about: str, least: float = 0.0, above: bool = False, most: float = 1e9) -> Any:
    return _key(default, about, kind=float, least=least, above=above, most=most)


def _choice(default: str, about: str, *choices: str) -> Any:
    return _key(default, about, kind=str, choices=choices)


def _text(default: str, about: str) -> Any:
    return _key(default, about, kind=str)


@dataclass(frozen=True)
class Config:
    """Every run-config key. A key whose default is ``auto`` also takes a value of its kind."""

    method: str = _text("fedmetanas", "which algorithm runs")
    preset: str = _choice("recommended", "reading of the paper that fills the auto keys of the search", *PRESETS)

    dataset: str = _text("digits", "digits, mnist, cifar10, cifar100, imagenet, an .npz, or a folder of class folders")
    data_root: str = _text("data", "where torchvision data lies or is downloaded to")
    image_size: int | str = _count(AUTO, "side in pixels to which images are cropped and scaled", least=8, most=1024)
    augment: str = _choice(AUTO, "random crop and flip; auto: colour images of at least 32 pixels", AUTO, "on", "off")
    protocol: str = _choice(
        "overlap",
        "whether clients may share images; disjoint sets a fifth of each share aside",
        "overlap",
        "disjoint",
    )
    partition: str = _choice("dirichlet", "how classes are spread over clients", "dirichlet", "label_skew", "iid")
    dir_alpha: float = _number(0.3, "Dirichlet concentration; smaller is more skewed", above=True)
    classes_per_client: int = _count(4, "classes per client under label_skew")
    samples_per_client: int | str = _count(AUTO, "training images per client")

    num_clients: int = _count(100, "clients in the federation", most=100_000)
    unseen_clients: int = _count(
        0, "how many of the clients, the last ones, never train and are only evaluated", least=0
    )
    clients_per_round: int = _count(5, "clients that search in a round")
    num_rounds: int | str = _count(AUTO, "communication rounds")
    local_epochs: int | str = _count(AUTO, "epochs over a client's images per round (E)")
    batch_size: int | str = _count(AUTO, "images per support or query batch (B)")

    init_channels: int | str = _count(AUTO, "channels of the first cell (C)", least=2, most=512)
    num_cells: int | str = _count(AUTO, "cells of the network (L)", most=64)
    num_nodes: int | str = _count(AUTO, "intermediate nodes per cell (n)", most=16)
    stem: str = _choice(
        AUTO,
        "first layers, of stride 1, 2 or 8; auto: by image size, cifar where init_channels is given",
        AUTO,
        "cifar",
        "stride2",
        "imagenet",
    )

    model: str = _choice("mobilenet_v3_large", "network of the methods that search none", *FIXED_MODELS)
    norm: str = _choice("batch", "normalisation inside the cells of the supernet", "batch", "group")

    relaxation: str = _choice(
        "gumbel", "how alphas weigh operations in training", "gumbel", "gumbel_st", "softmax", "dirichlet"
    )
    noise: str = _choice(AUTO, "Gumbel noise: fading out, or full throughout", AUTO, "fade", "full")
    sample: str = _choice("per_type", "one Gumbel draw per cell type or per cell", "per_type", "per_cell")
    search_fraction: float | str = _number(
        AUTO,
        "share of the rounds after which the network is one-hot; auto: 0.8, and about 0.4 up to 200 rounds",
        above=True,
        most=1,
    )
    temperature_start: float = _number(1.0, "temperature during warm-up", above=True)
    temperature_end: float = _number(0.1, "temperature when the search ends", above=True)
    task: str = _choice(AUTO, "tasks per epoch: all pairs of batches, or one", AUTO, "epoch_pairs", "single_pair")
    inner: str = _choice(AUTO, "inner step: with one backward pass, or as equation 6", AUTO, "joint", "alternate")
    inner_steps: int | str = _count(AUTO, "inner steps per task (M)")
    task_lr_weights: float = _number(0.01, "inner SGD rate of weights", above=True)
    task_lr_alphas: float = _number(1e-3, "inner rate of alphas")
    task_alpha_optimizer: str = _choice(AUTO, "inner step of alphas", AUTO, "adam", "sgd")
    meta_lr_weights: float | str = _number(
        AUTO, "outer SGD rate of weights at the start; auto: 0.025, and 0.1 up to 200 rounds above 16x16", above=True
    )
    meta_lr_weights_end: float = _number(0.001, "outer SGD rate of weights at the end of the cosine")
    meta_lr_alphas: float | str = _number(AUTO, "outer rate of alphas; auto: 0.0003, and 0.003 up to 200 rounds")
    meta_alpha_optimizer: str = _choice(AUTO, "outer optimiser of alphas", AUTO, "adam", "sgd")
    momentum: float = _number(0.9, "momentum of the outer SGD", most=0.999)
    weight_decay: float = _number(3e-4, "weight decay of the outer SGD")
    alpha_weight_decay: float = _number(1e-3, "weight decay of alphas (adam) before the first prune event")
    beta_decay: float = _number(0.0, "weight of the logsumexp of an edge's alphas in the loss (beta-DARTS)")
    clip: float = _number(5.0, "largest gradient norm of weights", above=True)

    prune_rule: str = _choice(AUTO, "who prunes", AUTO, "server_mean", "client_vote")
    prune_threshold: float = _number(0.01, "weight below which a choice is pruned", most=0.5)
    prune_cap: str = _choice(AUTO, "bound on choices per row, falling to one", AUTO, "linear", "off")
    prune_temperature: str = _choice("current", "temperature of the threshold", "current", "min")
    prune_score: str = _choice(
        "magnitude", "what ranks operations: their weight, or the loss without them (DARTS-PT)", "magnitude", "perturb"
    )
    skip_cap: int = _count(0, "most skip connections in a cell, from the first prune event on; 0: any number", least=0)
    collapse_watch: str = _choice("off", "log skip share and entropy of the alphas, and warn", "off", "on")
    none_policy: str = _choice(AUTO, "what becomes of none", AUTO, "drop_first", "absent", "legal")

    retrain_fraction: float = _number(
        0.5, "share of the rounds in which fednas and local_darts retrain", above=True, most=0.99
    )
    drop_path: float | str = _number(
        AUTO, "chance to lose an operation while these retrain; auto: 0.5, and 0 up to 200 rounds", most=0.9
    )
    per_fedavg: str = _choice("first_order", "gradient of per_fedavg", "first_order", "hessian_free")
    policy_lr: float | str = _number(
        AUTO, "Adam rate of fedrlnas' policy; auto: 0.003, and 0.3 up to 200 rounds", above=True
    )
    personal_policy_lr: float = _number(0.5, "Adam rate of perfedrlnas' policies", above=True)
    fedpnas_lr: float | str = _number(
        AUTO, "rate of Adam and of the step ahead in fedpnas; auto: 0.002, and 0.02 up to 200 rounds", above=True
    )
    meta_dnas_lr: float | str = _number(
        AUTO,
        "Adam rate of meta_dnas' server, a tenth of its clients'; auto: 0.001, and 0.01 up to 200 rounds",
        above=True,
    )
    feddsnas_lr: float | str = _number(
        AUTO, "Adam rate of alphas in feddsnas; auto: 0.001, and 0.03 up to 200 rounds", above=True
    )
    fedpnas_samples: int = _count(5, "architectures whose predictions a training pass of fedpnas averages", most=100)
    policy_explore: float = _number(0.0, "chance that a policy draws uniformly", most=1.0)

    evaluate_every: int = _count(10, "rounds between evaluations of the global model")
    evaluation_images: int = _count(1000, "test images of an evaluation between rounds; the last ones use all")
    adapt_epochs: int | str = _count(
        AUTO, "epochs of local adaptation before the adapted client accuracy; auto: 1, or as the method has it"
    )

    averaging: str = _choice(
        "mean",
        "how updates become one; the mean alone weights clients by their examples",
        "mean",
        "median",
        "trimmed_mean",
        "krum",
    )
    byzantine_share: float = _number(
        0.2, "share of a round's clients whose updates trimmed_mean and krum take to be false", above=True, most=0.49
    )
    norm_ratio: float = _number(
        10.0, "updates that change this many times as much as the median's are excluded; 0: none"
    )
    weighting: str = _choice("examples", "what a client's update weighs in the mean", "examples", "equal")
    dp_clip: float = _number(0.0, "L2 norm to which a client clips its whole change for differential privacy; 0: off")
    dp_noise: float = _number(0.0, "deviation of the noise of a round's sum, in units of dp_clip")
    dp_delta: float = _number(1e-5, "delta of the (epsilon, delta) in the ledger", above=True, most=0.1)
    compression: str = _choice(
        "none", "what a client sends: weights, or their changes in few bits", "none", "float16", "int8"
    )

    seed: int = _count(0, "seed of every random stream", least=0, most=2**63 - 1)
    device: str = _choice(AUTO, "where tensors live; auto: cuda if there is one", AUTO, "cpu", "cuda")
    precision: str = _choice(
        "float32", "numbers of the network's passes on a GPU; alphas are float32 anyhow", "float32", "bfloat16"
    )
    workers: int | str = _count(AUTO, "Ray workers of `fedmetanas search`; auto: from the cores", most=1024)
    round_timeout_s: float = _number(3600.0, "seconds a round waits for its clients", above=True)
    run_name: str = _text("", "name of the run folder; empty: method, dataset and time")
    runs_dir: str = _text("", "where run folders go; empty: $FEDMETANAS_RUNS, else runs/ under the launch directory")
    resume: str = _text("", "a run folder to go on with, alone: all keys are that run's")

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
        config = cls(**{key: _checked(known[key], value) for key, value in values.items()})
        config._check_together()
        return config

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
        if self.resume and others != ["resume"]:
            given = next(name for name in others if name != "resume")
            raise RefusalError(f"{given}: a resumed run has its own", "give resume alone")

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
    small = height * width <= 16 * 16
    return {
        # At most a quarter of a small set: clients that hold everything would all be the same client.
        "samples_per_client": min(64 if num_images <= 5000 else 600, max(1, num_images // 4)),
        "num_rounds": 150 if small else 140,
        # The found network is cheap to train, so most rounds go to it.
        "search_fraction": 0.45 if small else 0.4,
        "local_epochs": 5 if small else 2,
        "batch_size": 16 if small else 32,
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


def _checked(spec: Any, value: Any) -> Any:
    limits = spec.metadata
    if isinstance(value, str) and value == AUTO and spec.default == AUTO:
        return value
    if limits["kind"] is str:
        return _checked_text(spec.name, value, limits.get("choices"))
    wanted = "a whole number" if limits["kind"] is int else "a number"
    fix = f"give {wanted} {_range(limits)}" + (" or auto" if spec.default == AUTO else "")
    if value == "":
        raise RefusalError(f"{spec.name}: no value was given", fix)
    if isinstance(value, str) and value.replace(",", "", 1).isdigit() and "," in value:
        raise RefusalError(f"{spec.name}: {value!r} is not a number", f"write {value.replace(',', '.')}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, int) and abs(value) > 10**18:  # Python itself neither prints nor converts integers much larger
        raise RefusalError(f"{spec.name}: a number of more than 18 digits is out of range", fix)
    if not is_number or not isfinite(value) or (limits["kind"] is int and int(value) != value):
        raise RefusalError(f"{spec.name}: {repr(value)[:80]} is not {wanted}", fix)
    low, high = limits["least"], limits["most"]
    if value < low or value > high or (limits.get("above") and value <= low):
        raise RefusalError(f"{spec.name}: {value!r} is out of range", fix)
    return limits["kind"](value)


def _range(limits: Mapping[str, Any]) -> str:
    return f"{'above' if limits.get('above') else 'of at least'} {limits['least']} and at most {limits['most']}"


def _checked_text(name: str, value: Any, choices: tuple[str, ...] | None) -> str:
    if not isinstance(value, str):
        raise RefusalError(f"{name}: {value!r} is not text", f"write {name}='...'")
    if choices and value not in choices:
        near = get_close_matches(value, choices, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RefusalError(f"{name}: {value!r} is unknown", f"{hint}choose one of {', '.join(choices)}")
    return value
