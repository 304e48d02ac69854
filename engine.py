"""Training and evaluation: the only loops of the project, the same for one process and many."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable

from cli.errors import ConfigError, TrainingError
from datasets import build_loader
from loading.classes import UNKNOWN, with_num_classes
from optimizer import Schedule
from parallel.process import Process, from_main, main_first, prepare_process
from storage import checkpoints
from storage.adapt import read_pretrained
from storage.run_folder import RunFolder, choose_folder
from training.evaluation import Metrics, Result, evaluate, run_evaluation
from training.learner import Learner
from training.precision import choose_precision, predictor
from training.progress import Monitor, Progress
from training.report import Report
from training.saving import Saver, first_model, first_weights
from utils import Meter, ProgressLine, seed_everything, step_rng

_log = logging.getLogger("resmlp")


def run(
    config, on_step: Callable[[int], None] = lambda step: None, folder: str | None = None
) -> Result:
    """Trains, or with ``config.EVAL`` evaluates, as a frozen config says.

    ``on_step`` is called with the number of optimizer steps done. UserError is what the user can
    mend; Preempted comes after SIGTERM or Ctrl-C, when everything is saved.
    """
    process = prepare_process()
    weights = None
    if config.EVAL:
        if not config.MODEL.PRETRAINED:
            raise ConfigError("-eval needs weights: give them with -pretrained FILE")
        weights = read_pretrained(config.MODEL.PRETRAINED, config.MODEL.PRETRAINED_KEY, process)
    config = with_num_classes(config, weights.classes if weights else UNKNOWN)
    if process.main and folder is None:
        folder = str(choose_folder(config))
    folder = from_main(folder, process)
    folder = RunFolder(folder, process.rank, not config.EVAL, config.MODEL.RESUME)
    with contextlib.closing(folder):
        if config.AMP:
            if config.AMP_LEVEL != "O1":
                raise ConfigError(
                    f"AMP_LEVEL is {config.AMP_LEVEL}, whose half-precision weights are no longer "
                    f"offered: set AMP_LEVEL O1 (float32 weights, products in half precision)"
                )
            _log.info(choose_precision(config, process.on_gpu)[1])
        if config.EVAL:
            return run_evaluation(config, process, folder, weights)
        if config.MODEL.NUM_CLASSES == 0:
            raise ConfigError("MODEL.NUM_CLASSES is 0 (features only); training needs classes")
        return Trainer(config, process, folder).fit(on_step)


class Trainer:
    """A training run: built, restored, and then `fit`."""

    def __init__(self, config, process: Process, folder: RunFolder):
        self.config, self.process = config, process
        self.saver = Saver(config, process, folder)
        saved = self.saver.choose()
        weights, known = first_weights(config, saved, process)
        share = process.rank, process.world, _log.info
        self.train_loader = build_loader(config, "train", *share, known)
        self.val_loader = build_loader(config, "val", *share, known)
        dataset, val = self.train_loader.dataset, self.val_loader.dataset
        images = {"train": dataset.files.fingerprint(), "val": val.files.fingerprint()}
        self.saver.data = {"classes": dataset.classes.record(), "images": images}
        batches = len(self.train_loader)
        self.schedule = Schedule(config, batches, process.world, len(dataset))
        seed_everything(config.SEED)
        model, labels = first_model(config, saved, weights, dataset.classes), dataset.files.labels
        self.learner = Learner(config, process, model, saved, labels)
        done = saved["epoch"] if saved else config.TRAIN.LAST_EPOCH
        self.progress = Progress(epoch=done, step=done * self.schedule.steps_per_epoch)
        if saved:
            self.progress = self.saver.resume(saved, self.progress)
        self.report = Report(config, process, folder, self.schedule, self.progress.step)
        scaler, files = self.learner.scaler, dataset.files
        self.monitor = Monitor(config, process, self.progress, scaler, folder.path, files)

    def fit(self, on_step: Callable[[int], None] = lambda step: None) -> Result:
        config, process, progress = self.config, self.process, self.progress
        epochs, metrics = self.schedule.total_epochs, None
        try:
            datasets = self.train_loader.dataset, self.val_loader.dataset
            self.report.log_start(self.learner, progress, *datasets)
            if teacher := self.learner.objective.teacher:
                if line := teacher.match(datasets[0].classes):
                    _log.info(line)
                if progress.epoch < epochs:
                    self.evaluate({"teacher": teacher})
            # rank 0 decides: it may alone know the best score
            while not from_main(progress.ended(epochs, config.TRAIN.EARLY_STOP), process):
                self._train_epoch(on_step)
                metrics = self._finish_epoch() or metrics
            self.saver.finish()
        except TrainingError:  # of all ranks: a launcher would end rank 0 when another has ended
            with main_first(process):
                self.saver.close()
            raise
        finally:
            self.saver.close()
            self.report.close()
            self.monitor.signal.close(process.world > 1)  # a rank's signals may come late
        self.report.done(progress, self.learner.ema is not None)
        return Result.of(self.report.folder.path, process.rank, metrics, progress.best_top1)

    def _train_epoch(self, on_step: Callable[[int], None]) -> None:
        """Trains the rest of an epoch, from where `progress` stands."""
        progress, loader, steps = self.progress, self.train_loader, self.schedule.steps_per_epoch
        accum = self.schedule.accum_iter
        loader.sampler.set_epoch(progress.epoch, progress.samples)
        if len(loader) == 0:
            return  # the run was stopped in the evaluation of this epoch
        self.learner.network.train()
        meter = Meter()
        bar = ProgressLine(f"epoch {progress.epoch + 1}", self.process.main)
        with contextlib.closing(iter(loader)) as batches:  # ends the workers in any case
            for step in range(steps - -(-len(loader) // accum), steps):
                with meter.waiting():
                    window = list(itertools.islice(batches, accum))
                self._train_step(step, window, meter, on_step)
                bar(step + 1, steps)
            next(batches, None)  # lets the loader end its pass: it then lists skipped images
        bar.end()

    def _train_step(self, step: int, window: list, meter: Meter, on_step: Callable) -> None:
        """One optimizer step over an accumulation window; reports, saves and stops where due."""
        config, progress, monitor = self.config, self.progress, self.monitor
        key = config.SEED, self.process.rank, progress.epoch, step
        if progress.samples == 0:
            self.report.images(self.learner, window[0], step_rng(*key), progress.step)
        lr, stop = self.schedule.rate(progress.epoch, step), monitor.signal.received
        record = self.learner.step(window, lr, step_rng(*key), progress.step, stop)
        due = monitor.add(record)
        meter.images += len(record.indices)
        progress.step += 1
        progress.samples += self.schedule.samples_per_step
        on_step(progress.step)
        end = step + 1 == self.schedule.steps_per_epoch
        report = end or (step + 1) % config.REPORT_FREQ == 0
        save = not end and config.SAVE_STEPS and progress.step % config.SAVE_STEPS == 0
        if report or save or due:
            monitor.count_or_raise()
        if report:
            self.saver.finish(block=False)
            self.report.step(progress, monitor.norm, meter, step, lr)
        if save or monitor.stop:
            self.saver.save(self.learner, progress)
        if monitor.stop:
            self.saver.stop(f"stopped after step {progress.step}")

    def _finish_epoch(self) -> Metrics | None:
        """Evaluates where that is due, records the epoch and saves."""
        config, progress, learner = self.config, self.progress, self.learner
        epoch = progress.epoch + 1  # counted from 1
        last = epoch == self.schedule.total_epochs
        raw, ema, names = None, None, []
        if last or epoch % config.VALIDATE_FREQ == 0:
            # an interruption of the evaluation costs no training
            self.saver.save(learner, progress)
            learner.model.eval()
            models = {f"epoch {epoch}": learner.model}
            if learner.ema is not None:
                models[f"epoch {epoch}, EMA"] = learner.ema.model
            raw, ema = [*self.evaluate(models), None][:2]
            found = ema or raw
            if progress.is_best(found.score(config.BEST_METRIC), found.top1):
                names.append(checkpoints.BEST)
        if last or epoch % config.SAVE_FREQ == 0:
            names.append(checkpoints.epoch_name(epoch))
        self.report.epoch(learner, progress, raw, ema)
        progress.epoch, progress.samples, progress.seconds = epoch, 0, 0.0
        progress.epoch_loss, progress.epoch_count, progress.timed_images = 0.0, 0, 0
        self.saver.save(learner, progress, *names)
        return ema or raw

    def evaluate(self, models: dict[str, Callable]) -> list[Metrics]:
        """Metrics of models, by labels for the log, on the validation images; saves nothing."""
        found = evaluate(
            [predictor(self.config, self.process.on_gpu, model) for model in models.values()],
            self.val_loader,
            self.process,
            self.config.MODEL.NUM_CLASSES,
            stop=lambda: self.monitor.signal.received,
            label=f"{next(iter(models))}: evaluation",
        )
        if found is None:
            self.saver.stop("stopped in evaluation")
        for label, metrics in zip(models, found):
            _log.info(f"{label}: {metrics}")
        return found
