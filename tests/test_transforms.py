"""Image pipelines: sizes, determinism, switches, errors. (Against timm: tests/timm.)"""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from augment import OPS, POLICIES, build_policy
from cli.errors import ConfigError
from config import get_config
from cpu.resample import from_image, to_image
from transforms import build_augmentations, build_eval_transform, build_train_transform, draw_crop

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


@pytest.fixture
def config():
    config = get_config()
    config.DATA.IMAGE_SIZE = 32
    config.TRAIN.RAND_AUGMENT = False
    config.TRAIN.COLOR_JITTER = 0.0
    return config


def photo(width=50, height=40, seed=0):
    """Smooth colours with noise, and flat black and white corners as of overexposed pictures."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    array = np.asarray(small.resize((width, height), BICUBIC), np.int16)
    array = array + rng.integers(-20, 21, array.shape)
    array[: height // 4, : width // 4] = 255
    array[height - height // 4 :, width - width // 4 :] = 0
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8))


def changed(name, image, argument=None, resample=BICUBIC, fill=(1, 2, 3)):
    """An operation on an image of Pillow's."""
    return to_image(OPS[name].pixels(from_image(image), argument, resample, fill))


SIZES = [(50, 40), (40, 50), (32, 32), (33, 97), (300, 20), (7, 5), (1, 1), (1, 60), (60, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_pipelines_return_contiguous_uint8_of_the_configured_size(config, size):
    config.TRAIN.RAND_AUGMENT = True
    train, pixels = build_train_transform(config), from_image(photo(*size))
    arrays = [train(pixels, np.random.default_rng(seed)) for seed in range(5)]
    for array in (build_eval_transform(config)(pixels), *arrays):
        assert (array.shape, array.dtype) == ((32, 32, 3), np.uint8)
        assert array.flags.c_contiguous and array.flags.writeable


@pytest.mark.parametrize(
    "switch", ["RAND_AUGMENT", "AUTO_AUGMENT", "THREE_AUGMENT", "COLOR_JITTER", None]
)
def test_training_is_a_function_of_the_image_and_the_generator(config, switch):
    if switch:
        config.TRAIN[switch] = 0.4 if switch == "COLOR_JITTER" else True
    transform, pixels = build_train_transform(config), from_image(photo())
    before = pixels.copy()
    first = [transform(pixels, np.random.default_rng(seed)) for seed in range(8)]
    again = [transform(pixels, np.random.default_rng(seed)) for seed in range(8)]
    assert np.array_equal(first, again)
    assert any(not np.array_equal(first[0], other) for other in first[1:])
    assert np.array_equal(before, pixels)  # the next epoch gets the same image


def test_crops_lie_inside_the_image_and_one_that_never_fits_is_the_largest_central_one():
    rng, ratio = np.random.default_rng(0), (0.75, 4 / 3)
    for size in SIZES * 200:
        left, top, right, bottom = draw_crop(*size, (0.08, 1.0), ratio, rng)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1], size
    assert draw_crop(100, 10, (4.0, 5.0), ratio, rng) == (43, 0, 56, 10)
    assert draw_crop(10, 100, (4.0, 5.0), ratio, rng) == (0, 43, 10, 56)
    assert draw_crop(20, 20, (4.0, 5.0), ratio, rng) == (0, 0, 20, 20)


def test_random_interpolation_is_bilinear_or_bicubic(config):
    config.DATA.TRAIN_INTERPOLATION = "random"
    config.TRAIN.CROP_SCALE, config.TRAIN.CROP_RATIO = (1.0, 1.0), (1.0, 1.0)
    config.TRAIN.HFLIP = 0.0
    image, transform = photo(64, 64), build_train_transform(config)
    both = [np.asarray(image.resize((32, 32), kind)) for kind in (BILINEAR, BICUBIC)]
    found = [transform(from_image(image), np.random.default_rng(seed)) for seed in range(20)]
    seen = [[np.array_equal(array, expected) for expected in both] for array in found]
    assert np.sum(seen, axis=1).tolist() == [1] * 20 and np.any(seen, axis=0).all()


def test_posterizing_and_solarizing_equal_pils_operations():
    image = photo()
    for bits in range(1, 9):
        assert np.array_equal(changed("Posterize", image, bits), ImageOps.posterize(image, bits))
    for start in range(257):
        assert np.array_equal(changed("Solarize", image, start), ImageOps.solarize(image, start))
    assert not np.asarray(changed("PosterizeIncreasing", image, 0)).any()  # Pillow refuses 0 bits


def test_histograms_are_stretched_and_flattened_as_by_pil():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, high = np.sort(rng.integers(0, 256, 2))
        shape = *rng.integers(1, 60, 2), 3
        values = rng.integers(low, high + 1, shape) ** rng.uniform(0.5, 1)  # darker, with gaps
        image = Image.fromarray(values.astype(np.uint8))
        assert np.array_equal(changed("AutoContrast", image), ImageOps.autocontrast(image))
        assert np.array_equal(changed("Equalize", image), ImageOps.equalize(image))


@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Color", "Sharpness"])
def test_enhancing_equals_pils_for_every_value_and_factor(name):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    images = [Image.fromarray(gray), Image.fromarray(gray // 5 + 200), photo()]
    images += [photo(*size) for size in ((2, 9), (9, 2), (3, 3), (1, 1))]
    for factor in (*np.random.default_rng(0).uniform(0, 2.5, 200), 0.0, 0.5, 1.0, 1.5, 2.0, 10.0):
        for image in images:
            expected = getattr(ImageEnhance, name)(image).enhance(factor)
            assert np.array_equal(changed(name, image, factor), expected), factor


def test_3_augment_is_grayscale_or_solarize_or_blur_each_a_third():
    policy, rng = build_policy("3a", "TRAIN.THREE_AUGMENT"), np.random.default_rng(0)
    arguments = {"Grayscale": [], "Solarize": [], "GaussianBlur": []}
    for name, argument, _ in (op for _ in range(3000) for op in policy.draw(rng)):
        arguments[name].append(argument)
    assert min(map(len, arguments.values())) > 900 and sum(map(len, arguments.values())) == 3000
    assert set(arguments["Solarize"]) == {128}
    assert 0.1 <= min(arguments["GaussianBlur"]) < 0.2 and 1.9 < max(arguments["GaussianBlur"]) <= 2


def test_timms_string_is_read_and_configures_what_the_numbers_do(config):
    config.TRAIN.RAND_AUGMENT = True
    numbers = build_augmentations(config)[0]
    config.TRAIN.RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
    string = build_augmentations(config)[0]
    assert vars(numbers) == vars(string)
    assert numbers.fill == (124, 116, 104)


def test_augmentations_win_in_the_order_three_rand_auto_jitter(config):
    known = {id(choices): name for name, choices in POLICIES.items()}

    def names():
        choices = [getattr(found, "choices", None) for found in build_augmentations(config)]
        return [known.get(id(found), "rand") if found else "jitter" for found in choices]

    assert names() == []
    for key, value, expected in (
        ("COLOR_JITTER", 0.3, ["jitter"]),
        ("AUTO_AUGMENT", True, ["original"]),
        ("AUTO_AUGMENT", "v0", ["v0"]),
        ("AUTO_AUGMENT", "3a", ["3a", "jitter"]),
        ("RAND_AUGMENT", True, ["rand"]),
        ("THREE_AUGMENT", True, ["3a", "jitter"]),
    ):
        config.TRAIN[key] = value
        assert names() == expected


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("TRAIN.RAND_AUGMENT", "rand-m9-w0", "AUGMENT is 'rand-m9-w0': bad section 'w0'"),
        ("TRAIN.RAND_AUGMENT", "rand-m", "bad section 'm'"),
        ("TRAIN.RAND_AUGMENT", "rand-p2", "'rand-p2': p is at most 1, n 64, m and mmax 100"),
        ("TRAIN.RAND_AUGMENT", "rand-m9-n65", "'rand-m9-n65': p is at most 1, n 64"),
        ("TRAIN.RAND_AUGMENT", "rand-m" + 400 * "9", "m and mmax 100"),
        ("TRAIN.RAND_AUGMENT", "random", "TRAIN.RAND_AUGMENT is 'random'; choose rand-"),
        ("TRAIN.AUTO_AUGMENT", "v1", "TRAIN.AUTO_AUGMENT is 'v1'; choose rand-... or one of orig"),
        ("TRAIN.AUTO_AUGMENT", "v0-m9", "bad section 'm9'; known are: mstd<number>"),
        ("TRAIN.AUTO_AUGMENT", "3a-mstd1", "bad section 'mstd1'; known are: none"),
    ],
)
def test_a_bad_value_is_refused_with_its_key(config, key, value, message):
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(ConfigError) as error:
        build_train_transform(config)
    assert message in str(error.value)
