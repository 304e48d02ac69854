"""The learner: everything that an optimizer step changes. It knows no epoch, no file and no log."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import paddle
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

from batch_augment import BatchAugment
from distillation import build_teacher
from losses import DistillationLoss, build_criterion
from model_ema import ModelEma
from optimizer import build_optimizer, clip_gradients, load_optimizer_state, optimizer_state
from parallel.process import Process, wait_for_all
from resmlp import load_state
from training.precision import LossScaler, autocast, choose_precision
from training.progress import StepRecord


class Objective:
    """The training loss: the criterion, and where there is a teacher its part."""

    def __init__(self, config, labels: Sequence[int] = ()):
        self.criterion = build_criterion(config, labels)
        self.teacher, train = None, config.TRAIN
        if train.DISTILLATION_TYPE != "none":
            self.teacher, kind = build_teacher(config), train.DISTILLATION_TYPE
            self.distill = DistillationLoss(kind, train.DISTILLATION_ALPHA, train.DISTILLATION_TAU)

    def __call__(self, logits, images, targets) -> paddle.Tensor:
        loss = self.criterion(logits, targets)
        return loss if self.teacher is None else self.distill(loss, logits, self.teacher(images))


class Learner:
    """A model in training, and its optimizer `step`.

    The order of building matters: the EMA starts from the weights that the model holds, and a
    teacher draws random numbers and shifts Paddle's names, so it comes last. ``saved`` is what
    `state` returned, from a checkpoint; ``labels`` are for TRAIN.CLASS_WEIGHTS.
    """

    def __init__(self, config, process: Process, model, saved=None, labels=()):
        self.config, self.process, self.model = config, process, model
        train = config.TRAIN
        self.ema = None
        if train.MODEL_EMA:
            self.ema = ModelEma(model, train.MODEL_EMA_DECAY, train.MODEL_EMA_WARMUP)
        self.optimizer = build_optimizer(config, model)
        self.scaler = LossScaler(choose_precision(config, process.on_gpu)[0] == "float16")
        self._resumed_optimizer: dict = {}  # until the first step
        if saved:
            load_optimizer_state(self.optimizer, model, saved["optimizer"])
            self._resumed_optimizer = saved["optimizer"]
            if self.ema is not None:
                load_state(self.ema.model, saved.get("model_ema", saved["model"]))
            if saved["scaler"] and self.scaler.is_enable():
                self.scaler.load_state_dict(saved["scaler"])
        self.augment = BatchAugment(config)
        self.objective = Objective(config, labels)
        self.network = self.model
        if process.world > 1:  # gradients are averaged over ranks, in buckets of 25 MB
            wait_for_all(process)  # starting may take one rank longer than a collective waits
            self.network = paddle.DataParallel(self.model)

    def step(
        self, window: Sequence, lr: float, rng, number: int, stop_requested: bool = False
    ) -> StepRecord:
        """Makes an optimizer step along the mean gradient of an accumulation window of batches.

        Where the numbers are read at once, on a CPU and under NONFINITE skip, a step that is not
        finite leaves the weights as they were. float16's scaler does so by itself. ``number``
        counts the steps before this one; by the record all ranks learn of a ``stop_requested``.
        """
        loss, norm = self.gradients(window, rng)
        totals = paddle.stack([loss, paddle.full_like(loss, float(stop_requested))])
        if self.process.world > 1:  # all ranks decide alike
            paddle.distributed.all_reduce(totals)
        numbers = paddle.stack([loss, *totals.unbind(), norm.astype("float64")])
        record = StepRecord(number, lr, [i for batch in window for i in batch.indices], numbers)
        read_at_once = not self.process.on_gpu or self.config.TRAIN.NONFINITE == "skip"
        # A scaler has to know of every step.
        if not (read_at_once and not record.finite) or self.scaler.is_enable():
            self.optimizer.set_lr(lr)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._resumed_optimizer = {}  # Paddle's own copy is complete now
            if self.ema is not None:
                applied = paddle.isfinite(norm) if self.scaler.is_enable() else None
                self.ema.update(number, applied)
        self.optimizer.clear_grad(set_to_zero=False)  # zeros would be added to
        return record

    def gradients(self, window: Sequence, rng: np.random.Generator) -> tuple:
        """Leaves the clipped gradients in the parameters; arguments as those of `step`.

        Returns, on the device, the sum of the losses of this rank's images, float64, and the norm
        of the gradient over all ranks before clipping, float32.
        """
        total = sum(len(batch.indices) for batch in window)
        fused = self.config.TRAIN.RECOMPUTE and self.process.world > 1
        losses = []
        for number, batch in enumerate(window):
            images, targets = self.augment(batch.images, batch.labels, rng)
            local = self.process.world > 1 and (fused or number + 1 < len(window))
            unshared = self.network.no_sync() if local else contextlib.nullcontext()
            with unshared, autocast(self.config, self.process.on_gpu):
                loss = self.forward(images, targets)
                # Each image of the window weighs the same, whatever the size of its batch.
                self.scaler.scale(loss * (len(batch.indices) / total)).backward()
            losses.append(loss.detach().astype("float64") * len(batch.indices))
        if fused:  # recomputation in backward and DataParallel's hooks exclude each other
            fused_allreduce_gradients(self.model.parameters(), None)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model.parameters(), self.config.TRAIN.GRAD_CLIP)
        return paddle.add_n(losses), norm

    def forward(self, images: paddle.Tensor, targets: paddle.Tensor) -> paddle.Tensor:
        """The mean training loss of augmented images ``[B, 3, H, W]``."""
        return self.objective(self.network(images), images, targets)

    def state(self) -> dict:
        """All that a step changes, as trees of tensors, for a checkpoint."""
        state = {
            "model": self.model.state_dict(),
            # Before its first step, Paddle 2's optimizer does not show what it was given.
            "optimizer": optimizer_state(self.optimizer, self.model) or self._resumed_optimizer,
            "scaler": self.scaler.state_dict(),
        }
        if self.ema is not None:
            state["model_ema"] = self.ema.model.state_dict()
        return state
