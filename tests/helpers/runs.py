"""Starting runs as a user does, and comparing what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from storage import checkpoints

from .tiny_data import CONFIG

ROOT = Path(__file__).resolve().parent.parent.parent
DRIVER = ROOT / "tests" / "faults" / "driver.py"
SPEED = {"images_per_second", "data_share", "memory_mb", "seconds"}  # differ from run to run

# Everything random at once, and what has state: EMA, LAMB, windows whose last one is smaller.
_RECIPE = (
    "TRAIN.OPTIMIZER.NAME lamb TRAIN.MODEL_EMA True TRAIN.MODEL_EMA_DECAY 0.9 TRAIN.ACCUM_ITER 2 "
    "DATA.DROP_LAST False TRAIN.RAND_AUGMENT True TRAIN.MIXUP_ALPHA 0.8 TRAIN.CUTMIX_ALPHA 1.0 "
    "TRAIN.HFLIP 0.5 TRAIN.RANDOM_ERASE_PROB 0.5 MODEL.DROPPATH 0.2 TRAIN.CROP_SCALE (0.3,1.0) "
    "SAVE_STEPS 2 SAVE_FREQ 1 REPORT_FREQ 3"
)
RECIPE = _RECIPE.split()
HALF = ["AMP", True, "AMP_DTYPE", "bfloat16"]  # on a CPU too, fast there or not


def command(data: Path, output: Path, *opts, main="main_single_gpu.py", nprocs: int = 0) -> list:
    config = output.parent / "tiny.yaml"
    config.write_text(CONFIG)
    flags = ["-cfg", config, "-data_path", data, "-output", output]
    flags += ["-nprocs", nprocs] if nprocs else []
    flags += ["-opts", *opts] if opts else []
    return [sys.executable, *map(str, [ROOT / main, *flags])]


def start(words: list, fault: str = "", **environment) -> subprocess.Popen:
    """Starts a command in a process group of its own; see driver.py for ``fault``."""
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "FAULT": fault, "COMMAND": " ".join(words), **environment},
    )


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    """Waits for a started command; exit code and output. Whatever is left of it is killed."""
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
        raise AssertionError(f"still running after {seconds} s:\n{output}") from None
    return process.returncode, output


PREPARED = ("RESMLP_", "OMP_", "MKL_", "MALLOC_", "PADDLE_")  # what cpu.setup goes by


def run_code(code: str, **environment: str) -> tuple[str, str]:
    """What code prints in a fresh process with these settings and no other, and its stderr."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(PREPARED)}
    options = dict(env={**clean, **environment}, cwd=ROOT, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def run(words: list, fault: str = "", seconds: float = 120, **environment) -> tuple[int, str]:
    return finish(start(words, fault, **environment), seconds)


def await_save(folder: Path, *processes: subprocess.Popen) -> None:
    """Returns when the run in ``folder`` has saved for the first time."""
    deadline = time.monotonic() + 90
    while not (folder / "run" / "last.pdparams").exists():
        assert all(process.poll() is None for process in processes), list(map(finish, processes))
        assert time.monotonic() < deadline
        time.sleep(0.1)


def error_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in output, output
    return lines[0]


def alive(marker: str) -> list[int]:
    """Processes of started commands, and their children, that name ``marker`` in a word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def metrics(folder: Path, kind: str = "") -> list[dict]:
    """The records of ``kind``, or all."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    records = [record for record in records if kind in ("", record["kind"])]
    return [{k: v for k, v in record.items() if k not in SPEED} for record in records]


def losses(folder: Path) -> np.ndarray:
    return np.array([record["loss"] for record in metrics(folder, "step")])


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def differences(one: Path, other: Path) -> list[str]:
    names = [{path.name for path in folder.glob("[!a]*.pdparams")} for folder in (one, other)]
    found = [f"checkpoints: {names}"] if names[0] != names[1] else []  # but abandoned_* ones
    for name in names[0] & names[1]:
        states = [checkpoints.load(folder / name) for folder in (one, other)]
        for state in states:
            del state["config"]  # names the folder
            del state["place"]["seconds"]
        a, b = (dict(_leaves(state, name)) for state in states)
        found += [path for path in {**a, **b} if a.get(path) != b.get(path)]
    if metrics(one) != metrics(other):
        found.append("metrics.jsonl")
    return found


def _leaves(tree, name: str):
    """``(path, value)`` of all in dictionaries in dictionaries: their keys, an array's bits."""
    if isinstance(tree, dict):
        yield name, tree.keys()
        for key, value in tree.items():
            yield from _leaves(value, f"{name}/{key}")
    else:
        yield name, (tree.dtype, tree.tobytes()) if isinstance(tree, np.ndarray) else tree
