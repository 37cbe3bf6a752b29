"""``fedmetanas estimate``: the dry run, what a search would take of data, bytes, memory and time."""

import json
from collections.abc import Sequence
from pathlib import Path

from fedmetanas_core.commands.pairs import parse_pairs
from fedmetanas_core.commands.terminal import COMPLETED, say
from fedmetanas_core.config import Config
from fedmetanas_core.data.sites import NODES
from fedmetanas_core.errors import RefusalError
from fedmetanas_core.estimate.table import as_table, summary_line
from fedmetanas_core.estimate.whole import estimate
from fedmetanas_core.launch import check_cluster, prepare_launch
from fedmetanas_core.methods.keys import unread
from fedmetanas_core.preflight import pick_device
from fedmetanas_core.space.native import build

JSON = "--json"


def run(arguments: Sequence[str]) -> int:
    """[--config FILE.toml] [KEY=VALUE ...] [--json]"""
    words = [word for word in arguments if word != JSON]
    if len(arguments) - len(words) > 1:
        raise RefusalError(f"estimate: {JSON} was given twice", "give it once")
    given = parse_pairs(words)
    config = Config.from_mapping(given)
    if config.resume:
        raise RefusalError("resume: that run has begun, and its progress says how long it takes", "leave it out")
    if config.dataset == NODES:
        raise RefusalError(
            "dataset: an estimate needs images, and nodes keep theirs", "give dataset=... with images of the same size"
        )
    launch = prepare_launch(given, Path.cwd())
    if launch.config.ray_cluster:
        check_cluster(launch.config.ray_cluster, goes_on=False)
    if ignored := unread(config.method, given):
        say(f"note: {', '.join(ignored)}: without effect in {config.method}")
    build.prepare(say, pick_device(launch.config))
    say("trying a few rounds' work ...")
    found = estimate(launch.experiment)
    found["summary"] = summary_line(found)
    print(json.dumps(found, indent=2) if len(words) < len(arguments) else as_table(found), flush=True)
    return COMPLETED
