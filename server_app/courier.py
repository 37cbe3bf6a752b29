"""Messages to nodes and what comes back: in time, late, or not at all."""

import time
from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

FIRST_POLL_S, LAST_POLL_S, VIRTUAL_POLL_S = 0.05, 1.0, 0.1
OUTAGE_S = 5.0  # an answer of the SuperLink takes milliseconds


class Courier:
    """Exchanges messages through a grid. What arrives after a deadline is counted, and never used.

    ``notes`` are things worth telling, for the ledger; whoever tells them empties the list. It looks for replies ever
    more seldom as time goes by, at last every ``last_poll_s`` seconds.
    """

    def __init__(self, grid: Grid, last_poll_s: float = LAST_POLL_S) -> None:
        self.grid, self.last_poll_s = grid, last_poll_s
        self.notes: list[str] = []
        self._overdue: dict[str, int] = {}  # message id to node
        self._asked: dict[str, int] = {}

    def node_ids(self) -> set[int]:
        """The nodes that are connected now."""
        started = time.monotonic()
        found = set(self.grid.get_node_ids())
        self._mind(started)
        return found

    def exchange(self, messages: Iterable[Message], timeout_s: float) -> list[Message]:
        """Send all, and return the replies that arrive within this time, in any order."""
        started = time.monotonic()
        waiting, replies = self._push(messages), list[Message]()
        while waiting:
            replies += self._pull(waiting)
            elapsed = time.monotonic() - started
            if not waiting or elapsed >= timeout_s:
                break
            time.sleep(min(self.last_poll_s, max(FIRST_POLL_S, elapsed / 20), timeout_s - elapsed))
        self._overdue.update(waiting)
        return replies

    def ask(self, messages: Iterable[Message]) -> None:
        """Send all, and do not wait: ``answers`` has what came."""
        self._asked.update(self._push(messages))

    def answers(self) -> list[tuple[int, Message]]:
        """(node, reply) to what was asked, as far as they have come since the last call."""
        asked = dict(self._asked)
        # What a node that went away was asked, the SuperLink answers under a number of its own.
        return (
            [(asked[reply.metadata.reply_to_message_id], reply) for reply in self._pull(self._asked)] if asked else []
        )

    def late(self) -> list[int]:
        """The nodes whose replies came since the last call, after their deadline; the SuperLink's own do not count."""
        before = dict(self._overdue)
        replies = self._pull(self._overdue) if before else []
        return [before[reply.metadata.reply_to_message_id] for reply in replies if not reply.has_error()]

    def busy(self) -> set[int]:
        """The nodes that still owe a reply."""
        return set(self._overdue.values())

    def _push(self, messages: Iterable[Message]) -> dict[str, int]:
        sent, started = list(messages), time.monotonic()
        if not sent:
            return {}
        numbers = list(self.grid.push_messages(sent))
        self._mind(started)
        return {
            number: message.metadata.dst_node_id
            for number, message in zip(numbers, sent, strict=False)  # none at all where the SuperLink refuses them
            if number is not None
        }

    def _pull(self, waiting: dict[str, int]) -> list[Message]:
        """The replies that are there; what they answer is waited for no longer."""
        started = time.monotonic()
        replies = list(self.grid.pull_messages(list(waiting)))
        self._mind(started)
        for reply in replies:
            waiting.pop(reply.metadata.reply_to_message_id, None)
        return replies

    def _mind(self, started: float) -> None:
        """Flower tries again for as long as its SuperLink is away; that must not go unnoticed."""
        elapsed = time.monotonic() - started
        if elapsed > OUTAGE_S:
            self.notes.append(f"the SuperLink did not answer for {elapsed:.0f} s")
