"""The losses against their definitions in NumPy, float64."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from cli.errors import ConfigError
from config import get_config
from losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    DistillationLoss,
    build_criterion,
    class_weights,
)
from training import learner

BATCH, CLASSES = 6, 9


def log_softmax(x):
    x = x.astype("float64") - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def smoothed(labels, smoothing):
    return np.eye(CLASSES)[labels] * (1 - smoothing) + smoothing / CLASSES


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((BATCH, CLASSES))).astype("float32")
    soft = rng.dirichlet(np.ones(CLASSES), size=BATCH).astype("float32")
    return logits, rng.integers(CLASSES, size=BATCH), soft


def cross_entropy(logits, targets):
    """Of each image."""
    return -(targets * log_softmax(logits)).sum(axis=1)


def binary_cross_entropy(logits, targets):
    x = logits.astype("float64")
    return (np.logaddexp(0, x) - targets * x).mean(axis=1)


@pytest.mark.parametrize(
    "loss", [CrossEntropy(0.1), BinaryCrossEntropy(0.1), *map(DistillationLoss, ("hard", "soft"))]
)
def test_half_precision_logits_are_computed_in_float32(loss, batch):
    """60000 is finite in float16, the sum of two of them is not."""
    logits, labels, _ = batch
    logits = np.full_like(logits, -60000.0)
    logits[:, 2] = 60000.0
    half, labels = paddle.to_tensor(logits.astype("float16")), paddle.to_tensor(labels)
    if isinstance(loss, DistillationLoss):
        result, full = (loss(0.0, x, x[::-1]) for x in (half, half.astype("float32")))
    else:
        result, full = loss(half, labels), loss(half.astype("float32"), labels)
    assert result.dtype == paddle.float32
    assert np.isfinite(result.item()) and result.item() == full.item()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_hard_distillation_weighs_the_label_loss_with_that_of_the_teachers_choice(batch, alpha):
    logits, labels, soft = batch
    base = CrossEntropy(0.1)(paddle.to_tensor(logits), paddle.to_tensor(labels))
    distill = DistillationLoss("hard", alpha)
    loss = distill(base, paddle.to_tensor(logits), paddle.to_tensor(np.log(soft)))
    of_teacher = -log_softmax(logits)[np.arange(BATCH), soft.argmax(axis=1)].mean()
    expected = (1 - alpha) * base.item() + alpha * of_teacher
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_config_is_followed(monkeypatch):
    config = get_config()
    train = config.TRAIN
    train.SMOOTHING = 0.3
    criterion = build_criterion(config)
    assert isinstance(criterion, CrossEntropy) and criterion.smoothing == 0.3
    train.LOSS, train.BCE_TARGET_THRESHOLD = "bce", 0.2
    criterion = build_criterion(config)
    assert isinstance(criterion, BinaryCrossEntropy)
    assert (criterion.smoothing, criterion.target_threshold) == (0.3, 0.2)
    monkeypatch.setattr(learner, "build_teacher", lambda config: None)
    train.DISTILLATION_TYPE, train.DISTILLATION_ALPHA, train.DISTILLATION_TAU = "soft", 0.7, 3.0
    distill = learner.Objective(config).distill
    assert (distill.kind, distill.alpha, distill.tau) == ("soft", 0.7, 3.0)


WEIGHTS = np.linspace(0.2, 3.0, CLASSES).astype("float32")


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_an_images_loss_is_weighed_by_its_class_and_a_mixed_ones_by_both(
    batch, smoothing, threshold, weighed
):
    """Against the definition: share * weight * loss, summed over the classes of an image."""
    logits, labels, _ = batch
    x, partners = paddle.to_tensor(logits), labels[::-1]
    each, weights = (WEIGHTS, paddle.to_tensor(WEIGHTS)) if weighed else (np.ones(CLASSES), None)
    shares = np.linspace(0.5, 1, BATCH)
    mixed = smoothed(labels, smoothing) * shares[:, None]
    mixed += smoothed(partners, smoothing) * (1 - shares[:, None])

    def binary(logits, targets):
        targets = targets if threshold is None else targets > threshold
        return binary_cross_entropy(logits, targets)

    ours = {cross_entropy: CrossEntropy(smoothing, weights)}
    ours[binary] = BinaryCrossEntropy(smoothing, threshold, weights)
    for loss, criterion in ours.items():
        expected = (each[labels] * loss(logits, smoothed(labels, smoothing))).mean()
        assert criterion(x, paddle.to_tensor(labels)).item() == pytest.approx(expected, rel=1e-5)
        own, other = shares * each[labels], (1 - shares) * each[partners]
        if loss is binary and threshold:  # every class of the image is fully present
            expected = ((own + other) * loss(logits, mixed)).mean()
        else:
            one, two = (loss(logits, smoothed(of, smoothing)) for of in (labels, partners))
            expected = (own * one + other * two).mean()
        found = criterion(x, paddle.to_tensor(mixed.astype("float32"))).item()
        assert found == pytest.approx(expected, rel=1e-5)


def weights_for(chosen, labels=(), classes=4):
    config = get_config()
    config.MODEL.NUM_CLASSES, config.TRAIN.CLASS_WEIGHTS = classes, chosen
    return class_weights(config, labels)


def test_balanced_weights_are_scikit_learns_and_one_an_image_on_average():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 3], [60, 20, 5])
    found = weights_for("balanced", labels).numpy()
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(found[[0, 1, 3]], expected, rtol=1e-6)
    assert found[2] == 1.0 and found[labels].mean() == pytest.approx(1.0)


def test_weights_can_be_given_one_a_class_and_are_off_by_default():
    assert weights_for([1.0, 2.0, 3.0, 0.5]).numpy().tolist() == [1.0, 2.0, 3.0, 0.5]
    assert class_weights(get_config()) is None
    with pytest.raises(ConfigError, match="CLASS_WEIGHTS has 2 numbers, MODEL.NUM_CLASSES is 4"):
        weights_for([1.0, 2.0])


def test_balanced_weights_prefer_no_class():
    rng = np.random.default_rng(1)
    labels = (rng.random(4000) < 1 / 41).astype("int64")
    weights = paddle.to_tensor(np.array([41 / 80, 20.5], "float32"))
    for criterion in (CrossEntropy(0.1, weights), BinaryCrossEntropy(0.1, None, weights)):
        logits = paddle.full([4000, 2], 1e-4)
        logits.stop_gradient = False
        criterion(logits, paddle.to_tensor(labels)).backward()
        pull = logits.grad.numpy().sum(axis=0)  # of images of which nothing is known
        each = np.abs(logits.grad.numpy()).sum()
        assert np.abs(pull).max() < 0.1 * each
