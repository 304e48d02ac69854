"""Prepares the process for speed. Import it before Paddle; it imports no Paddle itself.

On import, and only where the user has not chosen otherwise:

- ``MKL_DEBUG_CPU_TYPE=5`` on AMD processors, where the MKL inside Paddle's wheels otherwise takes
  its slowest path (2 to 3 times slower matrix products).
- glibc's ``malloc`` keeps freed memory, since a fresh page costs about as much as the arithmetic on
  it. Resident memory then stays at its peak.

Where Paddle uses a GPU, neither is done.

Environment: ``RESMLP_RUNTIME=off`` leaves the process alone, ``RESMLP_MALLOC=off`` the allocator;
``RESMLP_THREADS`` or ``OMP_NUM_THREADS`` fixes the threads; ``MKL_DEBUG_CPU_TYPE`` and
``MALLOC_*_`` keep the user's values.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import sys
import warnings
from functools import cache

# Before Paddle 2.6: recent NumPy loads it at first use, which then crashes; and it brings the
# system's zlib, in whose place Paddle's would else serve Pillow, which crashes on a PNG.
import numpy.random  # noqa: F401

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>
_KEEP_BYTES = 2**30  # larger blocks than any one activation go to mmap, and back to the system
PARENT = os.getppid()  # as it was before the seconds of importing Paddle, in which it may end


def enabled(switch: str = "RESMLP_RUNTIME") -> bool:
    """Whether an environment switch is not ``off`` (or ``0``, ``no``, ``false``)."""
    return os.environ.get(switch, "on").lower() not in ("0", "off", "no", "false")


def has_gpu() -> bool:
    """Whether Paddle will use an NVIDIA GPU, told without importing it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    driver = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")
    return driver and not hidden and is_cuda_build()


@cache
def is_cuda_build() -> bool:
    """Whether the installed Paddle is built for CUDA, by the file in which its wheel says so."""
    paddle = importlib.util.find_spec("paddle")
    folder = paddle.submodule_search_locations[0] if paddle else ""
    text = read_text(f"{folder}/version/__init__.py")
    return re.search(r"^cuda_version *= *'\d", text, re.MULTILINE) is not None


@cache  # asked for every batch
def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32 (AVX512-BF16, AMX)."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(read_text("/proc/cpuinfo").split())


def physical_cores() -> int:
    """Cores this process may run on, hardware threads of one core counted once, within a
    container's quota: OpenMP threads spinning for a core are slower than fewer threads.
    """
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {read_text(siblings.format(cpu)) or cpu for cpu in _allowed_cpus()}
    return max(1, int(min(len(cores), _quota())))


def usable_cores() -> int:
    """Hardware threads for this process: affinity and quota, shared among this machine's ranks."""
    return max(1, int(min(len(_allowed_cpus()), _quota())) // _local_ranks())


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))  # macOS, Windows


def _quota() -> float:
    lowest = float("inf")
    for line in read_text("/proc/self/cgroup").splitlines():  # "4:cpu,cpuacct:/a/b" or "0::/a/b"
        _, controllers, path = line.split(":", 2)
        root = "/sys/fs/cgroup" + ("/cpu" if controllers else "")
        folders = path.strip("/").split("/")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for depth in range(len(folders) + 1):  # a group has no more than those around it
            group = "/".join([root, *folders[:depth]])
            limit = read_text(f"{group}/cpu.max").split()  # "max 100000" or "150000 100000"
            if controllers:  # "-1" without a limit
                limit = [read_text(f"{group}/cpu.cfs_{name}_us") for name in ("quota", "period")]
            if len(limit) == 2 and all(number.isdigit() for number in limit):
                lowest = min(lowest, int(limit[0]) / int(limit[1]))
    return lowest


def _local_ranks() -> int:
    ranks = os.environ.get("PADDLE_LOCAL_SIZE") or os.environ.get("PADDLE_TRAINERS_NUM") or "1"
    return max(1, int(ranks) if ranks.isdigit() else 1)


def default_threads() -> int:
    """Threads for one process: the user's choice, else its share of this machine's cores."""
    chosen = os.environ.get("RESMLP_THREADS") or user_omp_threads
    if chosen and chosen.split(",")[0].isdigit():
        return max(1, int(chosen.split(",")[0]))
    return max(1, physical_cores() // _local_ranks())


def set_threads(n: int | None = None) -> None:
    """Sets the threads of Paddle's CPU matrix products (its default is one), after its import.

    Loader workers pass 1. Without ``n`` ranks share the cores, once their environment is known, and
    a GPU machine is left alone, as is all where this is switched off or without Paddle.
    """
    global threads
    paddle = sys.modules.get("paddle")
    if not enabled() or paddle is None or (n is None and has_gpu()):
        return
    threads = default_threads() if n is None else max(1, n)
    paddle.base.core.set_num_threads(threads)
    if _omp_threads_are_paddles:
        os.environ.pop("OMP_NUM_THREADS", None)  # or child processes would take it for the user's


def describe() -> str:
    """One line that says how this process was prepared."""
    parts = [] if threads is None else [f"{threads} CPU thread{'s' * (threads != 1)}"]
    return "process: " + ", ".join(parts + _notes)


def read_text(path: str) -> str:
    """The first 8 KB of a text file of the system, stripped; empty where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(8192).strip()
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
    if os.environ.get("PADDLE_TRAINER_ID") == "":
        del os.environ["PADDLE_TRAINER_ID"]  # Paddle's import would fail
    if not enabled():
        return ["left as it is (RESMLP_RUNTIME)"]
    warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)
    if has_gpu():
        return ["GPU machine, nothing else to prepare"]
    notes = []
    if "AuthenticAMD" in (read_text("/proc/cpuinfo") or platform.processor()):  # Windows
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
