"""Training and evaluation: the only loops of the project, the same for one process and many.

    run(config)

`run` reads top to bottom: process, folder, data, model, weights, EMA, optimizer, restore, loop.
"""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import paddle
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

from batch_augment import BatchAugment
from cli.errors import CheckpointError, ConfigError, TrainingError, UserError, WeightsError
from datasets import build_loader, class_names
from distillation import build_teacher
from losses import build_criterion, build_distillation_loss
from model_ema import ModelEma
from optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    scaled_rate,
)
from parallel.process import (
    Preempted,
    Process,
    StopSignal,
    from_main,
    main_first,
    prepare_process,
    wait_for_all,
)
from resmlp import FLOAT32_LAYERS, build_resmlp, load_pretrained, load_state
from storage import checkpoints
from storage.run_folder import RunFolder, choose_folder
from training.dashboard import build_dashboard
from training.evaluation import Metrics, evaluate, write_report
from training.progress import Place, StepWatch
from utils import Meter, Normalize, ProgressLine, duration, memory_mb, seed_everything, step_rng

# Where the float16 loss scale starts. The usual 2**16 would flush most gradients behind a
# LayerScale of 1e-6 to zero (tests/test_amp.py); too high a start costs a skipped step a halving.
FLOAT16_LOSS_SCALE = 2.0**20
_log = logging.getLogger("resmlp")


def run(
    config,
    load_config: Callable | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> dict:
    """Trains, or with ``config.EVAL`` evaluates, as a frozen config says.

    Args:
        config: the resolved config.
        load_config: path of a YAML file -> config; a teacher that is a ResMLP needs it.
        on_step: called with the number of optimizer steps done, for a supervisor.

    Returns:
        ``folder``, ``rank``, and the last evaluation's ``top1``, ``top5`` and ``loss`` (of the EMA
        where there is one).

    Raises:
        UserError: anything that the user can mend, in one line.
        Preempted: after SIGTERM or Ctrl-C, when everything is saved.
    """
    process = prepare_process()
    folder = from_main(str(choose_folder(config)), process)
    folder = RunFolder(Path(folder), process.rank, not config.EVAL, config.MODEL.RESUME)
    with contextlib.closing(folder):
        return _run_in(folder, config, process, load_config, on_step)


def _run_in(folder: RunFolder, config, process: Process, load_config, on_step) -> dict:
    if config.AMP and not process.on_gpu:
        _log.info("AMP: Paddle has no mixed precision on CPU, running in float32")
    if config.EVAL:
        return _run_evaluation(config, process, folder)
    if config.MODEL.NUM_CLASSES == 0:
        raise ConfigError("MODEL.NUM_CLASSES is 0 (features only); training needs classes")
    return Trainer(config, process, folder, load_config, on_step).fit()


def autocast(config, process: Process):
    """The mixed-precision context that the config asks for, on GPU."""
    if not (config.AMP and process.on_gpu):
        return contextlib.nullcontext()
    return paddle.amp.auto_cast(level=config.AMP_LEVEL, dtype=config.AMP_DTYPE)


def _run_evaluation(config, process: Process, folder: RunFolder) -> dict:
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

    progress = ProgressLine("evaluation", process.main)
    metrics = evaluate(
        predict, loader, process, config.MODEL.NUM_CLASSES, config.EVAL_REPORT, progress=progress
    )
    progress.end()
    _log.info(f"evaluation of {config.MODEL.NAME}: {metrics}")
    result = {key: getattr(metrics, key) for key in ("top1", "top5", "loss", "images")}
    folder.write("eval.json", json.dumps(result, indent=1) + "\n")
    if config.EVAL_REPORT and process.main:
        try:
            paths = write_report(
                metrics, class_names(config), folder.path, config.MODEL.NUM_CLASSES
            )
        except OSError as error:
            raise UserError(f"{folder.path}: the report cannot be written: {error.strerror}")
        for path in paths:
            _log.info(f"wrote {path}")
    return {"folder": folder.path, "rank": process.rank, **result}


class Trainer:
    """A training run: built, restored, and then `fit`.

    The order of building matters: the EMA starts from loaded weights, and the student is
    initialised before a teacher draws random numbers.
    """

    def __init__(self, config, process: Process, folder: RunFolder, load_config, on_step):
        self.config, self.process, self.folder, self.on_step = config, process, folder, on_step
        saved = self._read_checkpoint()
        self.train_loader = build_loader(config, "train", process.rank, process.world, _log.info)
        self.val_loader = build_loader(config, "val", process.rank, process.world, _log.info)
        self.samples_per_step = config.DATA.BATCH_SIZE * process.world * config.TRAIN.ACCUM_ITER
        self.steps_per_epoch = -(-len(self.train_loader) // config.TRAIN.ACCUM_ITER)
        self.total_epochs = config.TRAIN.NUM_EPOCHS + config.TRAIN.COOLDOWN_EPOCHS
        done = config.TRAIN.LAST_EPOCH
        self.place = Place(epoch=done, step=done * self.steps_per_epoch)

        seed_everything(config.SEED)
        self.model = build_resmlp(config)
        if saved:
            self._load_saved_model(saved["model"])
        elif config.MODEL.PRETRAINED:
            for note in load_pretrained(self.model, config, new_head=True):
                _log.info(note)
        self.ema = None
        if config.TRAIN.MODEL_EMA:
            train = config.TRAIN
            self.ema = ModelEma(self.model, train.MODEL_EMA_DECAY, train.MODEL_EMA_WARMUP)
        self.optimizer, self.resumed_optimizer = build_optimizer(config, self.model), {}
        use_amp = config.AMP and process.on_gpu
        self.scaler = paddle.amp.GradScaler(
            enable=use_amp and config.AMP_DTYPE == "float16",
            init_loss_scaling=FLOAT16_LOSS_SCALE,
            incr_every_n_steps=1000,
        )
        if use_amp and config.AMP_LEVEL == "O2":  # float32 master weights, float32 checkpoints
            self.model, self.optimizer = paddle.amp.decorate(
                self.model,
                self.optimizer,
                level="O2",
                dtype=config.AMP_DTYPE,
                master_weight=True,
                save_dtype="float32",
                master_grad=True,  # unscaled in float16, the gradients behind LayerScale are 0
                excluded_layers=FLOAT32_LAYERS,
            )
        if saved:
            self._restore(saved)

        self.criterion = build_criterion(config)
        self.teacher = None
        if config.TRAIN.DISTILLATION_TYPE != "none":
            self.teacher = build_teacher(config, load_config)
        self.distill = build_distillation_loss(config)
        self.augment = BatchAugment(config)
        self.network = self.model
        if process.world > 1:  # gradients are averaged over ranks, in buckets of 25 MB
            wait_for_all(process)  # starting may take one rank longer than a collective waits
            self.network = paddle.DataParallel(self.model)
        self.dashboard = build_dashboard(config.DASHBOARD if process.main else "none", folder.path)
        self.writer = checkpoints.Writer()
        self.saved_place = replace(self.place) if saved else None  # of the last whole checkpoint
        self.signal = StopSignal()
        self.watch = StepWatch(
            config, process, self.place, self.scaler, folder.path, self.train_loader.dataset.files
        )

    # ------------------------------------------------------------------------------- loops
    def fit(self) -> dict:
        """Trains to the last epoch; returns what `run` returns."""
        try:
            self._say_hello()
            metrics = None
            for epoch in range(self.place.epoch, self.total_epochs):
                self._train_epoch(epoch)
                metrics = self._finish_epoch(epoch) or metrics
            self._finish_saving()
        except TrainingError:  # of all ranks: a launcher would end rank 0 when another has ended
            with main_first(self.process):
                self._finish_writing()
            raise
        finally:
            self._finish_writing()
            self.dashboard.close()
            self.signal.close()
        best, epoch = self.place.best_top1, self.place.best_epoch
        if epoch:
            path = self.folder.path / checkpoints.BEST
            whose = " of the EMA" if self.ema else ""
            _log.info(f"done: best top-1{whose} {best:.2f} %, after epoch {epoch}, in {path}")
        result = {"folder": self.folder.path, "rank": self.process.rank, "best_top1": best}
        if metrics is not None:
            result.update(top1=metrics.top1, top5=metrics.top5, loss=metrics.loss)
        return result

    def _train_epoch(self, epoch: int) -> None:
        """Trains the rest of an epoch, from where `place` stands."""
        first = self.place.samples // self.samples_per_step
        if first >= self.steps_per_epoch:
            return  # the run was stopped in the evaluation of this epoch
        self.network.train()
        self.train_loader.set_epoch(epoch, skip_batches=first * self.config.TRAIN.ACCUM_ITER)
        with contextlib.closing(iter(self.train_loader)) as batches:  # ends the workers in any case
            self._train_steps(epoch, first, batches)
            next(batches, None)  # lets the loader end its pass: it then lists skipped images

    def _train_steps(self, epoch: int, first: int, batches) -> None:
        config, place, accum = self.config, self.place, self.config.TRAIN.ACCUM_ITER
        meter, progress = Meter(), ProgressLine(f"epoch {epoch + 1}", self.process.main)
        for step in range(first, self.steps_per_epoch):
            size = min(accum, len(self.train_loader) - step * accum)
            with meter.waiting():
                window = [next(batches) for _ in range(size)]
            lr = self._learning_rate(epoch, step)
            self.optimizer.set_lr(lr)
            self._train_step(window, step_rng(config.SEED, self.process.rank, epoch, step), lr)
            meter.images += sum(len(batch.indices) for batch in window)
            place.step += 1
            place.samples = (step + 1) * self.samples_per_step
            self.on_step(place.step)

            end = step + 1 == self.steps_per_epoch
            report = end or (step + 1) % config.REPORT_FREQ == 0
            save = bool(config.SAVE_STEPS) and place.step % config.SAVE_STEPS == 0
            if report or save or self.watch.due():
                self.watch.finite()
            stop = self.watch.stop
            if report:
                self._report(meter, epoch, step, lr)
            if stop or (save and not end):
                self._save()
            if stop:
                self._stop(f"stopped after step {place.step}")
            progress(step + 1, self.steps_per_epoch)
        progress.end()

    def _train_step(self, window: list, rng: np.random.Generator, lr: float) -> None:
        """One optimizer step over the batches of an accumulation window."""
        total = sum(len(batch.indices) for batch in window)
        fused = self.config.TRAIN.RECOMPUTE and self.process.world > 1
        losses = []
        for number, batch in enumerate(window):
            images, targets = self.augment(batch.images, batch.labels, rng)
            if number == 0 and self.place.step % self.steps_per_epoch == 0:
                self._show_images(images)
            local = fused or number + 1 < len(window)
            with self._no_sync(local), autocast(self.config, self.process):
                loss = self._loss(images, targets)
                # Each image of the window weighs the same, whatever the size of its batch.
                self.scaler.scale(loss * (len(batch.indices) / total)).backward()
            losses.append(loss.detach().astype("float64") * len(batch.indices))
        if fused:  # recomputation in backward and DataParallel's hooks exclude each other
            fused_allreduce_gradients(self.model.parameters(), None)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model.parameters(), self.config.TRAIN.GRAD_CLIP)
        indices = [index for batch in window for index in batch.indices]
        self.watch.add(lr, paddle.add_n(losses), norm, self.signal.received, indices)
        apply = not self.watch.before_each_step or self.watch.finite()
        if apply or self.scaler.is_enable():  # a scaler skips by itself, and must be told
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                applied = paddle.isfinite(norm) if self.scaler.is_enable() else None
                self.ema.update(self.place.step, applied)
        self.optimizer.clear_grad()

    def _loss(self, images, targets) -> paddle.Tensor:
        logits = self.network(images)
        loss = self.criterion(logits, targets)
        return loss if self.teacher is None else self.distill(loss, logits, self.teacher(images))

    def _learning_rate(self, epoch: int, step: int) -> float:
        moment = epoch + step / self.steps_per_epoch
        return learning_rate(self.config, moment, self.samples_per_step)

    def _stop(self, what: str) -> NoReturn:
        """Ends the run on every rank, when the last save has ended.

        No rank ends before: a launcher that sees one end gives the others seconds to follow.
        """
        with main_first(self.process):
            self._finish_saving()
        folder = self.folder.path
        if self.saved_place is None:
            saved = f"nothing is saved yet in {folder}"
        elif self.saved_place.step == self.place.step:
            saved = f"saved in {folder}"
        else:
            saved = f"that could not be saved; the last checkpoint is in {folder}"
        raise Preempted(from_main(f"{what}; {saved}", self.process))

    def _no_sync(self, wanted: bool):
        """Keeps gradients local until the last batch of a window."""
        if wanted and self.process.world > 1:
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _finish_epoch(self, epoch: int) -> Metrics | None:
        """Evaluates where that is due, records the epoch and saves."""
        config, place = self.config, self.place
        record = {
            "kind": "epoch",
            "epoch": epoch + 1,
            "step": place.step,
            "lr": self._learning_rate(epoch, self.steps_per_epoch - 1),
            "train_loss": place.epoch_loss / max(place.epoch_count, 1),
            "images_per_second": round(place.timed_images / max(place.seconds, 1e-9), 1),
            "seconds": round(place.seconds, 1),
        }
        last = epoch + 1 == self.total_epochs
        metrics, names = None, []
        if last or (epoch + 1) % config.VALIDATE_FREQ == 0:
            self._save()  # an interruption of the evaluation costs no training
            self.model.eval()
            raw = metrics = self._evaluate(self.model, f"epoch {epoch + 1}")
            record.update(val_loss=raw.loss, val_top1=raw.top1, val_top5=raw.top5)
            if self.ema is not None:
                metrics = self._evaluate(self.ema.model, f"epoch {epoch + 1}, EMA")
                record.update(ema_loss=metrics.loss, ema_top1=metrics.top1, ema_top5=metrics.top5)
            self._finish_saving()  # which takes back a best that could not be saved
            if metrics.top1 > place.best_top1:
                place.best_top1, place.best_epoch = metrics.top1, epoch + 1
                names.append(checkpoints.BEST)
        if last or (epoch + 1) % config.SAVE_FREQ == 0:
            names.append(checkpoints.epoch_name(epoch + 1))
        self.folder.add_metrics(record)
        self._show_epoch(record)
        place.epoch, place.samples, place.seconds, place.timed_images = epoch + 1, 0, 0.0, 0
        place.epoch_loss, place.epoch_count = 0.0, 0
        self._save(*names)
        return metrics

    def _evaluate(self, model, label: str) -> Metrics:
        def predict(images):
            with autocast(self.config, self.process):
                return model(self.augment.normalize(images))

        progress = ProgressLine(f"{label}: evaluation", self.process.main)
        classes = self.config.MODEL.NUM_CLASSES
        metrics = evaluate(
            predict,
            self.val_loader,
            self.process,
            classes,
            stop=lambda: self.signal.received,
            progress=progress,
        )
        progress.end()
        if metrics is None:
            self._stop("stopped in evaluation")
        _log.info(f"{label}: {metrics}")
        return metrics

    # ----------------------------------------------------------------------------- reports
    def _report(self, meter: Meter, epoch: int, step: int, lr: float) -> None:
        """Logs a line, records it, and starts the next interval."""
        self._finish_saving(wait=False)
        place, world = self.place, self.process.world
        seconds, data_share = meter.read()
        loss = place.report_loss / max(place.report_count, 1)
        rate = meter.images * world / seconds
        place.seconds += seconds
        place.timed_images += meter.images * world
        memory = memory_mb(self.process)
        left = (self.total_epochs - epoch) * self.steps_per_epoch - step - 1
        eta = left * self.samples_per_step / rate
        skipped = f"  skipped {place.skipped_steps}" if place.skipped_steps else ""
        _log.info(
            f"epoch {epoch + 1}/{self.total_epochs}  step {step + 1}/{self.steps_per_epoch}  "
            f"lr {lr:.2e}  loss {loss:.4f}  grad norm {self.watch.norm:.2f}  {rate:.1f} images/s  "
            f"data {100 * data_share:.0f} %  {memory:.0f} MB  ETA {duration(eta)}{skipped}"
        )
        record = {"kind": "step", "epoch": epoch + 1, "step": place.step, "lr": lr, "loss": loss}
        speed = {
            "images_per_second": round(rate, 1),
            "data_share": round(data_share, 3),
            "memory_mb": round(memory),
        }
        norm = self.watch.norm if np.isfinite(self.watch.norm) else None  # JSON knows no infinity
        self.folder.add_metrics({**record, "grad_norm": norm, **speed})
        for name in ("lr", "loss"):
            self.dashboard.scalar(f"train/{name}", record[name], place.step)
        place.report_loss, place.report_count = 0.0, 0
        meter.restart()

    def _show_images(self, images: paddle.Tensor) -> None:
        """Sends the first images of an epoch, as the model gets them, to the dashboard."""
        if self.dashboard.active:
            row = np.concatenate(list(self.augment.normalize.undo(images[:8])), axis=1)
            self.dashboard.image("train/images", row, self.place.epoch + 1)

    def _show_epoch(self, record: dict) -> None:
        for name, value in record.items():
            if name.startswith(("val_", "ema_", "train_")):
                self.dashboard.scalar(f"epoch/{name}", value, record["epoch"])
        if self.dashboard.active:
            for name, parameter in self.model.named_parameters():
                if name.endswith((".ls1", ".ls2")):
                    self.dashboard.histogram(name, parameter.numpy(), record["epoch"])

    def _say_hello(self) -> None:
        config, place = self.config, self.place
        names = class_names(config)
        if names:
            self.folder.write("classes.txt", "".join(f"{name}\n" for name in names))
        self.folder.write("config.yaml", config.dump())
        count = sum(int(np.prod(p.shape)) for p in self.model.parameters())
        rate = scaled_rate(config, self.samples_per_step)
        images = len(self.train_loader.dataset), len(self.val_loader.dataset)
        _log.info(
            f"{config.MODEL.NAME}: {count:,} parameters; {images[0]} training and {images[1]} "
            f"validation images; {self.steps_per_epoch} steps of {self.samples_per_step} images an "
            f"epoch on {self.process.world} process{'es' * (self.process.world > 1)}; base "
            f"learning rate {rate:.3g}; output in {self.folder.path}"
        )
        memory = 1 / max(1 - config.TRAIN.MODEL_EMA_DECAY, 1e-9)  # steps
        if self.ema and not self.ema.warmup and memory > self.total_epochs * self.steps_per_epoch:
            _log.warning(
                f"TRAIN.MODEL_EMA_DECAY {config.TRAIN.MODEL_EMA_DECAY} remembers {memory:.0f} "
                f"steps, more than this run has: its EMA stays near the first weights; lower it, "
                f"or set TRAIN.MODEL_EMA_WARMUP True"
            )
        if self.teacher is not None and place.epoch < self.total_epochs:
            self._evaluate(self.teacher, "teacher")
        if place.epoch >= self.total_epochs:
            _log.info(f"this run has finished its {self.total_epochs} epochs already")

    # --------------------------------------------------------------------------- checkpoints
    def _save(self, *names: str) -> None:
        """Rank 0 saves under more ``names`` and as ``last``, in the background; the others wait
        until it has copied the state.
        """
        with main_first(self.process) as main:
            if not main:
                return
            self._finish_saving()
            try:
                self.folder.flush_metrics()
                state = checkpoints.to_numpy(self._state())
                self.writer.start(lambda: self._write(state, names))
            except CheckpointError as error:
                self._saving_failed(error)

    def _write(self, state: dict, names: tuple[str, ...]) -> None:
        path, config = self.folder.path / checkpoints.LAST, self.config
        checkpoints.save(state, path, names)
        self.saved_place = Place(**state["place"])
        checkpoints.rotate(self.folder.path, config.KEEP_CHECKPOINTS, config.KEEP_EVERY)

    def _finish_saving(self, wait: bool = True) -> None:
        try:
            self.writer.finish(wait)
        except CheckpointError as error:
            self._saving_failed(error)

    def _finish_writing(self) -> None:
        """At the end of a run: what has broken it off comes before a save that fails too."""
        try:
            self.writer.finish()
        except CheckpointError as error:
            _log.error(str(error))

    def _saving_failed(self, error: CheckpointError) -> None:
        if self.config.SAVE_FAILURE == "stop":
            raise error
        _log.error(f"{error}; going on without it (SAVE_FAILURE continue)")
        saved = self.saved_place or Place()
        self.place.best_top1, self.place.best_epoch = saved.best_top1, saved.best_epoch

    def _state(self) -> dict:
        state = {
            "model": self.model.state_dict(),
            # Before its first step, Paddle 2's optimizer does not show what it was given.
            "optimizer": optimizer_state(self.optimizer, self.model) or self.resumed_optimizer,
            "scaler": self.scaler.state_dict(),
            "epoch": self.place.epoch,
            "place": asdict(self.place),
            "metrics_lines": self.folder.metrics_lines,
            "config": self.config.dump(),
            "processes": self.process.world,
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.model.state_dict()
        return state

    def _read_checkpoint(self) -> dict | None:
        """What ``MODEL.RESUME`` names, read by every rank; None to start anew."""
        resume = self.config.MODEL.RESUME
        if not resume:
            return None
        if resume == "auto":  # rank 0 chooses, so that all take the same
            with main_first(self.process) as main:
                found = checkpoints.load_newest(self.folder.path) if main else None
            resume = from_main(str(found[1]) if found else None, self.process)
            if resume is None:
                _log.info(f"resume auto: no checkpoint in {self.folder.path} yet, starting anew")
                self.folder.rewind_metrics(0)
                return None
            if found:
                return found[0]
        return checkpoints.load(resume)

    def _load_saved_model(self, state: dict) -> None:
        try:
            load_state(self.model, state)
        except WeightsError as error:
            raise CheckpointError(f"-resume {self.config.MODEL.RESUME}: another model: {error}")

    def _go_back(self, saved: dict) -> None:
        """Where the user has chosen an earlier checkpoint of this very run."""
        if self.config.MODEL.RESUME == "auto" or not self.process.main:
            return
        chosen = checkpoints.find(self.config.MODEL.RESUME)
        if chosen.parent.samefile(self.folder.path) and chosen.name != checkpoints.LAST:
            checkpoints.go_back_to(chosen, saved)
            if not (self.folder.path / checkpoints.BEST).exists():
                self.place.best_top1, self.place.best_epoch = -1.0, 0

    def _restore(self, saved: dict) -> None:
        """Puts back all of a checkpoint but the model's weights."""
        load_optimizer_state(self.optimizer, self.model, saved["optimizer"])
        self.resumed_optimizer = saved["optimizer"]
        if self.ema is not None:
            load_state(self.ema.model, saved.get("model_ema", saved["model"]))
        if saved["scaler"] and self.scaler.is_enable():
            self.scaler.load_state_dict(saved["scaler"])
        self.place = Place(**saved["place"])
        self._go_back(saved)
        self.folder.rewind_metrics(saved["metrics_lines"])
        changes = checkpoints.config_changes(saved["config"], self.config.dump())
        if saved["processes"] != self.process.world:
            changes.append(f"processes {saved['processes']} -> {self.process.world}")
        for change in changes:
            if not change.startswith(("MODEL.RESUME ", "SAVE ")):
                _log.info(f"changed since the checkpoint: {change}")
        place = self.place
        where = f"epoch {place.epoch}" + (f" and {place.samples} images" if place.samples else "")
        _log.info(f"resumed after {where}, step {place.step}")
