"""Compile the C++ sources once per machine, keep the result, load it; and say why where that does not work."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedmetanas_core.space.native.cells import CELLS
from fedmetanas_core.space.native.kernels import KERNELS
from fedmetanas_core.space.native.layers import LAYERS
from fedmetanas_core.space.native.network import NETWORK
from fedmetanas_core.space.native.store import Store
from fedmetanas_core.space.native.structure import STRUCTURE

SWITCH = "FEDMETANAS_NATIVE"  # "0" switches the compiled code off
SOURCE = "\n".join((KERNELS, STRUCTURE, LAYERS, CELLS, NETWORK))
COMPILERS = ("c++", "g++", "clang++")
COMMON_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")
# The first set that the compiler takes; not every compiler knows the processor it runs on by that name.
MACHINE_FLAGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
COMPILE_TIMEOUT_S = 120.0
FAILURE_HOLDS_S = 600.0  # processes that start within this time of a failure do not each wait for another one

_library: ctypes.CDLL | None = None
_outcome: str | None = None  # what ``prepare`` has found out


def prepare(say: Callable[[str], None] | None = None) -> str:
    """Load the compiled code, compiling it first if need be (about 20 s, once); "" or why it cannot be used.

    Safe to call from several processes at once: one compiles, the others wait for it. ``say`` is called with a line
    before something is compiled.
    """
    global _outcome
    if _outcome is None:
        _outcome = _prepare(say)
    return _outcome


def _prepare(say: Callable[[str], None] | None) -> str:
    global _library
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    try:
        store = Store.open(_key())
        if not store.has_library():
            with store.alone():
                if not store.has_library():
                    _compile_into(store, say)
        _library = _load(store.library)
    except (OSError, RuntimeError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())[:300]
    return ""


def library() -> ctypes.CDLL | None:
    """The loaded code; None before ``prepare``, and where that failed."""
    return _library


def forget() -> None:
    """Go back to the state before ``prepare``."""
    global _library, _outcome
    _library = _outcome = None


def _key() -> str:
    """What the compiled code depends on: the sources, and the processor they are compiled for."""
    facts = "\0".join((SOURCE, *COMMON_FLAGS, platform.machine(), _processor()))
    return hashlib.sha256(facts.encode()).hexdigest()[:20]


def _processor() -> str:
    """What tells processors of different abilities apart: a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # Where the abilities are not listed, each machine has code of its own.
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.node())


def _compile_into(store: Store, say: Callable[[str], None] | None) -> None:
    """Compile, or raise OSError: with the compiler's first complaint, or with that of a few minutes ago."""
    recent = store.recent_failure(FAILURE_HOLDS_S)
    if recent:
        raise OSError(recent)
    compiler = _compiler()
    if say is not None:
        say("compiling the kernels, once for this machine (about 20 s) ...")
    try:
        with store.workshop() as folder:
            source, made = folder / "native.cpp", folder / "native.so"
            source.write_text(SOURCE)
            machine = next((flags for flags in MACHINE_FLAGS if _takes(compiler, flags, folder)), ())
            _run([*compiler, *COMMON_FLAGS, *machine, str(source), "-o", str(made)])
            store.put(made)
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"{compiler[0]} failed: {error}"
        store.note_failure(f"{reason} (tried at {time.strftime('%H:%M')}; to try again, remove {store.failure})")
        raise OSError(reason) from error


def _compiler() -> list[str]:
    """The words of $CXX, else the first compiler that is installed. Raises OSError if there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    for words in [given] if given else [[name] for name in COMPILERS]:
        found = shutil.which(words[0])
        if found is not None:
            return [found, *words[1:]]
    raise OSError(f"no C++ compiler ({given[0] if given else ', '.join(COMPILERS)}) is installed")


def _takes(compiler: Sequence[str], flags: Sequence[str], folder: Path) -> bool:
    """Whether the compiler knows these flags; asked with an empty program."""
    probe = folder / "probe.cpp"
    probe.touch()
    try:
        _run([*compiler, *flags, "-fsyntax-only", str(probe)])
    except OSError:
        return False
    return True


def _run(command: Sequence[str]) -> None:
    """Run to the end, or end it with all it started. Raises OSError with its first complaint, and on timeout."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"not done after {COMPILE_TIMEOUT_S:.0f} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        lines = said.strip().splitlines()
        raise OSError(next((line for line in lines if "error" in line), lines[0] if lines else "no message"))


def _load(path: Path) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    loaded = ctypes.CDLL(str(path))
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
