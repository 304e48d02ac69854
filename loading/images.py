"""One image file: read, decoded to RGB, turned upright. (No Paddle.)"""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import re
import stat
import warnings
from contextlib import suppress
from functools import cache
from typing import IO

import numpy as np
from PIL import Image

from cli.errors import DataError
from cpu.resample import from_image, to_image
from loading import archives
from storage.files import printable

try:
    import simplejpeg  # its decoder is faster than Pillow's
except ImportError:
    simplejpeg = None

EXTENSIONS = (
    *(".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)

# Formats that Pillow decodes itself. (It would hand an .eps to Ghostscript, another program.)
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
try:
    from PIL import AvifImagePlugin  # Pillow 11.3 and later, where its wheel has the decoder

    if AvifImagePlugin.SUPPORTED:
        EXTENSIONS, _FORMATS = (*EXTENSIONS, ".avif"), (*_FORMATS, "AVIF")
except ImportError:
    pass

_ORIENTATION = 0x112  # EXIF's tag: how the camera was held
# Its values: whether to mirror left and right first, and quarter turns, counter-clockwise.
_TURNS = {2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}
# Brands of files that begin with the box "ftyp": what phones write, at times under another name.
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
dark_grey: list[str] = []  # workers are forked with what was said before

# Pillow warns above its limit and raises above twice the limit; `_open` raises above it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Corrupt EXIF data, transparent palettes: the pixels are right, and no warning names its file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class BadImage(DataError):
    """An image file that is missing or cannot be decoded, and its `reason`."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{printable(path)}: {reason}")
        self.reason = reason


def open_regular(path: str, mode: str = "rb", **options) -> IO:
    """As `open`; OSError also for a folder, and for a device or pipe, which may block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", path)
    return open(path, mode, **options)


def open_image(path: str) -> Image.Image:
    """Opens an image file, to be used in ``with``; BadImage as `read_pixels`."""
    try:
        return _open(path, _read(path))
    except Exception as error:
        raise _bad_image(path, error) from None


def upright(image: Image.Image) -> Image.Image:
    """An opened image in RGB, turned as its EXIF orientation says; with none, as it is."""
    return to_image(_turned(image, from_image(_to_rgb(image))))


def read_pixels(path: str, exif_orientation: bool = False) -> np.ndarray:
    """Decodes an image file, of any mode, to RGB: ``uint32 [H, W]`` (`cpu.resample`).

    As timm and ``convert("RGB")``, but for 16-bit grey: Pillow would cut it at 255, which makes it
    white; it is scaled by its range instead, as OpenCV does. `exif_orientation` turns it upright.
    BadImage if it is missing, no image, larger than the limit, or of numbers of unknown range.
    """
    return _decode(path, exif_orientation)[0]


def read_image(path: str) -> Image.Image:
    """As `read_pixels`, as an RGB image of Pillow's with its EXIF: to show it, to save it."""
    pixels, info = _decode(path, with_info=True)
    image = to_image(pixels)
    image.info = info
    return image


def _decode(path: str, exif_orientation: bool = False, with_info: bool = False) -> tuple:
    try:
        data, pixels = _read(path), None
        if data.startswith(b"\xff\xd8\xff") and simplejpeg_is_right():
            with suppress(ValueError):  # damaged: Pillow decodes it, or says what is wrong
                pixels = _decode_jpeg(data, Image.MAX_IMAGE_PIXELS or math.inf)
        if pixels is not None and not exif_orientation and not with_info:
            return pixels, {}
        with _open(path, data) as image:
            if pixels is None:
                pixels = from_image(_to_rgb(image))
            return _turned(image, pixels) if exif_orientation else pixels, image.info
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise _bad_image(path, error) from None


def _turned(image: Image.Image, pixels: np.ndarray) -> np.ndarray:
    with suppress(Exception):  # no such entry, or any error from broken EXIF data
        # asked for after decoding: Pillow turns a TIFF by itself
        mirrored, turns = _TURNS[image.getexif()[_ORIENTATION]]
        pixels = np.rot90(pixels[:, ::-1] if mirrored else pixels, turns)
        return np.ascontiguousarray(pixels)
    return pixels


def _read(path: str) -> bytes:
    data = archives.read(path)
    if data is None:
        with open_regular(path) as file:
            data = file.read()
    if not data:
        raise BadImage(path, "the file is empty")
    return data


def _open(path: str, data: bytes) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    too_large = (
        f"pixels, more than the limit of {limit:,}: DATA.MAX_IMAGE_PIXELS raises it, and "
        "tools/pack.py -max_pixels makes smaller copies"
    )
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:  # above twice the limit
        raise BadImage(path, f"{re.findall('[0-9]+', str(error))[0]} {too_large}") from None
    image.filename = path  # as for one that is opened by its name: Pillow then maps some TIFFs
    pixels = image.width * image.height
    if pixels > limit:
        raise BadImage(path, f"{pixels} {too_large}")
    if pixels <= 0:
        raise BadImage(path, f"{image.width} x {image.height} pixels")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    path, tags, bits = image.filename, getattr(image, "tag_v2", {}), 16
    if tags:
        bits = tags.get(258, (16,))[0]  # BitsPerSample of a TIFF: 12 of a microscope or scanner
    elif image.format == "PNG" and image.mode.startswith("I"):
        end = image.fp.tell()  # of the chunks before the pixels
        image.fp.seek(0)
        if found := re.search(rb"\0\0\0\x01sBIT([\x08-\x10])", image.fp.read(end)):
            bits = found[1][0]  # which Pillow passes over
    image.load()
    # What older Pillow makes of 16 bits is "I" too.
    integers = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode.startswith("I;16") or integers:
        values = np.asarray(image).astype(np.int32)
        if values.max() >> bits:
            bits = 16  # as PNG asks for: the range is all 16 bits, whatever is significant in them
        elif bits == 16 and 0 < values.max() < 4096 and not dark_grey:
            dark_grey.append(path)
            logging.getLogger("resmlp").warning(
                f"warning: {printable(path)}: 16 bits of which at most 12 are used: it is nearly "
                "black (others may be too; this is said once); save such images with 8 bits, or "
                "scaled to 16"
            )
        grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
        inverted = tags.get(262) == 0  # WhiteIsZero, which Pillow heeds in 8 bits alone
        return Image.fromarray(255 - grey if inverted else grey).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floating point" if image.mode == "F" else "32-bit integers"
        reason = f"{kind}, whose black and white are not known; save it with 8 or 16 bits"
        raise BadImage(path, reason)
    return image.convert("RGB")


def _decode_jpeg(data: bytes, limit: float) -> np.ndarray | None:
    """The pixels of an ordinary JPEG; None: Pillow must decode it. ValueError: it is damaged."""
    height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    if colors != "YCbCr" or width * height > limit:
        return None
    pixels = np.empty((height, width), np.uint32)
    decoded = simplejpeg.decode_jpeg(data, "RGBA", buffer=pixels.view("u1"))
    return pixels if decoded.shape[:2] == pixels.shape else None


@cache
def simplejpeg_is_right() -> bool:
    """Whether simplejpeg is installed, with a libjpeg-turbo that gives this Pillow's pixels."""
    if simplejpeg is None:
        return False
    rng, file = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, [9, 13, 3], dtype=np.uint8)).save(file, "JPEG")
    with Image.open(file, formats=["JPEG"]) as image:
        expected = image.tobytes()
    return to_image(_decode_jpeg(file.getvalue(), math.inf)).tobytes() == expected


def _bad_image(path: str, error: Exception) -> DataError:
    if isinstance(error, DataError):  # of its archive, which none of its images can do without
        return error
    if isinstance(error, FileNotFoundError):
        return BadImage(path, "no such file")
    if isinstance(error, OSError) and error.strerror:  # the system's, not a decoder's
        return BadImage(path, reason_of(error))
    if isinstance(error, Image.UnidentifiedImageError):
        head = _read(path)[:12]
        if head[4:8] == b"ftyp" and head[8:] in _HEIC:
            return BadImage(path, "a HEIC picture, whatever its name; convert it to JPEG or PNG")
        return BadImage(path, "not an image of a known format")
    return BadImage(path, f"cannot be decoded ({type(error).__name__}: {error})")


def reason_of(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
