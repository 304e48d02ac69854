"""Image pipelines: pixels ``uint32 [H, W]`` (`read_pixels`) in, a uint8 array ``[H, W, 3]`` out.

Normalising, random erasing and mixing happen later, in batches, on the device. Everything random
comes from the `numpy.random.Generator` that the caller passes, and what is drawn (`draw_crop`,
`ColorJitter.draw`, `Policy.draw`) is separate from what is done to the pixels. (No Paddle.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from augment import OPS, Policy, build_policy, rand_augment
from cpu.resample import operations
from loading.images import BadImage

_RESAMPLE = {
    name: Image.Resampling[name.upper()]
    for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
}
# Affine operations can interpolate with the first three only; `random` draws one per operation.
_TRAIN_RESAMPLES = {name: (_RESAMPLE[name],) for name in ("nearest", "bilinear", "bicubic")}
_TRAIN_RESAMPLES["random"] = (_RESAMPLE["bilinear"], _RESAMPLE["bicubic"])

Box = tuple[int, int, int, int]  # left, top, right, bottom, pixels


def resized_size(width: int, height: int, short: int) -> tuple[int, int]:
    """Width and height after resizing the short side to `short`; the long one is rounded down."""
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def center_box(width: int, height: int, size: int) -> Box:
    """The central square of `size` of an image that is not smaller; odd margins as torchvision."""
    left, top = round((width - size) / 2), round((height - size) / 2)
    return left, top, left + size, top + size


# Of a resized image, in sides of the crop: 10 GB of pixels may hide in a file of 157 bytes.
_LONGEST = 100


@dataclass(eq=False)
class EvalTransform:
    """Resizes the short side to `short` and crops the centre, as timm does on PIL; nothing random.

    BadImage, naming `path`, if the resized image would be over 100 times as long as the crop.
    """

    size: int
    short: int
    resample: int

    def __call__(self, pixels: np.ndarray, rng=None, path: str = "image") -> np.ndarray:
        height, width = pixels.shape
        size = resized_size(width, height, self.short)
        if max(size) > _LONGEST * self.size:
            raise BadImage(
                path,
                f"{width} x {height} pixels, too narrow: resized to {size[0]} x "
                f"{size[1]}, longer than {_LONGEST} crops of {self.size}; cut it or leave it out",
            )
        crop = center_box(*size, self.size)
        return operations().to_rgb(operations().resize(pixels, size, self.resample, crop))


def draw_crop(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """The box of a random resized crop (Inception; torchvision's and timm's formula).

    `scale` bounds its part of the area, `ratio` width / height (log-uniform). After ten draws that
    do not fit inside the image it is the largest central one.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(*log_ratio))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, left + w, top + h

    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclass(eq=False)
class ColorJitter:
    """torchvision's `ColorJitter(s, s, s)`: brightness, contrast, saturation, in random order."""

    NAMES = ("Brightness", "Contrast", "Color")  # among `OPS` of augment.py

    strength: float

    def draw(self, rng: np.random.Generator) -> list[tuple[int, float]]:
        """Index into `NAMES` and factor, in the order of application."""
        order = rng.permutation(len(self.NAMES))
        factors = rng.uniform(max(0.0, 1 - self.strength), 1 + self.strength, len(self.NAMES))
        return [(int(op), float(factor)) for op, factor in zip(order, factors)]

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for op, factor in self.draw(rng):
            pixels = OPS[self.NAMES[op]].pixels(pixels, factor)
        return pixels


@dataclass(eq=False)
class TrainTransform:
    """Random resized crop, flips, then the augmentations, in timm's order."""

    size: int
    scale: tuple[float, float]  # see `draw_crop`
    ratio: tuple[float, float]
    hflip: float  # probabilities
    vflip: float
    resamples: Sequence[int]  # that the crop draws from
    augmentations: Sequence[Policy | ColorJitter]

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        box = draw_crop(*pixels.shape[::-1], self.scale, self.ratio, rng)
        resample = self.resamples[rng.integers(len(self.resamples))]
        pixels = operations().resize(pixels, (self.size, self.size), resample, box=box)
        if rng.random() < self.hflip:
            pixels = pixels[:, ::-1]
        if rng.random() < self.vflip:
            pixels = pixels[::-1]
        pixels = np.ascontiguousarray(pixels)
        for augment in self.augmentations:
            pixels = augment(pixels, rng)
        return operations().to_rgb(pixels)


def build_eval_transform(config) -> EvalTransform:
    """The evaluation pipeline: `pixels -> uint8 [H, W, 3]`."""
    data = config.DATA
    Image.MAX_IMAGE_PIXELS = data.MAX_IMAGE_PIXELS  # for `read_pixels`, in this process
    short = math.floor(data.IMAGE_SIZE / data.CROP_PCT)
    return EvalTransform(data.IMAGE_SIZE, short, _RESAMPLE[data.INTERPOLATION])


def build_augmentations(config) -> list[Policy | ColorJitter]:
    """The first that is on of THREE_AUGMENT (with colour jitter, as DeiT III), RAND_AUGMENT,
    AUTO_AUGMENT, colour jitter alone. ConfigError: bad policy.
    """
    train = config.TRAIN
    common = {
        "resamples": _TRAIN_RESAMPLES[config.DATA.TRAIN_INTERPOLATION],
        "fill": tuple(min(255, round(255 * mean)) for mean in config.DATA.IMAGENET_MEAN),
    }
    jitter = [ColorJitter(train.COLOR_JITTER)] if train.COLOR_JITTER else []

    if train.THREE_AUGMENT:
        return [build_policy("3a", "TRAIN.THREE_AUGMENT", **common), *jitter]
    if isinstance(train.RAND_AUGMENT, str):
        return [build_policy(train.RAND_AUGMENT, "TRAIN.RAND_AUGMENT", **common)]
    if train.RAND_AUGMENT:
        policy = rand_augment(
            layers=train.RAND_AUGMENT_LAYERS,
            level=train.RAND_AUGMENT_MAGNITUDE,
            level_std=train.RAND_AUGMENT_MAGNITUDE_STD,
            increasing=train.RAND_AUGMENT_INCREASING,
            probability=train.RAND_AUGMENT_PROB,
            **common,
        )
        return [policy]
    if train.AUTO_AUGMENT:
        text = "original" if train.AUTO_AUGMENT is True else train.AUTO_AUGMENT
        policy = build_policy(text, "TRAIN.AUTO_AUGMENT", **common)
        return [policy, *jitter] if text.startswith("3a") else [policy]
    return jitter


def build_train_transform(config) -> TrainTransform:
    """The training pipeline: `(pixels, np.random.Generator) -> uint8 [H, W, 3]`."""
    data, train = config.DATA, config.TRAIN
    Image.MAX_IMAGE_PIXELS = data.MAX_IMAGE_PIXELS  # for `read_pixels`, in this process
    return TrainTransform(
        size=data.IMAGE_SIZE,
        scale=tuple(train.CROP_SCALE),
        ratio=tuple(train.CROP_RATIO),
        hflip=train.HFLIP,
        vflip=train.VFLIP,
        resamples=_TRAIN_RESAMPLES[data.TRAIN_INTERPOLATION],
        augmentations=build_augmentations(config),
    )
