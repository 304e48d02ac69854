"""Training losses: (binary) cross-entropy to smoothed or mixed targets, and distillation.

All of them compute in float32, whatever the logits are, and return the mean over the batch.
"""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F

from cli.errors import ConfigError
from mixup import smooth_one_hot


def build_criterion(config, labels: Sequence[int] = ()) -> CrossEntropy | BinaryCrossEntropy:
    """The loss of TRAIN.LOSS; ``labels`` are those of the training images (`class_weights`)."""
    train, weights = config.TRAIN, class_weights(config, labels)
    if train.LOSS == "ce":
        return CrossEntropy(train.SMOOTHING, weights)
    return BinaryCrossEntropy(train.SMOOTHING, train.BCE_TARGET_THRESHOLD, weights)


def class_weights(config, labels: Sequence[int] = ()) -> paddle.Tensor | None:
    """TRAIN.CLASS_WEIGHTS as float32 ``[K]``; None for ``none``.

    ``balanced`` weights a class by the inverse of its share of the labels, so that the mean weight
    of an image is 1 (scikit-learn's formula, over the classes that occur; the others have 1).
    ConfigError if there are not K numbers.
    """
    weights, classes = config.TRAIN.CLASS_WEIGHTS, config.MODEL.NUM_CLASSES
    if weights == "none":
        return None
    if weights == "balanced":
        counts = np.bincount(np.asarray(labels, "int64"), minlength=classes)
        balanced = len(labels) / np.maximum(counts * np.count_nonzero(counts), 1)
        weights = np.where(counts, balanced, 1.0)
    if len(weights) != classes:
        raise ConfigError(
            f"TRAIN.CLASS_WEIGHTS has {len(weights)} numbers, MODEL.NUM_CLASSES is {classes}"
        )
    return paddle.to_tensor(np.asarray(weights, "float32"))


@dataclass(eq=False)
class CrossEntropy:
    """Cross-entropy ``[B, K]``, ``[B]`` -> the mean over images, float32.

    Targets are labels (int64 ``[B]``), which are smoothed here, or the classes' shares ``[B, K]``,
    which mixup has smoothed already. With ``weights`` ``[K]`` the loss of an image is multiplied by
    the weight of its class, that of a mixed one is the sum over its classes of share times weight
    times loss. (PyTorch weighs the targets' sum over classes, in which the smoothed share of a rare
    class, the same in every image, can outweigh the labels.)
    """

    smoothing: float = 0.0
    weights: paddle.Tensor | None = None

    def __call__(self, logits: paddle.Tensor, targets: paddle.Tensor) -> paddle.Tensor:
        log_probabilities = F.log_softmax(logits.astype("float32"))
        _, targets, weights = _weigh(targets, logits, self.smoothing, self.weights)
        losses = -(targets * log_probabilities).sum(axis=1)
        return (losses if weights is None else losses * weights).mean()


@dataclass(eq=False)
class BinaryCrossEntropy:
    """One yes-or-no question for each class, as in ResNet strikes back (arXiv 2110.00476).

    The mean is over images *and* classes, as timm's. Targets above ``target_threshold`` become 1
    and all others 0, so that every class in a mixed image is fully present (the article used 0.2).
    """

    smoothing: float = 0.0
    target_threshold: float | None = None
    weights: paddle.Tensor | None = None

    def __call__(self, logits: paddle.Tensor, targets: paddle.Tensor) -> paddle.Tensor:
        dense, targets, weights = _weigh(targets, logits, self.smoothing, self.weights)
        if self.target_threshold is not None:
            targets = (dense > self.target_threshold).astype("float32")
        losses = F.binary_cross_entropy_with_logits(
            logits.astype("float32"), targets, reduction="none"
        )
        return (losses if weights is None else losses * weights.unsqueeze(1)).mean()


@dataclass(eq=False)
class DistillationLoss:
    """``(1 - alpha) * loss of the labels + alpha * distillation``, on the student's one output.

    ``hard`` is cross-entropy to the teacher's most probable class; ResMLP's distilled models
    (paper, sections 3.1 and 3.2) use it with alpha 0.5. ``soft`` is KL(teacher || student) at
    temperature tau, times tau squared (which keeps the size of its gradient), *averaged over images
    and classes* as in DeiT's code: K times smaller than a mean over images, so choose alpha near 1.
    """

    kind: str = "hard"
    alpha: float = 0.5
    tau: float = 1.0

    def __call__(self, loss, logits: paddle.Tensor, teacher: paddle.Tensor) -> paddle.Tensor:
        """Joins the loss to the labels and that to the teacher's logits, ``[B, K]`` both."""
        logits, teacher = logits.astype("float32"), teacher.detach().astype("float32")
        if self.kind == "hard":
            distillation = F.cross_entropy(logits, teacher.argmax(axis=1))
        else:
            student = F.log_softmax(logits / self.tau)
            teacher = F.log_softmax(teacher / self.tau)
            distillation = (teacher.exp() * (teacher - student)).mean() * self.tau**2
        return loss * (1 - self.alpha) + distillation * self.alpha


def _weigh(targets, logits: paddle.Tensor, smoothing: float, weights) -> tuple:
    """Float32 targets ``[B, K]``, from labels or as they are; the same with the shares of a mixed
    image weighted; weights of the images ``[B]`` or None.
    """
    if targets.ndim == 1:
        targets = smooth_one_hot(targets, logits.shape[1], smoothing)
    targets = targets.astype("float32")
    if weights is None:
        return targets, targets, None
    even = smoothing / targets.shape[1]
    parts = (targets - even) / (1 - smoothing) * weights
    total = parts.sum(axis=1, keepdim=True)
    return targets, parts / total.clip(min=1e-12) * (1 - smoothing) + even, total[:, 0]
