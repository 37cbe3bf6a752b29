"""The Flower client: answers queries, searches on its own images, evaluates."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.data_source import DATA_PATH, PARTITION_ID, load_experiment, load_method, node_facts
from client_app.state import PrivateState, memory_of, state_directory, with_memory
from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.feedback import compressed
from fedmetanas_core.federation.update import RENEWAL, Payload
from fedmetanas_core.methods.budgets import node_limits
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


def _client(message: Message, context: Context) -> int:
    """This node's number in the run; RunFailedError if its configuration has it as another's partition."""
    number, partition = wire.decode_client(message.content), int(context.node_config.get(PARTITION_ID, -1))
    if partition not in (-1, number):
        raise RunFailedError(f"this node has partition {partition}, and was sent what is for client {number}")
    return number


def _is_virtual() -> bool:
    """Whether this is a worker of a simulation."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _enter(message: Message, context: Context) -> tuple[Experiment, Method, Payload, PrivateState]:
    identity = wire.decode_run(message.content)
    if identity.fingerprint != code_fingerprint():
        raise RunFailedError(f"this client's code {code_fingerprint()} is not the server's {identity.fingerprint}")
    virtual = _is_virtual()
    if virtual:
        torch.set_num_threads(1)  # virtual clients share the machine: one thread each is fastest in all
    data_path = str(context.node_config.get(DATA_PATH, ""))
    experiment = load_experiment(identity.config, identity.partition_hash, data_path)
    build.prepare(lambda line: print(line, flush=True), pick_device(experiment.config))
    limits = json.dumps(node_limits(context.node_config))
    method = load_method(identity.config, identity.partition_hash, data_path, limits)
    payload = wire.decode_payload(message.content, method.space_of)
    keeps = method.recipe.keeps_private or experiment.config.compression != "none"
    place = state_directory(identity, _client(message, context), virtual, context.node_config) if keeps else None
    private = PrivateState(place)
    return experiment, method, payload, private


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who is this node, which code does it run, and what does it have?"""
    return Message(wire.encode_facts(node_facts(wire.decode_question(message.content), context)), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local search."""
    started = time.perf_counter()
    experiment, method, payload, private = _enter(message, context)
    client = _client(message, context)
    data, kept = experiment.training_data(client), private.recall(before=payload.plan.round)
    with Compute(pick_device(experiment.config)) as compute:
        update, memory = local_update(method, payload, client, data, memory_of(kept))
    if payload.plan.phase != RENEWAL:
        kept = with_memory(kept, memory)
        if experiment.config.compression != "none":
            update, kept = compressed(update, payload, experiment.config.compression, kept)
        private.keep(payload.plan.round, kept)
    if experiment.privacy is not None:
        if payload.plan.phase == RENEWAL:
            raise RunFailedError("this run's clients send nothing without noise")
        update = experiment.privacy.protect(update, payload, method.variances(payload, update))
    note = recordings.failure
    if pick_device(experiment.config) == "cpu" and (reason := build.prepare()):
        note = f"without compiled kernels: {reason}"
    update = replace(update, note=note, run_id=wire.decode_run(message.content).run_id)
    update.metrics["compute_seconds"] = compute.seconds
    update.metrics["seconds"] = time.perf_counter() - started
    update.metrics["peak_memory_bytes"] = float(peak_memory_bytes())
    update.metrics["peak_gpu_memory_bytes"] = float(peak_gpu_memory_bytes())
    return Message(wire.encode_update(update), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy on this client's evaluation images: of what the server sent, and of the model made of it here."""
    experiment, method, payload, private = _enter(message, context)
    client, memory = _client(message, context), memory_of(private.recall(before=payload.plan.round + 1))
    data, held_out = experiment.training_data(client), experiment.evaluation_data(client)
    with Compute(pick_device(experiment.config)) as compute:
        evaluation = evaluate_client(method, payload, client, data, held_out, memory)
    evaluation.metrics["compute_seconds"] = compute.seconds
    return Message(wire.encode_evaluation(evaluation), reply_to=message)
