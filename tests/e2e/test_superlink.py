"""The SuperLink of `fedmetanas search`, with real Flower and Ray processes and an app that only counts."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.run import processes, superlink
from fedmetanas_core.run.superlink import Simulation

pytestmark = pytest.mark.e2e

PYPROJECT = """
[project]
name = "counting"
version = "1.0.0"
description = "An app that trains nothing"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "tests"
fab-include = ["server_app/**/*.py", "client_app/**/*.py"]
[tool.flwr.app.components]
serverapp = "server_app.app:app"
clientapp = "client_app.app:app"
[tool.flwr.app.config]
result = ""
text = "nothing"
"search.lr" = 0.1
rounds = 1
fail = false
"""
SERVER = """
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    seen = []
    for number in range(config["rounds"]):
        nodes = []
        while len(nodes) < 4:  # they report one after the other
            nodes = list(grid.get_node_ids())
        first = time.time()
        messages = [Message(RecordDict({"c": ConfigRecord({"n": number})}), node, "train") for node in nodes]
        seen += [dict(reply.content["r"]) for reply in grid.send_and_receive(messages)]
        facts = {"first": first, "nodes": len(nodes), "seen": seen, "config": dict(config), "ended": time.time()}
        aside = Path(config["result"] + ".aside")
        aside.write_text(json.dumps(facts))
        aside.replace(config["result"])
        if config["fail"]:
            raise ValueError("the pond froze over")
"""
CLIENT = """
import os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    time.sleep(0.2)
    facts = {"pid": os.getpid(), "at": time.time()}
    facts |= {"threads": os.environ["OMP_NUM_THREADS"], "extra": os.environ.get("EXTRA", "")}
    return Message(RecordDict({"r": ConfigRecord(facts)}), reply_to=message)
"""


@pytest.fixture
def app_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    for part, text in (("server_app", SERVER), ("client_app", CLIENT)):
        (folder / part).mkdir(parents=True)
        (folder / part / "__init__.py").touch()
        (folder / part / "app.py").write_text(text)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    return folder


@pytest.fixture
def make(app_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Simulation]]:
    """Build simulations whose remains, if any, are ended after the test."""
    made: list[Simulation] = []

    def build(**settings: object) -> Simulation:
        config = {"result": str(tmp_path / "result.json"), **settings.pop("run_config", {})}  # type: ignore[dict-item]
        defaults = {"num_nodes": 4, "num_workers": 1, "launch_dir": tmp_path} | settings
        made.append(Simulation(app_dir, config, **defaults))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for simulation in made:
        simulation.stop()


def wait(until: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def finished(simulation: Simulation) -> tuple[str, str]:
    wait(lambda: simulation.status()[0].startswith("finished"))
    return simulation.status()


def command_of(pid: int) -> str:
    """The command line of a process, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def remains(simulation: Simulation) -> list[str]:
    """Command lines of processes that bear the marker or name the private folder."""
    bearing = processes.marked(simulation.marker)
    commands = {each.pid: command_of(each.pid) for each in processes.processes() if not each.is_zombie}
    return [command for pid, command in commands.items() if pid in bearing or str(simulation.home) in command]


def is_gone(pid: int) -> bool:
    return all(each.pid != pid or each.is_zombie for each in processes.processes())


def test_a_completed_run_passes_every_value_uses_both_workers_and_leaves_nothing(
    make: Callable[..., Simulation], tmp_path: Path
) -> None:
    awkward = 'it\'s "quoted", a\\b = 1\tand ünï\ncode #'
    log = tmp_path / "logs" / "superlink.log"
    begun = time.time()
    with make(
        num_workers=2, run_config={"text": awkward, "search.lr": 2e-5}, environment={"EXTRA": "yes"}, keep_log=log
    ) as simulation:
        submitted = time.time()
        assert finished(simulation) == ("finished:completed", "")
        noticed = time.time()
        private = simulation.home
        assert private is not None
        assert private.exists()
    facts = json.loads((tmp_path / "result.json").read_text())
    reached = min(reply["at"] for reply in facts["seen"])
    print(f"\nstart {submitted - begun:.1f} s, then {facts['first'] - submitted:.1f} s to the first message sent, ")
    print(f"{reached - submitted:.1f} s to the first client trained, ")
    print(f"last reply to finished {noticed - facts['ended']:.1f} s, stop {time.time() - noticed:.1f} s")
    assert facts["nodes"] == 4
    assert facts["config"]["text"] == awkward
    assert facts["config"]["search.lr"] == 2e-5
    assert len({reply["pid"] for reply in facts["seen"]}) == 2
    assert {(reply["threads"], reply["extra"]) for reply in facts["seen"]} == {("1", "yes")}
    assert remains(simulation) == []
    assert all(is_gone(reply["pid"]) for reply in facts["seen"])
    assert not private.exists()
    assert log.exists()
    assert simulation.log_tail(5)


def test_a_raising_server_app_is_a_failed_run_with_its_reason(make: Callable[..., Simulation]) -> None:
    with make(run_config={"fail": True}) as simulation:
        status, details = finished(simulation)
        assert status == "finished:failed"
        assert "the pond froze over" in details + "\n".join(simulation.log_tail(60))
        assert all("\x1b" not in line for line in simulation.log_tail(60))
    assert remains(simulation) == []
    assert any("the pond froze over" in line for line in simulation.log_tail(200))


def test_stopping_in_the_middle_leaves_nothing(make: Callable[..., Simulation], tmp_path: Path) -> None:
    def interrupted() -> None:
        with simulation:
            wait((tmp_path / "result.json").exists)
            raise KeyboardInterrupt

    simulation = make(run_config={"rounds": 10_000})
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    facts = json.loads((tmp_path / "result.json").read_text())
    print(f"stop took {time.time() - facts['ended']:.1f} s")
    assert remains(simulation) == []
    assert all(is_gone(reply["pid"]) for reply in facts["seen"])
    assert simulation.home is not None
    assert not simulation.home.exists()


def test_a_refused_submission_says_why_and_leaves_nothing(make: Callable[..., Simulation]) -> None:
    simulation = make(run_config={"no_such_key": 1})
    with pytest.raises(RunFailedError, match=r"(?i)run config"):
        simulation.start()
    assert remains(simulation) == []


def test_a_port_that_was_taken_meanwhile_is_given_up_for_another(
    make: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], superlink._free_port()])
        monkeypatch.setattr(superlink, "_free_port", lambda: next(ports))
        with make() as simulation:
            assert next(ports, None) is None
            assert simulation.status()[0] in ("pending", "starting", "running")
    assert remains(simulation) == []


def test_a_superlink_that_dies_is_noticed_and_leaves_nothing(make: Callable[..., Simulation]) -> None:
    with make() as simulation:
        assert simulation.status()[0] in ("pending", "starting", "running")
        wait(lambda: simulation.status()[0] == "running")
        links = [pid for pid in processes.marked(simulation.marker) if "flower-superlink" in command_of(pid)]
        assert len(links) == 1
        os.kill(links[0], signal.SIGKILL)
        with pytest.raises(RunFailedError, match=r"SuperLink ended before the run did\n.*\S"):
            wait(lambda: not simulation.status())
    assert remains(simulation) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans are adopted on Linux only")
def test_a_killed_parent_leaves_nothing(app_dir: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    script = f"""
        from pathlib import Path
        from fedmetanas_core.run.superlink import Simulation
        import time
        config = {{"result": {str(result)!r}, "rounds": 10_000}}
        with Simulation(Path({str(app_dir)!r}), config, num_nodes=4, num_workers=1,
                        launch_dir=Path({str(tmp_path)!r})) as s:
            print(s.marker, s.home, flush=True)
            time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as parent:
        assert parent.stdout is not None
        marker, home = parent.stdout.readline().split()
        try:
            wait(result.exists)
        finally:
            parent.send_signal(signal.SIGKILL)
    killed = time.time()
    wait(lambda: not Path(home).exists())
    print(f"gone {time.time() - killed:.1f} s after SIGKILL")
    assert processes.marked(marker) == set()
    assert all(is_gone(reply["pid"]) for reply in json.loads(result.read_text())["seen"])
