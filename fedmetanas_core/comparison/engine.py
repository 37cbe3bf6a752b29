"""Runs what a table still lacks, and writes the table anew after each run."""

import fcntl
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import fmean

from fedmetanas_core.comparison.picture import draw_curves
from fedmetanas_core.comparison.plan import MEASURES, PlannedRun, Table, read_table
from fedmetanas_core.comparison.report import as_csv, as_json, markdown
from fedmetanas_core.comparison.rows import WHERE_IT_RUNS, Row, load_row, row_of, save_row
from fedmetanas_core.comparison.statistics import cells_of, differences
from fedmetanas_core.config import Config
from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.launch import Follower, Launch, Outcome, Say, prepare_launch, start
from fedmetanas_core.preflight import pick_device, prepare_experiment
from fedmetanas_core.run.files import write_atomically
from fedmetanas_core.run.fingerprint import code_fingerprint
from fedmetanas_core.run.folder import RunFolder, check_run_name, resolve_runs_dir
from fedmetanas_core.run.progress import Progress
from fedmetanas_core.runs import is_complete
from fedmetanas_core.text import describe

DEFAULT_RESULTS = Path("results")
TABLE_FILE = "table.md"
ROWS = "rows"


@dataclass
class Compared:
    """How it went: ``status`` is completed, failed or interrupted; ``written`` the Markdown file, if there is one."""

    status: str
    written: Path | None = None
    failures: list[str] = field(default_factory=list)


def compare_table(path: Path, results: Path, launch_directory: Path, say: Say) -> Compared:
    """All runs of the table that have no row yet, one after the other; raises RefusalError before anything starts.

    Rows lie in ``results``/<name of the table>/rows; a row that was given other settings is made again.
    """
    table = read_table(path)
    _check_places(table, _rows_there(table, results), launch_directory)
    directory = results / table.name
    with _alone(directory):
        rows = _rows_there(table, results)
        others = sum((directory / ROWS / f"{run.name}.json").is_file() for run in table.runs if run.name not in rows)
        aside = f"; {others} rows are of other settings and will be replaced" if others else ""
        say(f"{table.title}: {len(table.runs)} runs, {len(rows)} of them are there{aside}")
        compared = Compared("completed")
        write = _Writer(table, directory, f"fedmetanas compare {shlex.quote(str(path))}")
        for run in [run for run in table.runs if run.name not in rows]:
            say(f"run {len(rows) + len(compared.failures) + 1} of {len(table.runs)}: {run.words}{_left(table, rows)}")
            try:
                folder, outcome = _finished(run, launch_directory, say)
            except FedMetaNASError as error:  # the other runs do not need this one
                folder, outcome = None, Outcome("failed", str(error), 0.0)
            if outcome.status == "interrupted":
                say("fedmetanas: interrupted; the same command goes on from here")
                compared.status = "interrupted"
                break
            if outcome.status != "completed" or folder is None:
                compared.failures.append(f"{run.words}: {outcome.reason}")
                say(f"  failed: {outcome.reason}")
                continue
            rows[run.name] = {**row_of(run, folder), "wall_seconds": outcome.seconds or None}
            save_row(directory / ROWS, run, rows[run.name])
            write(rows)
            measured = rows[run.name][table.measure]
            figure = "" if measured is None else f"{MEASURES[table.measure]} {measured:.4f}, "
            say(f"  {figure}{f'took {describe(outcome.seconds)}' if outcome.seconds else 'taken over'}")
        if rows:
            compared.written = write(rows)
    return _concluded(compared, say)


def _finished(run: PlannedRun, launch_directory: Path, say: Say) -> tuple[RunFolder, Outcome]:
    """The run, brought to its end.

    A folder of the same settings, device and code is taken as it is if it is complete, and gone on with if it is not;
    any other stays, and the run gets the next free name.
    """
    runs_dir = resolve_runs_dir("", os.environ, launch_directory)
    for attempt in count(1):
        name = run.name if attempt == 1 else f"{run.name}--{attempt}"
        folder = RunFolder(runs_dir / name)
        if not os.path.lexists(folder.path):
            launch = prepare_launch({**run.keys, "run_name": name}, launch_directory)
            break
        if _is_same(run, folder, launch_directory):
            if is_complete(folder.path):
                say(f"  {folder.path} holds it")
                return folder, Outcome("completed", "", 0.0, folder.read_summary() or {})
            where = run.keys.get("ray_address") or "none"  # the table's, whatever it was when the run began
            launch = prepare_launch({"resume": str(folder.path), "ray_address": where}, launch_directory)
            say(f"  goes on from round {len(folder.rounds.read())} in {folder.path}")
            break

    def notes(line: str) -> None:
        if line.startswith("note: "):  # the rest is what starts and ends, the same for every run
            say(f"  {line}")

    return folder, start(launch, lambda: _follower(launch), notes)


def _is_same(run: PlannedRun, folder: RunFolder, launch_directory: Path) -> bool:
    """Whether this folder's run was given the same settings and partition, on such a device, and made by this code."""
    if not folder.config_file.is_file():
        return False
    experiment = prepare_experiment(Config.from_mapping(run.keys), launch_directory)
    asked = {key: value for key, value in experiment.config.to_dict().items() if key not in WHERE_IT_RUNS}
    asked |= {"code_fingerprint": code_fingerprint(), "partition_hash": experiment.partition.hash()}
    asked["device"] = pick_device(experiment.config)
    found = folder.read_config()
    return all(found.get(key) == value for key, value in asked.items())


def _rows_there(table: Table, results: Path) -> dict[str, Row]:
    """The rows that need not be made, by the name of their run: this table's own, else those it may borrow."""
    rows = {}
    for run in table.runs:
        places = (results / name / ROWS for name in (table.name, *table.rows_from))
        row = next((row for place in places if (row := load_row(place, run)) is not None), None)
        if row is not None:
            rows[run.name] = row
    return rows


def _left(table: Table, rows: Mapping[str, Row]) -> str:
    """How long the runs that are missing may take, by what runs of the same method and dataset took."""
    timed = [row for row in rows.values() if row["wall_seconds"] is not None]
    if not timed:
        return ""

    def estimate(run: PlannedRun) -> float:
        same = [row for row in timed if row["dataset"] == run.dataset.name]
        own = [row for row in same if row["method"] == run.method]
        return fmean(row["wall_seconds"] for row in own or same or timed)

    total = sum(estimate(run) for run in table.runs if run.name not in rows)
    return f", about {describe(total)} left"


class _Quiet:
    """Follows a run without a word, where nobody watches."""

    def update(self, row: Mapping[str, object]) -> None:
        """Nothing."""


def _follower(launch: Launch) -> AbstractContextManager[Follower]:
    if sys.stderr.isatty():
        return Progress(int(launch.experiment.config.num_rounds))
    return nullcontext(_Quiet())


def _concluded(compared: Compared, say: Say) -> Compared:
    if compared.failures and compared.status == "completed":
        compared.status = "failed"
        say(f"fedmetanas: {len(compared.failures)} runs failed; the same command tries them again")
        say("\n".join(compared.failures))
    return compared


class _Writer:
    """Writes table and picture of what is there."""

    def __init__(self, table: Table, directory: Path, command: str) -> None:
        self.table, self.directory, self.command = table, directory, command

    def __call__(self, rows: Mapping[str, Row]) -> Path:
        """The path of the Markdown file."""
        ordered = [rows[run.name] for run in self.table.runs if run.name in rows]
        cells = cells_of(self.table, ordered)
        found = differences(self.table, cells)
        texts = {
            TABLE_FILE: markdown(self.table, cells, found, self.command),
            "table.csv": as_csv(cells),
            "table.json": as_json(self.table, cells, found),
            "curves.svg": draw_curves(self.table, cells),
        }
        for name, text in texts.items():
            write_atomically(self.directory / name, text.encode())
        return self.directory / TABLE_FILE


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Nobody else may fill the same table at the same time."""
    path = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise RefusalError(f"{directory} cannot be written: {error.strerror}", "choose another --results") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            theirs = not path.is_file() or not os.path.samestat(path.stat(), os.fstat(lock.fileno()))
        except OSError:
            theirs = True
        if theirs:  # the second case: whoever held it removed it between our opening and our locking
            raise RefusalError(f"{directory} is being filled by another compare", "wait for it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _check_places(table: Table, rows: Mapping[str, Row], launch_directory: Path) -> None:
    """Load every dataset and draw every partition once, so that a table does not fail in the middle of the night.

    Raises RefusalError as well where methods that are to be compared would not have the same images.
    """
    for run in table.runs:
        try:
            check_run_name(run.name)
        except RefusalError as error:
            what = f"{table.name}: {run.words}: its file name {run.name}"
            raise RefusalError(what, "give plain, short names in the table") from error
    first = [run for run in table.runs if run.seed == table.seeds[0]]
    images = {_place(run): rows[run.name]["partition_hash"] for run in first if run.name in rows}
    for run in first:
        if run.name not in rows:
            found = _partition_hash(table, run, launch_directory)
            if images.setdefault(_place(run), found) != found:
                what = f"{table.name}: {run.words}: its clients hold other images than another method's"
                fix = "give keys of data and partition for all methods alike; if a row is of older code, remove it"
                raise RefusalError(what, fix)


def _place(run: PlannedRun) -> tuple[str, str]:
    return run.dataset.name, run.partition.name


def _partition_hash(table: Table, run: PlannedRun, launch_directory: Path) -> str:
    """Of a run that passes every check of a launch."""
    try:
        return prepare_launch(run.keys, launch_directory).experiment.partition.hash()
    except RefusalError as error:
        raise RefusalError(f"{table.name}: {run.words}: {error.what}", error.fix) from error
