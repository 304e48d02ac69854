"""Many processes do what one does: the same gradients, weights and counts."""

import time

import numpy as np
import paddle.distributed as dist
import pytest

import engine
from storage import checkpoints

from .helpers import rank_checks
from .helpers.runs import HALF, command, metrics, run
from .helpers.tiny_data import make_config, make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), train=40, val=7)


def test_three_ranks_count_each_image_once_and_average_gradients_exactly(capfd):
    context = dist.spawn(rank_checks.main, nprocs=3, join=False)
    deadline = time.monotonic() + 100
    for process in context.processes:  # where one fails, another may wait for it
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in context.processes]
    for process in context.processes:
        process.kill()
    output = capfd.readouterr()
    assert codes == [0, 0, 0], output.err
    passed = [line for line in output.out.splitlines() if line.startswith("passed")]
    assert passed == [f"passed: {check.__name__}" for check in rank_checks.CHECKS]


@pytest.mark.parametrize("amp, tolerance", [([], 1e-5), (HALF, 1e-3)])
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, data, amp, tolerance):
    """50 steps, two batches accumulated a step, EMA, recomputation; evaluation of 7 images."""
    opts = "TRAIN.NUM_EPOCHS 10 TRAIN.ACCUM_ITER 2 TRAIN.MODEL_EMA True TRAIN.MODEL_EMA_DECAY 0.9"
    opts += " TRAIN.OPTIMIZER.NAME lamb SAVE_STEPS 3 TRAIN.RECOMPUTE True"
    opts = [*opts.split(), *amp]
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    engine.run(make_config(tmp_path / "one", data, *opts, "DATA.BATCH_SIZE", 4))
    opts += ["DATA.BATCH_SIZE", 2]
    words = command(data, tmp_path / "two" / "run", *opts, main="main_multi_gpu.py", nprocs=2)
    code, output = run(words)
    assert code == 0, output
    runs = tmp_path / "one" / "run", tmp_path / "two" / "run"
    one, two = (checkpoints.load(path / "last.pdparams") for path in runs)
    assert one["place"]["step"] == two["place"]["step"] == 50
    for key in ("model", "model_ema"):
        assert max(np.abs(one[key][k] - two[key][k]).max() for k in one[key]) < tolerance
    for a, b in zip(*map(metrics, runs)):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
        assert all(a[key] == b[key] for key in a if key.endswith(("top1", "top5")))
    assert (runs[1] / "log.rank1.txt").stat().st_size > 0
