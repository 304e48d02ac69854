"""A process among the others of its job: device and rank, what others have, log, signals."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import paddle
import paddle.distributed as dist

from cli.errors import UserError
from cli.progress import line_start
from cpu import setup
from parallel.rendezvous import join, wait_for_all

PREEMPTED = 75  # exit code of a run that saved on SIGTERM or Ctrl-C and wants to be resumed
SIGNAL_GRACE = 1.0  # seconds within which signals count as one: a scheduler sends SIGTERM to every
# process of a job, and a terminal Ctrl-C, and the parent of the ranks passes on its own
_log = logging.getLogger("resmlp")


class Preempted(Exception):
    """The run was asked to stop, and has saved what it needs to go on."""


@dataclass(frozen=True)
class Process:
    rank: int = 0
    world: int = 1
    on_gpu: bool = False

    @property
    def main(self) -> bool:
        return self.rank == 0


def gpu_count() -> int:
    """Visible GPUs that Paddle can use; 0 with a CPU build. (set_device would kill the process.)"""
    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


def launched_ranks() -> int:
    """How many ranks a launcher started; 0: none. UserError if its variables are incomplete."""
    rank, ranks = (os.environ.get(f"PADDLE_{name}") for name in ("TRAINER_ID", "TRAINERS_NUM"))
    if rank is None and ranks in (None, "1"):
        return 0
    needed = ["PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM"]
    if ranks and ranks != "1":
        needed += ["PADDLE_CURRENT_ENDPOINT", "PADDLE_TRAINER_ENDPOINTS"]
        needed += ["FLAGS_selected_gpus"] if gpu_count() else []
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UserError(
            f"the environment is a launcher's in part: {' and '.join(missing)} missing; start with "
            f"python -m paddle.distributed.launch, or unset all PADDLE_* variables"
        )
    if not (rank.isdigit() and ranks.isdigit() and int(rank) < int(ranks)):
        raise UserError(f"PADDLE_TRAINER_ID={rank} is no rank of PADDLE_TRAINERS_NUM={ranks}")
    return int(ranks)


def prepare_process() -> Process:
    """Chooses the device, joins the ranks that a launcher started, opens the log. One process makes
    no collective calls. Raises UserError as `launched_ranks` and `join`.
    """
    world = max(launched_ranks(), 1)
    rank = int(os.environ["PADDLE_TRAINER_ID"]) if world > 1 else 0
    process = Process(rank, world, gpu_count() > 0)
    _open_log(process)
    if world > 1:
        join(rank)
    else:
        paddle.set_device("gpu" if process.on_gpu else "cpu")  # "gpu": the launcher's --devices
    setup.set_threads()
    _log.info(setup.describe())
    if not process.on_gpu:
        _log.info("no GPU found: running on CPU")
    return process


def _open_log(process: Process) -> None:
    """Rank 0 logs to the terminal, others only warnings; each to a file (storage/run_folder.py)."""
    _log.setLevel(logging.DEBUG)
    _log.propagate = False
    for handler in list(_log.handlers):  # of an earlier run in this process
        handler.close()
        _log.removeHandler(handler)
    handler = logging.StreamHandler(sys.stdout)
    handler.setLevel(logging.INFO if process.main else logging.WARNING)
    label = line_start(sys.stdout) + ("" if process.main else f"[rank {process.rank}] ")
    handler.setFormatter(logging.Formatter(f"{label}%(message)s"))
    handler.handleError = lambda record: None  # a terminal that is gone: training goes on
    _log.addHandler(handler)


def from_all(value, process: Process) -> list:
    """The values of all ranks, by rank, on every rank."""
    values: list = []
    if process.world == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


def from_main(value, process: Process):
    """Rank 0's value, on every rank."""
    return from_all(value, process)[0]


@contextlib.contextmanager
def main_first(process: Process):
    """Rank 0 runs the body while the others wait for it; yields whether this is rank 0."""
    try:
        yield process.main
    finally:
        wait_for_all(process)


def stop_signals() -> list[int]:
    """What asks a run to save and stop: SIGTERM, Ctrl-C, SLURM's warning (SIGUSR1), a closed
    terminal (SIGHUP) unless `nohup` ignores it.
    """
    names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # Windows has the first two
    found = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [n for n in found if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


class StopSignal:
    """Remembers one of `stop_signals` until the training loop looks; a second exits at once (after
    `SIGNAL_GRACE`). In a thread it remembers nothing: signals belong to the main thread.
    """

    def __init__(self):
        self.received = False
        self._first, self._pid, self._before = 0.0, os.getpid(), {}
        here = threading.current_thread() is threading.main_thread()
        for number in stop_signals() if here else ():
            self._before[number] = signal.signal(number, self._handle)
            # Or a rank that waits for others would fail: Paddle does not repeat system calls.
            if hasattr(signal, "siginterrupt"):  # not on Windows
                signal.siginterrupt(number, False)

    def close(self, ends: bool = False) -> None:
        """Gives the signals back to whom they belonged, when those that count as one are over.

        ``ends``: the process is about to end, as a rank's is; none disturbs it any more.
        """
        if self.received and self._before and not ends:
            time.sleep(max(0.0, self._first + SIGNAL_GRACE - time.monotonic()))
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if ends else handler)

    def _handle(self, number, frame):
        if os.getpid() != self._pid:  # a forked loader worker: not its business
            return
        if self.received:
            if time.monotonic() - self._first > SIGNAL_GRACE:
                os._exit(128 + number)
            return
        self.received, self._first = True, time.monotonic()
        with contextlib.suppress(OSError):  # of `2>&1 | tee`: Ctrl-C has ended that too
            os.write(2, b"stopping: saving at the next step (a second signal exits at once)\n")
