"""The PyTorch side of tools/compare_deit.py, with a stand-in for DeiT's code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

SCRIPT = Path(__file__).parent.parent.parent / "tools" / "deit_main.py"
MODEL = """
import torch
class resmlp_models(torch.nn.Module):
    def __init__(self, img_size, patch_size, embed_dim, depth, init_scale, num_classes, **_):
        super().__init__()
        self.head = torch.nn.Linear(2, num_classes)
    def forward(self, x):
        return self.head(x)
"""
MAIN = """
import argparse, json, torch
from timm.models import create_model
from timm.utils import get_state_dict
def get_args_parser():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--input-size", type=int)
    parser.add_argument("--distillation-type", default="none")
    parser.add_argument("--finetune", default="")
    return parser
def build_dataset(is_train, args):
    return "images", 1000
def main(args):
    images, outputs = build_dataset(is_train=True, args=args)
    model = create_model("resmlp_tiny", num_classes=outputs, drop_path_rate=0.1, img_size=28)
    torch.save({"model": model.state_dict(), "args": args}, "checkpoint.pth")
    keys = sorted(torch.load("checkpoint.pth", map_location="cpu")["model"])
    x = torch.zeros(3, 2)
    trained, evaluated = model(x), model.eval()(x)
    print(json.dumps([images, type(trained).__name__, list(evaluated.shape), keys,
                      list(model.pos_embed.shape), get_state_dict(None) or 0]))
"""


@pytest.mark.parametrize(
    "words, output, keys",
    [
        ([], "Tensor", ["head.bias", "head.weight"]),
        (["--distillation-type=hard"], "tuple", ["head.bias", "head.weight"]),
        (["--finetune=x"], "Tensor", ["head.bias", "head.weight", "pos_embed"]),
    ],
)
def test_deits_main_runs_with_as_many_outputs_as_asked_for(tmp_path, words, output, keys):
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "resmlp_models.py").write_text(MODEL)
    command = [sys.executable, SCRIPT, tmp_path, "7", "--input-size=28", *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == ["images", output, [3, 7], keys, [1, 4, 1], 0]
