"""Checkpoints: whole or not there, checked, rotated."""

import errno
import os
import threading
from unittest import mock

import numpy as np
import paddle
import pytest

from cli.errors import CheckpointError
from config import get_config
from parallel.process import Process
from storage import checkpoints
from storage.run_folder import RunFolder
from training.progress import Progress
from training.saving import Saver

full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))


def make_state(step=1, size=1000):
    rng = np.random.default_rng(step)
    return {
        "model": {"weight": rng.random((size, 3)), "scalar": np.float32(2).reshape([])},
        "optimizer": {"weight": {"moment": np.zeros([0, 3], "float32")}},
        "scaler": {},
        "place": {"step": step, "epoch_loss": 0.1 + 0.2, "best_top1": -1.0},
        "names": ["ä", None, True],
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b


def test_what_is_saved_comes_back_bit_by_bit_and_paddle_opens_it_too(tmp_path):
    state, path = make_state(), tmp_path / "last.pdparams"
    state["model"]["nan"] = np.array([np.nan, np.inf, -0.0], "float32")
    checkpoints.save(state, path)
    assert same(checkpoints.load(path), state)
    assert same(checkpoints.load(path.with_suffix("")), state)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pdparams"]
    loaded = paddle.load(str(path))
    assert np.array_equal(np.asarray(loaded["model"]["weight"]), state["model"]["weight"])


def test_a_copy_of_the_state_does_not_follow_the_training():
    weight = paddle.ones([3])
    copy = checkpoints.to_numpy({"list": [weight], "number": 1})
    weight.add_(paddle.ones([3]))
    assert copy["list"][0].tolist() == [1.0, 1.0, 1.0] and copy["number"] == 1


@pytest.mark.parametrize("where", np.linspace(0, 0.999, 23))
def test_one_flipped_bit_anywhere_and_a_cut_are_found(tmp_path, where):
    path = tmp_path / "last.pdparams"
    checkpoints.save(make_state(size=50), path)
    content = bytearray(path.read_bytes())
    place = int(where * len(content))
    flipped = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
    for damaged in (flipped, content[:place]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="last.pdparams"):
            state = checkpoints.load(path)
            assert not same(state, make_state(size=50)), "the flip changed nothing"


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "nowhere: no such checkpoint"),
        ("a" * 300, "aaa: cannot be read: File name too long"),
        ("", "a folder; .* -output .* -resume auto"),
        ("weights", "-pretrained instead of -resume"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, name, message):
    paddle.save({"w": paddle.ones([2])}, str(tmp_path / "weights.pdparams"))
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(tmp_path / name)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_keeps_the_earlier_file_and_leaves_nothing(tmp_path, monkeypatch, call):
    path = tmp_path / "last.pdparams"
    checkpoints.save(make_state(1), path)
    monkeypatch.setattr(checkpoints.os, call, full)
    with pytest.raises(CheckpointError, match="No space left .* earlier checkpoints are untouched"):
        checkpoints.save(make_state(2), path)
    monkeypatch.undo()
    assert same(checkpoints.load(path), make_state(1))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pdparams"]


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace

    def log_fsync(descriptor):
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: order.append("rename") or replace(*paths))
    checkpoints.save(make_state(), tmp_path / "last.pdparams")
    assert order == ["file", "rename", "folder"]


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_outlives_the_next_save(tmp_path, monkeypatch, links):
    last = tmp_path / "last.pdparams"
    checkpoints.save(make_state(1), last)
    if not links:
        monkeypatch.setattr(checkpoints.os, "link", full)
    checkpoints.duplicate(last, "best.pdparams")
    checkpoints.save(make_state(2), last)
    assert same(checkpoints.load(tmp_path / "best.pdparams"), make_state(1))
    assert same(checkpoints.load(last), make_state(2))


def fill(folder, **steps):
    for name, step in steps.items():
        checkpoints.save(make_state(step), folder / f"{name}.pdparams")


def damage(*paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[:-200])


def test_the_newest_whole_one_is_found(tmp_path, caplog):
    assert checkpoints.load_newest(tmp_path) is None
    assert checkpoints.load_newest(tmp_path / "missing") is None
    fill(tmp_path, epoch_001=10, epoch_002=20, best=15, last=25)
    assert checkpoints.load_newest(tmp_path)[1].name == "last.pdparams"
    damage(tmp_path / "last.pdparams")
    assert checkpoints.load_newest(tmp_path)[1].name == "epoch_002.pdparams"
    damage(tmp_path / "epoch_002.pdparams")
    state, path = checkpoints.load_newest(tmp_path)
    assert (state["place"]["step"], path.name) == (15, "best.pdparams")
    damage(tmp_path / "epoch_001.pdparams", tmp_path / "best.pdparams")
    with pytest.raises(CheckpointError, match="none of its 4 checkpoints is whole"):
        checkpoints.load_newest(tmp_path)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    closed = mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(checkpoints.os, "listdir", closed)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot be read: Permission denied"):
        checkpoints.load_newest(tmp_path)


def test_rotation_keeps_the_newest_and_every_so_many(tmp_path):
    fill(tmp_path, best=1, last=1, **{f"epoch_{n:03d}": n for n in (1, 2, 3, 4, 5, 6, 999, 1000)})
    checkpoints.rotate(tmp_path, keep=2, keep_every=3)
    kept = {path.stem for path in tmp_path.iterdir()}
    assert kept == {"best", "last", "epoch_003", "epoch_006", "epoch_999", "epoch_1000"}
    checkpoints.rotate(tmp_path, keep=1, keep_every=0)
    assert {path.stem for path in tmp_path.iterdir()} == {"best", "last", "epoch_1000"}


def test_a_save_goes_on_behind_training_and_passes_on_what_fails(tmp_path, monkeypatch):
    saver = Saver(get_config(), Process(), RunFolder(tmp_path, 0, True))
    gate, written, learner = threading.Event(), [], mock.Mock(state=dict)
    monkeypatch.setattr(checkpoints, "save", lambda *_: written.append(gate.wait()))
    saver.save(learner, Progress())
    saver.finish(block=False)
    assert written == []
    gate.set()
    saver.finish()
    assert written == [True]
    monkeypatch.setattr(checkpoints, "save", mock.Mock(side_effect=CheckpointError("full")))
    saver.save(learner, Progress())
    with pytest.raises(CheckpointError, match="full"):
        saver.finish()
    saver.finish()  # said once


def test_the_changes_between_configs_are_listed_by_key():
    old = "A: 1\nB:\n  C: [1, 2]\n  D: x\n  E: null\n"
    new = "A: 1\nB:\n  C: [1, 3]\n  E: 0\nF: true\n"
    changes = ["B.C [1, 2] -> [1, 3]", "B.E None -> 0", "F (none) -> True"]
    assert sorted(checkpoints.config_changes(old, new)) == changes
    assert checkpoints.config_changes(new, new) == []
