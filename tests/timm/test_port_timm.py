"""All four architectures at full size, both namings, both directions, against timm itself."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from cli.errors import WeightsError  # noqa: E402
from port_weights import export_timm_weights, load_timm_weights, names, verify  # noqa: E402
from port_weights.zoo import ZOO  # noqa: E402
from storage.weights import read_weights  # noqa: E402

ARCHITECTURES = ("resmlp_12_224", "resmlp_24_224", "resmlp_36_224", "resmlp_big_24_224")


def random_model(name: str):
    """timm's model with unseen weights, each tensor large enough to matter in the logits."""
    torch.manual_seed(ARCHITECTURES.index(name))
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn_like(value)
            if key.endswith((".ls1", ".ls2")):
                value.copy_(0.3 + 0.03 * noise)  # small: depth shall not blow up the logits
            elif key.endswith(".alpha"):
                value.copy_(1.0 + 0.1 * noise)
            else:
                value.copy_(noise / value[0].numel() ** 0.5 if value.ndim > 1 else 0.1 * noise)
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reference(request):
    return random_model(request.param)


def facebook_names(state: dict) -> dict:
    """timm's state dict as facebookresearch/deit names it: what timm's own filter undoes."""
    new = {
        "stem.": "patch_embed.",
        "linear_tokens": "attn",
        "mlp_channels": "mlp",
        ".ls": ".gamma_",
    }
    renamed = {}
    for name, value in state.items():
        for ours, theirs in new.items():
            name = name.replace(ours, theirs)
        renamed[name] = value.reshape(-1) if name.endswith((".alpha", ".beta")) else value
    return renamed


@pytest.mark.parametrize("style", ["timm", "facebook"])
def test_a_port_proves_itself_and_goes_back_bit_for_bit(reference, tmp_path, style, capsys):
    state = reference.state_dict()
    wrapped = {"model": facebook_names(state)} if style == "facebook" else state
    torch.save(wrapped, tmp_path / "x.pth")
    arguments = ["-checkpoint", str(tmp_path / "x.pth"), "-output", str(tmp_path / "x.pdparams")]
    load_timm_weights.main([*arguments, "-proof", "timm"])
    report = capsys.readouterr().out
    assert f"{style} names" in report and "features differ by" in report

    suffix = "safetensors" if style == "timm" else "pth"
    output = str(tmp_path / f"back.{suffix}")
    export_timm_weights.main([str(tmp_path / "x"), "-output", output, "-format", style])
    if style == "timm":
        from safetensors.torch import load_file

        back = load_file(output)
    else:
        back = torch.load(output, weights_only=True)
    expected = facebook_names(state) if style == "facebook" else state
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], value) for name, value in expected.items())
    fresh = timm.create_model(reference.default_cfg["architecture"])
    filtered = timm.models.mlp_mixer.checkpoint_filter_fn(back, fresh)
    fresh.load_state_dict(filtered, strict=True)


@pytest.mark.parametrize("layer", ["linear_tokens.weight", "ls2"])
@pytest.mark.parametrize("block", [0, 35])
def test_a_wrong_port_of_a_fresh_model_fails_its_proof(fresh, layer, block):
    """Its head is zero and its LayerScale 1e-6: logits in float32 would not show a mistake."""
    name, wrong = f"blocks.{block}.{layer}", dict(fresh)
    wrong[name] = fresh[name].T if fresh[name].ndim == 2 else 1.1 * fresh[name]
    compare(fresh, fresh)
    with pytest.raises(WeightsError, match="the port is wrong"):
        compare(fresh, wrong)


@pytest.fixture(scope="module")
def fresh():
    model = timm.create_model("resmlp_36_224", img_size=32)
    assert not model.head.weight.any() and model.blocks[0].ls1.max() < 2e-6
    return {name: value.numpy() for name, value in model.state_dict().items()}


def compare(state, ported_from):
    ported, _ = names.convert(ported_from, "timm", "paddle")
    architecture = load_timm_weights.infer(ported)
    model = load_timm_weights.ResMLP(**architecture._asdict())
    load_timm_weights.load_state(model, ported)
    return verify.compare_with_timm(model, state, architecture)


def test_the_zoo_agrees_with_timms_own_table():
    tags = set(timm.list_models("resmlp_*", pretrained=True))
    assert {weights.timm for weights in ZOO} == tags
    for weights in ZOO:
        config = timm.get_pretrained_cfg(weights.timm)
        assert config.url == weights.url
        assert (config.crop_pct, config.interpolation) == (0.875, "bicubic")
        assert config.input_size == (3, 224, 224)
        assert config.mean == pytest.approx((0.485, 0.456, 0.406))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_deits_training_checkpoints_are_read_and_strange_objects_refused(tmp_path, zipped):
    tensors = {"a": torch.ones(2, dtype=torch.bfloat16)}
    content = {"model": tensors, "epoch": 3, "args": Namespace(lr=0.1)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    file = read_weights(tmp_path / "x.pth")
    assert file.key == "model" and file.state["a"].dtype == np.float32
    torch.save({"model": tensors, "model_ema": {"a": torch.zeros(2)}}, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").key == "model_ema"
    assert read_weights(tmp_path / "x.pth", "model").state["a"].sum() == 2

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"model": tensors, "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(
        WeightsError, match="holds .*open, which is not plain data; nothing of it was run"
    ) as caught:
        read_weights(tmp_path / "evil.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:200])
    with pytest.raises(WeightsError, match="truncated, damaged"):
        read_weights(tmp_path / "cut.pth")


def test_files_are_read_without_torch_whatever_stands_beside_the_weights(tmp_path, monkeypatch):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "a": whole.T[1:, ::2],
        "b": torch.nn.Parameter(whole[2]),
        "c": whole.half(),
        "d": whole.bfloat16(),
        "e": torch.tensor(3.5, dtype=torch.float64),
    }
    beside = {
        "numbers": [np.float64(0.5), np.int64(3), np.zeros(3), np.str_("x"), np.datetime64("2020")],
        "path": [Path("x"), datetime.now(), torch.float32, torch.device("cpu"), torch.Size([2])],
        "counts": defaultdict(list, a=[1]),
        "steps": {0: {"step": torch.tensor(3)}},
    }
    torch.save({"model": tensors, **beside}, tmp_path / "x.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    state = read_weights(tmp_path / "x.pth").state
    assert state.keys() == tensors.keys()
    for name, value in tensors.items():
        assert np.array_equal(state[name], value.detach().float().numpy()), name
    (tmp_path / "x.pth").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF")  # before PyTorch 1.6
    with pytest.raises(WeightsError, match="pip install -r port_weights/requirements.txt"):
        read_weights(tmp_path / "x.pth")
