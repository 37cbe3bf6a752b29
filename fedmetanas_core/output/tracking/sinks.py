"""What each tracker is told about a run, in its own words.

Nothing here imports torch or another module of this project that does: these run in small processes of their own.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Row = Mapping[str, Any]

PROJECT = "fedmetanas"  # what runs are filed under, unless the environment says otherwise
FILES = ("config.yaml", "summary.json", "report.html", "pictures/genotype.svg")
LISTS = ("clients", "excluded", "notes")  # of a row; their lengths are told
STEP = "round"
FINAL = "final/"  # before the names of a summary's figures
LONGEST_PARAMETER = 500  # MLflow's servers of before 2.10 and Databricks' take no more
PARAMETERS_AT_ONCE, METRICS_AT_ONCE = 100, 1000  # MLflow's limits of one request
MLFLOW_STATUS = {"completed": "FINISHED", "failed": "FAILED"}
RUN_TAG = "fedmetanas.run_id"


@dataclass(frozen=True)
class Origin:
    """The run that is tracked: its folder, its ``run_id`` and what config.yaml says."""

    path: Path
    run_id: str
    config: Mapping[str, Any]


class Tracker(Protocol):
    """One tracker's side of one session of a run. Whatever goes wrong is raised."""

    def begin(self, origin: Origin, after: int) -> int:
        """Open the run, which has this many rounds behind it; the last round that need not be told again."""

    def tell(self, rows: Sequence[Row]) -> None:
        """Rows of the ledger, in order."""

    def end(self, summary: Row) -> None:
        """Close the run; ``summary`` is empty where its server was killed."""


def figures(row: Row) -> dict[str, float]:
    """The numbers of a row or a summary; what was not measured is left out, lists of a row count."""
    found = {key: float(value) for key, value in row.items() if isinstance(value, (int, float))}
    return found | {f"num_{key}": float(len(row[key])) for key in LISTS if isinstance(row.get(key), list)}


def final_figures(summary: Row) -> dict[str, float]:
    """The numbers of a summary, under names of their own."""
    return {f"{FINAL}{key}": value for key, value in figures(summary).items()}


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder."""

    def begin(self, origin: Origin, after: int) -> int:
        """Takes back what was written of rounds that are to come again."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = origin.path / "tensorboard"
        known = min(after, _last_event(folder))
        self._writer = EventFileWriter(str(folder))
        self._write(known + 1, session_log=SessionLog(status=SessionLog.START))
        plain = {key: value for key, value in origin.config.items() if isinstance(value, (int, float, str))}
        self._write(known, summary=hparams_pb(plain, trial_id=origin.run_id))
        self._writer.flush()
        return known

    def tell(self, rows: Sequence[Row]) -> None:
        """A scalar for each figure."""
        for row in rows:
            self._scalars(row[STEP], figures(row))
        self._writer.flush()

    def end(self, summary: Row) -> None:
        """The summary's figures, and the genotype as text."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        rounds = int(summary.get("rounds") or 0)
        self._scalars(rounds, final_figures(summary))
        for name in ("status", "genotype"):
            if summary.get(name) is not None:
                self._write(rounds, summary=text_pb(name, _as_text(summary[name])))
        self._writer.flush()
        self._writer.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        parts = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if tag != STEP]
        self._write(step, summary=Summary(value=parts))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))


def _last_event(folder: Path) -> int:
    """The last round that event files there tell of; 0 where there are none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return 0
    events = EventAccumulator(str(folder), size_guidance={"scalars": 1}).Reload()  # the last one is always kept
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(FINAL)]
    return max((events.Scalars(tag)[-1].step for tag in tags), default=0)


class WandB:
    """A run of Weights & Biases, whose files lie in ``wandb/`` of the run folder."""

    def begin(self, origin: Origin, after: int) -> int:
        """Goes on with the run of the same id, where there is one."""
        import wandb

        self._folder = origin.path
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=origin.path.name,
            id=origin.run_id,
            resume="allow",
            dir=str(origin.path),
            config=dict(origin.config),
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True),  # config.yaml has the commit
        )
        # Offline nobody knows what an earlier session has written; online the first steps that it lacks are asked for.
        return after if self._run.offline else max(0, self._run.starting_step - 1)

    def tell(self, rows: Sequence[Row]) -> None:
        """One step for each round."""
        for row in rows:
            self._run.log(figures(row), step=row[STEP])

    def end(self, summary: Row) -> None:
        """Figures and words go to the run's summary, the run folder's small files to its files."""
        words = {f"{FINAL}{key}": _as_text(summary[key]) for key in ("status", "genotype", "error") if summary.get(key)}
        self._run.summary.update(final_figures(summary) | words)
        for path in _files(self._folder):
            self._run.save(str(path), base_path=str(self._folder), policy="now")
        self._run.finish(exit_code=0 if summary.get("status") == "completed" else 1)


class MLflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, or in ``mlflow.db`` and ``mlartifacts/`` of the run folder."""

    def begin(self, origin: Origin, after: int) -> int:
        """Goes on with the run that has this run's id as a tag, where there is one."""
        from mlflow import MlflowClient

        self._folder = origin.path
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{origin.path / 'mlflow.db'}")
        experiment = self._experiment(None if uri else (origin.path / "mlartifacts").as_uri())
        same = self._client.search_runs([experiment], filter_string=f"tags.`{RUN_TAG}` = '{origin.run_id}'")
        if same:
            run = same[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self._client.create_run(experiment, run_name=origin.path.name, tags={RUN_TAG: origin.run_id})
        self._run_id = run.info.run_id
        self._parameters({key: value for key, value in origin.config.items() if key not in run.data.params})
        return int(run.data.metrics.get(STEP, 0))

    def tell(self, rows: Sequence[Row]) -> None:
        """Metrics, whose steps are rounds."""
        self._metrics([(key, value, row[STEP]) for row in rows for key, value in figures(row).items()])

    def end(self, summary: Row) -> None:
        """The summary's figures as metrics, the run folder's small files as artifacts."""
        rounds = int(summary.get("rounds") or 0)
        self._metrics([(key, value, rounds) for key, value in final_figures(summary).items()])
        for path in _files(self._folder):
            self._client.log_artifact(self._run_id, str(path))
        for name in ("status", "error"):
            if summary.get(name):
                self._client.set_tag(self._run_id, f"fedmetanas.{name}", str(summary[name])[:LONGEST_PARAMETER])
        if summary.get("genotype") is not None:
            self._client.log_text(self._run_id, _as_text(summary["genotype"]), "genotype.json")
        self._client.set_terminated(self._run_id, MLFLOW_STATUS.get(str(summary.get("status")), "KILLED"))

    def _experiment(self, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        there = self._client.get_experiment_by_name(name)
        if there is not None:
            return str(there.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=artifacts))

    def _parameters(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        told = [Param(key, _as_text(value)[:LONGEST_PARAMETER]) for key, value in values.items()]
        for start in range(0, len(told), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run_id, params=told[start : start + PARAMETERS_AT_ONCE])

    def _metrics(self, values: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        told = [Metric(key, value, now, step) for key, value, step in values]
        for start in range(0, len(told), METRICS_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=told[start : start + METRICS_AT_ONCE])


SINKS: dict[str, type[TensorBoard] | type[WandB] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def _files(folder: Path) -> Iterator[Path]:
    return (path for name in FILES if (path := folder / name).is_file())


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
