"""Image pipelines against timm and torchvision: equal pixels, equally distributed decisions. Draws
have fixed seeds; a p-value below `ALPHA` means that distributions differ.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
stats = pytest.importorskip("scipy.stats")

from timm.data import auto_augment as timm_auto_augment  # noqa: E402
from timm.data import create_transform  # noqa: E402
from timm.data.transforms import RandomResizedCropAndInterpolation  # noqa: E402
from torchvision.transforms import ColorJitter as TorchColorJitter  # noqa: E402
from torchvision.transforms import functional as F  # noqa: E402

from augment import OPS, build_policy  # noqa: E402
from config import get_config  # noqa: E402
from cpu.resample import from_image  # noqa: E402
from tests.test_transforms import changed, photo  # noqa: E402
from transforms import (  # noqa: E402
    ColorJitter,
    build_eval_transform,
    build_train_transform,
    draw_crop,
)

DRAWS = 100_000
ALPHA = 1e-3
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def hwc(tensor):
    return tensor.numpy().transpose(1, 2, 0)


SIZES = [
    *((500, 375), (375, 500), (500, 333), (333, 500), (640, 427), (1024, 683), (257, 256)),
    *((256, 256), (224, 224), (255, 255), (223, 300), (301, 223), (225, 1000), (1000, 225)),
    *((96, 96), (31, 17), (17, 31), (5, 3), (1, 1), (2, 90), (90, 2)),
]


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_pixels_equal_timms(crop_pct, interpolation):
    for image_size in (224, 97):
        opts = f"DATA.IMAGE_SIZE {image_size} DATA.CROP_PCT {crop_pct}"
        opts = [*opts.split(), "DATA.INTERPOLATION", interpolation, "MODEL.MIXER.PATCH_SIZE", "1"]
        ours = build_eval_transform(get_config(None, opts))
        theirs = create_transform(
            image_size, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True
        )
        for size in SIZES:
            image = photo(*size)
            assert np.array_equal(ours(from_image(image)), hwc(theirs(image))), (image_size, size)


@pytest.mark.parametrize("size", [*range(64, 76), 101, 223, 225])
def test_the_centre_crop_of_any_margin_equals_torchvisions(size):
    ours = build_eval_transform(get_config(None, ["DATA.IMAGE_SIZE", "64"]))
    ours.short = size
    image = photo(size, size + 7)
    assert np.array_equal(ours(from_image(image)), F.center_crop(image, [64, 64]))


def timm_op(name, image, level, sign, resample, fill, monkeypatch):
    monkeypatch.setattr(timm_auto_augment, "_randomly_negate", lambda value: sign * value)
    level_to_arg = timm_auto_augment.LEVEL_TO_ARG[name]
    arguments = level_to_arg(level, {}) if level_to_arg else ()
    op = timm_auto_augment.NAME_TO_OP[name]
    return op(image, *arguments, fillcolor=fill, resample=resample), arguments


def argument_of(name, strength):
    argument = OPS[name].argument
    return None if argument is None else argument(strength)


COMMON = [name for name in OPS if name in timm_auto_augment.NAME_TO_OP and name != "GaussianBlur"]


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_pixels_of_each_operation_equal_timms_at_each_level(name, sign, monkeypatch):
    fill = (124, 116, 104)
    images = [photo(224, 224), photo(61, 40, seed=1), Image.new("RGB", (32, 32), (9, 99, 199))]
    for level in (0, 0.3, 1, 2.5, 5, 7.77, 9, 9.49, 10):
        for resample in (BICUBIC, BILINEAR):
            for image in images:
                argument = argument_of(name, level / 10 * (sign if OPS[name].signed else 1))
                if "Posterize" in name and argument == 0:
                    continue  # Pillow refuses to keep no bits, and timm fails; ours is black
                theirs, timm_argument = timm_op(
                    name, image, level, sign, resample, fill, monkeypatch
                )
                assert timm_argument == (() if argument is None else (argument,))
                ours = changed(name, image, argument, resample, fill)
                assert np.array_equal(ours, theirs), (level, resample, image.size)


def test_every_operation_of_timms_policies_is_compared():
    names = set(timm_auto_augment._RAND_TRANSFORMS + timm_auto_augment._RAND_INCREASING_TRANSFORMS)
    for policy in ("original", "originalr", "v0", "v0r"):
        for sub_policy in timm_auto_augment.auto_augment_policy(policy):
            names |= {op.name for op in sub_policy}
    assert names == set(COMMON)


def test_the_three_of_3_augment_equal_timms_and_colour_jitter_torchvisions():
    image = photo(224, 224)
    gray = timm_auto_augment.desaturate(image, 1.0)
    assert np.array_equal(changed("Grayscale", image), gray)
    blurred = timm_auto_augment.gaussian_blur(image, 1.3)
    assert np.array_equal(changed("GaussianBlur", image, 1.3), blurred)
    solarized = timm_auto_augment.solarize(image, 128)
    assert np.array_equal(changed("Solarize", image, argument_of("Solarize", 0.5)), solarized)
    theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for op, their in zip(ColorJitter.NAMES, theirs):
        assert np.array_equal(changed(op, image, 0.61), their(image, 0.61))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_resize_and_flips_equal_torchvisions_for_the_same_box(interpolation):
    config = get_config()
    config.DATA.TRAIN_INTERPOLATION = interpolation
    config.TRAIN.RAND_AUGMENT, config.TRAIN.COLOR_JITTER = False, 0.0
    config.TRAIN.HFLIP = config.TRAIN.VFLIP = 1.0
    transform = build_train_transform(config)
    resample = {"bicubic": F.InterpolationMode.BICUBIC, "bilinear": F.InterpolationMode.BILINEAR}
    for seed, size in enumerate(SIZES[:16]):
        image = photo(*size)
        rng = np.random.default_rng(seed)
        left, top, right, bottom = draw_crop(*size, transform.scale, transform.ratio, rng)
        theirs = F.resized_crop(
            image, top, left, bottom - top, right - left, [224, 224], resample[interpolation]
        )
        theirs = F.vflip(F.hflip(theirs))
        ours = transform(from_image(image), np.random.default_rng(seed))
        assert np.array_equal(ours, theirs), size


def assert_same_frequencies(ours, theirs):
    ours, theirs = Counter(ours), Counter(theirs)
    keys = sorted(ours | theirs, key=repr)
    table = np.array([[count[key] for key in keys] for count in (ours, theirs)])
    common = table.sum(0) >= 20
    rare = table[:, ~common].sum(1, keepdims=True)
    table = np.hstack([table[:, common], rare]) if rare.any() else table
    if table.shape[1] > 1:
        assert stats.chi2_contingency(table).pvalue > ALPHA


def assert_same_distribution(ours, theirs):
    if len(set(ours)) < 100:
        assert_same_frequencies(ours, theirs)
    else:
        assert stats.ks_2samp(ours, theirs).pvalue > ALPHA


def recorded(policy):
    """What a policy of timm's does to `DRAWS` images: for each a list of (name, argument)."""
    ops = getattr(policy, "ops", None) or [op for sub_policy in policy.policy for op in sub_policy]
    for op in ops:

        def record(image, *arguments, name=op.name, **_):
            return [*image, (name, arguments[0] if arguments else None)]

        op.aug_fn = record
    random.seed(0)
    np.random.seed(0)
    return [policy([]) for _ in range(DRAWS)]


POLICIES = "rand-m9-mstd0.5-inc1 rand rand-m5-n3-p0.7-mstd101-inc1 rand-m9-mstd3-mmax12-inc1"
POLICIES += " original original-mstd0.5 originalr v0 v0r-mstd1.5"


@pytest.mark.slow
@pytest.mark.parametrize("text", POLICIES.split())
def test_policies_draw_what_timms_draw(text):
    rand = text.startswith("rand")
    build = "rand_augment_transform" if rand else "auto_augment_transform"
    theirs = recorded(getattr(timm_auto_augment, build)(text, {}))
    policy = build_policy(text, "TRAIN.RAND_AUGMENT")
    rng = np.random.default_rng(0)
    ours = [[op[:2] for op in policy.draw(rng)] for _ in range(DRAWS)]

    assert_same_frequencies(
        *([tuple(name for name, _ in draw) for draw in draws] for draws in (ours, theirs))
    )
    arguments = [{}, {}]
    for found, draws in zip(arguments, (ours, theirs)):
        for name, argument in (op for draw in draws for op in draw):
            found.setdefault(name, []).append(argument)
    assert arguments[0].keys() == arguments[1].keys()
    for name in arguments[0]:
        assert_same_distribution(arguments[0][name], arguments[1][name])


def test_random_interpolation_of_operations_is_drawn_as_timms():
    policy = build_policy("rand-p1-n1", "", resamples=(BILINEAR, BICUBIC))
    rng = np.random.default_rng(0)
    ops = [op for _ in range(20_000) for op in policy.draw(rng)]
    moved = Counter(op.resample for op in ops if OPS[op.name].moves)
    assert set(moved) == set(timm_auto_augment._RANDOM_INTERPOLATION)
    assert stats.binomtest(moved[BICUBIC], sum(moved.values()), 0.5).pvalue > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (300, 60), (40, 300)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0)])
def test_crop_boxes_are_drawn_as_timms(size, scale):
    ratio = (3 / 4, 4 / 3)
    image = Image.new("1", size)
    random.seed(0)
    theirs = np.array(
        [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(DRAWS)]
    )
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop(*size, scale, ratio, rng) for _ in range(DRAWS)])
    left, top, right, bottom = boxes.T
    ours = np.stack([top, left, bottom - top, right - left], axis=1)
    for quantity in range(4):
        assert stats.ks_2samp(ours[:, quantity], theirs[:, quantity]).pvalue > ALPHA
    for numerator, denominator in ((3, 2), (0, 2), (1, 3)):  # aspect, and place against size
        ratios = [(s[:, numerator] + 1) / s[:, denominator] for s in (ours, theirs)]
        assert stats.ks_2samp(*ratios).pvalue > ALPHA


@pytest.mark.slow
def test_flips_happen_as_often_as_configured():
    opts = "DATA.IMAGE_SIZE 2 MODEL.MIXER.PATCH_SIZE 2 TRAIN.RAND_AUGMENT False "
    opts += "TRAIN.COLOR_JITTER 0.0 TRAIN.CROP_SCALE (1.0,1.0) TRAIN.CROP_RATIO (1.0,1.0) "
    opts += "TRAIN.HFLIP 0.5 TRAIN.VFLIP 0.2"
    transform = build_train_transform(get_config(None, opts.split()))
    image = from_image(Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2)).convert("RGB"))
    rng = np.random.default_rng(0)
    corners = Counter(int(transform(image, rng)[0, 0, 0]) for _ in range(DRAWS))
    expected = {0: 0.5 * 0.8, 1: 0.5 * 0.8, 2: 0.5 * 0.2, 3: 0.5 * 0.2}
    observed = [corners[corner] for corner in expected]
    assert stats.chisquare(observed, DRAWS * np.array(list(expected.values()))).pvalue > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.4, 3.0])  # of the latter no factor is below 0
def test_colour_jitter_draws_as_torchvision(strength):
    torch.manual_seed(0)
    theirs = TorchColorJitter(strength, strength, strength)
    orders, factors = [], [[], [], []]
    for _ in range(DRAWS // 5):
        order, *drawn, _hue = theirs.get_params(
            theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue
        )
        orders.append(tuple(op for op in order.tolist() if op < 3))
        for op, factor in enumerate(drawn):
            factors[op].append(factor)
    rng = np.random.default_rng(0)
    draws = [ColorJitter(strength).draw(rng) for _ in range(DRAWS // 5)]
    assert_same_frequencies([tuple(op for op, _ in draw) for draw in draws], orders)
    for op in range(3):
        ours = [dict(draw)[op] for draw in draws]
        assert stats.ks_2samp(ours, factors[op]).pvalue > ALPHA
