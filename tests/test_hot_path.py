"""What a training step asks of the device, counted on a CPU with what a GPU runs: the layers."""

from collections import Counter

import paddle
import pytest
from paddle import _C_ops

import engine
from model_ema import ModelEma
from optimizer import clip_gradients
from parallel.process import Process
from resmlp import ResMLP
from training import precision
from training.evaluation import evaluate
from training.progress import SYNC_STEPS_GPU

from .helpers import gpu
from .helpers.tiny_data import make_config, make_data

STEPS = 24
OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "getitem", "setitem")
COPIES = ("cuda", "set_value", "copy_", "cpu")
READS = ("numpy", "item", "tolist", "__float__", "__int__", "__bool__", "__array__")
RECIPE = "TRAIN.NUM_EPOCHS 1 TRAIN.MODEL_EMA True TRAIN.OPTIMIZER.NAME lamb REPORT_FREQ 100"
RECIPE += " TRAIN.CUTMIX_ALPHA 0.0 TRAIN.MIXUP_ALPHA 0.8 TRAIN.RANDOM_ERASE_PROB 1.0"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    gpu.install(monkeypatch.setattr)


def counted(monkeypatch, owner, names, calls):
    """Counts the calls of some of an object's functions; several of these add to one counter."""

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))


def per_step(tmp_path, batch_size, calls, *opts):
    """{step: what was called in it}, of an epoch's steps but the first. The look at the losses of a
    step comes after it is counted, and so is counted with the next."""
    data = make_data(tmp_path / "data", train=STEPS * batch_size, val=3)
    opts = [*RECIPE.split(), "DATA.BATCH_SIZE", batch_size, *opts]
    (tmp_path / "out").mkdir()
    seen = []
    config = make_config(tmp_path / "out", data, *opts)
    engine.run(config, on_step=lambda step: seen.append(Counter(calls)))
    return {step: seen[step - 1] - seen[step - 2] for step in range(2, len(seen) + 1)}


def looks(steps):
    return [step for step in steps if step % SYNC_STEPS_GPU == 1]


@pytest.mark.parametrize("accum_iter", [1, 2])
def test_the_operators_of_a_step_do_not_depend_on_the_batch_size(
    tmp_path, monkeypatch, as_on_a_gpu, accum_iter
):
    names = [name for name in dir(_C_ops) if not name.startswith("_")]
    calls, found = Counter(), []
    counted(monkeypatch, _C_ops, names, calls)
    counted(monkeypatch, paddle.Tensor, [f"__{name}__" for name in OPERATORS], calls)
    for size in (2, 12):
        (tmp_path / str(size)).mkdir()
        steps = per_step(tmp_path / str(size), size, calls, "TRAIN.ACCUM_ITER", accum_iter)
        assert looks(steps)
        found += [steps[step] for step in steps if step not in looks(steps)]
    assert all(step == found[0] for step in found)
    assert sum(found[0].values()) > 50  # they were counted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_waits_for_the_device_only_when_the_losses_are_due(
    tmp_path, monkeypatch, as_on_a_gpu, dtype
):
    """But for float16's scaler: Paddle's asks once a step whether a gradient was not finite."""
    amp = ["AMP", False] if dtype == "float32" else ["AMP", True, "AMP_DTYPE", dtype]
    monkeypatch.setattr(precision, "FLOAT16_LOSS_SCALE", 2.0**10)
    calls = Counter()
    counted(monkeypatch, paddle.Tensor, READS, calls)
    counted(monkeypatch, paddle, ["to_tensor"], calls)
    counted(monkeypatch, paddle.Tensor, COPIES, calls)
    steps = per_step(tmp_path, 4, calls, *amp)
    reads = {step: sum(found[name] for name in READS) for step, found in steps.items()}
    own = 3 if dtype == "float16" else 0  # one read, of three calls within each other
    assert [step for step in steps if reads[step] > own] == looks(steps)
    for found in steps.values():  # images, labels, and in one what erasing and mixing need
        assert found["to_tensor"] == 3 and sum(found[name] for name in COPIES) == found["cuda"] == 1


def test_gradient_norm_clipping_and_ema_are_a_few_launches_on_a_gpu(monkeypatch, as_on_a_gpu):
    model = ResMLP(image_size=16, patch_size=8, num_classes=3, embed_dim=16, depth=6)
    ema, parameters = ModelEma(model, 0.9), model.parameters()
    model(paddle.rand([2, 3, 16, 16])).sum().backward()
    calls = Counter()
    counted(monkeypatch, _C_ops, [name for name in dir(_C_ops) if not name.startswith("_")], calls)
    clip_gradients(parameters, 1e-3)
    ema.update(0)
    del calls["flatten"], calls["reshape"]  # views
    assert len(parameters) > 60 and sum(calls.values()) < 20, calls


@pytest.mark.parametrize("options, per_batch", [({}, False), ({"rows": True}, True)])
def test_evaluation_reads_the_device_once_unless_it_reports_on_images(
    monkeypatch, options, per_batch
):
    def reads_of(batches):
        batch = paddle.randn([4, 7]), paddle.to_tensor([0, 1, 2, 3]), list(range(4))
        calls.clear()
        evaluate([lambda images: images], [batch] * batches, Process(), 7, **options)
        return sum(calls.values())

    calls = Counter()
    counted(monkeypatch, paddle.Tensor, READS, calls)
    assert (reads_of(1) < reads_of(9)) == per_batch
