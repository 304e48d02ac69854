"""`cpu.onednn`'s functions by Paddle's operators, which know float64: there no formula can hide."""

import math

import paddle
import paddle.nn.functional as F


def has(dtype):
    return True


def product(
    a, b, transpose_a=False, transpose_b=False, bias=None, gelu=False, then=(), dtype=None, out=None
):
    y = paddle.matmul(a, b, transpose_a, transpose_b)
    y = y if bias is None else y + bias
    return _finish(F.gelu(y) if gelu else y, then, out)


def multiply(a, b, then=(), dtype=None, out=None):
    return _finish(a * b, then, out)


def gelu(x):
    return F.gelu(x)


def gelu_gradient(gradient, x):
    density = paddle.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return gradient * (0.5 + 0.5 * paddle.erf(x / math.sqrt(2)) + x * density)


def cast(x, dtype, out=None):
    return _finish(x.astype(dtype), (), out)


def reorder(x, shape, axes, dtype, out=None):
    return x.reshape(shape).transpose(axes).astype(dtype)


def _finish(y, then, out):
    for name, other in then:
        y = y + other if name == "add" else y * other
    return y if out is None else paddle.assign(y, out)
