"""What sign-flipped updates cost, with and without robust averaging.

    python benchmarks/sign_flip.py [--shares 0 0.1 0.3] [--averaging mean median trimmed_mean krum] [--seeds 0 1 2]
                                   [--set KEY=VALUE ...]

A fixed share of all clients sends, of everything that it was asked to train, the opposite change: what it got less what
it has learned. The other clients are honest. A run goes through strategy, wire and client app in this process, on
digits with the defaults unless --set says otherwise. Prints test accuracy for every share, rule and seed, and means.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from flwr.app import Array, Message

from fedmetanas_core.commands.pairs import parse_pairs
from fedmetanas_core.config import Config
from fedmetanas_core.federation.wire import ARRAYS, decode_payload, decode_update
from fedmetanas_core.methods.method import Method
from fedmetanas_core.preflight import prepare_experiment
from fedmetanas_core.runs import begin_run
from fedmetanas_core.seeds import numpy_stream
from fedmetanas_core.space.native import build

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from local_grid import LocalGrid, run_all


class FlippingGrid(LocalGrid):
    """Some of the clients send the opposite of what they have learned."""

    def __init__(self, num_nodes: int, false: set[int], method: Method) -> None:
        super().__init__(num_nodes)
        self.false, self.method = false, method

    def replies(self, messages: Sequence[Message]) -> list[Message]:
        """See LocalGrid."""
        sent = {message.metadata.dst_node_id: message for message in messages}
        replies = super().replies(messages)
        self.sent.clear()
        for reply in replies:
            node = reply.metadata.src_node_id
            if self.client_of(node) in self.false and reply.metadata.message_type == "train":
                flip(reply, sent[node], self.method)
        return replies


def flip(reply: Message, sent: Message, method: Method) -> None:
    """Turn every change of the reply into its opposite; variances stay positive, or screening would find them."""
    payload = decode_payload(sent.content, method.space_of)
    update = decode_update(reply.content, (payload.weights, payload.statistics))
    variances = method.variances(payload, update).numpy()
    got, learned = sent.content.array_records[ARRAYS], reply.content.array_records[ARRAYS]
    for name in list(learned):
        before, after = got[name].numpy(), learned[name].numpy()
        flipped = 2 * before - after
        if name == "w/statistics":
            flipped[variances] = abs(flipped[variances])
        learned[name] = Array(flipped.astype(after.dtype))


def accuracy(values: dict[str, Any], share: float) -> float:
    """Of one run in which this share of the clients is false."""
    with tempfile.TemporaryDirectory() as place:
        experiment = prepare_experiment(Config.from_mapping(values), Path(place))
        config = experiment.config
        order = numpy_stream(config.seed, "false clients").permutation(config.num_clients)
        false = {int(client) for client in order[: round(share * config.num_clients)]}
        run = begin_run(Path(place), "run", experiment, Path(place))
        with redirect_stdout(sys.stderr):  # the rounds
            return float(run_all(run, FlippingGrid(config.num_clients, false, run.method()))["test_accuracy"])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--averaging", nargs="+", default=["mean", "median", "trimmed_mean", "krum"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[])
    given = parser.parse_args()
    torch.set_num_threads(1)
    build.prepare(lambda line: print(line, file=sys.stderr))
    keys = parse_pairs(given.set)
    for share in given.shares:
        for rule in given.averaging:
            found = [accuracy({**keys, "averaging": rule, "seed": seed}, share) for seed in given.seeds]
            spread = f" ± {100 * stdev(found):.1f}" if len(found) > 1 else ""
            each = ", ".join(f"{100 * value:.1f}" for value in found)
            print(f"{100 * share:3.0f} % false, {rule:12}: {100 * fmean(found):.1f}{spread} ({each})", flush=True)


if __name__ == "__main__":
    main()
