"""The Flower client: answers queries, searches on its own images, evaluates."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client_app.data_source import load_experiment
from client_app.memory import compressed
from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.update import Payload
from fedmetanas_core.methods.registry import make_method
from fedmetanas_core.preflight import Experiment, peak_gpu_memory_bytes, pick_device
from fedmetanas_core.run.fingerprint import code_fingerprint
from fedmetanas_core.run.folder import peak_memory_bytes
from fedmetanas_core.search.evaluation import accuracy, adapt
from fedmetanas_core.search.relaxation import mixture
from fedmetanas_core.search.tasks import recordings
from fedmetanas_core.seeds import torch_stream
from fedmetanas_core.space.native import build
from fedmetanas_core.space.supernet import borrow_supernet

_ROOT = Path(__file__).resolve().parents[1]
if Path(sys.argv[0]).name == "flwr-simulation":
    # Ray puts its driver's working directory first on the import path of its workers. That is where the SuperLink
    # was started, possibly in another project with packages of the same names; make it this app's own directory.
    os.environ.setdefault("FEDMETANAS_LAUNCH_DIR", os.getcwd())
    os.chdir(_ROOT)

app = ClientApp()


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _enter(message: Message, context: Context) -> tuple[Experiment, Payload]:
    config_json, partition_hash, fingerprint = wire.decode_run(message.content)
    if fingerprint != code_fingerprint():
        raise RunFailedError(f"this client's code {code_fingerprint()} is not the server's {fingerprint}")
    if "ray" in sys.modules:
        torch.set_num_threads(1)  # virtual clients share the machine: one thread each is fastest in all
    experiment = load_experiment(config_json, partition_hash)
    build.prepare(lambda line: print(line, flush=True), pick_device(experiment.config))
    return experiment, wire.decode_payload(message.content, experiment.spec)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who is this node, and which code does it run?"""
    node = ConfigRecord({"partition_id": _client(context), "fingerprint": code_fingerprint()})
    return Message(RecordDict({"node": node}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local search."""
    started = time.perf_counter()
    experiment, payload = _enter(message, context)
    client = _client(context)
    method = make_method(experiment.config, experiment.spec)
    update = method.local_update(payload, client, experiment.training_data(client))
    if experiment.config.compression != "none":
        update = compressed(update, payload, experiment.config.compression, context.state)
    note = recordings.failure
    if pick_device(experiment.config) == "cpu" and (reason := build.prepare()):
        note = f"without compiled kernels: {reason}"
    update = replace(update, note=note)
    update.metrics["seconds"] = time.perf_counter() - started
    update.metrics["peak_memory_bytes"] = float(peak_memory_bytes())
    update.metrics["peak_gpu_memory_bytes"] = float(peak_gpu_memory_bytes())
    return Message(wire.encode_update(update), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy on this client's evaluation images: of the global model, and after adapting it to the client's own."""
    experiment, payload = _enter(message, context)
    client, config = _client(context), experiment.config
    held_out, own = experiment.evaluation_data(client), experiment.training_data(client)
    device = held_out.images.device
    architecture = payload.architecture.to(device)
    network = borrow_supernet(experiment.spec, architecture.operation_mask, device)
    network.load(payload.weights, payload.statistics)
    network.eval()
    with torch.no_grad():
        weights = mixture(architecture, payload.plan.temperature)
    before = accuracy(lambda images: network(images, weights), held_out)
    generator = torch_stream(config.seed, "adaptation", client)
    rate = config.task_lr_weights
    adapt(network, own, config.adapt_epochs, int(config.batch_size), rate, config.clip, generator, weights)
    after = accuracy(lambda images: network(images, weights), held_out)
    metrics = {wire.EXAMPLES: len(held_out), "client": client, "accuracy": before, "accuracy_adapted": after}
    return Message(RecordDict({wire.METRICS: MetricRecord(dict(metrics))}), reply_to=message)
