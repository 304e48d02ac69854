"""Runs that are killed for real, at any time, and resumed: as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from ..helpers.runs import DRIVER, HALF, RECIPE, alive, command, differences, finish, run, start
from ..helpers.tiny_data import make_data

RESUME = ["MODEL.RESUME", "auto"]


@pytest.fixture(scope="module", autouse=True)
def quick_starts():
    """Some hundred processes start here: without Numba they start sooner, to the same pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESMLP_NUMBA", "off")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), train=60, val=30)


def job(data, folder, *opts, nprocs=1):
    folder.mkdir(exist_ok=True)
    opts = [*RECIPE, "TRAIN.NUM_EPOCHS", 6, "DATA.BATCH_SIZE", 4 // nprocs, *opts]
    return command(data, folder / "run", *opts, main=DRIVER, nprocs=nprocs)


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def whole(request, data, tmp_path_factory):
    """The number of processes, and the folder of a run with them that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = run(job(data, folder, nprocs=request.param))
    assert code == 0, output
    return request.param, folder / "run"


def test_twenty_kills_at_random_times_leave_no_trace(tmp_path, data, whole):
    """Of the process group, as when a machine goes down; a run that ends early is compared."""
    nprocs, reference = whole
    times, kills, runs = random.Random(nprocs), 0, 0
    while kills < (20 if nprocs == 1 else 8):
        folder = tmp_path / str(runs)
        words = job(data, folder, "DATA.NUM_WORKERS", kills % 2 * 2, *RESUME, nprocs=nprocs)
        process = start(words)
        with suppress(subprocess.TimeoutExpired):
            process.wait(times.uniform(1.0, 4.5) if nprocs == 1 else times.uniform(2.5, 8.0))
        if process.poll() is None:
            kills += 1
        for pid in alive(str(folder)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code, output = finish(process)
        assert code in (0, -9), output
        if code == 0:
            assert differences(folder / "run", reference) == []
            runs += 1
    resume(data, tmp_path / str(runs), nprocs, reference)


def resume(data, folder, nprocs, reference):
    code, output = run(job(data, folder, *RESUME, nprocs=nprocs))
    assert code == 0, output
    assert differences(folder / "run", reference) == []


PLACES = [  # where, at which call of it: a first step, mid-epoch, evaluation, parts of a save
    "step:{}:1:kill",
    "step:{}:5:kill",
    "forward:{}:4:kill",  # between the batches of a step
    "evaluation:{}:2:kill",
    "save_begin:{}:2:kill",
    "save_half:{}:2:kill",
    "save_rename:{}:2:kill",  # the file is whole, under its temporary name
    "save_names:{}:1:kill",  # `best` is new, `epoch_NNN` and `last` are not
    "save_done:{}:3:kill",
    "snapshot:{}:4:kill",
]


def test_a_kill_at_each_critical_place_leaves_no_trace(tmp_path, data, whole):
    nprocs, reference = whole
    for place in PLACES if nprocs == 1 else PLACES[::2]:  # every second, to save time
        words = job(data, tmp_path, *RESUME, nprocs=nprocs)
        code, output = run(words, fault=place.format(0))
        assert code in (-9, 1), (place, output)
    resume(data, tmp_path, nprocs, reference)


def test_a_run_from_archives_that_is_killed_within_an_epoch_is_that_from_files(
    tmp_path, data, whole
):
    nprocs, reference = whole
    (tmp_path / "data").mkdir()
    shutil.make_archive(str(tmp_path / "data" / "train"), "tar", data / "train")
    shutil.make_archive(str(tmp_path / "data" / "val"), "zip", data / "val")
    opts = ["DATA.NUM_WORKERS", 2, *RESUME]
    for place in ("step:0:5:kill", "step:0:8:kill"):
        words = job(tmp_path / "data", tmp_path, *opts, nprocs=nprocs)
        code, output = run(words, fault=place)
        assert code in (-9, 1), (place, output)
    resume(tmp_path / "data", tmp_path, nprocs, reference)


def test_a_kill_within_an_epoch_leaves_no_trace_in_bfloat16(tmp_path, data):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = run(job(data, whole, *HALF, nprocs=2))
    assert code == 0, output
    code, output = run(job(data, killed, *HALF, nprocs=2), fault="step:1:5:kill")
    assert code == 1, output
    code, output = run(job(data, killed, *HALF, *RESUME, nprocs=2))
    assert code == 0, output
    assert differences(killed / "run", whole / "run") == []


@pytest.mark.parametrize("when", ["step:0:3:term", "evaluation:0:1:term", "snapshot:0:2:term"])
def test_a_preempted_run_saves_within_the_grace_period(tmp_path, data, whole, when):
    nprocs, reference = whole
    words = job(data, tmp_path, "SAVE_STEPS", 0, nprocs=nprocs)
    start_time = time.monotonic()
    code, output = run(words, fault=when)
    assert code == 75, output
    assert "-resume auto goes on from there" in output.splitlines()[-1]
    assert time.monotonic() - start_time < 60
    resume(data, tmp_path, nprocs, reference)
