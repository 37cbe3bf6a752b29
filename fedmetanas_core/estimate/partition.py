"""What a partition gives its clients, and what in it may surprise."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedmetanas_core.description import FEWEST_IN_A_BATCH
from fedmetanas_core.estimate.course import Who
from fedmetanas_core.preflight import Experiment
from fedmetanas_core.search.local_data import task_size

FEWEST_TO_MEASURE = 10  # images; of fewer a client's accuracy moves in steps of more than a tenth
NAMED = 5  # clients or classes in a warning


def about_partition(experiment: Experiment, who: Who) -> dict[str, Any]:
    """Figures and ``warnings``. ``who`` says which clients train in which round."""
    config, dataset, shares = experiment.config, experiment.dataset, experiment.partition.shares
    counts = experiment.partition.class_counts(dataset.train.labels, dataset.num_classes)
    holders = np.zeros(len(dataset.train), dtype=np.int64)
    for share in shares:
        holders[share.train] += 1
    trained = set().union(*who.values())
    facts: dict[str, Any] = {
        "clients": len(shares),
        "train_images": _span([len(share.train) for share in shares]),
        "evaluation_images": _span([len(share.evaluation) for share in shares]),
        "classes_per_client": _span((counts > 0).sum(1).tolist()),
        "images_held": int((holders > 0).sum()),
        "images_unused": int((holders == 0).sum()),
        "images_shared": int((holders > 1).sum()),
        "clients_that_train": len(trained),
    }
    few = task_size(facts["train_images"][0], int(config.batch_size))
    unmeasured = [client for client, share in enumerate(shares) if len(share.evaluation) < FEWEST_TO_MEASURE]
    never = config.num_clients - config.unseen_clients - len(trained)
    total = len(holders)
    texts = (
        _listed("clients with fewer than 2 training images", np.flatnonzero(counts.sum(1) < 2)),
        _listed("clients with images of a single class", np.flatnonzero((counts > 0).sum(1) == 1)),
        _listed("classes that no client holds", np.flatnonzero(counts.sum(0) == 0)),
        _listed(f"clients with fewer than {FEWEST_TO_MEASURE} images to be measured on", unmeasured),
        f"batches of {few} make batch norm unreliable; more images a client help" if few < FEWEST_IN_A_BATCH else "",
        _part(facts["images_unused"], total, "training images are in no client's share"),
        _part(facts["images_shared"], total, f"training images are in the shares of several, {holders.max()} at most"),
        f"{never} clients will not come to train in so few rounds" if never > 0 else "",
    )
    return {**facts, "warnings": [text for text in texts if text]}


def _span(sizes: Sequence[int]) -> list[int]:
    return [min(sizes), max(sizes)]


def _listed(what: str, numbers: Sequence[int] | np.ndarray[Any, Any]) -> str:
    """``what: 1, 2, 3 and 4 more``; nothing if there are none."""
    if not len(numbers):
        return ""
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"{what}: {', '.join(str(number) for number in numbers[:NAMED])}{more}"


def _part(count: int, total: int, what: str) -> str:
    return f"{count:,} of {total:,} {what}" if count else ""
