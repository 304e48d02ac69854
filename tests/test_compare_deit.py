"""The comparison with DeiT's main.py; tests/timm runs its PyTorch side."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError
from tools import compare_deit

from .helpers.runs import metrics

# In place of the Python of DeiT's environment: writes the log that main.py would.
PYTHON = """#!{}
import json, sys
(folder,) = [word[13:] for word in sys.argv if word.startswith("--output_dir=")]
with open(folder + "/log.txt", "a") as file:
    print(json.dumps(dict(test_loss=2.25, test_acc1=12.5)), file=file)
"""


def test_both_sides_train_a_finished_run_is_only_read_and_a_failed_one_named(tmp_path, monkeypatch):
    rng, out = np.random.default_rng(0), tmp_path / "out"
    for split, count in (("train", 50), ("val", 4)):
        for name in ("b", "a"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, [9, 9], "uint8")
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    (tmp_path / "python").write_text(PYTHON.format(sys.executable))
    (tmp_path / "python").chmod(0o755)
    words = f"tool -deit=deit -deit_python={tmp_path}/python -data_path={tmp_path} -output={out}"
    monkeypatch.setattr(sys, "argv", f"{words} -seeds=1 -epochs=1 -outputs=12".split())
    compare_deit.main()
    lines = (out / "results.md").read_text().splitlines()
    assert lines[2].startswith("| DeiT | 0 | 2.250 | 12.5 | 0 |")
    (last,) = [record for record in metrics(out / "ours" / "seed_0") if "val_loss" in record]
    result = json.loads((out / "ours" / "seed_0" / "result.json").read_text())
    assert result[0] == last["val_loss"] == pytest.approx(np.log(12), abs=0.1)  # twelve outputs
    assert (out / "val_list.txt").read_text().splitlines()[4].endswith("val/b/0.png 1")

    monkeypatch.setattr(sys, "argv", [*sys.argv, "-deit_python=/bin/false"])
    compare_deit.main()
    assert (out / "results.md").read_text().splitlines() == lines
    (out / "DeiT" / "seed_0" / "result.json").unlink()
    with pytest.raises(UserError, match="DeiT/seed_0: the run failed; .*stdout.txt says why"):
        compare_deit.main()


def test_means_are_compared_by_a_permutation_test_of_the_losses():
    pytest.importorskip("scipy")
    runs = {"DeiT": [[2.0, 10.0, 1, 2], [2.2, 12.0, 1, 2]], "ours": [[1.0, 20.0, 1, 2]] * 2}
    *_, deit, _, _, ours, _, last = compare_deit.table(runs).splitlines()
    assert deit == "| DeiT | mean | 2.100 ± 0.100 | 11.000 ± 1.000 | | |"
    assert ours == "| ours | mean | 1.000 ± 0.000 | 20.000 ± 0.000 | | |"
    assert last.endswith("losses: p = 0.333")  # two of the six ways to deal out 1, 1, 2, 2.2
