"""A found network as a file that other programs run: a torch program, or ONNX. A file is kept only if it agrees.

Both have one input, ``images`` (batch, channels, height, width), float32 in [0, 1], of any batch size, and two outputs,
``logits`` and ``probabilities``; normalisation happens inside. Both carry the class names.
"""

import io
import json
import os
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmetanas_core.errors import FedMetaNASError, RefusalError, RunFailedError
from fedmetanas_core.output.classifier import (
    FACTS_FILE,
    INPUT,
    ONNX_EXTRA,
    OUTPUTS,
    Classifier,
    Floats,
    classifier_of_network,
    classifier_of_onnx,
    classifier_of_program,
    facts_of,
    image_shape,
)
from fedmetanas_core.output.quiet import quiet
from fedmetanas_core.run.files import one_line, sync_directory, write_aside, write_atomically
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.network import GENOTYPE_FILE, WEIGHTS_FILE, ImageFormat, load_network
from fedmetanas_core.space.supernet import Supernet

TOLERANCE = 1e-4  # of logits and probabilities, absolute: rounding of reordered sums stays well below
BATCHES = (1, 17)  # one image, and an odd number that nothing was traced with
MOST_IMAGES = 2**31 - 1  # without a bound, torch 2.6 stumbles over the largest integer
PROBES = sum(BATCHES)
TRACED_BATCH = 2  # torch takes a size of 0 or 1 for a constant
# The opset that torch's exporter writes by itself; others it has to convert. Nothing here needs a later one, and with
# the file version that goes with it, runtimes of 2023 read the file (tried: onnxruntime 1.15).
OPSET, FILE_VERSION = 18, 8
OLDEST_TORCH = (2, 7)  # 2.6 does not bring a matrix product over pixels, with any number of images, to ONNX


class Deployed(nn.Module):
    """Normalisation, the network by torch's own operations, and the probabilities."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: TrainableNetwork, images: ImageFormat) -> None:
        super().__init__()
        self.network = _with_own_storage(network)
        self.register_buffer("mean", torch.tensor(images.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(images.std).view(-1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the module."""
        x = (images - self.mean) / self.std
        logits = self.network.forward_by_modules(x) if isinstance(self.network, Supernet) else self.network(x)
        return logits, logits.softmax(1)


def _with_own_storage(network: TrainableNetwork) -> TrainableNetwork:
    """A copy whose tensors are not views of one: a program saves the whole storage of each, and asks no gradients."""
    copy = deepcopy(network)
    for module in copy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.detach().clone()
    return copy


def trace(network: TrainableNetwork, images: ImageFormat) -> "torch.export.ExportedProgram":
    """The network as a program for any number of images, without the paths of the files it was traced from."""
    example = torch.zeros(TRACED_BATCH, *image_shape(network))
    shapes = {INPUT: {0: torch.export.Dim("batch", max=MOST_IMAGES)}}
    with quiet():
        program = torch.export.export(Deployed(network, images), (example,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def torch_bytes(network: TrainableNetwork, images: ImageFormat) -> bytes:
    """A file for ``torch.export.load``, with facts_of in the extra file FACTS_FILE."""
    program, file = trace(network, images), io.BytesIO()
    with quiet():
        torch.export.save(program, file, extra_files={FACTS_FILE: json.dumps(facts_of(network, images))})
    return file.getvalue()


def onnx_bytes(network: TrainableNetwork, images: ImageFormat) -> bytes:
    """An ONNX file, with facts_of in its metadata, each value as JSON. RefusalError where packages are missing."""
    check_onnx()
    program = trace(network, images)
    with quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            optimize=True,
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    _tidy(model)
    model.ir_version = FILE_VERSION
    model.producer_name, model.producer_version = "fedmetanas", version("fedmetanas")
    for key, value in facts_of(network, images).items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    content: bytes = model.SerializeToString()
    return content


def check_onnx() -> None:
    """RefusalError where what writes and checks ONNX is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RefusalError(f"export: {error.name} is not installed", ONNX_EXTRA) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise RefusalError(f"export: torch {torch.__version__} cannot write these networks as ONNX", ONNX_EXTRA)


def _tidy(model: Any) -> None:
    """Leave out what the exporter notes for its own developers, and call the free dimension by its name."""
    graph = model.graph
    del model.metadata_props[:], graph.value_info[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


# By name: what the file is called, how it is made, and how it is loaded again.
Make = Callable[[TrainableNetwork, ImageFormat], bytes]
FORMS: Mapping[str, tuple[str, Make, Callable[[Path], Classifier]]] = {
    "torch": ("network.pt2", torch_bytes, classifier_of_program),
    "onnx": ("network.onnx", onnx_bytes, classifier_of_onnx),
}


def export(network: TrainableNetwork, images: ImageFormat, form: str, path: Path, probes: Floats) -> float:
    """Write the network to ``path``, if what is read from there does as the network does; the largest difference.

    ``probes``: PROBES images. Raises FedMetaNASError, and leaves what was at
    ``path``, where the network cannot be written in this form or the file differs by more than TOLERANCE.
    """
    _, make, load = FORMS[form]
    try:
        content = make(network, images)
    except RefusalError:
        raise
    except Exception as error:  # torch's exporters raise many classes
        reason = re.sub("\x1b\\[[0-9;]*m", "", one_line(error))[:300]  # they colour their messages
        raise FedMetaNASError(f"the network cannot be written as {form}: {type(error).__name__}: {reason}") from error
    aside = write_aside(path, content)
    try:
        difference = check_agreement(classifier_of_network(network, images), load(aside), probes)
        os.replace(aside, path)
        sync_directory(path.parent)
    except RefusalError as error:
        raise FedMetaNASError(f"what was written cannot be read again: {error.what}") from error
    except OSError as error:
        raise RunFailedError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
    return difference


def check_agreement(network: Classifier, other: Classifier, probes: Floats) -> float:
    """The largest difference of logits and probabilities over ``probes``, divided into batches of the sizes of BATCHES.

    Raises FedMetaNASError with that figure where it is above TOLERANCE, or no number.
    """
    largest = 0.0
    for batch in np.split(probes, np.cumsum(BATCHES)[:-1]):
        expected, found = np.concatenate(network.run(batch), 1), np.concatenate(other.run(batch), 1)
        if not np.isfinite(expected).all():
            raise FedMetaNASError("the network itself gives no numbers on the images that it was checked on")
        # Not max(): it would pass over what is no number.
        largest = float(np.maximum(largest, np.abs(expected - found).max()))
    if not largest <= TOLERANCE:
        raise FedMetaNASError(
            f"the exported network differs from the found one by {largest:.3g}, more than {TOLERANCE:g}; "
            "the file was not kept"
        )
    return largest


def copy_network(network: TrainableNetwork, images: ImageFormat, source: Path, target: Path, probes: Floats) -> float:
    """The files of a network that was loaded from ``source``, at ``target``, read again; see export.

    ``target`` may be ``source`` itself, which is then only checked. Another one is removed if it differs.
    """
    there = target.exists()
    try:
        if target != source:
            target.mkdir(parents=True, exist_ok=True)
            for name in (GENOTYPE_FILE, WEIGHTS_FILE):
                write_atomically(target / name, (source / name).read_bytes())
    except OSError as error:
        raise RunFailedError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        return check_agreement(
            classifier_of_network(network, images), classifier_of_network(*load_network(target)), probes
        )
    except FedMetaNASError:
        if target != source:
            for name in (GENOTYPE_FILE, WEIGHTS_FILE):
                (target / name).unlink()
            if not there:
                target.rmdir()
        raise
