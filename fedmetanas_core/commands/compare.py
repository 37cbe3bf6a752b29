"""``fedmetanas compare``: a whole table, methods x datasets x partitions x seeds."""

from collections.abc import Sequence
from pathlib import Path

from fedmetanas_core.commands.options import read_options, refuse_surplus
from fedmetanas_core.commands.terminal import COMPLETED, FAILED, INTERRUPTED, say
from fedmetanas_core.comparison.engine import DEFAULT_RESULTS, compare_table
from fedmetanas_core.errors import RefusalError


def run(arguments: Sequence[str]) -> int:
    """TABLE.toml [--results DIR]"""
    words, given = read_options("compare", arguments, with_value=["--results"])
    if not words:
        raise RefusalError("compare: no table was given", "write fedmetanas compare conf/table-2-small.toml")
    refuse_surplus("compare", words[1:])
    results = Path.cwd() / given.get("--results", DEFAULT_RESULTS)
    outcome = compare_table(Path(words[0]), results, Path.cwd(), say)
    if outcome.written is not None:
        print(outcome.written, flush=True)
    return {"completed": COMPLETED, "failed": FAILED, "interrupted": INTERRUPTED}[outcome.status]
