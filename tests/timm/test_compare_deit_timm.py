"""The PyTorch side of tools/compare_deit.py, with a stand-in for DeiT's code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")

MODEL = """
import torch
class resmlp_models(torch.nn.Module):
    def __init__(self, num_classes, **_):
        super().__init__()
        self.head = torch.nn.Linear(2, num_classes)
    def forward(self, x):
        return self.head(x)
"""
MAIN = """
import argparse, json, torch
from timm.models import create_model
def get_args_parser():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--distillation-type", default="none")
    parser.add_argument("--finetune", default="")
    return parser
def build_dataset(is_train, args):
    return "images", 1000
def main(args):
    model = create_model("resmlp_tiny", num_classes=build_dataset(is_train=True, args=args)[1])
    torch.save({"model": model.state_dict(), "args": args}, "checkpoint.pth")
    keys = sorted(torch.load("checkpoint.pth", map_location="cpu")["model"])
    x = torch.zeros(3, 2)
    print(json.dumps([type(model(x)).__name__, list(model.eval()(x).shape), keys]))
"""
KEYS = ["head.bias", "head.weight"]


@pytest.mark.parametrize(
    "words, output, keys",
    [
        ([], "Tensor", KEYS),
        (["--distillation-type=hard"], "tuple", KEYS),
        (["--finetune=x"], "Tensor", [*KEYS, "pos_embed"]),
    ],
)
def test_deits_main_runs_with_as_many_outputs_as_asked_for(tmp_path, words, output, keys):
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "resmlp_models.py").write_text(MODEL)
    script = Path(__file__).parent.parent.parent / "tools" / "deit_main.py"
    command = [sys.executable, script, tmp_path, "7", *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [output, [3, 7], keys]
