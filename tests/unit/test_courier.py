"""Messages to nodes that come late, are lost, or cannot be read; nodes are stood in for."""

import httpx
import pytest
from flwr.app import Message, RecordDict
from nodes import Nodes

from server_app.courier import Courier
from server_app.replies import error_line


def test_late_replies_are_counted_and_a_silent_superlink_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(n1={}, n2=None)
    courier = Courier(nodes)  # type: ignore[arg-type]
    messages = [Message(RecordDict(), node, "query") for node in (1, 2)]
    replies = courier.exchange(messages, 0.1)
    assert [reply.metadata.reply_to_message_id for reply in replies] == [messages[0].metadata.message_id]
    assert courier.late() == []
    nodes._replies.append(Message(RecordDict(), reply_to=messages[1]))
    assert courier.late() == [(2, False)]
    assert courier.late() == []
    monkeypatch.setattr("server_app.courier.OUTAGE_S", -1.0)
    courier.node_ids()
    assert courier.notes == ["the SuperLink did not answer for 0 s"]


def test_a_connection_that_breaks_is_tried_again_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.courier.PATIENCE_S", 0.2)
    nodes, breaks = Nodes(n1={}), [httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING]")]
    whole = nodes.get_node_ids

    def get_node_ids() -> list[int]:
        if breaks:
            raise breaks.pop()
        return whole()

    monkeypatch.setattr(nodes, "get_node_ids", get_node_ids)
    courier = Courier(nodes, last_poll_s=0.01)  # type: ignore[arg-type]
    assert courier.node_ids() == {1}
    breaks.extend(httpx.ConnectError("gone") for _ in range(10**4))
    with pytest.raises(httpx.ConnectError):
        courier.node_ids()


def test_a_message_that_is_not_taken_has_a_reason_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(n1={})
    monkeypatch.setattr(nodes, "push_messages", lambda messages: [])
    courier = Courier(nodes)  # type: ignore[arg-type]
    (reply,) = courier.exchange([Message(RecordDict(), 1, "train")], 60.0)
    assert error_line(reply) == "the SuperLink did not take its message: too large, perhaps"
    assert reply.metadata.src_node_id == 1


def test_a_reply_that_flower_cannot_put_together_costs_its_node_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(n1={}, n2={})
    whole = nodes.pull_messages

    def pull_messages(numbers: list[str]) -> list[Message]:
        if "1" in numbers:
            raise ValueError("no object")
        return whole(numbers)

    monkeypatch.setattr(nodes, "pull_messages", pull_messages)
    courier = Courier(nodes)  # type: ignore[arg-type]
    replies = courier.exchange([Message(RecordDict(), node, "query") for node in (1, 2)], 60.0)
    assert {reply.metadata.src_node_id: reply.has_error() for reply in replies} == {1: True, 2: False}
    (spoilt,) = [reply for reply in replies if reply.has_error()]
    assert error_line(spoilt) == "its reply cannot be read: no object"
