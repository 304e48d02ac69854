"""main_multi_gpu.py with a fault built in, chosen by the environment:

    FAULT=where:rank:count:what

where: step, forward, evaluation, save_begin, save_half, save_rename, save_done, snapshot, load
rank:  which rank it hits
count: at which call of the place (from 1)
what:  kill (SIGKILL), raise, nan, term (SIGTERM to itself), sleep40, hang

The product has no hooks for faults; this replaces functions of its modules from outside. Spawned
ranks import this file again, so the fault is in them too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import runtime  # noqa: F401  isort: skip

import signal
import time

import checkpoint
import datasets
import engine
import main_multi_gpu
from errors import run_as_script

_where, _rank, _count, _what = (os.environ.get("FAULT") or "none:0:1:none").split(":")
_calls = 0


def fault(value=None):
    """Does what is asked for when it is this rank's turn; returns a value that may be spoilt."""
    global _calls
    if os.environ.get("PADDLE_TRAINER_ID", "0") != _rank:
        return value
    _calls += 1
    if _calls != int(_count):
        return value
    if _what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif _what == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif _what == "raise":
        raise ValueError("a fault of the test")
    elif _what == "nan":
        return value * float("nan")
    elif _what == "sleep40":
        time.sleep(40)
    elif _what == "hang":
        time.sleep(3600)
    return value


def before(module, name):
    original = getattr(module, name)

    def patched(*args, **kwargs):
        fault()
        return original(*args, **kwargs)

    setattr(module, name, patched)


def after(module, name):
    original = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: fault(original(*args, **kwargs)))


class _HalfPickle:
    """`pickle` as checkpoint.py uses it, hit between the two halves of a file."""

    @staticmethod
    def dump(state, file, protocol):
        import pickle

        data = pickle.dumps(state, protocol=protocol)
        file.write(data[: len(data) // 2])
        file.flush()
        fault()
        file.write(data[len(data) // 2 :])


if _where == "step":
    before(engine.Trainer, "_train_step")
elif _where == "forward":
    after(engine.Trainer, "_loss")
elif _where == "evaluation":
    before(engine.Trainer, "_evaluate")
elif _where == "snapshot":
    before(engine.Trainer, "_state")
elif _where == "save_begin":
    before(checkpoint, "save")
elif _where == "save_half":
    checkpoint.pickle = _HalfPickle
elif _where == "save_rename":
    before(checkpoint, "_replace")
elif _where == "save_done":
    after(checkpoint, "save")
elif _where == "load":
    before(datasets, "open_image")


if __name__ == "__main__":
    run_as_script(main_multi_gpu.main)
