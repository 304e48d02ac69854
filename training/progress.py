"""Where a run stands, and whether its steps are finite: decided the same on every rank."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from cli.errors import TrainingError
from parallel.process import Process, StopSignal, from_all
from storage.checkpoints import LAST

SYNC_STEPS_GPU = 10  # steps between reads of the numbers on a GPU; on a CPU they cost nothing
_log = logging.getLogger("resmlp")


@dataclass
class Progress:
    """Where a run stands: saved with every checkpoint, and all that resuming needs to know."""

    epoch: int = 0  # epochs done, their evaluation included
    samples: int = 0  # of the epoch under way: images that all ranks together have trained on
    step: int = 0  # optimizer steps in all
    epoch_loss: float = 0.0  # of the epoch under way: sum over images and ranks ...
    epoch_count: int = 0  # ... and how many
    report_loss: float = 0.0  # the same since the last report
    report_count: int = 0
    seconds: float = 0.0  # of training in the epoch under way, up to the last report ...
    timed_images: int = 0  # ... and the images trained on in them
    best_score: float = -math.inf  # of BEST_METRIC (Metrics.score), of the EMA where there is one
    best_top1: float = -1.0  # percent; of that evaluation
    best_epoch: int = 0
    stale: int = 0  # evaluations since the best one
    skipped_steps: int = 0  # optimizer steps left out: a loss or gradient was not finite
    skipped_in_a_row: int = 0  # counted against NONFINITE_LIMIT

    def forget_best(self) -> None:
        self.best_score, self.best_top1, self.best_epoch, self.stale = -math.inf, -1.0, 0, 0

    def is_best(self, score: float, top1: float) -> bool:
        """Counts an evaluation after the epoch under way; whether it is the best one so far."""
        self.stale += 1
        if score > self.best_score:
            self.best_score, self.best_top1, self.best_epoch = score, top1, self.epoch + 1
            self.stale = 0
        return self.stale == 0

    def ended(self, epochs: int, patience: int) -> bool:
        """Whether it has done all, or ``patience`` evaluations (0: off) without a better one."""
        return self.epoch >= epochs or 0 < patience <= self.stale


@dataclass
class StepRecord:
    """What an optimizer step found; its numbers stay on the device until someone reads them."""

    step: int
    lr: float
    indices: list  # of this rank's images, to name them when the loss is not finite
    numbers: paddle.Tensor  # float64 [4]: the sum of this rank's losses; over all ranks that sum
    # and how many were asked to stop; the gradient norm before clipping
    values: list | None = None  # the numbers, once they are read

    def read(self) -> list:
        """The numbers, on the host."""
        if self.values is None:
            self.values = self.numbers.numpy().tolist()
        return self.values

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite: what decides about a step, on every rank alike."""
        _, loss, _, norm = self.read()
        return math.isfinite(loss) and math.isfinite(norm)


class Monitor:
    """Counts what the steps have found in the run's `Progress`, and ends a run that goes wrong.

    The numbers are read when they are due, and always before a report or a save: no checkpoint
    holds what a step that is not finite has left. Of the last step that was read, ``norm`` is the
    gradient's, and ``stop`` says whether any rank was asked to stop: the same on every rank.
    """

    def __init__(self, config, process: Process, progress: Progress, scaler, folder: Path, files):
        self.config, self.process, self.progress = config, process, progress
        self.scaler, self.folder, self.files = scaler, folder, files
        self.norm, self.stop, self.signal = 0.0, False, StopSignal()
        self._records: list[StepRecord] = []  # of the steps since the last count

    def add(self, record: StepRecord) -> bool:
        """Takes a step; whether to count now: its numbers were read, or those of many were not."""
        self._records.append(record)
        return record.values is not None or (record.step + 1) % SYNC_STEPS_GPU == 0

    def count_or_raise(self) -> None:
        """Reads what is still on the device, in one copy, and counts it in the progress.

        TrainingError if a step was not finite and TRAIN.NONFINITE says stop, or too many in a row
        were. A step of a finite loss that float16's scaler leaves out is one to skip.
        """
        progress, train = self.progress, self.config.TRAIN
        records, self._records = self._records, []
        if unread := [record for record in records if record.values is None]:
            rows = paddle.stack([record.numbers for record in unread]).numpy().tolist()
            for record, row in zip(unread, rows):
                record.values = row
        for record in records:
            _, loss, stop, norm = record.values
            self.stop = stop > 0
            if math.isfinite(loss):
                count = len(record.indices) * self.process.world
                progress.epoch_loss += loss
                progress.epoch_count += count
                progress.report_loss += loss
                progress.report_count += count
                self.norm = norm
            if record.finite:
                progress.skipped_in_a_row = 0
                continue
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            by_scaler = math.isfinite(loss) and self.scaler.is_enable()
            stop_now = train.NONFINITE == "stop" and not by_scaler
            if stop_now or progress.skipped_in_a_row > train.NONFINITE_LIMIT:
                raise self._error(record)
            if not by_scaler:
                _log.warning(f"step {record.step}: skipped, loss sum {loss}, gradient norm {norm}")

    def _error(self, record: StepRecord) -> TrainingError:
        """Writes what is needed to reproduce the step, on every rank, and says where it is."""
        rank = self.process.rank
        own_loss, loss, _, norm = record.values
        scale = float(np.ravel(self.scaler.state_dict().get("scale", 1.0))[0])
        facts = dict(epoch=self.progress.epoch + 1, step=record.step, rank=rank, lr=record.lr)
        facts.update(loss_scale=scale, loss=own_loss / len(record.indices), gradient_norm=norm)
        facts.update(seed=self.config.SEED, images=[self.files.path(i) for i in record.indices])
        path = self.folder / f"nonfinite.rank{rank}.json"
        try:
            path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        except OSError as error:  # the ranks still have to agree on what to say
            _log.warning(f"{path}: cannot be written: {error.strerror}")
        losses = enumerate(from_all(own_loss, self.process))
        wrong = [r for r, its_loss in losses if not np.isfinite(its_loss)]
        where = f"rank {', '.join(map(str, wrong))}" if wrong else "all ranks together"
        what = "gradient" if np.isfinite(loss) else "loss"
        scaled = f", loss scale {scale:g}" if self.scaler.is_enable() else ""
        listed = self.folder / f"nonfinite.rank{wrong[0] if len(wrong) == 1 else '*'}.json"
        last = self.folder / LAST
        saved = f"the last checkpoint is {last}" if last.exists() else "nothing was saved yet"
        return TrainingError(
            f"{where}, step {record.step}: the {what} is not finite (learning rate "
            f"{record.lr:.3g}{scaled}); the batch is listed in {listed}; {saved}. A lower "
            "TRAIN.BASE_LR, a longer TRAIN.WARMUP_EPOCHS or TRAIN.GRAD_CLIP usually helps; "
            "TRAIN.NONFINITE skip goes on"
        )
