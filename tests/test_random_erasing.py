"""Random erasing: which pixels change, and what they become."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

import random_erasing
from batch_augment import BatchAugment
from config import get_config
from random_erasing import RandomErasing, draw_boxes
from utils import to_device


def erase(erasing, images, seed=0):
    """Of tensors."""
    plan = erasing.plan(np.random.default_rng(seed), *images.shape)
    return erasing.apply(images, to_device(plan))


def call(erasing, images, seed=0):
    paddle.seed(seed)
    return erase(erasing, paddle.to_tensor(images), seed).numpy()


def make_images(batch, height=24, width=20):
    return np.random.default_rng(9).uniform(5, 6, (batch, 3, height, width)).astype("float32")


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_exactly_the_pixels_of_the_boxes_change(mode, count, batch):
    images = make_images(batch)
    for seed in range(3):
        boxes = draw_boxes(np.random.default_rng(seed), batch, 24, 20, 0.5, count)
        inside = np.zeros(images.shape, bool)
        for number, image_boxes in enumerate(boxes):
            for top, bottom, left, right in image_boxes:
                inside[number, :, top:bottom, left:right] = True
        result = call(RandomErasing(0.5, mode, count), images, seed)
        np.testing.assert_array_equal(result[~inside], images[~inside])
        assert (np.abs(result[inside]) < 5).all()  # the images are above


def test_const_fills_with_zero_also_a_transposed_view():
    images = make_images(8)
    result = call(RandomErasing(1.0, "const"), images)
    changed = result != images
    assert changed.any(axis=(1, 2, 3)).all() and (result[changed] == 0).all()
    view = paddle.to_tensor(images.transpose(0, 2, 3, 1).copy()).transpose([0, 3, 1, 2])
    np.testing.assert_array_equal(erase(RandomErasing(1.0, "const"), view).numpy(), result)


def test_rand_fills_a_box_with_one_colour_a_channel():
    images = make_images(200)
    result = call(RandomErasing(1.0, "rand"), images)
    colours = []
    for image, changed in zip(result, result != images):
        found = [np.unique(channel[mask]) for channel, mask in zip(image, changed)]
        assert all(len(values) == 1 for values in found)
        colours += [values[0] for values in found]
    assert len(set(colours)) == 600
    assert np.mean(colours) == pytest.approx(0, abs=0.15)
    assert np.std(colours) == pytest.approx(1, abs=0.1)


def test_rand_gives_each_box_of_an_image_its_colour():
    result = call(RandomErasing(1.0, "rand", 3), make_images(50))
    seen = {len(np.unique(channel[channel < 5])) for channel in result[:, 0]}
    assert seen == {1, 2, 3}


def test_pixel_fills_with_independent_normal_noise():
    images = make_images(300)
    result = call(RandomErasing(1.0, "pixel"), images)
    noise = result[result != images]
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert len(np.unique(noise)) > 0.99 * len(noise)


def test_a_box_that_never_fits_is_left_out(monkeypatch):
    monkeypatch.setattr(random_erasing, "AREA", (2.1, 3.0))
    images = make_images(3)
    np.testing.assert_array_equal(call(RandomErasing(1.0, "pixel"), images), images)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_the_result_is_a_function_of_both_seeds_and_the_argument_is_kept(mode):
    images, erasing = make_images(8), RandomErasing(1.0, mode)
    tensor, results = paddle.to_tensor(images), []
    for _ in range(2):
        paddle.seed(5)
        results.append(erase(erasing, tensor, 7).numpy())
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(tensor.numpy(), images)


def test_the_config_is_followed():
    config = get_config()
    train = config.TRAIN
    train.RANDOM_ERASE_PROB, train.RANDOM_ERASE_MODE = 1.0, "const"
    train.RANDOM_ERASE_COUNT, train.RANDOM_ERASE_SPLIT = 2, True
    erasing = BatchAugment(config).erase
    assert (erasing.prob, erasing.mode, erasing.max_count, erasing.split) == (1.0, "const", 2, True)
    train.RANDOM_ERASE_PROB = 0.0
    assert BatchAugment(config).erase is None
