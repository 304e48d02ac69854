"""The counts of layers, parameters and multiply-adds, and the README's table of the zoo."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from config import get_config
from port_weights.zoo import ZOO
from resmlp import ResMLP
from tools import model_info

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "config, parameters, macs, ppvit",
    [  # parameters and multiply-adds as timm counts them; then what PPViT's README prints
        ("resmlp_12_224", 15_350_872, 3.01, 3.0),
        ("resmlp_24_224", 30_020_680, 5.96, 6.0),
        ("resmlp_36_224", 44_690_488, 8.91, 9.0),
        ("resmlp_big_24_224", 129_138_280, 100.23, 100.7),
    ],
)
def test_the_counts_are_the_published_ones(config, parameters, macs, ppvit):
    info = model_info.config_info(get_config(str(ROOT / "configs" / f"{config}.yaml")))
    assert info.parameters == parameters
    assert round(info.macs / 1e9, 2) == macs
    assert round(info.ppvit_macs / 1e9, 1) == ppvit


def test_every_multiply_add_of_a_forward_pass_is_counted_once():
    model = ResMLP(image_size=8, patch_size=4, embed_dim=6, depth=2, num_classes=5)
    info = model_info.model_info(model)
    tokens, dim, hidden = 4, 6, 24
    block = tokens * tokens * dim + 2 * tokens * dim * hidden
    assert info.macs == tokens * 3 * 4 * 4 * dim + 2 * block + dim * 5
    apart = {part.name: part.macs for part in info.parts if not part.counted}
    assert apart == {
        "Affine": (2 * 2 + 1) * tokens * dim,
        "LayerScale": 2 * 2 * tokens * dim,
        "pooling": tokens * dim,
    }
    assert info.gelus == 2 * tokens * hidden
    assert info.parameters == sum(int(np.prod(p.shape)) for p in model.parameters())
    assert {part.name: part.layers for part in info.parts}["Affine"] == 5
    model = ResMLP(image_size=8, patch_size=4, embed_dim=6, depth=1, num_classes=0)
    names = [part.name for part in model_info.model_info(model).parts]
    assert "head" not in names and "token mixing" in names


def test_the_tool_prints_a_table_a_config(capsys):
    path = str(ROOT / "configs" / "resmlp_12_224.yaml")
    model_info.main(["-cfg", path, path, "-opts", "DATA.IMAGE_SIZE", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("resmlp_12_224: 32 x 32 pixels, 4 tokens" in line for line in lines) == 2
    (mixing, _) = [line.split() for line in lines if "token mixing" in line]
    assert mixing[2:6] == ["12", "4", "x", "4"]
    assert mixing[6:] == [f"{12 * (16 + 4):,}", f"{12 * 16 * 384:,}"]


def test_the_zoos_table_has_a_row_for_every_weight_and_is_the_readmes():
    table = model_info.zoo_table()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- zoo -->\n+(.*?)\n+<!-- /?zoo -->", text, re.DOTALL)
    assert shown == table, "python tools/model_info.py -zoo prints the new one"
    header, _, *rows = table.splitlines()
    assert len(rows) == len(ZOO)
    for row, weights in zip(rows, ZOO):
        assert row.count("|") == header.count("|")
        assert f"[{weights.name}]" in row and weights.url in row
        assert not weights.paddle or weights.paddle.links in row
    assert "| 79.38 | 94.55 | 85.28 | 67.70 |" in rows[1]  # PPViT's, not timm's
    assert "| 62.6 (k-NN) |  |  |  | 15.35" in rows[9]  # DINO's has no head
