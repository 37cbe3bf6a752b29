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
COMPILE_TIMEOUT_S = 600.0  # twenty seconds on a machine of today; small or loaded ones are slower
FAILURE_HOLDS_S = 600.0  # processes that start within this time of a failure do not each wait for another one

_library: ctypes.CDLL | None = None
_outcome: str | None = None  # what ``prepare`` has found out


def prepare(say: Callable[[str], None] | None = None, device: str = "cpu") -> str:
    """Load the compiled code, compiling it first if need be (about 20 s, once); "" or why it cannot be used.

    Safe to call from several processes at once: one compiles, the others wait for it. ``say`` is called with a line
    before something is compiled, and once with the reason why the search will be slow. There is compiled code for
    ``device`` cpu only.
    """
    global _outcome
    if device != "cpu":
        return f"there is none for {device}"
    if _outcome is None:
        _outcome = _prepare(say)
        if _outcome and say is not None:
            say(f"note: without compiled kernels, several times as slow: {_outcome}")
    return _outcome


def _prepare(say: Callable[[str], None] | None) -> str:
    global _library
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    try:
        store = Store.open(_key())
        try:
            _library = _load(store.library) if store.has_library() else None
        except (OSError, AttributeError):
            _library = None  # whole, but made on a machine that is not quite like this one
        if _library is None:
            _library = _make(store, say)
    except (OSError, RuntimeError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())[:300]
    return ""


def _make(store: Store, say: Callable[[str], None] | None) -> ctypes.CDLL:
    """Compile and load, unless another process has done so while this one waited for its turn."""
    before = store.made_at()
    with store.alone():
        if not store.has_library() or store.made_at() == before:
            _compile_into(store, say)
    return _load(store.library)


def library() -> ctypes.CDLL | None:
    """The loaded code; None before ``prepare``, and where that failed."""
    return _library


def forget() -> None:
    """Go back to the state before ``prepare``."""
    global _library, _outcome
    _library = _outcome = None


def _key() -> str:
    """What the compiled code depends on: the sources, and the processor and C library they are compiled for."""
    facts = "\0".join((SOURCE, *COMMON_FLAGS, platform.machine(), _processor(), *platform.libc_ver()))
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
    compiler = _compiler()
    recent = store.recent_failure(shlex.join(compiler), FAILURE_HOLDS_S)
    if recent:
        raise OSError(recent)
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
        note = f"{reason} (tried at {time.strftime('%H:%M')}; to try again, remove {store.failure})"
        store.note_failure(shlex.join(compiler), note)
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
