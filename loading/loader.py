"""Loading in worker processes: batches in order, and whatever goes wrong as one `DataError`.

The workers are Paddle's, whose reader copies a batch to a GPU while the one before is computed. It
hides what they raise, waits for ever for one that hangs, and leaves them and their batches behind.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
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
    """What a dataset makes of one key. Paddle hides what a worker raises: errors are values."""

    image: np.ndarray | None  # None: left out, or there is an error
    label: int
    index: int
    skipped: Sequence[tuple[int, str]] = ()  # (index, reason) of unreadable images
    error: str = ""


@dataclass(eq=False)
class Loader:
    """Iterates over batches; `len` is those of a pass, from where the sampler's `set_epoch` went.

    Unreadable images that ``DATA.BAD_IMAGE: skip`` replaces (in training) or leaves out are logged
    when the pass ends.
    """

    dataset: Any  # dataset[key] is the `Sample` of a sampler's key
    sampler: TrainBatchSampler | EvalBatchSampler
    num_workers: int = 0  # 0: load here, where a debugger sees it
    timeout: float = 300.0  # seconds that workers may take to deliver a batch
    skip_limit: int = 100  # images of a pass
    shared_memory: bool = True  # pass batches through /dev/shm instead of pipes
    log: Callable[[str], None] = print

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """One pass over the data.

        DataError if an image is unreadable (too many, if they may be skipped), or a worker died,
        could not be started, or delivered nothing for `timeout` seconds.
        """
        all_skipped: dict[int, str] = {}  # by index
        batches = self._from_workers() if self.num_workers else self._from_here()
        with closing(batches):
            for images, labels, indices, skipped, error in batches:
                all_skipped.update(skipped)
                if len(all_skipped) > self.skip_limit:
                    error = (
                        f"more than {self.skip_limit} unreadable images (DATA.BAD_IMAGE_LIMIT), "
                        f"the last {skipped[-1][1]} ({VERIFY_HINT})"
                    )
                if error:
                    raise DataError(error)
                if indices:
                    yield Batch(images, labels, indices)
        if all_skipped:
            self.log(f"warning: skipped {len(all_skipped)} unreadable images:")
        for _, reason in sorted(all_skipped.items()):
            self.log(f"  {reason}")

    def _from_here(self) -> Iterator[list]:
        for keys in self.sampler:
            images, labels, *rest = _collate([self.dataset[key] for key in keys])
            yield [paddle.to_tensor(images), paddle.to_tensor(labels), *rest]

    def _from_workers(self) -> Iterator[list]:
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
        iterator = _start(loader)
        try:
            for _ in range(len(self.sampler)):
                yield self._next(iterator)
        finally:
            iterator._try_shutdown_all(timeout=0)
            _end(iterator._workers, _GRACE)

    def _next(self, iterator) -> list:
        """The next batch, or a `DataError` when a worker is dead or nothing comes in time."""
        expired = threading.Event()

        def give_up():
            expired.set()
            iterator._exit_thread_unexpectedly()  # wakes the main thread with a SystemError

        timer, problem = threading.Timer(self.timeout, give_up), ""
        timer.daemon = True
        try:
            timer.start()
            batch = next(iterator)
        except (StopIteration, SystemError, RuntimeError) as error:
            problem = f"the data loader failed: {error}"
        finally:
            timer.cancel()
            if timer.ident:
                timer.join()  # it may have begun to give up while the batch came
        if not problem and not expired.is_set():
            return batch
        death = _first_death(iterator._workers)  # also one that Paddle has not noticed
        _end(iterator._workers)
        if death:
            problem = f"a data loader worker died ({death})"
        elif expired.is_set():
            problem = (
                f"the data loader delivered no batch for {self.timeout:g} s "
                "(DATA.WORKER_TIMEOUT): slow or hanging storage?"
            )
        raise DataError(problem)


def _collate(samples: list[Sample]) -> list:
    """Stacks samples to ``[images, labels, indices, skipped, error]``."""
    kept = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in kept] or [np.zeros(1, np.uint8)]  # Paddle wants an array
    return [
        np.stack(images),
        np.array([sample.label for sample in kept or samples], np.int64),
        [sample.index for sample in kept],
        [entry for sample in samples for entry in sample.skipped],
        next((sample.error for sample in samples if sample.error), ""),
    ]


def _start(loader: paddle.io.DataLoader):
    """Starts the workers, without Paddle's handler of SIGCHLD, which raises SystemError in any line
    of the main thread. They are forked, to inherit the data set.
    """
    handler, method = signal.getsignal(signal.SIGCHLD), multiprocessing.get_start_method(True)
    before = set(multiprocessing.active_children())
    multiprocessing.set_start_method("fork", force=True)
    gc.freeze()  # a worker that collected an old reader of Paddle's would join its threads: SIGABRT
    try:
        return iter(loader)
    except (OSError, RuntimeError) as error:
        started = set(multiprocessing.active_children()) - before
        _end(list(started))
        raise DataError(
            f"of {loader.num_workers} loader workers {len(started)} could be started: {error}; the "
            "system or container limits processes: DATA.NUM_WORKERS 0 loads without any"
        ) from None
    finally:
        gc.unfreeze()
        multiprocessing.set_start_method(method, force=True)
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _end(workers: list, grace: float = 0.0) -> None:
    """Ends workers, which have `grace` seconds to finish the batch at hand."""
    deadline = time.monotonic() + grace
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        worker.kill()
        worker.join()
        _remove_batches(worker.pid)


def _first_death(workers: list) -> str:
    """How a worker has ended that is dead or dying; empty where all live on."""
    ending = wait([worker.sentinel for worker in workers], _DEATH_CHECK)
    for worker in workers:
        if worker.sentinel in ending:
            worker.join()
            if worker.exitcode >= 0:
                return f"exit code {worker.exitcode}"
            name = signal.Signals(-worker.exitcode).name
            hint = {"SIGKILL": ", out of memory?", "SIGBUS": f", {_SHM} full?"}
            return name + hint.get(name, "")
    return ""


def _start_worker(worker_id: int) -> None:
    """Prepares a worker, which lives and dies with the main process.

    It outlives the Ctrl-C or SIGTERM that goes to every process, so that the main process can save.
    If that is killed, Linux sends the worker SIGUSR2; it would wait for ever else.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup SIGHUP means nothing
            signal.signal(number, lambda signum, frame: signal.alarm(_SAVING))
    ends = (signal.SIGALRM, signal.SIGUSR2)
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)

    def leave():  # in a thread: a handler would not run while the main one sleeps in a read
        number = signal.sigwait(ends)
        _remove_batches(os.getpid())
        os._exit(128 + number)

    threading.Thread(target=leave, daemon=True).start()
    with suppress(OSError, AttributeError):  # macOS has none
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR2)
    if os.getppid() != multiprocessing.parent_process().pid:  # killed before that line
        os._exit(1)
    setup.set_threads(1)


def _remove_batches(pid: int) -> None:
    """Removes what a worker has laid into shared memory and nobody will fetch any more."""
    for path in glob(f"{_SHM}/paddle_{pid}_*"):
        with suppress(OSError):
            os.remove(path)


def shared_memory_fits(workers: int, batch_bytes: int, world: int, log) -> bool:
    """Whether the batches under way fit into /dev/shm; if not, logs a line.

    Containers often keep it small, and a worker that finds it full dies of a bus error.
    """
    if not workers:
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
