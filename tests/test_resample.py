"""cpu/resample.py: the same pixels as Pillow's, whoever computes them."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageStat

from cpu import resample

BICUBIC = Image.Resampling.BICUBIC
FILL = (124, 116, 104)


@pytest.fixture(autouse=True)
def loaded_afresh():
    resample.load_kernels.cache_clear()
    yield
    resample.load_kernels.cache_clear()


def photo(width, height, seed=0):
    """Half noise, half black and white stripes, which overshoot."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, [height, width, 3], dtype=np.uint8)
    values[height // 2 :, ::2], values[height // 2 :, 1::2] = 0, 255
    return Image.fromarray(values)


def mapped(image, matrix, resample=BICUBIC):
    kind = Image.Transform.AFFINE
    return image.transform(image.size, kind, matrix, resample=resample, fillcolor=FILL)


def reason():
    lines = []
    resample.prepare(lines.append)
    return "\n".join(lines)


def test_the_compiled_code_works_here():
    """Everything else in this file would pass without."""
    assert reason() == ""


@pytest.mark.parametrize("seed", range(40))
def test_resizing_gives_pillows_pixels(seed):
    rng = np.random.default_rng(seed)
    for _ in range(5):
        old, new = rng.integers(1, 600, 2), tuple(map(int, rng.integers(1, 300, 2)))
        image = photo(*old)
        assert resample.resize(image, new, BICUBIC) == image.resize(new, BICUBIC), (old, new)


@pytest.mark.parametrize("seed", range(20))
def test_a_crop_of_the_result_has_its_pixels(seed):
    rng = np.random.default_rng(seed)
    for _ in range(5):
        old, new = rng.integers(1, 600, 2), tuple(map(int, rng.integers(1, 300, 2)))
        left, top = rng.integers(-3, new)
        crop = tuple(map(int, (left, top, *rng.integers((left + 1, top + 1), np.add(new, 5)))))
        image = photo(*old)
        expected = image.resize(new, BICUBIC).crop(crop)
        assert resample.resize(image, new, BICUBIC, crop) == expected, (old, new, crop)


@pytest.mark.parametrize("old", [(1, 1), (1, 300), (300, 1), (224, 90), (90, 224), (224, 224)])
def test_resizing_unusual_shapes_gives_pillows_pixels(old):
    for new in ((224, 224), (1, 1), (3, 500)):
        image = photo(*old)
        assert resample.resize(image, new, BICUBIC) == image.resize(new, BICUBIC), new


@pytest.mark.parametrize(
    "matrix",
    [
        *[(1, shear, 0, 0, 1, 0) for shear in (0.3, -0.271, 0.0)],
        *[(1, 0, 0, shear, 1, 0) for shear in (0.3, -0.271)],
        *[(1, 0, shift, 0, 1, 0) for shift in (40, -40.5, 13.37, 1000)],
        *[(1, 0, 0, 0, 1, shift) for shift in (40, -40.5, 13.37, -1000)],
        (0.8, 0.6, -3.3, -0.6, 0.8, 50.1),
        (-1, 0, 60, 0, -1, 50),
        (0.1, 0, 10, 0, 7, -20),
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (61, 47), (5, 1), (1, 1)])
def test_affine_maps_give_pillows_pixels(matrix, size):
    image = photo(*size)
    assert resample.affine(image, matrix, BICUBIC, FILL) == mapped(image, matrix)


@pytest.mark.parametrize("seed", range(20))
def test_any_affine_map_gives_pillows_pixels(seed):
    rng = np.random.default_rng(seed)
    for _ in range(10):
        image = photo(*map(int, rng.integers(1, 70, 2)), seed)
        matrix = np.where(rng.random(6) < 0.5, (1, 0, 0, 0, 1, 0), rng.normal(0, (1, 1, 30) * 2))
        matrix = tuple(matrix.round(rng.integers(0, 4)).tolist())  # often on whole pixels
        assert resample.affine(image, matrix, BICUBIC, FILL) == mapped(image, matrix), matrix


@pytest.mark.parametrize("size", [(64, 64), (61, 47), (2, 9), (9, 2), (3, 3), (1, 1)])
@pytest.mark.parametrize("factor", [0.0, 0.1, 1 / 3, 0.999, 1.0, 1.0001, 1.37, 1.9, 9.1, -0.5])
def test_saturation_and_sharpness_give_pillows_pixels(size, factor):
    image = photo(*size)
    assert resample.saturate(image, factor) == ImageEnhance.Color(image).enhance(factor)
    assert resample.sharpen(image, factor) == ImageEnhance.Sharpness(image).enhance(factor)


def test_every_colour_has_pillows_gray():
    for red in range(0, 256, 5):
        image = Image.fromarray(
            np.dstack(np.broadcast_arrays(red, *np.ogrid[:256, :256])).astype("u1")
        )
        assert resample.saturate(image, 0) == image.convert("L").convert("RGB")


@pytest.mark.parametrize("switched", ["on", "off"])
@pytest.mark.parametrize("shape", [(256,), (3, 256)])
def test_tables_replace_the_values_of_their_channels(shape, switched, monkeypatch):
    monkeypatch.setenv("RESMLP_NUMBA", switched)
    tables = np.random.default_rng(0).integers(0, 256, shape)
    expected = photo(40, 30).point(np.broadcast_to(tables, (3, 256)).ravel().tolist())
    assert resample.look_up(photo(40, 30), tables + 0.9) == expected


@pytest.mark.parametrize("switched", ["on", "off"])
@pytest.mark.parametrize("value", [None, 0, 200])
def test_what_is_measured_is_what_pillow_measures(value, switched, monkeypatch):
    monkeypatch.setenv("RESMLP_NUMBA", switched)
    image = photo(41, 30) if value is None else Image.new("RGB", (41, 30), (value, 7, 255))
    assert [*map(tuple, resample.extremes(image))] == [*image.getextrema()]
    assert resample.histogram(image).ravel().tolist() == image.histogram()
    assert resample.mean_gray(image) == ImageStat.Stat(image.convert("L")).mean[0]


@pytest.mark.parametrize("switched", ["on", "off"])
@pytest.mark.parametrize("filter", [BICUBIC, Image.Resampling.BILINEAR])
def test_an_array_of_the_pixels_gives_what_the_image_does(filter, switched, monkeypatch):
    monkeypatch.setenv("RESMLP_NUMBA", switched)
    image, tables = photo(41, 30), np.random.default_rng(0).integers(0, 256, (3, 256))
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(30, 41)
    for direction in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
        assert same(resample.flip(pixels, direction), image.transpose(direction))
    for function, arguments in (
        (resample.resize, ((20, 25), filter)),
        (resample.resize, ((20, 25), filter, (2, 3, 15, 20), (5, 1, 40, 29))),
        (resample.resize, ((20, 25), filter, (-2, 3, 15, 30))),
        (resample.affine, ((0.8, 0.6, -3.3, -0.6, 0.8, 5.1), filter, FILL)),
        (resample.saturate, (0.4,)),
        (resample.sharpen, (1.7,)),
        (resample.look_up, (tables,)),
    ):
        assert same(function(pixels, *arguments), function(image, *arguments)), function
    for function in (resample.extremes, resample.histogram, resample.mean_gray):
        assert np.array_equal(function(pixels), function(image)), function
    assert np.array_equal(resample.to_array(pixels), np.asarray(image))


def same(picture, image):
    return isinstance(image, Image.Image) and resample.to_image(picture) == image


@pytest.mark.parametrize("switched", ["on", "off"])
@pytest.mark.parametrize("old, box", [((90, 60), (7, 5, 71, 58)), ((40, 130), (0, 1, 40, 2))])
def test_a_box_of_the_image_gives_what_its_copy_does(old, box, switched, monkeypatch):
    monkeypatch.setenv("RESMLP_NUMBA", switched)
    image = photo(*old)
    expected = image.crop(box).resize((48, 40), BICUBIC)
    assert resample.resize(image, (48, 40), BICUBIC, box=box) == expected
    assert resample.resize(image, (48, 40), BICUBIC, (5, 6, 30, 40), box) == expected.crop(
        (5, 6, 30, 40)
    )


def test_the_memory_of_images_is_given_back():
    resource = pytest.importorskip("resource")

    def peak():  # KB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def use(times):
        for _ in range(times):
            image = Image.new("RGB", (1000, 1000))  # 4 MB
            resample.to_array(resample.resize(image, (20, 20), BICUBIC))

    use(5)
    before = peak()
    use(100)
    assert peak() - before < 100_000


@pytest.mark.parametrize("switched", ["on", "off"])
def test_other_modes_and_filters_are_pillows(switched, monkeypatch):
    monkeypatch.setenv("RESMLP_NUMBA", switched)
    matrix, bilinear = (0.8, 0.6, -3.3, -0.6, 0.8, 5.1), Image.Resampling.BILINEAR
    image, gray = photo(40, 30), photo(40, 30).convert("L")
    assert resample.resize(image, (20, 20), bilinear) == image.resize((20, 20), bilinear)
    assert resample.resize(gray, (20, 20), BICUBIC) == gray.resize((20, 20), BICUBIC)
    assert resample.affine(image, matrix, bilinear, FILL) == mapped(image, matrix, bilinear)
    assert resample.saturate(gray, 0.4) == ImageEnhance.Color(gray).enhance(0.4)
    assert resample.sharpen(gray, 0.4) == ImageEnhance.Sharpness(gray).enhance(0.4)


def test_the_switch_leaves_everything_to_pillow_and_is_said(monkeypatch):
    monkeypatch.setenv("RESMLP_NUMBA", "off")
    image = photo(40, 30)
    assert resample.resize(image, (20, 20), BICUBIC) == image.resize((20, 20), BICUBIC)
    assert "by Pillow" in reason() and "RESMLP_NUMBA" in reason()


def test_without_numba_pillow_does_it_and_that_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    image = photo(40, 30)
    assert resample.resize(image, (20, 20), BICUBIC) == image.resize((20, 20), BICUBIC)
    assert "by Pillow" in reason() and "numba" in reason()


def test_a_pillow_that_rounds_in_another_way_is_left_alone(monkeypatch):
    original = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *args: original(self, *args).point(lambda v: v ^ 1)
    )
    assert "rounds in another way" in reason()
    image = photo(40, 30)
    assert resample.resize(image, (20, 20), BICUBIC) == image.resize((20, 20), BICUBIC)
