"""Random erasing of a whole batch on the device (arXiv 1708.04896), with timm's distributions.

The boxes are drawn by NumPy on the host. The device touches only what they cross: rows of pixels
are gathered, filled between two columns, and put back, without a loop over images.
"""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import math
from dataclasses import dataclass

import numpy as np
import paddle

AREA = (0.02, 1 / 3)  # share of the image
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))  # height / width
TRIES = 10


def draw_boxes(
    rng: np.random.Generator, batch: int, height: int, width: int, prob: float, max_count: int = 1
) -> np.ndarray:
    """Boxes to erase: int64 ``[B, max_count, 4]``, top, bottom, left, right; the second and last
    exclusive. A box that is not there is empty.

    An image is chosen with probability ``prob`` and gets 1 to ``max_count`` boxes, among which the
    area is divided. Area and aspect ratio (uniform, log-uniform) are drawn until the box fits;
    after `TRIES` there is none.
    """
    count = rng.integers(1, max_count + 1, size=(batch, 1))
    wanted = (rng.random((batch, 1)) < prob) & (np.arange(max_count) < count)
    tries = (batch, max_count, TRIES)
    area = rng.uniform(*AREA, size=tries) * (height * width) / count[:, :, None]
    aspect = np.exp(rng.uniform(*LOG_ASPECT, size=tries))
    h = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    w = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (h < height) & (w < width)
    first = fits.argmax(axis=2)[:, :, None]
    fits, h, w = (np.take_along_axis(a, first, axis=2)[:, :, 0] for a in (fits, h, w))
    exists = wanted & fits
    h, w = h * exists, w * exists
    top = rng.integers(0, height - h + 1)
    left = rng.integers(0, width - w + 1)
    return np.stack([top, top + h, left, left + w], axis=2)


@dataclass(eq=False)
class RandomErasing:
    """Erases boxes of normalised images.

    `mode` is what fills a box: ``const`` zero, the mean of the normalised data; ``rand`` a random
    colour, normal in each channel; ``pixel`` normal noise.
    """

    prob: float = 0.25  # that an image is erased
    mode: str = "pixel"
    max_count: int = 1  # boxes of an image
    split: bool = False  # leave the first half of a batch alone (timm's two splits)

    def plan(self, rng, batch: int, channels: int, height: int, width: int) -> list[np.ndarray]:
        """What `apply` needs on the device, int32: four arrays for each box that an image may have.

        With R the rows of pixels that boxes cross, they are the rows ``[R]`` of B * C * H, their
        planes ``[R]`` of B * C and images ``[R]``, and the columns inside, ``[B, W]``.
        """
        boxes = draw_boxes(rng, batch, height, width, self.prob, self.max_count)
        if self.split:
            boxes[: batch // 2] = 0
        arrays, y, x = [], np.arange(height), np.arange(width)
        for number in range(self.max_count):
            top, bottom, left, right = boxes[:, number].T[..., None]
            crossed = (y >= top) & (y < bottom)  # [B, H]
            rows = np.flatnonzero(np.repeat(crossed, channels, axis=0))
            planes = rows // height
            inside = (x >= left) & (x < right)
            if rows.size:
                arrays += [rows, planes, planes // channels, inside]
        return [array.astype("int32") for array in arrays]

    def apply(self, images: paddle.Tensor, plan: list[paddle.Tensor]) -> paddle.Tensor:
        """Erases boxes of images ``[B, C, H, W]``, not in place; noise is of Paddle's generator."""
        width = images.shape[3]
        pixels = images.reshape([-1, width])  # [B * C * H, W]
        for rows, planes, owners, inside in zip(*[iter(plan)] * 4):
            inside = paddle.gather(inside, owners).astype("bool")  # not every gather takes bool
            noise = self._noise(planes, images.shape[0] * images.shape[1], width)
            filled = paddle.where(inside, noise, paddle.gather(pixels, rows))
            pixels = paddle.scatter(pixels, rows, filled)
        return pixels.reshape(images.shape)

    def _noise(self, planes: paddle.Tensor, count: int, width: int) -> paddle.Tensor:
        """What to fill rows with, ``[R, W]``; ``planes`` ``[R]`` says whose they are."""
        shape = [planes.shape[0], width]
        if self.mode == "const":
            return paddle.zeros(shape)
        if self.mode == "pixel":
            return paddle.randn(shape)
        return paddle.gather(paddle.randn([count, 1]), planes).expand(shape)  # a colour a plane
