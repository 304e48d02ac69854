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
words = dict(word.split("=", 1) for word in sys.argv if "=" in word)
assert ("--finetune" in words) == ("--opt adamw" in " ".join(sys.argv))
with open(words["--output_dir"] + "/log.txt", "a") as file:
    file.write(json.dumps(dict(test_loss=2.25, test_acc1=12.5)) + "\\n")
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the tool on 100 images, in ``out``; words are added to its command."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 50), ("val", 4)):
        for name in ("b", "a"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, [9, 9], "uint8"))
                image.save(tmp_path / split / name / f"{number}.png")
    (tmp_path / "deit").mkdir()
    (tmp_path / "deit" / "resmlp_models.py").touch()
    (tmp_path / "python").write_text(PYTHON.format(sys.executable))
    (tmp_path / "python").chmod(0o755)

    def run(*words):
        flags = {"deit": "deit", "deit_python": "python", "data_path": "", "output": "out"}
        given = [f"-{flag}={tmp_path / path}" for flag, path in flags.items()]
        monkeypatch.setattr(sys, "argv", ["compare_deit.py", *given, "-seeds=1", *words])
        compare_deit.main()
        return tmp_path / "out"

    return run


def test_both_sides_train_and_a_finished_run_is_only_read(command, monkeypatch):
    out = command("-epochs=1", "-outputs=12") / "scratch_12"
    lines = (out / "results.md").read_text().splitlines()
    assert lines[2].startswith("| DeiT | 0 | 2.250 | 12.5 | 0 |")
    result = json.loads((out / "ours" / "seed_0" / "result.json").read_text())
    (last,) = [record for record in metrics(out / "ours" / "seed_0") if "val_loss" in record]
    assert result["loss"] == [last["val_loss"]] and result["seconds"] > 0
    assert last["val_loss"] == pytest.approx(np.log(12), abs=0.1)  # twelve outputs
    assert (out / "lists" / "val_list.txt").read_text().splitlines()[4].endswith("val/b/0.png 1")
    assert (out / "results.png").is_file()
    monkeypatch.setattr(compare_deit, "run", None)
    command("-epochs=1", "-outputs=12")
    assert (out / "results.md").read_text().splitlines() == lines


def test_the_table_has_means_with_their_errors_and_the_verdict_on_the_loss():
    runs = [dict(loss=[9.0, loss], top1=[0.0, 60.0], seconds=7, mb=800) for loss in (1.0, 1.2)]
    text = compare_deit.table({"DeiT": runs, "ours": runs})
    assert "| DeiT | 1 | 1.200 | 60.0 | 7 | 800 |" in text
    assert "| **ours** | mean | 1.100 ± 0.100 | 60.0 ± 0.0 | | |" in text
    assert "| **ours** | against DeiT | +0.000, p = 1.00 | | | |" in text


@pytest.mark.parametrize("draws", [20_000, 2_000])
def test_the_permutation_test_is_scipys(draws):
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(1).normal(size=[2, 6])
    theirs = stats.permutation_test(
        (a, b + 1), lambda x, y: np.mean(x) - np.mean(y), n_resamples=np.inf
    )
    ours = compare_deit.permutation_test(list(a), list(b + 1), draws if draws > 5_000 else 900)
    assert ours == pytest.approx(theirs.pvalue, abs=0.0 if draws > 5_000 else 0.04)


@pytest.mark.parametrize(
    "words, message",
    [
        (["-deit=nowhere"], "no resmlp_models.py"),
        (["-study=finetune"], "-weights: finetune and distillation need it"),
        (["-study=finetune", "-weights=nowhere.pth"], "weights for Paddle: the run failed"),
        (["-deit_python=/bin/false"], "DeiT, seed 0: the run failed; .*stdout.txt"),
    ],
)
def test_what_is_missing_is_named(command, words, message):
    with pytest.raises(UserError, match=message):
        command("-epochs=1", *words)
