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
_log = logging.getLogger("resmlp")


def launch(config, processes: int) -> int:
    """Runs a config in so many processes (0: one a visible GPU, or one on CPU), or as a rank that
    Paddle's launcher has started.

    Returns 0, or the exit code of the first process that failed: 2 after a user's mistake,
    `PREEMPTED` when it saved and stopped on request, 1 after an unexpected error. Raises UserError
    for more processes than GPUs or than the system starts, and as `launched_ranks`.
    """
    if launched_ranks():
        return run_launched(config)
    gpus = gpu_count()
    count = processes if processes > 0 else max(gpus, 1)
    if gpus and count > gpus:
        raise ConfigError(f"DIST.NPROCS is {count}, but only {gpus} GPUs are visible")
    return _say(*_run(config)) if count == 1 else _spawn(config, count)


def _run(config, *arguments) -> tuple[int, str]:
    """Runs this process's part of a run; its exit code, and what to say unless all went well."""
    try:
        result = run(config, *arguments)
        if result.rank == 0 and not config.EVAL:
            _plot(result.folder)
        return 0, ""
    except Exception as error:
        code, text = 2, str(error)
        if isinstance(error, Preempted):
            code, text = PREEMPTED, f"{text}; -resume auto goes on from there"
        elif isinstance(error, (UserError, ConnectionError)):  # the latter: of a rank that is gone
            code, text = 2 if isinstance(error, UserError) else 1, f"error: {text}"
        elif isinstance(error, MemoryError) or _MEMORY_ERRORS.search(text):
            text = f"error: {_OUT_OF_MEMORY}"
        elif isinstance(error, BlockingIOError) or "can't start new thread" in text:
            text = f"error: {_NO_PROCESSES}"
        else:
            text = text.rpartition("Error Message Summary:")[2].strip("-\n ")  # Paddle's form
            summary = f"{type(error).__name__}: {' '.join(text.split())[:300]}"
            code, text = 1, f"{traceback.format_exc()}error: {summary}"
    _log.debug(text)  # to the rank's own log; the terminal is the caller's
    return code, text


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
            worker.terminate()

    for number in stop_signals():
        signal.signal(number, forward)
    endings = watch_ranks(workers, readers, signals, lambda: is_writing(folder, since=begin))
    end_ranks(workers)
    return report_endings(endings, list(steps), os.path.join(folder, LAST), bool(signals))


def watch_ranks(workers: list, readers: tuple, signals: list[float], saving: Callable[[], bool]):
    """Waits until every rank has ended, or one has failed and the others had time to say why.

    ``signals`` are the times of those passed on; ``saving``: rank 0 has a checkpoint to finish.
    Returns ``{rank: (code, text)}`` of the ranks that have ended; a killed one has no text.
    """
    endings: dict[int, tuple[int, str]] = {}
    deadline = float("inf")
    while len(endings) < len(workers):
        in_haste = len(signals) > 1 and signals[-1] - signals[0] > SIGNAL_GRACE
        late = time.monotonic() - deadline
        if late > 0 and (in_haste or 0 in endings or late > _SAVING_GRACE or not saving()):
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
        if in_haste or codes - {0, PREEMPTED}:
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
    preempted = [end for end in endings.values() if end[0] == PREEMPTED]
    if stop_requested and not preempted and not any(steps):
        return _say(128 + signal.SIGTERM, "stopped; there was nothing to save yet")
    if not failed:
        return _say(*preempted[0]) if preempted else 0

    # One rank's failure breaks the others' connections (SIGABRT in Paddle): name the cause.
    order = {-signal.SIGABRT: 3, 1: 2, 2: 1}
    rank, (code, text) = min(failed.items(), key=lambda item: order.get(item[1][0], 0))
    if code == 1:
        trace, _, text = text.rpartition("error: ")
        _say(code, "\n".join(f"[rank {rank}] {line}" for line in trace.splitlines()))
    elif code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        text = f"it was killed by {signal.Signals(-code).name}{hint}"
    reason = text.removeprefix("error: ") or f"it ended with exit code {code}"
    alike = len(failed) == len(steps) and len(set(failed.values())) == 1
    if code == 2 and (alike or reason.startswith("rank ")):  # it says where itself
        return _say(code, f"error: {reason}")
    saved = f"-resume auto goes on from {last}" if os.path.exists(last) else "nothing was saved yet"
    return _say(max(code, 1), f"error: rank {rank}, after step {steps[rank]}: {reason}; {saved}")


def _say(code: int, text: str) -> int:
    with suppress(OSError):  # of `2>&1 | tee`: Ctrl-C has ended that too
        if text:
            print(f"{line_start(sys.stderr)}{text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    return code


def run_launched(config) -> None:
    """Runs one rank that Paddle's launcher has started, and exits. Its final message goes to its
    output; of a rank that is killed the launcher tells.
    """
    this_process, steps = os.getpid(), [0]
    _follow(setup.PARENT, partial(os.kill, this_process, signal.SIGTERM))  # saves, then exits

    def explain():  # C++ is about to abort, as where gloo loses a rank in backward
        if os.getpid() == this_process:  # a loader worker is no rank
            where = f"rank {dist.get_rank()}, after step {steps[0]}"
            text = f"error: {where}: another rank cannot be reached"
            _log.debug(text)
            _say(1, f"{text}: see its log, or its node; -resume auto goes on")
        before()

    with suppress(OSError, AttributeError):  # another C++ library
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE  # std::set_terminate
        set_terminate.restype = handler = ctypes.CFUNCTYPE(None)
        kept = handler(explain)  # what C++ calls must not be collected
        before = set_terminate(kept)
    ending = _run(config, partial(steps.__setitem__, 0))
    os._exit(_say(*ending))  # no atexit hook may wait for a rank that is gone


def _follow(parent: int, end: Callable[[], None]) -> None:
    """Calls ``end``, in a thread, when the parent process is gone (killed, out of memory)."""

    def follow():
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    threading.Thread(target=follow, daemon=True).start()


def _worker(config, folder: str, steps, writers) -> None:
    if sys.platform == "linux":  # Paddle leaves `spawn` behind: loader workers would get a copy of
        multiprocessing.set_start_method("fork", force=True)  # the data set each
    _follow(multiprocessing.parent_process().pid, partial(os._exit, 1))  # it may be gone already
    rank = dist.ParallelEnv().rank
    code, text = _run(config, partial(steps.__setitem__, rank), folder)
    _say(code, "")
    writers[rank].send((code, text[-_TEXT_LIMIT:]))
    if code not in (0, PREEMPTED):
        threading.Event().wait()  # to be ended: closed connections would make the others fail too
    os._exit(code)  # no atexit hook may wait for a rank that is gone
