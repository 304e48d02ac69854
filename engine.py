"""Training and evaluation: the only loops of the project, the same for one process and many.

    run(config)

`run` reads top to bottom: process, folder, data, model, learner, loop.
"""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import contextlib
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cli.errors import CheckpointError, ConfigError, TrainingError, UserError, WeightsError
from datasets import build_loader, class_names, with_num_classes
from loading.real_labels import read_real_labels
from optimizer import Schedule
from parallel.process import (
    Preempted,
    Process,
    from_main,
    main_first,
    prepare_process,
)
from resmlp import build_resmlp, load_pretrained, load_state
from storage import checkpoints
from storage.run_folder import RunFolder, choose_folder
from training.evaluation import Metrics, evaluate, write_report
from training.learner import Learner, autocast
from training.progress import Monitor, Progress
from training.report import Report
from training.saving import Checkpoints
from utils import Meter, Normalize, ProgressLine, seed_everything, step_rng

_log = logging.getLogger("resmlp")


@dataclass
class Result:
    """What a run ends with; ``result["top1"]`` reads as ``result.top1``.

    The numbers are of the last evaluation, of the EMA where there is one; None without any.
    """

    folder: Path
    rank: int
    top1: float | None = None  # percent
    top5: float | None = None
    loss: float | None = None
    images: int | None = None
    balanced_accuracy: float | None = None  # where classes have unequal numbers of images
    best_top1: float | None = None  # of a training run

    def __getitem__(self, name: str):
        return getattr(self, name)


def run(
    config,
    load_config: Callable | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Result:
    """Trains, or with ``config.EVAL`` evaluates, as a frozen config says.

    Args:
        config: the resolved config.
        load_config: path of a YAML file -> config; a teacher that is a ResMLP needs it.
        on_step: called with the number of optimizer steps done, for a supervisor.

    Raises:
        UserError: anything that the user can mend, in one line.
        Preempted: after SIGTERM or Ctrl-C, when everything is saved.
    """
    process = prepare_process()
    config = with_num_classes(config)
    folder = from_main(str(choose_folder(config)) if process.main else "", process)
    folder = RunFolder(Path(folder), process.rank, not config.EVAL, config.MODEL.RESUME)
    with contextlib.closing(folder):
        if config.AMP and not process.on_gpu:
            _log.info("AMP: Paddle has no mixed precision on CPU, running in float32")
        if config.EVAL:
            return _run_evaluation(config, process, folder)
        if config.MODEL.NUM_CLASSES == 0:
            raise ConfigError("MODEL.NUM_CLASSES is 0 (features only); training needs classes")
        return Trainer(config, process, folder, load_config).fit(on_step)


def _run_evaluation(config, process: Process, folder: RunFolder) -> Result:
    loader = build_loader(config, "val", process.rank, process.world, _log.info)
    model = build_resmlp(config)
    if not config.MODEL.PRETRAINED:
        raise ConfigError("-eval needs weights: give them with -pretrained FILE")
    for note in load_pretrained(model, config):
        _log.info(note)
    model.eval()
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)

    def predict(images):
        with autocast(config, process):
            return model(normalize(images))

    accepted, classes = None, config.MODEL.NUM_CLASSES
    if config.EVAL_REAL_LABELS:
        accepted = read_real_labels(config.EVAL_REAL_LABELS, loader.dataset.files, classes)
    progress = ProgressLine("evaluation", process.main)
    metrics = evaluate(
        predict,
        loader,
        process,
        classes,
        config.EVAL_REPORT,
        progress=progress,
        accepted=accepted,
        subset=loader.dataset.files.subset,
    )
    progress.end()
    _log.info(f"evaluation of {config.MODEL.NAME}: {metrics}")
    folder.write("eval.json", json.dumps(metrics.scores(), indent=1) + "\n")
    if config.EVAL_REPORT and process.main:
        try:
            paths = write_report(
                metrics,
                class_names(config),
                folder.path,
                config.MODEL.NUM_CLASSES,
                loader.dataset.files,
            )
        except OSError as error:
            raise UserError(f"{folder.path}: the report cannot be written: {error.strerror}")
        for path in paths:
            _log.info(f"wrote {path}")
    result = metrics.top1, metrics.top5, metrics.loss, metrics.images
    return Result(folder.path, process.rank, *result)


class Trainer:
    """A training run: built, restored, and then `fit`."""

    def __init__(self, config, process: Process, folder: RunFolder, load_config):
        self.config, self.process = config, process
        self.checkpoints = Checkpoints(config, process, folder)
        saved = self.checkpoints.choose()
        self.train_loader = build_loader(config, "train", process.rank, process.world, _log.info)
        self.val_loader = build_loader(config, "val", process.rank, process.world, _log.info)
        self.schedule = Schedule(config, len(self.train_loader), process.world)
        seed_everything(config.SEED)
        model, labels = first_model(config, saved), self.train_loader.dataset.files.labels
        self.learner = Learner(config, process, model, load_config, saved, labels)
        done = saved["epoch"] if saved else config.TRAIN.LAST_EPOCH
        self.progress = Progress(epoch=done, step=done * self.schedule.steps_per_epoch)
        if saved:
            self.progress = self.checkpoints.resume(saved, self.progress)
        self.report = Report(config, process, folder, self.schedule)
        self.monitor = Monitor(
            config,
            process,
            self.progress,
            self.learner.scaler,
            folder.path,
            self.train_loader.dataset.files,
        )

    def fit(self, on_step: Callable[[int], None] = lambda step: None) -> Result:
        """Trains to the last epoch; see `run`."""
        progress, metrics = self.progress, None
        try:
            images = len(self.train_loader.dataset), len(self.val_loader.dataset)
            self.report.hello(self.learner, progress, images)
            teacher = self.learner.objective.teacher
            if teacher is not None and progress.epoch < self.schedule.total_epochs:
                self.evaluate(teacher, "teacher")
            while not self._done():
                self._train_epoch(on_step)
                metrics = self._finish_epoch() or metrics
            self.checkpoints.finish_or_raise(progress)
        except TrainingError:  # of all ranks: a launcher would end rank 0 when another has ended
            with main_first(self.process):
                self.checkpoints.close()
            raise
        finally:
            self.checkpoints.close()
            self.report.dashboard.close()
            self.monitor.signal.close()
        self.report.done(progress, self.learner.ema is not None)
        result = Result(self.report.folder.path, self.process.rank, best_top1=progress.best_top1)
        if metrics is not None:
            result.top1, result.top5, result.loss = metrics.top1, metrics.top5, metrics.loss
            result.images, result.balanced_accuracy = metrics.images, metrics.balanced_accuracy
        return result

    def _done(self) -> bool:
        stale, limit = self.progress.stale, self.config.TRAIN.EARLY_STOP
        if not 0 < limit <= stale:
            return self.progress.epoch >= self.schedule.total_epochs
        _log.info(f"stopped early: {stale} evaluations without a better one (TRAIN.EARLY_STOP)")
        return True

    def _train_epoch(self, on_step: Callable[[int], None]) -> None:
        """Trains the rest of an epoch, from where `progress` stands."""
        progress, loader, steps = self.progress, self.train_loader, self.schedule.steps_per_epoch
        accum = self.config.TRAIN.ACCUM_ITER
        loader.set_epoch(progress.epoch, progress.samples)
        if len(loader) == 0:
            return  # the run was stopped in the evaluation of this epoch
        self.learner.network.train()
        meter = Meter()
        bar = ProgressLine(f"epoch {progress.epoch + 1}", self.process.main)
        with contextlib.closing(iter(loader)) as batches:  # ends the workers in any case
            for step in range(steps - -(-len(loader) // accum), steps):
                with meter.waiting():
                    window = list(itertools.islice(batches, accum))
                lr = self._train_step(step, window, meter)
                on_step(progress.step)
                self._after_step(step, lr, meter)
                bar(step + 1, steps)
            next(batches, None)  # lets the loader end its pass: it then lists skipped images
        bar.end()

    def _train_step(self, step: int, window: list, meter: Meter) -> float:
        """One optimizer step over an accumulation window; returns its learning rate."""
        progress = self.progress
        key = self.config.SEED, self.process.rank, progress.epoch, step
        if progress.samples == 0:
            self.report.images(self.learner, window[0], step_rng(*key), progress.epoch)
        lr = self.schedule.rate(progress.epoch, step)
        loss, norm = self.learner.backward(window, step_rng(*key))
        indices = [index for batch in window for index in batch.indices]
        self.monitor.add(lr, loss, norm, indices)
        allowed = not self.monitor.before_each_step or self.monitor.count_or_raise()
        self.learner.apply(lr, progress.step, norm, allowed)
        meter.images += len(indices)
        progress.step += 1
        progress.samples += self.schedule.samples_per_step
        return lr

    def _after_step(self, step: int, lr: float, meter: Meter) -> None:
        """Reports, saves and stops where that is due."""
        config, progress = self.config, self.progress
        end = step + 1 == self.schedule.steps_per_epoch
        report = end or (step + 1) % config.REPORT_FREQ == 0
        save = bool(config.SAVE_STEPS) and progress.step % config.SAVE_STEPS == 0
        if report or save or self.monitor.due():
            self.monitor.count_or_raise()
        stop = self.monitor.stop
        if report:
            self.checkpoints.finish_or_raise(progress, wait=False)
            self.report.step(progress, self.monitor.norm, meter, step, lr)
        if stop or (save and not end):
            self.checkpoints.save(self.learner, progress)
        if stop:
            self._stop(f"stopped after step {progress.step}")

    def _finish_epoch(self) -> Metrics | None:
        """Evaluates where that is due, records the epoch and saves."""
        config, progress, learner = self.config, self.progress, self.learner
        epoch = progress.epoch + 1  # counted from 1
        last = epoch == self.schedule.total_epochs
        raw, ema, names = None, None, []
        if last or epoch % config.VALIDATE_FREQ == 0:
            # an interruption of the evaluation costs no training
            self.checkpoints.save(learner, progress)
            learner.model.eval()
            raw = self.evaluate(learner.model, f"epoch {epoch}")
            if learner.ema is not None:
                ema = self.evaluate(learner.ema.model, f"epoch {epoch}, EMA")
            self.checkpoints.finish_or_raise(progress)  # takes back a best that was not saved
            found = ema or raw
            if progress.is_best(found.score(config.BEST_METRIC), found.top1):
                names.append(checkpoints.BEST)
        if last or epoch % config.SAVE_FREQ == 0:
            names.append(checkpoints.epoch_name(epoch))
        self.report.epoch(learner, progress, raw, ema)
        progress.start_next_epoch()
        self.checkpoints.save(learner, progress, *names)
        return ema or raw

    def evaluate(self, model: Callable, label: str) -> Metrics:
        """Evaluates a model on the validation images; saves nothing, and stops when asked to."""
        bar = ProgressLine(f"{label}: evaluation", self.process.main)
        metrics = evaluate(
            lambda images: self.learner.predict(images, model),
            self.val_loader,
            self.process,
            self.config.MODEL.NUM_CLASSES,
            stop=lambda: self.monitor.signal.received,
            progress=bar,
        )
        bar.end()
        if metrics is None:
            self._stop("stopped in evaluation")
        _log.info(f"{label}: {metrics}")
        return metrics

    def _stop(self, what: str) -> NoReturn:
        """Ends the run on every rank, when the last save has ended.

        No rank ends before: a launcher that sees one end gives the others seconds to follow.
        """
        with main_first(self.process):
            self.checkpoints.finish_or_raise(self.progress)
        folder, saved = self.report.folder.path, self.checkpoints.saved
        if saved is None:
            where = f"nothing is saved yet in {folder}"
        elif saved.step == self.progress.step:
            where = f"saved in {folder}"
        else:
            where = f"that could not be saved; the last checkpoint is in {folder}"
        raise Preempted(from_main(f"{what}; {where}", self.process))


def first_model(config, saved: dict | None):
    """The model with the weights that the run begins with: a checkpoint's, pretrained, or new."""
    model = build_resmlp(config)
    if saved:
        try:
            load_state(model, saved["model"])
        except WeightsError as error:
            raise CheckpointError(f"-resume {config.MODEL.RESUME}: another model: {error}")
    elif config.MODEL.PRETRAINED:
        for note in load_pretrained(model, config, new_head=True):
            _log.info(note)
    elif config.TRAIN.FREEZE:
        raise ConfigError(
            f"TRAIN.FREEZE {config.TRAIN.FREEZE} would freeze random weights; give -pretrained FILE"
        )
    return model
