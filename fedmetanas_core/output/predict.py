"""What a found network says about image files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmetanas_core.output.classifier import Classifier
from fedmetanas_core.text import printable

BATCH = 64  # images at once: enough to keep the processor busy, few enough for any memory


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image file, the likeliest first, and their probabilities."""

    path: str
    classes: tuple[tuple[str, float], ...]

    def in_words(self) -> str:
        """One line."""
        classes = ", ".join(f"{printable(name)} {probability:.3f}" for name, probability in self.classes)
        return f"{printable(self.path)}: {classes}"


def predict(
    classifier: Classifier, paths: Sequence[str], images: npt.NDArray[np.uint8], top: int
) -> Iterator[Prediction]:
    """The ``top`` likeliest classes of every image (N, height, width, channels), which was read from these files."""
    for start in range(0, len(paths), BATCH):
        batch = images[start : start + BATCH].transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255)
        _, probabilities = classifier.run(batch)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        for path, row, chosen in zip(paths[start : start + BATCH], probabilities, order, strict=True):
            yield Prediction(path, tuple((classifier.class_names[index], float(row[index])) for index in chosen))


def as_json(predictions: Sequence[Prediction]) -> str:
    """A list with an object for each image, one a line."""
    rows = [
        json.dumps({"image": each.path, "classes": [{"class": name, "probability": p} for name, p in each.classes]})
        for each in predictions
    ]
    return "[\n" + ",\n".join(rows) + "\n]"
