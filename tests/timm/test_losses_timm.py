"""The losses against timm's and, for soft distillation, against DeiT's formula in PyTorch."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

torch = pytest.importorskip("torch")
timm_loss = pytest.importorskip("timm.loss")

from losses import BinaryCrossEntropy, CrossEntropy, DistillationLoss  # noqa: E402

CLASSES = 50


def both(ours, theirs, logits, targets):
    x = paddle.to_tensor(logits, stop_gradient=False)
    loss = ours(x, paddle.to_tensor(targets))
    loss.backward()
    y = torch.tensor(logits, requires_grad=True)
    expected = theirs(y, torch.tensor(targets))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), y.grad.numpy(), atol=1e-7)


@pytest.fixture(params=range(3))
def batch(request):
    rng = np.random.default_rng(request.param)
    logits = (3 * rng.standard_normal((16, CLASSES))).astype("float32")
    soft = rng.dirichlet(np.full(CLASSES, 0.05), size=16).astype("float32")
    return logits, rng.integers(CLASSES, size=16), soft


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.35])
def test_cross_entropy_is_timms_with_labels_and_with_soft_targets(batch, smoothing):
    logits, labels, soft = batch
    both(CrossEntropy(smoothing), timm_loss.LabelSmoothingCrossEntropy(smoothing), logits, labels)
    for targets in (soft, 0.7 * soft):  # no silent renormalisation either
        both(CrossEntropy(smoothing), timm_loss.SoftTargetCrossEntropy(), logits, targets)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms(batch, smoothing, threshold):
    logits, labels, soft = batch
    theirs = timm_loss.BinaryCrossEntropy(smoothing, threshold)
    both(BinaryCrossEntropy(smoothing, threshold), theirs, logits, labels)
    both(BinaryCrossEntropy(smoothing, threshold), theirs, logits, soft)


@pytest.mark.parametrize("alpha, tau", [(0.5, 1.0), (0.1, 3.0), (1.0, 20.0)])
def test_soft_distillation_is_deits(batch, alpha, tau):
    logits, labels, _ = batch
    teacher = np.roll(logits, 1, axis=0)

    def ours(x, targets):
        base = CrossEntropy(0.1)(x, targets)
        return DistillationLoss("soft", alpha, tau)(base, x, paddle.to_tensor(teacher))

    def theirs(x, targets):
        base = timm_loss.LabelSmoothingCrossEntropy(0.1)(x, targets)
        student, other = (torch.log_softmax(v / tau, 1) for v in (x, torch.tensor(teacher)))
        divergence = torch.nn.functional.kl_div(student, other, reduction="sum", log_target=True)
        return base * (1 - alpha) + divergence * tau**2 / x.numel() * alpha

    both(ours, theirs, logits, labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_pytorchs(batch, smoothing):
    """For labels PyTorch divides by the sum of the weights; ours by the number of images. PyTorch
    also weighs the smoothed share of each class by that class's weight; ours by the label's.
    """
    logits, labels, soft = batch
    weights = np.linspace(0.1, 4.0, CLASSES).astype("float32")
    ours = CrossEntropy(smoothing, paddle.to_tensor(weights))
    theirs = torch.nn.CrossEntropyLoss(torch.tensor(weights), label_smoothing=0.0)
    if not smoothing:  # what mixup has smoothed needs to be told apart: tests/test_losses.py
        both(ours, theirs, logits, soft)
    plain = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)
    weigh = torch.tensor(weights)
    both(ours, lambda x, y: (plain(x, y) * weigh[y]).mean(), logits, labels)
