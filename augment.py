"""RandAugment, AutoAugment and 3-Augment: what is drawn, and what it does to the pixels.

Names, ranges and strings (``rand-m9-mstd0.5-inc1``) are timm's. A *level* is its "magnitude": 10 is
the strongest that the papers use. Pixels are ``uint32 [H, W]`` (`cpu.resample`). Imports no Paddle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from cli.errors import ConfigError
from cpu.resample import from_image, operations, to_image


class DrawnOp(NamedTuple):
    """One decision: the operation, its argument (None where it has none), its interpolation."""

    name: str
    argument: float | None
    resample: int


class _Op(NamedTuple):
    pixels: Callable  # (pixels, argument, resample, fill) -> pixels, as timm's
    argument: Callable | None = None  # of the strength, level / 10: degrees, bits, a factor, ...
    signed: bool = False  # half of the strengths are negative
    moves: bool = False  # interpolates between pixels; `fill` comes into view from outside
    spread: tuple[float, float] | None = None  # the argument is uniform in here, at any level


_VALUES = np.arange(256)


def _by_value(tables_of):
    """The pixel function of `tables_of(pixels, argument)`: 256 values, or 256 for each channel."""

    def function(pixels, argument, *_):
        tables = np.broadcast_to(tables_of(pixels, argument), (3, 256))
        return operations().look_up(pixels, np.array(tables, np.uint8, order="C"))

    return function


@_by_value
def _auto_contrast(pixels, _):
    """From the darkest to the brightest value of each channel, as ImageOps.autocontrast."""
    tables = np.tile(_VALUES, (3, 1))
    for i, counts in enumerate(operations().histogram(pixels)):
        low, high = counts.nonzero()[0][[0, -1]]
        if low < high:
            scale = 255.0 / (high - low)
            tables[i] = (_VALUES * scale - low * scale).clip(0, 255)
    return tables


@_by_value
def _equalize(pixels, _):
    """Flattens the histogram of each channel, as ImageOps.equalize."""
    tables = np.tile(_VALUES, (3, 1))
    for i, counts in enumerate(operations().histogram(pixels)):
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        if step:
            tables[i] = ((step // 2 + counts.cumsum() - counts) // step).clip(max=255)
    return tables


@_by_value
def _posterize(_, bits):
    """Keeps the highest bits. ImageOps.posterize refuses to keep none."""
    return _VALUES & (256 - (1 << max(0, 8 - bits)))


@_by_value
def _solarize(_, threshold):
    return np.where(threshold > _VALUES, _VALUES, 255 - _VALUES)


@_by_value
def _solarize_add(_, amount):
    return np.where(_VALUES < 128, (_VALUES + amount).clip(max=255), _VALUES)


def _blend(gray, factor):
    """What Image.blend makes of each value and a constant one."""
    difference = (_VALUES - gray).astype(np.float32)
    return (np.float32(gray) + np.float32(factor) * difference).clip(0, 255)


@_by_value
def _brightness(_, factor):
    return _blend(0, factor)


@_by_value
def _contrast(pixels, factor):
    """About the mean brightness, as ImageEnhance.Contrast."""
    return _blend(int(operations().mean_gray(pixels) + 0.5), factor)


def _color(pixels, factor, *_):
    return operations().saturate(pixels, factor)


def _sharpness(pixels, factor, *_):
    return operations().sharpen(pixels, factor)


def _affine(largest, matrix_of):
    """A map, whose `matrix_of(argument up to +- largest, width, height)` takes output to input."""

    def function(pixels, argument, resample, fill):
        matrix = matrix_of(argument, *pixels.shape[::-1])
        return operations().affine(pixels, matrix, resample, fill)

    return _Op(function, lambda strength: strength * largest, signed=True, moves=True)


def _rotation(degrees, width, height):
    """About the centre, counter-clockwise; rounded as Pillow rounds it."""
    angle = math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, -sin, cos * -x + -sin * -y + x, sin, cos, sin * -x + cos * -y + y


def _blur(pixels, radius, *_):
    return from_image(to_image(pixels).filter(ImageFilter.GaussianBlur(radius)))


def _factor(strength):
    """0.1 ... 1.9: *level 5 changes nothing* (TPU EfficientNet)."""
    return strength * 1.8 + 0.1


def _factor_increasing(strength):
    """1 +- up to 0.9: the higher the level, the stronger, in either direction."""
    return max(0.1, 1.0 + strength * 0.9)


OPS = {
    "AutoContrast": _Op(_auto_contrast),
    "Equalize": _Op(_equalize),
    "Invert": _Op(_by_value(lambda *_: 255 - _VALUES)),
    "Rotate": _affine(30.0, _rotation),
    "Posterize": _Op(_posterize, lambda strength: int(strength * 4)),
    "PosterizeIncreasing": _Op(_posterize, lambda strength: 4 - int(strength * 4)),
    "PosterizeOriginal": _Op(_posterize, lambda strength: 4 + int(strength * 4)),
    "Solarize": _Op(_solarize, lambda strength: min(256, int(strength * 256))),
    "SolarizeIncreasing": _Op(_solarize, lambda strength: max(0, 256 - int(strength * 256))),
    "SolarizeAdd": _Op(_solarize_add, lambda strength: min(128, int(strength * 110))),
    "Color": _Op(_color, _factor),
    "ColorIncreasing": _Op(_color, _factor_increasing, signed=True),
    "Contrast": _Op(_contrast, _factor),
    "ContrastIncreasing": _Op(_contrast, _factor_increasing, signed=True),
    "Brightness": _Op(_brightness, _factor),
    "BrightnessIncreasing": _Op(_brightness, _factor_increasing, signed=True),
    "Sharpness": _Op(_sharpness, _factor),
    "SharpnessIncreasing": _Op(_sharpness, _factor_increasing, signed=True),
    "ShearX": _affine(0.3, lambda shear, w, h: (1, shear, 0, 0, 1, 0)),
    "ShearY": _affine(0.3, lambda shear, w, h: (1, 0, 0, shear, 1, 0)),
    # Translations are a part of the width or height, not a number of pixels.
    "TranslateXRel": _affine(0.45, lambda x, w, h: (1, 0, x * w, 0, 1, 0)),
    "TranslateYRel": _affine(0.45, lambda y, w, h: (1, 0, 0, 0, 1, y * h)),
    "Grayscale": _Op(lambda pixels, *_: _color(pixels, 0)),
    "GaussianBlur": _Op(_blur, spread=(0.1, 2.0)),
}

# RandAugment's set (arXiv:1909.13719, table 6, without Identity and Cutout).
RAND_OPS = [
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
]


@dataclass(eq=False)
class Policy:
    """Draws a list of operations for each image and applies them."""

    choices: Sequence[Sequence[tuple[str, float, float]]]  # of (operation, probability, level)
    layers: int = 1  # how many of the choices an image gets, drawn with replacement
    level_std: float = 0.0  # of the level; infinite: uniform from 0 to the level
    level_max: float = 10.0  # the drawn level is clamped to 0 ... level_max
    resamples: Sequence[int] = (Image.Resampling.BICUBIC,)  # that an operation draws from
    fill: tuple[int, int, int] = (128, 128, 128)  # colour of what comes into view from outside

    def draw(self, rng: np.random.Generator) -> list[DrawnOp]:
        """The operations of one image, in order; a function of the generator alone."""
        drawn = []
        for choice in rng.integers(len(self.choices), size=self.layers):
            for name, probability, level in self.choices[choice]:
                if rng.random() < probability:
                    drawn.append(self._draw_op(name, level, rng))
        return drawn

    def _draw_op(self, name: str, level: float, rng: np.random.Generator) -> DrawnOp:
        op = OPS[name]
        resample = self.resamples[0]
        if op.moves and len(self.resamples) > 1:
            resample = self.resamples[rng.integers(len(self.resamples))]
        if op.spread:
            return DrawnOp(name, rng.uniform(*op.spread), resample)
        if self.level_std == math.inf:
            level = rng.uniform(0.0, level)
        elif self.level_std > 0:
            level = rng.normal(level, self.level_std)
        strength = min(max(level, 0.0), self.level_max) / 10
        if op.signed and rng.random() < 0.5:
            strength = -strength
        return DrawnOp(name, op.argument(strength) if op.argument else None, resample)

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for name, argument, resample in self.draw(rng):
            pixels = OPS[name].pixels(pixels, argument, resample, self.fill)
        return pixels


def rand_augment(level=10.0, increasing=False, probability=0.5, layers=2, **options) -> Policy:
    """RandAugment (arXiv:1909.13719) with timm's magnitude noise; `options` as in `Policy`.

    `increasing`: all operations get stronger with the level; each is applied with `probability`.
    """
    names = RAND_OPS
    if increasing:
        names = [f"{name}Increasing" if f"{name}Increasing" in OPS else name for name in names]
    return Policy([[(name, probability, level)] for name in names], layers, **options)


def _sub_policies(text: str) -> list[list[tuple[str, float, float]]]:
    """Reads `Operation probability level, Operation probability level; ...`."""
    ops = [[part.split() for part in policy.split(",")] for policy in text.split(";")]
    return [[(name, float(p), float(level)) for name, p, level in policy] for policy in ops]


# arXiv:1805.09501, appendix, the ImageNet policy (its repeated lines count).
_ORIGINAL = """
PosterizeOriginal 0.4 8, Rotate 0.6 9; Solarize 0.6 5, AutoContrast 0.6 5;
Equalize 0.8 8, Equalize 0.6 3; PosterizeOriginal 0.6 7, PosterizeOriginal 0.6 6;
Equalize 0.4 7, Solarize 0.2 4; Equalize 0.4 4, Rotate 0.8 8;
Solarize 0.6 3, Equalize 0.6 7; PosterizeOriginal 0.8 5, Equalize 1.0 2;
Rotate 0.2 3, Solarize 0.6 8; Equalize 0.6 8, PosterizeOriginal 0.4 6;
Rotate 0.8 8, Color 0.4 0; Rotate 0.4 9, Equalize 0.6 2;
Equalize 0.0 7, Equalize 0.8 8; Invert 0.6 4, Equalize 1.0 8;
Color 0.6 4, Contrast 1.0 8; Rotate 0.8 8, Color 1.0 2;
Color 0.8 8, Solarize 0.8 7; Sharpness 0.4 7, Invert 0.6 8;
ShearX 0.6 5, Equalize 1.0 9; Color 0.4 0, Equalize 0.6 3;
Equalize 0.4 7, Solarize 0.2 4; Solarize 0.6 5, AutoContrast 0.6 5;
Invert 0.6 4, Equalize 1.0 8; Color 0.6 4, Contrast 1.0 8;
Equalize 0.8 8, Equalize 0.6 3
"""

# The policy of the TPU EfficientNet code.
_V0 = """
Equalize 0.8 1, ShearY 0.8 4; Color 0.4 9, Equalize 0.6 3;
Color 0.4 1, Rotate 0.6 8; Solarize 0.8 3, Equalize 0.4 7;
Solarize 0.4 2, Solarize 0.6 2; Color 0.2 0, Equalize 0.8 8;
Equalize 0.4 8, SolarizeAdd 0.8 3; ShearX 0.2 9, Rotate 0.6 8;
Color 0.6 1, Equalize 1.0 2; Invert 0.4 9, Rotate 0.6 0;
Equalize 1.0 9, ShearY 0.6 3; Color 0.4 7, Equalize 0.6 0;
Posterize 0.4 6, AutoContrast 0.4 7; Solarize 0.6 8, Color 0.6 9;
Solarize 0.2 4, Rotate 0.8 9; Rotate 1.0 7, TranslateYRel 0.8 9;
ShearX 0.0 0, Solarize 0.8 4; ShearY 0.8 0, Color 0.6 4;
Color 1.0 0, Rotate 0.6 2; Equalize 0.8 4, Equalize 0.0 8;
Equalize 1.0 4, AutoContrast 0.6 2; ShearY 0.4 7, SolarizeAdd 0.6 7;
Posterize 0.8 2, Solarize 0.6 10; Solarize 0.6 8, Equalize 0.6 1;
Color 0.8 6, Rotate 0.4 5
"""

# The variants with `r` posterize as Google's later code does: more with the level.
POLICIES = {
    "original": _sub_policies(_ORIGINAL),
    "originalr": _sub_policies(_ORIGINAL.replace("PosterizeOriginal", "PosterizeIncreasing")),
    "v0": _sub_policies(_V0),
    "v0r": _sub_policies(_V0.replace("Posterize", "PosterizeIncreasing")),
    # DeiT III (arXiv:2204.07118, section 3.2): one of three, always applied, at full strength.
    "3a": _sub_policies("Solarize 1.0 5; Grayscale 1.0 10; GaussianBlur 1.0 10"),
}


_SECTIONS = {  # of a policy's string -> an argument of `rand_augment`, and how to read it
    "m": ("level", int),
    "n": ("layers", int),
    "p": ("probability", float),
    # as timm: more than 100 means uniform
    "mstd": ("level_std", lambda text: float(text) if float(text) <= 100 else math.inf),
    "mmax": ("level_max", int),
    "inc": ("increasing", lambda text: bool(int(text))),
}


def build_policy(text: str, key: str, **options) -> Policy:
    """The policy that a string of timm's names; `options`: `resamples` and `fill` of `Policy`.

    `text` is `rand` (with any of `_SECTIONS`; timm's defaults) or one of `POLICIES` (with `mstd`;
    3-Augment is always at full strength), joined by `-`. A ConfigError names `key`.
    """
    policy, *sections = text.split("-")
    where = f"{key} is {text!r}"
    if policy != "rand" and policy not in POLICIES:
        raise ConfigError(f"{where}; choose rand-... or one of {', '.join(POLICIES)}")
    allowed = {"rand": _SECTIONS, "3a": ()}.get(policy, ["mstd"])
    known = {name: _SECTIONS[name] for name in allowed}
    for section in sections:
        match = re.fullmatch(r"([a-z]+)(\d.*)", section)
        try:
            argument, read = known[match[1]]
            options[argument] = read(match[2])
        except (TypeError, KeyError, ValueError):  # no number, an unknown name, a bad number
            names = ", ".join(f"{name}<number>" for name in known) or "none"
            raise ConfigError(f"{where}: bad section {section!r}; known are: {names}") from None
    if policy != "rand":
        return Policy(POLICIES[policy], **options)
    limits = {"probability": 1, "layers": 64, "level": 100, "level_max": 100}  # as the config's
    if any(options.get(argument, 0) > limit for argument, limit in limits.items()):
        raise ConfigError(f"{where}: p is at most 1, n 64, m and mmax 100 (10 is what papers use)")
    return rand_augment(**options)
