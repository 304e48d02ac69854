"""Prepares the process for speed. Import it before Paddle; it imports no Paddle itself.

On import, and only where the user has not chosen otherwise:

- ``MKL_DEBUG_CPU_TYPE=5`` on AMD processors: the MKL inside Paddle's wheels otherwise takes its
  slowest path there (2 to 3 times slower matrix products).
- glibc's ``malloc`` keeps freed memory: activations are tens of megabytes each, and a fresh page
  costs about as much as the arithmetic done on it. Resident memory then stays at its peak.
- Paddle's advice to install ccache is silenced: nothing is compiled here.

After Paddle's import, `set_threads` chooses the threads of a matrix product (Paddle's default is
one). `describe` says what was done. On a machine with an NVIDIA GPU only the warning is silenced.

Environment: ``RESMLP_RUNTIME=off`` leaves the process alone, ``RESMLP_MALLOC=off`` only the
allocator, ``RESMLP_THREADS`` or ``OMP_NUM_THREADS`` fixes the threads, and ``MKL_DEBUG_CPU_TYPE``
and ``MALLOC_*_`` keep the user's values. (``RESMLP_NUMBA`` is read by `resample`, ``RESMLP_ONEDNN``
by `onednn`.)
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import warnings
from functools import cache

# Before Paddle 2.6: recent NumPy loads it at first use, which then crashes; and it brings the
# system's zlib, in whose place Paddle's would else serve Pillow, which crashes on a PNG.
import numpy.random  # noqa: F401

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>
_KEEP_BYTES = 2**30  # larger blocks than any one activation go to mmap, and back to the system
_OFF = ("0", "off", "no", "false")
PARENT = os.getppid()  # as it was before the seconds of importing Paddle, in which it may end


def enabled(switch: str = "RESMLP_RUNTIME") -> bool:
    """Whether an environment switch is not ``off`` (or ``0``, ``no``, ``false``)."""
    return os.environ.get(switch, "on").lower() not in _OFF


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded and not hidden: told without asking Paddle."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return not hidden and (os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg"))


def is_amd() -> bool:
    """Whether the processor is AMD's."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return "AuthenticAMD" in file.read(4096)
    except OSError:
        return "AuthenticAMD" in platform.processor()  # Windows


@cache  # asked for every batch
def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32 (AVX512-BF16, AMX)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return not {"avx512_bf16", "amx_bf16"}.isdisjoint(file.read(8192).split())
    except OSError:
        return False


def physical_cores() -> int:
    """Cores this process may run on; two hardware threads of one core count once.

    A container's CPU quota (cgroup v2) counts too: OpenMP threads that wait for a core by
    spinning are slower than fewer threads.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.add(read_line(siblings) or str(cpu))
    quota = read_line("/sys/fs/cgroup/cpu.max").split()  # "max 100000" or "150000 100000"
    if len(quota) == 2 and quota[0].isdigit():
        return max(1, min(len(cores), int(quota[0]) // int(quota[1])))
    return len(cores)


def default_threads() -> int:
    """Threads for one process: the user's choice, else its share of this machine's cores."""
    chosen = os.environ.get("RESMLP_THREADS") or user_omp_threads
    if chosen and chosen.split(",")[0].isdigit():
        return max(1, int(chosen.split(",")[0]))
    ranks = os.environ.get("PADDLE_LOCAL_SIZE") or os.environ.get("PADDLE_TRAINERS_NUM") or "1"
    return max(1, physical_cores() // max(1, int(ranks) if ranks.isdigit() else 1))


def set_threads(n: int | None = None) -> int | None:
    """Sets the threads of Paddle's CPU matrix products. Call it after Paddle's import.

    Loader workers pass 1: their work is not matrix products. Ranks of a data-parallel run call it
    without ``n`` once their environment is known, and share the cores.

    Args:
        n: threads; None for `default_threads`.

    Returns:
        The number set, or None where nothing was: switched off, Paddle not imported, a GPU
        machine without an ``n``, or a Paddle without this (private) function.
    """
    global threads
    paddle = sys.modules.get("paddle")
    if not enabled() or paddle is None or (n is None and has_gpu()):
        return None
    n = default_threads() if n is None else max(1, n)
    setter = getattr(getattr(getattr(paddle, "base", None), "core", None), "set_num_threads", None)
    if setter is None:
        return None
    setter(n)
    if _omp_threads_are_paddles:
        os.environ.pop("OMP_NUM_THREADS", None)  # or child processes would take it for the user's
    threads = n
    return n


def describe() -> str:
    """One line that says how this process was prepared; the mains print it once."""
    parts = [] if threads is None else [f"{threads} CPU thread{'s' * (threads != 1)}"]
    return "process: " + ", ".join(parts + _notes)


def read_line(path: str) -> str:
    """The text of a file of the system, stripped; empty where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def keep_freed_memory() -> bool:
    """Tells glibc to reuse large freed blocks. False where there is no glibc, or it refuses."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  (musl has no such function)
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return False
    keep_at = 2 * _KEEP_BYTES - 1  # free memory at the end of the heap before any is given back
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES) and mallopt(_M_TRIM_THRESHOLD, keep_at))


def prepare() -> list[str]:
    """Does what can be done before Paddle's import; returns what `describe` shall say of it."""
    if not enabled():
        return ["left as it is (RESMLP_RUNTIME)"]
    warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)
    if has_gpu():
        return ["GPU machine, nothing else to prepare"]
    notes = []
    if is_amd():
        value = os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
        notes.append(f"MKL_DEBUG_CPU_TYPE={value} (AMD)")
    if any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ):
        notes.append("allocator as MALLOC_* says")
    elif not enabled("RESMLP_MALLOC"):
        notes.append("allocator as it is (RESMLP_MALLOC)")
    elif keep_freed_memory():
        notes.append("allocator keeps freed memory")
    if "paddle" in sys.modules:
        notes.append("but Paddle was imported first: import resmlp before it")
    return notes


# Paddle's import overwrites an unset OMP_NUM_THREADS with 1: what it is now is the user's choice.
user_omp_threads = None if "paddle" in sys.modules else os.environ.get("OMP_NUM_THREADS")
_omp_threads_are_paddles = "paddle" not in sys.modules and user_omp_threads is None
threads: int | None = None
_notes = prepare()
