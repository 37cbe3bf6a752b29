"""Which client holds which images.

A share is three arrays of indices: `train` and `validation` into the training split, `evaluation` into the test split.
These are different index spaces, so no test image can ever be trained on, whatever the scheme draws.
"""

import hashlib
import io
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmetanas_core.errors import RefusalError
from fedmetanas_core.run.files import write_atomically
from fedmetanas_core.seeds import numpy_stream

SCHEMES = ("dirichlet", "label_skew", "iid")
PROTOCOLS = ("overlap", "disjoint")
VALIDATION_PARTS = 5  # under `disjoint` one part in so many of a client's training images is set aside
_KINDS = ("train", "evaluation", "validation")

Indices = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClientShare:
    """One client's images: int64 indices, ascending and without repeats.

    `train` and `validation` count in the training split and share nothing; `validation` is empty unless the protocol
    is `disjoint`. `evaluation` counts in the test split.
    """

    train: Indices
    evaluation: Indices
    validation: Indices = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True, eq=False)
class Partition:
    """The shares of all clients, client k at position k."""

    shares: tuple[ClientShare, ...]

    def hash(self) -> str:
        """SHA-256 (hex) over all indices and their grouping; equal exactly when the partitions are."""
        digest = hashlib.sha256(b"fedmetanas partition 2")
        for share in self.shares:
            for indices in (getattr(share, kind) for kind in _KINDS):
                digest.update(np.asarray([len(indices)], dtype="<i8").tobytes())
                digest.update(np.ascontiguousarray(indices, dtype="<i8").tobytes())
        return digest.hexdigest()

    def class_counts(self, labels: npt.NDArray[np.int64], num_classes: int, *, evaluation: bool = False) -> Indices:
        """Images per client and class, int64 (clients, classes): of the training shares, or of the evaluation ones.

        `labels` are those of the split that is counted.
        """
        chosen = [share.evaluation if evaluation else share.train for share in self.shares]
        counts = [np.bincount(labels[indices], minlength=num_classes) for indices in chosen]
        return np.asarray(counts, dtype=np.int64)

    def save(self, path: str | Path, **notes: Indices) -> None:
        """Write an `.npz` without pickled objects; a reader sees the old file or the whole new one.

        `notes` are arrays for people who open the file; `load` passes over them. Raises RunFailedError.
        """
        arrays = dict(notes)
        for kind in _KINDS:
            chosen = [getattr(share, kind) for share in self.shares]
            arrays[kind] = np.concatenate([np.empty(0, np.int64), *chosen])
            arrays[f"{kind}_sizes"] = np.asarray([len(indices) for indices in chosen], dtype=np.int64)
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        write_atomically(Path(path), content.getvalue())

    @staticmethod
    def load(path: str | Path) -> "Partition":
        """Read what `save` wrote. Raises RefusalError naming the file if it is anything else."""
        fix = "remove it; the same configuration makes the same partition again"
        try:
            with np.load(path, allow_pickle=False) as archive:
                parts = [_split_sizes(archive[kind], archive[f"{kind}_sizes"]) for kind in _KINDS]
            shares = tuple(ClientShare(*indices) for indices in zip(*parts, strict=True))
        except (OSError, EOFError, KeyError, IndexError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise RefusalError(f"{path} holds no partition ({type(error).__name__}: {error})", fix) from error
        return Partition(shares)


def _split_sizes(values: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> list[Indices]:
    if values.dtype != np.int64 or sizes.dtype != np.int64 or sizes.sum() != len(values) or (sizes < 0).any():
        raise ValueError("indices and sizes do not fit")
    return np.split(values, np.cumsum(sizes))[:-1]


def make_partition(
    scheme: str,
    protocol: str,
    num_clients: int,
    dir_alpha: float,
    classes_per_client: int,
    samples_per_client: int,
    evaluation_per_client: int,
    train_labels: npt.NDArray[np.int64],
    test_labels: npt.NDArray[np.int64],
    num_classes: int,
    seed: int,
) -> Partition:
    """Shares for `num_clients` clients.

    Schemes: `dirichlet` gives client k the class probabilities pi_k ~ Dir(dir_alpha); `label_skew` gives it
    `classes_per_client` classes in equal numbers (±1), the first one k mod the number of classes, the others random;
    `iid` draws regardless of class. Evaluation images follow the same pi_k or classes.

    Protocols: under `overlap` every client draws from the whole training split without repeats, clients may hold the
    same image, and client k's share does not depend on how many clients there are. Under `disjoint` no image goes to
    two clients, each gets min(samples_per_client, N_train // num_clients), and clients are served in order, so that
    later ones find some classes used up and are mixed more evenly; a fifth of each share, rounded down, is its
    validation part. Evaluation images overlap under both.

    How a `dirichlet` client draws: the numbers per class are multinomial with pi_k; what exceeds the images of a class
    is drawn again from the others by renormalised pi_k, and, when no class with pi_k > 0 has any left, uniformly from
    the remaining images; within a class every subset is equally likely. Weighted drawing of single images
    without replacement differs in that it favours a large class over a small one of equal pi_k and lets a class's
    probability shrink as it is used up; here a class's expected share is pi_k until the class is exhausted.

    Sizes are exact, except that they never exceed what the split (for `label_skew`, the client's classes; if
    disjoint, its equal part of them) holds. Classes without images are left out. Raises RefusalError when a
    figure makes no sense or a client would have nothing to train or to be evaluated on.
    """
    figures = _Figures(num_clients, dir_alpha, classes_per_client, samples_per_client, evaluation_per_client)
    _refuse_senseless(scheme, protocol, figures, train_labels, test_labels, num_classes)
    train_pool = _Pool(train_labels, num_classes, seed if protocol == "disjoint" else None)
    test_pool = _Pool(test_labels, num_classes, None)
    if protocol == "disjoint":
        samples_per_client = min(samples_per_client, len(train_labels) // num_clients)
        figures = replace(figures, samples_per_client=samples_per_client)
    if scheme == "label_skew":
        shares = _draw_label_skew(figures, train_pool, test_pool, seed)
    else:
        alpha = dir_alpha if scheme == "dirichlet" else None
        shares = _draw_by_probability(figures, alpha, train_pool, test_pool, seed)
    for client, share in enumerate(shares):
        if not len(share.train) or not len(share.evaluation):
            missing = "evaluation" if len(share.train) else "training"
            raise RefusalError(
                f"partition={scheme} leaves client {client} without {missing} images",
                "use fewer clients, more classes_per_client or partition=dirichlet",
            )
    if protocol == "disjoint":
        shares = tuple(_with_validation(share, seed, client) for client, share in enumerate(shares))
    return Partition(shares)


def _with_validation(share: ClientShare, seed: int, client: int) -> ClientShare:
    """Move a random fifth of the training images to the validation part."""
    order = numpy_stream(seed, "partition validation", client).permutation(share.train)
    count = len(order) // VALIDATION_PARTS
    return replace(share, train=np.sort(order[count:]), validation=np.sort(order[:count]))


@dataclass(frozen=True)
class _Figures:
    """The partition's figures as the user gave them."""

    num_clients: int
    dir_alpha: float
    classes_per_client: int
    samples_per_client: int
    evaluation_per_client: int


def _refuse_senseless(
    scheme: str,
    protocol: str,
    figures: _Figures,
    train_labels: npt.NDArray[np.int64],
    test_labels: npt.NDArray[np.int64],
    num_classes: int,
) -> None:
    if scheme not in SCHEMES:
        raise RefusalError(f"partition={scheme} is unknown", f"use one of {', '.join(SCHEMES)}")
    if protocol not in PROTOCOLS:
        raise RefusalError(f"protocol={protocol} is unknown", f"use one of {', '.join(PROTOCOLS)}")
    for key in ("num_clients", "samples_per_client", "evaluation_per_client"):
        if getattr(figures, key) < 1:
            raise RefusalError(f"{key}={getattr(figures, key)} leaves nothing to do", "give 1 or more")
    if scheme == "dirichlet" and not 0 < figures.dir_alpha < float("inf"):
        raise RefusalError(f"dir_alpha={figures.dir_alpha} is no concentration", "give a positive number such as 0.3")
    if scheme == "label_skew" and not 1 <= figures.classes_per_client <= num_classes:
        raise RefusalError(
            f"classes_per_client={figures.classes_per_client}, but the dataset has {num_classes} classes",
            f"give 1 to {num_classes}",
        )
    for labels, split in ((train_labels, "training"), (test_labels, "test")):
        if not len(labels):
            raise RefusalError(f"the {split} split is empty", "give a dataset with images in both splits")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise RefusalError(
                f"the {split} labels run from {labels.min()} to {labels.max()}, but there are {num_classes} classes",
                "number the classes 0…K−1",
            )
    if protocol == "disjoint" and len(train_labels) < figures.num_clients:
        raise RefusalError(
            f"num_clients={figures.num_clients}, but there are only {len(train_labels)} training images to divide",
            "use fewer clients or let shares overlap",
        )


class _Pool:
    """The images of a split by class; with a seed, drawing uses them up."""

    def __init__(self, labels: npt.NDArray[np.int64], num_classes: int, use_up_seed: int | None) -> None:
        self.sizes: Indices = np.bincount(labels, minlength=num_classes).astype(np.int64)
        order = np.argsort(labels, kind="stable").astype(np.int64)
        self._members = np.split(order, np.cumsum(self.sizes)[:-1])
        self._used = np.zeros(num_classes, dtype=np.int64)
        self.uses_up = use_up_seed is not None
        if use_up_seed is not None:
            # Shuffled once, so that taking from the front is drawing at random.
            generator = numpy_stream(use_up_seed, "partition pool")
            self._members = [generator.permutation(members) for members in self._members]

    @property
    def left(self) -> Indices:
        """Images per class that can still be drawn."""
        return self.sizes - self._used

    def take(self, counts: Indices, generator: np.random.Generator) -> Indices:
        """`counts[c]` random images of every class c, as ascending indices."""
        chosen = []
        for label in np.flatnonzero(counts):
            members, count, start = self._members[label], int(counts[label]), int(self._used[label])
            if self.uses_up:
                chosen.append(members[start : start + count])
                self._used[label] += count
            else:
                chosen.append(generator.choice(members, size=count, replace=False, shuffle=False))
        return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def _streams(seed: int, client: int) -> tuple[np.random.Generator, np.random.Generator]:
    """One stream for the class mix and the training images, one for evaluation, so that sizes do not interfere."""
    return numpy_stream(seed, "partition", client), numpy_stream(seed, "partition evaluation", client)


def _draw_by_probability(
    figures: _Figures, alpha: float | None, train_pool: _Pool, test_pool: _Pool, seed: int
) -> tuple[ClientShare, ...]:
    """Every client draws by its own class probabilities; without `alpha` every image is equally likely."""
    shares = []
    for client in range(figures.num_clients):
        generator, evaluation_generator = _streams(seed, client)
        pi = None if alpha is None else _class_probabilities(alpha, train_pool.sizes, generator)
        counts = _counts_by_probability(figures.samples_per_client, pi, train_pool.left, generator)
        train = train_pool.take(counts, generator)
        counts = _counts_by_probability(figures.evaluation_per_client, pi, test_pool.left, evaluation_generator)
        shares.append(ClientShare(train, test_pool.take(counts, evaluation_generator)))
    return tuple(shares)


def _class_probabilities(alpha: float, class_sizes: Indices, generator: np.random.Generator) -> Probabilities:
    """pi ~ Dir(alpha) over the classes that have training images, 0 elsewhere."""
    present = np.flatnonzero(class_sizes)
    drawn = generator.dirichlet(np.full(len(present), alpha))
    if not np.isfinite(drawn).all() or drawn.sum() <= 0:
        # The limits that floating point cannot reach: one class as alpha goes to 0, all alike as it grows.
        one_class = np.eye(len(present))[generator.integers(len(present))]
        drawn = one_class if alpha < 1 else np.full(len(present), 1 / len(present))
    pi = np.zeros(len(class_sizes))
    pi[present] = drawn / drawn.sum()
    return pi


def _counts_by_probability(
    count: int, pi: Probabilities | None, capacity: Indices, generator: np.random.Generator
) -> Indices:
    """Numbers per class that sum to min(count, capacity in all): multinomial by pi, never above the capacity."""
    counts = np.zeros_like(capacity)
    short = min(count, int(capacity.sum()))
    while short > 0:
        room = capacity - counts
        weights = np.zeros(len(room)) if pi is None else np.where(room > 0, pi, 0.0)
        if weights.sum() <= 0:
            counts += generator.multivariate_hypergeometric(room, short)
            return counts
        # Each turn either places everything or fills a class, so there are at most as many turns as classes.
        counts += np.minimum(generator.multinomial(short, weights / weights.sum()), room)
        short = min(count, int(capacity.sum())) - int(counts.sum())
    return counts


def _draw_label_skew(figures: _Figures, train_pool: _Pool, test_pool: _Pool, seed: int) -> tuple[ClientShare, ...]:
    """Every client draws equally from its own classes."""
    streams = [_streams(seed, client) for client in range(figures.num_clients)]
    classes = [
        _skewed_classes(client, figures.classes_per_client, train_pool.sizes, test_pool.sizes, generator)
        for client, (generator, _) in enumerate(streams)
    ]
    train_room = train_pool.sizes
    if train_pool.uses_up:
        holders = np.bincount(np.concatenate(classes), minlength=len(train_room))
        train_room = train_room // np.maximum(holders, 1)  # else the last holders of a class would find none
    shares = []
    for own, (generator, evaluation_generator) in zip(classes, streams, strict=True):
        train = train_pool.take(_equal_counts(figures.samples_per_client, own, train_room), generator)
        counts = _equal_counts(figures.evaluation_per_client, own, test_pool.sizes)
        shares.append(ClientShare(train, test_pool.take(counts, evaluation_generator)))
    return tuple(shares)


def _skewed_classes(
    client: int, number: int, train_sizes: Indices, test_sizes: Indices, generator: np.random.Generator
) -> Indices:
    """The client's classes: the first one by turns, so that every class is covered, the rest at random.

    The first comes from the classes that have images in both splits, so that there is something to evaluate on.
    Fewer than `number` only where fewer classes have images.
    """
    first_choice = np.flatnonzero((train_sizes > 0) & (test_sizes > 0))
    if not len(first_choice):
        raise RefusalError("no class has both training and test images", "give a dataset whose splits share classes")
    first = int(first_choice[client % len(first_choice)])
    others = np.setdiff1d(np.flatnonzero(train_sizes), [first])
    rest = generator.choice(others, size=min(number - 1, len(others)), replace=False)
    return np.concatenate([[first], rest]).astype(np.int64)


def _equal_counts(count: int, classes: Indices, room: Indices) -> Indices:
    """Numbers per class, equal (±1) over `classes`; what one cannot give is shared among the others."""
    counts = np.zeros_like(room)
    open_classes = classes[room[classes] > 0]
    short = count
    while short > 0 and len(open_classes):
        each, extra = divmod(short, len(open_classes))
        wanted = each + (np.arange(len(open_classes)) < extra)
        given = np.minimum(wanted, (room - counts)[open_classes])
        counts[open_classes] += given
        short -= int(given.sum())
        open_classes = open_classes[counts[open_classes] < room[open_classes]]
    return counts
