"""The hand-written CPU branches equal the layers they replace, forward and backward."""

import copy

import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.utils import recompute

from cpu import onednn, ops
from resmlp import DropPath, PatchEmbedding, ResBlock, ResMLP

from .helpers import plain_onednn
from .helpers.gradients import outputs_and_gradients


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """In float64 the two paths agree to rounding, 1e-15: a wrong formula cannot hide."""
    for name in ("has", "product", "multiply", "gelu", "gelu_gradient", "cast", "reorder"):
        monkeypatch.setattr(onednn, name, getattr(plain_onednn, name))
    paddle.set_default_dtype("float64")
    paddle.seed(0)
    yield
    paddle.set_default_dtype("float32")


@pytest.fixture
def layers_only(monkeypatch):
    """Calls a function with the fused branches switched off."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(ops, "usable", lambda layer: False)
            return function(*args)

    return call


@pytest.fixture
def fused_calls(monkeypatch):
    """Counts what goes through the fused branches."""
    calls = []
    original = ops.mix_channels
    monkeypatch.setattr(ops, "mix_channels", lambda *args: calls.append(1) or original(*args))
    return calls


def random_block(**settings) -> ResBlock:
    """A block whose every parameter, zeros and ones too, is random."""
    block = ResBlock(dim=6, num_tokens=5, **settings)
    for parameter in block.parameters():
        parameter.set_value(paddle.randn(parameter.shape))
    return block


def assert_equal(found: dict, expected: dict, tolerance: float = 1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            scale = abs(value).max() or 1.0
            np.testing.assert_allclose(
                found[name], value, rtol=0, atol=tolerance * scale, err_msg=name
            )


@pytest.mark.parametrize("size", [(12, 12), (14, 13)], ids=["whole patches", "a rest"])
def test_patch_embedding_equals_the_convolution(size, layers_only):
    embedding = PatchEmbedding(12, 4, 3, 6)
    images = paddle.randn([2, *size, 3]).transpose([0, 3, 1, 2])  # lies in another order in memory
    expected = layers_only(outputs_and_gradients, embedding, images)
    assert_equal(outputs_and_gradients(embedding, images), expected)
    with paddle.no_grad():
        np.testing.assert_allclose(embedding(images).numpy(), expected["output"], atol=1e-12)


@pytest.mark.parametrize(
    "frozen", [(), "linear_tokens.weight", "norm2.alpha", "mlp_channels.fc2.bias"]
)
def test_outputs_and_all_gradients_equal_the_layers(frozen, layers_only, fused_calls):
    block, x = random_block(), paddle.randn([4, 5, 6])
    parameters = dict(block.named_parameters())
    if frozen:
        parameters[frozen].stop_gradient = True
    expected = layers_only(outputs_and_gradients, block, x)
    assert not fused_calls
    found = outputs_and_gradients(block, x)
    assert_equal(found, expected)
    assert fused_calls
    assert [name for name, value in found.items() if value is None] == [frozen] * bool(frozen)
    y = block(x)  # of which x wants no gradient
    projection = paddle.to_tensor(np.random.default_rng(0).standard_normal(y.shape))
    kept = {name: p for name, p in parameters.items() if name != frozen}
    gradients = paddle.grad([(y * projection).sum()], list(kept.values()))
    for name, gradient in zip(kept, gradients):
        np.testing.assert_allclose(gradient.numpy(), expected[name], rtol=1e-9, atol=1e-12)
    for name in ("ls1", "ls2"):
        parameters[name].set_value(1e-6 * parameters[name])
    expected = layers_only(outputs_and_gradients, block, x)
    assert_equal(outputs_and_gradients(block, x), expected, 1e-9)


@pytest.mark.parametrize("kept", ["1111", "0000", "1000", "0001", "0110", "1011", "0101"])
def test_every_pattern_of_dropped_samples_equals_the_layers(kept, layers_only, monkeypatch):
    mask = paddle.to_tensor([2.0 * int(sample) for sample in kept]).reshape([4, 1, 1])
    monkeypatch.setattr(DropPath, "mask", lambda self, x: mask)
    block, x = random_block(drop_path=0.5), paddle.randn([4, 5, 6])
    expected = layers_only(outputs_and_gradients, block, x)
    found = outputs_and_gradients(block, x)
    assert_equal(found, expected)
    assert (found["output"] == x.numpy()).all() == (kept == "0000")


def test_what_a_dropped_sample_holds_is_not_computed_with(monkeypatch):
    mask = paddle.to_tensor([2.0, 0.0, 2.0]).reshape([3, 1, 1])
    monkeypatch.setattr(DropPath, "mask", lambda self, x: mask)
    block, x = random_block(drop_path=0.5), paddle.randn([3, 5, 6])
    x[1] = float("nan")
    found = outputs_and_gradients(block, x)
    assert np.isnan(found.pop("output")).all(axis=(1, 2)).tolist() == [False, True, False]
    for name, value in found.items():
        assert np.isfinite(value).all(), name


def test_eval_mode_equals_the_layers_with_and_without_gradients(layers_only):
    block, x = random_block(drop_path=0.5), paddle.randn([3, 5, 6])
    block.eval()
    expected = layers_only(block, x).numpy()
    for needed in (True, False):
        with paddle.set_grad_enabled(needed):
            np.testing.assert_allclose(block(x).numpy(), expected, rtol=1e-12)


def test_gradients_accumulate_over_two_backward_calls(layers_only):
    block, x = random_block(), paddle.randn([4, 5, 6])
    whole = outputs_and_gradients(block, x)
    block.clear_gradients()
    projection = paddle.to_tensor(np.random.default_rng(0).standard_normal(x.shape))
    for half in (slice(0, 2), slice(2, 4)):
        (block(x[half]) * projection[half]).sum().backward()
    for name, parameter in block.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), whole[name], rtol=1e-9, atol=1e-12)


def test_recompute_gives_the_same_gradients(fused_calls):
    block, x = random_block(drop_path=0.5), paddle.randn([4, 5, 6])
    expected = outputs_and_gradients(block, x)

    assert_equal(outputs_and_gradients(block, x, recompute), expected)
    assert len(fused_calls) == 3  # once before, twice with recompute


class Doubled(paddle.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("what", ["a hook", "another layer", "dropout"])
def test_layers_compute_where_something_else_was_put_in_a_block(fused_calls, layers_only, what):
    block, x = random_block(dropout=0.5 * (what == "dropout")), paddle.randn([2, 5, 6])
    called = []
    if what == "a hook":
        block.norm2.register_forward_post_hook(lambda *_: called.append("after"))
        block.mlp_channels.fc1.register_forward_pre_hook(lambda *_: called.append("before"))
    elif what == "another layer":
        block.mlp_channels.fc1 = Doubled(6, 24)
        np.testing.assert_array_equal(block(x).numpy(), layers_only(block, x).numpy())
    block(x)
    assert not fused_calls and called == ["after", "before"] * (what == "a hook")
    if what == "dropout":  # which evaluation has none of
        block.eval()
        block(x)
        assert fused_calls


def test_a_traced_model_is_made_of_layers(fused_calls, tmp_path):
    model = ResMLP(image_size=8, patch_size=4, embed_dim=6, depth=2, num_classes=3)
    model.eval()
    spec = paddle.static.InputSpec([None, 3, 8, 8], "float64", "image")
    static = paddle.jit.to_static(copy.deepcopy(model), input_spec=[spec], full_graph=True)
    images = paddle.randn([2, 3, 8, 8])
    found = static(images).numpy()
    assert not fused_calls
    np.testing.assert_allclose(found, model(images).numpy(), rtol=1e-9)
    assert fused_calls
