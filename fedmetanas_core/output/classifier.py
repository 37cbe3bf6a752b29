"""A found network as whoever uses it sees it: images in, logits and probabilities out, whatever file it came from.

torch is imported only for the files that need it: an ONNX file needs onnxruntime alone.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedmetanas_core.errors import RefusalError

if TYPE_CHECKING:
    from fedmetanas_core.space.base import TrainableNetwork
    from fedmetanas_core.space.network import ImageFormat

INPUT, OUTPUTS = "images", ("logits", "probabilities")
FACTS_FILE = "network.json"  # within a torch program
ONNX_EXTRA = 'pip install -e ".[onnx]"'
_WRITTEN_BY_US = "give one that `fedmetanas export` wrote"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Classifier:
    """``run`` takes (batch, channels, height, width) floats in [0, 1] to logits and probabilities, (batch, classes).

    ``image_shape`` is (channels, height, width).
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    run: Callable[[Floats], tuple[Floats, Floats]]


def facts_of(network: "TrainableNetwork", images: "ImageFormat") -> dict[str, Any]:
    """What an exported file tells of its network. Mean and deviation are only told: the file's network applies them."""
    return {
        "class_names": list(images.class_names),
        "image_shape": list(image_shape(network)),
        "mean": list(images.mean),
        "std": list(images.std),
    }


def image_shape(network: "TrainableNetwork") -> tuple[int, int, int]:
    """(channels, height, width) of the images that it was trained on."""
    spec: Any = network.spec
    return spec.in_channels, spec.height, spec.width


def classifier_of_network(network: "TrainableNetwork", images: "ImageFormat") -> Classifier:
    """A network that was loaded, in evaluation mode."""
    import torch

    def run(batch: Floats) -> tuple[Floats, Floats]:
        with torch.no_grad():
            logits = network(images.normalise(batch))
        return logits.numpy(), logits.softmax(1).numpy()

    return Classifier(images.class_names, image_shape(network), run)


def classifier_of_program(path: Path) -> Classifier:
    """A torch program that was exported. Raises RefusalError for any other file."""
    import torch

    from fedmetanas_core.output.quiet import quiet

    facts = {FACTS_FILE: ""}
    try:
        with quiet(), path.open("rb") as file:
            module = torch.export.load(file, extra_files=facts).module()
    except Exception as error:  # torch's reader raises many classes for damaged and foreign files
        raise RefusalError(f"{path} is no torch program: {_first_line(error)}", _WRITTEN_BY_US) from error

    def run(batch: Floats) -> tuple[Floats, Floats]:
        with torch.no_grad():
            logits, probabilities = module(torch.from_numpy(batch))
        return logits.numpy(), probabilities.numpy()

    names, shape = _read_facts(path, lambda: json.loads(facts[FACTS_FILE]))
    return Classifier(names, shape, run)


def classifier_of_onnx(path: Path) -> Classifier:
    """An ONNX file that was exported. Raises RefusalError for any other file, and where onnxruntime is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RefusalError(f"{path}: onnxruntime is not installed", ONNX_EXTRA) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        # Read here: the library would look for a file of other bytes under a name that it cannot decode.
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common root
        raise RefusalError(f"{path} is no ONNX file: {_first_line(error)}", _WRITTEN_BY_US) from error

    def run(batch: Floats) -> tuple[Floats, Floats]:
        logits, probabilities = session.run(OUTPUTS, {INPUT: batch})
        return logits, probabilities

    told = session.get_modelmeta().custom_metadata_map
    names, shape = _read_facts(path, lambda: {key: json.loads(value) for key, value in told.items()})
    return Classifier(names, shape, run)


def _read_facts(path: Path, read: Callable[[], Mapping[str, Any]]) -> tuple[tuple[str, ...], tuple[int, int, int]]:
    """Class names and image shape; RefusalError where the file does not tell them."""
    try:
        facts = read()
        channels, height, width = (int(side) for side in facts["image_shape"])
        return tuple(str(name) for name in facts["class_names"]), (channels, height, width)
    except (KeyError, TypeError, ValueError) as error:
        raise RefusalError(f"{path} does not tell its classes and the shape of its images", _WRITTEN_BY_US) from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
