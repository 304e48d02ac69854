"""Mixed precision on a CPU: bfloat16 products, float32 parameters and residual stream."""

import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.utils import recompute

import engine
from config import get_config
from cpu import onednn, ops, setup
from resmlp import ResBlock, ResMLP
from storage import checkpoints
from training.learner import Objective
from training.precision import autocast, choose_precision

from .helpers.gradients import outputs_and_gradients
from .helpers.runs import HALF, losses
from .helpers.tiny_data import make_config

pytestmark = pytest.mark.skipif(not onednn.has(paddle.float32), reason="no oneDNN in this Paddle")


@pytest.fixture(autouse=True)
def seed():
    paddle.seed(0)


def gradients(block, x, half, *run):
    with ops.bfloat16(half):
        found = outputs_and_gradients(block, x, *run)
    assert {value.dtype for value in found.values()} == {np.dtype("float32")}
    return found


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


def test_recompute_in_the_same_context_changes_no_gradient():
    """Its first pass is one without gradients, which rounds once less on the way."""
    block, x = random_block(), paddle.randn([4, 49, 96])
    expected = gradients(block, x, True)
    found = gradients(block, x, True, recompute)
    assert_near(found, {"output": expected.pop("output"), **expected})
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("half", [False, True])
def test_hooks_of_parameters_see_the_whole_gradient_and_what_they_return_is_used(half):
    block, x, seen = random_block(), paddle.randn([4, 49, 96]), {}
    expected = gradients(block, x, half)
    for name, parameter in block.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.update({name: gradient}) or None)
    block.norm2.alpha.register_hook(lambda gradient: 2 * gradient)
    found = gradients(block, x, half)
    expected["norm2.alpha"] = 2 * expected["norm2.alpha"]
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert seen.keys() == expected.keys() - {"output", "x"}


def test_small_gradients_of_36_layers_do_not_vanish():
    """resmlp_36's LayerScale starts at 1e-6: the gradients behind it are as small."""
    model = ResMLP(32, 8, 3, 5, 32, 36, layer_scale_init=1e-6)
    images = paddle.randn([4, 3, 32, 32])
    expected, found = gradients(model, images, False), gradients(model, images, True)
    assert abs(expected["mixer_layers.0.mlp_channels.fc1.weight"]).max() < 1e-4
    assert_near(found, expected)
    vanished = [((found[name] == 0) & (value != 0)).sum() for name, value in expected.items()]
    assert sum(vanished) <= 2  # of 323,781: a sum may cancel out


@pytest.mark.parametrize(
    "dtype, fast, used",
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float32"),
        ("float16", True, "bfloat16"),
        ("float16", False, "float32"),
        ("bfloat16", False, "bfloat16"),
    ],
)
def test_what_amp_means_on_a_cpu(monkeypatch, dtype, fast, used):
    monkeypatch.setattr(setup, "has_fast_bfloat16", lambda: fast)
    config = get_config()
    config.AMP, config.AMP_DTYPE = True, dtype
    found, line = choose_precision(config, on_gpu=False)
    assert found == used in line and "\n" not in line
    block, x = random_block(), paddle.randn([4, 49, 96])
    with paddle.no_grad():
        plain = block(x)
    with autocast(config, on_gpu=False), paddle.no_grad():
        y = block(x)
    assert bool((y != plain).any()) == (used == "bfloat16")
    config.AMP = False
    assert choose_precision(config, on_gpu=False) == ("float32", "")


def test_the_context_ends_with_its_block():
    block, x = random_block(), paddle.randn([4, 49, 96])
    expected = block(x).numpy()
    with pytest.raises(ValueError), ops.bfloat16():
        raise ValueError
    np.testing.assert_array_equal(block(x).numpy(), expected)


# ------------------------------------------------------------------------------------ whole runs
@pytest.mark.parametrize(
    "opts",
    [
        "TRAIN.ACCUM_ITER 2 TRAIN.MODEL_EMA True TRAIN.MODEL_EMA_DECAY 0.9 MODEL.DROPPATH 0.2",
        "TRAIN.RECOMPUTE True TRAIN.GRAD_CLIP 0.5",
        "TRAIN.FREEZE 1",
        "teacher",
    ],
)
def test_a_run_follows_float32_and_all_that_it_keeps_is_float32(tmp_path, data, teacher, opts):
    opts = teacher if opts == "teacher" else opts.split()
    opts = [*opts, "MODEL.PRETRAINED", teacher[-1]]
    runs = [
        engine.run(make_config(tmp_path / name, data, *opts, *amp))["folder"]
        for name, amp in (("a", []), ("b", HALF))
    ]
    plain, half = map(losses, runs)
    assert (plain != half).any()
    np.testing.assert_allclose(half, plain, rtol=0.01)
    plain, half = (checkpoints.load(run / "last.pdparams") for run in runs)
    for part in {"model", "model_ema"} & half.keys():
        assert {value.dtype for value in half[part].values()} == {np.dtype("float32")}
        for name, value in plain[part].items():
            frozen = "TRAIN.FREEZE" in opts and name.startswith(("patch_embed", "mixer_layers.0."))
            assert (value == half[part][name]).all() == frozen, name
    options = ["EVAL", True, "MODEL.PRETRAINED", runs[1] / "last.pdparams"]
    plain = engine.run(make_config(tmp_path, data, *options))
    half = engine.run(make_config(tmp_path, data, *options, *HALF))
    assert plain["loss"] != half["loss"] == pytest.approx(plain["loss"], rel=0.01)


def test_the_teacher_computes_in_bfloat16_too(tmp_path, data, teacher):
    config = make_config(tmp_path, data, *teacher, *HALF)
    objective, images = Objective(config), paddle.randn([4, 3, 16, 16])
    expected, seen = objective.teacher(images), []
    objective.teacher.network.register_forward_post_hook(lambda *call: seen.append(call[-1]))
    with autocast(config, on_gpu=False):
        objective(paddle.zeros([4, 3]), images, paddle.zeros([4], "int64"))
    assert (seen[0] != expected).any() and seen[0].dtype == paddle.float32
    assert_near({"logits": seen[0].numpy()}, {"logits": expected.numpy()})
