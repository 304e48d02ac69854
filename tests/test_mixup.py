"""Mixup and CutMix of a batch against a plain loop over its images in NumPy."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from batch_augment import BatchAugment
from config import get_config
from mixup import Mixup, cutmix_boxes_minmax
from utils import to_device

CLASSES = 7


def make_batch(batch, height=12, width=9, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((batch, 3, height, width)).astype("float32")
    return images, rng.integers(CLASSES, size=batch)


def mix(mixup, images, labels, seed):
    """Of tensors."""
    plan = mixup.plan(np.random.default_rng(seed), len(labels), *images.shape[2:])
    return mixup.apply(images, labels, to_device(plan))


def call(mixup, images, labels, seed):
    result = mix(mixup, paddle.to_tensor(images), paddle.to_tensor(labels), seed)
    return [tensor.numpy() for tensor in result]


def configured(**train):
    """The mixing of a config."""
    config = get_config()
    config.MODEL.NUM_CLASSES = 11
    for key, value in train.items():
        config.TRAIN[key] = value
    return BatchAugment(config).mix


def one_hot(labels, smoothing):
    return np.eye(CLASSES)[labels] * (1 - smoothing) + smoothing / CLASSES


def mix_one_by_one(images, labels, mix, smoothing):
    """What a plan means, image by image, in float64."""
    batch, _, height, width = images.shape
    mixed, targets = images.astype("float64"), np.empty((batch, CLASSES))
    hot = one_hot(labels, smoothing)
    for i in range(batch):
        j, row = batch - 1 - i, min(i, len(mix.strength) - 1)
        top, bottom, left, right = mix.boxes[row]
        share = mix.strength[row]
        box = np.s_[:, top:bottom, left:right]
        mixed[i][box] = images[i][box] * (1 - share) + images[j][box] * share
        partner = share * (bottom - top) * (right - left) / (height * width)
        targets[i] = hot[i] * (1 - partner) + hot[j] * partner
    return mixed, targets


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("minmax", [None, (0.2, 0.8)])
def test_a_batch_is_mixed_as_its_images_would_be_one_by_one(mode, batch, minmax):
    images, labels = make_batch(batch)
    mixup = Mixup(CLASSES, cutmix_minmax=minmax, prob=0.8, mode=mode, smoothing=0.1)
    for seed in range(6):
        plan = mixup.draw(np.random.default_rng(seed), batch, *images.shape[2:])
        mixed, targets = call(mixup, images, labels, seed)
        expected_images, expected_targets = mix_one_by_one(images, labels, plan, 0.1)
        np.testing.assert_allclose(mixed, expected_images, atol=1e-6)
        np.testing.assert_allclose(targets, expected_targets, atol=1e-6)


def test_minmax_bounds_that_are_equal_give_one_size():
    boxes = cutmix_boxes_minmax(np.random.default_rng(0), 50, 20, 30, (0.5, 0.5))
    assert set(boxes[:, 1] - boxes[:, 0]) == {10} and set(boxes[:, 3] - boxes[:, 2]) == {15}


def test_the_result_is_a_function_of_the_generator_and_the_arguments_are_kept():
    images, labels = make_batch(6)
    tensor, mixup = paddle.to_tensor(images), Mixup(CLASSES, mode="elem")
    once, again, other = (
        mix(mixup, tensor, paddle.to_tensor(labels), seed)[0].numpy() for seed in (3, 3, 4)
    )
    assert (once == again).all() and (once != other).any()
    np.testing.assert_array_equal(tensor.numpy(), images)


def test_the_config_is_followed():
    mixup = configured(MIXUP_MODE="elem", SMOOTHING=0.2, CUTMIX_ALPHA=0.0)
    plan = mixup.draw(np.random.default_rng(0), 100, 8, 8)
    assert (plan.boxes == [0, 8, 0, 8]).all() and len(plan.strength) == 100
    _, targets = mix(mixup, paddle.zeros([2, 3, 8, 8]), paddle.to_tensor([0, 0]), 0)
    assert targets.shape == [2, 11]
    assert targets.numpy()[0] == pytest.approx([0.8 + 0.2 / 11] + [0.2 / 11] * 10)
    assert configured(MIXUP_ALPHA=0.0, CUTMIX_ALPHA=0.0) is None
    assert configured(MIXUP_PROB=0.0) is None
    mixup = configured(MIXUP_ALPHA=0.0, CUTMIX_ALPHA=0.0, CUTMIX_MINMAX=(0.2, 0.8))
    assert (mixup.draw(np.random.default_rng(0), 4, 32, 32).strength == 1).all()
