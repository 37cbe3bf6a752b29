"""Compiling once: the cache, several processes at once, and every way in which it can fail."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedmetanas_core.space.native import build
from fedmetanas_core.space.native.store import CACHE, Store
from fedmetanas_core.space.supernet import Supernet

TRIVIAL = (
    'extern "C" {\n'
    + "\n".join(
        f"void {name}() {{}}"
        for name in ("fmn_plan", "fmn_forget_plan", "fmn_run", "fmn_forward", "fmn_backward", "fmn_forget_run")
    )
    + "\n}\n"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and sources that compile at once."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.setattr(build, "SOURCE", TRIVIAL)
    build.forget()
    return tmp_path / "cache"


def library() -> Path:
    return Store.open(build._key()).library


def needs_compiler() -> None:
    if "no C++ compiler" in build.prepare():
        pytest.skip("needs a C++ compiler")


def test_it_compiles_once_and_loads() -> None:
    needs_compiler()
    said: list[str] = []
    assert build.prepare(said.append) == ""
    assert said == []
    assert build.library() is not None
    made = library().stat().st_mtime_ns
    build.forget()
    assert build.library() is None
    assert build.prepare(said.append) == ""
    assert library().stat().st_mtime_ns == made
    assert said == []
    library().unlink()
    build.forget()
    assert build.prepare(said.append) == ""
    assert len(said) == 1
    assert "compiling" in said[0]


def test_other_sources_are_compiled_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    monkeypatch.setattr(build, "SOURCE", TRIVIAL + "// another")
    build.forget()
    assert build.prepare() == ""
    assert len(list(cache.glob("*.so"))) == 2


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CXX", "no-such-compiler", "no C++ compiler (no-such-compiler)"),
        ("CXX", "false", "failed: no message"),
        (build.SWITCH, "0", "switched off by FEDMETANAS_NATIVE=0"),
        (CACHE, "/proc/nowhere", "/proc/nowhere"),
        (CACHE, "~nobody-of-this-name/cache", "home"),
    ],
)
def test_what_stands_in_the_way_is_named_and_the_modules_serve(
    variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    said = build.prepare()
    assert reason in said
    assert "\n" not in said
    assert build.library() is None
    from fedmetanas_core.space.architecture import Architecture
    from fedmetanas_core.space.spec import SpaceSpec

    spec = SpaceSpec(2, 1, 1, 1, 2, 8, 8)
    network = Supernet(spec, Architecture(spec).operation_mask).eval()
    assert network(torch.zeros(1, 1, 8, 8)).shape == (1, 2)


def test_sources_that_do_not_compile_are_named_with_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    build.forget()
    monkeypatch.setattr(build, "SOURCE", "int broken(;")
    assert "error" in build.prepare()
    assert not library().exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_file_cut_short_is_made_again(share: float) -> None:
    needs_compiler()
    path, whole = library(), library().read_bytes()
    path.unlink()  # this process has it mapped
    path.write_bytes(whole[: int(share * len(whole))])
    build.forget()
    assert build.prepare() == ""
    assert path.read_bytes() == whole


def scripted(directory: Path, name: str, body: str) -> str:
    """A compiler of ours that counts its calls."""
    path = directory / name
    path.write_text(f'#!/bin/sh\necho x >> "{directory}/calls"\n{body}\n')
    path.chmod(0o755)
    return str(path)


def calls(directory: Path) -> int:
    return (directory / "calls").read_text().count("x")


def test_a_failure_is_not_repeated_by_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", scripted(tmp_path, "broken", "echo 'error: no luck' >&2; exit 1"))
    first = build.prepare()
    tried = calls(tmp_path)
    build.forget()
    assert "no luck" in build.prepare()
    assert "no luck" in first
    assert calls(tmp_path) == tried
    monkeypatch.setattr(build, "FAILURE_HOLDS_S", 0.0)
    build.forget()
    build.prepare()
    assert calls(tmp_path) > tried


def test_another_compiler_is_tried_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    library().unlink()
    build.forget()
    monkeypatch.setenv("CXX", scripted(tmp_path, "broken", "exit 1"))
    assert "no message" in build.prepare()
    build.forget()
    monkeypatch.setenv("CXX", next(filter(shutil.which, build.COMPILERS)))
    assert build.prepare() == ""


def test_a_library_that_does_not_run_here_is_made_again() -> None:
    """Whole, with the right digest, but made for another machine: it cannot be loaded."""
    if not any(map(shutil.which, build.COMPILERS)):
        pytest.skip("needs a C++ compiler")
    path, content = library(), b"not for this machine"
    path.write_bytes(content)
    path.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())
    assert build.prepare() == ""
    assert path.read_bytes().startswith(b"\x7fELF" if sys.platform == "linux" else b"")
    assert path.read_bytes() != content


def test_a_library_in_a_place_that_cannot_be_written_serves(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    (cache / f"{library().stem}.lock").unlink()
    build.forget()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert build.prepare() == ""
    library().unlink()
    build.forget()
    assert "cannot be written" in build.prepare()


def test_the_reason_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    said: list[str] = []
    for _ in range(2):
        assert "switched off" in build.prepare(said.append)
    assert len(said) == 1
    assert "several times as slow: switched off" in said[0]


def test_a_gpu_needs_none() -> None:
    said: list[str] = []
    assert build.prepare(said.append, "cuda") == "there is none for cuda"
    assert said == []
    assert build.library() is None


def ends(pid: int) -> bool:
    """Whether a process is gone, or dead and not yet fetched, within a minute."""
    for _ in range(1200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_compiler_that_hangs_is_ended_with_its_children(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 5.0)
    monkeypatch.setattr(build, "MACHINE_FLAGS", ())
    child = tmp_path / "child"
    monkeypatch.setenv("CXX", scripted(tmp_path, "hanging", f'sleep 300 & echo $! > "{child}"; wait'))
    assert "not done after" in build.prepare()
    assert ends(int(child.read_text()))
    assert not list(cache.glob("compile-*"))


def test_a_compiler_may_be_given_with_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    library().unlink()
    build.forget()
    monkeypatch.setenv("CXX", f"{next(filter(shutil.which, build.COMPILERS))} -O0 -Wno-unused")
    assert build.prepare() == ""


@pytest.mark.parametrize("what", ["directory", "library"])
def test_code_that_others_could_have_put_there_is_not_loaded(cache: Path, what: str) -> None:
    needs_compiler()
    path = cache if what == "directory" else library()
    path.chmod(0o777)
    build.forget()
    assert "can be written by others" in build.prepare()
    assert build.library() is None
    path.chmod(0o700)
    build.forget()
    assert build.prepare() == ""


def test_two_processes_at_once_compile_once(cache: Path, tmp_path: Path) -> None:
    needs_compiler()
    library().unlink()
    real = next(filter(shutil.which, build.COMPILERS))
    probing = 'case "$*" in *-fsyntax-only*) exit 0;; esac'
    counter = scripted(tmp_path, "slow", f'sleep 1\n{probing}\necho made >> "{tmp_path}/made"\nexec {real} "$@"')
    code = (
        "from fedmetanas_core.space.native import build\n"
        f"build.SOURCE = {TRIVIAL!r}\n"
        "assert build.prepare() == '', build.prepare()\n"
    )
    environment = {**os.environ, "CXX": counter}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(500) for process in both] == [0, 0]
    assert (tmp_path / "made").read_text().count("made") == 1
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".sha256", ".so"]
