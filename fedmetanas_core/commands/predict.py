"""``fedmetanas predict``: what a found network says about images."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedmetanas_core.commands.options import read_options, user_path, whole_number
from fedmetanas_core.commands.terminal import COMPLETED
from fedmetanas_core.commands.usage import form
from fedmetanas_core.data.image_files import decode_image
from fedmetanas_core.errors import RefusalError, RunFailedError
from fedmetanas_core.output.classifier import Classifier, classifier_of_network, classifier_of_onnx
from fedmetanas_core.output.predict import as_json, predict

TOP = 3
ONNX, PROGRAM = ".onnx", ".pt2"


def run(arguments: Sequence[str]) -> int:
    """RUN|FILE.onnx IMAGE... [--top K] [--json] [--client ID]"""
    words, given = read_options("predict", arguments, with_value=["--top", "--client"], switches=["--json"])
    if len(words) < 2:
        raise RefusalError(f"predict: no {'images were' if words else 'run was'} given", f"write {form('predict')}")
    top = whole_number("predict", "--top", given["--top"], TOP) if "--top" in given else TOP
    classifier = _classifier(words[0], given.get("--client"))
    images = read_images(words[1:], classifier.image_shape)  # all, before the first is judged
    found = predict(classifier, words[1:], images, top)
    if "--json" in given:
        print(as_json(list(found)), flush=True)
    else:
        for prediction in found:
            print(prediction.in_words(), flush=True)
    return COMPLETED


def read_images(paths: Sequence[str], image_shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """The files as (N, height, width, channels), each brought to the network's shape as training images in files are.

    RefusalError names the first that is missing or cannot be decoded.
    """
    channels, height, width = image_shape
    images = np.empty((len(paths), height, width, channels), dtype=np.uint8)
    for row, path in enumerate(paths):
        try:
            images[row] = decode_image(path, (height, width, channels))
        except RunFailedError as error:
            raise RefusalError(f"predict: {error}", "give image files that Pillow can open") from error
    return images


def _classifier(source: str, client: str | None) -> Classifier:
    path = user_path("predict", source)
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix == PROGRAM:  # torch's reader runs what such a file may carry
        raise RefusalError(
            f"predict: {source} is a torch program, which can hold code",
            "give the run folder or an ONNX file; docs/use-the-network.md has how Python loads it",
        )
    if suffix != ONNX:
        # Loading torch takes over a second, which an ONNX file need not wait for.
        from fedmetanas_core.commands.networks import model_folder, open_network

        return classifier_of_network(*open_network(model_folder("predict", source, client)))
    if client is not None:
        raise RefusalError(
            "predict: --client chooses among the networks of a run", "leave it out, or give a run folder"
        )
    if not path.is_file():
        raise RefusalError(f"predict: {source} does not exist", "give a file that `fedmetanas export` wrote")
    return classifier_of_onnx(path)
