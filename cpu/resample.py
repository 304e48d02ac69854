"""What training does to the pixels of an image: resize, affine map, saturation, sharpness, tables.

Pixels are ``uint32 [H, W]``: four bytes each, red, green, blue, unused, as Pillow keeps them. Numba
compiles it (`resample_kernels`), two to five times faster than Pillow. Where it is missing, a pixel
differs from those of the installed Pillow, or ``RESMLP_NUMBA`` is off, `operations` are Pillow's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
from PIL import Image, ImageEnhance, ImageStat

from cpu.setup import enabled

_BICUBIC = Image.Resampling.BICUBIC


def from_image(image: Image.Image) -> np.ndarray:
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    return pixels.reshape(image.height, image.width)


def to_image(pixels: np.ndarray) -> Image.Image:
    data = np.ascontiguousarray(pixels)
    return Image.frombytes("RGB", pixels.shape[::-1], data, "raw", "RGBX")


@dataclass(eq=False)
class Pillow:
    """The operations as Pillow does them, and the reason why they are not `Compiled`."""

    reason: str = ""

    def resize(self, pixels: np.ndarray, size: Sequence[int], resample: int, crop=None, box=None):
        """`box` at `size` (width, height), then its `crop`; boxes: left, top, right, bottom."""
        left, top, right, bottom = box or (0, 0, *pixels.shape[::-1])
        image = to_image(pixels[top:bottom, left:right]).resize(size, resample)
        return from_image(image.crop(crop) if crop else image)

    def affine(self, pixels: np.ndarray, matrix: Sequence[float], resample: int, fill: tuple):
        """Output (x, y) shows input (ax + by + c, dx + ey + f), outside of it `fill`."""
        image, affine = to_image(pixels), Image.Transform.AFFINE
        return from_image(image.transform(image.size, affine, matrix, resample, fillcolor=fill))

    def saturate(self, pixels: np.ndarray, factor: float) -> np.ndarray:
        """0 gray, 1 as it is."""
        return from_image(ImageEnhance.Color(to_image(pixels)).enhance(factor))

    def sharpen(self, pixels: np.ndarray, factor: float) -> np.ndarray:
        """0 smoothed, 1 as it is."""
        return from_image(ImageEnhance.Sharpness(to_image(pixels)).enhance(factor))

    def look_up(self, pixels: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Another value for each of a channel; tables ``uint8 [3, 256]``."""
        return from_image(to_image(pixels).point(tables.ravel().tolist()))

    def histogram(self, pixels: np.ndarray) -> np.ndarray:
        """How often each channel has each value, ``[3, 256]``."""
        return np.reshape(to_image(pixels).histogram(), (3, 256))

    def mean_gray(self, pixels: np.ndarray) -> float:
        """The mean brightness, of ``convert("L")``."""
        return ImageStat.Stat(to_image(pixels).convert("L")).mean[0]

    def to_rgb(self, pixels: np.ndarray) -> np.ndarray:
        """``uint8 [H, W, 3]``."""
        return np.array(to_image(pixels))


class Compiled(Pillow):
    """By `resample_kernels`; interpolation other than bicubic is left to Pillow. `height_first`:
    Pillow resizes (w, h) to (W, H) height first; the order matters for rounding.
    """

    def __init__(self, kernels: ModuleType, height_first: Callable[[int, int, int, int], bool]):
        self.kernels, self.height_first = kernels, height_first
        self.look_up, self.histogram = kernels.look_up, kernels.histogram
        self.to_rgb = kernels.to_rgb

    def resize(self, pixels, size, resample, crop=None, box=None):
        if resample != _BICUBIC:
            return super().resize(pixels, size, resample, crop, box)
        if box:
            pixels = pixels[box[1] : box[3], box[0] : box[2]]
        (height, width), crop = pixels.shape, crop or (0, 0, *size)
        across = (width, size[0], crop[0], crop[2])
        down = (height, size[1], crop[1], crop[3])
        if self.height_first(width, height, *size):
            left, right = self.kernels.source(*across)
            pixels = np.ascontiguousarray(pixels[:, left:right])
            pixels = self.kernels.resize_height(pixels, 0, *down)
            return self.kernels.resize_width(pixels, left, *across)
        top, bottom = self.kernels.source(*down)
        pixels = self.kernels.resize_width(pixels[top:bottom], 0, *across)
        return self.kernels.resize_height(pixels, top, *down)

    def affine(self, pixels, matrix, resample, fill):
        if resample != _BICUBIC:
            return super().affine(pixels, matrix, resample, fill)
        outside = np.array([*fill, 255], np.uint8).view(np.uint32)[0]
        return self.kernels.affine(pixels, tuple(map(float, matrix)), outside)

    def saturate(self, pixels, factor):
        return self.kernels.blend(self.kernels.gray(pixels), pixels, factor)

    def sharpen(self, pixels, factor):
        return self.kernels.blend(self.kernels.smooth(pixels), pixels, factor)

    def mean_gray(self, pixels):
        return (self.kernels.gray(pixels) & 255).mean()


# When Pillow resizes the height first.
_ORDERS = (
    lambda w, h, W, H: h > H and h - H > 2 * (w - W),  # Pillow 13
    lambda w, h, W, H: False,  # before
)


def prepare(log: Callable[[str], None]) -> None:
    """Loads or compiles (9 s) the code before processes are forked; logs a line if that fails."""
    if reason := operations().reason:
        log(f"images are resized and augmented by Pillow, two to three times slower: {reason}")


@cache
def operations() -> Pillow:
    """The fastest operations that give this Pillow's pixels."""
    if not enabled("RESMLP_NUMBA"):
        return Pillow("RESMLP_NUMBA")
    try:
        import numba

        if numba.config.DISABLE_JIT:
            return Pillow("NUMBA_DISABLE_JIT")
        from cpu import resample_kernels

        for order in _ORDERS:
            compiled = Compiled(resample_kernels, order)
            if _gives_pillows_pixels(compiled):
                return compiled
    except Exception as error:  # missing, too old for this NumPy, no folder to cache in, ...
        return Pillow(f"Numba does not work here ({' '.join(str(error).split())})")
    return Pillow(f"this Pillow ({Image.__version__}) rounds in another way than those known here")


def _gives_pillows_pixels(compiled: Compiled) -> bool:
    rng, pillow = np.random.default_rng(0), Pillow()
    for w, h, W, H in ((97, 60, 40, 40), (60, 97, 40, 40), (20, 30, 40, 40), (40, 90, 50, 40)):
        pixels = from_image(Image.fromarray(rng.integers(0, 256, [h, w, 3], dtype=np.uint8)))
        tables = rng.integers(0, 256, [3, 256], dtype=np.uint8)
        calls = [("resize", (W, H), _BICUBIC, None, (3, 2, w - 1, h - 4)), ("look_up", tables)]
        calls += [("histogram",), ("mean_gray",), ("to_rgb",)]
        calls += [(by, factor) for by in ("saturate", "sharpen") for factor in (0.0, 0.37, 1.9)]
        for matrix in ((1.0, 0.2, -3.3, 0.0, 1.0, 0.0), (0.9, 0.3, 2.5, -0.3, 0.9, 7.1)):
            calls.append(("affine", matrix, _BICUBIC, (0, 0, 0)))
        for name, *arguments in calls:
            found, expected = (
                np.asarray(getattr(by, name)(pixels, *arguments)) for by in (compiled, pillow)
            )
            if found.dtype == np.uint32:  # without the unused byte
                found, expected = found & 0xFFFFFF, expected & 0xFFFFFF
            if not np.array_equal(found, expected):
                return False
    return True
