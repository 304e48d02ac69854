import csv
import errno
import json
import os
from pathlib import Path

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

from .helpers.tiny_data import make_config, make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def metrics(folder, kind):
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def weights_of(folder, name="last.pdparams", key="model"):
    return checkpoints.load(folder / "run" / name)[key]


def distance(a, b):
    return max(np.abs(a[name] - b[name]).max() for name in a)


def test_training_learns_and_leaves_what_a_run_leaves(tmp_path, data):
    result = run(make_config(tmp_path, data, "TRAIN.NUM_EPOCHS", 6, "SAVE_FREQ", 2))
    assert result["top1"] == 100.0
    names = {path.name for path in result["folder"].iterdir()}
    assert {"config.yaml", "log.txt", "metrics.jsonl", "classes.txt"} <= names
    assert {"last.pdparams", "best.pdparams", "epoch_006.pdparams"} <= names
    assert get_config(str(result["folder"] / "config.yaml")).TRAIN.NUM_EPOCHS == 6
    assert (result["folder"] / "classes.txt").read_text().split() == [
        "class_0",
        "class_1",
        "class_2",
    ]
    epochs, steps = metrics(tmp_path, "epoch"), metrics(tmp_path, "step")
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in steps] == list(range(1, 19))


def test_classes_are_counted_in_the_data_and_the_saved_config_holds_their_number(tmp_path, data):
    result = run(make_config(tmp_path, data, "MODEL.NUM_CLASSES", "auto", "TRAIN.NUM_EPOCHS", 1))
    weights = result["folder"] / "last"
    assert get_config(str(result["folder"] / "config.yaml")).MODEL.NUM_CLASSES == 3
    evaluated = run(
        make_config(
            *(tmp_path, data, "MODEL.NUM_CLASSES", "auto", "EVAL", True),
            *("MODEL.PRETRAINED", weights, "SAVE", tmp_path / "eval"),
        )
    )
    assert evaluated["top1"] == result["top1"]
    predictions = predict(data / "val", weights, opts=["DATA.DATA_PATH", tmp_path / "gone"])
    assert len(predictions) == 9 and len(predictions[0]["predictions"]) == 3


def test_the_learning_rate_moves_with_every_step(tmp_path, data):
    config = make_config(tmp_path, data)
    run(config)
    schedule = Schedule(config, batches=3, world=1)
    expected = [schedule.rate(epoch, step) for epoch in (0, 1) for step in range(3)]
    assert np.allclose([record["lr"] for record in metrics(tmp_path, "step")], expected, rtol=1e-9)


@pytest.mark.parametrize("accumulate, batch", [(2, 4), (4, 2)])
def test_accumulated_batches_are_one_large_batch(tmp_path, data, accumulate, batch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    run(make_config(tmp_path / "a", data))
    opts = ["TRAIN.ACCUM_ITER", accumulate, "DATA.BATCH_SIZE", batch]
    run(make_config(tmp_path / "b", data, *opts))
    assert distance(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) < 1e-5


def test_a_last_window_and_a_last_batch_that_are_smaller_weigh_each_image_the_same(tmp_path):
    data = make_data(tmp_path / "data", train=21)  # batches 4 4 4 4 4 1, windows 4+4 4+4 4+1
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    opts = ["DATA.DROP_LAST", False]
    run(make_config(tmp_path / "a", data, *opts))
    run(make_config(tmp_path / "b", data, *opts, "TRAIN.ACCUM_ITER", 2, "DATA.BATCH_SIZE", 4))
    assert len(metrics(tmp_path / "a", "step")) == 6
    assert distance(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) < 1e-5


@pytest.mark.parametrize(
    "opts, images",
    [
        ("TRAIN.ACCUM_ITER 9", 16),
        ("TRAIN.ACCUM_ITER 9 DATA.DROP_LAST False", 21),
        ("DATA.BATCH_SIZE 64 DATA.DROP_LAST False", 21),
    ],
)
def test_a_step_larger_than_an_epoch_is_said_and_its_rate_goes_by_its_images(
    tmp_path, opts, images
):
    data = make_data(tmp_path / "data", train=21)
    opts = [*opts.split(), "TRAIN.LINEAR_SCALED_LR", 42, "TRAIN.LR_SCHEDULER.NAME", "constant"]
    run(make_config(tmp_path, data, *opts))
    records = metrics(tmp_path, "step")
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["lr"] == pytest.approx(0.003 * images / 42, rel=1e-9)
    assert f"a step is one of {images}, and the" in (tmp_path / "run" / "log.txt").read_text()


def test_the_epoch_loss_is_the_mean_over_images(tmp_path):
    data = make_data(tmp_path / "data", train=21)
    run(make_config(tmp_path, data, "DATA.DROP_LAST", False, "TRAIN.NUM_EPOCHS", 1))
    steps = [record["loss"] for record in metrics(tmp_path, "step")]
    expected = (8 * steps[0] + 8 * steps[1] + 5 * steps[2]) / 21
    assert np.isclose(metrics(tmp_path, "epoch")[0]["train_loss"], expected, rtol=1e-12)


def test_the_whole_recipe_runs_at_once(tmp_path, data):
    opts = (
        "TRAIN.OPTIMIZER.NAME lamb TRAIN.MODEL_EMA True TRAIN.MODEL_EMA_DECAY 0.5 "
        "TRAIN.REPEATED_AUG 3 "
        "TRAIN.RAND_AUGMENT True TRAIN.MIXUP_ALPHA 0.8 TRAIN.CUTMIX_ALPHA 1.0 TRAIN.HFLIP 0.5 "
        "TRAIN.RANDOM_ERASE_PROB 0.5 MODEL.DROPPATH 0.1 DATA.NUM_WORKERS 2 TRAIN.RECOMPUTE True"
    )
    run(make_config(tmp_path, data, *opts.split()))
    record = metrics(tmp_path, "epoch")[-1]
    assert {"val_top1", "ema_top1", "ema_loss"} <= set(record)
    assert distance(weights_of(tmp_path), weights_of(tmp_path, key="model_ema")) > 1e-4


def test_the_best_checkpoint_is_chosen_by_the_ema_where_there_is_one(tmp_path, data, monkeypatch):
    found = iter([(10.0, 50.0), (20.0, 40.0)])  # (raw, EMA) of each epoch

    def evaluate(self, models):
        return [Metrics(1.0, top1, 100.0, 9, 1.0) for top1 in next(found)]

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    run(make_config(tmp_path, data, "TRAIN.MODEL_EMA", True))
    place = checkpoints.load(tmp_path / "run" / "best.pdparams")["place"]
    assert (place["best_epoch"], place["best_top1"], place["epoch"]) == (1, 50.0, 1)


def test_evaluation_in_a_second_run_finds_the_same_numbers(tmp_path, data):
    trained = run(make_config(tmp_path, data))
    opts = ["EVAL", True, "EVAL_REPORT", True, "DATA.BATCH_SIZE_EVAL", 4]
    opts += ["MODEL.PRETRAINED", tmp_path / "run" / "last"]
    again = run(make_config(tmp_path, data, *opts))
    assert (again["top1"], again["images"]) == (trained["top1"], 9)
    assert np.isclose(again["loss"], trained["loss"], rtol=1e-5)
    table = (tmp_path / "run" / "per_class.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert [row["name"] for row in rows] == ["class_0", "class_1", "class_2"]
    assert sum(float(row["top1"]) for row in rows) / 3 == pytest.approx(again["top1"], abs=0.01)
    assert (tmp_path / "run" / "confusion.png").stat().st_size > 5000


def test_the_weights_of_a_run_load_with_paddle(tmp_path, data):
    run(make_config(tmp_path, data))
    loaded = paddle.load(str(tmp_path / "run" / "last.pdparams"))["model"]
    file = read_weights(tmp_path / "run" / "last.pdparams", "model")
    assert all((np.asarray(loaded[name]) == file.state[name]).all() for name in file.state)


def test_evaluation_without_weights_is_refused(tmp_path, data):
    with pytest.raises(ConfigError, match="-eval needs weights"):
        run(make_config(tmp_path, data, "EVAL", True))


def test_another_head_is_new_in_training_and_refused_in_evaluation(tmp_path, data):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    run(make_config(tmp_path / "a", data))
    opts = ["MODEL.PRETRAINED", tmp_path / "a" / "run" / "last", "MODEL.NUM_CLASSES", 5]
    other = make_data(tmp_path / "other")
    for split in ("train", "val"):
        for label in (3, 4):
            folder = other / split / f"class_{label}"
            folder.mkdir()
            (other / split / "class_0" / "0.png").rename(folder / "0.png") if label == 3 else (
                other / split / "class_1" / "1.png"
            ).rename(folder / "1.png")
    with pytest.raises(UserError, match="2 of 5 classes are not among those of"):
        run(make_config(tmp_path / "b", other, *opts, "EVAL", True))
    run(make_config(tmp_path / "b", other, *opts))
    assert "head initialised for 5 classes" in (tmp_path / "b" / "run" / "log.txt").read_text()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, data):
    run(make_config(tmp_path, data))
    with pytest.raises(UserError, match="holds an earlier run; continue it with -resume auto"):
        run(make_config(tmp_path, data))


def test_the_output_folder_is_chosen_by_rank_0_alone(tmp_path, data, monkeypatch):
    class Told(Exception):
        pass

    def from_main(value, process):
        raise Told(value)

    monkeypatch.setattr(engine, "prepare_process", lambda: Process(rank=1, world=2))
    monkeypatch.setattr(engine, "choose_folder", lambda config: pytest.fail("rank 1 chose one"))
    monkeypatch.setattr(engine, "from_main", from_main)
    with pytest.raises(Told, match="^None$"):
        run(make_config(tmp_path, data))


def test_a_finished_run_resumes_to_nothing(tmp_path, data):
    run(make_config(tmp_path, data))
    before = weights_of(tmp_path)
    run(make_config(tmp_path, data, "MODEL.RESUME", "auto"))
    assert distance(before, weights_of(tmp_path)) == 0
    assert "has finished its 2 epochs already" in (tmp_path / "run" / "log.txt").read_text()


def poison(monkeypatch, at):
    """Makes the losses of the optimizer steps ``at`` not a number."""
    forward, steps = Learner.forward, []

    def poisoned(self, images, targets):
        steps.append(images)
        return forward(self, images, targets) * (float("nan") if len(steps) - 1 in at else 1.0)

    monkeypatch.setattr(Learner, "forward", poisoned)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    tmp_path, data, monkeypatch
):
    poison(monkeypatch, at={4})
    with pytest.raises(TrainingError, match=r"rank 0, step 4: the loss is not finite .*last.pd"):
        run(make_config(tmp_path, data))
    with pytest.raises(TrainingError, match=r"rank 0, step 0: .*; nothing was saved yet\."):
        poison(monkeypatch, at={0})
        run(make_config(tmp_path, data, "SAVE", tmp_path / "other"))
    facts = json.loads((tmp_path / "run" / "nonfinite.rank0.json").read_text())
    assert (facts["step"], facts["epoch"], len(facts["images"])) == (4, 2, 8)
    assert all(np.isfinite(value).all() for value in weights_of(tmp_path).values())


def test_a_full_disk_hides_no_step_that_is_not_finite(tmp_path, data, monkeypatch):
    poison(monkeypatch, at={4})
    config = make_config(tmp_path, data)
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(TrainingError, match="rank 0, step 4: the loss is not finite"):
        run(config)


def test_a_report_that_cannot_be_written_is_said(tmp_path, data):
    run(make_config(tmp_path, data))
    (tmp_path / "run" / "per_class.csv").mkdir()
    opts = ["EVAL", True, "EVAL_REPORT", True]
    opts += ["MODEL.PRETRAINED", tmp_path / "run" / "last.pdparams"]
    with pytest.raises(UserError, match="per_class.csv: cannot be written: Is a directory"):
        run(make_config(tmp_path, data, *opts))


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_loss_that_is_not_finite_is_skipped_on_request(tmp_path, data, monkeypatch):
    poison(monkeypatch, at={4})
    run(make_config(tmp_path, data, "TRAIN.NONFINITE", "skip"))
    assert checkpoints.load(tmp_path / "run" / "last.pdparams")["place"]["skipped_steps"] == 1
    losses = [record["loss"] for record in metrics(tmp_path, "step")]
    assert losses[4] is None and None not in losses[:4] + losses[5:]
    assert "loss -  " in (tmp_path / "run" / "log.txt").read_text()
    assert all(np.isfinite(value).all() for value in weights_of(tmp_path).values())


def test_too_many_skipped_steps_in_a_row_stop(tmp_path, data, monkeypatch):
    poison(monkeypatch, at={2, 3, 4, 5})
    opts = ["TRAIN.NONFINITE", "skip", "TRAIN.NONFINITE_LIMIT", 2]
    with pytest.raises(TrainingError, match="step 4"):
        run(make_config(tmp_path, data, *opts))


def test_layer_scale_and_affine_survive_training_without_weight_decay(tmp_path, data):
    run(make_config(tmp_path, data, "TRAIN.WEIGHT_DECAY", 1000.0, "TRAIN.BASE_LR", 1e-4))
    state = weights_of(tmp_path)
    assert np.abs(state["mixer_layers.0.norm1.alpha"] - 1).max() < 0.01
    assert np.abs(state["mixer_layers.0.ls1"] - 0.1).max() < 0.01


def test_the_dashboard_gets_curves_histograms_and_augmented_images(tmp_path, data, monkeypatch):
    class Recorder:
        written = []

        def add_scalar(self, name, value, step):
            self.written.append((name, step))

        add_histogram = add_scalar

        def add_image(self, name, image, step, dataformats):
            assert image.dtype == np.uint8 and image.shape == (16, 8 * 16, 3) and image.std() > 10
            self.written.append((name, step))

        def close(self):
            self.written.append("closed")

    monkeypatch.setattr(report, "build_dashboard", lambda *_: Recorder())
    run(make_config(tmp_path, data))
    assert {
        ("train/loss", 6),
        ("epoch/val_top1", 6),
        ("train/images", 1),
        ("train/images", 4),
    } < set(Recorder.written)
    assert ("mixer_layers.1.ls2", 6) in Recorder.written and Recorder.written[-1] == "closed"


def test_a_student_is_distilled_from_another_resmlp_and_resumes(tmp_path, data):
    (tmp_path / "teacher").mkdir(), (tmp_path / "student").mkdir()
    run(make_config(tmp_path / "teacher", data))
    opts = ["TRAIN.DISTILLATION_TYPE", "hard"]
    opts += ["TRAIN.TEACHER_MODEL", tmp_path / "teacher" / "tiny.yaml"]
    opts += ["TRAIN.TEACHER_PRETRAINED", tmp_path / "teacher" / "run" / "last.pdparams"]
    config = make_config(tmp_path / "student", data, *opts, "TRAIN.NUM_EPOCHS", 1)
    run(config)
    log = (tmp_path / "student" / "run" / "log.txt").read_text()
    assert "teacher: loss" in log and log.index("teacher: loss") < log.index("epoch 1/1")
    opts += ["MODEL.RESUME", "auto"]
    run(make_config(tmp_path / "student", data, *opts))
    assert [record["epoch"] for record in metrics(tmp_path / "student", "epoch")] == [1, 2]


def test_training_without_classes_is_refused(tmp_path, data):
    with pytest.raises(ConfigError, match="training needs classes"):
        run(make_config(tmp_path, data, "MODEL.NUM_CLASSES", 0))


def test_an_ema_that_outlasts_the_run_is_warned_of(tmp_path, data):
    run(make_config(tmp_path, data, "TRAIN.MODEL_EMA", True))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "remembers 25000 steps, more than this run has" in log and "best top-1 of the EMA" in log


def test_resuming_another_model_names_the_checkpoint(tmp_path, data):
    run(make_config(tmp_path, data))
    with pytest.raises(CheckpointError, match="-resume auto: another model: .*mixer_layers.2"):
        run(make_config(tmp_path, data, "MODEL.RESUME", "auto", "MODEL.MIXER.DEPTH", 3))
