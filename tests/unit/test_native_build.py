"""Compiling once: the cache, several processes at once, and every way in which it can fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedmetanas_core.space.native import build
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
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.setattr(build, "SOURCE", TRIVIAL)
    build.forget()
    return tmp_path / "cache"


def needs_compiler() -> None:
    if "no C++ compiler" in build.prepare():
        pytest.skip("needs a C++ compiler")


def test_it_compiles_once_and_loads() -> None:
    assert not build.is_compiled()
    needs_compiler()
    assert build.prepare() == ""
    assert build.is_compiled()
    assert build.library() is not None
    made = build.library_file().stat().st_mtime_ns
    build.forget()
    assert build.library() is None
    assert build.prepare() == ""
    assert build.library_file().stat().st_mtime_ns == made


def test_other_sources_are_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.library_file()
    monkeypatch.setattr(build, "SOURCE", TRIVIAL + "// another")
    assert build.library_file() != first


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CXX", "no-such-compiler", "no C++ compiler (no-such-compiler)"),
        ("CXX", "false", "failed: no message"),
        (build.SWITCH, "0", "switched off by FEDMETANAS_NATIVE=0"),
        (build.CACHE, "/proc/nowhere", "/proc/nowhere"),
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
    assert not build.is_compiled()


def test_a_damaged_file_is_removed_and_made_again(cache: Path) -> None:
    path = build.library_file()
    path.write_bytes(b"no library")
    assert str(path.name) in build.prepare()
    assert not path.exists()
    build.forget()
    needs_compiler()
    assert build.library() is not None


def test_two_processes_at_once_compile_once(cache: Path, tmp_path: Path) -> None:
    needs_compiler()
    build.library_file().unlink()
    counter = tmp_path / "compiler"
    real = next(name for name in build.COMPILERS if build.shutil.which(name))
    counter.write_text(f'#!/bin/sh\necho x >> "{tmp_path}/calls"\nsleep 1\nexec {real} "$@"\n')
    counter.chmod(0o755)
    code = (
        "from fedmetanas_core.space.native import build\n"
        f"build.SOURCE = {TRIVIAL!r}\n"
        "assert build.prepare() == '', build.prepare()\n"
    )
    environment = {**os.environ, "CXX": str(counter)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert (tmp_path / "calls").read_text().count("x") == 1
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]
