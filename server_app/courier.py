"""Messages to nodes and what comes back: in time, late, or not at all."""

import time
from collections.abc import Iterable

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

FIRST_POLL_S, LAST_POLL_S, VIRTUAL_POLL_S = 0.05, 1.0, 0.1
RESTART_LOOK_S = 5.0
_EXPIRED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
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
        started = time.monotonic()
        found = set(self.grid.get_node_ids())
        self._mind(started)
        return found

    def exchange(self, messages: Iterable[Message], timeout_s: float) -> list[Message]:
        """Send all, and return the replies that arrive within this time, in any order."""
        started = time.monotonic()
        sent = list(messages)
        waiting, replies = self._push(sent), list[Message]()
        looked = started
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
        started = time.monotonic()
        found = {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}
        self._mind(started)
        return found

    def _push(self, sent: list[Message]) -> dict[str, int]:
        lives, started = self._lives() if self.watches_restarts and sent else {}, time.monotonic()
        if not sent:
            return {}
        numbers = list(self.grid.push_messages(sent))
        self._mind(started)
        pushed = {
            number: message.metadata.dst_node_id
            for number, message in zip(numbers, sent, strict=False)  # none at all where the SuperLink refuses them
            if number is not None
        }
        self._began.update({number: lives.get(node, "") for number, node in pushed.items()})
        return pushed

    def _pull(self, waiting: dict[str, int]) -> list[Message]:
        """The replies that are there; what they answer is waited for no longer."""
        started = time.monotonic()
        replies = list(self.grid.pull_messages(list(waiting)))
        self._mind(started)
        for reply in replies:
            waiting.pop(reply.metadata.reply_to_message_id, None)
            self._began.pop(reply.metadata.reply_to_message_id, None)
        return replies

    def _mind(self, started: float) -> None:
        """Flower tries again for as long as its SuperLink is away; that must not go unnoticed."""
        elapsed = time.monotonic() - started
        if elapsed > OUTAGE_S:
            self.notes.append(f"the SuperLink did not answer for {elapsed:.0f} s")
