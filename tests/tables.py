"""A small table for tests."""

from pathlib import Path

TABLE = """
title = "A small table"
methods = ["fedmetanas", "random_search", "fednas"]
seeds = [0, 1, 2]

[settings]
num_clients = 6
clients_per_round = 2
num_rounds = 3

[[dataset]]
name = "digits"
target = 0.5
published = { fednas = "12.3" }
method.fednas = { meta_lr_weights = 0.05 }

[[partition]]
name = "Dirichlet 0.1"
dir_alpha = 0.1

[[partition]]
name = "evenly"
partition = "iid"
"""


def write(tmp_path: Path, text: str = TABLE) -> Path:
    """The file with this text."""
    path = tmp_path / "small.toml"
    path.write_text(text)
    return path
