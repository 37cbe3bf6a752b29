"""Messages to nodes and what comes back: in time, late, or not at all."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import httpx
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

FIRST_POLL_S, LAST_POLL_S, VIRTUAL_POLL_S = 0.05, 1.0, 0.1
RESTART_LOOK_S = 5.0
_EXPIRED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
NOT_TAKEN = "the SuperLink did not take its message: too large, perhaps"
PATIENCE_S = 600.0  # with a connection that breaks
Answer = TypeVar("Answer")
OUTAGE_S = 5.0  # an answer of the SuperLink takes milliseconds


class Courier:
    """Exchanges messages through a grid. What arrives after a deadline is counted, and never used.

    ``notes`` are things worth telling, for the ledger; whoever tells them empties the list. It looks for replies ever
    more seldom as time goes by, at last every ``last_poll_s`` seconds.
    """

    def __init__(self, grid: Grid, last_poll_s: float = LAST_POLL_S, watches_restarts: bool = False) -> None:
        self.grid, self.last_poll_s, self.watches_restarts = grid, last_poll_s, watches_restarts
        self.notes: list[str] = []
        self._overdue: dict[str, int] = {}  # message id to node
        self._asked: dict[str, int] = {}
        self._began: dict[str, str] = {}  # message id to when its node had begun its present life

    def node_ids(self) -> set[int]:
        """The nodes that are connected now."""
        return set(self._reach(self.grid.get_node_ids))

    def exchange(self, messages: Iterable[Message], timeout_s: float) -> list[Message]:
        """Send all, and return the replies that arrive within this time, in any order."""
        started = looked = time.monotonic()
        sent = list(messages)
        waiting = self._push(sent)
        refused = [message for message in sent if message.metadata.message_id not in waiting]
        replies = [Message(Error(ErrorCode.UNKNOWN, NOT_TAKEN), reply_to=message) for message in refused]
        while waiting:
            replies += self._pull(waiting)
            elapsed = time.monotonic() - started
            if time.monotonic() - looked > RESTART_LOOK_S:
                looked = time.monotonic()
                lost = self._lost(waiting)
                gone = [message for message in sent if message.metadata.message_id in lost]
                replies += [Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message) for message in gone]
            if not waiting or elapsed >= timeout_s:
                break
            time.sleep(min(self.last_poll_s, max(FIRST_POLL_S, elapsed / 20), timeout_s - elapsed))
        self._overdue.update(waiting)
        return replies

    def ask(self, messages: Iterable[Message]) -> None:
        """Send all, and do not wait: ``answers`` has what came."""
        self._asked.update(self._push(list(messages)))

    def answers(self) -> list[tuple[int, Message]]:
        """(node, reply) to what was asked, as far as they have come since the last call."""
        asked = dict(self._asked)
        # What a node that went away was asked, the SuperLink answers under a number of its own.
        return (
            [(asked[reply.metadata.reply_to_message_id], reply) for reply in self._pull(self._asked)] if asked else []
        )

    def late(self) -> list[tuple[int, bool]]:
        """(node, in vain) of what was overdue and has come to an end since the last call.

        The node has replied after the deadline, or, in vain, the message has expired at a node that was there. What
        was sent to a node that has gone is not told.
        """
        self._lost(self._overdue)
        before = dict(self._overdue)
        replies = self._pull(self._overdue) if before else []
        return [
            (before[reply.metadata.reply_to_message_id], reply.has_error())
            for reply in replies
            if not reply.has_error() or reply.error.code in _EXPIRED
        ]

    def busy(self) -> set[int]:
        """The nodes that still owe a reply."""
        return set(self._overdue.values())

    def _lost(self, waiting: dict[str, int]) -> set[str]:
        """The messages whose nodes have begun anew since; a node forgets what it had. They are waited for no longer."""
        if not waiting or not self.watches_restarts:
            return set()
        lives = self._lives()
        began = {number: self._began.get(number, "") for number in waiting}
        found = {number for number, node in waiting.items() if began[number] and lives.get(node, "") > began[number]}
        for number in found:
            del waiting[number]
        return found

    def _lives(self) -> dict[int, str]:
        """Node to when it last began, as the SuperLink writes times."""
        return {node.node_id: node.last_activated_at for node in self._reach(self.grid.get_nodes)}

    def _push(self, sent: list[Message]) -> dict[str, int]:
        if not sent:
            return {}
        lives = self._lives() if self.watches_restarts else {}
        numbers = self._reach(lambda: self.grid.push_messages(sent))
        pushed = {
            number: message.metadata.dst_node_id
            for number, message in zip(numbers, sent, strict=False)  # none at all where the SuperLink refuses them
            if number is not None
        }
        self._began.update({number: lives.get(node, "") for number, node in pushed.items()})
        return pushed

    def _pull(self, waiting: dict[str, int]) -> list[Message]:
        """The replies that are there; what they answer is waited for no longer."""
        try:
            replies = self._reach(lambda: self.grid.pull_messages(list(waiting)))
        except (httpx.HTTPError, RunNotRunningException):
            raise
        except Exception:  # Flower cannot put one of them together, and says not which
            replies = [reply for number in list(waiting) for reply in self._pull_one(number, waiting[number])]
        for reply in replies:
            waiting.pop(reply.metadata.reply_to_message_id, None)
            self._began.pop(reply.metadata.reply_to_message_id, None)
        return replies

    def _pull_one(self, number: str, node: int) -> list[Message]:
        try:
            return self._reach(lambda: self.grid.pull_messages([number]))
        except (httpx.HTTPError, RunNotRunningException):
            raise
        except Exception as error:
            question = Message(RecordDict(), node, MessageType.TRAIN)
            question.metadata.__dict__["_message_id"] = number
            return [Message(Error(ErrorCode.UNKNOWN, f"its reply cannot be read: {error}"), reply_to=question)]

    def _reach(self, call: Callable[[], Iterable[Answer]]) -> list[Answer]:
        """What the SuperLink says. Flower tries again for as long as it is away, which must not go unnoticed.

        Only where a connection breaks in the midst of TLS does Flower give up at once; that is tried again here.
        """
        started = time.monotonic()
        while True:
            try:
                found = list(call())
                break
            except httpx.TransportError:
                if time.monotonic() - started > PATIENCE_S:
                    raise
                time.sleep(self.last_poll_s)
        elapsed = time.monotonic() - started
        if elapsed > OUTAGE_S:
            self.notes.append(f"the SuperLink did not answer for {elapsed:.0f} s")
        return found
