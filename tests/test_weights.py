"""Weight files: what is read, what is refused, and how a state dict is adapted to a model."""

from __future__ import annotations

import fcntl
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.numpy import save as safetensors_bytes

from cli.errors import UserError, WeightsError
from resmlp import ResMLP, load_state
from storage import safe_pickle
from storage.adapt import resample_tokens
from storage.weights import check_state, read_weights, safe_load, write_weights

ROOT = Path(__file__).resolve().parent.parent


def tiny(**changes) -> ResMLP:
    options = dict(image_size=16, patch_size=8, embed_dim=6, depth=2, num_classes=5)
    return ResMLP(**{**options, **changes})


def arrays(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture
def state():
    paddle.seed(0)
    return arrays(tiny())


# ------------------------------------------------------------------------------ what is read
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_we_and_paddle_read_what_the_other_writes(tmp_path, state, protocol):
    path = tmp_path / "x.pdparams"
    paddle.save({name: paddle.to_tensor(v) for name, v in state.items()}, str(path), protocol)
    file = read_weights(path)
    assert_same(file.state, state)
    assert file.key == ""
    write_weights(state, path)
    loaded = paddle.load(str(path))
    assert all(isinstance(value, paddle.Tensor) for value in loaded.values())
    assert_same({name: value.numpy() for name, value in loaded.items()}, state)


def test_the_key_chooses_the_model_or_its_average_in_a_checkpoint(tmp_path):
    path, models = tmp_path / "last.pdparams", (tiny(), tiny())
    model, average = (model.state_dict() for model in models)
    paddle.save({"model": model, "model_ema": average, "epoch": 7}, str(path))
    for key, taken in (("auto", 1), ("model_ema", 1), ("model", 0)):
        file = read_weights(path, key)
        assert_same(file.state, arrays(models[taken]))
        assert file.key == ("model", "model_ema")[taken]
        assert str(file) == f"{file.key} of {path}"
    paddle.save({"model": model, "model_ema": None}, str(path))
    assert read_weights(path).key == "model"
    with pytest.raises(WeightsError, match="has no model_ema; it holds model, model_ema"):
        read_weights(path, "model_ema")


def test_files_of_numpy_1_and_of_numpy_2_are_read(tmp_path, state):
    data = pickle.dumps(state, protocol=2)  # names modules in plain text
    for ours, theirs in ((b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")):
        (tmp_path / "x.pdparams").write_bytes(data.replace(ours, theirs))
        assert_same(read_weights(tmp_path / "x").state, state)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_data_survives_every_protocol(tmp_path, protocol):
    content = {
        "list": [1, -2.5, None, True, "ä", b"\xff", 10**30],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "scalar": np.float64(1.5),
        3: {"fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3))},
        "big-endian": [np.arange(3, dtype=">i4"), np.arange(3, dtype=">i4")],
        "empty": np.zeros((0, 2), np.float32),
        "pair": ("name", np.arange(3)),  # nearly a tensor of Paddle's
    }
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps(content, protocol=protocol))
    found = safe_load(tmp_path / "x.pdparams")
    for key in ("list", "tuples", "scalar"):
        assert found[key] == content[key]
    np.testing.assert_array_equal(found[3]["fortran"], content[3]["fortran"])
    np.testing.assert_array_equal(found["big-endian"], content["big-endian"])
    assert found["empty"].shape == (0, 2)
    assert found["pair"][0] == "name" and found["pair"][1].tolist() == [0, 1, 2]


def test_safetensors_is_read_by_name_or_by_content(tmp_path, state):
    write_weights(state, tmp_path / "x.safetensors")
    assert_same(read_weights(tmp_path / "x").state, state)
    os.rename(tmp_path / "x.safetensors", tmp_path / "y.bin")
    assert_same(read_weights(tmp_path / "y.bin").state, state)
    header = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'.ljust(0x3C20)  # " <"
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)  # no text
    assert read_weights(tmp_path / "x").state["a"].size == 0


def test_half_precision_and_scalars_become_arrays_of_float32(tmp_path):
    values = np.array([1.0, -0.15625, 3.0e-5], np.float32)
    for dtype, limit in (("bfloat16", 2**-8), ("float16", 2**-10)):
        content = {"a": paddle.to_tensor(values).astype(dtype), "b": np.float64(1.5)}
        paddle.save(content, str(tmp_path / "x.pdparams"))
        found = read_weights(tmp_path / "x.pdparams").state
        assert found["a"].dtype == found["b"].dtype == np.float32
        np.testing.assert_allclose(found["a"], values, rtol=limit)
        assert found["b"].shape == () and found["b"] == 1.5
    header = b'{"a":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]}}'
    upper = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    (tmp_path / "y.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + upper)
    found = read_weights(tmp_path / "y.safetensors").state["a"]
    np.testing.assert_allclose(found, values, rtol=2**-7)


# --------------------------------------------------------------------------- what is written
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, state, monkeypatch):
    write_weights(state, tmp_path / "x.pdparams")
    before = (tmp_path / "x.pdparams").read_bytes()
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        write_weights({"other": np.ones(3, np.float32)}, tmp_path / "x.pdparams")
    assert (tmp_path / "x.pdparams").read_bytes() == before
    assert os.listdir(tmp_path) == ["x.pdparams"]


# -------------------------------------------------------------------- thirty files and more
class Call:
    """Pickles as a call: loading it the usual way runs it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Built:
    """Pickles as an array of bytes, with anything in the place of the bytes."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        function, arguments, state = np.zeros(3, np.uint8).__reduce__()
        return function, arguments, (*state[:-1], self.data)


def hostile_files(state, marker):
    """Name -> (content of the file, a part of the message)."""
    good = pickle.dumps(state, protocol=4)
    name = "mixer_layers.0.mlp_channels.fc1.weight"
    value = state[name]
    safe = safetensors_bytes(state)
    touch = f"open({marker!r}, 'w').close()"

    def dump(content, protocol=4):
        return pickle.dumps(content, protocol=protocol)

    def replaced(array, **more):
        return dump({**state, name: array, **more})

    yield "empty file", b"", "empty"
    yield "text", b"hello, I am no weight file\n", "truncated, damaged, or not"
    yield "an image", b"\x89PNG\r\n\x1a\n" + bytes(64), "truncated, damaged, or not"
    yield "a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"
    yield "a web page", b"\n<!DOCTYPE html>\n<html>Not found</html>\n", "a web page"
    legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(64)
    yield "PyTorch's format before 1.6", legacy, "torch"
    yield "a zip archive, PyTorch's format", b"PK\x03\x04" + bytes(64), "not a PyTorch file"
    for part in (0.01, 0.3, 0.9, 0.999):
        cut = good[: int(len(good) * part)]
        yield f"cut at {part:.1%}", cut, r"truncated.*\(the file ends too early\)$"
    yield "cut by one byte", good[:-1], r"truncated.*\(the file ends too early\)$"
    yield "something after the end", good + b"more", "truncated, damaged"
    yield "safetensors, cut", safe[:-5], "truncated or damaged"
    yield "safetensors, header cut", safe[:40], "truncated or damaged"
    yield "safetensors, header too long", struct.pack("<Q", 2**60) + safe[8:], "damaged"
    for shape in ([2**63, 0], [0] * 70):
        header = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}'.encode()
        data = struct.pack("<Q", len(header)) + header
        yield f"safetensors, {len(shape)} impossible sizes", data, "or damaged .*dimension"
    yield "safetensors, integers", safetensors_bytes({"a": np.arange(3)}), "I64"
    # code
    yield "os.system", dump({**state, "x": Call(os.system, f"touch {marker}")}), "system"
    yield "eval", dump({"model": Call(eval, touch)}), "builtins.eval"
    yield "exec, protocol 0", dump(Call(exec, touch), protocol=0), "builtins.exec"
    yield "exec, protocol 2", dump(Call(exec, touch), protocol=2), "exec"
    yield "a call hidden in an object array", replaced(np.array([Call(exec, touch)])), "type object"
    yield "a call as a dict's key", dump({Call(exec, touch): 1}), "exec"
    yield "INST", b"(S'" + touch.encode() + b"'\nibuiltins\nexec\n.", "INST .builtins exec"
    yield "OBJ", b"(cbuiltins\nexec\n(V" + touch.encode() + b"\no.", "exec"
    yield "attributes behind a dot", b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", "__init_"
    yield "a module's function", b"\x80\x04\x8c\x05numpy\x8c\x04load\x93" + b").", "numpy.load"
    yield "BUILD on a dict", b"\x80\x02}}U\x01aK\x01sb.", "not plain data"
    yield "BUILD on a name", b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.", "not plain data"
    yield "persistent id", b"\x80\x02U\x01xQ.", "BINPERSID"
    yield "extension registry", b"\x80\x02\x82\x01.", "EXT1"
    yield "a bare name", b"\x80\x02cnumpy\nndarray\n.", "not plain data"
    yield "a generator state", dump(Call(paddle.CPUPlace)), "CPUPlace"
    # size
    loop: list = []
    loop.append(loop)
    yield "a list in itself", dump(loop), "nested deeper"
    laughs = ["x"] * 10
    for _ in range(30):
        laughs = [laughs] * 10
    yield "a billion laughs", dump(laughs), "more than"
    shared = {"a": 1}
    for _ in range(20):
        shared = {"a": shared, "b": shared}
    yield "a billion laughs in dicts", dump(shared), "more than"
    doubled = b"h\x00\x86q\x00" * 60  # hashing it would take 2 ** 60 steps
    yield "a key of tuples in tuples", b"\x80\x02})q\x00" + doubled + b"K\x01s.", "keys that are"
    yield "a key of 24,000 bits", dump({1 << 24_000: value}), "whole number of more than 1024 bits"
    yield "a hundred thousand brackets", b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".", "nested"
    yield "a memo index of 2^31", b"\x80\x02Nr\xff\xff\xff\x7f.", "holds a NoneType"
    text = b"X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"q\x01"
    again = b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R"  # h: from the memo
    yield "one text encoded 100 times", b"\x80\x03](" + text + again * 100 + b"e.", "more data than"
    yield "a number for an array's bytes", dump(Built(10**12)), "not plain numbers"
    yield "lists for a name", b"\x80\x04]]\x93.", "truncated, damaged"
    yield "a string of 2^40 bytes", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "truncated"
    huge = dump(np.zeros(3, np.float32)).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85")
    yield "an array larger than its bytes", huge, "truncated, damaged"
    # content
    yield "no state dict", dump([1, 2, 3]), "holds a list"
    yield "an empty dict", dump({}), "no weights"
    yield "a number for an array", replaced(value, x=3), "floating point .int.: x"
    yield "strings", replaced(np.array(["a", "b"])), "type str32"
    yield "integers", replaced(value.astype(np.int64)), "floating point .int64.: mixer_layers.0"
    yield "complex numbers", replaced(value.astype(np.complex64)), "type complex64"
    yield "records", replaced(np.zeros(3, [("a", "f4"), ("b", "O")])), "type void96"
    yield "NaN", replaced(np.full_like(value, np.nan)), f"NaN or infinite values in {name}"
    yield "infinity", replaced(np.full_like(value, np.inf)), f"NaN or infinite values in {name}"
    yield "float64 beyond float32", replaced(np.full(value.shape, 1e300)), "NaN or infinite"
    # fit
    yield "a transposed layer", replaced(value.T), r"\[24, 6\], needed \[6, 24\] \(transposed\?\)"
    head = np.ascontiguousarray(state["head.weight"].T)
    yield "a transposed head", replaced(value, **{"head.weight": head}), "head.weight.*transposed"
    yield "a key too many", replaced(value, extra=np.ones(2, np.float32)), "unexpected: extra"
    lacking = {key: array for key, array in state.items() if key != name}
    yield "a key too few", dump(lacking), f"missing: {name}"
    yield "another shape", replaced(value[:, :-1]), r"\[6, 23\], needed \[6, 24\]"
    none = {"weight": np.zeros((0, 0), np.float32), "bias": np.zeros(0, np.float32)}
    none = {f"mixer_layers.0.linear_tokens.{part}": value for part, value in none.items()}
    yield "no tokens", replaced(value, **none), r"linear_tokens.weight \[0, 0\], needed \[4, 4\]"
    yield "no dimensions", replaced(value, **{"head.weight": np.ones(())}), "head.weight"
    timm = {key.replace("mixer_layers", "blocks"): array for key, array in state.items()}
    timm["stem.proj.weight"] = timm.pop("patch_embed.patch_embed.weight")
    escape = replaced(value, **{"two\nlines\x1b[31m" + "x" * 10**5: np.ones(2, np.float32)})
    yield "a name that would upset a terminal", escape, r"unexpected: two.+lines.+\[31mxxx"
    yield "PyTorch's names", dump(timm), "load_timm_weights.py"


CASES = [case[0] for case in hostile_files(arrays(tiny()), "x")]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_one_clear_line_and_runs_nothing_and_changes_nothing(tmp_path, state, case):
    marker = tmp_path / "it ran"
    files = {name: rest for name, *rest in hostile_files(state, str(marker))}
    content, message = files[case]
    path = tmp_path / "file.pdparams"
    path.write_bytes(content)
    model = tiny()
    before = arrays(model)
    with pytest.raises(WeightsError, match=message) as caught:
        load_state(model, read_weights(path).state, new_head=False, resize_tokens=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not marker.exists()
    assert_same(arrays(model), before)


def test_the_hostile_pickles_would_run_elsewhere(tmp_path, state):
    marker = tmp_path / "ran"
    pickle.loads(dict((c[0], c[1]) for c in hostile_files(state, str(marker)))["eval"])
    assert marker.exists()


def test_what_a_pickle_may_do_is_limited_but_ample_for_real_files(tmp_path, monkeypatch):
    content = {f"{n}": np.ones(1, np.float32) for n in range(3000)}
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps(content, protocol=2))
    monkeypatch.setattr(safe_pickle, "MAX_STEPS", safe_pickle.MAX_STEPS // 10)
    assert len(safe_load(tmp_path / "x")) == 3000
    (tmp_path / "x.pdparams").write_bytes(b"\x80\x02(" + b"]" * safe_pickle.MAX_STEPS + b"t.")
    with pytest.raises(WeightsError, match="holds more than 100,000 instructions"):
        safe_load(tmp_path / "x")


def test_an_array_with_many_names_is_converted_once():
    array = np.ones(3, np.float16)
    state = check_state({"a": array, "b": array, "c": array.copy()}, "x")
    assert state["a"] is state["b"] and state["a"].dtype == np.float32
    assert state["c"] is not state["a"]
    array[0] = np.nan
    with pytest.raises(WeightsError, match="NaN or infinite values in a, b$"):
        check_state({"a": array, "b": array, "c": array[1:]}, "x")


@pytest.mark.parametrize(
    "name, message",
    [
        ("resmlp_24_244", "did you mean resmlp_24_224.pdparams"),
        ("", "a folder"),
        ("nowhere/x", "there is no folder"),
        ("a" * 300, "aaa: cannot be read: File name too long"),
        ("a" * 250, "aaa: no such weight file"),  # too long with a suffix
    ],
)
def test_a_missing_file_is_told_with_its_neighbours_or_the_reason(tmp_path, state, name, message):
    write_weights(state, tmp_path / "resmlp_24_224.pdparams")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / name)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may do anything")
@pytest.mark.parametrize(
    "mode, reason", [(0o000, "cannot be read: Permission denied"), (0o300, "no such weight file")]
)
def test_a_closed_folder_is_told_from_a_missing_file(tmp_path, mode, reason):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(mode)
    with pytest.raises(WeightsError, match=f"closed/x: {reason}"):
        read_weights(tmp_path / "closed" / "x")
    (tmp_path / "closed").chmod(0o700)


# ------------------------------------------------------------------------- head and resolution
SIZES = "from 16 x 16 pixels (4 tokens) to 32 x 32 (16 tokens)"


@pytest.mark.parametrize(
    "changes, note",
    [
        ({"num_classes": 7}, "head initialised for 7 classes: the file's has 5"),
        ({"num_classes": 0}, "the head of the file (5 classes) is left out: the model has none"),
        ({"image_size": 32}, f"token mixing resampled {SIZES}"),
    ],
)
def test_weights_of_another_head_or_resolution_are_adapted_on_request(state, changes, note):
    model, given = tiny(**changes), {name: value.copy() for name, value in state.items()}
    own = arrays(model)
    new_head = model.num_classes == 7  # the others need no leave
    assert load_state(model, given, new_head, resize_tokens=True) == [note]
    assert_same(given, state)  # what is given stays as it is
    if "num_classes" in changes:
        state |= {name: value for name, value in own.items() if name.startswith("head.")}
        assert_same(arrays(model), {name: state[name] for name in own})
    assert model(paddle.ones([1, 3, *[model.image_size] * 2])).shape[0] == 1


def test_a_head_is_new_only_where_it_must_be(state):
    model = tiny()
    assert load_state(model, state, new_head=True) == []
    assert_same(arrays(model), state)
    features = {name: value for name, value in state.items() if not name.startswith("head")}
    notes = load_state(model, features, new_head=True)
    assert notes == ["head initialised for 5 classes: the file has none"]
    for changes, weights, message in (
        (dict(num_classes=7), state, "for 5 classes, the model has 7"),
        ({}, features, "missing: head.weight, head.bias"),
        (dict(image_size=32), state, re.escape(SIZES)),
    ):
        with pytest.raises(WeightsError, match=message):
            load_state(tiny(**changes), weights)


def pillow_resize(images, size):
    """Bicubic resizing by Pillow of ``[..., H, W]`` float images."""
    flat = images.reshape(-1, *images.shape[-2:]).astype(np.float32)
    out = [Image.fromarray(image).resize((size, size), Image.BICUBIC) for image in flat]
    return np.stack([np.asarray(image) for image in out]).reshape(*images.shape[:-2], size, size)


@pytest.mark.parametrize("old, new", [(7, 14), (14, 7), (8, 11), (14, 14)])
def test_the_new_layer_mixes_as_the_old_one_between_two_resizings_by_pillow(old, new):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(old**2, old**2)).astype(np.float32)
    bias = rng.normal(size=old**2).astype(np.float32)
    new_weight, new_bias = resample_tokens(weight, bias, new)
    expected = pillow_resize(bias.reshape(old, old), new)
    np.testing.assert_allclose(new_bias.reshape(new, new), expected, atol=2e-6)
    # what each output sums its inputs to, [T_out], is kept: resampled, not scaled by the tokens
    sums = pillow_resize(weight.sum(axis=0).reshape(old, old), new)
    np.testing.assert_allclose(new_weight.sum(axis=0).reshape(new, new), sums, atol=2e-4)
    tokens = np.random.default_rng(1).normal(size=(new, new)).astype(np.float32)
    mixed = pillow_resize(tokens, old).reshape(-1) @ weight + bias  # y_out = sum_in W[in, out] x_in
    expected = pillow_resize(mixed.reshape(old, old), new)
    found = (tokens.reshape(-1) @ new_weight + new_bias).reshape(new, new)
    np.testing.assert_allclose(found, expected, atol=5e-5)


# ------------------------------------------------------------------------- wrapped, and written
@pytest.mark.parametrize("prefix", ["module.", "_layers.", "_orig_mod.module."])
@pytest.mark.parametrize("container", [None, "model", "state_dict", "state_dict_ema"])
def test_wrapped_paddle_files_are_understood_as_pytorchs_are(tmp_path, state, prefix, container):
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    content = {container: wrapped, "epoch": 3} if container else wrapped
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps(content))
    found = read_weights(tmp_path / "x")
    assert_same(found.state, state)
    assert found.key == (container or "")


def test_averaged_weights_come_first_and_no_parameter_is_there_twice(tmp_path, state):
    path = tmp_path / "x.pdparams"
    other = {name: value + 1 for name, value in state.items()}
    path.write_bytes(pickle.dumps({"state_dict": other, "state_dict_ema": state}))
    assert_same(read_weights(path).state, state)
    assert_same(read_weights(path, "model").state, other)
    path.write_bytes(pickle.dumps({**state, "module.norm.beta": np.ones(6)}))
    with pytest.raises(WeightsError, match="twice, with a prefix and without"):
        read_weights(path)


def test_files_obey_the_umask(tmp_path, state):
    before = os.umask(0o007)
    try:
        write_weights(state, tmp_path / "x.pdparams")
    finally:
        os.umask(before)
    assert (tmp_path / "x.pdparams").stat().st_mode & 0o777 == 0o660


_KILLED = """
import os, signal, sys
from storage import files
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(b"half of it", sys.argv[1])
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_another_writes_left_alone(
    tmp_path, state
):
    path, other = tmp_path / "x.pdparams", tmp_path / ".x.pdparams.1-2.tmp"
    subprocess.run([sys.executable, "-c", _KILLED, path], cwd=ROOT)
    assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
    with open(other, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_weights(state, path)
        assert sorted(tmp_path.iterdir()) == [other, path]
