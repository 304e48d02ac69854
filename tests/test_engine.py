import csv
import json
import shutil
from unittest.mock import MagicMock

import numpy as np
import paddle
import pytest

import engine
from cli.errors import CheckpointError, ConfigError, TrainingError, UserError
from config import get_config
from engine import Trainer, run
from optimizer import Schedule
from parallel.process import Process
from storage import checkpoints
from storage.weights import read_weights
from tools.predict import predict
from training import report
from training.evaluation import Metrics
from training.learner import Learner

from .helpers.runs import log_of, metrics
from .helpers.tiny_data import make_config, make_data


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """What a run of six epochs ended with."""
    opts = ["TRAIN.NUM_EPOCHS", 6, "SAVE_FREQ", 2, "MODEL.NUM_CLASSES", "auto"]
    return run(make_config(tmp_path_factory.mktemp("trained"), data, *opts))


@pytest.fixture
def train(tmp_path, data):
    """Makes a run and returns its folder."""

    def train(*opts, name="", data=data):
        return run(make_config(tmp_path / name, data, *opts)).folder

    return train


def weights_of(folder, name="last", key="model"):
    return checkpoints.load(folder / name)[key]


def distance(a, b):
    return max(np.abs(a[name] - b[name]).max() for name in a)


def test_training_learns_and_leaves_what_a_run_leaves(trained):
    folder, names = trained.folder, {path.name for path in trained.folder.iterdir()}
    assert trained["top1"] == 100.0
    assert {"config.yaml", "log.txt", "metrics.jsonl", "classes.txt"} <= names
    assert {"last.pdparams", "best.pdparams", "epoch_006.pdparams"} <= names
    config = get_config(str(folder / "config.yaml"))
    assert (config.TRAIN.NUM_EPOCHS, config.MODEL.NUM_CLASSES) == (6, 3)  # classes: of the data
    assert (folder / "classes.txt").read_text() == "class_0\nclass_1\nclass_2\n"
    epochs, steps = metrics(folder, "epoch"), metrics(folder, "step")
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in steps] == list(range(1, 19))
    schedule = Schedule(config, batches=3, world=1)  # the rate moves with every step
    expected = [schedule.rate(epoch, step) for epoch in range(6) for step in range(3)]
    assert np.allclose([record["lr"] for record in steps], expected, rtol=1e-9)
    loaded = paddle.load(str(folder / "last.pdparams"))["model"]
    file = read_weights(folder / "last.pdparams", "model")
    assert all((np.asarray(loaded[name]) == file.state[name]).all() for name in file.state)


@pytest.mark.parametrize("accumulate, batch", [(2, 4), (4, 2)])
def test_accumulated_batches_are_one_large_batch_though_the_last_window_and_batch_are_smaller(
    train, tmp_path, accumulate, batch
):
    data = make_data(tmp_path / "data", train=21)  # batches 4 4 4 4 4 1, windows 4+4 4+4 4+1
    one = train("DATA.DROP_LAST", False, name="a", data=data)
    opts = ["DATA.DROP_LAST", False, "TRAIN.ACCUM_ITER", accumulate, "DATA.BATCH_SIZE", batch]
    assert distance(weights_of(one), weights_of(train(*opts, name="b", data=data))) < 1e-5
    losses = [record["loss"] for record in metrics(one, "step")]
    assert len(losses) == 6  # the loss of an epoch is the mean over images
    expected = (8 * losses[0] + 8 * losses[1] + 5 * losses[2]) / 21
    assert np.isclose(metrics(one, "epoch")[0]["train_loss"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    "opts, images",
    [
        ("TRAIN.ACCUM_ITER 9", 16),
        ("TRAIN.ACCUM_ITER 9 DATA.DROP_LAST False", 21),
        ("DATA.BATCH_SIZE 64 DATA.DROP_LAST False", 21),
    ],
)
def test_a_step_larger_than_an_epoch_is_said_and_its_rate_goes_by_its_images(
    train, tmp_path, opts, images
):
    opts += " TRAIN.LINEAR_SCALED_LR 42 TRAIN.LR_SCHEDULER.NAME constant"
    folder = train(*opts.split(), data=make_data(tmp_path / "data", train=21))
    records = metrics(folder, "step")
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["lr"] == pytest.approx(0.003 * images / 42, rel=1e-9)
    assert f"a step is one of {images}, and the" in log_of(folder)


def test_the_best_checkpoint_is_chosen_by_the_ema_where_there_is_one(train, monkeypatch):
    found = iter([(10.0, 50.0), (20.0, 40.0)])  # (raw, EMA) of each epoch

    def evaluate(self, models):
        return [Metrics(1.0, top1, 100.0, 9, 1.0) for top1 in next(found)]

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    folder = train("TRAIN.MODEL_EMA", True)
    place = weights_of(folder, "best", "place")
    assert (place["best_epoch"], place["best_top1"], place["epoch"]) == (1, 50.0, 1)
    record = metrics(folder, "epoch")[1]
    assert (record["val_top1"], record["ema_top1"], record["ema_loss"]) == (20.0, 40.0, 1.0)
    log = log_of(folder)
    assert "remembers 25000 steps, more than this run has" in log and "best top-1 of the EMA" in log


def test_evaluation_in_a_second_run_finds_the_same_numbers(tmp_path, data, trained):
    opts = "EVAL True EVAL_REPORT True DATA.BATCH_SIZE_EVAL 4 MODEL.NUM_CLASSES auto"
    opts += f" MODEL.PRETRAINED {trained.folder}/last"
    again = run(make_config(tmp_path, data, *opts.split()))
    assert (again["top1"], again["images"]) == (trained["top1"], 9)
    assert np.isclose(again["loss"], trained["loss"], rtol=1e-5)
    table = again.folder / "per_class.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["name"] for row in rows] == ["class_0", "class_1", "class_2"]
    assert sum(float(row["top1"]) for row in rows) / 3 == pytest.approx(again["top1"], abs=0.01)
    assert (again.folder / "confusion.png").stat().st_size > 5000
    opts_of_predict = ["DATA.DATA_PATH", tmp_path / "gone"]
    predictions = predict(data / "val", trained.folder / "last", opts=opts_of_predict)
    assert len(predictions) == 9 and len(predictions[0]["predictions"]) == 3
    table.unlink(), table.mkdir()
    with pytest.raises(UserError, match="per_class.csv: cannot be written: Is a directory"):
        run(make_config(tmp_path, data, *opts.split()))


RESUME = "MODEL.RESUME auto"


@pytest.mark.parametrize(
    "opts, error, message",
    [
        ("EVAL True", ConfigError, "-eval needs weights"),
        ("SAVE new MODEL.NUM_CLASSES 0", ConfigError, "training needs classes"),
        ("SAVE new TRAIN.FREEZE backbone", ConfigError, "backbone would freeze random weights"),
        ("", UserError, "holds an earlier run; continue it with -resume auto"),
        (f"{RESUME} MODEL.MIXER.DEPTH 3", CheckpointError, "auto: another model: .*_layers.2"),
        (f"{RESUME} TRAIN.OPTIMIZER.NAME sgd", CheckpointError, "TRAIN.OPTIMIZER.NAME"),
        (f"{RESUME} TRAIN.FREEZE 1", CheckpointError, "another TRAIN.FREEZE"),
        ("TRAIN.FREEZE 3", ConfigError, "TRAIN.FREEZE is 3, but MODEL.MIXER.DEPTH is 2"),
    ],
)
def test_a_run_that_cannot_be_is_refused(
    tmp_path, data, trained, monkeypatch, opts, error, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run(make_config(trained.folder.parent, data, *opts.split()))


def test_a_finished_run_resumes_to_nothing(data, trained):
    before = weights_of(trained.folder)
    run(make_config(trained.folder.parent, data, *RESUME.split(), "TRAIN.NUM_EPOCHS", 6))
    assert distance(before, weights_of(trained.folder)) == 0
    assert "has finished its 6 epochs already" in log_of(trained.folder)


def test_another_head_is_new_in_training_and_refused_in_evaluation(train, tmp_path, trained):
    other = make_data(tmp_path / "other")
    for split in ("train", "val"):
        for label in (3, 4):
            shutil.copytree(other / split / "class_0", other / split / f"class_{label}")
    opts = ["MODEL.PRETRAINED", trained.folder / "last", "MODEL.NUM_CLASSES", 5]
    with pytest.raises(UserError, match="2 of 5 classes are not among those of"):
        train(*opts, "EVAL", True, data=other)
    assert "head initialised for 5 classes" in log_of(train(*opts, data=other))


def poison(monkeypatch, at):
    """Makes the losses of the optimizer steps ``at`` not a number."""
    forward, steps = Learner.forward, []

    def poisoned(self, images, targets):
        steps.append(images)
        return forward(self, images, targets) * (float("nan") if len(steps) - 1 in at else 1.0)

    monkeypatch.setattr(Learner, "forward", poisoned)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    train, tmp_path, monkeypatch
):
    poison(monkeypatch, at={4})
    with pytest.raises(TrainingError, match=r"rank 0, step 4: the loss is not finite .*last.pd"):
        train()
    facts = json.loads((tmp_path / "run" / "nonfinite.rank0.json").read_text())
    assert (facts["step"], facts["epoch"], len(facts["images"])) == (4, 2, 8)
    assert all(np.isfinite(value).all() for value in weights_of(tmp_path / "run").values())


def test_facts_that_cannot_be_written_hide_no_step_that_is_not_finite(train, tmp_path, monkeypatch):
    poison(monkeypatch, at={0})
    full = tmp_path / "run" / "nonfinite.rank0.json"
    full.mkdir(parents=True)  # cannot be written
    with pytest.raises(TrainingError, match=r"step 0: the loss .*; nothing was saved yet\."):
        train()


def test_a_loss_that_is_not_finite_is_skipped_on_request(train, monkeypatch):
    poison(monkeypatch, at={4, 8, 9, 10, 11})
    folder = train("TRAIN.NONFINITE", "skip")
    assert weights_of(folder, key="place")["skipped_steps"] == 1
    losses = [record["loss"] for record in metrics(folder, "step")]
    assert losses[4] is None and None not in losses[:4] + losses[5:]
    assert "loss -  " in log_of(folder)
    assert all(np.isfinite(value).all() for value in weights_of(folder).values())
    with pytest.raises(TrainingError, match="step 4"):  # too many in a row
        train("TRAIN.NONFINITE", "skip", "TRAIN.NONFINITE_LIMIT", 2, name="second")


def test_the_dashboard_gets_curves_histograms_and_augmented_images(train, monkeypatch):
    dashboard = MagicMock()
    monkeypatch.setattr(report, "build_dashboard", lambda *_: dashboard)
    train()
    written = {(call.args[0], call.args[2]) for call in dashboard.method_calls if call.args}
    expected = {("train/loss", 6), ("epoch/val_top1", 6), ("train/images", 1), ("train/images", 4)}
    assert expected | {("mixer_layers.1.ls2", 6)} < written
    image = dashboard.add_image.call_args.args[1]
    assert image.dtype == np.uint8 and image.shape == (16, 8 * 16, 3) and image.std() > 10
    dashboard.close.assert_called_once()


def test_a_student_is_distilled_from_another_resmlp_and_resumes(train, trained):
    opts = "TRAIN.DISTILLATION_TYPE hard TRAIN.TEACHER_MODEL {0}/config.yaml "
    opts = (opts + "TRAIN.TEACHER_PRETRAINED {0}/last.pdparams").format(trained.folder).split()
    log = log_of(train(*opts, "TRAIN.NUM_EPOCHS", 1))
    assert "teacher: loss" in log and log.index("teacher: loss") < log.index("epoch 1/1")
    folder = train(*opts, *RESUME.split())
    assert [record["epoch"] for record in metrics(folder, "epoch")] == [1, 2]


def test_the_output_folder_is_chosen_by_rank_0_alone(train, monkeypatch):
    def from_main(value, process):
        raise LookupError(value)

    monkeypatch.setattr(engine, "prepare_process", lambda: Process(rank=1, world=2))
    monkeypatch.setattr(engine, "choose_folder", lambda config: pytest.fail("rank 1 chose one"))
    monkeypatch.setattr(engine, "from_main", from_main)
    with pytest.raises(LookupError, match="^None$"):
        train()
