"""Compile the C++ sources once per machine, keep the result, load it; and say why where that does not work."""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from fedmetanas_core.space.native.cells import CELLS
from fedmetanas_core.space.native.kernels import KERNELS
from fedmetanas_core.space.native.layers import LAYERS
from fedmetanas_core.space.native.network import NETWORK
from fedmetanas_core.space.native.structure import STRUCTURE

SWITCH = "FEDMETANAS_NATIVE"  # "0" switches the compiled code off
CACHE = "FEDMETANAS_CACHE"
SOURCE = "\n".join((KERNELS, STRUCTURE, LAYERS, CELLS, NETWORK))
COMPILERS = ("c++", "g++", "clang++")
COMMON_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")
# The first set that the compiler takes; not every compiler knows the processor it runs on by that name.
MACHINE_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
COMPILE_TIMEOUT_S = 300.0

_library: ctypes.CDLL | None = None


@cache
def prepare() -> str:
    """Load the compiled code, compiling it first if need be (about 20 s, once); "" or why it cannot be used.

    Safe to call from several processes at once: one compiles, the others wait for it.
    """
    global _library
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    try:
        path = library_file()
        if not path.exists():
            with _alone(path):
                if not path.exists():
                    _compile(path)
        _library = _load(path)
    except (OSError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())[:300]
    return ""


def library() -> ctypes.CDLL | None:
    """The loaded code; None before ``prepare``, and where that failed."""
    return _library


def forget() -> None:
    """Go back to the state before ``prepare``."""
    global _library
    _library = None
    prepare.cache_clear()


def is_compiled() -> bool:
    """Whether ``prepare`` would find the compiled code in the cache."""
    try:
        return library_file().exists()
    except OSError:
        return False


def library_file() -> Path:
    """Where the compiled code of these sources for this processor lies. OSError if there is no place for it."""
    facts = "\0".join((SOURCE, *COMMON_FLAGS, platform.machine(), _processor()))
    name = f"native-{hashlib.sha256(facts.encode()).hexdigest()[:20]}.so"
    return _cache_directory() / name


def _cache_directory() -> Path:
    """``$FEDMETANAS_CACHE``, else the user's cache, else a directory of this user's own among the temporary ones."""
    given = os.environ.get(CACHE)
    if given:
        candidates = [Path(given).expanduser()]
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        candidates = [base / "fedmetanas", Path(tempfile.gettempdir()) / f"fedmetanas-{os.getuid()}"]
    problem: OSError | None = None
    for directory in candidates:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Code is loaded from here, so nobody else may be able to put some in.
            if directory.stat().st_uid == os.getuid() and os.access(directory, os.W_OK):
                return directory
            problem = PermissionError(f"{directory} is not this user's to write")
        except OSError as error:
            problem = error
    raise problem or OSError("there is no cache directory")


def _processor() -> str:
    """What tells processors of different abilities apart: a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock beside ``path``; it is released even if this process is killed."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(path: Path) -> None:
    """Compile to ``path``, which appears whole or not at all. Raises OSError with the compiler's first complaint."""
    chosen = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    compiler = next(filter(None, map(shutil.which, chosen)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler ({', '.join(chosen)}) is installed")
    complaint = ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, made = Path(folder) / "native.cpp", Path(folder) / "native.so"
        source.write_text(SOURCE)
        for machine in MACHINE_FLAGS:
            command = [compiler, *COMMON_FLAGS, *machine, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
            if done.returncode == 0:
                os.replace(made, path)
                return
            said = done.stderr.strip().splitlines()
            complaint = next((line for line in said if "error" in line), said[0] if said else "no message")
    raise OSError(f"{compiler} failed: {complaint}")


def _load(path: Path) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)  # damaged: the next start compiles anew
        raise
    signatures = {
        "fmn_plan": (pointer, [pointer]),
        "fmn_forget_plan": (None, [pointer]),
        "fmn_run": (pointer, [pointer, number, number, number, number]),
        "fmn_forward": (number, [pointer] * 7),
        "fmn_backward": (number, [pointer] * 4),
        "fmn_forget_run": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded
