import numpy as np
import paddle
import pytest

from config import get_config
from optimizer import (
    OPTIMIZERS,
    build_optimizer,
    clip_gradients,
    decayed_parameters,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
)
from resmlp import ResMLP


def tiny(depth=2):
    return ResMLP(image_size=16, patch_size=8, num_classes=3, embed_dim=8, depth=depth)


def config_for(name="adamw", **train):
    config = get_config()
    config.TRAIN.OPTIMIZER.NAME = name
    for key, value in train.items():
        config.TRAIN[key] = value
    return config


def step(model, optimizer, images=None):
    optimizer.set_lr(0.01)
    (model(paddle.ones([2, 3, 16, 16]) if images is None else images) ** 2).mean().backward()
    optimizer.step()
    optimizer.clear_grad()


def test_step_and_constant_schedules():
    config = config_for(BASE_LR=1.0, LINEAR_SCALED_LR=None, WARMUP_EPOCHS=0.0)
    config.TRAIN.LR_SCHEDULER.NAME = "constant"
    assert learning_rate(config, 399, 1) == 1.0
    config.TRAIN.LR_SCHEDULER.NAME = "step"
    rates = [learning_rate(config, epoch, 1) for epoch in (29.9, 30, 60, 95)]
    assert np.allclose(rates, [1, 0.1, 0.01, 0.001])
    config.TRAIN.LR_SCHEDULER.MILESTONES = ""
    config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 10.0
    assert np.isclose(learning_rate(config, 25, 1), 0.01)
    for name in ("warmupcosine", "cosine", "constant", "step"):  # in cooldown
        config.TRAIN.LR_SCHEDULER.NAME = name
        assert learning_rate(config, config.TRAIN.NUM_EPOCHS + 0.5, 1) == config.TRAIN.END_LR


def test_decay_is_for_matrices_and_the_patch_convolution_only():
    expected = {"patch_embed.patch_embed.weight", "head.weight"}
    for block in range(2):
        for layer in ("linear_tokens", "mlp_channels.fc1", "mlp_channels.fc2"):
            expected.add(f"mixer_layers.{block}.{layer}.weight")
    assert decayed_parameters(tiny()) == expected


def reference(name, weights, gradients, lr, decay, decayed):
    """LAMB, AdamW and Nesterov momentum, written out in float64."""
    m = {k: np.zeros_like(v) for k, v in weights.items()}
    v = {k: np.zeros_like(x) for k, x in weights.items()}
    for t, grads in enumerate(gradients, 1):
        for key, w in weights.items():
            g, wd = grads[key], decay if key in decayed else 0.0
            if name == "sgd":
                g = g + wd * w
                m[key] = 0.9 * m[key] + g
                weights[key] = w - lr * (g + 0.9 * m[key])
                continue
            m[key] = 0.9 * m[key] + 0.1 * g
            v[key] = 0.999 * v[key] + 0.001 * g**2
            update = (m[key] / (1 - 0.9**t)) / (np.sqrt(v[key] / (1 - 0.999**t)) + 1e-8)
            if name == "adamw":
                weights[key] = w * (1 - lr * wd) - lr * update
                continue
            update = update + wd * w
            trust = np.linalg.norm(w) / np.linalg.norm(update) if wd else 1.0
            weights[key] = w - lr * trust * update
    return weights


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_agree_with_a_reference_in_float64(name):
    rng = np.random.default_rng(0)
    model = tiny(depth=1)
    weights = {k: p.numpy().astype("float64") for k, p in model.named_parameters()}
    grads = [
        {k: rng.normal(size=w.shape).astype("float32") for k, w in weights.items()}
        for _ in range(50)
    ]
    optimizer = build_optimizer(config_for(name, WEIGHT_DECAY=0.1), model)
    optimizer.set_lr(0.003)
    for step_grads in grads:
        for key, parameter in model.named_parameters():
            parameter.grad = paddle.to_tensor(step_grads[key])
        optimizer.step()
        optimizer.clear_grad()
    expected = reference(name, weights, grads, 0.003, 0.1, decayed_parameters(model))
    for key, parameter in model.named_parameters():
        assert np.abs(parameter.numpy() - expected[key]).max() < 2e-6, key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layer_decay_scales_the_steps_from_the_head_to_the_patches(name):
    moves = []
    for decay in (None, 0.25):
        paddle.seed(1)
        model = tiny()
        start = {k: p.numpy() for k, p in model.named_parameters()}
        optimizer = build_optimizer(config_for(name, LAYER_DECAY=decay, WEIGHT_DECAY=0.0), model)
        step(model, optimizer, paddle.ones([2, 3, 16, 16]) * 3)
        moves.append({k: np.abs(p.numpy() - start[k]).max() for k, p in model.named_parameters()})
    factors = {"head.bias": 1, "mixer_layers.1.ls1": 1 / 4, "mixer_layers.0.ls1": 1 / 16}
    for name, factor in {**factors, "patch_embed.patch_embed.bias": 1 / 64}.items():
        assert np.isclose(moves[1][name] / moves[0][name], factor, rtol=0.02), name


def test_clipping_scales_all_gradients_together():
    model = tiny()
    (model(paddle.ones([2, 3, 16, 16])).sum() * 100).backward()
    grads = [p.grad.numpy().astype("float64") for p in model.parameters()]
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    assert np.isclose(float(clip_gradients(model.parameters(), 0.5)), norm, rtol=1e-5)
    for parameter, grad in zip(model.parameters(), grads):
        assert np.allclose(parameter.grad.numpy(), grad * 0.5 / norm, rtol=1e-4, atol=1e-9)
    before = model.head.weight.grad.numpy()
    clip_gradients(model.parameters(), 0.6)  # they are small now
    assert (model.head.weight.grad.numpy() == before).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_exactly_from_a_saved_state(name):
    images = paddle.randn([4, 3, 16, 16])
    model = tiny()
    optimizer = build_optimizer(config_for(name), model)
    for _ in range(3):
        step(model, optimizer, images)
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    saved = {
        k: {slot: np.asarray(v) for slot, v in slots.items()}
        for k, slots in optimizer_state(optimizer, model).items()
    }
    for _ in range(3):
        step(model, optimizer, images)

    tiny()  # shifts Paddle's automatic names
    again = tiny()
    again.set_state_dict(weights)
    other = build_optimizer(config_for(name), again)
    load_optimizer_state(other, again, saved)
    for _ in range(3):
        step(again, other, images)
    for a, b in zip(model.parameters(), again.parameters()):
        assert (a.numpy() == b.numpy()).all()


def test_master_weights_of_a_run_in_amp_o2_become_the_weights():
    model = tiny()
    optimizer = build_optimizer(config_for("adamw"), model)
    step(model, optimizer)
    state, masters = optimizer_state(optimizer, model), {}
    for name in ("head.weight", "mixer_layers.0.linear_tokens.bias"):
        masters[name] = paddle.rand(state[name]["moment1_0"].shape)
        state[name]["master_weight"] = masters[name]
    again = tiny()
    load_optimizer_state(build_optimizer(config_for("adamw"), again), again, state)
    parameters = dict(again.named_parameters())
    assert all((parameters[name] == value).all() for name, value in masters.items())
