"""``fedmetanas report``: the page of one run, or of several side by side."""

from collections.abc import Sequence

from fedmetanas_core.commands.options import read_options, user_path
from fedmetanas_core.commands.terminal import COMPLETED
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.output.report.files import write_report

SEVERAL = "runs.html"  # of several runs, in the present directory


def run(arguments: Sequence[str]) -> int:
    """RUN... [--output FILE.html]"""
    words, given = read_options("report", arguments, with_value=["--output"])
    if not words:
        raise RefusalError("report: no run was given", "write fedmetanas report RUN, the path that the search printed")
    runs = [user_path("report", word) for word in words]
    chosen = given.get("--output") or (SEVERAL if len(runs) > 1 else "")
    target = user_path("report", chosen) if chosen else None
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise RefusalError(f"report: --output {chosen!r} cannot be a file", "give a file in a folder that exists")
    print(write_report(runs, target), flush=True)
    return COMPLETED
