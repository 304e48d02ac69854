"""The entry points for ``paddle.hub``."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import paddle
import pytest

from cli.errors import WeightsError
from port_weights.zoo import PADDLE_FILES, ZOO
from storage.weights import write_weights

ROOT = str(Path(__file__).resolve().parent.parent)
SMALL = ["DATA.IMAGE_SIZE", 32, "MODEL.MIXER.EMBED_DIM", 8, "MODEL.MIXER.DEPTH", 1]


def load(name, **kwargs):
    return paddle.hub.load(ROOT, name, source="local", **kwargs)


def test_the_hub_lists_the_zoos_configs_and_says_where_each_file_was_published():
    assert paddle.hub.list(ROOT, source="local") == sorted({weights.config for weights in ZOO})
    text = paddle.hub.help(ROOT, "resmlp_24_224", source="local")
    assert "pretrained:" in text and PADDLE_FILES["resmlp_24_224"].links in text
    text = paddle.hub.help(ROOT, "resmlp_12_224", source="local")
    assert "resmlp_12_no_dist.pth" in text


def test_the_hub_loads_weights_with_or_without_their_suffix(tmp_path):
    source = load("resmlp_24_224", opts=SMALL)
    assert not source.training  # as those of torch.hub
    write_weights(source.state_dict(), tmp_path / "x.pdparams")
    for name in ("x", "x.pdparams"):
        model = load("resmlp_24_224", pretrained=str(tmp_path / name), opts=SMALL)
        for key, value in source.state_dict().items():
            np.testing.assert_array_equal(model.state_dict()[key].numpy(), value.numpy())


def test_a_file_as_ppvit_published_it_loads_whole(tmp_path):
    shapes = {name: value.shape for name, value in load("resmlp_24_224").state_dict().items()}
    state = {name: np.full(shape, n, "float32") for n, (name, shape) in enumerate(shapes.items())}
    names = {name: f"parameter_{n}" for n, name in enumerate(state)}  # Paddle 2 adds this table
    with (tmp_path / "resmlp_24_224.pdparams").open("wb") as file:
        pickle.dump({**state, "StructuredToParameterName@@": names}, file, protocol=2)
    model = load("resmlp_24_224", pretrained=str(tmp_path / "resmlp_24_224"))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name])


def test_the_hub_is_strict_about_the_head_unless_told(tmp_path):
    write_weights(load("resmlp_12_224", opts=SMALL).state_dict(), tmp_path / "x.pdparams")
    other = dict(pretrained=str(tmp_path / "x"), opts=[*SMALL, "MODEL.NUM_CLASSES", 7])
    with pytest.raises(WeightsError, match="1000 classes, the model has 7"):
        load("resmlp_12_224", **other)
    assert load("resmlp_12_224", new_head=True, **other).head.weight.shape[1] == 7
