"""The entry points for ``paddle.hub``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest

from cli.errors import WeightsError
from port_weights.zoo import ZOO
from storage.weights import write_weights

ROOT = str(Path(__file__).resolve().parent.parent)
SMALL = ["DATA.IMAGE_SIZE", 32, "MODEL.MIXER.EMBED_DIM", 8, "MODEL.MIXER.DEPTH", 1]


def load(name, **kwargs):
    return paddle.hub.load(ROOT, name, source="local", **kwargs)


def test_the_hub_lists_the_zoos_configs_and_nothing_else():
    assert paddle.hub.list(ROOT, source="local") == sorted({weights.config for weights in ZOO})
    assert "pretrained:" in paddle.hub.help(ROOT, "resmlp_24_224", source="local")


def test_the_hub_loads_weights_with_or_without_their_suffix(tmp_path):
    source = load("resmlp_24_224", opts=SMALL)
    write_weights(source.state_dict(), tmp_path / "x.pdparams")
    for name in ("x", "x.pdparams"):
        model = load("resmlp_24_224", pretrained=str(tmp_path / name), opts=SMALL)
        for key, value in source.state_dict().items():
            np.testing.assert_array_equal(model.state_dict()[key].numpy(), value.numpy())


def test_the_hub_is_strict_about_the_head_unless_told(tmp_path):
    write_weights(load("resmlp_12_224", opts=SMALL).state_dict(), tmp_path / "x.pdparams")
    other = dict(pretrained=str(tmp_path / "x"), opts=[*SMALL, "MODEL.NUM_CLASSES", 7])
    with pytest.raises(WeightsError, match="1000 classes, the model has 7"):
        load("resmlp_12_224", **other)
    assert load("resmlp_12_224", new_head=True, **other).head.weight.shape[1] == 7
