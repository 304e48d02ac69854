"""The branches for a GPU, driven on a CPU with stand-ins for its kernels (tests/helpers/gpu.py)."""

import numpy as np
import paddle
import pytest

import engine
from cli.errors import ConfigError, TrainingError
from storage import checkpoints
from tools.predict import predict
from training import precision
from training.learner import Learner
from training.precision import choose_precision

from .helpers import gpu
from .helpers.runs import ROOT, command, finish, log_of, losses, start
from .helpers.tiny_data import make_config

OLD = paddle.__version__.startswith("2.")
QUIET = 2.0**10  # a loss scale that nothing overflows at


@pytest.fixture
def train(tmp_path, data, monkeypatch):
    """Makes a run, in half precision on the GPU or in float32 on "cpu"; returns its folder."""

    def run(dtype, *opts, name=None, scale=QUIET):
        with monkeypatch.context() as patched:
            if dtype != "cpu":
                gpu.install(patched.setattr, gpu.CAPABILITY[dtype])
                patched.setattr(precision, "FLOAT16_LOSS_SCALE", scale)
                opts = ["AMP", True, *opts]
            return engine.run(make_config(tmp_path / (name or dtype), data, *opts)).folder

    return run


def place(folder):
    return checkpoints.load(folder / "last.pdparams")["place"]


def test_float16_goes_on_after_overflows_with_half_the_scale_for_each(train):
    run = train("float16", "TRAIN.NUM_EPOCHS", 3, scale=2.0**21)
    state = checkpoints.load(run / "last.pdparams")
    skipped = state["place"]["skipped_steps"]
    assert 0 < skipped < state["place"]["step"] == 9 and state["place"]["skipped_in_a_row"] == 0
    assert state["scaler"]["scale"] == 2.0 ** (21 - skipped)
    assert losses(run)[-1] < 0.95 * losses(run)[0]
    assert f"skipped {skipped}\n" in log_of(run)
    assert "AMP: float16, with a loss scaler" in log_of(run)


def test_float16_whose_gradients_are_never_finite_stops_at_the_limit(train, monkeypatch):
    forward = Learner.forward

    def finite_without_gradient(self, images, targets):
        loss = forward(self, images, targets)
        return loss + paddle.sqrt(loss - loss.detach())  # the slope of a square root at 0

    monkeypatch.setattr(Learner, "forward", finite_without_gradient)
    with pytest.raises(TrainingError, match="step 4: the gradient is not finite .*loss scale 32"):
        train("float16", "TRAIN.NUM_EPOCHS", 9, "TRAIN.NONFINITE_LIMIT", 4)


def test_amp_level_o2_is_one_error_in_a_run_and_its_weights_still_serve(train, data):
    run = train("float16", "TRAIN.NUM_EPOCHS", 1)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("AMP_LEVEL: O1", "AMP_LEVEL: O2"))
    weights = run / "last.pdparams"
    assert len(predict(data / "val", weights)) == 9
    with pytest.raises(ConfigError, match="AMP_LEVEL is O2, .*: set AMP_LEVEL O1"):
        train("float16", "AMP_LEVEL", "O2", name="other")


@pytest.mark.parametrize(
    "wanted, capability, optimizer, used",
    [
        ("auto", (9, 0), "lamb", "bfloat16"),
        ("auto", (8, 0), "sgd", "float16" if OLD else "bfloat16"),
        ("auto", (7, 5), "lamb", "float16"),
        ("auto", (6, 1), "lamb", "float32"),
        ("bfloat16", (8, 6), "sgd", "bfloat16"),
        ("float16", (8, 0), "adamw", "float16"),
        ("bfloat16", (7, 0), "lamb", "AMP_DTYPE is bfloat16, which needs compute capability 8.0"),
        ("float16", (6, 1), "lamb", "AMP_DTYPE is float16, which needs compute capability 7.0"),
    ],
)
def test_what_amp_computes_in_on_a_gpu(
    tmp_path, data, monkeypatch, wanted, capability, optimizer, used
):
    gpu.install(monkeypatch.setattr, capability)
    opts = ["AMP", True, "AMP_DTYPE", wanted, "TRAIN.OPTIMIZER.NAME", optimizer]
    config = make_config(tmp_path, data, *opts)
    if " " in used:
        with pytest.raises(ConfigError, match=used):
            choose_precision(config, on_gpu=True)
        return
    found, line = choose_precision(config, on_gpu=True)
    assert found == used in line and "\n" not in line
    assert ("Momentum" in line) == (optimizer == "sgd" and wanted == "auto" and OLD)


# ----------------------------------------------------------------- whole runs beside float32's
ALL = "TRAIN.MODEL_EMA True TRAIN.MODEL_EMA_DECAY 0.5 TRAIN.GRAD_CLIP 1.0 MODEL.DROPPATH 0.2 "
ALL += "TRAIN.MIXUP_ALPHA 0.8 TRAIN.CUTMIX_ALPHA 1.0 TRAIN.RANDOM_ERASE_PROB 0.5"
PLAIN = "TRAIN.MODEL_EMA True TRAIN.MODEL_EMA_DECAY 0.5 TRAIN.OPTIMIZER.NAME"


@pytest.mark.parametrize(
    "opts",
    [
        f"{PLAIN} lamb {ALL}",
        f"{PLAIN} adamw TRAIN.RECOMPUTE True",
        f"{PLAIN} sgd TRAIN.ACCUM_ITER 2 DATA.BATCH_SIZE 4",
        f"{PLAIN} lamb TRAIN.FREEZE 1 TRAIN.ACCUM_ITER 3",
        "teacher",
    ],
)
def test_a_run_follows_float32_and_keeps_float32(train, teacher, opts):
    opts = teacher if opts == "teacher" else opts.split()
    opts = [*opts, "MODEL.PRETRAINED", teacher[-1], "AMP_DTYPE"]
    plain = train("cpu", *opts, "auto")
    expected = checkpoints.load(plain / "last.pdparams")
    slots = {name: value.keys() for name, value in expected["optimizer"].items()}
    for dtype in ("float16", "bfloat16"):
        half = train(dtype, *opts, dtype)
        assert place(half)["skipped_steps"] == 0 and (losses(half) != losses(plain)).any()
        np.testing.assert_allclose(losses(half), losses(plain), rtol=0.02)
        found = checkpoints.load(half / "last.pdparams")
        for part in {"model", "model_ema"} & found.keys():
            for name, value in found[part].items():
                assert value.dtype == np.float32
                np.testing.assert_allclose(value, expected[part][name], rtol=0.1, atol=0.02)
        assert {name: value.keys() for name, value in found["optimizer"].items()} == slots


@pytest.mark.parametrize(
    "first, second",
    [("float16", "bfloat16"), ("float16", "cpu"), ("cpu", "float16"), ("float16", "float16")],
)
def test_a_run_goes_on_in_another_precision(train, first, second):
    opts = ["TRAIN.MODEL_EMA", True, "TRAIN.OPTIMIZER.NAME", "lamb", "TRAIN.NUM_EPOCHS"]
    train(first, *opts, 1, name="run")
    run = train(second, *opts, 3, "MODEL.RESUME", "auto", name="run")
    plain = train("cpu", *opts, 3)
    assert place(run)["step"] == 9 and "resumed after epoch 1" in log_of(run)
    np.testing.assert_allclose(losses(run)[-6:], losses(plain)[-6:], rtol=0.1)
    scaler = checkpoints.load(run / "last.pdparams")["scaler"]
    assert scaler["scale"] == QUIET if second == "float16" else scaler == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_evaluation_and_predictions_are_near_float32(train, data, monkeypatch, dtype, tmp_path):
    weights = train(dtype) / "last.pdparams"
    opts = ["EVAL", True, "EVAL_REPORT", True, "MODEL.PRETRAINED", weights]
    plain, wanted = engine.run(make_config(tmp_path, data, *opts)), predict(data / "val", weights)
    gpu.install(monkeypatch.setattr, gpu.CAPABILITY[dtype])
    half = engine.run(make_config(tmp_path, data, *opts, "AMP", True))
    assert plain["loss"] != half["loss"] == pytest.approx(plain["loss"], rel=0.01)
    found = predict(data / "val", weights, amp=True)
    for one, other in zip(found, wanted):
        shown = [{e["class"]: e["confidence"] for e in r["predictions"]} for r in (one, other)]
        assert shown[0] == pytest.approx(shown[1], abs=0.02)


def test_two_ranks_train_as_one_with_twice_the_batch(tmp_path, data, train):
    """As processes, whose gradients are averaged over gloo; accumulated and recomputed."""
    opts = ["AMP", True, "TRAIN.ACCUM_ITER", 2, "TRAIN.RECOMPUTE", True, "TRAIN.OPTIMIZER.NAME"]
    opts += ["lamb", "TRAIN.GRAD_CLIP", 1.0]
    one = train("float16", *opts, "DATA.BATCH_SIZE", 4)
    words = command(data, tmp_path / "run", *opts, "DATA.BATCH_SIZE", 2, nprocs=2)
    words[1] = str(ROOT / "tests" / "helpers" / "gpu.py")
    code, output = finish(start(words, HALF="float16"))
    assert code == 0, output
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=0.02)


# ------------------------------------------------------------------------------- LayerScale
def test_gradients_behind_a_layer_scale_of_1e_6_survive_float16_at_our_loss_scale():
    gradient = np.random.default_rng(0).normal(size=10_000) * 5e-7  # as 36 layers have it

    def lost(scale):
        return np.mean((gradient * 1e-6 * scale).astype("float16") == 0)

    assert lost(precision.FLOAT16_LOSS_SCALE) < 0.1 < 0.5 < lost(2.0**16)
