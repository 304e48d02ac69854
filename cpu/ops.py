"""ResMLP's operators for eager mode on a CPU: a block's two branches with hand-written gradients.

The same functions as the layers of `resmlp`, to rounding, in about half the time of a training
step. What the layers lose, and what is done instead:

- Affine and LayerScale sweep over ``[B, N, C]``, forward and backward. Both are linear, so they are
  folded into the weights, and their gradients come out of those of the folded weights.
- Paddle's CPU reduction takes ten to a hundred times as long for a bias gradient (a column sum) as
  a product with a row of ones.
- The patch convolution is a matrix product, once the image is cut.
- GELU runs on one thread; oneDNN (`onednn`) has it on all, and with it what follows a product.
- Drop path multiplies by 0 what was computed; here only the kept samples are computed.
- Within `bfloat16`, products read bfloat16 and accumulate in float32; the hidden units and their
  gradient are bfloat16; folds, parameters, gradients and the residual stream stay float32.

`paddle.grad` must ask for the gradients of all trained parameters: Paddle lets a PyLayer leave out
none. On a GPU the layers are used instead: a fold of a LayerScale of 1e-6 would underflow in
float16, and reductions are fast.

Letters as in `resmlp`: B batch, N tokens, C channels, H hidden units; M = B * N rows. ``w`` token
weight [N, N]; a ``mask`` is what `resmlp.DropPath.mask` draws, [B, 1, 1] or None.
"""

from __future__ import annotations

import contextlib
import functools
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable

from cpu import onednn, setup

_LAYERS = (nn.Linear, nn.Conv2D, nn.Dropout)  # Paddle's, of which a model is made
_SLICES_ARE_VIEWS = "FLAGS_use_stride_kernel"
_precision = ContextVar("precision", default=paddle.float32)


@contextlib.contextmanager
def bfloat16(wanted: bool = True):
    """Mixed precision within the functions below; a backward pass goes by its forward pass."""
    token = _precision.set(paddle.bfloat16 if wanted else paddle.float32)
    try:
        yield
    finally:
        _precision.reset(token)


def choose_precision(dtype: str) -> tuple[str, str]:
    """What AMP with an AMP_DTYPE computes in on a CPU, and a line that says so. ``bfloat16``
    insists; ``auto`` and float16, which no CPU computes fast, mean bfloat16 where that is fast.
    """
    if not onednn.has(paddle.float32):
        return "float32", "AMP: no mixed precision on a CPU without oneDNN, running in float32"
    if setup.has_fast_bfloat16():
        meaning = ", which AMP_DTYPE float16 means on a CPU" if dtype == "float16" else ""
        return "bfloat16", f"AMP: bfloat16{meaning}"
    if dtype == "bfloat16":
        return "bfloat16", "AMP: bfloat16 as AMP_DTYPE says, which this processor computes slowly"
    return "float32", "AMP: no fast bfloat16 here (AMP_DTYPE bfloat16 insists), running in float32"


def usable(layer) -> bool:
    """Whether the functions below compute what the parts of ``layer`` would.

    Not in a graph being traced or exported, on a GPU, without oneDNN (no float64), with active
    dropout, or where a part has hooks (never called) or another layer in its place (LoRA,
    quantization); nor where slices are copies, which cannot be written into (a Paddle flag).
    """
    return (
        paddle.in_dynamic_mode()
        and paddle.get_device() == "cpu"
        and paddle.get_flags(_SLICES_ARE_VIEWS)[_SLICES_ARE_VIEWS]
        and not any(
            part._forward_pre_hooks
            or part._forward_post_hooks
            or (isinstance(part, nn.Dropout) and part.training and part.p)
            or not (type(part) in _LAYERS or type(part).__module__ == "resmlp")
            or (isinstance(part, (nn.Linear, nn.Conv2D)) and not onednn.has(part.weight.dtype))
            for part in layer.sublayers()
        )
    )


def embed_patches(images, conv):
    """A convolution whose stride is its kernel, as a matrix product: ``[B, N, C]`` tokens."""
    height, width = conv.weight.shape[2:]
    batch, channels, *sizes = images.shape
    if _wants_gradient(images) or sizes[0] % height or sizes[1] % width:
        return conv(images).flatten(2).transpose([0, 2, 1])
    grid = [batch, channels, sizes[0] // height, height, sizes[1] // width, width]
    rows = onednn.reorder(images, grid, [0, 2, 4, 1, 3, 5], _narrow_type(images))
    rows = rows.reshape([-1, channels * height * width])  # [M, 3 * patch]
    y = _run(_Linear, rows, conv.weight.flatten(1).t(), conv.bias)
    return y.reshape([batch, -1, y.shape[-1]])


def mix_tokens(x, norm, linear, layer_scale, mask):
    """``x + mask * layer_scale * linear(norm(x))``, linear over the token axis; ``[B, N, C]``."""
    kept, scale = _kept(mask, layer_scale)
    parameters = norm.alpha, norm.beta, linear.weight, linear.bias, scale
    return _run(_MixTokens, x, *parameters, kept=kept)


def mix_channels(x, norm, mlp, layer_scale, mask):
    """``x + mask * layer_scale * mlp(norm(x))``; ``[B, N, C]``."""
    kept, scale = _kept(mask, layer_scale)
    parameters = norm.alpha, norm.beta, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    return _run(_MixChannels, x, *parameters, scale, kept=kept)


class _NoGradient:
    """In the place of a PyLayer's context, where no backward pass will come."""

    def save_for_backward(self, *_):
        pass


def _run(branch, *tensors, **options):
    if _wants_gradient(*tensors):
        return branch.apply(*tensors, **options)
    return branch.forward(_NoGradient(), *tensors, **options)


class _Linear(PyLayer):
    """``rows @ weight + bias``, of rows that want no gradient."""

    @staticmethod
    def forward(ctx, rows, weight, bias):
        _remember_needed(ctx, rows, weight, bias)
        ctx.save_for_backward(rows)
        return onednn.product(rows, _narrow(weight), bias=bias, dtype=bias.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensor()
        d_weight = _weight_gradient(rows, _cast(grad, rows.dtype), grad.dtype)
        return _only_needed(ctx, None, d_weight, _column_sum(grad))


class _Kept(NamedTuple):
    """Which samples of a batch drop path keeps. None instead of it: all."""

    weights: paddle.Tensor  # [B]: 1 for each of them, 0 for the others
    count: int
    runs: list  # of neighbours: a slice of the batch, and of the kept samples or None


def _kept(mask, layer_scale) -> tuple[_Kept | None, paddle.Tensor]:
    """The samples, and the LayerScale with drop path's own scale of what is added to them."""
    if mask is None:
        return None, layer_scale
    mask = mask.numpy().flatten()
    scale = float(mask.max())
    if not scale:
        mask[0] = 1.0  # nothing is kept: one sample, times a scale of 0, has all gradients, of 0
    runs, count = [], 0
    edges = [0, *(int(i) + 1 for i in np.flatnonzero(np.diff(mask))), len(mask)]
    for start, stop in zip(edges, edges[1:]):
        own = slice(count, count + stop - start) if mask[start] else None
        count = own.stop if own else count
        runs.append((slice(start, stop), own))
    weights = paddle.to_tensor((mask > 0).astype(mask.dtype))
    return _Kept(weights, count, runs) if count < len(mask) else None, layer_scale * scale


def _take(x, kept, dtype):
    if kept is None:
        return _cast(x, dtype)
    y = paddle.empty([kept.count, *x.shape[1:]], dtype)
    for place, own in kept.runs:
        if own:
            _cast(x[place], dtype, y[own])
    return y


def _add_branch(x, kept, branch):
    """``x`` with a branch added to the kept samples; ``branch`` computes a slice of them and takes
    ``then``, ``dtype`` and ``out`` of `onednn.product`.
    """
    if kept is None:
        return branch(slice(None), then=[("add", x)], dtype=x.dtype)
    y = paddle.empty_like(x)
    for place, own in kept.runs:
        if own:
            branch(own, then=[("add", x[place])], dtype=x.dtype, out=y[place])
        else:
            _cast(x[place], x.dtype, y[place])
    return y


class _MixTokens(PyLayer):
    @staticmethod
    def forward(ctx, x, alpha, beta, w, bias, scale, kept):
        """As ``(w^T x) * (alpha scale) + scale * (w^T beta + bias)``: a scale and a constant."""
        factor, sums = alpha.flatten() * scale, _column_sum(w)
        constant = _outer(sums, beta.flatten()) + bias.unsqueeze(-1)  # [N, C]
        narrow_w, narrow_x = _narrow(w), _take(x, kept, _narrow_type(x))
        ctx.save_for_backward(narrow_x, narrow_w, factor, sums, constant, alpha, beta, scale)
        ctx.kept = kept
        _remember_needed(ctx, x, alpha, beta, w, bias, scale)
        first = [("multiply", factor), ("add", constant * scale)]

        def branch(part, then, **result):
            then = [*first, *then]
            return onednn.product(narrow_w, narrow_x[part], transpose_a=True, then=then, **result)

        return _add_branch(x, kept, branch)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, narrow_w, factor, sums, constant, alpha, beta, scale = ctx.saved_tensor()
        kept = ctx.kept
        branch = _take(grad, kept, x.dtype)  # of (w^T x) * factor + scale * constant
        back = onednn.product(narrow_w, branch)  # [kept, N, C], of x * factor
        d_factor = _column_sum(onednn.multiply(back, x))  # [C]
        d_constant = _batch_sum(grad, kept and kept.weights)  # [N, C], before the LayerScale
        d_scale = d_factor * alpha.flatten() + _column_sum(d_constant * constant)
        d_constant = d_constant * scale
        d_w = onednn.product(x, onednn.multiply(branch, factor), transpose_b=True, dtype=grad.dtype)
        d_w = _batch_sum(d_w)  # [B, N, N] -> [N, N]
        d_w += paddle.mv(d_constant, beta.flatten())  # the same for every input token
        back = _cast(back, grad.dtype)

        def last(part, **result):
            return onednn.multiply(back[part], factor, **result)

        return _only_needed(
            ctx,
            _add_branch(grad, kept, last),
            (d_factor * scale).reshape(alpha.shape),
            paddle.matmul(sums, d_constant).reshape(beta.shape),
            d_w,
            _row_sum(d_constant),
            d_scale,
        )


class _MixChannels(PyLayer):
    @staticmethod
    def forward(ctx, x, alpha, beta, w1, bias1, w2, bias2, scale, kept):
        """With alpha and beta in the first linear layer, and scale in the second."""
        _remember_needed(ctx, x, alpha, beta, w1, bias1, w2, bias2, scale)
        folded1 = _narrow(_scale_rows(alpha, w1))  # [C, H]
        folded2 = _narrow(onednn.multiply(w2, scale))  # [H, C]
        narrow = _take(x, kept, _narrow_type(x))
        first_bias = bias1 + paddle.matmul(beta.flatten(), w1)
        if isinstance(ctx, _NoGradient):
            hidden = onednn.product(narrow, folded1, bias=first_bias, gelu=True)
        else:
            before = onednn.product(narrow, folded1, bias=first_bias)  # [kept, N, H]
            hidden = onednn.gelu(before)
            ctx.save_for_backward(narrow, alpha, beta, w1, w2, bias2, scale, folded1, folded2)
            ctx.kept, ctx.hidden = kept, (hidden, before)
        bias = bias2 * scale

        def branch(part, **last):
            return onednn.product(hidden[part], folded2, bias=bias, **last)

        return _add_branch(x, kept, branch)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, alpha, beta, w1, w2, bias2, scale, folded1, folded2 = ctx.saved_tensor()
        hidden, before = ctx.hidden
        del ctx.hidden
        branch = _take(grad, ctx.kept, x.dtype)  # [kept, N, C]
        d_folded2 = _weight_gradient(hidden, branch, grad.dtype)  # [H, C]
        del hidden  # the largest activations: freed as soon as they can be
        d_bias2 = _column_sum(branch)  # of bias2 * scale
        d_hidden = onednn.product(branch, folded2, transpose_b=True)
        d_before = onednn.gelu_gradient(d_hidden, before)  # [kept, N, H]
        del before
        d_folded1 = _weight_gradient(x, d_before, grad.dtype)  # [C, H]
        d_bias1 = _column_sum(d_before)

        def back(part, **last):
            return onednn.product(d_before[part], folded1, transpose_b=True, **last)

        return _only_needed(
            ctx,
            _add_branch(grad, ctx.kept, back),
            _row_sum(d_folded1 * w1).reshape(alpha.shape),
            paddle.mv(w1, d_bias1).reshape(beta.shape),
            _scale_rows(alpha, d_folded1).add_(_outer(beta.flatten(), d_bias1)),
            d_bias1,
            onednn.multiply(d_folded2, scale),
            d_bias2 * scale,
            _column_sum(d_folded2 * w2) + d_bias2 * bias2,
        )


def _weight_gradient(x, grad, dtype):
    return onednn.product(_rows(x), _rows(grad), transpose_a=True, dtype=dtype)


def _narrow(x):
    """``x`` in the precision of products, see `bfloat16`; float64 stays."""
    return _cast(x, _narrow_type(x))


def _narrow_type(x):
    return _precision.get() if x.dtype == paddle.float32 else x.dtype


def _cast(x, dtype, out=None):
    return x if x.dtype == dtype and out is None else onednn.cast(x, dtype, out)


def _column_sum(x):
    """The sum over all axes but the last, as a product with ones: ``[..., C] -> [C]``."""
    rows = _rows(x)
    ones = _ones(rows.shape[0], x.dtype)
    if x.dtype != paddle.bfloat16:
        return paddle.matmul(ones, rows)
    return onednn.product(rows, ones.unsqueeze(1), transpose_a=True, dtype=paddle.float32).flatten()


def _batch_sum(x, weights=None):
    """The sum over the first axis, likewise, of ``weights * x``; not for bfloat16."""
    weights = _ones(x.shape[0], x.dtype) if weights is None else weights
    return paddle.matmul(weights, x.reshape([x.shape[0], -1])).reshape(x.shape[1:])


def _row_sum(x):
    return paddle.mv(x, _ones(x.shape[1], x.dtype))


@functools.cache
def _ones(count, dtype):
    return paddle.ones([count], dtype)


def _rows(x):
    return x.reshape([-1, x.shape[-1]])


def _outer(a, b):
    return paddle.matmul(a.reshape([-1, 1]), b.reshape([1, -1]))


def _scale_rows(a, x):
    """``a[i] * x[i]``, seen as ``[1, rows, rest]``, whose middle axis oneDNN takes for channels."""
    return onednn.multiply(x.reshape([1, a.size, -1]), a.reshape([1, -1, 1])).reshape(x.shape)


def _wants_gradient(*inputs):
    """Whether a backward pass may come; a frozen layer on frozen ones is run as in evaluation."""
    return paddle.is_grad_enabled() and not all(tensor.stop_gradient for tensor in inputs)


def _remember_needed(ctx, *inputs):
    """Notes which inputs want a gradient: Paddle insists on None for the others (frozen layers)."""
    ctx.needed = [not tensor.stop_gradient for tensor in inputs]


def _only_needed(ctx, *gradients):
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, ctx.needed))
