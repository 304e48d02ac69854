import numpy as np
import paddle

from model_ema import ModelEma
from resmlp import ResMLP


def tiny():
    return ResMLP(image_size=16, patch_size=8, num_classes=3, embed_dim=8, depth=1)


def test_updates_are_the_exponential_average_in_float64_from_the_weights_that_the_model_holds():
    model, rng = tiny(), np.random.default_rng(0)
    model.head.weight.set_value(paddle.full([8, 3], 7.0))
    ema = ModelEma(model, 0.9)
    expected = model.head.weight.numpy().astype("float64")
    for step in range(20):
        value = rng.normal(size=[8, 3]).astype("float32")
        model.head.weight.set_value(paddle.to_tensor(value))
        ema.update(step)
        expected = 0.9 * expected + 0.1 * value
    assert np.abs(ema.model.head.weight.numpy() - expected).max() < 1e-6
    assert (model.head.weight.numpy() == value).all()  # the model in training is untouched
    assert all(p.stop_gradient for p in ema.model.parameters())
    assert not any(p.stop_gradient for p in model.parameters())


def test_warmup_grows_the_decay_up_to_its_value():
    ema = ModelEma(tiny(), 0.99, warmup=True)
    assert [ema.decay_at(step) for step in (0, 8, 10**6)] == [0.1, 0.5, 0.99]


def test_a_step_that_the_scaler_left_out_does_not_move_the_average():
    model = tiny()
    ema = ModelEma(model, 0.5)
    before = ema.model.head.weight.numpy()
    model.head.weight.set_value(paddle.ones([8, 3]))
    ema.update(0, applied=paddle.to_tensor(False))
    assert (ema.model.head.weight.numpy() == before).all()
    ema.update(0, applied=paddle.to_tensor(True))
    assert np.allclose(ema.model.head.weight.numpy(), (before + 1) / 2)
