"""Mixup against timm's: the same plan gives the same batch, plans have the same distribution."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

torch = pytest.importorskip("torch")
timm_mixup = pytest.importorskip("timm.data.mixup")
stats = pytest.importorskip("scipy.stats")

from mixup import Mixup, cutmix_boxes, cutmix_boxes_minmax  # noqa: E402
from utils import to_device  # noqa: E402

CLASSES = 13
DRAWS = 100_000


def mix_as_timm(mix, mode, images, labels, smoothing):
    """timm's own loop and targets, with the plan in place of its draws."""
    rows = {"batch": 1, "pair": len(images) // 2, "elem": len(images)}[mode]
    height, width = images.shape[2:]
    whole = (mix.boxes == [0, height, 0, width]).all(axis=1)[:rows]
    blend = 1 - mix.strength[:rows]
    boxes = (
        (tuple(map(int, box)), float(own))
        for box, own, skip in zip(
            mix.boxes[:rows],
            mix.own_share(height, width)[:rows],
            whole | (mix.strength[:rows] == 0),
        )
        if not skip
    )

    class Replay(timm_mixup.Mixup):
        def _params_per_elem(self, batch_size):
            assert batch_size == rows
            return np.where(whole | (blend == 1), blend, 0.5).astype("float32"), ~whole

        def _params_per_batch(self):
            (lam,), (cut,) = self._params_per_elem(1)
            return float(lam), cut

    replay = Replay(1.0, 1.0, mode=mode, label_smoothing=smoothing, num_classes=CLASSES)
    original = timm_mixup.cutmix_bbox_and_lam
    timm_mixup.cutmix_bbox_and_lam = lambda *args, **kwargs: next(boxes)
    try:
        mixed, targets = replay(torch.tensor(images), torch.tensor(labels))
    finally:
        timm_mixup.cutmix_bbox_and_lam = original
    assert next(boxes, None) is None
    return mixed.numpy(), targets.numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("minmax", [None, (0.2, 0.8)])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_the_same_plan_gives_the_same_images_and_targets(mode, minmax, smoothing):
    mixup = Mixup(CLASSES, cutmix_minmax=minmax, prob=0.8, mode=mode, smoothing=smoothing)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        images = rng.standard_normal((8, 3, 17, 23)).astype("float32")
        labels = rng.integers(CLASSES, size=8)
        mix = mixup.draw(np.random.default_rng(seed), 8, 17, 23)
        expected_images, expected_targets = mix_as_timm(mix, mode, images, labels, smoothing)
        plan = to_device(mixup.plan(np.random.default_rng(seed), 8, 17, 23))
        mixed, targets = mixup.apply(paddle.to_tensor(images), paddle.to_tensor(labels), plan)
        np.testing.assert_allclose(mixed.numpy(), expected_images, atol=1e-6)
        np.testing.assert_allclose(targets.numpy(), expected_targets, atol=1e-6)


def assert_same_distribution(ours, theirs):
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
    error = 5 * float(np.std(theirs)) * (2 / len(theirs)) ** 0.5  # of a difference of means
    assert np.mean(ours) == pytest.approx(float(np.mean(theirs)), abs=error)


@pytest.mark.parametrize("own_share", [0.03, 0.4, 0.9])
def test_cutmix_boxes_have_the_same_distribution(own_share):
    np.random.seed(0)
    theirs = np.stack(timm_mixup.rand_bbox((3, 40, 56), own_share, count=DRAWS))
    ours = cutmix_boxes(np.random.default_rng(0), np.full(DRAWS, own_share), 40, 56)
    for mine, timms in zip(ours.T, theirs):
        assert set(mine) == set(timms)
        assert_same_distribution(mine, timms)


def test_minmax_boxes_have_the_same_distribution():
    np.random.seed(0)
    theirs = np.stack(timm_mixup.rand_bbox_minmax((3, 40, 56), (0.2, 0.8), count=DRAWS))
    ours = cutmix_boxes_minmax(np.random.default_rng(0), DRAWS, 40, 56, (0.2, 0.8))
    for mine, timms in zip(ours.T, theirs):
        assert set(mine) == set(timms)
        assert_same_distribution(mine, timms)
    assert_same_distribution(ours[:, 1] - ours[:, 0], theirs[1] - theirs[0])


@pytest.mark.parametrize(
    "mixup_alpha, cutmix_alpha, prob, switch_prob",
    [(0.8, 1.0, 1.0, 0.5), (0.2, 0.0, 0.7, 0.5), (0.0, 0.5, 1.0, 0.5), (0.8, 1.0, 0.5, 0.2)],
)
def test_lambda_and_the_choice_of_cutmix_have_the_same_distribution(
    mixup_alpha, cutmix_alpha, prob, switch_prob
):
    """lambda as it ends in the targets: after probability, switch and correction."""
    np.random.seed(0)
    timms = timm_mixup.Mixup(mixup_alpha, cutmix_alpha, None, prob, switch_prob, "elem")
    theirs, cut = timms._params_per_elem(DRAWS)
    cut &= theirs != 1
    for i in np.flatnonzero(cut):
        _, theirs[i] = timm_mixup.cutmix_bbox_and_lam((3, 40, 56), theirs[i])
    ours = Mixup(CLASSES, mixup_alpha, cutmix_alpha, None, prob, switch_prob, "elem")
    mix = ours.draw(np.random.default_rng(0), DRAWS, 40, 56)
    own = mix.own_share(40, 56)
    is_cut = (mix.boxes != [0, 40, 0, 56]).any(axis=1) & (mix.strength > 0)
    assert is_cut.mean() == pytest.approx(cut.mean(), abs=0.01)
    assert np.mean(own == 1) == pytest.approx(np.mean(theirs == 1), abs=0.02)
    for mine, timm_lambda in ((own[is_cut], theirs[cut]), (own[~is_cut], theirs[~cut])):
        if len(mine):
            assert_same_distribution(mine.round(5), timm_lambda.astype(float).round(5))
