"""Small helpers of the loops: seeds, normalising on the device, memory, meters."""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import contextlib
import random
import sys
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import paddle

from cli.progress import ProgressLine  # noqa: F401  (whoever imports utils has it)
from parallel.process import Process

try:
    import resource
except ImportError:  # Windows
    resource = None


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and Paddle, the same on every rank (weights are built from it)."""
    random.seed(seed)
    np.random.seed(seed)
    paddle.seed(seed)


def step_rng(seed: int, rank: int, epoch: int, step: int) -> np.random.Generator:
    """The randomness of a training step, of its arguments alone so that runs resume: seeds Paddle's
    generators (dropout, drop path, erasing noise) and returns one of NumPy.
    """
    rng = np.random.default_rng((3, seed, rank, epoch, step))  # 3: loading/samplers.py uses 1 and 2
    paddle.seed(int(rng.integers(2**31)))
    return rng


class Normalize:
    """uint8 ``[B, H, W, 3]`` -> float32 ``[B, 3, H, W]``: ``(x / 255 - mean) / std``."""

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


_underway: deque = deque(maxlen=64)  # far more batches than a GPU's queue holds


def to_device(arrays: Sequence[np.ndarray]) -> list[paddle.Tensor]:
    """Arrays of float32 and int32 as tensors, in one copy that, on a GPU, waits for nothing.

    (There, `paddle.to_tensor` of an array waits until all that was started before is done.)
    """
    if not arrays:
        return []
    words = np.concatenate([array.view("int32").ravel() for array in arrays])
    if paddle.get_device() == "cpu":
        words = paddle.to_tensor(words)
    else:  # pinned memory has to stay until its copy is done
        _underway.append(paddle.to_tensor(words, place=paddle.CUDAPinnedPlace()))
        words = _underway[-1].cuda(blocking=False)
    tensors, start = [], 0
    for array in arrays:
        part = words[start : start + array.size].view(str(array.dtype))
        tensors.append(part.reshape(array.shape))
        start += array.size
    return tensors


def memory_mb(process: Process) -> float:
    """Peak memory of this process, MB: of the GPU if there is one, else resident (Windows: 0)."""
    if process.on_gpu:
        return paddle.device.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Meter:
    """Time, images and time spent waiting for data since the last report, of this process."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.images, self._start, self._waited = 0, time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Counts the body as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def read(self) -> tuple[float, float]:
        """Seconds of the interval, and the share of them spent waiting for data."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        return seconds, self._waited / seconds


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
