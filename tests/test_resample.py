"""cpu/resample.py: the same pixels as Pillow's, whoever computes them."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageStat

from cpu import resample
from cpu.resample import from_image, operations, to_image

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
FILL = (124, 116, 104)


@pytest.fixture(autouse=True)
def loaded_afresh():
    operations.cache_clear()
    yield
    operations.cache_clear()


@pytest.fixture(params=["on", "off"])
def switched(request, monkeypatch):
    monkeypatch.setenv("RESMLP_NUMBA", request.param)


def photo(width, height, seed=0):
    """Half noise, half black and white stripes, which overshoot."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, [height, width, 3], dtype=np.uint8)
    values[height // 2 :, ::2], values[height // 2 :, 1::2] = 0, 255
    return Image.fromarray(values)


def run(name, image, *arguments, **options):
    """An operation on an image of Pillow's, and its result as one."""
    return to_image(getattr(operations(), name)(from_image(image), *arguments, **options))


def mapped(image, matrix, resample=BICUBIC):
    kind = Image.Transform.AFFINE
    return image.transform(image.size, kind, matrix, resample=resample, fillcolor=FILL)


def test_the_compiled_code_works_here():
    """Everything else in this file would pass without."""
    assert type(operations()) is resample.Compiled


@pytest.mark.parametrize("seed", range(40))
def test_resizing_and_crops_of_the_result_give_pillows_pixels(seed):
    rng = np.random.default_rng(seed)
    for _ in range(5):
        old, new = rng.integers(1, 600, 2), tuple(map(int, rng.integers(1, 300, 2)))
        old = np.where(rng.random(2) < 0.1, (1, new[1]), old)  # also a line, and the same height
        left, top = rng.integers(0, new)
        crop = tuple(map(int, (left, top, *rng.integers((left + 1, top + 1), np.add(new, 1)))))
        image = photo(*old)
        expected = image.resize(new, BICUBIC)
        assert run("resize", image, new, BICUBIC) == expected, (old, new)
        assert run("resize", image, new, BICUBIC, crop) == expected.crop(crop), (old, new, crop)


@pytest.mark.parametrize("old, box", [((90, 60), (7, 5, 71, 58)), ((40, 130), (0, 1, 40, 2))])
def test_a_box_of_the_image_gives_what_its_copy_does(old, box, switched):
    image = photo(*old)
    expected = image.crop(box).resize((48, 40), BICUBIC)
    assert run("resize", image, (48, 40), BICUBIC, box=box) == expected
    crop = (5, 6, 30, 40)
    assert run("resize", image, (48, 40), BICUBIC, crop, box) == expected.crop(crop)


MATRICES = [
    *[(1, shear, 0, 0, 1, 0) for shear in (0.3, -0.271, 0.0)],
    *[(1, 0, 0, shear, 1, 0) for shear in (0.3, -0.271)],
    *[(1, 0, shift, 0, 1, 0) for shift in (40, -40.5, 13.37, 1000)],
    *[(1, 0, 0, 0, 1, shift) for shift in (40, -40.5, 13.37, -1000)],
    *[(0.8, 0.6, -3.3, -0.6, 0.8, 50.1), (-1, 0, 60, 0, -1, 50), (0.1, 0, 10, 0, 7, -20)],
]


@pytest.mark.parametrize("seed", range(20))
def test_affine_maps_give_pillows_pixels(seed):
    rng = np.random.default_rng(seed)
    for size in ((64, 64), (61, 47), (5, 1), (1, 1)):
        image, matrix = photo(*size), MATRICES[seed % len(MATRICES)]
        assert run("affine", image, matrix, BICUBIC, FILL) == mapped(image, matrix), size
    for _ in range(10):
        image = photo(*map(int, rng.integers(1, 70, 2)), seed)
        matrix = np.where(rng.random(6) < 0.5, (1, 0, 0, 0, 1, 0), rng.normal(0, (1, 1, 30) * 2))
        matrix = tuple(matrix.round(rng.integers(0, 4)).tolist())  # often on whole pixels
        assert run("affine", image, matrix, BICUBIC, FILL) == mapped(image, matrix), matrix


def test_every_colour_has_pillows_gray():
    green_blue = np.broadcast_arrays(*np.ogrid[:256, :256])
    for red in range(0, 256, 5):
        image = Image.fromarray(np.dstack([np.full((256, 256), red), *green_blue]).astype("u1"))
        assert run("saturate", image, 0) == image.convert("L").convert("RGB")


@pytest.mark.parametrize("value", [None, 0, 200])
def test_what_is_measured_is_what_pillow_measures(value, switched):
    image = photo(41, 30) if value is None else Image.new("RGB", (41, 30), (value, 7, 255))
    pixels = from_image(image)
    assert operations().histogram(pixels).ravel().tolist() == image.histogram()
    assert operations().mean_gray(pixels) == ImageStat.Stat(image.convert("L")).mean[0]
    assert np.array_equal(operations().to_rgb(pixels), np.asarray(image))


def test_other_filters_are_pillows(switched):
    matrix, image = (0.8, 0.6, -3.3, -0.6, 0.8, 5.1), photo(40, 30)
    assert run("resize", image, (20, 20), BILINEAR) == image.resize((20, 20), BILINEAR)
    assert run("affine", image, matrix, BILINEAR, FILL) == mapped(image, matrix, BILINEAR)


def round_otherwise(image, *args, original=Image.Image.resize):
    return original(image, *args).point(lambda value: value ^ 1)


@pytest.mark.parametrize("said", ["RESMLP_NUMBA", "numba", "rounds in another way"])
def test_where_the_compiled_code_cannot_serve_pillow_does_it_and_that_is_said(said, monkeypatch):
    if said == "RESMLP_NUMBA":
        monkeypatch.setenv("RESMLP_NUMBA", "off")
    elif said == "numba":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        monkeypatch.setattr(Image.Image, "resize", round_otherwise)
    image = photo(40, 30)
    assert run("resize", image, (20, 20), BICUBIC) == image.resize((20, 20), BICUBIC)
    lines = []
    resample.prepare(lines.append)
    assert "by Pillow" in lines[0] and said in lines[0]
