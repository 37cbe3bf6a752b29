"""Which node is which client, which of them are connected, and what they have."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from flwr.app import Message, MessageType

from fedmetanas_core.config import AUTO, Config
from fedmetanas_core.data.sites import NODES, Agreement, SiteFacts, agree, unfit
from fedmetanas_core.errors import FedMetaNASError, RunFailedError
from fedmetanas_core.federation.wire import NodeFacts, SiteQuestion, decode_facts, encode_question
from fedmetanas_core.methods.budgets import known_limits
from fedmetanas_core.preflight import given_of_agreement
from fedmetanas_core.run.fingerprint import code_fingerprint
from server_app.courier import Courier
from server_app.replies import error_line

VIRTUAL_WAIT_S = 5.0  # without a new node; those of a simulation appear all at once, at its start
QUERY_TIMEOUT_S = 300.0  # every worker imports torch before it answers
RETURN_S = 90.0  # for the nodes of a run that goes on: Flower lets one back in about a minute after it was lost
ASK_AGAIN_S = 30.0  # a node that cannot take part: somebody may have mended it
LOOK_S = 1.0
SETUP_HINT = "run `fedmetanas setup --nodes {count}`, then end the SuperLink that is running and start again"


@dataclass
class Member:
    """A client: its number in this run, and the name by which its node is known again.

    That is the name of its configuration, else its partition, else its number in Flower, which an authenticated node
    keeps. ``train`` and ``test`` count its own images, 0 where it has a share of a dataset. ``peak_gpu_memory_share``
    is the most of its GPU's memory that its client has used.
    """

    client: int
    name: str
    train: int = 0
    test: int = 0
    cores: int = 0
    gpu_memory_bytes: int = 0
    peak_gpu_memory_share: float = 0.0
    limits: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Candidate:
    """What a node has answered that has no number yet, or is asked again."""

    facts: NodeFacts
    site: SiteFacts | None
    limits: dict[str, float]


@dataclass(frozen=True)
class _Refusal:
    called: str
    reason: str
    since: float


class Roster:
    """The clients of a run and their nodes. ``virtual``: they are those of a simulation, which come all or never.

    ``members`` are known from the run's earlier sessions. ``nodes`` maps each client to the node that it was last,
    ``declared`` and ``held_out`` to how many training and test images its node has, where they are its own;
    ``events`` are (client, what happened), for the ledger; whoever tells them empties the list.
    """

    def __init__(
        self, courier: Courier, config: Config, virtual: bool, members: Mapping[int, Member] | None = None
    ) -> None:
        self.courier, self.config, self.virtual = courier, config, virtual
        self.members: dict[int, Member] = dict(members or {})
        self.nodes: dict[int, int] = {}
        self.declared: dict[int, int] = {}
        self.held_out: dict[int, int] = {}
        self.events: list[tuple[int | None, str]] = []
        self._present: set[int] = set()  # the nodes that Flower has named when last asked
        self._connected: set[int] = set()
        self._candidates: dict[int, _Candidate] = {}
        self._refused: dict[int, _Refusal] = {}
        self._asked: dict[int, float] = {}  # since when
        self._agreement: Agreement | None = None
        self.begun = False  # what the run's network may cost is settled
        self.tells_of_limits = True  # where all share one network

    @property
    def agreement(self) -> Agreement:
        """What the nodes go by, once they are gathered."""
        assert self._agreement is not None
        return self._agreement

    @property
    def _of_a_round(self) -> int:
        """Without so many clients a round would be void."""
        return ceil(self.config.clients_per_round / 2)

    def connected(self) -> list[int]:
        """The clients whose nodes were there when last looked at, ascending."""
        return sorted(self._connected)

    def free(self) -> list[int]:
        """Those of them that are not still at work for an earlier round, as far as is known."""
        busy = set() if self.virtual else self.courier.busy()
        return [client for client in self.connected() if self.nodes[client] not in busy]

    def sizes(self) -> dict[int, tuple[int, int]]:
        """Training and test images of each client that has its own."""
        return {each.client: (each.train, each.test) for each in self.members.values() if each.train}

    def limits(self) -> dict[int, dict[str, float]]:
        """What a network may cost, by client, where its node says so."""
        return {each.client: each.limits for each in self.members.values() if each.limits}

    def used_gpu(self, gpu_bytes: Mapping[int, int]) -> None:
        """Note the memory that these clients have used of their GPUs."""
        for client, used in gpu_bytes.items():
            member = self.members[client]
            if member.gpu_memory_bytes:
                member.peak_gpu_memory_share = max(member.peak_gpu_memory_share, used / member.gpu_memory_bytes)

    def to_list(self) -> list[dict[str, Any]]:
        """The members, for checkpoint and summary."""
        return [asdict(self.members[client]) for client in sorted(self.members)]

    @staticmethod
    def from_list(rows: Sequence[Mapping[str, Any]]) -> dict[int, Member]:
        """What ``to_list`` gave."""
        return {int(row["client"]): Member(**row) for row in rows}

    # --- before the first round -----------------------------------------------------------------------------------

    def count(self) -> None:
        """Wait until a simulation has as many nodes as the run has clients; RunFailedError with the setup hint."""
        wanted, seen, deadline = self.config.num_clients, 0, time.monotonic() + VIRTUAL_WAIT_S
        while len(found := self.courier.node_ids()) < wanted:
            if len(found) > seen:
                seen, deadline = len(found), time.monotonic() + VIRTUAL_WAIT_S
            if time.monotonic() > deadline:
                hint = SETUP_HINT.format(count=wanted)
                raise RunFailedError(f"num_clients={wanted}, but Flower has {len(found)} nodes; {hint}")
            time.sleep(0.2)

    def gather(self) -> None:
        """Wait for enough nodes that can take part, and number them.

        A run that goes on waits a while for all that it had before, and is then content with what a round needs.
        Raises RunFailedError when they do not come within ``node_timeout_s``, saying of each that came why it cannot.
        One that has come by then is heard first (see ``_is_over``).
        """
        config, started = self.config, time.monotonic()
        enough = config.num_clients if config.min_clients == AUTO or self.virtual else int(config.min_clients)
        goes_on = bool(self.members) and not self.virtual
        least = min(enough, self._of_a_round) if goes_on else enough
        wanted = max(least, len(self.members)) if goes_on else enough
        best, deadline = 0, started + config.node_timeout_s
        while True:
            present = self._present = self.courier.node_ids()
            self._meet(present)
            places = self._places(self._fitting(present))
            waited = time.monotonic() - started > min(RETURN_S, config.node_timeout_s)
            if len(places) >= (least if waited else wanted):
                break
            if len(places) > best:
                best, deadline = len(places), time.monotonic() + config.node_timeout_s
            if self.virtual or self._is_over(deadline):
                raise RunFailedError(self._too_few(len(places), least))
            time.sleep(LOOK_S)
        self._enrol(places)
        for client in sorted(self.members.keys() - self._connected):
            self._tell(client, f"{self.members[client].name} is not connected")

    def _is_over(self, deadline: float) -> bool:
        """Whether this has passed, and no new node that came before it still owes its answer.

        For that it has ``QUERY_TIMEOUT_S``: a machine may be slow to start its first client process.
        """
        known = self._refused.keys() | set(self.nodes.values())
        new = [since for node, since in self._asked.items() if node in self._present - known]
        return time.monotonic() > deadline and all(since > deadline for since in new)

    def _tell(self, client: int | None, what: str) -> None:
        self.events.append((client, what))
        print(what if client is None else f"client {client}: {what}", flush=True)

    def _too_few(self, found: int, enough: int) -> str:
        refusals = sorted(self._refused.values(), key=lambda each: each.called)
        if self.virtual:
            first = f"{refusals[0].called}: {refusals[0].reason}" if refusals else SETUP_HINT.format(count=enough)
            return f"{found} of {enough} nodes can take part: {first}"
        reasons = "; ".join(f"{each.called}: {each.reason}" for each in refusals)
        waited = f"no more came within node_timeout_s={self.config.node_timeout_s:g}"
        hint = reasons or "start more SuperNodes, or set num_clients and min_clients"
        return f"{found} of the {enough} nodes that the run waits for can take part, {waited}; {hint}"

    def _meet(self, present: set[int]) -> None:
        """Ask those that are new, or could not take part a while ago, and hear who has answered."""
        questions = self._questions(present)
        if self.virtual:  # all are there, and all will answer
            asked = {message.metadata.dst_node_id for message in questions}
            for reply in self.courier.exchange(questions, QUERY_TIMEOUT_S):
                self._hear(reply.metadata.src_node_id, reply)
            for node in asked & self._asked.keys():
                self._refuse(node, f"it did not answer within {QUERY_TIMEOUT_S:g} s")
            return
        self.courier.ask(questions)
        self._hear_all()

    def _hear_all(self) -> None:
        for node, reply in self.courier.answers():
            self._hear(node, reply)
        for node, since in list(self._asked.items()):
            if time.monotonic() - since > QUERY_TIMEOUT_S:
                self._refuse(node, f"it did not answer within {QUERY_TIMEOUT_S:g} s")

    def _questions(self, present: set[int], anew: Sequence[int] = ()) -> list[Message]:
        """To all nodes that are new, to those of ``anew``, and to those that were refused a while ago."""
        now, config = time.monotonic(), self.config
        again = {node for node, each in self._refused.items() if now - each.since > ASK_AGAIN_S}
        names, _, _ = given_of_agreement(config) if config.dataset == NODES else (None, None, None)
        size = 0 if config.image_size == AUTO else int(config.image_size)
        question = SiteQuestion(config.dataset == NODES, config.seed, size, ",".join(names or ()))
        settled = (self._candidates.keys() | self._refused.keys() | set(self.nodes.values())) - again - set(anew)
        new = sorted(present - settled - self._asked.keys())
        self._asked.update(dict.fromkeys(new, now))
        # One that was not answered in time is worth nothing later, and would keep its node from its work.
        return [Message(encode_question(question), node, MessageType.QUERY, ttl=QUERY_TIMEOUT_S) for node in new]

    def _hear(self, node: int, reply: Message) -> None:
        """Take a node's answer for what it is."""
        self._asked.pop(node, None)
        self._candidates.pop(node, None)
        if reply.has_error():
            return self._refuse(node, f"it cannot start: {error_line(reply)}")
        try:
            facts = decode_facts(reply.content)
            site, limits = SiteFacts.from_json(facts.site) if facts.site else None, known_limits(facts.limits)
        except (FedMetaNASError, ValueError) as error:
            return self._refuse(node, f"its answer cannot be read: {error}")
        if facts.fingerprint != code_fingerprint():
            why = (
                f"it runs other code ({facts.fingerprint}) than this server ({code_fingerprint()}): "
                "a SuperLink started in another project serves it; end it and start again"
            )
            return self._refuse(node, why, _name(node, facts))
        if facts.refusal or (self.config.dataset == NODES and site is None):
            return self._refuse(node, facts.refusal or "it says nothing of its images", _name(node, facts))
        self._candidates[node] = _Candidate(facts, site, limits)
        return None

    def _called(self, node: int) -> str:
        """The name of the client that this node is, if it is one."""
        return next((self.members[client].name for client, its in self.nodes.items() if its == node), "")

    def _refuse(self, node: int, reason: str, called: str = "") -> None:
        called = called or f"node {node}"
        earlier = self._refused.get(node)
        if earlier is None or earlier.reason != reason:
            self._tell(None, f"{called} cannot take part: {reason}")
        self._refused[node] = _Refusal(called, reason, time.monotonic())
        self._asked.pop(node, None)

    def _fitting(self, present: set[int]) -> dict[int, _Candidate]:
        """Those that can take part beside each other. All that have answered decide what that takes."""
        here = {node: each for node, each in self._candidates.items() if node in present}
        sites = {str(node): each.site for node, each in here.items() if each.site is not None}
        if self.config.dataset != NODES or not sites:
            return here
        self._agreement, reasons = agree(sites, *given_of_agreement(self.config))
        for node, reason in reasons.items():
            each = here.pop(int(node))
            self._refuse(int(node), reason, _name(int(node), each.facts))
        return here

    # --- numbers --------------------------------------------------------------------------------------------------

    def _places(self, candidates: Mapping[int, _Candidate]) -> dict[int, int]:
        """Node to its number: the one it had, its partition's, else the lowest that is free; others are refused."""
        known = {each.name: each.client for each in self.members.values()}
        names = {node: _name(node, each.facts) for node, each in candidates.items()}
        taken = {client: self.nodes[client] for client in self._connected}
        partitions = {each.facts.partition_id for each in candidates.values()} | self.members.keys()
        free = iter([each for each in range(self.config.num_clients) if each not in partitions])
        places: dict[int, int] = {}
        for node in sorted(candidates, key=lambda each: (names[each], each)):
            partition = candidates[node].facts.partition_id
            if names[node] not in known:
                known[names[node]] = partition if partition >= 0 else next(free, -1)
            client = known[names[node]]
            if not 0 <= client < self.config.num_clients:
                if not self.virtual:  # which may have more nodes than the run has clients
                    why = f"partition-id {partition}" if partition >= 0 else f"all {self.config.num_clients} places"
                    full = "is not below num_clients" if partition >= 0 else "are taken; raise num_clients"
                    self._refuse(node, f"{why} {full}", names[node])
            elif taken.setdefault(client, node) != node:
                self._refuse(node, f"client {client} ({names[node]}) is connected already", names[node])
            else:
                places[node] = client
        return places

    def _enrol(self, places: Mapping[int, int]) -> None:
        for node, client in sorted(places.items(), key=lambda each: each[1]):
            each, before = self._candidates[node], self.members.get(client)
            name, counts = _name(node, each.facts), (0, 0)
            if each.site is not None:
                counts = (each.site.train, each.site.test)
                self.declared[client], self.held_out[client] = counts
            peak = before.peak_gpu_memory_share if before is not None else 0.0
            self.members[client] = Member(
                client, name, *counts, each.facts.cores, each.facts.gpu_memory_bytes, peak, each.limits
            )
            self._tell_of_limits(self.members[client])
            if client not in self._connected and not self.virtual:
                self._tell(client, f"{name} {'takes part' if before is None else 'is connected again'}")
            for other in [other for other, its in self.nodes.items() if its == node and other != client]:
                self._tell(other, f"{self.members[other].name} is called {name} now, and client {client}")
                del self.nodes[other]
                self._connected.discard(other)
            self.nodes[client] = node
            self._connected.add(client)
            self._refused.pop(node, None)
            del self._candidates[node]

    def _tell_of_limits(self, member: Member) -> None:
        """Say so if a client that comes later allows less than the run already keeps to."""
        for key, most in member.limits.items() if self.begun and self.tells_of_limits else ():
            kept = getattr(self.config, key)
            if not 0 < kept <= most:
                run = f"the run keeps to {kept:g}" if kept else "the run has none"
                self._tell(member.client, f"{member.name} came too late for its {key}={most:g}: {run}")

    # --- between rounds -------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Note who went, who is back and who is new. New nodes are asked, and take part once they have answered.

        Those that are back are asked again beside their work: their images may be others now.
        """
        present = self._present = self.courier.node_ids()
        client_of = {node: client for client, node in self.nodes.items()}
        for node, in_vain in self.courier.late():
            if in_vain and node in present:  # its SuperNode is there, and nobody does the work
                self._refuse(node, "it left a message unanswered for as long as that was good", self._called(node))
            elif not in_vain:
                what = "its reply to an earlier round came after the deadline, dropped"
                self.events.append((client_of.get(node), what))
        back = {client for client, node in self.nodes.items() if node in present - self._refused.keys()}
        for client in sorted(self._connected - back):
            self._tell(client, f"{self.members[client].name} is no longer connected")
        returned = sorted(back - self._connected)
        for client in returned:
            self._tell(client, f"{self.members[client].name} is connected again")
        self._connected = back
        self._hear_all()
        fitting = {node: each for node, each in self._candidates.items() if node in present}
        for node, each in list(fitting.items()):
            reason = None if each.site is None else unfit(each.site, self.agreement)
            if reason is not None:
                self._refuse(node, reason, _name(node, each.facts))
                self._connected.discard(client_of.get(node, -1))
                del fitting[node], self._candidates[node]
        self._enrol(self._places(fitting))
        self.courier.ask(self._questions(present, [self.nodes[client] for client in returned]))

    def wait(self, round_number: int) -> None:
        """Look, until half of a round's clients are connected; RunFailedError when ``node_timeout_s`` is over."""
        if self.virtual:
            return
        config, needed = self.config, self._of_a_round
        deadline = time.monotonic() + config.node_timeout_s
        while True:
            self.look()
            there = sum(client < config.num_clients - config.unseen_clients for client in self.free())
            if there >= needed:
                return
            if self._is_over(deadline):
                raise RunFailedError(
                    f"round {round_number}: a round needs {needed} connected clients, and within "
                    f"node_timeout_s={config.node_timeout_s:g} there were {there}; start SuperNodes and resume"
                )
            time.sleep(LOOK_S)


def _name(node: int, facts: NodeFacts) -> str:
    if facts.name:
        return facts.name
    return f"partition {facts.partition_id}" if facts.partition_id >= 0 else f"node {node}"
