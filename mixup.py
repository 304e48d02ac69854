"""Mixup and CutMix of a whole batch on the device, and the smoothed targets, as timm's ``Mixup``.

Both are one operation: every pixel of an image moves towards the same pixel of its partner by a
share that is constant inside a box and zero outside. Mixup (arXiv 1710.09412) is a share of
1 - lambda and a box as large as the image; CutMix (arXiv 1905.04899) is 1 and a smaller box.
"""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F


def smooth_one_hot(labels: paddle.Tensor, num_classes: int, smoothing: float) -> paddle.Tensor:
    """Targets ``[B, K]``: smoothing / K, and 1 - smoothing more at the label."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


class Mix(NamedTuple):
    """What happens to ``n`` images: one row for the whole batch (n = 1), or one for each image.

    ``boxes`` ``[n, 4]``: top, bottom, left, right in pixels; bottom and right are exclusive.
    ``strength`` ``[n]``: the partner's share of a pixel inside the box; 0: not mixed.
    """

    boxes: np.ndarray
    strength: np.ndarray

    def own_share(self, height: int, width: int) -> np.ndarray:
        """``[n]`` an image's share of its target: lambda, corrected to the true area of the box."""
        top, bottom, left, right = self.boxes.T
        return 1 - self.strength * ((bottom - top) * (right - left)) / (height * width)


def cutmix_boxes(rng: np.random.Generator, own_share: np.ndarray, height: int, width: int):
    """Boxes ``[n, 4]`` of the image's shape, with a centre anywhere, cut off at its edges; a whole
    one covers 1 - lambda of the image. ``own_share`` is lambda, ``[n]``.
    """
    ratio = np.sqrt(1 - own_share)
    bounds = []
    for size in (height, width):
        length = (size * ratio).astype(np.int64)
        centre = rng.integers(size, size=len(own_share))
        bounds += [centre - length // 2, centre + (length + 1) // 2]
        bounds[-2:] = np.clip(bounds[-2:], 0, size)
    return np.stack(bounds, axis=1)


def cutmix_boxes_minmax(
    rng: np.random.Generator, count: int, height: int, width: int, minmax: tuple[float, float]
):
    """Boxes inside the image whose sides are uniform between two shares of the image's."""
    bounds = []
    for size in (height, width):
        low, high = int(size * minmax[0]), int(size * minmax[1])
        length = rng.integers(low, max(low + 1, high), size=count)
        start = rng.integers(0, size - length + 1)
        bounds += [start, start + length]
    return np.stack(bounds, axis=1)


@dataclass(eq=False)
class Mixup:
    """Mixes the images and targets of a batch with those of the batch in reverse order.

    The image in the middle of an odd batch stays as it is. (timm refuses odd batches.)
    """

    num_classes: int
    mixup_alpha: float = 0.8  # lambda of mixup is drawn from Beta(alpha, alpha); 0: no mixup
    cutmix_alpha: float = 1.0  # the same for the area of CutMix; 0: no CutMix
    cutmix_minmax: tuple[float, float] | None = None  # or bounds of the share of a side
    prob: float = 1.0  # that a row of the plan (batch, pair or image) is mixed at all
    switch_prob: float = 0.5  # of CutMix, where both are on
    mode: str = "batch"  # what shares a plan: the ``batch``, a ``pair``, or nothing (``elem``)
    smoothing: float = 0.1

    def __post_init__(self):
        cutmix = self.cutmix_alpha > 0 or self.cutmix_minmax is not None
        self.cutmix_prob = self.switch_prob if cutmix and self.mixup_alpha > 0 else float(cutmix)

    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int) -> Mix:
        """The plan for a batch of ``batch`` images of ``height`` x ``width`` pixels."""
        pairs = (batch + 1) // 2
        n = {"batch": 1, "pair": pairs, "elem": batch}[self.mode]
        is_cut = rng.random(n) < self.cutmix_prob
        is_on = rng.random(n) < self.prob
        mixup_share = rng.beta(self.mixup_alpha or 1, self.mixup_alpha or 1, size=n)
        if self.cutmix_minmax is None:
            cutmix_share = rng.beta(self.cutmix_alpha or 1, self.cutmix_alpha or 1, size=n)
            boxes = cutmix_boxes(rng, cutmix_share, height, width)
        else:
            boxes = cutmix_boxes_minmax(rng, n, height, width, self.cutmix_minmax)
        boxes = np.where(is_cut[:, None], boxes, [0, height, 0, width])
        strength = is_on * np.where(is_cut, 1.0, 1 - mixup_share)
        if self.mode == "pair":  # the plan of image i is also that of its partner
            order = np.arange(batch)
            order = np.minimum(order, order[::-1])
            boxes, strength = boxes[order], strength[order]
        return Mix(boxes, strength)

    def plan(self, rng: np.random.Generator, batch: int, height: int, width: int) -> list:
        """What `apply` needs on the device, float32 arrays; none where nothing is mixed.

        The partner's share of a pixel is a product: of rows ``[n, H, 1]``, columns ``[n, 1, W]``.
        Last comes an image's share of its target, ``[n, 1]``.
        """
        mix = self.draw(rng, batch, height, width)
        if not mix.strength.any():
            return []
        top, bottom, left, right = mix.boxes.T[..., None]
        y, x = np.arange(height), np.arange(width)
        rows = ((y >= top) & (y < bottom)) * mix.strength[:, None]
        columns = (x >= left) & (x < right)
        arrays = rows[:, :, None], columns[:, None, :], mix.own_share(height, width)[:, None]
        return [array.astype("float32") for array in arrays]

    def apply(self, images: paddle.Tensor, labels: paddle.Tensor, plan: list[paddle.Tensor]):
        """Mixes float32 images ``[B, C, H, W]``, and labels ``[B]`` to targets ``[B, K]``."""
        targets = smooth_one_hot(labels, self.num_classes, self.smoothing)
        if not plan:
            return images, targets
        rows, columns, own = plan
        # index_select and lerp: on CPU a seventh of the time of flip, and of assigning to a slice
        partner = paddle.arange(len(labels) - 1, -1, -1)
        share = (rows * columns).unsqueeze(1)  # [n, 1, H, W]
        images = paddle.lerp(images, paddle.index_select(images, partner), share)
        return images, paddle.lerp(paddle.index_select(targets, partner), targets, own)
