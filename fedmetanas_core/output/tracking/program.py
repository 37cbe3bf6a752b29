"""One tracker of one session, in a process of its own: reads the run folder as it fills and tells the tracker.

Arguments: the tracker's name, the run folder, the rounds that the run has behind it. The session lasts until standard
input closes, which happens when the server's process ends in any way. What goes wrong is said on standard output, in
one line.
"""

import json
import os
import re
import select
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from fedmetanas_core.output.tracking.sinks import SINKS, STEP, Origin, Tracker

LOOKS_S = 1.0  # between two looks into the ledger
ENDS_S = 120  # after the server's end; it waits less, and one that was killed waits not at all
LONGEST_REASON = 300


def main() -> None:
    """Entry point."""
    name, folder, after = sys.argv[1:]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # the server is told as well, and says when it is over
    words = os.dup(1)
    os.dup2(2, 1)  # what the tracker itself prints belongs in the log
    try:
        _follow(SINKS[name](), Path(folder), int(after))
    except Exception as error:
        os.write(words, reason_of(error).encode(errors="replace"))
        os._exit(1)  # what is left of the tracker could wait for a network for ever


def reason_of(error: Exception) -> str:
    """What goes into log and ledger: one line, without the user and password of an address."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"://[^/\s]*@", "://", said)[:LONGEST_REASON]


def _follow(tracker: Tracker, folder: Path, after: int) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_bytes())
    known = tracker.begin(Origin(folder, str(config["run_id"]), config), after)
    place, ended = 0, False
    while not ended:
        ended = bool(select.select([0], [], [], LOOKS_S)[0])  # nothing is ever sent, so this is its end
        rows, place = _rows(folder / "rounds.jsonl", place)
        if new := [row for row in rows if row[STEP] > known]:
            tracker.tell(new)
    signal.alarm(ENDS_S)
    summary = folder / "summary.json"
    tracker.end(json.loads(summary.read_bytes()) if summary.exists() else {})


def _rows(path: Path, place: int) -> tuple[list[dict[str, Any]], int]:
    """The ledger's whole lines from this byte on, and the byte after them."""
    if not path.exists():
        return [], place
    with path.open("rb") as file:
        file.seek(place)
        found = file.read()
    whole = found[: found.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], place + len(whole)


if __name__ == "__main__":
    main()
