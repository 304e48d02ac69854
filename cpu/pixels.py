"""An image as an array of its pixels, and Pillow's own memory as one. (Pillow 11.2 and later.)"""

from __future__ import annotations

import ctypes
from typing import Union

import numpy as np
from PIL import Image

# Pillow's image, or the pixels of one in RGB: ``uint32 [H, W]`` as Pillow keeps them, a pixel of
# four bytes: red, green, blue, unused.
Picture = Union[Image.Image, np.ndarray]


def size_of(image: Picture) -> tuple[int, int]:
    """Width and height, pixels."""
    return image.shape[::-1] if isinstance(image, np.ndarray) else image.size


def shown(image: Image.Image, writable: bool = False) -> np.ndarray:
    """The pixels of an RGB image where Pillow keeps them, as long as the array lives.

    Args:
        image: in RGB, read.
        writable: what is written is in the image: for one that nobody else has.

    Returns:
        ``uint32 [H, W]``, see `Picture`.

    Raises:
        AttributeError: an older Pillow, which does not show it.
        ValueError: Pillow keeps the image in several pieces (above 16 MB).
    """
    return np.asarray(_Shown(image, writable))


class _ArrowArray(ctypes.Structure):
    """The beginning of Arrow's C data interface, which is stable."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "nulls", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]


class _Shown:
    """Keeps the memory alive, and tells NumPy where it is."""

    def __init__(self, image: Image.Image, writable: bool):
        _, self._capsule = image.__arrow_c_array__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        array = _ArrowArray.from_address(pointer(self._capsule, b"arrow_array"))
        values = array.children[0][0] if array.n_children == 1 else array
        if (values.length, values.n_buffers) != (4 * image.width * image.height, 2):
            raise ValueError("not four bytes a pixel")
        self.__array_interface__ = {
            "version": 3,
            "shape": (image.height, image.width),
            "typestr": "<u4",
            "data": (values.buffers[1], not writable),
        }
