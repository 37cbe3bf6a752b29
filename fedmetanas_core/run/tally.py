"""What a run has cost, measured and noticed so far, beside its state: part of every checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Tally:
    """Bytes, seconds and events of all rounds so far, over all sessions of a run that was resumed.

    ``seconds`` is the wall time of the sessions; ``client_seconds_timed`` and ``seconds_by_part`` belong to the rounds
    that the stopwatch counts (run.stopwatch). ``void_rounds`` are those in a row just before; ``heard`` the (client,
    note) pairs that the ledger has told; ``resumed_after`` the rounds from which the run went on.
    ``averaged``: how many updates each round's average had, where that decides about privacy;
    ``fewest_candidates``: the least number of clients that one was drawn from. ``agreement``: how far
    each client has pointed along the others' direction, where that is looked at. ``roster``: who the clients are, in
    words of the server's. ``hardware``: what its sessions ran on.
    """

    seconds: float = 0.0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    updates_excluded: int = 0
    compute_seconds: float = 0.0
    client_seconds: float = 0.0
    client_seconds_timed: float = 0.0
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    peak_client_bytes: int = 0
    peak_client_gpu_bytes: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    void_rounds: int = 0
    heard: list[list[Any]] = field(default_factory=list)
    warned_of_collapse: bool = False
    resumed_after: list[int] = field(default_factory=list)
    averaged: list[int] = field(default_factory=list)
    fewest_candidates: int = 0
    agreement: dict[str, float] = field(default_factory=dict)
    roster: list[dict[str, Any]] = field(default_factory=list)
    hardware: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Its figures by name, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Tally":
        """What ``to_dict`` gave; ValueError if something is missing or unknown."""
        if values.keys() != {each.name for each in fields(cls)}:
            raise ValueError("its tally is not one of this version")
        return cls(**values)
