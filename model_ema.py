"""Exponential moving average of a model's weights."""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import copy

import paddle
from paddle import nn


class ModelEma:
    """Keeps a second model whose weights trail those of the first, from what that holds now.

    Every rank makes the same update from the same weights, without communication. ``decay`` is the
    share of the old average that a step keeps; ``warmup`` starts with less, so that the random
    first weights are soon forgotten.
    """

    def __init__(self, model: nn.Layer, decay: float, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        self.model = copy.deepcopy(model)
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.stop_gradient = True
        pairs = zip(self.model.parameters(), model.parameters())
        self._pairs = [(average, p) for average, p in pairs if not p.stop_gradient]  # not frozen
        if paddle.get_device() == "cpu":
            return
        # Side by side they are updated in one launch instead of one for each.
        averages, parameters = zip(*self._pairs)
        joined, start = paddle.concat([average.flatten() for average in averages]), 0
        for average in averages:
            part = joined._slice(start, start + average.size)  # shares the memory
            part.get_tensor()._set_dims(average.shape)
            part._share_buffer_to(average)
            start += average.size
        self._pairs = [(joined, parameters)]

    def decay_at(self, step: int) -> float:
        """The decay of update number ``step``, from 0; its warmup is TensorFlow's rule."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @paddle.no_grad()
    def update(self, step: int, applied: paddle.Tensor | None = None) -> None:
        """Moves the average towards the model, after ``step`` optimizer steps and this one, if
        ``applied`` (on the device) says that a loss scaler let it happen.
        """
        weight = paddle.full([], 1.0 - self.decay_at(step))  # of a number lerp_ makes one for each
        if applied is not None:
            weight = weight * applied.astype("float32")
        for average, parameter in self._pairs:
            if isinstance(parameter, tuple):
                parameter = paddle.concat([p.flatten() for p in parameter])
            average.lerp_(parameter, weight)
