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
from .helpers.runs import metrics
from .helpers.tiny_data import make_config, make_data

OLD = paddle.__version__.startswith("2.")
QUIET = 2.0**10  # a loss scale that nothing overflows at


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(tmp_path, data, monkeypatch):
    """Makes a run in half precision on the GPU; returns its folder."""

    def run(dtype, *opts, name="half", scale=QUIET):
        (tmp_path / name).mkdir(exist_ok=True)
        with monkeypatch.context() as patched:
            gpu.install(patched.setattr, gpu.CAPABILITY[dtype])
            patched.setattr(precision, "FLOAT16_LOSS_SCALE", scale)
            return engine.run(make_config(tmp_path / name, data, "AMP", True, *opts))["folder"]

    return run


@pytest.fixture
def train_on_cpu(tmp_path, data):
    """Makes the same run in float32 on a CPU; returns its folder."""

    def run(*opts, name="plain"):
        (tmp_path / name).mkdir(exist_ok=True)
        return engine.run(make_config(tmp_path / name, data, *opts))["folder"]

    return run


def losses(folder):
    return np.array([record["loss"] for record in metrics(folder) if record["kind"] == "step"])


def place(folder):
    return checkpoints.load(folder / "last.pdparams")["place"]


def test_float16_goes_on_after_overflows_with_half_the_scale_for_each(train):
    run = train("float16", "TRAIN.NUM_EPOCHS", 3, scale=2.0**21)
    state = checkpoints.load(run / "last.pdparams")
    skipped = state["place"]["skipped_steps"]
    assert 0 < skipped < state["place"]["step"] == 9 and state["place"]["skipped_in_a_row"] == 0
    assert state["scaler"]["scale"] == 2.0 ** (21 - skipped)
    assert losses(run)[-1] < 0.95 * losses(run)[0]
    log = (run / "log.txt").read_text()
    assert f"skipped {skipped}\n" in log and "AMP: float16, with a loss scaler" in log


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
