"""The optimizers, the schedule and whole loss curves against timm and PyTorch."""

import numpy as np
import paddle
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from timm.scheduler import create_scheduler_v2  # noqa: E402

from config import get_config  # noqa: E402
from losses import build_criterion  # noqa: E402
from optimizer import build_optimizer, clip_gradients, learning_rate  # noqa: E402
from port_weights.names import convert  # noqa: E402
from resmlp import ResMLP, load_state  # noqa: E402
from tests.golden.make_golden import mixer, optimizer_of_timm  # noqa: E402

TIMMS = {  # our optimizers -> timm's, of which LAMB clips by itself
    "lamb": ("lamb", {"max_grad_norm": 1.0}),
    "adamw": ("adamw", {}),
    "sgd": ("nesterov", {"momentum": 0.9}),
}


def pair():
    torch.manual_seed(0)
    theirs = mixer(32, 8, 24, 3, 10)
    ours = ResMLP(image_size=32, patch_size=8, num_classes=10, embed_dim=24, depth=3)
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    load_state(ours, convert(state, "timm", "paddle")[0])
    return ours, theirs


@pytest.mark.parametrize("name, lr", [("lamb", 0.005), ("adamw", 0.001), ("sgd", 0.05)])
def test_fifty_steps_with_clipping_equal_timms(name, lr):
    ours, theirs = pair()
    config = get_config()
    config.TRAIN.OPTIMIZER.NAME, config.TRAIN.WEIGHT_DECAY = name, 0.2
    optimizer = build_optimizer(config, ours)
    optimizer.set_lr(lr)
    other = optimizer_of_timm(theirs, TIMMS[name][0], lr, 0.2, **TIMMS[name][1])
    rng = np.random.default_rng(1)
    for _ in range(50):
        grads = {
            key: rng.normal(size=tuple(p.shape)).astype("float32") * 0.1
            for key, p in theirs.named_parameters()
        }
        for key, parameter in theirs.named_parameters():
            parameter.grad = torch.from_numpy(grads[key].copy())
        if name != "lamb":
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        other.step()
        for key, parameter in ours.named_parameters():
            parameter.grad = paddle.to_tensor(convert(grads, "timm", "paddle")[0][key])
        clip_gradients(ours.parameters(), 1.0)
        optimizer.step()
    expected = convert(
        {k: v.detach().numpy() for k, v in theirs.state_dict().items()}, "timm", "paddle"
    )[0]
    for key, value in ours.state_dict().items():
        # clip_grad_norm_ divides by norm + 1e-6; that and rounding is all the difference there is
        assert np.abs(value.numpy() - expected[key]).max() < (1e-6 if name == "lamb" else 5e-6), key


@pytest.mark.parametrize("warmup, epochs, cooldown", [(5, 400, 10), (0, 30, 0), (3, 20, 2)])
def test_the_schedule_equals_timms_at_every_epoch(warmup, epochs, cooldown):
    config = get_config()
    train = config.TRAIN
    train.NUM_EPOCHS, train.WARMUP_EPOCHS, train.COOLDOWN_EPOCHS = epochs, warmup, cooldown
    base = train.BASE_LR * 1024 / train.LINEAR_SCALED_LR
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=base)
    scheduler, total = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=warmup,
        cooldown_epochs=cooldown,
        warmup_lr=train.WARMUP_START_LR,
        min_lr=train.END_LR,
    )
    assert total == epochs + cooldown
    for epoch in range(total):
        scheduler.step(epoch)
        expected = optimizer.param_groups[0]["lr"]
        assert np.isclose(learning_rate(config, epoch, 1024), expected, rtol=1e-9), epoch


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd"])
def test_a_loss_curve_of_200_steps_is_pytorchs(name):
    """Identical weights, batches, soft targets, schedule, clipping and decay; nothing random."""
    ours, theirs = pair()
    config = get_config()
    train = config.TRAIN
    train.OPTIMIZER.NAME, train.NUM_EPOCHS, train.WARMUP_EPOCHS = name, 10, 1.0
    train.LINEAR_SCALED_LR = None
    train.BASE_LR = {"lamb": 0.01, "adamw": 0.002, "sgd": 0.05}[name]
    optimizer, criterion = build_optimizer(config, ours), build_criterion(config)
    other = optimizer_of_timm(theirs, TIMMS[name][0], 1.0, train.WEIGHT_DECAY, **TIMMS[name][1])
    rng = np.random.default_rng(2)
    centres = rng.normal(size=[10, 3, 32, 32])
    first = last = None
    for step in range(200):
        labels = rng.integers(0, 10, 16)
        images = (centres[labels] + rng.normal(size=[16, 3, 32, 32])).astype("float32")
        share = rng.uniform(0.5, 1)
        targets = np.eye(10)[labels] * share + np.eye(10)[labels[::-1]] * (1 - share)
        targets = (0.9 * targets + 0.01).astype("float32")
        lr = learning_rate(config, step / 20, 16)

        optimizer.set_lr(lr)
        loss = criterion(ours(paddle.to_tensor(images)), paddle.to_tensor(targets))
        loss.backward()
        clip_gradients(ours.parameters(), 1.0)
        optimizer.step()
        optimizer.clear_grad()

        for group in other.param_groups:
            group["lr"] = lr
        other.zero_grad()
        logits = theirs(torch.from_numpy(images))
        expected = -(torch.from_numpy(targets) * torch.log_softmax(logits, -1)).sum(-1).mean()
        expected.backward()
        if name != "lamb":
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        other.step()

        last = float(loss.detach())
        first = first or last
        assert np.isclose(last, expected.item(), rtol=1e-3), step
    assert last < 0.8 * first  # it did learn
