"""What every process needs: its device and rank, sums over ranks, seeds, logging, signals."""

from __future__ import annotations

import runtime  # noqa: F401  isort: skip

import contextlib
import logging
import os
import random
import resource
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.distributed as dist

import rendezvous
from errors import UserError

PREEMPTED = 75  # exit code of a run that saved on SIGTERM or Ctrl-C and wants to be resumed
SIGNAL_GRACE = 1.0  # seconds within which signals count as one: a scheduler sends SIGTERM to every
# process of a job, and a terminal Ctrl-C, and the parent of the ranks passes on its own
_log = logging.getLogger("resmlp")


class Preempted(Exception):
    """The run was asked to stop, and has saved what it needs to go on."""


class TrainingError(UserError):
    """Training cannot go on: a loss or gradient is not finite. All ranks raise it together."""


# --------------------------------------------------------------------------------- processes
@dataclass(frozen=True)
class Process:
    """This process among the others of its job."""

    rank: int = 0
    world: int = 1
    on_gpu: bool = False

    @property
    def main(self) -> bool:
        return self.rank == 0


def gpu_count() -> int:
    """Visible GPUs that Paddle can use; 0 with a CPU build. (set_device would kill the process.)"""
    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


def prepare_process() -> Process:
    """Chooses the device, joins the other processes where a launcher started several, and opens
    the log. One process makes no collective calls at all.

    Raises:
        UserError: as `rendezvous.join`.
    """
    on_gpu = gpu_count() > 0
    world, warning = int(os.environ.get("PADDLE_TRAINERS_NUM", 1)), ""
    if world > 1:
        warning = rendezvous.join()
        process = Process(dist.get_rank(), dist.get_world_size(), on_gpu)
    else:
        paddle.set_device("gpu:0" if on_gpu else "cpu")
        process = Process(on_gpu=on_gpu)
    runtime.set_threads()
    _open_log(process)
    if warning:
        _log.warning(warning)
    _log.info(runtime.describe())
    if not on_gpu:
        _log.info("no GPU found: running on CPU")
    return process


def _open_log(process: Process) -> None:
    """Rank 0 talks to the terminal, the others only in warnings; each has a file of its own, see
    run_folder.py. Debug messages go to the files alone.
    """
    _log.setLevel(logging.DEBUG)
    _log.propagate = False
    for handler in list(_log.handlers):  # of an earlier run in this process
        handler.close()
        _log.removeHandler(handler)
    handler = logging.StreamHandler(sys.stdout)
    handler.setLevel(logging.INFO if process.main else logging.WARNING)
    label = "" if process.main else f"[rank {process.rank}] "
    handler.setFormatter(logging.Formatter(f"{label}%(message)s"))
    handler.handleError = lambda record: None  # a terminal that is gone: training goes on
    _log.addHandler(handler)


def sum_over_ranks(values: list[float], process: Process) -> list[float]:
    """Sums numbers over all ranks in float64: exact for counts up to 2**53."""
    if process.world == 1:
        return list(values)
    tensor = paddle.to_tensor(np.array(values, "float64"))
    dist.all_reduce(tensor)
    return tensor.numpy().tolist()


def from_main(value, process: Process):
    """Rank 0's value, on every rank."""
    if process.world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextlib.contextmanager
def main_first(process: Process):
    """Rank 0 runs the body for as long as it takes while the others wait for it.

    Yields whether this is rank 0.
    """
    if process.main:
        try:
            yield True
        finally:
            wait_for_all(process)
    else:
        yield False
        wait_for_all(process)


def wait_for_all(process: Process) -> None:
    """Returns when every rank has called it, however long that takes; see `rendezvous.meet`."""
    if process.world > 1:
        rendezvous.meet(process.rank, process.world)


# ------------------------------------------------------------------------------------ seeds
def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and Paddle, the same on every rank (weights are built from it)."""
    random.seed(seed)
    np.random.seed(seed)
    paddle.seed(seed)


def step_rng(seed: int, rank: int, epoch: int, step: int) -> np.random.Generator:
    """The randomness of one training step, a function of its arguments alone.

    Seeds Paddle's generators (dropout, drop path, erasing noise) and returns a NumPy generator
    (boxes, lambdas), so that a resumed run continues as if it had never stopped.
    """
    rng = np.random.default_rng((3, seed, rank, epoch, step))  # 3: samplers.py uses 1 and 2
    paddle.seed(int(rng.integers(2**31)))
    return rng


# ------------------------------------------------------------------------------------ device
class Normalize:
    """uint8 ``[B, H, W, 3]`` -> float32 ``[B, 3, H, W]``: ``(x / 255 - mean) / std``.

    Args:
        mean, std: a number per channel, for values from 0 to 1.
    """

    def __init__(self, mean: list[float], std: list[float]):
        mean, std = np.array(mean, "float64"), np.array(std, "float64")
        self.scale = paddle.to_tensor((1 / (255 * std)).astype("float32"))
        self.shift = paddle.to_tensor((-mean / std).astype("float32"))

    def __call__(self, images: paddle.Tensor) -> paddle.Tensor:
        x = images.astype("float32") * self.scale + self.shift
        # a transpose is a view, which each of its readers would copy again
        return x.transpose([0, 3, 1, 2]).contiguous()

    def undo(self, images: paddle.Tensor) -> np.ndarray:
        """Normalised images ``[B, 3, H, W]`` as uint8 ``[B, H, W, 3]``, to look at."""
        pixels = (images.transpose([0, 2, 3, 1]) - self.shift) / self.scale
        return pixels.round().clip(0, 255).numpy().astype(np.uint8)


def memory_mb(process: Process) -> float:
    """Peak memory of this process, MB: of the GPU where there is one, else resident."""
    if process.on_gpu:
        return paddle.device.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------- progress
class Meter:
    """Time, images and time spent waiting for data since the last report, of this process."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Starts a new interval."""
        self.images, self._start, self._waited = 0, time.time(), 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Counts the body as waiting for data."""
        start = time.time()
        yield
        self._waited += time.time() - start

    def read(self) -> tuple[float, float]:
        """Seconds of the interval, and the share of them spent waiting for data."""
        seconds = max(time.time() - self._start, 1e-9)
        return seconds, self._waited / seconds


class ProgressLine:
    """A progress bar that overwrites itself on a terminal, and is silent anywhere else.

    Args:
        label: what is going on.
        show: False on ranks other than 0.
    """

    def __init__(self, label: str, show: bool = True):
        self.label, self.show = label, show and sys.stdout.isatty()
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        if self.show and time.time() >= self._next:
            bar = "#" * (30 * done // max(total, 1))
            print(f"\r{self.label} [{bar:<30}] {done}/{total} ", end="", flush=True)
            self._next = time.time() + 0.2

    def end(self) -> None:
        """Clears the line."""
        if self.show:
            print("\r\033[K", end="", flush=True)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


# ----------------------------------------------------------------------------------- signals
class StopSignal:
    """Remembers SIGTERM or Ctrl-C until the training loop looks; a second one exits at once (after
    `SIGNAL_GRACE`).
    """

    def __init__(self):
        self.received = False
        self._first = 0.0
        self._pid = os.getpid()
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
            # Or a rank that waits for others would fail: Paddle does not repeat system calls.
            signal.siginterrupt(number, False)

    def close(self) -> None:
        """Gives the signals back to whom they belonged, when those that count as one are over."""
        if self.received:
            time.sleep(max(0.0, self._first + SIGNAL_GRACE - time.monotonic()))
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
