"""``fedmetanas draw``: the pictures of a run, into its folder."""

from collections.abc import Sequence

from fedmetanas_core.commands.options import read_options, refuse_surplus, user_path
from fedmetanas_core.commands.terminal import COMPLETED
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.output.report.files import draw_pictures


def run(arguments: Sequence[str]) -> int:
    """RUN"""
    words, _ = read_options("draw", arguments)
    if not words:
        raise RefusalError("draw: no run was given", "write fedmetanas draw RUN, the path that the search printed")
    refuse_surplus("draw", words[1:])
    print(draw_pictures(user_path("draw", words[0])), flush=True)
    return COMPLETED
