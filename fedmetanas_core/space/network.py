"""The plain network that a genotype describes, and its files. Imports neither Flower nor Ray."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.edge_weights import EdgeWeights
from fedmetanas_core.space.fixed import FixedNetwork, FixedSpec
from fedmetanas_core.space.genotype import Genotype
from fedmetanas_core.space.spec import SpaceSpec
from fedmetanas_core.space.supernet import Supernet

CLIENTS = "clients"  # folder of networks that clients have for themselves
GENOTYPE_FILE = "genotype.json"
FAR_OUTSIDE = 2.0  # augmented or generated images may lie a little outside [0, 1]
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class ImageFormat:
    """How a network wants its images: channel means and deviations on the [0, 1] scale, and what the classes mean."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    def normalise(self, images: Tensor | npt.NDArray[Any]) -> Tensor:
        """(batch, channels, height, width), floats in [0, 1] or uint8, to zero mean and unit deviation per channel.

        Raises RefusalError for another number of channels, another type of number, or floats that are far outside.
        """
        images = torch.as_tensor(images)
        if images.dim() < 3 or images.shape[-3] != len(self.mean):
            raise RefusalError(
                f"images: shape {tuple(images.shape)}, but the network knows {len(self.mean)} channel(s)",
                f"give (batch, {len(self.mean)}, height, width)",
            )
        if images.dtype == torch.uint8:
            images = images.to(torch.get_default_dtype()) / 255
        elif not images.is_floating_point():
            raise RefusalError(f"images: {images.dtype}", "give floats in [0, 1], or uint8")
        elif images.numel() and bool((images.amax() > FAR_OUTSIDE) | (images.amin() < 1 - FAR_OUTSIDE)):
            span = f"{float(images.amin()):g} to {float(images.amax()):g}"
            raise RefusalError(f"images: floats from {span}", "divide by 255, so that they lie in [0, 1]")
        return self.standardise(images)

    def standardise(self, images: Tensor) -> Tensor:
        """The same for floats that are known to be right: what training does with each batch."""
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        return (images - mean) / std


class Network(Supernet):
    """The network of one genotype: a supernet whose every edge has at most one operation."""

    def __init__(
        self,
        genotype: Genotype,
        spec: SpaceSpec,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(spec, genotype.masks(spec)[0], device, dtype)
        self.genotype = genotype

    def forward(self, x: Tensor, edge_weights: EdgeWeights | None = None) -> Tensor:
        """As the supernet's; raises RefusalError for images of another shape than the network was trained on."""
        expected = (self.spec.in_channels, self.spec.height, self.spec.width)
        if tuple(x.shape[1:]) != expected:
            raise RefusalError(
                f"images: shape {tuple(x.shape)}, but the network was trained on {expected} each",
                f"crop and scale them to {self.spec.height}x{self.spec.width}",
            )
        return super().forward(x.to(self.weights.dtype) if x.is_floating_point() else x, edge_weights)

    def inherit(self, supernet: Supernet) -> "Network":
        """Copy weights and statistics of the operations that this network keeps; returns itself."""
        self.load(
            supernet.weight_layout.select(supernet.weights.detach(), self.weight_layout),
            supernet.statistic_layout.select(supernet.statistics, self.statistic_layout),
        )
        return self


def save_network(network: TrainableNetwork, directory: Path, images: ImageFormat) -> None:
    """Write ``genotype.json`` (architecture, shapes, normalisation, classes) and ``weights.safetensors``.

    A fixed model has no genotype; the file then says null, and the shapes carry the model's name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    genotype = network.genotype.to_dict() if isinstance(network, Network) else None
    facts = {"genotype": genotype, "space": asdict(cast(Any, network.spec)), "images": asdict(images)}
    (directory / GENOTYPE_FILE).write_text(json.dumps(facts, indent=1) + "\n")
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    # Written by ourselves: the library's own file is readable by nobody but its owner.
    (directory / WEIGHTS_FILE).write_bytes(save({name: t.detach().cpu().clone() for name, t in tensors.items()}))


def load_network(run: str | Path) -> tuple[TrainableNetwork, ImageFormat]:
    """The network that a run ended with, in evaluation mode, and the image format it expects.

    ``run`` is a run folder, its ``model`` folder, or a client's folder in there. Raises FedMetaNASError naming the file
    that is missing or broken.
    """
    directory = Path(run)
    directory = directory / "model" if (directory / "model").is_dir() else directory
    try:
        facts: dict[str, Any] = json.loads((directory / GENOTYPE_FILE).read_text())
        tensors = load_file(directory / WEIGHTS_FILE)
        network = _network_of(facts)
        images = ImageFormat(**{key: tuple(value) for key, value in facts["images"].items()})
        own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        foreign = sorted(tensors.keys() - own.keys())
        if foreign:
            raise ValueError(f"{WEIGHTS_FILE} holds {foreign[0][:60]!r}, which this network has not")
        for name, tensor in own.items():
            with torch.no_grad():
                tensor.copy_(tensors[name])
    except (
        OSError,
        RefusalError,
        SafetensorError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise FedMetaNASError(f"{directory} does not hold a complete network: {error}{_hint(directory)}") from error
    network.eval()
    return network, images


def _hint(directory: Path) -> str:
    """Where the network may be instead."""
    if not directory.is_dir() or (directory / GENOTYPE_FILE).exists():
        return ""
    own = sorted((directory / CLIENTS).glob("*"), key=lambda path: path.name.zfill(9))
    return f"; its clients have their own, such as {own[0]}" if own else "; only a completed run has one"


def _network_of(facts: dict[str, Any]) -> TrainableNetwork:
    if "name" in facts["space"]:
        return FixedNetwork(FixedSpec(**facts["space"]))
    return Network(Genotype.from_dict(facts["genotype"]), SpaceSpec(**facts["space"]))
