"""Who is which client on real machines, who waits for whom, and what is told; nodes are stood in for."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from nodes import Nodes

from fedmetanas_core.config import Config
from fedmetanas_core.data.sites import SiteFacts
from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.preflight import with_agreement
from server_app import roster as roster_module
from server_app.courier import Courier
from server_app.roster import Roster


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "LOOK_S", 0.01)
    monkeypatch.setattr(roster_module, "QUERY_TIMEOUT_S", 0.2)


def make(nodes: Nodes, members: Any = None, **keys: Any) -> Roster:
    given = {"num_clients": 3, "clients_per_round": 2, "node_timeout_s": 0.3, **keys}
    return Roster(Courier(nodes), Config.from_mapping(given), virtual=False, members=members)  # type: ignore[arg-type]


def told(roster: Roster) -> list[tuple[int | None, str]]:
    events, roster.events = roster.events, []
    return events


def test_numbers_follow_names_and_partitions_and_stay() -> None:
    nodes = Nodes(n7={"name": "b"}, n5={"name": "a"}, n6={"partition_id": 2})
    roster = make(nodes)
    roster.gather()
    assert roster.nodes == {0: 5, 1: 7, 2: 6}
    assert roster.connected() == [0, 1, 2]
    assert told(roster) == [(0, "a takes part"), (1, "b takes part"), (2, "partition 2 takes part")]
    # The same run in a later session: other node numbers, the same names, and one that is away.
    again = Nodes(n1={"name": "b"}, n2={"partition_id": 2})
    later = make(again, Roster.from_list(roster.to_list()), min_clients=2)
    later.gather()
    assert later.nodes == {1: 1, 2: 2}
    assert (0, "a is not connected") in told(later)


def test_too_few_nodes_end_the_run_with_what_kept_each_out() -> None:
    nodes = Nodes(
        n1={}, n2={"fingerprint": "old"}, n3={"refusal": "no images", "name": "c"}, n4="Oops\nno torch", n5=None
    )
    with pytest.raises(RunFailedError) as failure:
        make(nodes).gather()
    said = str(failure.value)
    assert said.startswith(
        "1 of the 3 nodes that the run waits for can take part, no more came within node_timeout_s=0.3; "
    )
    assert "c: no images" in said
    assert "node 2: it runs other code (old)" in said
    assert "node 4: it cannot start: no torch" in said
    assert "node 5: it did not answer within 0.2 s" in said


class SlowNodes(Nodes):
    """Their answers come after so many seconds."""

    def __init__(self, seconds: float, **facts: Any) -> None:
        super().__init__(**facts)
        self.ready = time.monotonic() + seconds

    def pull_messages(self, numbers: list[str]) -> list[Message]:
        return super().pull_messages(numbers) if time.monotonic() > self.ready else []


def test_a_node_that_came_in_time_is_heard_however_slow_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "QUERY_TIMEOUT_S", 30.0)
    roster = make(SlowNodes(0.5, n1={}, n2={}, n3={}), node_timeout_s=0.05)
    roster.gather()
    assert roster.connected() == [0, 1, 2]


def test_between_rounds_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = SlowNodes(0.0, n1={}, n2={})
    roster = make(nodes, min_clients=2, clients_per_round=3, node_timeout_s=0.05)
    roster.gather()
    monkeypatch.setattr(roster_module, "QUERY_TIMEOUT_S", 30.0)
    nodes.facts[3], nodes.ready = {}, time.monotonic() + 0.5
    nodes.online = {1, 3}
    roster.wait(2)
    assert roster.connected() == [0, 2]


def test_nobody_waits_for_a_node_that_has_gone_or_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "QUERY_TIMEOUT_S", 30.0)
    nodes = Nodes(n1={}, n2=None)

    def gone(seconds: float) -> None:
        time.sleep(seconds)
        nodes.online = {1}

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(roster_module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=gone))
        with pytest.raises(RunFailedError, match=r"1 of the 3 nodes .*node_timeout_s=0\.3"):
            make(nodes).gather()
    # A client that comes back is asked anew beside its work, and has its place meanwhile.
    nodes = Nodes(n1={}, n2={}, n3={})
    roster = make(nodes, clients_per_round=3)
    roster.gather()
    nodes.online = set()
    roster.look()
    nodes.online, nodes.facts[1] = {1}, None
    with pytest.raises(RunFailedError, match=r"there were 1; start"):
        roster.wait(2)
    assert nodes.asked[-1] == 1
    assert time.monotonic() - began < 10


def test_nodes_that_keep_coming_and_never_answer_do_not_hold_a_run_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(n1={})
    came = iter(range(2, 10_000))

    def one_more(seconds: float) -> None:
        time.sleep(seconds)
        nodes.facts[number := next(came)] = None
        nodes.online.add(number)

    monkeypatch.setattr(roster_module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=one_more))
    began = time.monotonic()
    with pytest.raises(RunFailedError, match=r"1 of the 3 nodes .* did not answer within"):
        make(nodes).gather()
    # node_timeout_s, and at most as long again as an answer may take
    assert time.monotonic() - began < 5.0


def test_a_node_that_was_mended_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "ASK_AGAIN_S", 0.0)
    nodes = Nodes(n1={"refusal": "no images"})
    roster = make(nodes, num_clients=1, clients_per_round=1, node_timeout_s=5.0)
    monkeypatch.setattr(
        roster_module, "time", SimpleNamespace(monotonic=roster_module.time.monotonic, sleep=mend(nodes))
    )
    roster.gather()
    assert roster.nodes == {0: 1}
    assert told(roster)[0] == (None, "node 1 cannot take part: no images")


def mend(nodes: Nodes) -> Any:
    def sleep(seconds: float) -> None:
        nodes.facts[1] = {}

    return sleep


def test_who_goes_comes_back_or_is_new_is_told_and_takes_part() -> None:
    nodes = Nodes(n1={"name": "a"}, n2={"name": "b"})
    roster = make(nodes, min_clients=2)
    roster.gather()
    told(roster)
    nodes.online.remove(2)
    roster.wait(1)
    assert (roster.connected(), told(roster)) == ([0], [(1, "b is no longer connected")])
    nodes.facts[9] = {"name": "b"}  # the same site with another key
    nodes.facts[4] = {"name": "new"}
    nodes.online |= {9, 4}
    roster.wait(2)  # asks
    roster.wait(3)  # hears
    assert roster.nodes == {0: 1, 1: 9, 2: 4}
    assert told(roster) == [(1, "b is connected again"), (2, "new takes part")]
    nodes.facts[8] = {"name": "more"}
    nodes.online.add(8)
    roster.wait(4)
    roster.wait(5)
    assert told(roster) == [(None, "more cannot take part: all 3 places are taken; raise num_clients")]


def test_the_measured_share_of_each_gpu_is_kept() -> None:
    nodes = Nodes(n1={"name": "a", "gpu_memory_bytes": 1000}, n2={"name": "b"})
    roster = make(nodes, min_clients=2)
    roster.gather()
    roster.used_gpu({0: 250, 1: 0})
    roster.used_gpu({0: 100})
    assert [row["peak_gpu_memory_share"] for row in roster.to_list()] == [0.25, 0.0]


def test_partitions_have_their_numbers_and_others_what_is_left() -> None:
    nodes = Nodes(n1={"name": "a"}, n2={"partition_id": 0}, n3={"partition_id": 5})
    roster = make(nodes, min_clients=2)
    roster.gather()
    assert roster.nodes == {0: 2, 1: 1}
    assert (None, "partition 5 cannot take part: partition-id 5 is not below num_clients") in told(roster)
    with pytest.raises(
        RunFailedError, match=r"2 of the 3 nodes .* can take part, .*; partition 5: partition-id 5 is not"
    ):
        make(Nodes(n1={"name": "a"}, n2={"partition_id": 0}, n3={"partition_id": 5})).gather()


def test_a_node_that_comes_back_is_asked_what_it_has_now() -> None:
    site = SiteFacts(10, 2, ("a", "b"), (1, 8, 8), False, (0.5,), (0.2,))
    nodes = Nodes(**{f"n{number}": {"name": f"{number}", "site": site.to_json()} for number in (1, 2)})
    roster = make(nodes, dataset="nodes", min_clients=2)
    roster.gather()
    roster.config = with_agreement(roster.config, roster.agreement)
    assert (roster.declared, roster.held_out) == ({0: 10, 1: 10}, {0: 2, 1: 2})
    nodes.online.remove(2)
    roster.look()
    nodes.facts[2]["site"] = replace(site, train=60).to_json()
    nodes.online.add(2)
    roster.look()  # asks
    roster.look()  # hears
    assert roster.declared == {0: 10, 1: 60}
    nodes.online.remove(2)
    roster.look()
    nodes.facts[2]["site"] = replace(site, class_names=("a", "c")).to_json()
    nodes.online.add(2)
    roster.look()
    roster.look()
    assert roster.connected() == [0]
    assert told(roster)[-1] == (None, "2 cannot take part: it has classes that the run does not know: c")
    roster.look()
    assert roster.connected() == [0]


def test_those_who_disagree_vote_together_however_they_come() -> None:
    small = SiteFacts(10, 2, ("0", "1"), (1, 8, 8), True, (0.5,), (0.2,))
    large = replace(small, image_shape=(1, 16, 16))
    nodes = Nodes(n1={"name": "large", "site": large.to_json()}, n2={"name": "one", "site": small.to_json()})
    nodes.facts[3] = {"name": "two", "site": small.to_json()}
    roster = make(nodes, dataset="nodes", min_clients=2)
    with pytest.raises(RunFailedError):
        roster.gather()
    nodes.online.add(3)
    roster.gather()
    assert [each["name"] for each in roster.to_list()] == ["one", "two"]
    assert roster.agreement.image_shape == (1, 8, 8)


def test_a_client_that_is_still_at_work_is_not_asked_again() -> None:
    nodes = Nodes(n1={}, n2={}, n3={})
    roster = make(nodes)
    roster.gather()
    nodes.facts[2] = None
    roster.courier.exchange([Message(RecordDict(), 2, "query")], 0.05)
    assert roster.free() == [0, 2]
    nodes._replies.append(Message(Error(5, "gone"), reply_to=late_question(roster)))
    roster.look()
    assert roster.free() == [0, 1, 2]
    assert told(roster)[3:] == [], "it was no reply of the node's"


def test_what_a_node_was_sent_before_it_began_anew_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.courier.RESTART_LOOK_S", 0.0)
    nodes = Nodes(n1=None, n2=None)
    courier = Courier(nodes, watches_restarts=True)  # type: ignore[arg-type]
    messages = [Message(RecordDict(), node, "query") for node in (1, 2)]
    push = nodes.push_messages

    def restarts(sent: list[Message]) -> list[str]:
        nodes.lives[2] = "2"
        return push(sent)

    monkeypatch.setattr(nodes, "push_messages", restarts)
    (reply,) = courier.exchange(messages, 0.2)
    assert reply.has_error()
    assert reply.error.code == 5
    assert reply.metadata.reply_to_message_id == messages[1].metadata.message_id
    assert courier.busy() == {1}
    nodes.lives[1] = "3"
    assert courier.late() == []
    assert courier.busy() == set()


def test_a_node_whose_client_program_is_away_is_left_alone_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "ASK_AGAIN_S", 0.0)
    nodes = Nodes(n1={}, n2={}, n3={})
    roster = make(nodes)
    roster.gather()
    told(roster)
    nodes.facts[2] = None
    roster.courier.exchange([Message(RecordDict(), 2, "train")], 0.05)
    nodes._replies.append(Message(Error(3, "expired"), reply_to=late_question(roster)))
    roster.look()
    assert roster.free() == [0, 2]
    assert [what for _, what in told(roster)] == [
        "node 2 cannot take part: it left a message unanswered for as long as that was good",
        "node 2 is no longer connected",
    ]
    nodes.facts[2] = {}  # somebody has started it
    time.sleep(0.25)  # the question of meanwhile has expired
    for _ in range(3):
        roster.look()
    assert roster.free() == [0, 1, 2]
    assert told(roster)[-1] == (1, "node 2 is connected again")


def test_a_node_that_has_another_name_now_is_one_client() -> None:
    nodes = Nodes(n1={"name": "a"}, n2={"name": "b"})
    roster = make(nodes, min_clients=2)
    roster.gather()
    told(roster)
    nodes.online.remove(2)
    roster.look()
    nodes.facts[2] = {"name": "c"}
    nodes.online.add(2)
    roster.look()
    roster.look()
    assert roster.nodes == {0: 1, 2: 2}
    assert roster.connected() == [0, 2]
    assert (1, "b is called c now, and client 2") in told(roster)


def test_a_run_that_goes_on_waits_for_those_it_had_and_then_takes_what_a_round_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roster_module, "RETURN_S", 0.1)
    first = make(Nodes(n1={"name": "a"}, n2={"name": "b"}, n3={"name": "c"}))
    first.gather()
    started, later = time.monotonic(), make(Nodes(n7={"name": "b"}), Roster.from_list(first.to_list()))
    later.gather()
    assert time.monotonic() - started >= 0.1
    assert later.nodes == {1: 7}
    with pytest.raises(RunFailedError, match="0 of the 1 nodes that the run waits for"):
        make(Nodes(), Roster.from_list(first.to_list())).gather()


def late_question(roster: Roster) -> Message:
    (number,) = roster.courier._overdue
    question = Message(RecordDict(), 2, "query")
    question.metadata.__dict__["_message_id"] = number
    return question


@pytest.mark.parametrize(
    "answer", [{"partition_id": "a"}, {"cores": 1.5}, {"name": 3}, {"site": "no"}, {"site": '{"train": 1}'}], ids=str
)
def test_an_answer_that_makes_no_sense_keeps_its_node_out(answer: dict[str, object]) -> None:
    nodes = Nodes(n1={}, n2=answer)
    roster = make(nodes, min_clients=1)
    roster.gather()
    assert roster.nodes == {0: 1}
    assert "its answer cannot be read" in told(roster)[0][1]


def test_a_node_that_says_nothing_of_its_images_has_none() -> None:
    with pytest.raises(RunFailedError, match="it says nothing of its images"):
        make(Nodes(n1={"name": "a"}), dataset="nodes", min_clients=1).gather()


def test_one_name_is_one_client() -> None:
    nodes = Nodes(n1={"name": "a"}, n2={"name": "a"})
    roster = make(nodes, min_clients=1)
    roster.gather()
    assert roster.nodes == {0: 1}
    assert told(roster)[0] == (None, "a cannot take part: client 0 (a) is connected already")


def test_a_round_waits_for_half_of_its_clients_and_not_for_ever() -> None:
    nodes = Nodes(n1={}, n2={}, n3={})
    roster = make(nodes, clients_per_round=3)
    roster.gather()
    nodes.online = {1, 2}
    roster.wait(5)
    nodes.online = {1}
    with pytest.raises(
        RunFailedError, match=r"round 6: a round needs 2 connected clients, and within node_timeout_s=0\.3 there were 1"
    ):
        roster.wait(6)
