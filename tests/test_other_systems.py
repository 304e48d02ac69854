"""macOS and Windows, as far as Linux can play them: what Python or Paddle lack there is taken away.

Only Linux is tested as such; see "Systems" in the README.
"""

import subprocess
import sys

import pytest

from .helpers.runs import ROOT, command
from .helpers.tiny_data import make_data

_START = """
import os, signal, sys
from cpu import setup
import datasets
import paddle
import paddle.io.reader as reader
class Sys:  # as the loader sees it: Paddle starts no workers there
    def __getattr__(self, name):
        return "{platform}" if name == "platform" else getattr(sys, name)
reader.sys = datasets.sys = Sys()
"""
_WINDOWS = """
for name in ("resource", "fcntl"):
    sys.modules[name] = None
for name in ("fork", "setpgid", "getpgid", "killpg", "sched_getaffinity", "pidfd_open"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "siginterrupt",
             "alarm", "pthread_sigmask"):
    delattr(signal, name)
"""
_MAIN = """
sys.argv = sys.argv[1:]
from cli.errors import run_as_script
from main_single_gpu import main
run_as_script(main)
"""
SYSTEMS = {
    "macOS": _START.format(platform="darwin") + _MAIN,
    "Windows": _START.format(platform="win32") + _WINDOWS + _MAIN,
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_process_trains_and_evaluates_with_the_pictures_loaded_in_it(system, tmp_path):
    words = command(make_data(tmp_path / "data"), tmp_path / "run", "DATA.NUM_WORKERS", 2)
    words = [sys.executable, "-c", SYSTEMS[system], *words[1:]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 2: loss" in done.stdout
    assert "no loader workers on this system: images are loaded in turn" in done.stdout
    assert "multi-process mode" not in done.stderr  # Paddle's way to say it, at each pass
    assert (tmp_path / "run" / "last.pdparams").is_file()
