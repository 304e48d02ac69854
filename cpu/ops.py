"""ResMLP's operators for eager mode on a CPU: a block's two branches with hand-written gradients.

The same functions as the layers of `resmlp`, to rounding, in about half the time of a training
step. What the layers lose on a CPU, and what is done here instead:

- Affine and LayerScale sweep over ``[B, N, C]`` activations, forward and backward. Both are
  linear, so they are folded into the weights, and their gradients come out of the gradients of
  the folded weights.
- A bias gradient is a column sum, which Paddle's CPU reduction does ten to a hundred times slower
  than the same sum written as a product with a row of ones.
- The patch convolution is a matrix product, once the image is cut.
- Residual and bias additions ride along in the matrix product (``addmm``).

On a GPU the layers are used instead: there AMP casts each product, a fold of a LayerScale of 1e-6
would underflow in float16, and reductions are fast.

Letters as in `resmlp`: B batch, N tokens, C channels, H hidden units; M = B * N rows.
``w`` token weight [N, N]; a ``mask`` is what `resmlp.DropPath.mask` draws, [B, 1, 1] or None.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer
from paddle.autograd.py_layer import once_differentiable


def usable(layer) -> bool:
    """Whether the functions below compute what the parts of ``layer`` would.

    Not while a graph is traced or exported, not on a GPU, not with a dropout that is on, and not
    when someone listens to a part with a hook (which would never be called).
    """
    return (
        paddle.in_dynamic_mode()
        and paddle.get_device() == "cpu"
        and not any(
            part._forward_pre_hooks
            or part._forward_post_hooks
            or (isinstance(part, nn.Dropout) and part.training and part.p)
            for part in layer.sublayers()
        )
    )


def embed_patches(images, conv):
    """A convolution whose stride is its kernel, as a matrix product: ``[B, N, C]`` tokens."""
    patches = F.unfold(images, conv.weight.shape[2:], conv.weight.shape[2:])  # [B, 3 * p * p, N]
    return paddle.matmul(patches, conv.weight.flatten(1).t(), transpose_x=True) + conv.bias


def mix_tokens(x, norm, linear, layer_scale, mask):
    """``x + mask * layer_scale * linear(norm(x))``, linear over the token axis; ``[B, N, C]``."""
    parameters = norm.alpha, norm.beta, linear.weight, linear.bias, layer_scale
    if paddle.is_grad_enabled():
        return _MixTokens.apply(x, *parameters, mask)
    return _tokens_forward(x, *parameters, mask)[0]


def mix_channels(x, norm, mlp, layer_scale, mask):
    """``x + mask * layer_scale * mlp(norm(x))``; ``[B, N, C]``."""
    parameters = norm.alpha, norm.beta, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    if paddle.is_grad_enabled():
        return _MixChannels.apply(x, *parameters, layer_scale, mask)
    return _channels_forward(x, *parameters, layer_scale, mask, F.gelu)[0]


def _tokens_forward(x, alpha, beta, w, bias, scale, mask):
    """As ``(w^T x) * (alpha scale) + scale * (w^T beta + bias)``: a scale and a constant."""
    mixed = paddle.matmul(w, x, transpose_x=True)  # [B, N, C]
    constant = _outer(w.sum(0), beta.flatten()) + bias.unsqueeze(-1)  # [N, C]
    y = mixed * (alpha.flatten() * scale)
    y.add_(constant * scale)
    if mask is not None:
        y.multiply_(mask)
    return y.add_(x), mixed, constant


class _MixTokens(PyLayer):
    @staticmethod
    def forward(ctx, x, alpha, beta, w, bias, scale, mask):
        y, mixed, constant = _tokens_forward(x, alpha, beta, w, bias, scale, mask)
        ctx.save_for_backward(x, alpha, beta, w, scale, mask, mixed, constant)
        _remember_needed(ctx, x, alpha, beta, w, bias, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, alpha, beta, w, scale, mask, mixed, constant = ctx.saved_tensor()
        branch = (
            grad if mask is None else grad * mask
        )  # of (w^T x) * alpha scale + scale * constant
        d_product = _column_sum(branch * mixed)  # of alpha * scale, [C]
        d_constant = branch.sum(0)  # [N, C], before the LayerScale
        d_scale = d_product * alpha.flatten() + (d_constant * constant).sum(0)
        d_constant = d_constant * scale
        d_mixed = branch * (alpha.flatten() * scale)
        d_w = paddle.matmul(x, d_mixed, transpose_y=True).sum(0)  # [N, N]
        d_w += paddle.mv(d_constant, beta.flatten())  # the same for every input token
        return _only_needed(
            ctx,
            paddle.matmul(w, d_mixed).add_(grad),
            (d_product * scale).reshape(alpha.shape),
            paddle.matmul(w.sum(0), d_constant).reshape(beta.shape),
            d_w,
            d_constant.sum(1),
            d_scale,
        )


def _channels_forward(x, alpha, beta, w1, bias1, w2, bias2, scale, mask, gelu):
    """With alpha and beta in the first linear layer, and scale in the second."""
    folded1, folded2 = _scale_rows(alpha, w1), w2 * scale  # [C, H], [H, C]
    rows = x.reshape([-1, x.shape[-1]])  # [M, C]
    before = paddle.addmm(bias1 + paddle.matmul(beta.flatten(), w1), rows, folded1)  # [M, H]
    hidden = gelu(before)
    if mask is None:
        y = paddle.addmm(rows + bias2 * scale, hidden, folded2).reshape(x.shape)
    else:
        y = paddle.addmm(bias2 * scale, hidden, folded2).reshape(x.shape)
        y.multiply_(mask).add_(x)
    return y, before, hidden, folded1, folded2


class _MixChannels(PyLayer):
    @staticmethod
    def forward(ctx, x, alpha, beta, w1, bias1, w2, bias2, scale, mask):
        y, before, hidden, folded1, folded2 = _channels_forward(
            x, alpha, beta, w1, bias1, w2, bias2, scale, mask, _recorded_gelu
        )
        ctx.save_for_backward(x, alpha, beta, w1, w2, bias2, scale, mask, folded1, folded2)
        ctx.gelu = before, hidden
        _remember_needed(ctx, x, alpha, beta, w1, bias1, w2, bias2, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, alpha, beta, w1, w2, bias2, scale, mask, folded1, folded2 = ctx.saved_tensor()
        before, hidden = ctx.gelu
        del ctx.gelu
        channels = x.shape[-1]
        branch = (grad if mask is None else grad * mask).reshape([-1, channels])  # [M, C]
        d_folded2 = paddle.matmul(hidden.detach(), branch, transpose_x=True)  # [H, C]
        d_bias2 = _column_sum(branch)  # of bias2 * scale
        d_hidden = paddle.matmul(branch, folded2, transpose_y=True)  # [M, H]
        (d_before,) = paddle.grad(hidden, before, d_hidden)
        del before, hidden, d_hidden  # the largest activations: free them before the next product
        d_folded1 = paddle.matmul(x.reshape([-1, channels]), d_before, transpose_x=True)  # [C, H]
        d_bias1 = _column_sum(d_before)
        d_x = paddle.addmm(grad.reshape([-1, channels]), d_before, folded1.t())
        return _only_needed(
            ctx,
            d_x.reshape(x.shape),
            _row_sum(d_folded1 * w1).reshape(alpha.shape),
            paddle.mv(w1, d_bias1).reshape(beta.shape),
            _scale_rows(alpha, d_folded1).add_(_outer(beta.flatten(), d_bias1)),
            d_bias1,
            d_folded2 * scale,
            d_bias2 * scale,
            _column_sum(d_folded2 * w2) + d_bias2 * bias2,
        )


def _recorded_gelu(before):
    """GELU with its graph, so that its gradient is Paddle's own."""
    before.stop_gradient = False
    with paddle.enable_grad():
        return F.gelu(before)


def _column_sum(x):
    """The sum over all axes but the last, as a product with ones: ``[..., C] -> [C]``."""
    rows = x.reshape([-1, x.shape[-1]])
    return paddle.matmul(paddle.ones([rows.shape[0]], x.dtype), rows)


def _row_sum(x):
    return paddle.mv(x, paddle.ones([x.shape[1]], x.dtype))


def _outer(a, b):
    return paddle.matmul(a.reshape([-1, 1]), b.reshape([1, -1]))


def _scale_rows(a, x):
    """``a[i] * x[i]``, without the broadcast of ``[C, 1]``, which is slow."""
    return _outer(a, paddle.ones([x.shape[1]], x.dtype)).multiply_(x)


def _remember_needed(ctx, *inputs):
    """Notes which inputs want a gradient: Paddle insists on None for the others (frozen layers)."""
    ctx.needed = [not tensor.stop_gradient for tensor in inputs]


def _only_needed(ctx, *gradients):
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, ctx.needed))
