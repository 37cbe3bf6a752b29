"""``fedmetanas export``: the found network as a file that other programs run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmetanas_core.commands.networks import model_folder, open_network
from fedmetanas_core.commands.options import read_options, refuse_surplus, user_path
from fedmetanas_core.commands.terminal import COMPLETED, say
from fedmetanas_core.commands.usage import form
from fedmetanas_core.config import Config, defaults
from fedmetanas_core.data.transforms import to_tensor
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.output.classifier import Floats, image_shape
from fedmetanas_core.output.export import BATCHES, FORMS, PROBES, TOLERANCE, check_onnx, copy_network, export
from fedmetanas_core.preflight import images_at_hand
from fedmetanas_core.run.folder import RunFolder
from fedmetanas_core.seeds import numpy_stream
from fedmetanas_core.space.base import TrainableNetwork
from fedmetanas_core.space.network import ImageFormat

SAFETENSORS = "safetensors"
UP_TO_RUN = 3  # a client's network lies in RUN/model/clients/ID


def run(arguments: Sequence[str]) -> int:
    """RUN [--format safetensors|torch|onnx] [--client ID] [--output PATH]"""
    words, given = read_options("export", arguments, with_value=["--format", "--client", "--output"])
    if not words:
        raise RefusalError("export: no run was given", f"write {form('export')}")
    refuse_surplus("export", words[1:])
    wanted = given.get("--format", SAFETENSORS)
    if wanted not in (SAFETENSORS, *FORMS):
        fix = f"choose {SAFETENSORS}, {' or '.join(FORMS)}"
        raise RefusalError(f"export: unknown format: {wanted[:40]!r}", fix)
    if wanted == "onnx":
        check_onnx()
    folder = model_folder("export", words[0], given.get("--client"))
    network, images = open_network(folder)
    target = _target(folder, wanted, given.get("--output"))
    probes, what = _probes(folder, network, images)
    if wanted == SAFETENSORS:
        difference = copy_network(network, images, folder, target, probes)
    else:
        difference = export(network, images, wanted, target, probes)
    sizes = " and ".join(map(str, BATCHES))
    say(f"checked against the found network on {what}, in batches of {sizes}")
    say(f"largest difference {difference:.2g}, allowed {TOLERANCE:g}")
    print(target, flush=True)
    return COMPLETED


def _target(folder: Path, wanted: str, output: str | None) -> Path:
    """The absolute path to write to; RefusalError if that cannot be."""
    if output is None:
        return folder if wanted == SAFETENSORS else folder / FORMS[wanted][0]
    target = user_path("export", output)
    if wanted == SAFETENSORS:
        if target != folder and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RefusalError(f"export: {target} exists and is no empty folder", "choose another --output")
        return target
    suffix = Path(FORMS[wanted][0]).suffix
    if target.suffix != suffix or target.is_dir():
        raise RefusalError(f"export: --output {output} is no name of a {suffix} file", f"let it end in {suffix}")
    if not target.parent.is_dir():
        raise RefusalError(f"export: the folder {target.parent} does not exist", "make it, or choose another --output")
    return target


def _probes(folder: Path, network: TrainableNetwork, images: ImageFormat) -> tuple[Floats, str]:
    """Images to check with, (PROBES, channels, height, width) in [0, 1], and what they are.

    Test images of the run, evenly spaced; numbers drawn at random where those cannot be had on this machine.
    """
    shape = image_shape(network)
    try:
        config = _config(folder)
        data = images_at_hand(config, folder)
        if data.image_shape != shape or data.class_names != images.class_names:
            raise RefusalError(
                f"dataset: {config.dataset} holds other images than the run began with", "bring them back"
            )
        if not len(data.test):
            raise RefusalError("the run has no test images here", "none is needed")
        chosen = np.linspace(0, len(data.test) - 1, PROBES).astype(np.int64)
        return to_tensor(data.test.take(chosen)).numpy(), f"{PROBES} test images of {config.dataset}"
    except FedMetaNASError as error:
        reason = error.what if isinstance(error, RefusalError) else str(error)
        drawn = numpy_stream(0, "images to check an export").random((PROBES, *shape), dtype=np.float32)
        return drawn, f"{PROBES} images of random pixels, for want of the run's own ({reason})"


def _config(folder: Path) -> Config:
    """The configuration of the run that this model folder lies in; FedMetaNASError if there is none to be read."""
    above = [path for path in (folder, *folder.parents[:UP_TO_RUN]) if (path / "config.yaml").is_file()]
    if not above:
        raise RefusalError("no config.yaml beside it", "none is needed")
    facts = RunFolder.open(above[0]).read_config()
    return Config.from_mapping({key: facts[key] for key in defaults() if key in facts})
