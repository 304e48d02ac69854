"""From the config to batches: which files a split has, and how they are transformed and loaded.

What comes out depends on the config, the epoch and the rank, not on the number of workers.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from cli.errors import DataError
from cpu import resample, setup
from loading import archives
from loading.classes import UNKNOWN, ClassNames, run_classes
from loading.files import ImageIndex, read_list, scan_folder
from loading.images import BadImage, read_image, read_pixels, simplejpeg_is_right
from loading.loader import VERIFY_HINT, Batch, Loader, Sample, shared_memory_fits
from loading.samplers import EvalBatchSampler, Key, TrainBatchSampler, sample_rng
from storage.files import shorten, unreachable
from transforms import build_eval_transform, build_train_transform

__all__ = ["Batch", "ImageDataset", "Loader", "build_dataset", "build_loader"]


@dataclass(eq=False)
class ImageDataset:
    """Decodes, transforms and labels the images of an index, asked for by sampler keys."""

    files: ImageIndex
    transform: Callable[..., np.ndarray]  # (pixels, rng of the key alone) -> uint8 [H, W, 3]
    seed: int = 0
    replace_limit: int = 0  # how many unreadable images in a row to replace by the next one
    leave_out: bool = False  # unreadable images
    hint: str = VERIFY_HINT  # what to do about an unreadable image that ends the run
    classes: ClassNames = UNKNOWN
    _last: tuple[int, np.ndarray] | None = None  # repeated augmentation asks for it again

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key) -> Sample:
        epoch, position, index = key
        skipped: list[tuple[int, str]] = []
        while True:
            try:
                array = self._load(index, sample_rng(self.seed, epoch, position))
                return Sample(array, self.files.labels[index], index, skipped)
            except BadImage as bad:
                error = f"{self.files.where(index)}: {bad.reason}"
            except DataError as error:  # of an archive: there is no going on without it
                return Sample(None, 0, index, error=str(error))
            except Exception:
                error = f"{self.files.where(index)}: transform failed\n{traceback.format_exc()}"
                return Sample(None, 0, index, error=error)
            if self.leave_out:
                return Sample(None, 0, index, [(index, error)])
            if len(skipped) == self.replace_limit:
                return Sample(None, 0, index, error=f"{error} ({self.hint})")
            skipped.append((index, error))
            index = (index + 1) % len(self)

    def _load(self, index: int, rng: np.random.Generator) -> np.ndarray:
        if self._last is None or self._last[0] != index:
            pixels = read_pixels(self.files.path(index), self.files.exif_orientation)
            self._last = index, pixels
        return self.transform(self._last[1], rng)


def build_dataset(config, split: str, weights: ClassNames = UNKNOWN) -> ImageDataset:
    """The images that list file or folders have for ``train`` or ``val``, labelled as `run_classes`
    says. DataError: bad or missing data folder, list, line, class or first image.
    """
    root = config.DATA.DATA_PATH
    if not archives.is_folder(root):
        raise DataError(f"{root}: no such data folder; set it with `-data_path`")
    classes, labels, line = run_classes(config, weights)
    if config.DATA.DATASET == "imagefolder":
        files = scan_folder(root, split, config.MODEL.NUM_CLASSES, classes.folders)
    else:
        name = config.DATA.TRAIN_LIST if split == "train" else config.DATA.VAL_LIST
        outside = config.DATA.ALLOW_OUTSIDE_PATHS
        files = read_list(os.path.join(root, name), root, config.MODEL.NUM_CLASSES, outside)
        if labels:
            files.labels = array("i", [labels[label] for label in files.labels])
    if line and (split == "train" or config.EVAL):  # once a run
        files.notes.append(line)
    files.exif_orientation = config.DATA.EXIF_ORIENTATION
    if not archives.exists(files.path(0)):  # the others are missed when they are read
        slashes = " with forward slashes" if b"\\" in files.name(0) else ""
        reason = unreachable(files.path(0)).lower() or "no such file"
        raise DataError(
            f"{files.where(0)}: {reason}; the paths of a list are relative to {root}{slashes}"
        )
    files.open_archives()
    skip = config.DATA.BAD_IMAGE == "skip"
    if split != "train":
        out = skip and not config.EVAL  # an evaluation by itself is of every image
        return ImageDataset(files, build_eval_transform(config), leave_out=out, classes=classes)
    return ImageDataset(
        files,
        build_train_transform(config),
        config.SEED,
        replace_limit=config.DATA.BAD_IMAGE_LIMIT if skip else 0,
        hint=VERIFY_HINT if skip else f"{VERIFY_HINT}; DATA.BAD_IMAGE skip trains without such",
        classes=classes,
    )


def build_loader(
    config,
    split: str,
    rank: int = 0,
    world: int = 1,
    log: Callable[[str], None] = print,
    weights: ClassNames = UNKNOWN,
) -> Loader:
    """The `Loader` of a split. DataError as `build_dataset`, or if images do not fill a step."""
    dataset = build_dataset(config, split, weights)
    told = split == "train" or config.EVAL  # once a run
    resample.prepare(log if told else lambda line: None)  # before workers are forked
    if not simplejpeg_is_right() and told:
        log("JPEGs are decoded by Pillow, slower: no simplejpeg with the pixels of this Pillow")
    if told:
        with suppress(DataError):  # what it warns of is then said here, and not by every worker
            read_image(dataset.files.path(0))
    for note in dataset.files.notes:
        log(note)
    _warn_of_empty_classes(config, split, dataset, log)
    data = config.DATA
    if split == "train":
        sampler = TrainBatchSampler(
            len(dataset),
            data.BATCH_SIZE,
            config.SEED,
            rank,
            world,
            config.TRAIN.REPEATED_AUG,
            data.DROP_LAST,
            np.asarray(dataset.files.labels) if config.TRAIN.BALANCED_SAMPLING else None,
        )
        if len(sampler) == 0:
            raise DataError(
                f"{config.DATA.DATA_PATH}: {len(dataset)} images do not fill one step of "
                f"{world} x {data.BATCH_SIZE}; lower DATA.BATCH_SIZE or set DATA.DROP_LAST False"
            )
    else:
        batch_size = data.BATCH_SIZE_EVAL or data.BATCH_SIZE
        sampler = EvalBatchSampler(len(dataset), batch_size, rank, world)
    return loader_of(config, dataset, sampler, world, log, told)


def loader_of(
    config,
    dataset: ImageDataset,
    sampler: TrainBatchSampler | EvalBatchSampler,
    world: int = 1,
    log: Callable[[str], None] = print,
    say_workers: bool = True,
) -> Loader:
    """A `Loader` with DATA.NUM_WORKERS workers (``auto``: one per core that this process may use,
    less its own; 1 to 16, for their memory), but not more than there are batches.
    """
    data, cores = config.DATA, setup.usable_cores()
    auto = data.NUM_WORKERS == "auto"
    workers = min(max(1, min(cores - 1, 16)) if auto else data.NUM_WORKERS, len(sampler))
    if auto and say_workers:
        counted = f"DATA.NUM_WORKERS auto, of {cores} core{'s' * (cores > 1)} for this process"
        log(f"images are loaded by {workers} worker{'s' * (workers != 1)} ({counted})")
    in_thread = threading.current_thread() is not threading.main_thread()  # as in a Gradio page
    if workers and (in_thread or sys.platform in ("darwin", "win32")):
        where = "in a thread" if in_thread else "on this system"
        log(f"Paddle has no loader workers {where}: images are loaded in turn")
        workers = 0
    batch_bytes = sampler.batch_size * data.IMAGE_SIZE**2 * 3
    return Loader(
        dataset,
        sampler,
        workers,
        timeout=data.WORKER_TIMEOUT,
        skip_limit=data.BAD_IMAGE_LIMIT,
        shared_memory=shared_memory_fits(workers, batch_bytes, world, log),
        log=log,
    )


def _warn_of_empty_classes(config, split: str, dataset: ImageDataset, log) -> None:
    """Logs a line where some classes have no image: a folder or a part of a list went missing."""
    files, names = dataset.files, dataset.classes.names
    if config.MODEL.NUM_CLASSES == 1 and (split == "train" or config.EVAL):
        log("warning: there is one class: an accuracy of 100 % says nothing")
    expected = (config.EVAL and files.subset) or range(config.MODEL.NUM_CLASSES)
    empty = sorted(set(expected) - set(files.labels))
    if empty:
        named = shorten([f"{label} ({names[label]})" if names else label for label in empty], 5)
        log(f"warning: {len(empty)} of {len(expected)} classes have no image in {split}: {named}")
