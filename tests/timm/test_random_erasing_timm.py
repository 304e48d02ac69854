"""The boxes of random erasing against those that timm erases."""

from __future__ import annotations

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm_erasing = pytest.importorskip("timm.data.random_erasing")
stats = pytest.importorskip("scipy.stats")

from random_erasing import RandomErasing, draw_boxes  # noqa: E402
from tests.test_random_erasing import call  # noqa: E402
from tests.timm.test_mixup_timm import DRAWS, assert_same_distribution  # noqa: E402


class Recorder:
    """In place of an image: notes the box that timm assigns to."""

    def __init__(self):
        self.boxes = []

    def __setitem__(self, key, value):
        _, rows, columns = key
        self.boxes.append((rows.start, rows.stop, columns.start, columns.stop))


def draw_as_timm(count, height, width, prob, max_count):
    random.seed(0)
    erasing = timm_erasing.RandomErasing(prob, max_count=max_count, device="cpu")
    boxes = np.zeros((count, max_count, 4), int)
    for row in boxes:
        image = Recorder()
        erasing._erase(image, 3, height, width, torch.float32)
        row[: len(image.boxes)] = np.reshape(image.boxes, (-1, 4))
    return boxes


@pytest.mark.parametrize(
    "height, width, prob, max_count",
    [(224, 224, 1.0, 1), (48, 64, 0.25, 1), (64, 48, 1.0, 3), (6, 90, 1.0, 2)],
)
def test_boxes_have_the_same_distribution(height, width, prob, max_count):
    theirs = draw_as_timm(DRAWS, height, width, prob, max_count)
    ours = draw_boxes(np.random.default_rng(1), DRAWS, height, width, prob, max_count)
    there = [boxes[..., 1] > boxes[..., 0] for boxes in (ours, theirs)]
    counts = np.stack([np.bincount(e.sum(axis=1), minlength=max_count + 1) for e in there])
    counts = counts[:, counts.any(axis=0)]
    assert counts.shape[1] == 1 or stats.chi2_contingency(counts).pvalue > 1e-3
    ours, theirs = (boxes[exists].T for boxes, exists in zip((ours, theirs), there))
    for mine, timms in zip(ours, theirs):  # top, bottom, left, right
        assert_same_distribution(mine, timms)
    size = [(b[1] - b[0], b[3] - b[2]) for b in (ours, theirs)]
    for measure in (lambda h, w: h, lambda h, w: w, lambda h, w: h * w, lambda h, w: h / w):
        assert_same_distribution(measure(*size[0]), measure(*size[1]))


@pytest.mark.parametrize("batch", [6, 7])
def test_split_begins_where_timm_begins(batch):
    images = torch.ones(batch, 3, 32, 32)
    ours = call(RandomErasing(1.0, "const", split=True), images.numpy().copy())
    timm_erasing.RandomErasing(1.0, num_splits=2, device="cpu")(images)
    for erased in (ours, images.numpy()):
        touched = (erased == 0).any(axis=(1, 2, 3))
        np.testing.assert_array_equal(touched, np.arange(batch) >= batch // 2)
