"""Images that stay on the machines of a federation: what each node tells of its own, what all go by, how it reads them.

A node tells how many images it has, their classes and shape, and the mean and deviation of their pixels; no image
and no image's label leaves it.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fedmetanas_core.data.image_files import FileSplit
from fedmetanas_core.data.image_folder import CACHE_BYTES, LARGEST_SIDE, load_class_folders, split_folders
from fedmetanas_core.data.npz import load_npz
from fedmetanas_core.data.splits import SMALLEST_STD, ArraySplit, Dataset, Split
from fedmetanas_core.errors import RefusalError

SMALLEST_SIDE, LARGEST_IMAGE = 8, 1024
MOST_IMAGES, MOST_EMPTY_CLASSES, LONGEST_NAME = 10**9, 1000, 200  # what a node can claim
NODES = "nodes"  # dataset=nodes: every node reads its own
_FIX = "start the node with --node-config \"data-path='/data/site0'\""

Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class SiteFacts:
    """What a node tells of its images. ``numbered``: its labels are numbers (an .npz), its images of one fixed shape.

    ``mean`` and ``std`` have one value a channel, for pixels in [0, 1], over its training images.
    """

    train: int
    test: int
    class_names: tuple[str, ...]
    image_shape: Shape
    numbered: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_json(self) -> str:
        """For a message."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "SiteFacts":
        """What ``to_json`` made; ValueError for anything else."""
        try:
            raw = json.loads(text)
            channels, height, width = (int(side) for side in raw["image_shape"])
            facts = cls(
                train=int(raw["train"]),
                test=int(raw["test"]),
                class_names=tuple(str(name) for name in raw["class_names"]),
                image_shape=(channels, height, width),
                numbered=bool(raw["numbered"]),
                mean=tuple(float(value) for value in raw["mean"]),
                std=tuple(float(value) for value in raw["std"]),
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"facts of a node that cannot be read: {error}") from error
        facts._check()
        return facts

    def _check(self) -> None:
        """ValueError for facts that no node can have."""
        channels, height, width = self.image_shape
        moments = [*self.mean, *self.std]
        plausible = (
            1 <= self.train <= MOST_IMAGES
            and 0 <= self.test <= MOST_IMAGES
            and 1 <= len(self.class_names) <= self.train + self.test + MOST_EMPTY_CLASSES
            and all(0 < len(name) <= LONGEST_NAME for name in self.class_names)
            and channels in (1, 3)
            and all(SMALLEST_SIDE <= side <= LARGEST_IMAGE for side in (height, width))
            and len(self.mean) == len(self.std) == channels
            and all(0.0 <= value <= 1.0 for value in moments)
        )
        if not plausible:
            raise ValueError("facts that no node can have")


@dataclass(frozen=True)
class Agreement:
    """What all nodes of a run go by; ``image_shape`` is (channels, height, width)."""

    class_names: tuple[str, ...]
    image_shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def without_images(self) -> Dataset:
        """A dataset of no images, for a server that has none."""
        channels, height, width = self.image_shape
        empty = ArraySplit(np.empty((0, height, width, channels), np.uint8), np.empty(0, np.int64))
        return Dataset(NODES, empty, empty, self.class_names, self.image_shape, self.mean, self.std)


def describe_site(
    data_path: str, seed: int, image_size: int | None, class_names: Sequence[str] | None = None
) -> SiteFacts:
    """What this node tells of the .npz or class folders at ``data_path``; RefusalError if there is nothing usable.

    ``image_size``: side in pixels to which every image is brought; ``class_names``: those of the run, where fixed.
    """
    path = _existing(data_path)
    if path.is_dir():
        data = load_class_folders(path, str(path), seed, image_size, class_names=class_names, fewest_classes=1)
        with_images = sorted({*np.unique(data.train.labels).tolist(), *np.unique(data.test.labels).tolist()})
        names = tuple(data.class_names[label] for label in with_images)
    else:
        data = load_npz(path, str(path), image_size, class_names)
        names = data.class_names
    _check_told(path, names, data.image_shape)
    return SiteFacts(len(data.train), len(data.test), names, data.image_shape, not path.is_dir(), data.mean, data.std)


def _check_told(path: Path, names: Sequence[str], shape: Shape) -> None:
    """RefusalError for what a run's configuration could not hold, or no network could read."""
    odd = [name for name in names if "," in name or name != name.strip()]
    if odd:
        raise RefusalError(f"{path}: the class name {odd[0]!r} has a comma or outer blanks", "rename its folder")
    if shape[0] not in (1, 3) or not all(SMALLEST_SIDE <= side <= LARGEST_IMAGE for side in shape[1:]):
        raise RefusalError(
            f"{path} holds images of {describe_shape(shape)}",
            f"give grey or colour images of {SMALLEST_SIDE} to {LARGEST_IMAGE} pixels, or set image_size",
        )


def load_site(data_path: str, agreement: Agreement, seed: int, image_size: int | None = None) -> Dataset:
    """This node's images as the run's nodes agreed to see them; RefusalError if they do not fit."""
    path, names = _existing(data_path), agreement.class_names
    normalisation = (agreement.mean, agreement.std)
    if path.is_dir():
        data = load_class_folders(
            path,
            NODES,
            seed,
            class_names=names,
            shape=agreement.image_shape,
            normalisation=normalisation,
            check=False,
            fewest_classes=1,
        )
    else:
        data = load_npz(path, NODES, image_size, names, normalisation)
        if data.image_shape != agreement.image_shape:
            raise RefusalError(
                f"{path} holds images of {describe_shape(data.image_shape)}, "
                f"this run's are {describe_shape(agreement.image_shape)}",
                "set image_size",
            )
    return data


def load_test_images(path: str, agreement: Agreement, seed: int, image_size: int | None = None) -> Split:
    """Images that only measure: the test split of an .npz, or of class folders, all of them if they are not split."""
    data, root = load_site(path, agreement, seed, image_size), _existing(path)
    if root.is_file() or split_folders(root, ("test", "val"))[1] is not None:
        return data.test
    train, test = data.train, data.test
    assert isinstance(train, FileSplit)
    assert isinstance(test, FileSplit)
    paths, labels = train.paths + test.paths, np.concatenate([train.labels, test.labels])
    return FileSplit(paths, labels, train.shape, cache=len(paths) * int(np.prod(train.shape)) <= CACHE_BYTES)


def _existing(data_path: str) -> Path:
    if not data_path.strip():
        raise RefusalError("this node has no data-path", _FIX)
    path = Path(data_path).expanduser()
    if not (path.is_dir() or path.is_file()):
        raise RefusalError(
            f"data-path: {path} does not exist on this node", "give an .npz or a folder of class folders"
        )
    return path


def unfit(facts: SiteFacts, agreement: Agreement) -> str | None:
    """Why this node cannot take part in a run of this agreement, None if it can."""
    known = agreement.class_names
    if facts.numbered and not all(name.isdecimal() for name in known):
        return f"its labels are numbers, the classes of the run names ({', '.join(known[:5])}); give it class folders"
    if facts.numbered and len(facts.class_names) > len(known):
        return f"its labels go up to {len(facts.class_names) - 1}, the run has {len(known)} classes"
    foreign = [] if facts.numbered else [name for name in facts.class_names if name not in known]
    if foreign:
        return f"it has classes that the run does not know: {', '.join(foreign[:5])}"
    if facts.numbered and facts.image_shape != agreement.image_shape:
        return (
            f"its images are {describe_shape(facts.image_shape)}, those of the run "
            f"{describe_shape(agreement.image_shape)}; set image_size, or bring them to one shape"
        )
    return None


def agree(
    sites: Mapping[str, SiteFacts],
    class_names: Sequence[str] | None = None,
    image_shape: Shape | None = None,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> tuple[Agreement, dict[str, str]]:
    """What the nodes with these facts go by, and why some of them cannot: reasons by the keys of ``sites``.

    What is given stays. Classes: all that any node has. Shape: that of most nodes whose images have a fixed one, else
    the largest that every image fills. Where labels are numbers on some nodes and names on others, most nodes decide.
    """
    left = dict(sites)
    reasons: dict[str, str] = {}
    if class_names is None:
        for key in _outvoted(left):
            of, others = ("numbers", "names") if left[key].numbered else ("names", "numbers")
            reasons[key] = f"its labels are {of}, those of most nodes {others}; set class_names, or rename its folders"
            del left[key]
    names = tuple(class_names) if class_names is not None else _all_classes(list(left.values()))
    agreement = Agreement(names, image_shape or _common_shape(list(left.values())), (), ())
    for key, facts in list(left.items()):
        reason = unfit(facts, agreement)
        if reason is not None:
            reasons[key] = reason
            del left[key]
    if normalisation is None and left:
        normalisation = _pooled(list(left.values()), agreement.image_shape[0])
    mean, std = normalisation or ((), ())
    return replace(agreement, mean=mean, std=std), reasons


def _outvoted(sites: Mapping[str, SiteFacts]) -> list[str]:
    """The nodes whose kind of labels is that of fewer, unless the folders' names are numbers as well."""
    numbered = [key for key, facts in sites.items() if facts.numbered]
    named = [key for key, facts in sites.items() if not all(name.isdecimal() for name in facts.class_names)]
    if not numbered or not named:
        return []
    return numbered if len(numbered) <= len(named) else named


def _all_classes(sites: Sequence[SiteFacts]) -> tuple[str, ...]:
    found = {name for facts in sites for name in facts.class_names}
    if all(name.isdecimal() for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))  # an .npz of K classes has the first K
    return tuple(sorted(found))


def _common_shape(sites: Sequence[SiteFacts]) -> Shape:
    fixed = Counter(facts.image_shape for facts in sites if facts.numbered)
    if fixed:
        return max(fixed, key=lambda shape: (fixed[shape], shape))
    shapes = {facts.image_shape for facts in sites}
    channels = max(shape[0] for shape in shapes)
    sides = {shape[1:] for shape in shapes}
    if len(sides) == 1:
        return (channels, *sides.pop())
    side = min(LARGEST_SIDE, min(min(each) for each in sides))
    return channels, side, side


def _pooled(sites: Sequence[SiteFacts], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation over all nodes' training images; a grey image counts as three equal channels."""
    weights = np.array([facts.train for facts in sites], dtype=np.float64)
    means = np.array([_in_channels(facts.mean, channels) for facts in sites])
    squares = np.array([_in_channels(facts.std, channels) for facts in sites]) ** 2 + means**2
    share = weights / weights.sum()
    mean = share @ means
    std = np.maximum(np.sqrt(np.maximum(share @ squares - mean**2, 0.0)), SMALLEST_STD)
    return tuple(mean.round(6).tolist()), tuple(std.round(6).tolist())


def _in_channels(values: Sequence[float], channels: int) -> list[float]:
    return list(values) if len(values) == channels else [float(np.mean(values))] * channels


def describe_shape(shape: Sequence[int]) -> str:
    """Channels x height x width."""
    return "x".join(map(str, shape))
