"""Which methods a key of the search has a say in; elsewhere it is ignored, and whoever gives it there is told."""

from collections.abc import Iterable

_FIXED = ("fedavg", "fine_tuning", "per_fedavg", "fedrep", "fedbabu")
_DUAL = ("fedmetanas", "random_search", "meta_fedpnas", "meta_perfedrlnas")
_MIXED = ("fedmetanas", "meta_fedpnas", "meta_dnas")
_ANNEALED = (*_MIXED, "meta_perfedrlnas")
_RETRAINED = ("fednas", "local_darts")

READ_BY: dict[str, tuple[str, ...]] = {
    "model": _FIXED,
    **dict.fromkeys(("task", "inner_steps"), _DUAL),
    **dict.fromkeys(("inner", "task_lr_alphas", "task_alpha_optimizer"), ("fedmetanas", "meta_fedpnas")),
    **dict.fromkeys(("relaxation", "sample"), _MIXED),
    **dict.fromkeys(("search_fraction", "noise", "temperature_start", "temperature_end"), _ANNEALED),
    "budget_penalty": ("fedmetanas", "fedpnas", *_RETRAINED),
    "prune_threshold": ("fedmetanas", "meta_fedpnas", "meta_perfedrlnas"),
    **dict.fromkeys(("prune_cap", "skip_cap"), ("fedmetanas", "meta_fedpnas")),
    "none_policy": _MIXED,
    **dict.fromkeys(("prune_rule", "prune_temperature", "prune_score"), ("fedmetanas",)),
    "meta_lr_alphas": ("fedmetanas", "meta_fedpnas", *_RETRAINED),
    "meta_alpha_optimizer": ("fedmetanas", "meta_fedpnas"),
    **dict.fromkeys(("retrain_fraction", "drop_path"), _RETRAINED),
    "per_fedavg": ("per_fedavg",),
    "policy_lr": ("fedrlnas",),
    "personal_policy_lr": ("perfedrlnas", "meta_perfedrlnas"),
    "policy_explore": ("fedrlnas", "perfedrlnas", "meta_perfedrlnas"),
    **dict.fromkeys(("fedpnas_lr", "fedpnas_samples"), ("fedpnas",)),
    "meta_dnas_lr": ("meta_dnas",),
    "feddsnas_lr": ("feddsnas",),
}


def unread(method: str, given: Iterable[str]) -> list[str]:
    """Those of the keys that change nothing in this method, in the order given."""
    return [key for key in given if method not in READ_BY.get(key, (method,))]
