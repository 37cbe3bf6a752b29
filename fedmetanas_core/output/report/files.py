"""A run's page and pictures, written into its folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedmetanas_core.errors import FedMetaNASError, RefusalError
from fedmetanas_core.output.pictures import Picture, draw_alphas, draw_cells, draw_partition, draw_run
from fedmetanas_core.output.report.facts import RunFacts
from fedmetanas_core.output.report.page import report
from fedmetanas_core.output.report.side_by_side import compare_runs
from fedmetanas_core.run.files import one_line, write_atomically
from fedmetanas_core.run.folder import RunFolder


def write_report(runs: Sequence[Path], target: Path | None = None) -> Path:
    """The page of one run, by default its ``report.html``, or of several side by side, which need a ``target``.

    Raises RefusalError for what is no run folder, RunFailedError where it is damaged or cannot be written.
    """
    facts = [RunFacts.of(run) for run in runs]
    target = target or RunFolder(runs[0]).report_file
    with _of_this_version(runs):
        page = report(facts[0]) if len(facts) == 1 else compare_runs(facts)
    write_atomically(target, page.encode())
    return target


@contextmanager
def _of_this_version(runs: Sequence[Path]) -> Iterator[None]:
    """RefusalError where something is not in a run's files that this program writes into them."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        names = ", ".join(map(str, runs))
        what = f"{names}: written by another version, or damaged ({type(error).__name__}: {one_line(error)})"
        raise RefusalError(what, "use the version that wrote it") from error


def draw_pictures(run: Path) -> Path:
    """Write what can be drawn of a run into its ``pictures`` and return that folder. Raises as ``write_report``."""
    facts = RunFacts.of(run)
    directory = RunFolder(run).pictures_directory
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise FedMetaNASError(f"cannot write {directory}: {error.strerror or error}") from error
    with _of_this_version([run]):
        for name, picture in pictures_of(facts):
            for ending, content in picture.items():
                write_atomically(directory / f"{name}.{ending}", content)
    return directory


def pictures_of(facts: RunFacts) -> Iterator[tuple[str, Picture]]:
    """What there is to be seen so far, with its name."""
    if facts.summary.get("genotype"):
        yield "genotype", draw_cells(facts.summary["genotype"])
    if facts.rounds:
        yield "curves", draw_run(facts.rounds)
    if facts.history:
        yield "alphas", draw_alphas(facts.history, max(row["round"] for row in facts.history + facts.rounds))
    if facts.counts.size:
        yield "partition", draw_partition(facts.counts, facts.class_names)


def show_result(folder: RunFolder) -> str:
    """Page and pictures at the end of a run; why one of them is missing, in a line.

    A run that has its result must not fail for want of its picture, whatever the reason.
    """
    try:
        write_report([folder.path])
        draw_pictures(folder.path)
    except Exception as error:
        reason = str(error) if isinstance(error, FedMetaNASError) else f"{type(error).__name__}: {one_line(error)}"
        return f"the report is not complete: {reason}"
    return ""
