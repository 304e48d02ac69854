"""One image file: opened, decoded to RGB, turned upright. (No Paddle.)"""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import warnings
from functools import cache

import numpy as np
from PIL import Image

from cli.errors import DataError
from cpu.pixels import Picture, shown
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

_JPEG = b"\xff\xd8\xff"  # how one begins
_ORIENTATION = 0x112  # EXIF's tag: how the camera was held
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns above its limit and raises above twice the limit; `open_image` raises above it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Corrupt EXIF data, transparent palettes: the pixels are right, and no warning names its file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class BadImage(DataError):
    """An image file that is missing or cannot be decoded: `path` and `reason`."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{printable(path)}: {reason}")
        self.path, self.reason = path, reason


def regular_size(path: str) -> int:
    """Bytes of a file.

    Raises:
        OSError: missing; or a folder, a device, a pipe, which may block for ever when it is opened.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", path)
    return info.st_size


def open_image(path: str) -> Image.Image:
    """Opens an image file, to be used in ``with``; its pixels are decoded when they are asked for.

    Raises:
        BadImage: missing, unreadable, empty, not an image, larger than Pillow's limit.
        DataError: the archive that it is in cannot be used.
    """
    try:
        data = archives.read(path)
        size = regular_size(path) if data is None else len(data)
        if size == 0:
            raise BadImage(path, "the file is empty")
        image = Image.open(path if data is None else io.BytesIO(data), formats=_FORMATS)
        pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if 0 < pixels <= (limit or pixels):
            return image
        image.close()
        if pixels:
            raise BadImage(path, f"{pixels:,} pixels, more than Pillow's limit of {limit:,}")
        raise BadImage(path, f"{image.width} x {image.height} pixels")
    except Exception as error:
        raise _bad_image(path, error) from None


def to_rgb(image: Picture) -> Picture:
    """The image in RGB, read: as ``convert("RGB")``, without a copy of what is RGB already.

    Pillow would cut 16-bit grey at 255, which makes it white: it is scaled by its range instead,
    with the upper 8 bits, as OpenCV does. Numbers without a known range are refused.

    Raises:
        BadImage: 32-bit integers or floating point.
    """
    if isinstance(image, np.ndarray):
        return image
    decoded = _decoded(image)
    if decoded is not None:
        return decoded
    image.load()
    if image.mode == "RGB":
        return image
    sixteen = image.mode.startswith("I;16")
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        sixteen = True  # what older Pillow makes of 16 bits
    if sixteen:
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(258, (16,))[0]  # BitsPerSample of a TIFF: 12 of a microscope or scanner
        grey = (np.asarray(image).astype(np.int32) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        inverted = tags.get(262) == 0  # WhiteIsZero, which Pillow heeds in 8 bits alone
        info, image = image.info, Image.fromarray(255 - grey if inverted else grey)
        image.info = info
    elif image.mode in ("I", "F"):
        raise BadImage(
            getattr(image, "filename", "image"),
            f"{'floating point' if image.mode == 'F' else '32-bit integers'}, whose black and "
            "white are not known; save it with 8 or 16 bits",
        )
    return image.convert("RGB")


def _decoded(image: Image.Image) -> Image.Image | None:
    """The pixels of an unread JPEG, straight into Pillow's memory; None: it is for Pillow.

    What simplejpeg finds damaged, Pillow decodes, or says what is wrong.
    """
    if image.format != "JPEG" or image.mode != "RGB" or not image.tile:
        return None
    return _by_simplejpeg(image) if simplejpeg_is_right() else None


def _by_simplejpeg(image: Image.Image) -> Image.Image | None:
    rgb = Image.new("RGB", image.size)
    try:
        image.fp.seek(0)
        whole = _decode(image.fp.read(), shown(rgb, writable=True))
    except (AttributeError, OSError, ValueError):
        return None
    rgb.info = image.info
    return rgb if whole else None


def _decode(data: bytes, pixels: np.ndarray) -> bool:
    """Fills ``uint32 [H, W]`` with a JPEG; whether it is of that size.

    Raises:
        ValueError: damaged.
    """
    return simplejpeg.decode_jpeg(data, "RGBA", buffer=pixels.view("u1")).shape[:2] == pixels.shape


@cache
def simplejpeg_is_right() -> bool:
    """Whether simplejpeg is installed, with a libjpeg-turbo that gives this Pillow's pixels."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, [9, 13, 3], dtype=np.uint8)).save(file, "JPEG")
    with Image.open(file, formats=["JPEG"]) as image:
        rgb = simplejpeg and _by_simplejpeg(image)
        return bool(rgb) and rgb.tobytes() == image.tobytes()


def upright(image: Image.Image) -> Image.Image:
    """The image in RGB (`to_rgb`), turned as its EXIF orientation says; with none, as it is."""
    rgb = to_rgb(image)  # read first: Pillow turns a TIFF by itself
    try:
        return rgb.transpose(_TURNS[image.getexif()[_ORIENTATION]])
    except Exception:  # no such entry; or broken EXIF data, on which Pillow raises anything
        return rgb


def read_image(path: str) -> Image.Image:
    """Decodes an image file to RGB as timm reads it (EXIF rotation ignored), by `to_rgb`.

    Raises:
        BadImage: as `open_image`; also truncated or broken files.
    """
    try:
        with open_image(path) as image:
            rgb = to_rgb(image)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise _bad_image(path, error) from None
    rgb.filename = path  # as `Image.open` sets it; a transform names it
    return rgb


def read_pixels(path: str) -> Picture:
    """`read_image` where nothing but the pixels is wanted: an array of an ordinary JPEG, for which
    Pillow need not look at the header; of any other file Pillow's image.

    Raises:
        BadImage: as `read_image`.
    """
    try:
        pixels = _ordinary_jpeg(path)
    except Exception:  # whatever is wrong with the file, the other way tells
        pixels = None
    return read_image(path) if pixels is None else pixels


def _ordinary_jpeg(path: str) -> np.ndarray | None:
    data = archives.read(path)
    if data is None:
        regular_size(path)
        with open(path, "rb") as file:
            data = file.read(len(_JPEG))
            data += file.read() if data == _JPEG else b""
    if not data.startswith(_JPEG) or not simplejpeg_is_right():
        return None
    height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    if colors != "YCbCr" or width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    pixels = np.empty((height, width), np.uint32)
    return pixels if _decode(data, pixels) else None


def _bad_image(path: str, error: Exception) -> DataError:
    if isinstance(error, DataError):  # of its archive, which none of its images can do without
        return error
    if isinstance(error, FileNotFoundError):
        return BadImage(path, "no such file")
    if isinstance(error, OSError) and error.strerror:  # the system's, not a decoder's
        return BadImage(path, reason_of(error))
    if isinstance(error, Image.UnidentifiedImageError):
        return BadImage(path, "not an image of a known format")
    return BadImage(path, f"cannot be decoded ({type(error).__name__}: {error})")


def reason_of(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
