"""A table as a TOML file describes it: methods x datasets x partitions x seeds."""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmetanas_core.config import Config
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.methods.registry import check_method

MEASURES = {
    "test_accuracy": "global accuracy",
    "test_accuracy_last": "global accuracy over the last evaluations",
    "client_accuracy_mean": "average client accuracy",
    "client_accuracy_adapted_mean": "average client accuracy after adaptation",
    "client_accuracy_used_mean": "average accuracy of the model that each client would use",
}
_TOP = (
    *("title", "about", "methods", "seeds", "measure", "rows_from"),
    *("settings", "dataset", "partition", "method"),
)
_NOT_FOR_TABLES = ("method", "seed", "run_name", "runs_dir", "resume")


@dataclass(frozen=True)
class Setting:
    """A dataset or a partition: what it is called, and the run-config keys that make it.

    ``method`` holds further keys for single methods, ``target`` is the accuracy to which times are measured, and
    ``published`` what a paper reports, by method. Where both have a say, the partition's goes before the dataset's.
    """

    name: str
    keys: dict[str, Any]
    target: float | None = None
    published: dict[str, str] = field(default_factory=dict)
    method: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedRun:
    """One cell of the table and one seed; ``keys`` is all that the run is given."""

    method: str
    dataset: Setting
    partition: Setting
    seed: int
    keys: dict[str, Any]

    @property
    def name(self) -> str:
        """The run in a file name."""
        parts = (self.method, self.dataset.name, self.partition.name, f"seed{self.seed}")
        return "--".join("".join(c if c.isalnum() or c in "._" else "-" for c in part) for part in parts)

    @property
    def words(self) -> str:
        """The run in a sentence."""
        return f"{self.method} on {self.dataset.name}, {self.partition.name}, seed {self.seed}"

    @property
    def fingerprint(self) -> str:
        """Differs when anything differs that the run is given, but for the cluster that it runs on and its trackers."""
        given = {key: value for key, value in self.keys.items() if key not in ("ray_address", "track")}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Table:
    """Everything a table is made of. The first method is the one that the others are compared with.

    ``rows_from`` names tables whose rows serve here as well, where they were given the same.
    """

    name: str
    title: str
    about: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    measure: str
    datasets: tuple[Setting, ...]
    partitions: tuple[Setting, ...]
    runs: tuple[PlannedRun, ...]
    rows_from: tuple[str, ...] = ()


def read_table(path: Path) -> Table:
    """The table in this file, every run of it checked for form; raises RefusalError."""
    content = _content(path)
    methods, seeds = _list_of(content, "methods", str, path), _list_of(content, "seeds", int, path)
    for method in methods:
        try:
            check_method(method)
        except RefusalError as error:
            raise RefusalError(f"{path}: {error.what}", error.fix) from error
    measure = str(content.get("measure", "test_accuracy"))
    if measure not in MEASURES:
        raise RefusalError(f"{path}: measure {measure!r} is unknown", f"choose one of {', '.join(MEASURES)}")
    datasets, partitions = (_settings(content, kind, methods, path) for kind in ("dataset", "partition"))
    shared, own = _mapping(content, "settings", path), _keys_of_methods(content, methods, path)
    runs = tuple(
        _run(method, dataset, partition, seed, shared, own.get(method, {}), path)
        for dataset in datasets
        for partition in partitions
        for seed in seeds
        for method in methods
    )
    _refuse_twins(runs, path)
    return Table(
        name=path.stem,
        title=str(content.get("title", path.stem)),
        about=str(content.get("about", "")).strip(),
        methods=tuple(methods),
        seeds=tuple(seeds),
        measure=measure,
        datasets=datasets,
        partitions=partitions,
        runs=runs,
        rows_from=_lenders(content, path),
    )


def _content(path: Path) -> dict[str, Any]:
    """What the file says, with no key that a table does not have."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusalError(f"{path}: {error.strerror}", "give a table such as conf/table-2-small.toml") from error
    except ValueError as error:
        raise RefusalError(f"{path}: not TOML: {error}", "mend it") from error
    for key in content:
        if key not in _TOP:
            raise RefusalError(f"{path}: {key} is unknown", f"a table has {', '.join(_TOP)}")
    return content


def _mapping(content: Mapping[str, Any], key: str, path: Path, within: str = "") -> dict[str, Any]:
    found = content.get(key, {})
    if not isinstance(found, dict):
        what = f"{path}: {within}{key} = {found!r} is not a table of keys"
        raise RefusalError(what, f"write {within}{key} = {{ KEY = VALUE }}")
    return found


def _of_methods(content: Mapping[str, Any], key: str, methods: Sequence[str], path: Path) -> dict[str, Any]:
    """What is given by method, of methods that take part."""
    found = _mapping(content, key, path)
    for method in found:
        if method not in methods:
            raise RefusalError(f"{path}: [{key}.{method}] is not among the methods", "add it, or take it out")
    return found


def _keys_of_methods(content: Mapping[str, Any], methods: Sequence[str], path: Path) -> dict[str, dict[str, Any]]:
    """Further keys for single methods."""
    own = _of_methods(content, "method", methods, path)
    return {method: _mapping(own, method, path, "method.") for method in own}


def _list_of(content: Mapping[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    values = content.get(key)
    fine = isinstance(values, list) and values and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
    if not fine or len(set(values)) != len(values):  # type: ignore[arg-type]
        example = '["fedmetanas", "fednas"]' if kind is str else "[0, 1, 2]"
        raise RefusalError(f"{path}: {key} is not a list of different values", f"write {key} = {example}")
    return values  # type: ignore[return-value]


def _lenders(content: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The tables to borrow from, which stand beside this one."""
    names = _list_of(content, "rows_from", str, path) if "rows_from" in content else []
    for name in names:
        if Path(name).name != name or not path.with_name(f"{name}.toml").is_file():
            raise RefusalError(f"{path}: rows_from {name!r}: no {name}.toml beside it", "write a table's name")
    return tuple(names)


def _settings(content: Mapping[str, Any], kind: str, methods: Sequence[str], path: Path) -> tuple[Setting, ...]:
    given = content.get(kind)
    if not isinstance(given, list) or not given:
        what = "without a" if given is None else f"[{kind}] is not"
        raise RefusalError(f"{path}: {what} [[{kind}]]", f'write [[{kind}]] and under it name = "..."')
    return tuple(_setting(each, kind, methods, path) for each in given)


def _setting(given: Any, kind: str, methods: Sequence[str], path: Path) -> Setting:
    if not isinstance(given, dict) or not isinstance(given.get("name"), str) or not given["name"].strip():
        raise RefusalError(f"{path}: a [[{kind}]] without a name", 'write name = "..."')
    keys = {key: value for key, value in given.items() if key not in ("name", "target", "published", "method")}
    if kind == "dataset":
        keys.setdefault("dataset", given["name"])
    elif "dataset" in keys:
        raise RefusalError(f"{path}: [[{kind}]] {given['name']} names a dataset", "write it under [[dataset]]")
    target = given.get("target")
    number = isinstance(target, (int, float)) and not isinstance(target, bool)
    if target is not None and not (number and 0 < target <= 1):
        raise RefusalError(f"{path}: target {target!r} of {given['name']} is not an accuracy", "give a share up to 1")
    published = {method: str(figure) for method, figure in _of_methods(given, "published", methods, path).items()}
    return Setting(given["name"], keys, target, published, _keys_of_methods(given, methods, path))


def _run(
    method: str,
    dataset: Setting,
    partition: Setting,
    seed: int,
    shared: Mapping[str, Any],
    own: Mapping[str, Any],
    path: Path,
) -> PlannedRun:
    single = {**own, **dataset.method.get(method, {}), **partition.method.get(method, {})}
    keys = {**shared, **dataset.keys, **partition.keys, **single}
    for key in _NOT_FOR_TABLES:
        if key in keys:
            raise RefusalError(f"{path}: {key} is not a setting of a table", "take it out")
    keys = {"method": method, "seed": seed, **keys}
    try:
        Config.from_mapping(keys)
    except RefusalError as error:
        raise RefusalError(f"{path}: {method} on {dataset.name}: {error.what}", error.fix) from error
    return PlannedRun(method, dataset, partition, seed, keys)


def _refuse_twins(runs: Sequence[PlannedRun], path: Path) -> None:
    """Two runs of one name would overwrite each other's rows."""
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        if (twin := seen.setdefault(run.name, run)) is not run:
            places = [f"{each.dataset.name!r} with {each.partition.name!r}" for each in (twin, run)]
            raise RefusalError(
                f"{path}: {places[0]} and {places[1]} have the same file name",
                "give each dataset and partition its own",
            )
