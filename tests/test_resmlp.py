from pathlib import Path

import numpy as np
import paddle
import pytest

from cli.errors import ConfigError
from port_weights.names import convert
from resmlp import DropPath, ResMLP, default_layer_scale, load_state

GOLDEN = Path(__file__).parent / "golden" / "resmlp_timm.npz"  # made by make_golden.py
CONFIGS = Path(__file__).parent.parent / "configs"


def tiny(**changes):
    settings = dict(image_size=24, patch_size=8, num_classes=7, embed_dim=12, depth=3)
    return ResMLP(**{**settings, **changes})


def test_logits_and_mean_tokens_are_timms_for_the_same_weights():
    data, model = np.load(GOLDEN), tiny()
    timm = {name[5:]: data[name] for name in data.files if name.startswith("timm/")}
    load_state(model, convert(timm, "timm", "paddle")[0])
    model.eval()
    for run, expected in ((model, data["logits"]), (model.forward_features, data["features"])):
        found = run(paddle.to_tensor(data["images"])).numpy()
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_zero_classes_returns_features():
    model = tiny(num_classes=0)
    assert model(paddle.randn([2, 3, 24, 24])).shape == [2, 12]
    assert "head.weight" not in model.state_dict()


def test_state_dict_names_and_shapes_are_ppvits():
    shapes = {name: list(value.shape) for name, value in tiny(depth=1).state_dict().items()}
    assert shapes == {
        "patch_embed.patch_embed.weight": [12, 3, 8, 8],
        "patch_embed.patch_embed.bias": [12],
        "mixer_layers.0.ls1": [12],
        "mixer_layers.0.ls2": [12],
        "mixer_layers.0.norm1.alpha": [1, 1, 12],
        "mixer_layers.0.norm1.beta": [1, 1, 12],
        "mixer_layers.0.linear_tokens.weight": [9, 9],
        "mixer_layers.0.linear_tokens.bias": [9],
        "mixer_layers.0.norm2.alpha": [1, 1, 12],
        "mixer_layers.0.norm2.beta": [1, 1, 12],
        "mixer_layers.0.mlp_channels.fc1.weight": [12, 48],
        "mixer_layers.0.mlp_channels.fc1.bias": [48],
        "mixer_layers.0.mlp_channels.fc2.weight": [48, 12],
        "mixer_layers.0.mlp_channels.fc2.bias": [12],
        "norm.alpha": [1, 1, 12],
        "norm.beta": [1, 1, 12],
        "head.weight": [12, 7],
        "head.bias": [7],
    }


def test_parameters_start_as_in_the_official_code():
    model = ResMLP(image_size=64, patch_size=8, num_classes=200, embed_dim=96, depth=2)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if "linear_tokens.weight" in name or "fc" in name and "weight" in name or "head.w" in name:
            assert abs(value.std() - 0.02) < 0.001 and abs(value.mean()) < 0.002, name
        elif name.endswith("alpha"):
            assert (value == 1).all(), name
        elif name.endswith(("ls1", "ls2")):
            assert np.allclose(value, 0.1), name
        elif not name.startswith("patch_embed"):  # betas and biases
            assert (value == 0).all(), name
    bound = 1 / np.sqrt(3 * 8 * 8)  # PyTorch's default: uniform in +- 1 / sqrt(fan in)
    for name in ("weight", "bias"):
        value = state[f"patch_embed.patch_embed.{name}"]
        assert np.abs(value).max() <= bound
    assert abs(state["patch_embed.patch_embed.weight"].std() - bound / np.sqrt(3)) < 0.002


def test_layer_scale_starts_by_depth():
    assert [default_layer_scale(depth) for depth in (12, 18, 24, 36)] == [0.1, 0.1, 1e-5, 1e-6]


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    paddle.seed(0)
    layer = DropPath(0.25)
    out = layer(paddle.ones([4000, 3, 2])).numpy()
    per_sample = out.reshape(4000, -1)
    assert (per_sample == per_sample[:, :1]).all()
    assert np.allclose(np.unique(out), [0, 4 / 3])
    assert abs(out.mean() - 1.0) < 0.04
    layer.eval()
    assert (layer(paddle.ones([10, 3, 2])).numpy() == 1).all()


def test_recomputation_changes_neither_loss_nor_gradients():
    images, gradients, losses = paddle.randn([4, 3, 24, 24]), [], []
    model = tiny(drop_path=0.3)
    for recompute in (False, True):
        model.recompute = recompute
        model.clear_gradients()
        paddle.seed(5)
        loss = (model(images) ** 2).mean()
        loss.backward()
        losses.append(float(loss))
        gradients.append([p.grad.numpy() for p in model.parameters()])
    assert losses[0] == losses[1]
    assert max(np.abs(a - b).max() for a, b in zip(*gradients)) < 1e-6


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"\[B, 3, 24, 24\], found \[1, 3, 32, 32\]"):
        tiny()(paddle.randn([1, 3, 32, 32]))
    with pytest.raises(ConfigError, match="25 is not a multiple of patch_size 8"):
        tiny(image_size=25)
