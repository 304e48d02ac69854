"""Starts the processes of a run and watches over them: none outlives the others."""

from __future__ import annotations

from cpu import setup  # isort: skip

import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

import paddle.distributed as dist

from cli.errors import ConfigError, UserError
from cli.progress import line_start
from engine import run
from parallel.process import (
    PREEMPTED,
    SIGNAL_GRACE,
    Preempted,
    gpu_count,
    launched_ranks,
    stop_signals,
)
from storage.checkpoints import LAST, is_writing
from storage.files import write_atomically
from storage.run_folder import choose_folder
from training.pictures import render
from training.plots import draw_curves, read_metrics

GRACE = 5.0  # seconds for the other ranks to follow one that has stopped on request
FAILURE_GRACE = 1.0  # seconds for other ranks to say that they failed too
_SAVING_GRACE = 60.0  # seconds for a checkpoint that is being written when a rank fails
_PREEMPTION_GRACE = 600.0  # seconds to save after SIGTERM; a second signal ends the run at once
_TEXT_LIMIT = 8000  # characters of a rank's final message: fits a pipe's buffer, so it never blocks
_OUT_OF_MEMORY = (
    "out of memory; lower -batch_size (and raise -accum_iter as much), or set TRAIN.RECOMPUTE True "
    "or -amp; evaluation: lower -batch_size_eval"
)
_MEMORY_ERRORS = re.compile(  # in the words of Paddle's allocator, CUDA, cuBLAS, cuDNN and NCCL
    r"ResourceExhausted|out of memory|ALLOC\w*_FAILED|Failed to CUDA \w*alloc"
    r"|CUDA error\(2\)|CUBLAS error\(3\)|CUDNN error\(2\)",
    re.IGNORECASE,
)
_NO_PROCESSES = (
    "the system starts no more processes or threads; lower -nprocs or DATA.NUM_WORKERS, or raise "
    "its limit (ulimit -u, the pids of a container)"
)
_kept: list = []  # what C++ calls must not be collected
_log = logging.getLogger("resmlp")


def run_here(config) -> int:
    """Runs this process's part of a run; shows how it ends, unless all went well.

    Returns 0; 2 after a user's mistake; `PREEMPTED` when it saved and stopped on request; 1 after
    an unexpected error, with its traceback.
    """
    code, text = _run(config)
    return _print_ending(text, code)


def _run(config, on_step: Callable[[int], None] = lambda step: None, folder: str | None = None):
    try:
        result = run(config, on_step, folder)
        if result["rank"] == 0 and not config.EVAL:
            _plot(result["folder"])
        return 0, ""
    except Exception as error:
        code, text = _ending_of(error)
    _log.debug(text)  # to the rank's own log; the terminal is the caller's
    return code, text


def _ending_of(error: Exception) -> tuple[int, str]:
    """Exit code and text of a run that an exception, the one at hand, has ended."""
    text = str(error)
    if isinstance(error, Preempted):
        return PREEMPTED, f"{text}; -resume auto goes on from there"
    if isinstance(error, UserError):
        return 2, f"error: {text}"
    if isinstance(error, ConnectionError):  # of a rank that is gone
        return 1, f"error: {text}"
    if isinstance(error, MemoryError) or _MEMORY_ERRORS.search(text):
        return 2, f"error: {_OUT_OF_MEMORY}"
    if isinstance(error, BlockingIOError) or "can't start new thread" in text:
        return 2, f"error: {_NO_PROCESSES}"
    text = text.rpartition("Error Message Summary:")[2].strip("-\n ")  # Paddle's form
    summary = f"{type(error).__name__}: {' '.join(text.split())[:300]}"
    return 1, f"{traceback.format_exc()}error: {summary}"


def _plot(folder) -> None:
    """Draws the curves of a run that is done; a signal has nothing left to stop."""
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        write_atomically(render(draw_curves([read_metrics(folder)])), folder / "curves.png")
    except UserError as error:  # a full disk, say: the run itself is well
        _log.warning(str(error))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(config) -> int:
    """Runs a config in as many processes as it asks for.

    One runs right here; under ``python -m paddle.distributed.launch`` this process is one rank of
    many already. Otherwise `DIST.NPROCS` processes are spawned, by default one a visible GPU.

    Returns 0 or the exit code of the first process that failed. Raises UserError for more processes
    than GPUs or than the system starts, and where a launcher's variables are incomplete.
    """
    if launched_ranks():
        return run_launched(config)
    gpus = gpu_count()
    count = config.DIST.NPROCS if config.DIST.NPROCS > 0 else max(gpus, 1)
    if gpus and count > gpus:
        raise ConfigError(f"DIST.NPROCS is {count}, but only {gpus} GPUs are visible")
    return run_here(config) if count == 1 else _spawn(config, count)


def _spawn(config, count: int) -> int:
    folder, begin = str(choose_folder(config)), time.time()
    os.environ.setdefault("GLOG_minloglevel", "2")  # no progress notes of the key-value store
    warnings.filterwarnings("ignore", message=".*CPUONLY mode", category=UserWarning)
    spawning = multiprocessing.get_context("spawn")
    steps = spawning.Array("q", count, lock=False)
    readers, writers = zip(*(spawning.Pipe(duplex=False) for _ in range(count)))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())  # for Python's bookkeeper of
        resource_tracker.ensure_running()  # semaphores, which knows only two of them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is passed on
        arguments = config, folder, steps, writers
        context = dist.spawn(_worker, arguments, nprocs=count, join=False)
    except OSError as error:
        end_ranks(multiprocessing.active_children())
        raise UserError(f"{_NO_PROCESSES} ({error.strerror})") from None
    workers, signals = context.processes, []

    def forward(number, frame):
        signals.append(time.monotonic())
        for worker in workers:
            if worker.is_alive():
                worker.terminate()

    for number in stop_signals():
        signal.signal(number, forward)
    endings = watch_ranks(workers, readers, signals, lambda: is_writing(folder, since=begin))
    end_ranks(workers)
    return report_endings(endings, list(steps), os.path.join(folder, LAST), bool(signals))


def watch_ranks(
    workers: list,
    readers: tuple,
    signals: list[float],
    saving: Callable[[], bool] = lambda: False,
) -> dict[int, tuple[int, str]]:
    """Waits until every rank has ended, or one has failed and the others had time to say why.

    ``readers`` are pipes from the ranks, with exit codes and texts; ``signals`` the times of those
    passed on; ``saving``: rank 0 has a checkpoint to finish. Returns code and text of the ranks
    that have ended; a killed one has no text.
    """
    endings: dict[int, tuple[int, str]] = {}
    deadline = float("inf")
    while len(endings) < len(workers):
        late = time.monotonic() - deadline
        if late > 0 and (0 in endings or late > _SAVING_GRACE or not saving()):
            break
        going = [rank for rank in range(len(workers)) if rank not in endings]
        wait([x for rank in going for x in (readers[rank], workers[rank].sentinel)], timeout=0.2)
        now = time.monotonic()
        for rank in going:
            if readers[rank].poll():
                endings[rank] = readers[rank].recv()
            elif workers[rank].exitcode is not None:
                endings[rank] = workers[rank].exitcode, ""
        codes = {code for code, _ in endings.values()}
        if len(signals) > 1 and signals[-1] - signals[0] > SIGNAL_GRACE:
            deadline, saving = min(deadline, now + FAILURE_GRACE), lambda: False
        if codes - {0, PREEMPTED}:
            deadline = min(deadline, now + FAILURE_GRACE)
        if PREEMPTED in codes:
            deadline = min(deadline, now + GRACE)
        if signals:
            deadline = min(deadline, signals[0] + _PREEMPTION_GRACE)
    return endings


def end_ranks(workers: list) -> None:
    """Ends what is still alive. A save under way loses nothing: it is renamed only when whole."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def report_endings(endings: dict, steps: list[int], last: str, stop_requested: bool) -> int:
    """Says in one line how the ranks ended, unless all went well; returns the exit code."""
    failed = {rank: end for rank, end in endings.items() if end[0] not in (0, PREEMPTED)}
    preempted = [text for code, text in endings.values() if code == PREEMPTED]
    if stop_requested and not preempted and not any(steps):
        return _print_ending("stopped; there was nothing to save yet", 128 + signal.SIGTERM)
    if not failed:
        return _print_ending(preempted[0], PREEMPTED) if preempted else 0

    # One rank's failure breaks the others' connections (SIGABRT in Paddle): name the cause.
    order = {-signal.SIGABRT: 3, 1: 2, 2: 1}
    rank = min(failed, key=lambda rank: order.get(failed[rank][0], 0))
    code, text = failed[rank]
    if code == 1:
        trace, _, text = text.rpartition("error: ")
        _print_ending("\n".join(f"[rank {rank}] {line}" for line in trace.splitlines()), code)
    elif code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        text = text or f"it was killed by {signal.Signals(-code).name}{hint}"
    reason = text.removeprefix("error: ") or f"it ended with exit code {code}"
    alike = len(failed) == len(steps) and len(set(failed.values())) == 1
    if code == 2 and (alike or reason.startswith("rank ")):  # it says where itself
        return _print_ending(f"error: {reason}", code)
    saved = f"-resume auto goes on from {last}" if os.path.exists(last) else "nothing was saved yet"
    text = f"error: rank {rank}, after step {steps[rank]}: {reason}; {saved}"
    return _print_ending(text, max(code, 1))


def _print_ending(text: str, code: int) -> int:
    with suppress(OSError):  # of `2>&1 | tee`: Ctrl-C has ended that too
        if text:
            print(f"{line_start(sys.stderr)}{text}", file=sys.stderr, flush=True)
    return code


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def run_launched(config) -> int:
    """Runs one rank that Paddle's launcher has started.

    Its last words go to its output: the terminal for a node's first rank, else a file in the
    launcher's log folder. Of a rank that is killed the launcher tells.
    """
    end = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731  (saves, then exits)
    threading.Thread(target=_follow_parent, args=(setup.PARENT, end), daemon=True).start()
    steps = deque([0], maxlen=1)

    def explain():
        text = (
            f"error: rank {dist.get_rank()}, after step {steps[0]}: another rank cannot be reached"
        )
        _log.debug(text)
        _print_ending(f"{text}: see its log, or its node; -resume auto goes on", 1)

    _before_abort(explain)
    code, text = _run(config, steps.append)
    _print_ending(text, code)
    _flush()
    os._exit(code)  # no atexit hook may wait for a rank that is gone


def _before_abort(explain: Callable[[], None]) -> None:
    """Calls ``explain`` before C++ aborts, as where gloo loses a rank in backward."""
    handler, rank_pid = ctypes.CFUNCTYPE(None), os.getpid()
    with suppress(OSError, AttributeError):  # another C++ library
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE  # std::set_terminate
        set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

        def terminate():
            if os.getpid() == rank_pid:  # a loader worker is no rank
                explain()
            before()

        _kept.append(handler(terminate))
        before = handler(set_terminate(_kept[-1]))


def _follow_parent(parent: int, end: Callable[[], None]) -> None:
    """Calls ``end`` when the parent process is gone (killed, out of memory)."""
    while os.getppid() == parent:
        time.sleep(0.5)
    end()


def _worker(config, folder: str, steps, writers) -> None:
    if sys.platform == "linux":  # Paddle leaves `spawn` behind: loader workers would get a copy of
        multiprocessing.set_start_method("fork", force=True)  # the data set each
    end = lambda: os._exit(1)  # noqa: E731
    parent = multiprocessing.parent_process().pid  # it may be gone already
    threading.Thread(target=_follow_parent, args=(parent, end), daemon=True).start()
    rank = dist.ParallelEnv().rank
    code, text = _run(config, partial(steps.__setitem__, rank), folder)
    _flush()
    writers[rank].send((code, text[-_TEXT_LIMIT:]))
    if code not in (0, PREEMPTED):
        threading.Event().wait()  # to be ended: closed connections would make the others fail too
    os._exit(code)  # no atexit hook may wait for a rank that is gone
