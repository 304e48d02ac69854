"""The exact inference form of a ResMLP: every Affine and LayerScale folded into a linear layer.

Both are linear per channel, so at inference they commute into their neighbours: the same
function with fewer sweeps over the activations. `tools/export` writes this form.
"""

from __future__ import annotations

import copy

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from resmlp import ResBlock, ResMLP


class FoldedBlock(nn.Layer):
    """``x + (W x) * scale + bias``, then ``x + fc2(gelu(fc1(x)))``; folded in float64."""

    def __init__(self, block: ResBlock):
        super().__init__()
        alpha1, beta1 = _value(block.norm1.alpha).ravel(), _value(block.norm1.beta).ravel()
        alpha2, beta2 = _value(block.norm2.alpha).ravel(), _value(block.norm2.beta).ravel()
        ls1, ls2 = _value(block.ls1), _value(block.ls2)
        tokens, tokens_bias = map(_value, (block.linear_tokens.weight, block.linear_tokens.bias))
        fc1, fc2 = block.mlp_channels.fc1, block.mlp_channels.fc2
        # ls1 * (W^T (alpha1 x + beta1) + b) = (W^T x) * (ls1 alpha1) + ls1 * (W^T 1 beta1 + b)
        constant = np.outer(tokens.sum(0), beta1) + tokens_bias[:, None]  # [N, C]
        self.token_weight = _parameter(self, tokens.T)  # [N, N], applied from the left
        self.token_scale = _parameter(self, ls1 * alpha1)  # [C]
        self.token_bias = _parameter(self, ls1 * constant)  # [N, C]
        self.fc1 = _folded_linear(fc1, scale_in=alpha2, shift_in=beta2)
        self.fc2 = _folded_linear(fc2, scale_out=ls2)

    def forward(self, x):
        x = x + (paddle.matmul(self.token_weight, x) * self.token_scale + self.token_bias)
        return x + self.fc2(F.gelu(self.fc1(x)))  # [B, N, C]


def fold(model: ResMLP) -> ResMLP:
    """A model's exact inference form, float32 and in eval mode; it shares nothing with the model.

    The output is the same to 1e-6 relative. Its blocks have plain layers and operators only, so
    that ``paddle.jit.save`` takes it.
    """
    folded = copy.deepcopy(model)
    folded.mixer_layers = nn.LayerList([FoldedBlock(block) for block in model.mixer_layers])
    if isinstance(model.head, nn.Linear):  # else it returns the normalised features
        alpha, beta = _value(model.norm.alpha).ravel(), _value(model.norm.beta).ravel()
        folded.norm = nn.Identity()
        folded.head = _folded_linear(model.head, scale_in=alpha, shift_in=beta)
    folded.eval()
    for parameter in folded.parameters():
        parameter.stop_gradient = True
    return folded


def _value(parameter) -> np.ndarray:
    """A parameter's value in float64: products of folded weights are rounded once."""
    return parameter.astype("float32").numpy().astype(np.float64)


def _parameter(layer: nn.Layer, value: np.ndarray):
    parameter = layer.create_parameter(list(value.shape), dtype="float32")
    parameter.set_value(value.astype(np.float32))
    return parameter


def _folded_linear(linear: nn.Linear, scale_in=1.0, shift_in=0.0, scale_out=1.0) -> nn.Linear:
    """``scale_out * linear(scale_in * x + shift_in)`` as one linear layer."""
    weight, bias = _value(linear.weight), _value(linear.bias)  # [in, out], [out]
    scale_in, shift_in = (np.broadcast_to(value, len(weight)) for value in (scale_in, shift_in))
    folded = nn.Linear(*weight.shape)
    folded.weight.set_value((scale_in[:, None] * weight * scale_out).astype(np.float32))
    folded.bias.set_value(((bias + shift_in @ weight) * scale_out).astype(np.float32))
    return folded
