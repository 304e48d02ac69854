"""The folded form computes what the model computes."""

import numpy as np
import paddle
import pytest

from resmlp import ResMLP
from tools.folding import fold


def random_model(**changes) -> ResMLP:
    """A tiny model in eval mode whose every parameter, zeros and ones too, is random."""
    paddle.seed(0)
    settings = {"image_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_classes": 5}
    model = ResMLP(**{**settings, **changes})
    for parameter in model.parameters():
        parameter.set_value(parameter + 0.3 * paddle.randn(parameter.shape))
    model.eval()
    return model


def relative_error(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("num_classes", [5, 0])
def test_the_folded_model_equals_the_model(num_classes):
    model = random_model(num_classes=num_classes)
    for batch_size in (1, 3):
        images = paddle.randn([batch_size, 3, 32, 32])
        assert relative_error(fold(model)(images), model(images)) < 1e-6


def test_a_layer_scale_of_a_millionth_is_not_lost():
    model = random_model()
    for block in model.mixer_layers:
        block.ls1.set_value(paddle.full_like(block.ls1, 1e-6))
        block.ls2.set_value(paddle.full_like(block.ls2, 1e-6))
    last = fold(model).mixer_layers[-1]
    x = paddle.zeros([1, 16, 12])
    expected = model.mixer_layers[-1](x)  # from zero input: only the branches, no residual
    assert relative_error(last(x), expected) < 1e-5


def test_folding_leaves_the_model_alone_and_shares_nothing_with_it():
    model, images = random_model(), paddle.randn([2, 3, 32, 32])
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    folded = fold(model)
    expected = folded(images).numpy()
    for parameter in model.parameters():
        np.testing.assert_array_equal(before.pop(next(iter(before))), parameter.numpy())
        parameter.set_value(paddle.zeros_like(parameter))
    np.testing.assert_array_equal(folded(images).numpy(), expected)
