"""Pillow's resize, affine map, saturation, sharpness and tables, two to five times faster, with the
same pixels.

An image is Pillow's, or an array of its pixels (`Picture`), which goes from one compiled function
to the next without a copy. Of an image functions make an image; of an array an array, or an image
where Pillow does the work.

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
from PIL import Image, ImageEnhance, ImageStat

from cpu.pixels import Picture, shown, size_of
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
    image: Picture,
    size: tuple[int, int],
    resample: int,
    crop: Sequence[int] | None = None,
    box: Sequence[int] | None = None,
) -> Picture:
    """``image.crop(box).resize(size, resample)``, of which only the crop is computed.

    Args:
        image: any mode.
        size: (width, height) of the whole result, pixels.
        resample: one of Pillow's filters.
        crop: (left, top, right, bottom) in the result; None: all of it. What lies outside is black.
        box: (left, top, right, bottom) in the image, inside of it; None: all of it.
    """
    result = resize_pixels(image, size, resample, crop, box)
    return result if isinstance(image, np.ndarray) else to_image(result)


def resize_pixels(
    image: Picture,
    size: tuple[int, int],
    resample: int,
    crop: Sequence[int] | None = None,
    box: Sequence[int] | None = None,
) -> Picture:
    """As `resize`: an array where compiled code makes it, else an image of Pillow's."""
    compiled = _compiled_for(image)
    if compiled is None or resample != _BICUBIC:
        image = to_image(image)
        image = (image if box is None else image.crop(box)).resize(size, resample)
        return image if crop is None else image.crop(crop)
    box, whole = box or (0, 0, *size_of(image)), (0, 0, *size)
    if crop is None or _inside(crop, size):
        return compiled.resize(image, size, crop or whole, box)
    return to_image(compiled.resize(image, size, whole, box)).crop(crop)


def _inside(crop: Sequence[int], size: tuple[int, int]) -> bool:
    return crop[0] >= 0 and crop[1] >= 0 and crop[2] <= size[0] and crop[3] <= size[1]


def to_array(image: Picture) -> np.ndarray:
    """``np.array(image)``, writable and apart from the image: ``uint8 [H, W, 3]`` of one in RGB."""
    compiled = _compiled_for(image)
    if compiled is None:
        return np.array(to_image(image))
    return compiled.kernels.to_rgb(_to_array(image))


def to_image(image: Picture) -> Image.Image:
    """Pillow's image; of an array, a copy."""
    if not isinstance(image, np.ndarray):
        return image
    return Image.frombytes("RGB", size_of(image), np.ascontiguousarray(image), "raw", "RGBX")


def flip(image: Picture, direction: Image.Transpose) -> Picture:
    """``image.transpose(direction)``, with `FLIP_LEFT_RIGHT` or `FLIP_TOP_BOTTOM`."""
    if not isinstance(image, np.ndarray):
        return image.transpose(direction)
    across = direction == Image.Transpose.FLIP_LEFT_RIGHT
    return np.ascontiguousarray(image[:, ::-1] if across else image[::-1])


def affine(
    image: Picture, matrix: Sequence[float], resample: int, fill: tuple[int, int, int]
) -> Picture:
    """``image.transform(image.size, AFFINE, matrix, resample=resample, fillcolor=fill)``.

    Args:
        image: any mode.
        matrix: (a, b, c, d, e, f): output (x, y) shows input (ax + by + c, dx + ey + f).
        resample: nearest, bilinear or bicubic.
        fill: the colour of what lies outside.
    """
    compiled = _compiled_for(image)
    if compiled is None or resample != _BICUBIC:
        image, kind = to_image(image), Image.Transform.AFFINE
        return image.transform(image.size, kind, matrix, resample=resample, fillcolor=fill)
    outside = np.array([*fill, 255], np.uint8).view(np.uint32)[0]
    matrix = tuple(map(float, matrix))
    return _like(image, compiled.kernels.affine(_to_array(image), matrix, outside))


def saturate(image: Picture, factor: float) -> Picture:
    """``ImageEnhance.Color(image).enhance(factor)``: 0 gray, 1 as it is."""
    compiled = _compiled_for(image)
    if compiled is None:
        return ImageEnhance.Color(to_image(image)).enhance(factor)
    pixels = _to_array(image)
    return _like(image, compiled.kernels.blend(compiled.kernels.gray(pixels), pixels, factor))


def sharpen(image: Picture, factor: float) -> Picture:
    """``ImageEnhance.Sharpness(image).enhance(factor)``: 0 smoothed, 1 as it is."""
    compiled = _compiled_for(image)
    if compiled is None:
        return ImageEnhance.Sharpness(to_image(image)).enhance(factor)
    pixels = _to_array(image)
    return _like(image, compiled.kernels.blend(compiled.kernels.smooth(pixels), pixels, factor))


def look_up(image: Picture, tables: np.ndarray) -> Picture:
    """``image.point(tables)``: another value for each.

    Args:
        image: in RGB.
        tables: ``[256]``, or ``[3, 256]`` with one for each channel; fractions are cut off.
    """
    tables = np.array(np.broadcast_to(tables, (3, 256)), np.uint8, order="C")
    compiled = _compiled_for(image)
    if compiled is None:
        return to_image(image).point(tables.ravel().tolist())
    return _like(image, compiled.kernels.look_up(_to_array(image), tables))


def extremes(image: Picture) -> Sequence[tuple[int, int]]:
    """``image.getextrema()`` of one in RGB: the lowest and the highest value of each channel."""
    compiled = _compiled_for(image)
    if compiled is None:
        return to_image(image).getextrema()
    return compiled.kernels.extremes(_to_array(image))


def histogram(image: Picture) -> np.ndarray:
    """``image.histogram()`` of one in RGB: how often each value is there, ``int [3, 256]``."""
    compiled = _compiled_for(image)
    if compiled is None:
        return np.reshape(to_image(image).histogram(), (3, 256))
    return compiled.kernels.histogram(_to_array(image))


def mean_gray(image: Picture) -> float:
    """The mean brightness of an RGB image, ``convert("L")``'s."""
    compiled = _compiled_for(image)
    if compiled is None:
        return ImageStat.Stat(to_image(image).convert("L")).mean[0]
    pixels = _to_array(image)
    return compiled.kernels.sum_gray(pixels) / pixels.size


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
        self, image: Picture, size: tuple[int, int], crop: Sequence[int], box: Sequence[int]
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


def _compiled_for(image: Picture) -> _Compiled | None:
    compiled, _ = load_kernels()
    return compiled if isinstance(image, np.ndarray) or image.mode == "RGB" else None


def _like(given: Picture, pixels: np.ndarray) -> Picture:
    return pixels if isinstance(given, np.ndarray) else to_image(pixels)


def _gives_pillows_pixels(compiled: _Compiled) -> bool:
    rng, kernels = np.random.default_rng(0), compiled.kernels
    for w, h, W, H in ((97, 60, 40, 40), (60, 97, 40, 40), (20, 30, 40, 40), (40, 90, 50, 40)):
        image = Image.fromarray(rng.integers(0, 256, [h, w, 3], dtype=np.uint8))
        pixels, whole, box = _to_array(image), (0, 0, W, H), (3, 2, w - 1, h - 4)
        tables = rng.integers(0, 256, [3, 256], dtype=np.uint8)
        pairs = [
            (compiled.resize(image, (W, H), whole, box), image.crop(box).resize((W, H), _BICUBIC)),
            (kernels.look_up(pixels, tables), image.point(tables.ravel().tolist())),
        ]
        gray, smooth = kernels.gray(pixels), kernels.smooth(pixels)
        for factor in (0.0, 0.37, 1.9):
            enhanced = ImageEnhance.Color(image).enhance(factor)
            pairs.append((kernels.blend(gray, pixels, factor), enhanced))
            enhanced = ImageEnhance.Sharpness(image).enhance(factor)
            pairs.append((kernels.blend(smooth, pixels, factor), enhanced))
        for matrix in ((1.0, 0.2, -3.3, 0.0, 1.0, 0.0), (0.9, 0.3, 2.5, -0.3, 0.9, 7.1)):
            fill = {"fillcolor": (0, 0, 0), "resample": _BICUBIC}
            mapped = image.transform(image.size, Image.Transform.AFFINE, matrix, **fill)
            pairs.append((kernels.affine(pixels, matrix, 0), mapped))
        if any(to_image(found) != expected for found, expected in pairs):
            return False
        if (kernels.to_rgb(pixels) != np.array(image)).any():
            return False
        if [*map(tuple, kernels.extremes(pixels))] != [*image.getextrema()]:
            return False
        if kernels.histogram(pixels).ravel().tolist() != image.histogram():
            return False
        if kernels.sum_gray(pixels) != ImageStat.Stat(image.convert("L")).sum[0]:
            return False
    return True


def _to_array(image: Picture, box: Sequence[int] | None = None) -> np.ndarray:
    """The pixels as ``uint32 [H, W]``, or those in a box.

    They stay where they are if Pillow shows them (11.2 and later, up to 16 MB), else are copied.
    """
    left, top, right, bottom = box or (0, 0, *size_of(image))
    if isinstance(image, np.ndarray):
        return image[top:bottom, left:right]
    try:
        return shown(image)[top:bottom, left:right]
    except (AttributeError, ValueError):
        image = image if box is None else image.crop(box)
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    return pixels.reshape(image.height, image.width)
