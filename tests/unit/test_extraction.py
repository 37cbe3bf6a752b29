"""A network cut out of a one-hot supernet computes what the supernet did; genotypes and files survive a round trip."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_architecture, random_one_hot, random_supernet, randomise, set_logits, small_spec, stream

from fedmetanas_core.config import Config
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.search.evaluation import refresh_statistics
from fedmetanas_core.search.local_data import LocalData
from fedmetanas_core.search.relaxation import Relaxation, relax
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.genotype import Genotype, Node, darts_genotype, pairwise_genotype
from fedmetanas_core.space.network import ImageFormat, Network, load_network, save_network
from fedmetanas_core.space.spec import PRIMITIVES, SpaceSpec

GENOTYPE = Genotype(
    normal=((("sep_conv_3x3", 0), ("skip_connect", 1)), (("max_pool_3x3", 0), ("dil_conv_5x5", 2))),
    reduce=((("avg_pool_3x3", 0), ("skip_connect", 1)), (("sep_conv_5x5", 1), ("dil_conv_3x3", 2))),
)
FORMAT = ImageFormat(mean=(0.25,), std=(0.5,), class_names=("cat", "dog", "eel"))


def images(spec: SpaceSpec, count: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, spec.in_channels, spec.height, spec.width, generator=stream(8), dtype=dtype)


def local_data(spec: SpaceSpec, count: int, dtype: torch.dtype) -> LocalData:
    labels = torch.arange(count) % spec.num_classes
    return LocalData(images(spec, count, dtype), labels, lambda batch, _: batch)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("seed", range(6))
def test_extraction_is_lossless_for_random_one_hot_masks(seed: int, dtype: torch.dtype, limit: float) -> None:
    spec = small_spec(num_cells=3 + seed % 3, num_nodes=1 + seed % 4, side=8 + seed % 2)
    architecture = random_one_hot(random_architecture(spec, seed, 2.0, dtype), stream(seed))
    everything = random_supernet(spec, torch.ones_like(architecture.operation_mask), seed, dtype)
    refresh_statistics(everything, local_data(spec, 20, dtype))
    x = images(spec, dtype=dtype)
    with torch.no_grad():
        mixed = everything(x, relax(architecture, 0.1))
        network = Network(pairwise_genotype(architecture), spec, dtype=dtype).inherit(everything).eval()
        found = network(x)
    assert float(mixed.abs().max()) > 1e-3
    assert float((found - mixed).abs().max()) <= limit


@pytest.mark.parametrize("training", [True, False])
def test_a_one_hot_supernet_and_its_network_are_the_same_module_of_the_same_weights(training: bool) -> None:
    spec = small_spec(num_nodes=4)
    architecture = random_one_hot(random_architecture(spec, 5), stream(5))
    supernet = random_supernet(spec, architecture.operation_mask, 3).train(training)
    network = Network(pairwise_genotype(architecture), spec, dtype=torch.float64).inherit(supernet).train(training)  # type: ignore[arg-type]
    assert dict(network.named_parameters()).keys() == dict(supernet.named_parameters()).keys()
    assert Relaxation().expected(architecture, 0.1) is None
    assert torch.equal(network(images(spec)), supernet(images(spec)))


@pytest.mark.parametrize("num_rounds", [1, 7, 40])
@pytest.mark.parametrize("policy", ["drop_first", "absent"])
def test_extraction_is_lossless_after_the_real_events_of_a_run(policy: str, num_rounds: int) -> None:
    spec = small_spec(num_nodes=3)
    config = Config.from_mapping({"num_rounds": num_rounds, "none_policy": policy}).resolve(8, 8, 100)
    method, generator = make_method(config, spec), stream(num_rounds)
    state = method.initial_state()
    full = state.network()
    randomise(full, generator)
    state.weights, state.statistics = full.weights.detach().clone(), full.statistics.clone()
    sizes = [len(state.weights)]
    for number in range(1, num_rounds + 1):
        plan = method.plan(number)
        if plan.prunes:
            set_logits(state.architecture, generator, 0.3)
        event = method.prune(state, [], plan)
        assert (event is None) or plan.prunes
        sizes.append(len(state.weights))
    assert state.architecture.is_one_hot()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    network, x = method.extract(state), images(spec, dtype=torch.float32)
    with torch.no_grad():
        mixed = full(x, relax(state.architecture, 0.1))  # the weights as they were before any event
        assert float((network(x) - mixed).abs().max()) <= 1e-5
        assert float((network(x) - state.network()(x)).abs().max()) <= 1e-5
    assert not network.training


def test_selecting_weights_keeps_every_survivor_by_name() -> None:
    spec = small_spec(num_nodes=2)
    config = Config.from_mapping({"num_rounds": 20, "search_fraction": 0.8})
    method = make_method(config.resolve(8, 8, 100), spec)
    state = method.initial_state()
    before = {name: tensor.detach().clone() for name, tensor in state.network().named_parameters()}
    set_logits(state.architecture, stream(1))
    method.prune(state, [], method.plan(13))
    after = dict(state.network().named_parameters())
    assert set(after) < set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def darts_example() -> Architecture:
    """Two nodes, so edges 0, 1 into node 0 and 2, 3, 4 into node 1, from the two inputs and from node 0."""
    architecture = Architecture(small_spec(num_nodes=2))
    with torch.no_grad():
        rows = architecture.operation_logits[0]
        rows[0, PRIMITIVES.index("sep_conv_3x3")] = 1.0
        rows[1, PRIMITIVES.index("none")] = 9.0  # none wins the edge, the best other operation is taken
        rows[1, PRIMITIVES.index("skip_connect")] = 2.0
        rows[2, PRIMITIVES.index("dil_conv_5x5")] = 2.0  # strength e^2 / (e^2 + 7) = 0.51
        rows[3, PRIMITIVES.index("none")] = 5.0  # the largest operation 3.0 weighs e^3 / (e^5 + e^3 + 6) = 0.12
        rows[3, PRIMITIVES.index("max_pool_3x3")] = 3.0
        rows[4, PRIMITIVES.index("avg_pool_3x3")] = 1.0  # e / (e + 7) = 0.28
        architecture.input_logits[0, 1] = torch.tensor([3.0, 0.0, 0.0])  # (0, 1): darts does not look at it
    return architecture


def test_the_darts_rule_by_hand() -> None:
    genotype = darts_genotype(darts_example())
    assert genotype.normal == (
        (("sep_conv_3x3", 0), ("skip_connect", 1)),
        (("dil_conv_5x5", 0), ("avg_pool_3x3", 2)),
    )


def test_the_pairwise_rule_by_hand() -> None:
    genotype = pairwise_genotype(darts_example())
    assert genotype.normal == (
        (("sep_conv_3x3", 0), ("skip_connect", 1)),
        (("dil_conv_5x5", 0), ("max_pool_3x3", 1)),
    )


def test_both_rules_choose_among_the_alive_only() -> None:
    architecture = darts_example()
    operations, pairs = architecture.operation_mask.clone(), architecture.input_mask.clone()
    operations[0, 2, PRIMITIVES.index("dil_conv_5x5")] = False
    pairs[0, 1] = torch.tensor([False, False, True])  # (1, 2)
    architecture.restrict(operations, pairs)
    for genotype in (pairwise_genotype(architecture), darts_genotype(architecture)):
        assert genotype.normal[1] == (("max_pool_3x3", 1), ("avg_pool_3x3", 2))


def test_cutting_by_the_darts_rule_changes_an_unpruned_network_and_pairwise_a_one_hot_one_does_not() -> None:
    spec = small_spec(num_nodes=2)
    architecture = darts_example().to(torch.float64)
    supernet = random_supernet(spec, architecture.operation_mask, 1)
    network = Network(darts_genotype(architecture), spec, dtype=torch.float64).inherit(supernet).eval()
    with torch.no_grad():
        assert float((network(images(spec)) - supernet(images(spec), relax(architecture, 1.0))).abs().max()) > 1e-2


@pytest.mark.parametrize("seed", range(4))
def test_masks_of_the_genotype_of_one_hot_masks_are_these_masks(seed: int) -> None:
    spec = small_spec(num_nodes=1 + seed)
    architecture = random_one_hot(random_architecture(spec, seed), stream(seed))
    operations, pairs = pairwise_genotype(architecture).masks(spec)
    assert torch.equal(operations, architecture.operation_mask)
    assert torch.equal(pairs, architecture.input_mask)


def test_a_genotype_survives_json() -> None:
    assert Genotype.from_json(GENOTYPE.to_json()) == GENOTYPE
    assert json.loads(GENOTYPE.to_json())["concat"] == [2, 3]
    assert GENOTYPE.num_nodes == 2


def _changed(change: Callable[[dict[str, Any]], Any]) -> str:
    value = GENOTYPE.to_dict()
    change(value)
    return json.dumps(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"normal"',
        "{}",
        _changed(lambda value: value.pop("reduce")),
        _changed(lambda value: value.update(normal=[])),
        _changed(lambda value: value.update(normal=[], reduce=[])),
        _changed(lambda value: value["normal"].pop()),
        _changed(lambda value: value["normal"][0].append(["skip_connect", 0])),
        _changed(lambda value: value["normal"][0].__setitem__(0, ["sep_conv_7x7", 0])),
        _changed(lambda value: value["normal"][0].__setitem__(0, ["none", 0])),
        _changed(lambda value: value["normal"][0].__setitem__(0, ["skip_connect", 1])),
        _changed(lambda value: value["normal"][0].__setitem__(0, ["skip_connect", 2])),
        _changed(lambda value: value["normal"][0].__setitem__(0, ["skip_connect", -1])),
        _changed(lambda value: value["normal"][0].__setitem__(0, ["skip_connect", "first"])),
        _changed(lambda value: value["normal"][0].__setitem__(0, ["skip_connect"])),
        _changed(lambda value: value["normal"].__setitem__(0, 5)),
    ],
)
def test_what_is_no_genotype_is_refused(text: str) -> None:
    with pytest.raises(FedMetaNASError, match="genotype"):
        Genotype.from_json(text)


def test_a_network_refuses_a_genotype_of_another_number_of_nodes() -> None:
    with pytest.raises(FedMetaNASError, match=r"2 nodes.*3"):
        Network(GENOTYPE, small_spec(num_nodes=3))


@pytest.mark.parametrize(
    "choices", [(), (("skip_connect", 1),), (("skip_connect", 0), ("skip_connect", 1), ("skip_connect", 2))]
)
def test_a_node_that_reads_no_pair_is_a_genotype_but_not_of_a_space_of_pairs(choices: Node) -> None:
    """Where nodes read all their inputs, they have as many choices as edges with an operation."""
    genotype = replace(GENOTYPE, normal=(GENOTYPE.normal[0], choices))
    assert Genotype.from_json(genotype.to_json()) == genotype
    with pytest.raises(FedMetaNASError, match="genotype: node 1 must have two different sources"):
        Network(genotype, small_spec())
    assert Network(genotype, replace(small_spec(), inputs="all")).genotype == genotype


def saved(directory: Path) -> Network:
    network = Network(GENOTYPE, small_spec())
    randomise(network, stream(2))
    network.eval()
    save_network(network, directory / "model", FORMAT)
    return network


def test_a_network_survives_its_files_bit_for_bit(tmp_path: Path) -> None:
    network = saved(tmp_path)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["genotype.json", "weights.safetensors"]
    x = images(network.spec, dtype=torch.float32)
    for place in (tmp_path, tmp_path / "model", str(tmp_path)):
        loaded, images_format = load_network(place)
        assert images_format == FORMAT
        assert (loaded.genotype, loaded.spec) == (network.genotype, network.spec)
        assert not loaded.training
        assert torch.equal(loaded.weights, network.weights)
        assert torch.equal(loaded.statistics, network.statistics)
        assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.uint8])
def test_arrays_and_other_floats_give_the_same_logits(tmp_path: Path, kind: type) -> None:
    network = saved(tmp_path)
    shades = np.random.default_rng(0).integers(0, 2, (3, *images(network.spec).shape[1:]))  # 0 and 1 are exact in all
    expected = network(FORMAT.normalise(torch.tensor(shades, dtype=torch.float32)))
    given = (shades * 255 if kind is np.uint8 else shades).astype(kind)
    assert torch.allclose(network(FORMAT.normalise(given)), expected, atol=1e-2 if kind is np.float16 else 1e-5)


def test_the_image_format_normalises_by_hand() -> None:
    assert FORMAT.normalise(torch.tensor([0.25, 0.75]).view(2, 1, 1, 1)).flatten().tolist() == [0.0, 1.0]
    colour = ImageFormat(mean=(0.5, 0.25), std=(0.25, 0.5), class_names=())
    assert colour.normalise(torch.tensor([0.5, 1.0]).view(1, 2, 1, 1)).flatten().tolist() == [0.0, 1.5]


def test_floats_from_0_to_255_are_refused_with_the_remedy() -> None:
    with pytest.raises(RefusalError, match="divide by 255"):
        FORMAT.normalise(torch.tensor([0.0, 255.0]).view(2, 1, 1, 1))
    FORMAT.normalise(torch.tensor([-0.1, 1.3]).view(2, 1, 1, 1))


def test_bytes_are_scaled_before_they_are_normalised() -> None:
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    expected = FORMAT.normalise(torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1, 1))
    assert torch.allclose(FORMAT.normalise(levels), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (torch.zeros(2, 3, 8, 8), "1 channel"),
        (torch.zeros(8, 8), "1 channel"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "floats in"),
    ],
)
def test_images_that_cannot_be_meant_are_not_normalised(wrong: torch.Tensor, reason: str) -> None:
    with pytest.raises(RefusalError, match=reason):
        FORMAT.normalise(wrong)


def test_the_network_takes_only_images_of_its_size(tmp_path: Path) -> None:
    network = saved(tmp_path)
    spec = network.spec
    for shape in (
        (2, spec.in_channels, spec.height, spec.width + 4),
        (2, spec.in_channels + 1, spec.height, spec.width),
        (spec.in_channels, spec.height, spec.width),
    ):
        with pytest.raises(RefusalError, match="crop and scale them"):
            network(torch.zeros(shape))


def _rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


BREAKAGES: dict[str, Callable[[Path], Any]] = {
    "no genotype": lambda model: (model / "genotype.json").unlink(),
    "no weights": lambda model: (model / "weights.safetensors").unlink(),
    "half a genotype": lambda model: (model / "genotype.json").write_text('{"genotype": {'),
    "a list": lambda model: (model / "genotype.json").write_text("[]"),
    "no space": lambda model: _rewrite(model / "genotype.json", lambda facts: facts.pop("space")),
    "unknown field": lambda model: _rewrite(model / "genotype.json", lambda facts: facts["space"].update(depth=3)),
    "unknown stem": lambda model: _rewrite(model / "genotype.json", lambda facts: facts["space"].update(stem="mnist")),
    "images a list": lambda model: _rewrite(model / "genotype.json", lambda facts: facts.update(images=[])),
    "other classes": lambda model: _rewrite(
        model / "genotype.json", lambda facts: facts["space"].update(num_classes=4)
    ),
    "other genotype": lambda model: _rewrite(
        model / "genotype.json", lambda facts: facts["genotype"]["normal"][0].__setitem__(0, ["sep_conv_5x5", 0])
    ),
    "half the weights": lambda model: (model / "weights.safetensors").write_bytes(
        (model / "weights.safetensors").read_bytes()[:-100]
    ),
    "empty weights": lambda model: (model / "weights.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_model_folder_is_refused_in_one_line(tmp_path: Path, breakage: str) -> None:
    saved(tmp_path)
    BREAKAGES[breakage](tmp_path / "model")
    with pytest.raises(FedMetaNASError, match="model"):
        load_network(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedMetaNASError, match="complete network"):
        load_network(tmp_path / "nowhere")


def test_the_network_needs_neither_flower_nor_ray() -> None:
    code = (
        "import sys, fedmetanas_core.space.network; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'flwr', 'ray'}))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_moves_and_casts_keep_weights_and_views() -> None:
    architecture = random_one_hot(random_architecture(small_spec(), 1, 1.0, torch.float32), stream(5))
    network = random_supernet(small_spec(), architecture.operation_mask, 2, torch.float32)
    before = network.weights.detach().clone()
    assert network.to(torch.float64) is network
    assert network.weights.dtype == torch.float64
    assert torch.equal(network.weights.detach().float(), before)
    network.classifier.bias.data.fill_(7.0)
    assert int((network.weights == 7.0).sum()) == network.classifier.bias.numel()
    copied = copy.deepcopy(network)
    copied.classifier.bias.data.fill_(8.0)
    assert int((copied.weights == 8.0).sum()) == network.classifier.bias.numel()
    assert int((network.weights == 8.0).sum()) == 0
