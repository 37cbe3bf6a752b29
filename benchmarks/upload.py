"""What an update weighs on the wire, by compression, with the full supernet and with one genotype.

python benchmarks/upload.py [--scale tiny|small|paper] [--tasks 6]

A client takes some tasks on handwritten digits, enlarged to the scale's images, from fresh weights; its update is
encoded as it would travel. Prints bytes, the ratio to float32, and the error of the weights' change (relative L2).
"""

import argparse
import sys
from pathlib import Path

import torch
from flwr.app import RecordDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.setting import BATCH, GENOTYPE, SCALES, architecture_of
from fedmetanas_core.config import Config
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.compression import KINDS
from fedmetanas_core.federation.feedback import compressed
from fedmetanas_core.federation.update import Payload
from fedmetanas_core.methods.client import local_update
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.space.native import build
from fedmetanas_core.space.supernet import Supernet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="paper")
    parser.add_argument("--tasks", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    build.prepare()
    spec = SCALES[given.scale]
    size = {"init_channels": spec.init_channels, "num_cells": spec.num_cells, "num_nodes": spec.num_nodes}
    client = {"local_epochs": 1, "batch_size": BATCH, "samples_per_client": 2 * BATCH * given.tasks, "num_clients": 5}
    config = Config.from_mapping({"image_size": spec.height, **size, **client})
    experiment = prepare_experiment(config, Path.cwd())
    method, data = make_method(experiment.config, experiment.spec), experiment.training_data(0)
    for kept in ("1.0", GENOTYPE):
        architecture = architecture_of(experiment.spec, kept)
        network = Supernet(experiment.spec, architecture.operation_mask)
        network.initialise(torch.Generator().manual_seed(0))
        plan = method.plan(int(experiment.config.num_rounds) // 3)
        payload = Payload(network.weights.detach(), network.statistics, architecture, plan)
        report(kept, payload, local_update(method, payload, 0, data)[0])


def report(kept: str, payload: Payload, update: object) -> None:
    """One line a kind."""
    plain = wire.array_bytes(wire.encode_update(update))
    print(f"operations kept {kept}: {plain:,} bytes as float32")
    sent = payload.weights, payload.statistics
    for kind in KINDS:
        record = wire.encode_update(compressed(update, payload, kind, {})[0])
        back = wire.decode_update(with_figures(record), sent, kind)
        error = (back.weights - update.weights).norm() / (update.weights - payload.weights).norm()
        print(
            f"  {kind}: {wire.array_bytes(record):,} bytes, {wire.array_bytes(record) / plain:.3f}, error {error:.4f}"
        )


def with_figures(record: RecordDict) -> RecordDict:
    """What the client app adds to an update before it goes out."""
    record.metric_records[wire.METRICS].update(dict.fromkeys(wire.REPORTED[2:], 0.0))
    return record


if __name__ == "__main__":
    main()
