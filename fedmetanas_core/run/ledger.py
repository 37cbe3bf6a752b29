"""A file of JSON lines that only grows: one object for a round, on disk before the next one begins."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.run.files import as_object, one_line, sync_directory, to_json, write_atomically


class Ledger:
    """The lines at ``path``, each an object with its ``round``, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, object]) -> None:
        """Add one line, on disk when this returns. Raises RunFailedError.

        A line is whole once its newline is there; what a crash left without one is cut off first, so that the new
        line does not grow out of half an old one.
        """
        line = (to_json(row) + "\n").encode()
        try:
            is_new = not self.path.exists()
            with self.path.open("a+b", buffering=0) as file:
                end = _end_of_whole_lines(file.fileno())
                file.truncate(end)
                try:
                    _write_all(file.fileno(), line)
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
            if is_new:
                sync_directory(self.path.parent)
        except OSError as error:
            raise RunFailedError(f"cannot write {self.path}: {error.strerror or error}") from error

    def read(self) -> list[dict[str, Any]]:
        """All whole lines, a last one without its newline left out. Raises RunFailedError."""
        return self.after(0)[0]

    def after(self, place: int) -> tuple[list[dict[str, Any]], int]:
        """The whole lines from this byte on, and the byte after them, to go on from."""
        if not self.path.exists():
            return [], place
        try:
            with self.path.open("rb") as file:
                file.seek(place)
                found = file.read()
        except OSError as error:
            raise RunFailedError(f"cannot read {self.path}: {error.strerror or error}") from error
        whole = found[: found.rfind(b"\n") + 1]
        rows = []
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                where = f"line {number}" if not place else f"line {number} from byte {place} on"
                raise RunFailedError(f"{self.path}, {where} is damaged: {one_line(error)}") from error
            rows.append(as_object(row, self.path))
        return rows, place + len(whole)

    def rewind(self, round_number: int) -> None:
        """Forget the lines of later rounds. Raises RunFailedError."""
        if self.path.exists():
            kept = [row for row in self.read() if row["round"] <= round_number]
            write_atomically(self.path, "".join(to_json(row) + "\n" for row in kept).encode())


def _end_of_whole_lines(descriptor: int) -> int:
    """The offset after the last newline of an open file, in bytes."""
    end, block = os.fstat(descriptor).st_size, 4096
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:  # one call may take less than all, for example on a disk that is almost full
        rest = rest[os.write(descriptor, rest) :]
