"""Disks that are full or read-only: the run says so, keeps the old checkpoint, stops or goes on."""

import os
import subprocess
import sys

import pytest

from storage import checkpoints

from ..helpers.runs import DRIVER, command, error_line, metrics, run
from ..helpers.tiny_data import make_data

# Small models make small checkpoints: about 100 KB with LAMB's moments.
OPTS = ["TRAIN.OPTIMIZER.NAME", "lamb", "SAVE_STEPS", 1, "TRAIN.NUM_EPOCHS", 3, "SAVE_FREQ", 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def mount(target, *arguments):
    target.mkdir()
    result = subprocess.run(["mount", *arguments, str(target)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"mounting needs root and its capabilities: {result.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    mount(folder, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, leave):
    stat = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - leave)))


def job(data, output, *opts):
    return command(data, output, *OPTS, *opts, main=DRIVER)


@pytest.mark.parametrize("leave", [0, 20_000, 150_000])
def test_a_full_disk_stops_the_run_and_keeps_the_old_checkpoint(small_disk, data, leave):
    output = small_disk / "run"
    assert run(job(data, output, "TRAIN.NUM_EPOCHS", 1))[0] == 0
    before = checkpoints.load(output / "last.pdparams")
    fill(small_disk, leave)
    words = job(data, output, "MODEL.RESUME", "auto")
    code, text = run(words)
    assert code == 2, text
    assert "cannot be written: No space left on device" in error_line(text)
    after = checkpoints.load_newest(output)[0]
    assert after["place"]["step"] >= before["place"]["step"]
    assert not list(output.glob(".*.tmp"))

    (small_disk / "filler").unlink()  # the user makes room and goes on
    code, text = run(words)
    assert code == 0, text
    steps = [record["step"] for record in metrics(output) if record["kind"] == "step"]
    assert steps == list(range(1, 10))


def test_a_read_only_folder_is_said_at_the_start(tmp_path, data):
    folder = tmp_path / "disk"
    mount(folder, "-t", "tmpfs", "-o", "ro", "tmpfs")
    try:
        (tmp_path / "x").mkdir()
        words = job(data, tmp_path / "x" / "run")
        words[words.index("-output") + 1] = str(folder / "run")
        code, text = run(words)
        assert code == 2 and "cannot be written: Read-only file system" in error_line(text)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_turns_read_only_stops_the_run(small_disk, data):
    output = small_disk / "run"
    assert run(job(data, output, "TRAIN.NUM_EPOCHS", 1))[0] == 0
    code = f"""
import os, subprocess, sys
sys.argv = {job(data, output, "MODEL.RESUME", "auto")[1:]!r}
import tests.faults.driver as driver
def read_only(*args):
    subprocess.run(["mount", "-o", "remount,ro", {str(small_disk)!r}], check=True)
driver.checkpoints.to_numpy, original = (
    lambda state: (read_only(), original(state))[1]), driver.checkpoints.to_numpy
driver.run_as_script(driver.main_multi_gpu.main)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    text = result.stdout + result.stderr
    if "busy" in text:
        pytest.skip("the kernel does not remount a file system with open files")
    assert result.returncode == 2 and "Read-only file system" in error_line(text)
    assert checkpoints.load(output / "last.pdparams")["place"]["step"] == 3
