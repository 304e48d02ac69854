"""The memory of a long run is flat."""

import json
import subprocess
import sys

import pytest

from ..helpers.runs import HALF, RECIPE, ROOT
from ..helpers.tiny_data import make_data

STEPS = 100  # an epoch

_RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from cpu import setup
from engine import run
from tests.helpers.tiny_data import make_config

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4  # KB

sizes = []
config = make_config(Path({folder!r}), Path({data!r}), *{opts!r})
run(config, on_step=lambda step: sizes.append(resident()) if step % 10 == 0 else None)
print(json.dumps(sizes))
"""


@pytest.mark.parametrize("epochs, amp", [(20, []), (4, HALF)])
def test_memory_grows_by_less_than_2_percent_after_the_first_epoch(tmp_path, epochs, amp):
    data = make_data(tmp_path / "data", train=200, val=30)
    opts = [*RECIPE, "TRAIN.ACCUM_ITER", 1, "SAVE_STEPS", 50, "REPORT_FREQ", 20]
    opts += ["DATA.BATCH_SIZE", 2, "DATA.NUM_WORKERS", 1, "TRAIN.NUM_EPOCHS", epochs, *amp]
    code = _RUN.format(root=str(ROOT), folder=str(tmp_path), data=str(data), opts=opts)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sizes = json.loads(result.stdout.splitlines()[-1])
    assert len(sizes) == epochs * STEPS // 10
    first = sizes[STEPS // 10]  # in the second epoch's first steps
    print(f"resident: {first / 1024:.1f} MB, later {max(sizes) / 1024:.1f} MB at most")
    assert max(sizes) < 1.02 * first
