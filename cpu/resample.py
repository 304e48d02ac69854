"""Pillow's resize, affine map, saturation, sharpness and tables, two to five times faster, with the
same pixels.

Most of the processor time of a training image is spent here. What the recipe does to RGB images,
with bicubic interpolation, is compiled by Numba (`resample_kernels`); everything else, and
everything where Numba is missing or cannot work, is left to Pillow. When the compiled code is
loaded it is tried against the Pillow that is installed, and left alone if a pixel differs: nothing
but the time depends on it.

Environment: ``RESMLP_NUMBA=off`` leaves it all to Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from cpu.pixels import shown
from cpu.setup import enabled

_BICUBIC = Image.Resampling.BICUBIC


def prepare(log: Callable[[str], None] = print) -> None:
    """Loads the compiled code, or compiles it once (9 s), and logs a line if there is none.

    To be called before processes are forked, so that they share it. Otherwise the first image
    pays.
    """
    _, reason = load_kernels()
    if reason:
        log(f"images are resized and augmented by Pillow, two to three times slower: {reason}")


def resize(
    image: Image.Image,
    size: tuple[int, int],
    resample: int,
    crop: Sequence[int] | None = None,
    box: Sequence[int] | None = None,
) -> Image.Image:
    """``image.crop(box).resize(size, resample)``, of which only the crop is computed.

    Args:
        image: any mode.
        size: (width, height) of the whole result, pixels.
        resample: one of Pillow's filters.
        crop: (left, top, right, bottom) in the result; None: all of it. What lies outside is black.
        box: (left, top, right, bottom) in the image, inside of it; None: all of it.
    """
    compiled, _ = load_kernels()
    if compiled is None or resample != _BICUBIC or image.mode != "RGB":
        image = (image if box is None else image.crop(box)).resize(size, resample)
        return image if crop is None else image.crop(crop)
    box, whole = box or (0, 0, *image.size), (0, 0, *size)
    if crop is None or _inside(crop, size):
        return _to_image(compiled.resize(image, size, crop or whole, box))
    return _to_image(compiled.resize(image, size, whole, box)).crop(crop)


def resize_to_array(
    image: Image.Image, size: tuple[int, int], resample: int, crop: Sequence[int]
) -> np.ndarray:
    """``to_array(resize(image, size, resample, crop))``, without an image in between."""
    compiled, _ = load_kernels()
    known = compiled is not None and resample == _BICUBIC and image.mode == "RGB"
    if not (known and _inside(crop, size)):
        return to_array(resize(image, size, resample, crop))
    return compiled.kernels.to_rgb(compiled.resize(image, size, crop, (0, 0, *image.size)))


def _inside(crop: Sequence[int], size: tuple[int, int]) -> bool:
    return crop[0] >= 0 and crop[1] >= 0 and crop[2] <= size[0] and crop[3] <= size[1]


def to_array(image: Image.Image) -> np.ndarray:
    """``np.array(image)``, writable and apart from the image: ``uint8 [H, W, 3]`` of one in RGB."""
    compiled, _ = load_kernels()
    if compiled is None or image.mode != "RGB":
        return np.array(image)
    return compiled.kernels.to_rgb(_to_array(image))


def affine(
    image: Image.Image, matrix: Sequence[float], resample: int, fill: tuple[int, int, int]
) -> Image.Image:
    """``image.transform(image.size, AFFINE, matrix, resample=resample, fillcolor=fill)``.

    Args:
        image: any mode.
        matrix: (a, b, c, d, e, f): output (x, y) shows input (ax + by + c, dx + ey + f).
        resample: nearest, bilinear or bicubic.
        fill: the colour of what lies outside.
    """
    compiled, _ = load_kernels()
    if compiled is None or resample != _BICUBIC or image.mode != "RGB":
        kind = Image.Transform.AFFINE
        return image.transform(image.size, kind, matrix, resample=resample, fillcolor=fill)
    return compiled.affine(image, matrix, fill)


def saturate(image: Image.Image, factor: float) -> Image.Image:
    """``ImageEnhance.Color(image).enhance(factor)``: 0 gray, 1 as it is."""
    compiled, _ = load_kernels()
    if compiled is None or image.mode != "RGB":
        return ImageEnhance.Color(image).enhance(factor)
    return compiled.saturate(image, factor)


def sharpen(image: Image.Image, factor: float) -> Image.Image:
    """``ImageEnhance.Sharpness(image).enhance(factor)``: 0 smoothed, 1 as it is."""
    compiled, _ = load_kernels()
    if compiled is None or image.mode != "RGB":
        return ImageEnhance.Sharpness(image).enhance(factor)
    return compiled.sharpen(image, factor)


def look_up(image: Image.Image, tables: np.ndarray) -> Image.Image:
    """``image.point(tables)``: another value for each.

    Args:
        image: in RGB.
        tables: ``[256]``, or ``[3, 256]`` with one for each channel; fractions are cut off.
    """
    tables = np.array(np.broadcast_to(tables, (3, 256)), np.uint8, order="C")
    compiled, _ = load_kernels()
    if compiled is None:
        return image.point(tables.ravel().tolist())
    return compiled.look_up(image, tables)


class _Compiled(NamedTuple):
    """The compiled code, for RGB images and bicubic interpolation.

    Attributes:
        kernels: `resample_kernels`.
        height_first: whether a resize from (w, h) to (W, H) begins with the height; the order
            matters because the pixels in between are rounded.
    """

    kernels: ModuleType
    height_first: Callable[[int, int, int, int], bool]

    def resize(
        self, image: Image.Image, size: tuple[int, int], crop: Sequence[int], box: Sequence[int]
    ) -> np.ndarray:
        pixels = _to_array(image, box)
        height, width = pixels.shape
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

    def affine(self, image: Image.Image, matrix: Sequence[float], fill: tuple) -> Image.Image:
        outside = np.array([*fill, 255], np.uint8).view(np.uint32)[0]
        return _to_image(self.kernels.affine(_to_array(image), tuple(map(float, matrix)), outside))

    def saturate(self, image: Image.Image, factor: float) -> Image.Image:
        pixels = _to_array(image)
        return _to_image(self.kernels.blend(self.kernels.gray(pixels), pixels, factor))

    def sharpen(self, image: Image.Image, factor: float) -> Image.Image:
        pixels = _to_array(image)
        return _to_image(self.kernels.blend(self.kernels.smooth(pixels), pixels, factor))

    def look_up(self, image: Image.Image, tables: np.ndarray) -> Image.Image:
        return _to_image(self.kernels.look_up(_to_array(image), tables))


# When Pillow resizes the height first.
_ORDERS = (
    lambda w, h, W, H: h > H and h - H > 2 * (w - W),  # Pillow 13
    lambda w, h, W, H: False,  # before
)


@cache
def load_kernels() -> tuple[_Compiled | None, str]:
    """The compiled code that gives this Pillow's pixels, or None and why there is none."""
    if not enabled("RESMLP_NUMBA"):
        return None, "RESMLP_NUMBA"
    try:
        import numba

        if numba.config.DISABLE_JIT:
            return None, "NUMBA_DISABLE_JIT"
        from cpu import resample_kernels

        for order in _ORDERS:
            compiled = _Compiled(resample_kernels, order)
            if _gives_pillows_pixels(compiled):
                return compiled, ""
    except Exception as error:  # missing, too old for this NumPy, no folder to cache in, ...
        return None, f"Numba does not work here ({' '.join(str(error).split())})"
    return None, f"this Pillow ({Image.__version__}) rounds in another way than those known here"


def _gives_pillows_pixels(compiled: _Compiled) -> bool:
    rng = np.random.default_rng(0)
    for w, h, W, H in ((97, 60, 40, 40), (60, 97, 40, 40), (20, 30, 40, 40), (40, 90, 50, 40)):
        image = Image.fromarray(rng.integers(0, 256, [h, w, 3], dtype=np.uint8))
        whole, box = (0, 0, W, H), (3, 2, w - 1, h - 4)
        expected = image.crop(box).resize((W, H), _BICUBIC)
        if _to_image(compiled.resize(image, (W, H), whole, box)) != expected:
            return False
        if (compiled.kernels.to_rgb(_to_array(image)) != np.array(image)).any():
            return False
        for factor in (0.0, 0.37, 1.9):
            if compiled.saturate(image, factor) != ImageEnhance.Color(image).enhance(factor):
                return False
            if compiled.sharpen(image, factor) != ImageEnhance.Sharpness(image).enhance(factor):
                return False
        tables = rng.integers(0, 256, [3, 256], dtype=np.uint8)
        if compiled.look_up(image, tables) != image.point(tables.ravel().tolist()):
            return False
        for matrix in ((1, 0.2, -3.3, 0, 1, 0), (0.9, 0.3, 2.5, -0.3, 0.9, 7.1)):
            fill = {"fillcolor": (1, 2, 3), "resample": _BICUBIC}
            expected = image.transform(image.size, Image.Transform.AFFINE, matrix, **fill)
            if compiled.affine(image, matrix, (1, 2, 3)) != expected:
                return False
    return True


def _to_array(image: Image.Image, box: Sequence[int] | None = None) -> np.ndarray:
    """The pixels as ``uint32 [H, W]``, as Pillow keeps them: red, green, blue, unused.

    They stay where they are if Pillow shows them (11.2 and later, up to 16 MB), else are copied.
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    try:
        return shown(image)[top:bottom, left:right]
    except (AttributeError, ValueError):
        image = image if box is None else image.crop(box)
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    return pixels.reshape(image.height, image.width)


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.frombytes("RGB", pixels.shape[::-1], pixels, "raw", "RGBX")
