"""The loops behind `resample`, compiled by Numba when this file is imported.

Images are ``uint32 [H, W]``, a pixel of four bytes. Every kernel rounds where Pillow rounds:
resizing in integers with 22 binary places, each direction for itself, affine maps in float64 and
mixtures of two images in float32, cut off at the end. Nothing needs the interpreter lock. Compiled
code is kept in ``__pycache__`` beside this file, or in Numba's folder in the user's home.
"""

import math

import numpy as np
from numba import njit, types

_STRIP = 40  # rows turned at once: few, for the first-level cache, and no power of two, in whose
# multiples a cache has few places
_PLACES = 22  # binary places of a weight

_IMAGE = types.Array(types.uint32, 2, "C")
_READ_ONLY_IMAGE = types.Array(types.uint32, 2, "C", readonly=True)
_PART = types.Array(types.uint32, 2, "A", readonly=True)  # a rectangle of a larger image
_SCALARS = [types.int64] * 5
_MATRIX = types.UniTuple(types.float64, 6)
_TABLES = types.Array(types.uint8, 2, "C", readonly=True)


@njit(cache=True, inline="always")
def _cubic(a, b, c, d, t):
    """The cubic through b (t = 0) and c (t = 1) of convolution interpolation with a = -1."""
    return b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * (b - a - c + d)))


@njit(cache=True)
def _bicubic_weights(old, new, start, stop):
    """Which pixels of a line of `old` make pixels `start` to `stop` of `new`: first, count,
    weights. The cubic (a = -0.5) is stretched by the reduction, which prevents aliasing.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    length = stop - start
    first, count = np.empty(length, np.int32), np.empty(length, np.int32)
    weights = np.zeros((length, int(math.ceil(support)) * 2 + 1), np.int32)
    line = np.empty(weights.shape[1])
    for i in range(length):
        center = (start + i + 0.5) * scale
        first[i] = max(int(center - support + 0.5), 0)
        count[i] = min(int(center + support + 0.5), old) - first[i]
        total = 0.0
        for k in range(count[i]):
            x = abs(first[i] + k - center + 0.5) * (1.0 / stretch)
            if x < 1.0:
                line[k] = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                line[k] = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            else:
                line[k] = 0.0
            total += line[k]
        for k in range(count[i]):
            weight = (line[k] / total if total else line[k]) * (1 << _PLACES)
            weights[i, k] = int(weight + 0.5) if weight >= 0 else int(weight - 0.5)
    return first, count, weights


@njit(cache=True, inline="always")
def _mix_lines(lines, first, count, weights, out, total):
    """Weighted sums of lines, ``uint8 [lines, bytes]``: four at a time, to sweep `total` less."""
    half = np.int32(1 << (_PLACES - 1))  # what follows cuts off
    for i in range(out.shape[0]):
        a, w, rest = lines[first[i]], weights[i], count[i] % 4
        w0, w1, w2 = w[0], w[1], w[2]
        if rest == 0:
            total[:] = half
        elif rest == 1:
            for j in range(len(total)):
                total[j] = half + w0 * np.int32(a[j])
        elif rest == 2:
            b = lines[first[i] + 1]
            for j in range(len(total)):
                total[j] = half + w0 * np.int32(a[j]) + w1 * np.int32(b[j])
        else:
            b, c = lines[first[i] + 1], lines[first[i] + 2]
            for j in range(len(total)):
                total[j] = half + w0 * np.int32(a[j]) + w1 * np.int32(b[j]) + w2 * np.int32(c[j])
        for k in range(rest, count[i], 4):
            w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
            line = first[i] + k
            a, b, c, d = lines[line], lines[line + 1], lines[line + 2], lines[line + 3]
            for j in range(len(total)):
                total[j] += (
                    w0 * np.int32(a[j])
                    + w1 * np.int32(b[j])
                    + w2 * np.int32(c[j])
                    + w3 * np.int32(d[j])
                )
        for j in range(len(total)):
            out[i, j] = min(max(total[j] >> _PLACES, 0), 255)


@njit(cache=True)
def source(old, new, start, stop):
    """The pixels of a line of `old` that the pixels `start` to `stop` of `new` are made of."""
    first, _, _ = _bicubic_weights(old, new, start, start + 1)
    last, count, _ = _bicubic_weights(old, new, stop - 1, stop)
    return first[0], last[0] + count[0]


@njit(_IMAGE(_READ_ONLY_IMAGE, *_SCALARS), cache=True, nogil=True)
def resize_height(image, offset, old, new, start, stop):
    """Bicubic with antialiasing: the lines `start` to `stop` of `new`, ``[stop - start, W]``.

    ``image`` has the lines ``[h, W]`` from `offset` on; `old` and `new` are whole heights.
    """
    first, count, weights = _bicubic_weights(old, new, start, stop)
    out = np.empty((stop - start, image.shape[1]), np.uint32)
    total = np.empty(4 * image.shape[1], np.int32)
    _mix_lines(image.view(np.uint8), first - offset, count, weights, out.view(np.uint8), total)
    return out


@njit(_IMAGE(_PART, *_SCALARS), cache=True, nogil=True)
def resize_width(image, offset, old, new, start, stop):
    """As `resize_height`, for columns: ``[H, w] -> [H, stop - start]``.

    Strips of rows are transposed, so that vector instructions add whole lines, two rows at a time
    as 64-bit numbers: half the reads and writes.
    """
    first, count, weights = _bicubic_weights(old, new, start, stop)
    left, right, width = first[0], first[-1] + count[-1], stop - start
    first -= left
    height, half = image.shape[0], np.uint64(32)
    out = np.empty((height, width), np.uint32)
    strip = np.zeros((right - left, _STRIP // 2), np.uint64)
    mixed = np.empty((width, _STRIP // 2), np.uint64)
    total = np.empty(4 * _STRIP, np.int32)
    for top in range(0, height, _STRIP):
        bottom = min(top + _STRIP, height)
        for y in range(top, bottom, 2):  # read and written along rows, as they lie in memory
            upper, lower = image[y, left - offset :], image[min(y + 1, height - 1), left - offset :]
            for x in range(right - left):
                strip[x, (y - top) // 2] = np.uint64(upper[x]) | np.uint64(lower[x]) << half
        _mix_lines(strip.view(np.uint8), first, count, weights, mixed.view(np.uint8), total)
        for y in range(top, bottom, 2):
            upper, lower = out[y], out[min(y + 1, height - 1)]
            for x in range(width):
                pair = mixed[x, (y - top) // 2]
                lower[x] = np.uint32(pair >> half)
                upper[x] = np.uint32(pair)  # the second: in the last of an odd number, they are one
    return out


@njit(types.Array(types.uint8, 3, "C")(_READ_ONLY_IMAGE), cache=True, nogil=True)
def to_rgb(image):
    """``[H, W] -> uint8 [H, W, 3]``."""
    out = np.empty((*image.shape, 3), np.uint8)
    four, three = image.view(np.uint8).reshape(4 * image.size), out.reshape(out.size)
    for i in range(image.size):
        for channel in range(3):
            three[3 * i + channel] = four[4 * i + channel]
    return out


@njit(cache=True)
def _with_edges(image):
    """The image with its edge repeated twice on all sides, ``[H, W] -> [H + 4, W + 4]``."""
    height, width = image.shape
    out = np.empty((height + 4, width + 4), np.uint32)
    for y in range(height + 4):
        row = image[min(max(y - 2, 0), height - 1)]
        out[y, :2], out[y, 2:-2], out[y, -2:] = row[0], row, row[-1]
    return out


# Loops along arrays are functions: within a larger one, LLVM does not see that all can be vectors.


@njit(cache=True)
def _places(matrix, y, height, width, first, across, down):
    """Where the pixels of row y come from: `first` is filled with the index, in the image with
    edges, of the first of 4 x 4 neighbours; `across`, `down` with the place between second and
    third, 0 to 1.

    Returns start and stop of those inside; whether any lies between columns, between rows.
    """
    start, stop, stride = width, 0, np.int32(width + 4)
    between_columns = between_rows = False
    for x in range(width):
        u = matrix[0] * (x + 0.5) + matrix[1] * (y + 0.5) + matrix[2]
        v = matrix[3] * (x + 0.5) + matrix[4] * (y + 0.5) + matrix[5]
        inside = (u >= 0.0) & (u < width) & (v >= 0.0) & (v < height)
        start, stop = min(start, x if inside else width), max(stop, x + 1 if inside else 0)
        u, v = u - 0.5, v - 0.5
        column, row = np.floor(u), np.floor(v)
        first[x] = np.int32(row + 1.0) * stride + np.int32(column + 1.0)
        across[x], down[x] = u - column, v - row
        between_columns |= inside & (u != column)
        between_rows |= inside & (v != row)
    return start, stop, between_columns, between_rows


@njit(cache=True)
def _is_run(index):
    run = True
    for x in range(len(index)):
        run &= index[x] - np.uint32(x) == index[0]
    return run


@njit(cache=True)
def _gather(pixels, index, is_run, out):
    if is_run:
        pixels = pixels[index[0] :]
        for x in range(len(index)):
            out[x] = pixels[x]
    else:
        for x in range(len(index)):
            out[x] = pixels[index[x]]


@njit(cache=True)
def _to_bytes(values, out):
    for x in range(len(values)):
        for j in range(4 * x, 4 * x + 4):
            out[j] = values[x]


@njit(cache=True)
def _interpolate(lines, t, out):
    a, b, c, d = lines[0], lines[1], lines[2], lines[3]
    for j in range(len(out)):  # 0 +: bytes become larger integers
        out[j] = _cubic(0 + a[j], 0 + b[j], 0 + c[j], 0 + d[j], t[j])


@njit(cache=True)
def _interpolate_to_bytes(lines, t, out):
    a, b, c, d = lines[0], lines[1], lines[2], lines[3]
    for j in range(len(out)):
        value = np.int32(_cubic(0 + a[j], 0 + b[j], 0 + c[j], 0 + d[j], t[j]))
        out[j] = min(max(value, 0), 255)


@njit(_IMAGE(_READ_ONLY_IMAGE, _MATRIX, types.uint32), cache=True, nogil=True)
def affine(image, matrix, fill):
    """Bicubic affine map without antialiasing, same size; `matrix` takes output to input pixels.

    Neighbours are gathered row by row, so that the arithmetic runs along arrays: 4 x 4, or 4 where
    a row lies on whole pixels in one direction (shears and shifts).
    """
    height, width = image.shape
    stride = width + 4
    pixels = _with_edges(image).reshape((height + 4) * stride)
    out = np.empty((height, width), np.uint32)
    first, neighbours = np.empty(width, np.uint32), np.empty((4, width), np.uint32)
    across, down, t = np.empty(width), np.empty(width), np.empty(4 * width)
    values, lines = neighbours.view(np.uint8), np.empty((4, 4 * width))
    for y in range(height):
        start, stop, between_columns, between_rows = _places(
            matrix, y, height, width, first, across, down
        )
        out[y] = fill
        if start >= stop:
            continue
        index, result = first[start:stop], out[y, start:stop].view(np.uint8)
        is_run = _is_run(index)
        if between_columns and between_rows:
            _to_bytes(across[start:stop], t)
            for i in range(4):
                for k in range(4):
                    _gather(pixels[i * stride + k :], index, is_run, neighbours[k])
                _interpolate(values, t, lines[i, : len(result)])
            _to_bytes(down[start:stop], t)
            _interpolate_to_bytes(lines, t, result)
        else:
            _to_bytes(down[start:stop] if between_rows else across[start:stop], t)
            for k in range(4):
                offset = k * stride + 1 if between_rows else stride + k
                _gather(pixels[offset:], index, is_run, neighbours[k])
            _interpolate_to_bytes(values, t, result)
    return out


@njit(_IMAGE(_READ_ONLY_IMAGE, _TABLES), cache=True, nogil=True)
def look_up(image, tables):
    """Each value of channel c becomes ``tables[c, value]``; ``uint8 [3, 256]``."""
    out = np.empty(image.shape, np.uint32)
    pixels, result = image.reshape(image.size), out.reshape(image.size)
    red, green, blue = tables[0], tables[1], tables[2]
    for i in range(len(pixels)):
        pixel = pixels[i]
        result[i] = red[pixel & 255] | green[pixel >> 8 & 255] << 8 | blue[pixel >> 16 & 255] << 16
    return out


@njit(_IMAGE(_READ_ONLY_IMAGE), cache=True, nogil=True)
def gray(image):
    """The brightness (ITU-R 601-2, with 16 binary places) in all channels."""
    out = np.empty(image.shape, np.uint32)
    pixels, result = image.reshape(image.size), out.reshape(image.size)
    for i in range(len(pixels)):
        red, green, blue = pixels[i] & 255, pixels[i] >> 8 & 255, pixels[i] >> 16 & 255
        result[i] = (19595 * red + 38470 * green + 7471 * blue + 32768 >> 16) * 0x10101
    return out


@njit(types.Array(types.int64, 2, "C")(_READ_ONLY_IMAGE), cache=True, nogil=True)
def histogram(image):
    """How often each channel has each value, ``[3, 256]``."""
    out = np.zeros((3, 256), np.int64)
    pixels = image.reshape(image.size)
    red, green, blue = out[0], out[1], out[2]
    for i in range(len(pixels)):
        pixel = pixels[i]
        red[pixel & 255] += 1
        green[pixel >> 8 & 255] += 1
        blue[pixel >> 16 & 255] += 1
    return out


@njit(_IMAGE(_READ_ONLY_IMAGE, _READ_ONLY_IMAGE, types.float32), cache=True, nogil=True)
def blend(first, second, factor):
    """`first` for a factor of 0, `second` for 1; beyond that, what sets them apart grows."""
    out = np.empty(first.shape, np.uint32)
    result = out.view(np.uint8).reshape(4 * out.size)
    a, b = first.view(np.uint8).reshape(4 * out.size), second.view(np.uint8).reshape(4 * out.size)
    low, high = np.float32(0), np.float32(255)
    for i in range(len(result)):
        value = np.float32(a[i])
        value += factor * (np.float32(b[i]) - value)
        result[i] = np.int32(min(max(value, low), high))
    return out


@njit(_IMAGE(_READ_ONLY_IMAGE), cache=True, nogil=True)
def smooth(image):
    """The 3 x 3 mean with a weight of 5 in the middle; the edge stays. ``[H, W] -> [H, W]``."""
    out = image.copy()
    lines, out_lines = image.view(np.uint8), out.view(np.uint8)
    for y in range(1, image.shape[0] - 1):
        above, line, below = lines[y - 1], lines[y], lines[y + 1]
        middle, result = line[4:-4], out_lines[y, 4:-4]
        a, b, c = above[:-8], above[4:-4], above[8:]  # of equal length, without which no vector
        d, e = line[:-8], line[8:]  # instructions come of it
        f, g, h = below[:-8], below[4:-4], below[8:]
        for j in range(len(middle)):
            total = np.int32(a[j]) + np.int32(b[j]) + np.int32(c[j]) + np.int32(d[j])
            total += np.int32(e[j]) + np.int32(f[j]) + np.int32(g[j]) + np.int32(h[j])
            total += 5 * np.int32(middle[j])
            result[j] = (2 * total + 13) // 26  # rounded total / 13
    return out
