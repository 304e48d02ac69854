"""main_multi_gpu.py with faults built in, chosen by the environment, separated by spaces:

    FAULT="where:rank:count:what ..."

where: step, forward, evaluation, save_begin, save_half, save_names, save_rename, save_done,
       snapshot, load, goodbye (when a run is over)
rank:  which rank it hits
count: at which call of the place (from 1)
what:  kill (SIGKILL), raise, nan, term (SIGTERM to itself), sleepN (seconds), full (the disk)

The product has no hooks for faults; this replaces functions of its modules from outside. Spawned
ranks import this file again, so the fault is in them too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cpu import setup  # noqa: F401  isort: skip

import errno
import signal
import time
from collections import Counter

import datasets
import engine
import launch
import main_multi_gpu
from cli.errors import run_as_script
from parallel import rendezvous
from storage import checkpoints
from training import learner

_calls = Counter()


def faults_at(where: str) -> list[list[str]]:
    faults = [fault.split(":") for fault in os.environ.get("FAULT", "").split()]
    return [fault for fault in faults if fault[0] == where]


def fault(where: str, value=None):
    """Does what is asked for when it is this rank's turn; returns a value that may be spoilt."""
    _calls[where] += 1
    here = os.environ.get("PADDLE_TRAINER_ID", "0"), str(_calls[where])
    for _, rank, count, what in faults_at(where):
        if (rank, count) != here:
            continue
        if what in ("kill", "term"):
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
        elif what == "raise":
            raise ValueError("a fault of the test")
        elif what == "nan":
            value = value * float("nan")
        elif what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            time.sleep(int(what.removeprefix("sleep")))
    return value


def hit(where, module, name, after=False):
    """Puts the fault of a place before a function, or after it."""
    original = getattr(module, name)

    def patched(*args, **kwargs):
        if not after:
            fault(where)
        value = original(*args, **kwargs)
        return fault(where, value) if after else value

    if faults_at(where):
        setattr(module, name, patched)


class _HalfPickle:
    """`pickle` as storage/checkpoints.py uses it, hit between the two halves of a file."""

    @staticmethod
    def dump(state, file, protocol):
        import pickle

        data = pickle.dumps(state, protocol=protocol)
        file.write(data[: len(data) // 2])
        file.flush()
        fault("save_half")
        file.write(data[len(data) // 2 :])


rendezvous.SILENCE = 10.0
hit("step", engine.Trainer, "_train_step")
hit("forward", learner.Learner, "forward", after=True)
hit("evaluation", engine.Trainer, "evaluate")
hit("snapshot", learner.Learner, "state")
hit("save_begin", checkpoints, "save")
if faults_at("save_half"):
    checkpoints.pickle = _HalfPickle
hit("save_names", checkpoints, "duplicate", after=True)
hit("save_rename", checkpoints, "_replace")
hit("save_done", checkpoints, "save", after=True)
hit("load", datasets, "read_pixels")
hit("goodbye", launch, "_run", after=True)


if __name__ == "__main__":
    run_as_script(main_multi_gpu.main)
