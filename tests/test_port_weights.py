"""Porting between PyTorch's names and ours, checked against a forward pass in NumPy float64."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest

from cli.errors import UserError, WeightsError
from config import get_config
from port_weights import export_timm_weights, load_timm_weights, names, verify
from port_weights.architecture import infer
from port_weights.zoo import ZOO
from resmlp import ResMLP, load_state
from storage.weights import read_weights, write_weights

DIM, GRID, PATCH, HIDDEN, DEPTH, CLASSES = 6, 2, 4, 24, 2, 5


def torch_state(style: str, seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict as timm or facebookresearch/deit names and shapes it, all values random."""
    rng = np.random.default_rng(seed)
    tokens = GRID * GRID
    affine = (1, 1, DIM) if style == "timm" else (DIM,)
    stem, mix, mlp, scale = {
        "timm": ("stem.proj", "linear_tokens", "mlp_channels", "ls"),
        "facebook": ("patch_embed.proj", "attn", "mlp", "gamma_"),
    }[style]
    shapes = {f"{stem}.weight": (DIM, 3, PATCH, PATCH), f"{stem}.bias": (DIM,)}
    for block in range(DEPTH):
        prefix = f"blocks.{block}"
        shapes |= {
            f"{prefix}.{scale}1": (DIM,),
            f"{prefix}.{scale}2": (DIM,),
            f"{prefix}.norm1.alpha": affine,
            f"{prefix}.norm1.beta": affine,
            f"{prefix}.{mix}.weight": (tokens, tokens),
            f"{prefix}.{mix}.bias": (tokens,),
            f"{prefix}.norm2.alpha": affine,
            f"{prefix}.norm2.beta": affine,
            f"{prefix}.{mlp}.fc1.weight": (HIDDEN, DIM),
            f"{prefix}.{mlp}.fc1.bias": (HIDDEN,),
            f"{prefix}.{mlp}.fc2.weight": (DIM, HIDDEN),
            f"{prefix}.{mlp}.fc2.bias": (DIM,),
        }
    shapes |= {"norm.alpha": affine, "norm.beta": affine}
    shapes |= {"head.weight": (CLASSES, DIM), "head.bias": (CLASSES,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def forward(state: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The official model in float64, from timm's names (paper, eq. 1 to 3)."""
    p = {name: value.astype(np.float64) for name, value in state.items()}
    patches = images.reshape(len(images), 3, GRID, PATCH, GRID, PATCH).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(len(images), GRID * GRID, -1)
    x = patches @ p["stem.proj.weight"].reshape(DIM, -1).T + p["stem.proj.bias"]
    gelu = np.vectorize(lambda v: v * 0.5 * (1.0 + math.erf(v / math.sqrt(2.0))))
    for block in range(DEPTH):
        q = {n.split(".", 2)[2]: v for n, v in p.items() if n.startswith(f"blocks.{block}.")}
        y = q["norm1.alpha"] * x + q["norm1.beta"]
        y = np.einsum("oi,bic->boc", q["linear_tokens.weight"], y)
        x = x + q["ls1"] * (y + q["linear_tokens.bias"][:, None])
        y = q["norm2.alpha"] * x + q["norm2.beta"]
        y = gelu(y @ q["mlp_channels.fc1.weight"].T + q["mlp_channels.fc1.bias"])
        x = x + q["ls2"] * (y @ q["mlp_channels.fc2.weight"].T + q["mlp_channels.fc2.bias"])
    x = (p["norm.alpha"] * x + p["norm.beta"]).mean(axis=1)
    return x @ p["head.weight"].T + p["head.bias"]


def assert_bit_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.fixture
def port(tmp_path):
    """Ports a PyTorch state dict from x.safetensors to x.pdparams, and reads what was written."""

    def run(state, *more):
        write_weights(state, tmp_path / "x.safetensors")
        files = ["-checkpoint", tmp_path / "x.safetensors", "-output", tmp_path / "x.pdparams"]
        load_timm_weights.main([*map(str, (*files, *more)), "-proof", "keys"])
        return read_weights(tmp_path / "x.pdparams").state

    return run


@pytest.mark.parametrize("style", names.FORMATS)
def test_a_port_computes_what_the_official_model_does_and_goes_back_bit_for_bit(
    tmp_path, port, style, capsys
):
    state = torch_state(style)
    ported = port(state)
    report = capsys.readouterr().out
    assert f"{style} names, {len(state)} tensors: image_size 8" in report
    assert "sha256" in report
    rows = [line for line in report.splitlines() if " -> " in line]
    assert len(rows) == len(state)
    assert sum(row.endswith(" transposed") for row in rows) == 3 * DEPTH + 1
    assert sum(row.endswith(" reshaped") for row in rows) == (style == "facebook") * (4 * DEPTH + 2)

    sizes = infer(ported)._asdict()
    assert sizes == dict(
        image_size=8, patch_size=4, in_channels=3, num_classes=5, embed_dim=6, depth=2, mlp_ratio=4
    )
    model = ResMLP(**sizes)
    load_state(model, ported)
    images = np.random.default_rng(1).normal(size=(3, 3, 8, 8)).astype(np.float32)
    found = model(paddle.to_tensor(images)).numpy()
    expected = forward(dict(zip(torch_state("timm"), state.values())), images)  # in one order
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5

    back = str(tmp_path / "back.safetensors")
    export_timm_weights.main([str(tmp_path / "x.pdparams"), "-output", back, "--format", style])
    assert_bit_identical(read_weights(back).state, state)


LS, ALPHA, FC1 = "blocks.1.ls1", "blocks.1.norm1.alpha", "blocks.1.mlp_channels.fc1.weight"
BIAS, STEM, OURS = "blocks.0.linear_tokens.bias", "stem.proj.weight", "mixer_layers.1.ls1"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {LS: None}, f"missing: {OURS}"),
        (lambda s: {"extra": s["norm.beta"]}, r"unexpected: extra \(not ResMLP's\)"),
        (lambda s: {LS: None, OURS: s[LS]}, rf"missing: {OURS}; unexpected: {OURS} \(not Res"),
        (
            lambda s: {BIAS: None, "blocks.0.attn.bias": s[BIAS]},
            r"missing: .*linear_tokens.bias; unexpected: blocks.0.attn.bias",
        ),
        (lambda s: {LS: s[LS][:-1]}, rf"{OURS} \[5\], needed \[6\]"),
        (lambda s: {ALPHA: s[ALPHA].reshape(6, 1, 1)}, r"alpha \[6, 1, 1\], needed \[1, 1, 6\]"),
        (lambda s: {FC1: s[FC1].T}, r"fc1.weight \[24, 6\], needed \[6, 24\] \(transposed\?\)"),
        (lambda s: {STEM: None}, "neither timm's names"),
        (lambda s: {"blocks.0.linear_tokens.weight": None}, "there is no mixer_layers.0.linear_"),
        (lambda s: {"head.weight": s["head.weight"] * np.nan}, "NaN or infinite .*head.weight"),
        (lambda s: dict.fromkeys(s), "no weights"),
        (
            lambda s: {"patch_embed.patch_embed.weight": s[STEM]},
            "Paddle's already: use the file with -pretrained",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path, port, change, message):
    """Entries of the state are others, or more, or (None) not there."""
    state = torch_state("timm")
    state |= change(state)
    with pytest.raises(WeightsError, match=message):
        port({name: value for name, value in state.items() if value is not None})
    assert not (tmp_path / "x.pdparams").exists()


def test_a_port_is_checked_against_a_config(tmp_path, port):
    text = "DATA: {IMAGE_SIZE: 8}\nMODEL: {NUM_CLASSES: 5, MIXER: {PATCH_SIZE: 4, EMBED_DIM: 6,"
    (tmp_path / "right.yaml").write_text(f"{text} DEPTH: 2}}}}\n")
    (tmp_path / "wrong.yaml").write_text(f"{text} DEPTH: 3}}}}\n")
    with pytest.raises(WeightsError, match="MODEL.MIXER.DEPTH is 3, the file has 2$"):
        port(torch_state("timm"), "--cfg", tmp_path / "wrong.yaml")
    port(torch_state("timm"), "--cfg", tmp_path / "right.yaml")


def test_a_file_without_a_head_becomes_a_model_of_features(port, capsys):
    state = {n: v for n, v in torch_state("facebook").items() if not n.startswith("head")}
    assert infer(port(state)).num_classes == 0
    assert "no head in the file" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give one of -model"),
        (["-model", "resmlp_24_224.fb_in1k", "-checkpoint", "x"], "give one of -model"),
        (["-model", "resmlp_24"], "unknown; choose one of resmlp_12_224.fb_in1k"),
        (["-checkpoint", "none.pth"], "no such weight file"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        load_timm_weights.main(arguments)


def test_an_export_of_what_is_no_resmlp_is_refused(tmp_path):
    ported, _ = names.convert(torch_state("timm"), "timm", "paddle")
    write_weights({**ported, "extra": ported["norm.beta"]}, tmp_path / "x.pdparams")
    with pytest.raises(WeightsError, match=r"x.pdparams: .*unexpected: extra"):
        export_timm_weights.main([str(tmp_path / "x"), "-output", str(tmp_path / "y.safetensors")])
    assert not (tmp_path / "y.safetensors").exists()


def test_the_proof_fails_above_its_tolerance_for_nan_and_where_it_would_prove_nothing():
    outputs = np.random.default_rng(0).normal(size=(2, 3, 5))
    verify.compare_outputs(outputs, outputs)
    for part in (0, 1):
        for factor in (1 + 3e-9, np.nan):
            other = outputs.copy()
            other[part] *= factor
            with pytest.raises(WeightsError, match="the port is wrong"):
                verify.compare_outputs(outputs, other)
    features, logits = outputs[0], np.zeros((3, 5))
    same = verify.compare_outputs((features, logits), (features, logits))
    assert "the head gives all images the same" in same
    with pytest.raises(WeightsError, match="the port is wrong"):
        verify.compare_outputs((features, logits), (features, logits + 1e-12))
    with pytest.raises(WeightsError, match="same for every image"):
        verify.compare_outputs((logits, features), (logits, features))


def test_the_checksum_sees_one_bit_a_name_and_a_shape():
    state = {"a": np.ones((2, 3), np.float32)}
    one_bit = state["a"].copy()
    one_bit[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    others = ({"a": one_bit}, {"b": state["a"]}, {"a": state["a"].reshape(3, 2)})
    assert verify.checksum(state) == verify.checksum({"a": state["a"].copy()})
    assert len({verify.checksum(s) for s in (state, *others)}) == 4


def test_the_zoo_has_timms_eleven_weights_and_their_configs_build_them():
    assert len({weights.timm for weights in ZOO}) == len({w.name for w in ZOO}) == 11
    sizes = {"12": (12, 384, 16), "24": (24, 384, 16), "36": (36, 384, 16), "big": (24, 768, 8)}
    for weights in ZOO:
        mixer = get_config(f"{load_timm_weights.CONFIGS}/{weights.config}.yaml").MODEL.MIXER
        found = (mixer.DEPTH, mixer.EMBED_DIM, mixer.PATCH_SIZE)
        assert found == sizes[weights.timm.split("_")[1]], weights.name
