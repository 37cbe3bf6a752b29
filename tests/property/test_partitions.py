"""Partitions: who gets which images, for any figures, and exactly for a few."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmetanas_core.data.partitions import ClientShare, Partition, make_partition
from fedmetanas_core.errors import RefusalError

few = settings(max_examples=40, deadline=None)


def held(share: ClientShare) -> int:
    """All training images of a client, those set aside included."""
    return len(share.train) + len(share.validation)


def labels_of(*sizes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Class c sizes[c] times, in an order that is not sorted."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(7).permutation(labels)


TRAIN, TEST = labels_of(*[60] * 10), labels_of(*[30] * 10)


def make(**changes: Any) -> Partition:
    """A small partition of ten classes, changed as asked."""
    figures: dict[str, Any] = {
        "scheme": "dirichlet",
        "protocol": "overlap",
        "num_clients": 6,
        "dir_alpha": 0.3,
        "classes_per_client": 4,
        "samples_per_client": 40,
        "evaluation_per_client": 20,
        "train_labels": TRAIN,
        "test_labels": TEST,
        "num_classes": 10,
        "seed": 0,
    }
    return make_partition(**{**figures, **changes})


schemes = st.sampled_from(["dirichlet", "label_skew", "iid"])
protocols = st.sampled_from(["overlap", "disjoint"])
alphas = st.sampled_from([1e-300, 1e-8, 0.01, 0.1, 0.3, 1.0, 1e6])
class_sizes = st.lists(st.integers(0, 30), min_size=2, max_size=8).filter(lambda sizes: sum(sizes) >= 8)


@given(schemes, protocols, alphas, st.integers(1, 8), st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**62))
@few
def test_shares_are_valid_and_never_empty(
    scheme: str, protocol: str, alpha: float, clients: int, samples: int, evaluation: int, seed: int
) -> None:
    partition = make(
        scheme=scheme,
        protocol=protocol,
        dir_alpha=alpha,
        num_clients=clients,
        samples_per_client=samples,
        evaluation_per_client=evaluation,
        seed=seed,
    )
    assert len(partition.shares) == clients
    for share in partition.shares:
        for indices, size in ((share.train, len(TRAIN)), (share.evaluation, len(TEST))):
            assert indices.dtype == np.int64
            assert len(indices) > 0
            assert (np.diff(indices) > 0).all()  # ascending, no repeats
            assert indices[0] >= 0
            assert indices[-1] < size
    validations = [share.validation for share in partition.shares]
    if protocol == "disjoint":
        together = np.concatenate([*(share.train for share in partition.shares), *validations])
        assert len(np.unique(together)) == len(together)
        # a fifth, rounded down: of n images n // 5, so that 4 or more go to training for each one set aside
        assert all(len(share.validation) == held(share) // 5 for share in partition.shares)
    else:
        assert not any(len(indices) for indices in validations)


@given(st.sampled_from(["dirichlet", "iid"]), protocols, alphas, class_sizes, class_sizes, st.integers(0, 999))
@few
def test_sizes_are_exact_whatever_classes_are_missing(
    scheme: str, protocol: str, alpha: float, train_sizes: list[int], test_sizes: list[int], seed: int
) -> None:
    num_classes = max(len(train_sizes), len(test_sizes)) + 1  # the last class has no image anywhere
    train, test = labels_of(*train_sizes), labels_of(*test_sizes)
    partition = make(
        scheme=scheme,
        protocol=protocol,
        dir_alpha=alpha,
        train_labels=train,
        test_labels=test,
        num_classes=num_classes,
        num_clients=4,
        samples_per_client=25,
        evaluation_per_client=25,
        seed=seed,
    )
    expected = min(25, len(train) // 4 if protocol == "disjoint" else len(train))
    assert {held(share) for share in partition.shares} == {expected}
    assert {len(share.evaluation) for share in partition.shares} == {min(25, len(test))}
    counts = partition.class_counts(train, num_classes)
    assert counts.shape == (4, num_classes)
    assert not counts[:, -1].any()


@given(schemes, protocols, st.integers(0, 999))
@few
def test_same_arguments_same_hash_other_seed_other_hash(scheme: str, protocol: str, seed: int) -> None:
    first = make(scheme=scheme, protocol=protocol, seed=seed).hash()
    assert first == make(scheme=scheme, protocol=protocol, seed=seed).hash()
    assert first != make(scheme=scheme, protocol=protocol, seed=seed + 1).hash()
    assert len(first) == 64


@given(schemes, st.integers(1, 6), st.integers(7, 30), st.integers(0, 999))
@few
def test_an_overlapping_share_does_not_depend_on_the_number_of_clients(
    scheme: str, fewer: int, more: int, seed: int
) -> None:
    small, large = (make(scheme=scheme, num_clients=number, seed=seed) for number in (fewer, more))
    assert small.hash() == Partition(large.shares[:fewer]).hash()


def test_evaluation_does_not_depend_on_how_much_is_trained_on() -> None:
    small, large = make(samples_per_client=10), make(samples_per_client=50, protocol="disjoint")
    for one, other in zip(small.shares, large.shares, strict=True):
        assert np.array_equal(one.evaluation, other.evaluation)


@given(st.integers(1, 10), st.integers(10, 60), st.integers(0, 999))
@few
def test_label_skew_gives_equal_numbers_of_few_classes(classes: int, samples: int, seed: int) -> None:
    partition = make(
        scheme="label_skew", classes_per_client=classes, samples_per_client=samples, num_clients=12, seed=seed
    )
    counts = partition.class_counts(TRAIN, 10)
    evaluation = partition.class_counts(TEST, 10, evaluation=True)
    for client in range(12):
        held = counts[client][counts[client] > 0]
        assert len(held) == classes
        assert held.sum() == samples
        assert held.max() - held.min() <= 1
        assert counts[client, client % 10] > 0  # the first class goes by turns
        assert set(np.flatnonzero(evaluation[client])) <= set(np.flatnonzero(counts[client]))
        assert evaluation[client].sum() == min(20, 30 * classes)


def test_label_skew_by_hand() -> None:
    # Four classes of 150, as tau=4 with 600 images asks; three classes share 100 as 34, 33, 33.
    train, test = labels_of(*[500] * 10), labels_of(*[100] * 10)
    big = make(scheme="label_skew", train_labels=train, test_labels=test, samples_per_client=600)
    assert all(sorted(row)[-4:] == [150] * 4 for row in big.class_counts(train, 10).tolist())
    odd = make(scheme="label_skew", train_labels=train, test_labels=test, samples_per_client=100, classes_per_client=3)
    assert all(sorted(row)[-3:] == [33, 33, 34] for row in odd.class_counts(train, 10).tolist())


def test_label_skew_shares_what_one_class_cannot_give() -> None:
    # Both classes are the client's; class 0 has 3 images, so class 1 gives 7 of the 10.
    partition = make(
        scheme="label_skew",
        train_labels=labels_of(3, 20),
        test_labels=labels_of(5, 5),
        num_classes=2,
        classes_per_client=2,
        samples_per_client=10,
        num_clients=1,
    )
    assert partition.class_counts(labels_of(3, 20), 2).tolist() == [[3, 7]]


def test_disjoint_label_skew_leaves_something_for_every_holder() -> None:
    # One class a client, ten clients a class of 60: nobody may take more than 6.
    partition = make(scheme="label_skew", protocol="disjoint", classes_per_client=1, num_clients=100)
    assert {(len(share.train), len(share.validation)) for share in partition.shares} == {(5, 1)}


def test_a_vanishing_alpha_gives_one_class_and_fills_up_when_it_runs_out() -> None:
    partition = make(dir_alpha=1e-300, samples_per_client=100, evaluation_per_client=30)
    counts = partition.class_counts(TRAIN, 10)
    assert (counts.max(axis=1) == 60).all()  # the whole class, then the other 40 from elsewhere
    assert (counts.sum(axis=1) == 100).all()
    evaluation = partition.class_counts(TEST, 10, evaluation=True)
    assert np.array_equal(evaluation.argmax(axis=1), counts.argmax(axis=1))  # the same pi_k
    assert (evaluation.max(axis=1) == 30).all()


def test_a_large_alpha_is_almost_uniform() -> None:
    train = labels_of(*[1000] * 10)
    counts = make(dir_alpha=1e308, train_labels=train, samples_per_client=1000).class_counts(train, 10)
    assert (abs(counts - 100) < 50).all()  # five standard deviations of a count with mean 100


def test_dirichlet_statistics_of_the_paper() -> None:
    # Expected for 600 images, 10 classes: 5.1 classes present and the largest 66 % at 0.1; 8.05 and 46 % at 0.3.
    train, test = labels_of(*[5000] * 10), labels_of(*[1000] * 10)
    for alpha, present, largest in ((0.1, 5.1, 0.66), (0.3, 8.05, 0.46)):
        partition = make(train_labels=train, test_labels=test, dir_alpha=alpha, num_clients=400, samples_per_client=600)
        counts = partition.class_counts(train, 10)
        assert (counts > 0).sum(axis=1).mean() == pytest.approx(present, abs=0.3)
        assert counts.max(axis=1).mean() / 600 == pytest.approx(largest, abs=0.03)


def test_more_samples_than_images_take_everything() -> None:
    for share in make(samples_per_client=10_000, evaluation_per_client=10_000).shares:
        assert np.array_equal(share.train, np.arange(600))
        assert np.array_equal(share.evaluation, np.arange(300))


def test_disjoint_uses_every_image_when_it_divides() -> None:
    shares = make(protocol="disjoint", num_clients=6, samples_per_client=100).shares
    parts = [indices for share in shares for indices in (share.train, share.validation)]
    assert [len(indices) for indices in parts] == [80, 20] * 6
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(600))


def test_class_counts_by_hand() -> None:
    share = ClientShare(np.array([0, 1, 3]), np.array([2]))
    other = ClientShare(np.array([2]), np.array([0, 1]))
    labels = np.array([1, 1, 0, 3])
    partition = Partition((share, other))
    assert partition.class_counts(labels, 5).tolist() == [[0, 2, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert partition.class_counts(labels, 5, evaluation=True).tolist() == [[1, 0, 0, 0, 0], [0, 2, 0, 0, 0]]


@given(st.integers(0, 5), st.booleans(), st.integers(0, 19))
@few
def test_hash_changes_with_any_index(client: int, in_train: bool, position: int) -> None:
    partition = make()
    shares = list(partition.shares)
    train, evaluation = shares[client].train.copy(), shares[client].evaluation.copy()
    (train if in_train else evaluation)[position] += 1
    shares[client] = ClientShare(train, evaluation)
    assert Partition(tuple(shares)).hash() != partition.hash()


def test_hash_sees_where_a_share_ends() -> None:
    a, b, c = np.array([1]), np.array([2]), np.array([1, 2])
    none = np.empty(0, dtype=np.int64)
    grouped = [
        Partition((ClientShare(c, none),)),
        Partition((ClientShare(a, b),)),
        Partition((ClientShare(none, c),)),
        Partition((ClientShare(a, none), ClientShare(b, none))),
        Partition((ClientShare(a, none, b),)),
    ]
    assert len({partition.hash() for partition in grouped}) == 5


def test_save_and_load(tmp_path: Path) -> None:
    partition = make(scheme="label_skew", protocol="disjoint", num_clients=5)
    path = tmp_path / "partition.npz"
    partition.save(path)
    partition.save(path)
    assert Partition.load(path).hash() == partition.hash()
    partition.save(path, train_class_counts=np.ones((5, 10), np.int64))
    assert Partition.load(path).hash() == partition.hash()
    with np.load(path) as archive:
        assert archive["train_class_counts"].shape == (5, 10)
    assert [entry.name for entry in tmp_path.iterdir()] == ["partition.npz"]  # nothing is left aside


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_load_refuses_other_files_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "partition.npz"
    if content is None:
        np.savez(path, train=np.arange(3))
    else:
        path.write_bytes(content)
    with pytest.raises(RefusalError, match=r"partition\.npz holds no partition") as refused:
        Partition.load(path)
    assert "\n" not in str(refused.value)


def test_load_never_unpickles(tmp_path: Path) -> None:
    path = tmp_path / "partition.npz"
    ones = np.ones(1, dtype=np.int64)
    rest = {"evaluation": ones, "evaluation_sizes": ones, "validation": ones, "validation_sizes": ones}
    np.savez(path, train=np.array([{}], dtype=object), train_sizes=ones, **rest)
    with pytest.raises(RefusalError, match="holds no partition"):
        Partition.load(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scheme": "dirichlett"}, "partition=dirichlett"),
        ({"protocol": "shared"}, "protocol=shared"),
        ({"num_clients": 0}, "num_clients=0"),
        ({"samples_per_client": 0}, "samples_per_client=0"),
        ({"evaluation_per_client": -1}, "evaluation_per_client=-1"),
        ({"dir_alpha": 0.0}, "dir_alpha=0.0"),
        ({"dir_alpha": float("nan")}, "dir_alpha=nan"),
        ({"dir_alpha": float("inf")}, "dir_alpha=inf"),
        ({"scheme": "label_skew", "classes_per_client": 11}, "classes_per_client=11.* 10 classes"),
        ({"scheme": "label_skew", "classes_per_client": 0}, "classes_per_client=0"),
        ({"protocol": "disjoint", "num_clients": 601}, "num_clients=601.*600"),
        ({"train_labels": np.empty(0, dtype=np.int64)}, "training split is empty"),
        ({"test_labels": np.array([10])}, "test labels run from 10 to 10"),
        (
            {"scheme": "label_skew", "train_labels": np.zeros(9, np.int64), "test_labels": np.ones(9, np.int64)},
            "no class has both",
        ),
        (
            {"scheme": "label_skew", "protocol": "disjoint", "num_clients": 9, "classes_per_client": 1}
            | {"train_labels": labels_of(100, 2), "test_labels": labels_of(5, 5), "num_classes": 2},
            "without training images",
        ),
    ],
)
def test_refusals_name_the_key_in_one_line(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RefusalError, match=named) as refused:
        make(**changes)
    assert "\n" not in str(refused.value)
    assert "; " in str(refused.value)
