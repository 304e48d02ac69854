"""Worker processes: how they end, and what a fault in one of them becomes."""

import gc
import glob
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from multiprocessing.process import BaseProcess

import numpy as np
import pytest

from cli.errors import DataError
from loading import loader
from loading.loader import Loader, Sample, shared_memory_fits
from loading.samplers import EvalBatchSampler

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(loader.__file__)))


class Numbers:
    """Every image shows its index; at index 11 something happens first."""

    def __init__(self, act=None):
        self.act = act

    def __getitem__(self, key):
        if key[2] == 11 and self.act:
            self.act()
        return Sample(np.full((2, 2, 3), key[2], np.uint8), key[2] % 5, key[2])


def numbers_loader(act=None, timeout=60.0, **kwargs):
    """24 batches of one: more than two workers prepare ahead."""
    return Loader(Numbers(act), EvalBatchSampler(24, 1), 2, timeout, **kwargs)


def run(batches):
    return [(b.images.numpy()[0, 0, 0, 0], b.labels.numpy()[0], b.indices) for b in batches]


EXPECTED = [(i, i % 5, [i]) for i in range(24)]


@pytest.fixture
def watched_workers(monkeypatch):
    """Sees to it that there were workers, and that they left nothing behind."""
    pids, start = [], BaseProcess.start

    def remember(process):
        start(process)
        pids.append(process.pid)

    monkeypatch.setattr(BaseProcess, "start", remember)
    yield pids
    assert pids
    assert not multiprocessing.active_children()
    assert not [path for pid in pids for path in glob.glob(f"/dev/shm/paddle_{pid}_*")]


@pytest.mark.parametrize("shared_memory", [True, False])
def test_batches_come_in_the_samplers_order(watched_workers, shared_memory):
    assert run(numbers_loader(shared_memory=shared_memory)) == EXPECTED


def test_the_start_method_that_somebody_has_chosen_makes_no_difference(watched_workers):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert run(numbers_loader(lambda: None)) == EXPECTED  # a lambda cannot be pickled
        assert multiprocessing.get_start_method() == "spawn"
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize(
    "act,described",
    [
        (lambda: os._exit(3), "exit code 3"),
        (lambda: os._exit(0), "exit code 0"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL, out of memory"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "SIGBUS, /dev/shm full"),
    ],
)
def test_a_worker_that_dies_is_one_error_that_says_how(watched_workers, act, described):
    with pytest.raises(DataError, match=f"worker died .{described}"):
        run(numbers_loader(act))


def test_a_death_that_paddle_overlooks_is_told_after_the_time_limit(watched_workers, monkeypatch):
    monkeypatch.setattr(BaseProcess, "is_alive", lambda process: True)
    with pytest.raises(DataError, match="worker died .exit code 3"):
        run(numbers_loader(lambda: os._exit(3), timeout=2.5))


def test_a_worker_that_hangs_is_an_error_after_the_time_limit(watched_workers):
    forever = threading.Event().wait
    with pytest.raises(DataError, match=r"no batch for 1.5 s \(DATA.WORKER_TIMEOUT\)"):
        run(numbers_loader(forever, timeout=1.5))


class Late(threading.Timer):
    """Gives up at the very moment when the batch has come."""

    def __init__(self, interval, function):
        super().__init__(0, lambda: (self.finished.wait(), function()))


def test_a_time_limit_that_ends_as_the_batch_comes_is_told_at_once(watched_workers, monkeypatch):
    monkeypatch.setattr(threading, "Timer", Late)
    with pytest.raises(DataError, match="no batch for 60 s"):
        run(numbers_loader())


@pytest.mark.parametrize("count", [0, 1])
def test_workers_that_the_system_refuses_are_one_error(monkeypatch, count):
    forks = [os.fork] * count

    def limited():
        if not forks:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return forks.pop()()

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(DataError, match=f"of 2 .* {count} could be started: .*unavailable; .*NUM_"):
        run(numbers_loader())
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_thread_that_the_system_refuses_is_one_error(watched_workers, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(DataError, match="can't start new thread"):
        run(numbers_loader())


def test_a_worker_leaves_to_the_main_process_what_that_has_to_collect(tmp_path):
    """Of Paddle's readers, whose threads a worker does not have, it would die."""

    class Reader:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        Reader()
        run(numbers_loader(gc.collect))
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_a_pass_that_is_left_early_ends_its_workers(watched_workers):
    batches = iter(numbers_loader())
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_a_workers_death_raises_nowhere_but_in_the_loader(watched_workers, monkeypatch):
    """Paddle's handler would raise SystemError in the line where the main thread happens to be."""
    monkeypatch.setattr("paddle.io.multiprocess_utils._SIGCHLD_handler_set", False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    numbers = numbers_loader()
    batches = iter(numbers)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()  # the main thread goes on meanwhile
    with pytest.raises(DataError, match="worker died"):
        run(batches)
    assert run(numbers) == EXPECTED  # it can be used again


def test_workers_stand_outside_the_main_process_group(watched_workers):
    class Groups(Numbers):
        def __getitem__(self, key):
            return Sample(np.array([os.getpgid(0) == os.getpid()], np.uint8), 0, 0)

    batches = Loader(Groups(), EvalBatchSampler(8, 2), 2)
    assert [batch.images.numpy().tolist() for batch in batches] == [[[1], [1]]] * 4


def test_workers_end_with_a_main_process_that_is_killed():
    script = f"""
import sys
sys.path[:0] = [{ROOT!r}, {os.path.join(ROOT, "tests")!r}]
from test_loader import numbers_loader

for batch in numbers_loader():
    print("ready", flush=True)
    sys.stdin.read()
"""
    words = [sys.executable, "-c", script]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    assert process.communicate(timeout=20)[0] == b""  # its end: all who held it are gone


def test_shared_memory_must_hold_all_batches_under_way_of_all_ranks_here(monkeypatch):
    usage, lines = namedtuple("usage", "free"), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(7000))
    monkeypatch.delenv("PADDLE_LOCAL_SIZE", raising=False)
    assert shared_memory_fits(2, 1000, 1, lines.append)  # 2 workers x 2 batches, and 3
    assert not lines
    assert not shared_memory_fits(2, 1001, 1, lines.append)
    assert not shared_memory_fits(2, 1000, 2, lines.append)
    assert len(lines) == 2 and "--shm-size" in lines[0]
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "1")  # two ranks, on two machines
    assert shared_memory_fits(2, 1000, 2, lines.append)
    assert shared_memory_fits(0, 10**9, 2, lines.append)  # no workers, no shared memory
    monkeypatch.setattr("paddle.get_device", lambda: "gpu:0")
    assert shared_memory_fits(2, 1000, 1, lines.append)
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "2")  # NCCL of ranks on one machine takes its part
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2 * 2**27 + 13_999))
    assert not shared_memory_fits(2, 1000, 2, lines.append)
