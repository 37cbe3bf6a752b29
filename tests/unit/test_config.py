import math
from typing import Any

import pytest

from fedmetanas_core.commands.pairs import parse_pairs
from fedmetanas_core.config import PRESETS, Config, defaults
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.space.spec import SpaceSpec


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dir_alpha", 0),
        ("dir_alpha", -1),
        ("dir_alpha", math.nan),
        ("dir_alpha", math.inf),
        ("dir_alpha", "oops"),
        ("dir_alpha", True),
        ("num_rounds", 0),
        ("num_rounds", -3),
        ("num_rounds", 2.5),
        ("num_rounds", "many"),
        ("local_epochs", 0),
        ("batch_size", 0),
        ("samples_per_client", 0),
        ("num_clients", 0),
        ("clients_per_round", 0),
        ("clients_per_round", "auto"),
        ("seed", -1),
        ("partition", "dirichlett"),
        ("device", "tpu"),
        ("preset", "paper"),
        ("run_name", 7),
        ("momentum", 1.0),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(RefusalError) as caught:
        Config.from_mapping({key: value})
    message = str(caught.value)
    assert message.startswith(f"{key}: {value!r}")
    assert "\n" not in message
    assert "; " in message


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(RefusalError, match=r"^dir_alhpa: unknown key; did you mean dir_alpha\?$"):
        Config.from_mapping({"dir_alhpa": 0.1})


def test_a_part_of_a_key_names_the_keys_that_have_it() -> None:
    with pytest.raises(RefusalError, match="lr: unknown key; did you mean task_lr_weights or task_lr_alphas or"):
        Config.from_mapping({"lr": 0.1})


def test_a_decimal_comma_and_an_empty_value_get_a_hint() -> None:
    with pytest.raises(RefusalError, match=r"dir_alpha: '0,1' is not a number; write 0\.1"):
        Config.from_mapping({"dir_alpha": "0,1"})
    with pytest.raises(RefusalError, match="num_rounds: no value was given"):
        Config.from_mapping({"num_rounds": ""})


def test_clients_of_a_small_set_do_not_all_hold_everything() -> None:
    assert Config().resolve(8, 8, 60).samples_per_client == 15
    assert Config().resolve(8, 8, 1437).samples_per_client == 64
    assert Config().resolve(28, 28, 60_000).samples_per_client == 600


def test_more_clients_per_round_than_clients_is_refused() -> None:
    with pytest.raises(RefusalError, match="clients_per_round: 5 is more than num_clients=4"):
        Config.from_mapping({"num_clients": 4})


def test_a_resumed_run_takes_no_other_key() -> None:
    assert Config.from_mapping({**defaults(), "resume": "/some/run"}).resume == "/some/run"
    with pytest.raises(RefusalError, match="seed: a resumed run has its own; give resume alone, or with ray_address"):
        Config.from_mapping({"resume": "/some/run", "seed": 3})
    elsewhere = Config.from_mapping({"resume": "/some/run", "ray_address": "none"})
    assert (elsewhere.ray_address, elsewhere.ray_cluster) == ("none", "")


def test_numbers_take_the_kind_of_their_key() -> None:
    config = Config.from_mapping({"dir_alpha": 1, "num_rounds": 3.0})
    assert (config.dir_alpha, type(config.dir_alpha)) == (1.0, float)
    assert (config.num_rounds, type(config.num_rounds)) == (3, int)


def test_contract_defaults() -> None:
    expected = {
        "method": "fedmetanas",
        "dataset": "digits",
        "partition": "dirichlet",
        "dir_alpha": 0.3,
        "num_clients": 100,
        "clients_per_round": 5,
        "seed": 0,
    }
    assert {key: defaults()[key] for key in expected} == expected
    auto = ["num_rounds", "local_epochs", "batch_size", "init_channels", "num_cells", "num_nodes", "samples_per_client"]
    assert all(defaults()[key] == "auto" for key in auto)


def test_resolving_leaves_no_auto_but_what_depends_on_machine_data_or_method() -> None:
    resolved = Config().resolve(28, 28, 60_000).to_dict()
    left = {key for key, value in resolved.items() if value == "auto"}
    on_nodes = {"class_names", "image_shape", "pixel_mean", "pixel_std", "min_clients"}
    # The first two depend on the data, the last one on the method.
    assert left == {"image_size", "augment", "device", "workers", "adapt_epochs", "latency_table", *on_nodes}


def test_a_preset_fills_only_what_was_left_open() -> None:
    literal = Config.from_mapping({"preset": "paper_literal", "inner_steps": 2}).resolve(8, 8, 1437)
    assert literal.inner_steps == 2
    for key, value in PRESETS["paper_literal"].items():
        if key != "inner_steps":
            assert getattr(literal, key) == value
    assert set(PRESETS["paper_literal"]) == set(PRESETS["recommended"])


def test_rates_follow_the_number_of_rounds() -> None:
    assert Config.from_mapping({"num_rounds": 200}).resolve(8, 8, 1437).meta_lr_alphas == 3e-3
    assert Config.from_mapping({"num_rounds": 201}).resolve(8, 8, 1437).meta_lr_alphas == 3e-4
    for rounds, rates in ((200, (0.02, 0.01, 0.03)), (201, (0.002, 0.001, 0.001))):
        config = Config.from_mapping({"num_rounds": rounds}).resolve(8, 8, 1437)
        assert (config.fedpnas_lr, config.meta_dnas_lr, config.feddsnas_lr) == rates


def test_large_images_get_the_imagenet_stem() -> None:
    assert Config().resolve(224, 224, 5000).stem == "imagenet"
    assert Config().resolve(32, 32, 5000).stem == "stride2"
    assert Config().resolve(8, 8, 5000).stem == "cifar"
    assert Config.from_mapping({"init_channels": 16}).resolve(32, 32, 5000).stem == "cifar"


@pytest.mark.parametrize(
    ("side", "images", "expected"),
    [(8, 1437, (64, 5, 16)), (36, 1200, (64, 5, 16)), (36, 5001, (600, 2, 32)), (8, 60_000, (600, 5, 16))],
)
def test_small_shares_are_trained_in_enough_steps(side: int, images: int, expected: tuple[int, int, int]) -> None:
    config = Config().resolve(side, side, images)
    assert (config.samples_per_client, config.local_epochs, config.batch_size) == expected


@pytest.mark.parametrize(("height", "width", "stem"), [(8, 64, "cifar"), (40, 12, "cifar"), (16, 64, "stride2")])
def test_the_shorter_side_decides_the_stem(height: int, width: int, stem: str) -> None:
    config = Config().resolve(height, width, 5000)
    assert config.stem == stem
    SpaceSpec(  # raises RefusalError where the cells would run out of pixels
        init_channels=int(config.init_channels),
        num_cells=int(config.num_cells),
        num_nodes=int(config.num_nodes),
        in_channels=1,
        num_classes=10,
        height=height,
        width=width,
        stem=config.stem,
    )


@pytest.mark.parametrize("digits", [19, 400, 5000])
def test_a_number_of_absurd_length_is_refused(digits: int) -> None:
    with pytest.raises(RefusalError) as refused:
        Config.from_mapping(parse_pairs([f"num_rounds={'9' * digits}"]))
    assert "num_rounds" in str(refused.value)
    assert len(str(refused.value)) < 300


def test_outer_rate_of_weights_follows_rounds_and_size() -> None:
    assert Config().resolve(8, 8, 1437).meta_lr_weights == 0.025
    assert Config().resolve(28, 28, 60_000).meta_lr_weights == 0.1
    assert Config.from_mapping({"num_rounds": 1000}).resolve(28, 28, 60_000).meta_lr_weights == 0.025
    assert Config().resolve(28, 28, 60_000).search_fraction == 0.4
    assert Config.from_mapping({"num_rounds": 1000}).resolve(28, 28, 60_000).search_fraction == 0.8
    assert Config.from_mapping({"meta_lr_weights": 0.5}).resolve(28, 28, 60_000).meta_lr_weights == 0.5


def test_the_literal_reading_of_the_paper() -> None:
    """No fade, equation 6 with plain steps on both levels, one task an epoch, M = 5, clients vote, thresholds alone."""
    assert PRESETS["paper_literal"] == {
        "noise": "full",
        "task": "single_pair",
        "inner_steps": 5,
        "inner": "alternate",
        "task_alpha_optimizer": "sgd",
        "meta_alpha_optimizer": "sgd",
        "prune_rule": "client_vote",
        "prune_cap": "off",
        "none_policy": "legal",
    }


@pytest.mark.parametrize(
    ("key", "value", "bound"), [("num_nodes", 200, 16), ("num_rounds", 1e12, 10**9), ("seed", 2**64, 2**63 - 1)]
)
def test_a_refusal_names_the_bound(key: str, value: Any, bound: int) -> None:
    with pytest.raises(RefusalError, match=f"at most {bound}"):
        Config.from_mapping({key: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prune_score": "perturb", "prune_rule": "client_vote"}, "prune_score: 'perturb' has no say"),
        ({"prune_score": "perturb", "preset": "paper_literal"}, "prune_score: 'perturb' has no say"),
        ({"relaxation": "dirichlet", "sample": "per_cell"}, "sample: 'per_cell' has no say"),
    ],
)
def test_what_would_have_no_effect_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusalError, match=words):
        Config.from_mapping(values)
    Config.from_mapping(dict([next(iter(values.items()))]))


def test_tables_are_refused() -> None:
    with pytest.raises(RefusalError, match="search: keys are not grouped in tables"):
        Config.from_mapping({"search": {"seed": 1}})
