"""Flower's Grid without Flower's processes: messages go straight to the client app's functions, in this process."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from client_app.app import evaluate, query, train
from client_app.state import STATE_PATH, PrivateState
from fedmetanas_core.config import Config
from fedmetanas_core.federation.wire import RunIdentity
from fedmetanas_core.output.tracking.session import Tracking
from fedmetanas_core.run.fingerprint import code_fingerprint
from fedmetanas_core.runs import Run
from server_app.app import search
from server_app.courier import Courier
from server_app.roster import Roster

HANDLERS: dict[str, Any] = {"train": train, "evaluate": evaluate, "query": query}
_FIRST_NODE = 1000


def run_all(run: Run, grid: "LocalGrid") -> dict[str, Any]:
    """From the newest state of this run to its end; its summary."""
    summary: dict[str, Any] = {}
    search(roster_of(grid, run.experiment.config), run, summary, Tracking(run.folder, "", run.folder.path))
    return summary


def roster_of(grid: "LocalGrid", config: Config) -> Roster:
    """The clients on this grid, gathered."""
    roster = Roster(Courier(grid), config, virtual=True)  # type: ignore[arg-type]
    roster.gather()
    return roster


def identity_of(run: Run) -> RunIdentity:
    """What the clients of this run are told."""
    experiment = run.experiment
    config = json.dumps(experiment.config.to_dict())
    return RunIdentity(config, experiment.partition.hash(), code_fingerprint(), run.run_id, str(run.folder.path))


class LocalGrid:
    """``num_nodes`` virtual clients; ``sent`` records every message that went out and every reply that came back."""

    def __init__(self, num_nodes: int) -> None:
        # Flower sets these in the processes it starts; a message cannot be made without them.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.num_nodes = num_nodes
        self._disk = TemporaryDirectory()  # of the clients
        self.sent: list[tuple[Message, Message]] = []
        self._ready: list[Message] = []

    def get_node_ids(self) -> list[int]:
        """Node ids unlike partition ids, as in Flower."""
        return [_FIRST_NODE + client for client in range(self.num_nodes)]

    @staticmethod
    def client_of(node: int) -> int:
        """The partition id of a node."""
        return node - _FIRST_NODE

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """All replies are made at once, and lie ready."""
        sent = list(messages)
        for message in sent:
            message.metadata.__dict__["_message_id"] = str(uuid4())
        self._ready += self.replies(sent)
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """What lies ready of the replies to these."""
        wanted = set(message_ids)
        found = [reply for reply in self._ready if reply.metadata.reply_to_message_id in wanted]
        self._ready = [reply for reply in self._ready if reply.metadata.reply_to_message_id not in wanted]
        return found

    def replies(self, messages: Sequence[Message]) -> list[Message]:
        """Every client's reply, the last asked first: nothing may depend on the order of arrival."""
        replies = []
        for message in messages:
            client = self.client_of(message.metadata.dst_node_id)
            node = {"partition-id": client, "num-partitions": self.num_nodes, STATE_PATH: self._disk.name}
            context = SimpleNamespace(node_config=node, state=RecordDict())
            reply = HANDLERS[message.metadata.message_type](message, context)
            self.sent.append((message, reply))
            replies.append(reply)
        return replies[::-1]

    def kept(self, client: int) -> dict[str, Tensor]:
        """What this client keeps between messages, by name."""
        (runs,) = list(Path(self._disk.name).iterdir()) or [Path(self._disk.name)]
        return PrivateState(runs / str(client)).recall(before=10**7)
