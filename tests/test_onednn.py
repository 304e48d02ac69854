"""oneDNN, called directly: its results are the plain formulas', and without it nothing changes."""

import threading
from math import erf, pi, sqrt
from unittest import mock

import numpy as np
import paddle
import pytest

from cpu import onednn, ops, setup
from resmlp import DropPath, ResBlock

from .helpers.gradients import outputs_and_gradients
from .helpers.runs import run_code

needs_onednn = pytest.mark.skipif(not onednn.has(paddle.float32), reason="no oneDNN in this Paddle")


@pytest.fixture(autouse=True)
def seed():
    paddle.seed(0)


def close(found, expected, tolerance=1e-6):
    scale = abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def doubles(*tensors):
    return [tensor.astype("float32").numpy().astype("float64") for tensor in tensors]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(erf)(x / sqrt(2)))


@needs_onednn
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_a_product_with_bias_and_gelu_is_the_formula(dtype, tolerance, transpose_a, transpose_b):
    a, b, bias = paddle.randn([7, 5]), paddle.randn([5, 6]), paddle.randn([6])
    exact = gelu(np.matmul(*doubles(a, b)) + doubles(bias)[0])
    a, b = (a.t() if transpose_a else a), (b.t() if transpose_b else b)
    a, b = onednn.cast(a, getattr(paddle, dtype)), onednn.cast(b, getattr(paddle, dtype))
    y = onednn.product(a, b, transpose_a, transpose_b, bias, gelu=True, dtype=paddle.float32)
    close(y.numpy(), exact, tolerance)


@needs_onednn
def test_what_follows_a_product_is_done_in_order_and_broadcast():
    w, x = paddle.randn([5, 4]), paddle.randn([3, 5, 8])[:, :, 1:7]  # not contiguous
    scale, constant, mask = paddle.randn([6]), paddle.randn([4, 6]), paddle.randn([3, 1, 1])
    then = [("multiply", scale), ("add", constant), ("multiply", mask)]
    found = onednn.product(w, x, transpose_a=True, then=then)
    w, x, scale, constant, mask = doubles(w, x, scale, constant, mask)
    close(found.numpy(), (np.einsum("nm,bnc->bmc", w, x) * scale + constant) * mask)


@needs_onednn
def test_other_types_and_shapes_that_do_not_fit_are_refused():
    a, b, bias = paddle.randn([7, 5]), paddle.randn([5, 6]), paddle.randn([6]).astype("float64")
    assert not onednn.has(paddle.float64)
    with pytest.raises(onednn.Unsupported, match="no paddle.float64 here"):
        onednn.product(a, b, bias=bias)
    with pytest.raises(onednn.Unsupported, match="matmul_primitive_desc_create was refused"):
        onednn.product(a, a)


@needs_onednn
def test_a_reorder_is_a_reshape_a_transposition_and_a_cast_to_the_nearest_bfloat16():
    x = paddle.randn([2, 3, 8, 12])
    grid, axes = [2, 3, 2, 4, 3, 4], [0, 2, 4, 1, 3, 5]
    expected = x.numpy().reshape(grid).transpose(axes)
    assert (onednn.reorder(x, grid, axes, paddle.float32).numpy() == expected).all()
    half = onednn.reorder(x, grid, axes, paddle.bfloat16)
    found = onednn.cast(half, paddle.float32).numpy()
    assert (abs(found - expected) <= abs(expected) * 2.0**-8).all()
    assert (np.frombuffer(found.tobytes(), "uint32") & 0xFFFF == 0).all()


@pytest.mark.parametrize("kept", ["111", "101", "011", "010", "000"])
def test_a_float32_block_of_real_width_equals_its_layers(kept, monkeypatch):
    block = ResBlock(dim=384, num_tokens=196)
    mask = paddle.to_tensor([2.0 * int(sample) for sample in kept]).reshape([3, 1, 1])
    monkeypatch.setattr(DropPath, "mask", lambda self, x: None if kept == "111" else mask)
    x = paddle.randn([3, 196, 384])
    for parameter in block.parameters():
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    found = outputs_and_gradients(block, x)
    monkeypatch.setattr(ops, "usable", lambda layer: False)
    for name, expected in outputs_and_gradients(block, x).items():
        close(found[name], expected, 1e-5)


_LOAD = """
import ctypes
from types import SimpleNamespace
real = ctypes.CDLL
def load(name, *args, **options):
    if "dnnl" in str(name):
        {}
    return real(name, *args, **options)
ctypes.CDLL = load
"""
_LOG = """
import logging, resmlp, paddle
from cpu import onednn
from cpu.ops import bfloat16
log = logging.getLogger("resmlp"); log.setLevel(20)
log.addHandler(logging.StreamHandler()); log.propagate = False
"""
_RUN = f"""{_LOG}
paddle.seed(0)
model = resmlp.ResMLP(32, 8, 3, 5, 16, 2)
images = paddle.randn([2, 3, 32, 32])
for wanted in (False, {{}}):
    with bfloat16(wanted):
        model.clear_gradients()
        y = model(images); (y * y).sum().backward()
        print(float(y.abs().sum()), *(float(p.grad.abs().sum()) for p in model.parameters()))
"""


def run(code, **environment):
    """The numbers that ``code`` printed, a row a line, and its log."""
    printed, log = run_code(code, **environment)
    return np.array([line.split() for line in printed.splitlines()], float), log


@pytest.fixture(scope="module")
def expected():
    """What is printed with oneDNN, in float32 and in bfloat16."""
    return run(_RUN.format(True))[0]


@pytest.mark.parametrize(
    "why, switch, code",
    [
        ("switched off (RESMLP_ONEDNN)", "off", ""),
        ("none in this Paddle", "on", 'raise OSError("no such file")'),
        ("version 4, not 3", "on", "return SimpleNamespace(dnnl_version=lambda: [4])"),
    ],
)
def test_without_the_library_one_line_says_why_and_no_result_changes(why, switch, code, expected):
    code = (_LOAD.format(code) if code else "") + _RUN.format("onednn.has(paddle.float32)")
    found, log = run(code, RESMLP_ONEDNN=switch)
    np.testing.assert_allclose(found, expected[[0, 0]], rtol=1e-5)
    assert log.count("Paddle's own layers") == 1 and why in log


@needs_onednn
def test_what_a_processor_lacks_is_computed_in_float32_and_said_once_each_reason(expected):
    """An AVX2 processor has no bfloat16 in oneDNN: insisted on, it is rounded to all the same."""
    old = {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
    found, log = run(_RUN.format(True), **old)
    np.testing.assert_allclose(found, expected, rtol=0.01)
    assert not np.allclose(found[0], found[1], rtol=1e-6)
    for operation in ("matmul", "eltwise", "binary"):
        assert log.count(f"oneDNN: {operation}") == 1, log


@needs_onednn
def test_its_threads_are_those_of_set_threads_and_one_may_go_on_after_the_main_one():
    code = """
import os, threading, time
from resmlp import paddle
from cpu import onednn
count = lambda: len(os.listdir("/proc/self/task"))
x = paddle.randn([512, 512])
before, end = count(), time.monotonic() + 30
onednn.product(x, x)
while count() - before != 2 and time.monotonic() < end:  # one that made it may still end
    pass
print(count() - before)
def work():
    threading.main_thread().join()
    print(int(onednn.product(paddle.ones([2, 3]), paddle.ones([3, 5])).sum()))
threading.Thread(target=work).start()
"""
    assert run(code, RESMLP_THREADS="3")[0].tolist() == [[2], [30]]


def test_where_slices_are_copies_the_layers_compute():
    code = "from resmlp import ResBlock, ops; print(int(ops.usable(ResBlock(8, 4))))"
    assert run(code, FLAGS_use_stride_kernel="0")[0].tolist() == [[0]]


@needs_onednn
def test_primitives_are_made_in_another_thread_than_tensors(monkeypatch):
    threads, set_threads = [], setup.set_threads

    def begin(count):  # what such a thread does first
        threads.append(threading.get_ident())
        return set_threads(count)

    monkeypatch.setattr(setup, "set_threads", begin)
    x = paddle.randn([3, 5, 61])  # a shape of its own
    onednn.multiply(onednn.product(x, x, transpose_b=True), paddle.ones([5]))
    onednn.cast(x, paddle.bfloat16), onednn.gelu(x)
    onednn.cast(x, paddle.bfloat16), onednn.gelu(x)  # those are there
    assert len(threads) == 4 and threading.get_ident() not in threads


@needs_onednn
def test_gelu_and_its_gradient_are_the_formulas_also_after_memory_was_short(monkeypatch):
    x = paddle.linspace(-6, 6, 201)
    with monkeypatch.context() as patch:
        patch.setattr(setup, "set_threads", mock.Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            onednn.gelu(x)
    exact = doubles(x)[0]
    close(onednn.gelu(x).numpy(), gelu(exact))
    slope = 0.5 * (1 + np.vectorize(erf)(exact / sqrt(2)))
    slope += exact * np.exp(-(exact**2) / 2) / sqrt(2 * pi)
    close(onednn.gelu_gradient(paddle.full_like(x, 3.0), x).numpy(), 3 * slope)


@needs_onednn
def test_nothing_is_computed_by_plain_loops():
    """oneDNN takes every form, and computes those it has no kernel for a thousand times slower: a
    multiplication of mixed types in some versions, which is made in float32 then.
    """
    code = """
from cpu import onednn
from resmlp import ResBlock, ops, paddle
for rate in (0.0, 0.5):
    block = ResBlock(32, 16, drop_path=rate)
    for half in (False, True):
        with ops.bfloat16(half): block(paddle.randn([4, 16, 32])).sum().backward()
x = onednn.cast(paddle.randn([4, 16, 32]), paddle.bfloat16)
onednn.multiply(x, paddle.randn([32]), dtype=paddle.float32)
"""
    printed, _ = run_code(code, ONEDNN_VERBOSE="1", DNNL_VERBOSE="1")
    calls = [line for line in printed.splitlines() if ",exec,cpu," in line]
    assert sum(",matmul," in line for line in calls) > 20
    assert not [line for line in calls if ",ref:" in line]
