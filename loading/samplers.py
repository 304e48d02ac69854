"""Which image is seen when: pure functions of (seed, epoch, rank, world), with no state to save.

An epoch is one global order of *positions* 0, 1, 2, ... that does not depend on the number of
processes. Position p belongs to rank ``p % world``, so step k of `world` processes with batch B
covers the positions ``[k * world * B, (k + 1) * world * B)``, as one process with batch
``world * B`` does. A sample's random augmentation hangs on (seed, epoch, position) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# The first number of every random key: what the stream is for. (Without it, SeedSequence would
# take the keys (s, e) and (s, e, 0) for the same one, because it pads short keys with zeros.)
_ORDER, _SAMPLE = 1, 2

Key = tuple[int, int, int]  # (epoch, position in the epoch's global order, image index)


def sample_rng(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The generator of a sample's augmentation, other for each repeated copy of an image."""
    return np.random.default_rng((_SAMPLE, seed, epoch, position))


def _balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many images as labels ``[n]``, in rounds of all classes: of each equally many (or one
    less). A class's images are taken in turn: none comes twice before all have.
    """
    images = rng.permutation(len(labels))
    images = images[np.argsort(labels[images], kind="stable")]  # class by class
    _, starts, counts = np.unique(labels[images], return_index=True, return_counts=True)
    rounds = np.arange(-(-len(labels) // len(starts)))
    picked = images[starts + rounds[:, None] % counts]  # [rounds, classes]
    return rng.permuted(picked, axis=1).ravel()[: len(labels)]


def train_indices(
    num_images: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    repeats: int = 1,
    labels: np.ndarray | None = None,
    start: int = 0,
) -> np.ndarray:
    """The images that one process trains on in an epoch, in order.

    Every rank gets equally many, as collectives need. With ``repeats == 1`` the epoch holds every
    image; where `world` does not divide `num_images`, the order goes on from its start. Otherwise
    each image stands `repeats` times in a row, so its copies land on other ranks, and the epoch
    ends after ``floor(num_images / 256) * 256`` positions (of 256 images or more).

    Args:
        labels: ``[num_images]``, to see each class equally often; None: each image once.
        start: global position to begin at, for whatever `world` that was reached with.

    Returns:
        int64 ``[n]`` image indices; element i is at global position ``start + rank + i * world``.

    Source: DeiT's RASampler (repeated augmentation, arXiv 1902.05509) for ``repeats > 1``.
    """
    rng = np.random.default_rng((_ORDER, seed, epoch))
    order = rng.permutation(num_images) if labels is None else _balanced_order(labels, rng)
    count = _samples_per_rank(num_images, world, repeats, start)
    positions = start + rank + world * np.arange(count)
    return order[positions // repeats % num_images]


@dataclass(eq=False)
class TrainBatchSampler:
    """Batches of training samples for one process (see `train_indices`), as lists of `Key`; `len`
    are left of the epoch, on every rank. `drop_last` leaves out a last step that is smaller.
    """

    num_images: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    repeats: int = 1
    drop_last: bool = True
    labels: np.ndarray | None = None
    epoch: int = field(default=0, init=False)
    start: int = field(default=0, init=False)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Goes to an epoch, to the global position where an interrupted run has stopped in it."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        if self.drop_last:
            left = max(0, _epoch_length(self.num_images, self.repeats) - self.start)
            return left // (self.world * self.batch_size)
        count = _samples_per_rank(self.num_images, self.world, self.repeats, self.start)
        return -(-count // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        key = self.seed, self.epoch, self.rank, self.world, self.repeats
        indices = train_indices(self.num_images, *key, self.labels, self.start)
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            yield [
                (self.epoch, self.start + self.rank + (first + i) * self.world, int(index))
                for i, index in enumerate(indices[first : first + self.batch_size])
            ]


class EvalBatchSampler:
    """Batches of the images that one process evaluates, in a fixed order, as lists of `Key`; each
    image is on exactly one rank. Some ranks may have none, and the last batch may be small.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world: int = 1):
        self.indices = np.arange(rank, num_images, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            batch = self.indices[start : start + self.batch_size]
            yield [(0, int(index), int(index)) for index in batch]


def _epoch_length(num_images: int, repeats: int) -> int:
    """Positions of an epoch over all ranks."""
    return num_images // 256 * 256 if repeats > 1 and num_images >= 256 else num_images


def _samples_per_rank(num_images: int, world: int, repeats: int, start: int) -> int:
    left = max(0, _epoch_length(num_images, repeats) - start)
    # Down as DeiT does where images are left over anyway; up where each image shall be seen.
    return left // world if repeats > 1 and num_images >= 256 else -(-left // world)
