"""A run that was interrupted anywhere and resumed ends as one that never was, bit for bit."""

import gc
import os
import re
import shutil
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import paddle
import pytest
from PIL import Image

import datasets
import engine
from cli.errors import DataError
from cpu import onednn
from engine import Trainer
from parallel.process import Preempted, Process
from storage import checkpoints
from storage.run_folder import RunFolder
from training import report

from .helpers.runs import HALF, RECIPE, differences, log_of, metrics
from .helpers.tiny_data import make_config, make_data

RESUME = ["MODEL.RESUME", "auto"]
STEPS = 6  # optimizer steps of a run below: 21 images in batches of 4, two a step, two epochs


class Crash(Exception):
    """Stands for a SIGKILL: nothing of the product handles it. (tests/faults kills in earnest.)"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), train=21, val=7)


def config_for(folder, data, *opts):
    return make_config(folder, data, *RECIPE, "DATA.BATCH_SIZE", 4, *opts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return engine.run(config_for(folder, data))["folder"]


@pytest.fixture(autouse=True)
def hangup():
    """It is ignored under nohup, by a run too."""
    kept = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, kept)


def crash_at_step(number):
    def on_step(step):
        if step == number:
            raise Crash

    return on_step


def interrupt(config, error, on_step=lambda step: None):
    """Runs until ``error``. (pytest.raises would keep the run, and with it the folder's lock.)"""
    interrupted = False
    try:
        engine.run(config, on_step=on_step)
    except error:
        interrupted = True
    assert interrupted
    gc.collect()
    for thread in threading.enumerate():  # a crash would end these too
        if thread.name.startswith("checkpoint"):
            thread.join()


@pytest.mark.parametrize("step, workers", [(1, 0), (2, 2), (3, 0), (5, 0)])
def test_a_crash_after_any_step_leaves_no_trace(tmp_path, data, whole, step, workers):
    """Nor does another number of workers."""
    config = config_for(tmp_path, data, "DATA.NUM_WORKERS", workers)
    interrupt(config, Crash, crash_at_step(step))
    engine.run(config_for(tmp_path, data, "DATA.NUM_WORKERS", workers // 2, *RESUME))
    assert differences(tmp_path / "run", whole) == []


def test_a_crash_leaves_no_trace_in_bfloat16(tmp_path, data, whole):
    uninterrupted = engine.run(config_for(tmp_path / "a", data, *HALF))["folder"]
    assert bool(differences(uninterrupted, whole)) == onednn.has(paddle.float32)
    interrupt(config_for(tmp_path / "b", data, *HALF), Crash, crash_at_step(2))
    engine.run(config_for(tmp_path / "b", data, *HALF, *RESUME))
    assert differences(tmp_path / "b" / "run", uninterrupted) == []


@pytest.mark.parametrize(
    "step, number", [(1, signal.SIGTERM), (3, signal.SIGHUP), (4, signal.SIGUSR1)]
)
def test_a_signal_at_any_step_leaves_no_trace(tmp_path, data, whole, step, number):
    config = config_for(tmp_path, data, "SAVE_STEPS", 0)
    interrupt(config, Preempted, lambda done: done == step and os.kill(os.getpid(), number))
    assert checkpoints.load(tmp_path / "run" / "last.pdparams")["place"]["step"] >= step
    engine.run(config_for(tmp_path, data, *RESUME))
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.parametrize("call", [1, 2])  # of weights and EMA, an epoch each
@pytest.mark.parametrize("error", [Crash, Preempted])
def test_an_end_in_evaluation_costs_no_training(tmp_path, data, whole, monkeypatch, call, error):
    calls, original = [], Trainer.evaluate

    def evaluate(self, models):
        calls.append(models)
        if len(calls) == call and error is Crash:
            raise Crash
        if len(calls) == call:  # it stops at the next batch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, models)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    interrupt(config_for(tmp_path, data), error)
    place = checkpoints.load(tmp_path / "run" / "last.pdparams")["place"]
    assert place["step"] == STEPS // 2 * call
    engine.run(config_for(tmp_path, data, *RESUME))
    assert differences(tmp_path / "run", whole) == []


def test_the_newest_whole_checkpoint_is_taken_when_the_last_is_damaged(tmp_path, data, whole):
    interrupt(config_for(tmp_path, data), Crash, crash_at_step(5))
    last = tmp_path / "run" / "last.pdparams"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    engine.run(config_for(tmp_path, data, *RESUME))
    log = log_of(tmp_path / "run")
    assert "last.pdparams" in log and "damaged" in log and "resumed after epoch 1, step 3" in log
    assert differences(tmp_path / "run", whole) == []


def test_a_kill_between_the_last_save_and_the_rotation_leaves_no_trace(tmp_path, data, whole):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copy(tmp_path / "run" / "epoch_001.pdparams", tmp_path / "run" / "epoch_000.pdparams")
    engine.run(config_for(tmp_path, data, *RESUME, "KEEP_CHECKPOINTS", 2))
    assert differences(tmp_path / "run", whole) == []


def test_an_earlier_checkpoint_of_the_run_becomes_its_last(tmp_path, data, whole):
    """From the very start: a crash before the first save of its own must not bring back the old."""
    engine.run(config_for(tmp_path, data, "TRAIN.BASE_LR", 0.5))
    folder = tmp_path / "run"
    for name in ("epoch_001.pdparams", "metrics.jsonl"):
        (folder / name).unlink()
        shutil.copy(whole / name, folder)
    back = ["MODEL.RESUME", folder / "epoch_001"]
    interrupt(config_for(tmp_path, data, *back), Crash, crash_at_step(4))
    assert (folder / "abandoned_epoch_002.pdparams").is_file()
    assert (folder / "last.pdparams").samefile(folder / "epoch_001.pdparams")
    engine.run(config_for(tmp_path, data, *RESUME))
    assert differences(folder, whole) == []


def test_signals_and_folder_are_given_back(tmp_path, data):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Preempted) as kept:  # with its traceback, as a notebook keeps it
        engine.run(config_for(tmp_path, data), on_step=lambda step: signal.raise_signal(2))
    assert "saved in" in str(kept.value)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    engine.run(config_for(tmp_path, data, *RESUME))


def test_a_run_under_nohup_goes_on_when_its_terminal_is_closed(tmp_path, data):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    config = config_for(tmp_path, data, "TRAIN.NUM_EPOCHS", 1)
    assert engine.run(config, lambda step: os.kill(os.getpid(), signal.SIGHUP)).images == 7


def test_a_run_in_a_thread_trains(tmp_path, data):
    config = config_for(tmp_path, data, "TRAIN.NUM_EPOCHS", 1)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(engine.run, config).result().images == 7


def test_what_changed_since_the_checkpoint_is_said(tmp_path, data):
    interrupt(config_for(tmp_path, data), Crash, crash_at_step(3))
    engine.run(config_for(tmp_path, data, *RESUME, "TRAIN.BASE_LR", 0.001, "DATA.BATCH_SIZE", 8))
    log = log_of(tmp_path / "run")
    changes = re.findall("changed since the checkpoint: (.*)", log)
    assert changes == ["DATA.BATCH_SIZE 4 -> 8", "TRAIN.BASE_LR 0.003 -> 0.001"]


@pytest.mark.parametrize("batch, steps_left", [(2, 4), (3, 3), (4, 2), (8, 1), (16, 1)])
def test_any_batch_size_goes_on_at_the_next_image(tmp_path, data, monkeypatch, batch, steps_left):
    """What was seen is not decoded again; the first images of each epoch are shown, no others."""
    dashboard, positions, original = MagicMock(), [], datasets.sample_rng

    def sample_rng(seed, epoch, position):
        positions.append((epoch, position))
        return original(seed, epoch, position)

    monkeypatch.setattr(report, "build_dashboard", lambda *_: dashboard)
    interrupt(config_for(tmp_path, data), Crash, crash_at_step(5))  # saved after 8 images
    assert dashboard.close.called
    monkeypatch.setattr(datasets, "sample_rng", sample_rng)
    config = config_for(tmp_path, data, *RESUME, "DATA.BATCH_SIZE", batch, "TRAIN.NUM_EPOCHS", 3)
    engine.run(config)
    assert [position for epoch, position in positions if epoch == 1] == list(range(8, 21))
    ends = [(r["epoch"], r["step"]) for r in metrics(tmp_path / "run", "epoch")]
    assert len(ends) == 3 and ends[1] == (2, 4 + steps_left)
    shown = [call.args[2] for call in dashboard.add_image.call_args_list]
    assert shown == [1, 4, 5 + steps_left]


def test_the_moments_of_a_checkpoint_are_let_go_after_the_first_step(tmp_path, data, monkeypatch):
    interrupt(config_for(tmp_path, data), Crash, crash_at_step(3))
    references, alive, original = [], {}, checkpoints.load_newest

    def load_newest(folder):
        found = original(folder)
        slots = [v for s in found[0]["optimizer"].values() for v in s.values()]
        references.extend(weakref.ref(value) for value in slots)
        return found

    def on_step(step):
        gc.collect()
        alive[step] = sum(reference() is not None for reference in references)

    monkeypatch.setattr(checkpoints, "load_newest", load_newest)
    engine.run(config_for(tmp_path, data, *RESUME), on_step=on_step)
    assert len(references) > 50 and alive == {3: 0, 4: 0, 5: 0, 6: 0}


def test_a_run_goes_on_in_another_folder(tmp_path, data, whole):
    interrupt(config_for(tmp_path / "a", data), Crash, crash_at_step(3))
    last = tmp_path / "a" / "run" / "last.pdparams"
    engine.run(config_for(tmp_path / "b", data, "MODEL.RESUME", last))
    ours = checkpoints.load(tmp_path / "b" / "run" / "last.pdparams")
    theirs = checkpoints.load(whole / "last.pdparams")
    assert all(np.array_equal(ours["model"][k], theirs["model"][k]) for k in ours["model"])
    opts = [*RESUME, "TRAIN.NUM_EPOCHS", 4]
    interrupt(config_for(tmp_path / "b", data, *opts), Crash, crash_at_step(8))
    engine.run(config_for(tmp_path / "b", data, *opts))
    steps = [r["step"] for r in metrics(tmp_path / "b" / "run", "step")]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("step", [1, 5])
def test_with_every_option_of_fine_tuning_a_crash_leaves_no_trace(tmp_path, data, whole, step):
    unequal = tmp_path / "data"
    shutil.copytree(data, unequal)
    for path in sorted((unequal / "train" / "class_2").iterdir())[2:]:
        path.unlink()
    for number, path in enumerate(sorted(unequal.glob("*/*/*.png"))):
        exif = Image.Exif()
        exif[0x112] = 1 + number % 8  # how the camera was held
        Image.open(path).save(path, exif=exif)
    opts = f"MODEL.PRETRAINED {whole}/last TRAIN.FREEZE 1 TRAIN.EARLY_STOP 2 TRAIN.LAYER_DECAY 0.5 "
    opts += "TRAIN.BALANCED_SAMPLING True TRAIN.CLASS_WEIGHTS balanced MODEL.NUM_CLASSES auto "
    opts += "BEST_METRIC macro_f1 TRAIN.NUM_EPOCHS 9 DATA.EXIF_ORIENTATION True"
    opts = opts.split()
    uninterrupted = engine.run(config_for(tmp_path / "a", unequal, *opts))["folder"]
    stale = checkpoints.load(uninterrupted / "last.pdparams")["place"]["stale"]
    assert stale == 2  # it ended early
    interrupt(config_for(tmp_path / "b", unequal, *opts), Crash, crash_at_step(step))
    engine.run(config_for(tmp_path / "b", unequal, *opts, *RESUME))
    assert differences(tmp_path / "b" / "run", uninterrupted) == []


# ------------------------------------------------------------------------- data that have changed
@pytest.fixture
def short(tmp_path):
    """The config of a run that has ended after an epoch, on data of its own, and the run."""
    data = make_data(tmp_path / "data", train=9, val=6)
    opts = ["TRAIN.NUM_EPOCHS", 1, "DATA.BATCH_SIZE", 4]
    folder = engine.run(make_config(tmp_path, data, *opts))["folder"]
    return make_config(tmp_path, data, *opts[2:], *RESUME), folder


@pytest.mark.parametrize("inside", [True, False])
def test_other_classes_than_the_checkpoints_are_refused(short, inside):
    config, folder = short
    if not inside:  # of an earlier commit, beside which the names of the run lie
        state = checkpoints.load(folder / "last")
        del state["classes"], state["images"]
        checkpoints.save(state, folder / "last.pdparams")
    for path in sorted(Path(config.DATA.DATA_PATH).glob("*/class_0")):
        path.rename(path.with_name("other"))
    with pytest.raises(DataError, match="not among .* such as 'other' .label 2.*'class_0'"):
        engine.run(config)


def test_the_order_of_a_checkpoints_classes_is_kept_and_its_file_of_names(short):
    config, folder = short
    state = checkpoints.load(folder / "last")
    state["classes"]["names"] = state["classes"]["folders"] = ["class_2", "class_0", "class_1"]
    checkpoints.save(state, folder / "last.pdparams")
    (folder / "classes.txt").write_text("class_2\nclass_0\nclass_1\n")
    engine.run(config)
    assert "label 0 is 'class_0', not 'class_2'" in log_of(folder)
    assert checkpoints.load(folder / "last")["classes"] == state["classes"]
    assert (folder / "classes.txt").read_text().startswith("class_2")


def test_changed_images_are_said_and_a_best_of_other_validation_images_does_not_count(
    short, caplog
):
    caplog.set_level("INFO", "resmlp")
    config, folder = short
    root = Path(config.DATA.DATA_PATH)
    shutil.copy(root / "train/class_0/0.png", root / "train/class_0/more.png")
    (root / "val/class_0/0.png").rename(root / "val/class_0/other.png")
    trainer = Trainer(config, Process(), RunFolder(folder, 0, True, "auto"))
    lines = caplog.text
    assert "changed since the checkpoint: train images 9 -> 10" in lines
    assert "val images 6 -> 6, other paths or labels: the best so far does not count" in lines
    assert trainer.progress.best_epoch == 0
