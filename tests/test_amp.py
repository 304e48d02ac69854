"""Mixed precision: what can be checked without a GPU, where Paddle has none."""

import numpy as np

from training.precision import FLOAT16_LOSS_SCALE


def branch(half, scale, stream):
    """``x + layer_scale * W y`` with the product in float16, the rest in ``stream``."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=384), rng.normal(size=384), rng.normal(size=[384, 384]) * 0.02
    product = (w.astype(half) @ y.astype(half)).astype(half).astype(stream)
    x = x.astype(stream)
    return (x + np.asarray(scale).astype(stream) * product).astype("float64") - x


def test_a_layer_scale_of_1e_6_acts_where_the_stream_is_float32_and_is_lost_in_float16():
    exact = branch("float64", 1e-6, "float64")
    kept, lost = branch("float16", 1e-6, "float32"), branch("float16", 1e-6, "float16")
    assert np.abs(kept - exact).max() < 0.2 * np.abs(exact).max()  # float32 next to numbers near 1
    assert np.corrcoef(kept, exact)[0, 1] > 0.99
    assert (lost == 0).all()


def test_gradients_behind_a_layer_scale_of_1e_6_survive_float16_at_our_loss_scale():
    gradient = np.random.default_rng(0).normal(size=10_000) * 5e-7  # as 36 layers have it

    def lost(scale):
        return np.mean((gradient * 1e-6 * scale).astype("float16") == 0)

    assert lost(FLOAT16_LOSS_SCALE) < 0.1 < 0.5 < lost(2.0**16)
