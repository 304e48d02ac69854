"""Mixed precision on a CPU: bfloat16 products, float32 parameters and residual stream."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle.distributed.fleet.utils import recompute

from config import get_config
from cpu import onednn, ops, setup
from parallel.process import Process
from resmlp import ResBlock, ResMLP
from training.learner import autocast

pytestmark = pytest.mark.skipif(
    onednn.cast(paddle.zeros([1]), paddle.float32) is None, reason="no oneDNN in this Paddle"
)


@pytest.fixture(autouse=True)
def seed():
    paddle.seed(0)


def gradients(block, x, half, run=lambda block, x: block(x)):
    x = x.detach()
    x.stop_gradient = False
    for parameter in block.parameters():
        parameter.clear_gradient(False)
    paddle.seed(1)
    with ops.bfloat16(half):
        y = run(block, x)
        paddle.sum(
            y * paddle.cos(paddle.arange(y.size).reshape(y.shape).astype(y.dtype))
        ).backward()
    tensors = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    tensors |= {"output": y, "x": x.grad}
    assert {tensor.dtype for tensor in tensors.values()} == {paddle.float32}
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def random_block(**options):
    block = ResBlock(dim=96, num_tokens=49, **options)
    for parameter in block.parameters():
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    return block


def assert_near(found, expected, tolerance=0.02):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_a_block_is_near_its_float32_form_and_returns_float32(drop_path):
    block, x = random_block(drop_path=drop_path), paddle.randn([4, 49, 96])
    expected, found = gradients(block, x, False), gradients(block, x, True)
    assert_near(found, expected)
    assert (found["output"] != expected["output"]).any()  # it was bfloat16


def test_patch_embedding_and_logits_are_near_their_float32_form():
    model, images = ResMLP(32, 8, 3, 5, 32, 2), paddle.randn([4, 3, 32, 32])
    assert_near(gradients(model, images, True), gradients(model, images, False))


def test_recompute_in_the_same_context_changes_no_gradient():
    """Its first pass is one without gradients, which rounds once less on the way."""
    block, x = random_block(), paddle.randn([4, 49, 96])
    expected = gradients(block, x, True)
    found = gradients(block, x, True, recompute)
    assert_near(found, {"output": expected.pop("output"), **expected})
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_frozen_parameters_get_no_gradient_and_the_others_their_own():
    block, x = random_block(), paddle.randn([4, 49, 96])
    expected = gradients(block, x, True)
    for parameter in (block.mlp_channels.fc1.weight, block.norm1.alpha):
        parameter.stop_gradient = True
    found = gradients(block, x, True)
    assert expected.keys() - found.keys() == {"mlp_channels.fc1.weight", "norm1.alpha"}
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_small_gradients_of_36_layers_do_not_vanish():
    """resmlp_36's LayerScale starts at 1e-6: the gradients behind it are as small."""
    model = ResMLP(32, 8, 3, 5, 32, 36, layer_scale_init=1e-6)
    images = paddle.randn([4, 3, 32, 32])
    expected, found = gradients(model, images, False), gradients(model, images, True)
    assert abs(expected["mixer_layers.0.mlp_channels.fc1.weight"]).max() < 1e-4
    assert_near(found, expected)
    for name, value in expected.items():
        assert ((found[name] != 0) | (value == 0)).all(), name


def test_without_onednn_in_the_middle_of_a_block_paddle_computes_the_same(monkeypatch):
    block, x = random_block(), paddle.randn([4, 49, 96])
    expected = gradients(block, x, True)
    for name in ("product", "multiply", "gelu"):
        monkeypatch.setattr(onednn, name, lambda *args, **options: None)
    assert_near(gradients(block, x, True), expected)


@pytest.mark.parametrize(
    "dtype, fast, used",
    [("float16", True, True), ("float16", False, False), ("bfloat16", False, True)],
)
def test_what_amp_means_on_a_cpu(monkeypatch, dtype, fast, used):
    monkeypatch.setattr(setup, "has_fast_bfloat16", lambda: fast)
    found, line = ops.choose_precision(dtype)
    assert found == used and ("bfloat16" if used else "float32") in line and "\n" not in line
    config = get_config()
    config.defrost()
    config.AMP, config.AMP_DTYPE = True, dtype
    block, x = random_block(), paddle.randn([4, 49, 96])
    with autocast(config, Process()), paddle.no_grad():
        y = block(x)
    assert bool((y != block(x)).any()) == used
    config.AMP = False
    with autocast(config, Process()), paddle.no_grad():
        assert bool((block(x) == y).all()) == (not used)


def test_the_context_ends_with_its_block():
    block, x = random_block(), paddle.randn([4, 49, 96])
    expected = block(x).numpy()
    with pytest.raises(ValueError), ops.bfloat16():
        raise ValueError
    np.testing.assert_array_equal(block(x).numpy(), expected)


def test_training_in_bfloat16_follows_float32():
    """Ten steps of AdamW: the loss of either, from the same weights on the same images."""
    images, labels = paddle.randn([16, 3, 32, 32]), paddle.arange(16) % 5
    losses = {}
    for half in (False, True):
        paddle.seed(0)
        model = ResMLP(32, 8, 3, 5, 32, 4)
        optimizer = paddle.optimizer.AdamW(3e-3, parameters=model.parameters())
        losses[half] = []
        for _ in range(10):
            with ops.bfloat16(half):
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            losses[half].append(loss.item())
    np.testing.assert_allclose(losses[True], losses[False], rtol=0.02)
    assert losses[True][-1] < 0.8 * losses[True][0]
