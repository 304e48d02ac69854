"""A GPU that is not there: its branches are run on a CPU, in half precision. Stand-ins are what
tells of a GPU and kernels that a CPU has in float32 alone; the rest is Paddle's own.
"""

from __future__ import annotations

import importlib
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
from cpu import ops  # isort: skip

import paddle
import paddle.nn.functional as F
from paddle.base import core

from parallel import process

HALF = (paddle.float16, paddle.bfloat16)
CAPABILITY = {"float16": (7, 5), "bfloat16": (8, 0)}  # what AMP_DTYPE auto goes by


class _Place:
    def __init__(self, tracer):
        object.__setattr__(self, "tracer", tracer)

    _expected_place = property(lambda self: self)

    def is_gpu_place(self):
        return True

    def is_xpu_place(self):
        return False

    is_custom_place = is_xpu_place

    def __getattr__(self, name):
        return getattr(self.tracer, name)

    def __setattr__(self, name, value):
        setattr(self.tracer, name, value)


def _widely(function, *tensors, to=None):
    """``function`` in float32 and without AMP; the result in the type ``to``."""
    tracer = paddle.base.framework._dygraph_tracer()
    level, tracer._amp_level = tracer._amp_level, core.AmpLevel.O0
    try:
        y = function(*(t.astype("float32") if isinstance(t, paddle.Tensor) else t for t in tensors))
        return y if to is None else y.astype(to)
    finally:
        tracer._amp_level = level


def _as_amp_does(function, *tensors):
    """An operator on AMP's white list: inputs are cast, sums are float32, the result is half."""
    tracer = paddle.base.framework._dygraph_tracer()
    half = next((t.dtype for t in tensors if t.dtype in HALF), None)
    if tracer._amp_level == core.AmpLevel.O1:
        half = getattr(paddle, tracer._amp_dtype)
    if half is None:
        return function(*tensors)
    return _widely(function, *(_widely(lambda x: x, t, to=half) for t in tensors), to=half)


def _arithmetic(original):
    def call(self, other):
        types = [t.dtype for t in (self, other) if isinstance(t, paddle.Tensor)]
        if not any(dtype in HALF for dtype in types):
            return original(self, other)
        to = types[0] if len(set(types)) == 1 else paddle.float32  # AMP promotes to the wider one
        return _widely(original, self, other, to=to)

    return call


def install(set_attribute=setattr, capability=(8, 0), count: int = 1) -> None:
    """Puts the stand-ins in place, for ``count`` GPUs; ``set_attribute`` may be monkeypatch's."""
    matmul, linear, gelu = paddle.matmul, F.linear, F.gelu
    tracer = paddle.base.framework._dygraph_tracer

    def half_matmul(x, y, transpose_x=False, transpose_y=False, name=None):
        return _as_amp_does(lambda a, b: matmul(a, b, transpose_x, transpose_y), x, y)

    def half_linear(layer, x):
        if paddle.__version__.startswith("2."):  # the sum is no part of the product there
            return half_matmul(x, layer.weight) + layer.bias
        return _as_amp_does(linear, x, layer.weight, layer.bias)

    def half_conv(layer, x):
        def product(images, weight):
            return F.conv2d(images, weight, None, layer._stride)

        return _as_amp_does(product, x, layer.weight) + layer.bias.reshape([1, -1, 1, 1])

    def half_gelu(x, approximate=False, name=None):
        return _widely(gelu, x, to=x.dtype) if x.dtype in HALF else gelu(x, approximate)

    set_attribute(paddle, "matmul", half_matmul)
    set_attribute(F, "gelu", half_gelu)
    set_attribute(paddle.nn.Linear, "forward", half_linear)
    set_attribute(paddle.nn.Conv2D, "forward", half_conv)
    for name in ("__add__", "__radd__", "__mul__", "__rmul__"):
        set_attribute(paddle.Tensor, name, _arithmetic(getattr(paddle.Tensor, name)))
    for name in ("paddle.amp.auto_cast", "paddle.amp.grad_scaler"):
        set_attribute(importlib.import_module(name), "_dygraph_tracer", lambda: _Place(tracer()))
    amp = importlib.import_module("paddle.amp.auto_cast")
    set_attribute(amp, "_is_gpu_bfloat16_supported", lambda: capability >= (8, 0))
    set_attribute(amp, "_is_gpu_float16_supported", lambda: capability >= (7, 0))
    set_attribute(paddle.device.cuda, "get_device_capability", lambda *_: capability)
    set_attribute(paddle.device.cuda, "max_memory_allocated", lambda *_: 2**20)
    set_attribute(paddle, "get_device", lambda: "gpu:0")
    set_attribute(paddle, "CUDAPinnedPlace", paddle.CPUPlace)
    set_attribute(paddle.Tensor, "cuda", lambda tensor, blocking: tensor.clone())
    set_device = paddle.set_device
    set_attribute(paddle, "set_device", lambda device: set_device("cpu"))

    def gpu_count():
        if "PADDLE_TRAINER_ID" in os.environ:  # of a spawned rank; Paddle's GPU builds set it
            os.environ.setdefault("FLAGS_selected_gpus", "0")
        return count

    set_attribute(process, "gpu_count", gpu_count)
    set_attribute(ops, "usable", lambda layer: False)


if "HALF" in os.environ:  # main_multi_gpu.py on two GPUs; spawned ranks import this file again
    install(capability=CAPABILITY[os.environ["HALF"]], count=2)
    from training import precision

    precision.FLOAT16_LOSS_SCALE = 2.0**10
    if __name__ == "__main__":
        import main_multi_gpu
        from cli.errors import run_as_script

        run_as_script(main_multi_gpu.main)
