"""``fedmetanas setup``: merge flwr.toml into the user's Flower configuration."""

from collections.abc import Sequence

from fedmetanas_core.commands.options import read_options, refuse_surplus, whole_number
from fedmetanas_core.commands.terminal import COMPLETED, say
from fedmetanas_core.launch import app_directory
from fedmetanas_core.run.flower_config import flower_home, install_profiles


def run(arguments: Sequence[str]) -> int:
    """[--nodes N]"""
    words, given = read_options("setup", arguments, with_value=["--nodes"])
    refuse_surplus("setup", words)
    nodes = whole_number("setup", "--nodes", given["--nodes"], 100) if given else None
    change = install_profiles(flower_home(), app_directory() / "flwr.toml", nodes)
    say(change or f"{flower_home() / 'config.toml'} is up to date")
    say(f"now: flwr run {app_directory()}")
    return COMPLETED
