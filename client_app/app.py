"""The Flower client: answers queries, searches on its own images, evaluates."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client_app.data_source import load_experiment, load_method
from client_app.memory import compressed, recall, remember
from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.update import RENEWAL, Payload
from fedmetanas_core.methods.client import evaluate_client, local_update
from fedmetanas_core.methods.method import Method
from fedmetanas_core.preflight import Experiment, peak_gpu_memory_bytes, pick_device
from fedmetanas_core.run.fingerprint import code_fingerprint
from fedmetanas_core.run.folder import peak_memory_bytes
from fedmetanas_core.run.stopwatch import Compute
from fedmetanas_core.search.tasks import recordings
from fedmetanas_core.space.native import build

_ROOT = Path(__file__).resolve().parents[1]
if Path(sys.argv[0]).name == "flwr-simulation":
    # Ray puts its driver's working directory first on the import path of its workers. That is where the SuperLink
    # was started, possibly in another project with packages of the same names; make it this app's own directory.
    os.environ.setdefault("FEDMETANAS_LAUNCH_DIR", os.getcwd())
    os.chdir(_ROOT)

app = ClientApp()


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _enter(message: Message, context: Context) -> tuple[Experiment, Method, Payload]:
    config_json, partition_hash, fingerprint = wire.decode_run(message.content)
    if fingerprint != code_fingerprint():
        raise RunFailedError(f"this client's code {code_fingerprint()} is not the server's {fingerprint}")
    if "ray" in sys.modules:
        torch.set_num_threads(1)  # virtual clients share the machine: one thread each is fastest in all
    experiment = load_experiment(config_json, partition_hash)
    build.prepare(lambda line: print(line, flush=True), pick_device(experiment.config))
    method = load_method(config_json, partition_hash)
    return experiment, method, wire.decode_payload(message.content, method.space_of)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who is this node, and which code does it run?"""
    node = ConfigRecord({"partition_id": _client(context), "fingerprint": code_fingerprint()})
    return Message(RecordDict({"node": node}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local search."""
    started = time.perf_counter()
    experiment, method, payload = _enter(message, context)
    client = _client(context)
    data = experiment.training_data(client)
    with Compute(pick_device(experiment.config)) as compute:
        update, memory = local_update(method, payload, client, data, recall(context.state))
    remember(context.state, memory)
    if experiment.config.compression != "none" and payload.plan.phase != RENEWAL:
        update = compressed(update, payload, experiment.config.compression, context.state)
    note = recordings.failure
    if pick_device(experiment.config) == "cpu" and (reason := build.prepare()):
        note = f"without compiled kernels: {reason}"
    update = replace(update, note=note)
    update.metrics["compute_seconds"] = compute.seconds
    update.metrics["seconds"] = time.perf_counter() - started
    update.metrics["peak_memory_bytes"] = float(peak_memory_bytes())
    update.metrics["peak_gpu_memory_bytes"] = float(peak_gpu_memory_bytes())
    return Message(wire.encode_update(update), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy on this client's evaluation images: of what the server sent, and of the model made of it here."""
    experiment, method, payload = _enter(message, context)
    client = _client(context)
    data, held_out = experiment.training_data(client), experiment.evaluation_data(client)
    with Compute(pick_device(experiment.config)) as compute:
        evaluation = evaluate_client(method, payload, client, data, held_out, recall(context.state))
    evaluation.metrics["compute_seconds"] = compute.seconds
    return Message(wire.encode_evaluation(evaluation), reply_to=message)
