"""Starts the processes of a run and watches over them: none outlives the others."""

from __future__ import annotations

import runtime  # noqa: F401  isort: skip

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable

import paddle.distributed as dist

from checkpoint import LAST
from config import get_config
from engine import run
from errors import ConfigError, UserError
from run_folder import choose_folder
from tools.plot_metrics import plot_metrics
from utils import PREEMPTED, Preempted, gpu_count

_GRACE = 5.0  # seconds between asking a process to end and ending it
_PREEMPTION_GRACE = 60.0  # seconds to save after SIGTERM


def run_here(config, on_step: Callable[[int], None] = lambda step: None, label: str = "") -> int:
    """Runs this process's part of a run; turns how it ends into an exit code and a line at most.

    Args:
        config: the frozen config.
        on_step: see `engine.run`.
        label: put before messages, e.g. the rank.

    Returns:
        0; 2 after a user's mistake; `utils.PREEMPTED` when it saved and stopped on request; 1
        after an unexpected error, whose traceback is shown.
    """
    try:
        result = run(config, get_config, on_step)
        if result["rank"] == 0 and not config.EVAL:
            plot_metrics([result["folder"]], result["folder"] / "curves.png")
        return 0
    except Preempted as stop:
        print(f"{label}{stop}; -resume auto goes on from there", file=sys.stderr, flush=True)
        return PREEMPTED
    except UserError as error:
        print(f"error: {label}{error}", file=sys.stderr, flush=True)
        return 2
    except Exception:
        text = "".join(f"{label}{line}\n" for line in traceback.format_exc().splitlines())
        print(text, end="", file=sys.stderr, flush=True)
        return 1


def launch(config) -> int:
    """Runs a config in as many processes as it asks for.

    One process runs right here. Under ``python -m paddle.distributed.launch`` this process is one
    rank of many already. Otherwise `DIST.NPROCS` processes are spawned, by default one a visible
    GPU.

    Returns:
        The exit code: 0, or that of the first process that failed.

    Raises:
        ConfigError: more processes than GPUs.
    """
    launched = int(os.environ.get("PADDLE_TRAINERS_NUM", 1)) > 1
    if launched:
        rank = os.environ.get("PADDLE_TRAINER_ID", "?")
        return run_here(config, label=f"[rank {rank}] ")
    gpus = gpu_count()
    count = config.DIST.NPROCS if config.DIST.NPROCS > 0 else max(gpus, 1)
    if gpus and count > gpus:
        raise ConfigError(f"DIST.NPROCS is {count}, but only {gpus} GPUs are visible")
    if count == 1:
        return run_here(config)
    return _spawn(config, count)


def _spawn(config, count: int) -> int:
    config = config.clone()
    config.defrost()
    config.SAVE = str(choose_folder(config))  # so that the message below can name it
    config.freeze()
    os.environ.setdefault("GLOG_minloglevel", "2")  # no progress notes of the key-value store
    warnings.filterwarnings("ignore", message=".*CPUONLY mode", category=UserWarning)
    steps = multiprocessing.get_context("spawn").Array("q", count, lock=False)
    context = dist.spawn(_worker, args=(config, steps), nprocs=count, join=False)
    workers = context.processes
    asked = []

    def forward(number, frame):
        asked.append(time.time())
        for worker in workers:
            if worker.is_alive():
                os.kill(worker.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    failed = _watch(workers, asked)
    if failed is None:
        return PREEMPTED if any(w.exitcode == PREEMPTED for w in workers) else 0
    code = workers[failed].exitcode
    if code == 2:  # the rank has said what was wrong
        return code
    how = (
        f"was killed by {signal.Signals(-code).name}"
        if code < 0
        else f"ended with exit code {code}"
    )
    print(
        f"error: rank {failed} {how} after step {steps[failed]}; the other ranks were stopped. "
        f"-resume auto goes on from the last checkpoint, {os.path.join(config.SAVE, LAST)}",
        file=sys.stderr,
        flush=True,
    )
    return code if code > 0 else 1


def _watch(workers: list, asked: list[float]) -> int | None:
    """Waits for all; ends all when one fails. Returns the rank that failed first, or None."""
    while True:
        multiprocessing.connection.wait([w.sentinel for w in workers if w.is_alive()], timeout=0.5)
        failed = [r for r, w in enumerate(workers) if w.exitcode not in (None, 0, PREEMPTED)]
        if failed:
            _end(workers)
            return failed[0]
        if not any(worker.is_alive() for worker in workers):
            return None
        stopped = any(worker.exitcode == PREEMPTED for worker in workers)
        if asked and (time.time() - asked[0] > _PREEMPTION_GRACE or stopped and _linger(workers)):
            _end(workers)
            return None


def _linger(workers: list) -> bool:
    """Gives the last ranks a moment to follow those that have stopped; whether any has not."""
    end = time.time() + _GRACE
    for worker in workers:
        worker.join(max(0.0, end - time.time()))
    return any(worker.is_alive() for worker in workers)


def _end(workers: list) -> None:
    """Ends what is still alive. A save under way loses nothing: it is renamed only when whole."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join()


def _follow_parent() -> None:
    """Ends this process when its parent is gone (killed, out of memory)."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _worker(config, steps) -> None:
    if sys.platform == "linux":  # Paddle leaves `spawn` behind: loader workers would get a copy of
        multiprocessing.set_start_method("fork", force=True)  # the data set each
    threading.Thread(target=_follow_parent, daemon=True).start()
    rank = dist.ParallelEnv().rank

    def on_step(step):
        steps[rank] = step

    code = run_here(config, on_step, f"[rank {rank}] ")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no atexit hook may wait for a rank that is gone
