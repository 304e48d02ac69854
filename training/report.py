"""What a run says of itself: lines in the log, records in metrics.jsonl, the dashboard."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from datasets import ImageDataset
from parallel.process import Process
from storage import checkpoints
from storage.run_folder import RunFolder
from training.evaluation import Metrics
from training.learner import Learner
from training.progress import Progress
from utils import Meter, duration, memory_mb

_log = logging.getLogger("resmlp")


def build_dashboard(kind: str, folder: Path, step: int):
    """The writer of the package that DASHBOARD names, to ``folder/kind``; None without one, or
    where it is missing. ``step`` is that of a run that is resumed: later points are dropped.
    """
    path = folder / kind
    try:
        if kind == "tensorboard":  # tensorboardX needs neither TensorFlow nor PyTorch
            from tensorboardX import SummaryWriter

            again = {"purge_step": step + 1} if path.is_dir() else {}
            return SummaryWriter(str(path), flush_secs=30, **again)
        if kind == "visualdl":
            from visualdl import LogWriter

            return LogWriter(logdir=str(path))
    except ImportError as error:
        package = {"tensorboard": "tensorboardX"}.get(kind, kind)
        _log.warning(f"DASHBOARD {kind} is off: `pip install {package}` ({error})")
    return None


class Report:
    """Writes the reports of a training run; nothing in it changes the run but its clock."""

    def __init__(self, config, process: Process, folder: RunFolder, schedule, step: int):
        self.config, self.process, self.folder, self.schedule = config, process, folder, schedule
        kind = config.DASHBOARD if process.main else "none"
        self.dashboard = build_dashboard(kind, folder.path, step)

    def log_start(
        self, learner: Learner, progress: Progress, train: ImageDataset, val: ImageDataset
    ) -> None:
        """Writes classes and config to the folder, and logs what is trained."""
        config, schedule = self.config, self.schedule
        older = self.folder.path / "classes.txt"  # of older checkpoints, which it names
        if train.classes and not (progress.step and older.exists()):
            names = "".join(f"{name}\n" for name in train.classes.names)
            self.folder.write("classes.txt", names)
        self.folder.write("config.yaml", config.dump())
        count = sum(int(np.prod(p.shape)) for p in learner.model.parameters())
        steps, world = schedule.steps_per_epoch, self.process.world
        _log.info(
            f"{config.MODEL.NAME}: {count:,} parameters; {len(train)} training and {len(val)} "
            f"validation images; {steps} step{'s' * (steps > 1)} of {schedule.samples_per_step} "
            f"images an epoch on {world} process{'es' * (world > 1)}; "
            f"base learning rate {schedule.base_rate:.3g}; output in {self.folder.path}"
        )
        if config.TRAIN.TEACHER_MODEL and learner.objective.teacher is None:
            _log.warning("TRAIN.TEACHER_MODEL is not used: TRAIN.DISTILLATION_TYPE is none")
        memory = 1 / max(1 - config.TRAIN.MODEL_EMA_DECAY, 1e-9)  # steps
        if learner.ema and not learner.ema.warmup and memory > schedule.total_epochs * steps:
            _log.warning(
                f"TRAIN.MODEL_EMA_DECAY {config.TRAIN.MODEL_EMA_DECAY} remembers {memory:.0f} "
                f"steps, more than this run has: its EMA stays near the first weights; lower it, "
                f"or set TRAIN.MODEL_EMA_WARMUP True"
            )
        if progress.epoch >= schedule.total_epochs:
            _log.info(f"this run has finished its {schedule.total_epochs} epochs already")

    def images(self, learner: Learner, batch, rng: np.random.Generator, step: int) -> None:
        """Sends the first images of an epoch, as the model gets them, to the dashboard."""
        if self.dashboard is not None:
            images, _ = learner.augment(batch.images, batch.labels, rng)
            row = np.concatenate(list(learner.augment.normalize.undo(images[:8])), axis=1)
            self.dashboard.add_image("train/images", row, step + 1, dataformats="HWC")

    def step(self, progress: Progress, norm: float, meter: Meter, step: int, lr: float) -> None:
        """Logs a line, records it, and starts the next interval of ``meter`` and ``progress``."""
        epoch, schedule, world = progress.epoch, self.schedule, self.process.world
        seconds, data_share = meter.read()
        loss = progress.report_loss / progress.report_count if progress.report_count else None
        rate = meter.images * world / seconds
        progress.seconds += seconds
        progress.timed_images += meter.images * world
        memory, steps = memory_mb(self.process), schedule.steps_per_epoch
        left = (schedule.total_epochs - epoch) * steps - step - 1
        eta = duration(left * schedule.samples_per_step / rate)
        shown = "-" if loss is None else f"{loss:.4f}"  # all steps of the interval were skipped
        skipped = f"  skipped {progress.skipped_steps}" if progress.skipped_steps else ""
        _log.info(
            f"epoch {epoch + 1}/{schedule.total_epochs}  step {step + 1}/{steps}  lr {lr:.2e}  "
            f"loss {shown}  grad norm {norm:.2f}  {rate:.1f} images/s  "
            f"data {100 * data_share:.0f} %  {memory:.0f} MB  ETA {eta}{skipped}"
        )
        record = {"kind": "step", "epoch": epoch + 1, "step": progress.step, "lr": lr, "loss": loss}
        record["grad_norm"] = norm if np.isfinite(norm) else None  # JSON knows no infinity
        record.update(images_per_second=round(rate, 1), data_share=round(data_share, 3))
        self.folder.add_metrics({**record, "memory_mb": round(memory)})
        self._curves("train/", {"lr": lr, "loss": loss}, progress.step)
        progress.report_loss, progress.report_count = 0.0, 0
        meter.restart()

    def epoch(
        self, learner: Learner, progress: Progress, raw: Metrics | None, ema: Metrics | None
    ) -> None:
        """Records an epoch that has ended, with its evaluation where there was one."""
        epoch, images = progress.epoch, progress.epoch_count
        record = {
            "kind": "epoch",
            "epoch": epoch + 1,
            "step": progress.step,
            "lr": self.schedule.rate(epoch, self.schedule.steps_per_epoch - 1),
            "train_loss": progress.epoch_loss / images if images else None,
            "images_per_second": round(progress.timed_images / max(progress.seconds, 1e-9), 1),
            "seconds": round(progress.seconds, 1),
        }
        for name, found in (("val", raw), ("ema", ema)):
            for key in ("loss", "top1", "top5", "balanced_accuracy") if found else ():
                if (value := getattr(found, key)) is not None:
                    record[f"{name}_{key}"] = value
        self.folder.add_metrics(record)
        shown = {k: v for k, v in record.items() if k.startswith(("val_", "ema_", "train_"))}
        self._curves("epoch/", shown, progress.step)
        if self.dashboard is not None:
            for name, parameter in learner.model.named_parameters():
                if name.endswith((".ls1", ".ls2")):
                    self.dashboard.add_histogram(name, parameter.numpy().ravel(), progress.step)

    def _curves(self, prefix: str, values: dict, step: int) -> None:
        for name, value in values.items() if self.dashboard is not None else ():
            if value is not None:
                self.dashboard.add_scalar(prefix + name, value, step)

    def close(self) -> None:
        if self.dashboard is not None:
            self.dashboard.close()

    def done(self, progress: Progress, ema: bool) -> None:
        if progress.epoch < self.schedule.total_epochs:
            _log.info(
                f"stopped early: {progress.stale} evaluations without a better one "
                f"(TRAIN.EARLY_STOP)"
            )
        if progress.best_epoch:
            path, metric = self.folder.path / checkpoints.BEST, self.config.BEST_METRIC
            by = f", chosen by {metric} ({abs(progress.best_score):.4g})" * (metric != "top1")
            _log.info(
                f"done: best top-1{' of the EMA' * ema} {progress.best_top1:.2f} %, after epoch "
                f"{progress.best_epoch}{by}, in {path}"
            )
            if path.is_file():
                _log.info(
                    f"{path.name}: {path.stat().st_size / 1e6:.1f} MB with the optimizer's state; "
                    "tools/export.py -format safetensors writes the weights alone"
                )
