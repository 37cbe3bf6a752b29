"""Stand-ins for the nodes of real machines."""

from types import SimpleNamespace
from typing import Any

from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from fedmetanas_core.federation.wire import NodeFacts, encode_facts
from fedmetanas_core.run.fingerprint import code_fingerprint


class Nodes:
    """A grid of nodes that come, go and answer questions as a test says."""

    def __init__(self, **facts: Any) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.facts = {int(node[1:]): said for node, said in facts.items()}
        self.online = set(self.facts)
        self.asked: list[int] = []
        self.lives: dict[int, str] = {}
        self._replies: list[Message] = []
        self._count = 0

    def get_node_ids(self) -> list[int]:
        return sorted(self.online)

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=node, last_activated_at=self.lives.get(node, "1")) for node in self.online]

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            self._count += 1
            message.metadata.__dict__["_message_id"] = str(self._count)
            node = message.metadata.dst_node_id
            self.asked.append(node)
            said = self.facts[node]
            if isinstance(said, str):
                self._replies.append(Message(Error(2, said), reply_to=message))
            elif said is not None:
                facts = NodeFacts(**{"fingerprint": code_fingerprint(), **said})
                self._replies.append(Message(encode_facts(facts), reply_to=message))
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, numbers: list[str]) -> list[Message]:
        found = [reply for reply in self._replies if reply.metadata.reply_to_message_id in set(numbers)]
        self._replies = [reply for reply in self._replies if reply not in found]
        return found
