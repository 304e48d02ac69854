"""Loading in worker processes: batches in order, and whatever goes wrong as one `DataError`.

The workers are Paddle's (`paddle.io.DataLoader`), which leaves some things open: it hides what a
worker raises, waits for ever for one that hangs, lets workers outlive a main process that is
killed, and leaves their batches in /dev/shm. What is done about each stands here.

Workers are started for each pass over the data (some 30 ms) and end with it, so there is one code
path and no idle worker holds memory.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import paddle

from cli.errors import DataError
from cpu import setup
from loading.samplers import EvalBatchSampler, TrainBatchSampler

_PREFETCH = 2  # batches that each worker prepares ahead (Paddle's default)
_DEATH_CHECK = 1  # seconds between looks at whether a worker still lives
_SAVING = 600  # seconds that a worker stays when it is told to end: longer than a slow batch takes
_GRACE = 5.0  # seconds for workers to finish the batch at hand when a pass ends
_SHM = "/dev/shm"  # where workers lay their batches
_NCCL_BYTES = 2**27  # that NCCL takes there for a rank: some 10 MB for each channel and neighbour
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>

VERIFY_HINT = "tools/make_lists.py -verify checks a whole data set"


class Batch(NamedTuple):
    """What a `Loader` yields."""

    images: paddle.Tensor  # uint8 [B, H, W, 3]
    labels: paddle.Tensor  # int64 [B]
    indices: list[int]  # of the images in the data set, see `ImageIndex.where`


class Sample(NamedTuple):
    """What a dataset makes of one key."""

    image: np.ndarray
    label: int
    index: int
    skipped: Sequence[tuple[int, str]] = ()  # (index, reason) of unreadable images it stands in for
    error: str = ""  # why there is no image after all


@dataclass(eq=False)
class Loader:
    """Iterates over batches; `len` is the batches of a pass, from where `set_epoch` has gone.

    Under ``DATA.BAD_IMAGE: skip``, training replaces an unreadable image by the next one; they are
    logged when the epoch ends, and `skipped` holds them meanwhile, by index.

    Args:
        dataset: ``dataset[key]`` is the `Sample` of a sampler's key.
        sampler: yields lists of keys.
        num_workers: processes that load; 0: load here, where a debugger sees it.
        timeout: seconds that workers may take to deliver a batch.
        skip_limit: raise when more than so many images of an epoch were skipped.
        shared_memory: pass batches through /dev/shm instead of pipes.
        log: takes one line of text.
    """

    dataset: Any
    sampler: TrainBatchSampler | EvalBatchSampler
    num_workers: int = 0
    timeout: float = 300.0
    skip_limit: int = 100
    shared_memory: bool = True
    log: Callable[[str], None] = print
    skipped: dict[int, str] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses the training epoch, and how many of its images are past, for the next pass."""
        self.sampler.set_epoch(epoch, start)

    def __iter__(self) -> Iterator[Batch]:
        """One pass over the data.

        Raises:
            DataError: an unreadable image (too many, if they may be skipped), a failing
                transform, a worker that died or delivered nothing for `timeout` seconds.
        """
        self.skipped = {}
        batches = self._from_workers() if self.num_workers else self._from_here()
        try:
            for images, labels, indices, skipped, error in batches:
                if error:
                    raise DataError(error)
                self._count(skipped)
                yield Batch(images, labels, indices)
        finally:
            batches.close()
        if self.skipped:
            self.log(f"skipped {len(self.skipped)} unreadable images in this epoch:")
        for _, reason in sorted(self.skipped.items()):
            self.log(f"  {reason}")

    def _count(self, skipped: list[tuple[int, str]]) -> None:
        self.skipped.update(skipped)
        if len(self.skipped) > self.skip_limit:
            raise DataError(
                f"more than {self.skip_limit} unreadable images in this epoch "
                f"(DATA.BAD_IMAGE_LIMIT), the last {skipped[-1][1]} ({VERIFY_HINT})"
            )

    def _from_here(self) -> Iterator[list]:
        for keys in self.sampler:
            images, labels, *rest = _collate([self.dataset[key] for key in keys])
            yield [paddle.to_tensor(images), paddle.to_tensor(labels), *rest]

    def _from_workers(self) -> Iterator[list]:
        warnings.filterwarnings("ignore", message=".*not supported on MacOs and Windows")
        loader = paddle.io.DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            collate_fn=_collate,
            num_workers=self.num_workers,
            use_shared_memory=self.shared_memory,
            prefetch_factor=_PREFETCH,
            timeout=_DEATH_CHECK,  # in spite of its name it limits nothing
            worker_init_fn=_start_worker,
        )
        problem = "" if loader.num_workers else "Paddle has no loader workers on this system"
        if threading.current_thread() is not threading.main_thread():  # they set signal handlers
            problem = "Paddle's loader workers need the main thread, and this is another"
        if problem:  # on macOS, Windows; in a Gradio page
            self.log(f"{problem}: images are loaded in turn")
            self.num_workers = 0
            yield from self._from_here()
            return
        iterator = _start(loader)
        try:
            for _ in range(len(self.sampler)):
                yield self._next(iterator)
        finally:
            _stop(iterator)

    def _next(self, iterator) -> list:
        """The next batch, or a `DataError` when a worker is dead or nothing comes in time."""
        expired = threading.Event()

        def give_up():
            expired.set()
            iterator._exit_thread_unexpectedly()  # wakes the main thread with a SystemError

        timer = threading.Timer(self.timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            return next(iterator)
        except StopIteration:
            raise DataError("the data loader ended before its last batch") from None
        except (SystemError, RuntimeError) as error:
            code = _first_exit_code(iterator._workers)
            for worker in iterator._workers:
                worker.kill()
            if code is not None:  # also where Paddle has not noticed it
                problem = f"a data loader worker died ({_describe_exit(code)})"
            elif expired.is_set():
                problem = (
                    f"the data loader delivered no batch for {self.timeout:g} s "
                    "(DATA.WORKER_TIMEOUT): slow or hanging storage?"
                )
            else:
                problem = f"the data loader failed: {error}"
            raise DataError(problem) from error
        finally:
            timer.cancel()


def _collate(samples: list[Sample]) -> list:
    """Stacks samples to ``[images, labels, indices, skipped, error]``."""
    failed = [sample for sample in samples if sample.error]
    samples = failed[:1] or samples
    return [
        np.stack([sample.image for sample in samples]),
        np.array([sample.label for sample in samples], np.int64),
        [sample.index for sample in samples],
        [entry for sample in samples for entry in sample.skipped],
        samples[0].error,
    ]


def _start(loader: paddle.io.DataLoader):
    """Starts the workers, without the signal handler that Paddle installs along with them.

    It makes the death of a worker raise SystemError in whatever line the main thread happens to
    be; without it the death is found when the next batch is asked for. Workers are forked,
    whatever method another library has chosen: they inherit the data set and what is set up here.
    """
    handler, method = signal.getsignal(signal.SIGCHLD), multiprocessing.get_start_method(True)
    multiprocessing.set_start_method("fork", force=True)
    try:
        return iter(loader)
    finally:
        multiprocessing.set_start_method(method, force=True)
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _stop(iterator) -> None:
    """Ends the workers of a pass that was finished, left early, or broken."""
    iterator._try_shutdown_all(timeout=0)
    deadline = time.monotonic() + _GRACE
    for worker in iterator._workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        worker.kill()
        worker.join()
        _remove_batches(worker.pid)


def _first_exit_code(workers: list) -> int | None:
    """The exit code of a worker that is dead or dying; None where all live on."""
    ending = wait([worker.sentinel for worker in workers], _DEATH_CHECK)
    for worker in workers:
        if worker.sentinel in ending:
            worker.join()
            return worker.exitcode
    return None


def _start_worker(worker_id: int) -> None:
    """Prepares a worker: it lives and dies with the main process, and with nothing else.

    It stays through the Ctrl-C or SIGTERM that a terminal or a scheduler sends to every process,
    so that the main process can go on to its next step and save; that ends it then. If the main
    process is killed, Linux sends the worker SIGUSR2; it would wait for ever else.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup SIGHUP means nothing
            signal.signal(number, lambda signum, frame: signal.alarm(_SAVING))
    # A thread waits for these: a handler would not run while the main one sleeps in a read.
    ends = (signal.SIGALRM, signal.SIGUSR2)
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    threading.Thread(target=lambda: _leave(signal.sigwait(ends)), daemon=True).start()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR2)
    if os.getppid() != multiprocessing.parent_process().pid:  # killed before that line
        os._exit(1)
    setup.set_threads(1)


def _leave(signum) -> None:
    _remove_batches(os.getpid())
    os._exit(128 + signum)


def _remove_batches(pid: int) -> None:
    """Removes what a worker has laid into shared memory and nobody will fetch any more."""
    for path in glob(f"{_SHM}/paddle_{pid}_*"):
        with suppress(OSError):
            os.remove(path)


def shared_memory_fits(workers: int, batch_bytes: int, world: int, log) -> bool:
    """Says whether the batches under way fit into /dev/shm, which containers often keep small.

    A worker that finds it full dies of a bus error in the middle of a batch.
    """
    if not workers or sys.platform != "linux":  # elsewhere Paddle loads in the main process
        return True
    ranks_here = int(os.environ.get("PADDLE_LOCAL_SIZE") or world)
    needed = ranks_here * (workers * _PREFETCH + 3) * batch_bytes  # 3: being read, copied, used
    if ranks_here > 1 and paddle.get_device().startswith("gpu"):
        needed += ranks_here * _NCCL_BYTES
    try:
        free = shutil.disk_usage(_SHM).free
    except OSError:
        free = 0
    if needed <= free:
        return True
    log(
        f"{_SHM} has {free / 2**20:,.0f} MiB free and the loader wants {needed / 2**20:,.0f} MiB: "
        "batches go through pipes instead, which is slower (docker run --shm-size enlarges it)"
    )
    return False


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hint = {"SIGKILL": ", out of memory?", "SIGBUS": f", {_SHM} full?"}.get(name, "")
    return f"{name}{hint}"
