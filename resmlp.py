"""ResMLP in Paddle: residual blocks of a token-mixing linear layer and a channel MLP.

Paper: "ResMLP: Feedforward networks for image classification with data-efficient training"
(arXiv 2105.03404). The official code is ``resmlp_models.py`` of facebookresearch/deit. Parameter
names are PPViT's, so that its published weight files load unchanged.

Letters in shape comments: B batch, N tokens (patches), C channels (embed_dim), H hidden units,
K classes.
"""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip  (prepares the process, before Paddle is imported)

import math

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Constant, Normal, Uniform

from cli.errors import ConfigError
from cpu import ops
from storage.adapt import load_pretrained, load_state  # noqa: F401  (a part of this module's API)
from storage.weights import read_weights  # noqa: F401

setup.set_threads()


def default_layer_scale(depth: int) -> float:
    """LayerScale's start (CaiT, arXiv 2103.17239, section 3, which ResMLP follows)."""
    if depth <= 18:
        return 0.1
    return 1e-5 if depth <= 24 else 1e-6


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer initialised as in the official code: normal 0.02, zero bias.

    (Its ``trunc_normal_`` cuts at -2 and 2, a hundred deviations away.)
    """
    return nn.Linear(in_features, out_features, Normal(std=0.02), Constant(0.0))


class Affine(nn.Layer):
    """``alpha * x + beta`` per channel: ResMLP's replacement for LayerNorm (paper, eq. 1)."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = self.create_parameter([1, 1, dim], default_initializer=Constant(1.0))
        self.beta = self.create_parameter([1, 1, dim], default_initializer=Constant(0.0))

    def forward(self, x):
        return self.alpha * x + self.beta


class DropPath(nn.Layer):
    """Stochastic depth (arXiv 1603.09382): in training drops a sample's residual branch with
    probability ``rate``, and scales what is kept by 1/(1-rate).
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def mask(self, x):
        """Draws 0 or 1/(1-rate) for every sample, ``[B, 1, 1]``; None where nothing is dropped."""
        if not self.training or self.rate == 0.0:
            return None
        keep = 1.0 - self.rate
        return (paddle.rand([x.shape[0], 1, 1]) < keep).astype(x.dtype) / keep

    def forward(self, x):
        mask = self.mask(x)
        return x if mask is None else x * mask

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class PatchEmbedding(nn.Layer):
    """Cuts the image into patches and embeds each: a convolution whose stride is its kernel."""

    def __init__(self, image_size: int, patch_size: int, in_channels: int, embed_dim: int):
        super().__init__()
        self.grid_size = image_size // patch_size  # patches along a side
        self.num_patches = self.grid_size**2
        # PyTorch's default for a convolution, which the official code leaves in place.
        bound = 1.0 / math.sqrt(in_channels * patch_size**2)
        self.patch_embed = nn.Conv2D(
            in_channels,
            embed_dim,
            kernel_size=patch_size,
            stride=patch_size,
            weight_attr=Uniform(-bound, bound),
            bias_attr=Uniform(-bound, bound),
        )

    def forward(self, images):
        if ops.usable(self):  # the same function, faster on a CPU
            return ops.embed_patches(images, self.patch_embed)
        x = self.patch_embed(images)  # [B, 3, height, width] -> [B, C, grid, grid]
        return x.flatten(2).transpose([0, 2, 1])  # -> [B, N, C]


class Mlp(nn.Layer):
    """The channel MLP: C -> H -> C with GELU between, dropout after each linear layer."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = _linear(dim, hidden_dim)
        self.fc2 = _linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = self.dropout(F.gelu(self.fc1(x)))  # [B, N, C] -> [B, N, H]
        return self.dropout(self.fc2(x))  # -> [B, N, C]


class ResBlock(nn.Layer):
    """One ResMLP layer: a linear layer mixes tokens, an MLP channels (paper, eq. 2-3)."""

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        mlp_ratio: float = 4.0,
        layer_scale_init: float = 0.1,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = Affine(dim)
        self.linear_tokens = _linear(num_tokens, num_tokens)
        self.norm2 = Affine(dim)
        self.mlp_channels = Mlp(dim, int(dim * mlp_ratio), dropout)
        self.ls1 = self.create_parameter([dim], default_initializer=Constant(layer_scale_init))
        self.ls2 = self.create_parameter([dim], default_initializer=Constant(layer_scale_init))
        self.drop_path = DropPath(drop_path)

    def mix_tokens(self, x):
        """``W^T x + b`` over the token axis, from the left: no transposed copy of ``x``."""
        weight, bias = self.linear_tokens.weight, self.linear_tokens.bias
        return paddle.matmul(weight, x, transpose_x=True) + bias.unsqueeze(-1)  # [B, N, C]

    def forward(self, x):
        if ops.usable(self):  # the same function, faster on a CPU
            mask = self.drop_path.mask
            x = ops.mix_tokens(x, self.norm1, self.linear_tokens, self.ls1, mask(x))
            return ops.mix_channels(x, self.norm2, self.mlp_channels, self.ls2, mask(x))
        x = x + self.drop_path(self.ls1 * self.mix_tokens(self.norm1(x)))
        return x + self.drop_path(self.ls2 * self.mlp_channels(self.norm2(x)))


class ResMLP(nn.Layer):
    """ResMLP image classifier; ConfigError if the patches do not fill the image.

    Args:
        image_size, patch_size: height and width, pixels.
        num_classes: K; 0 leaves out the head, and the model returns features ``[B, C]``.
        layer_scale_init: None chooses by depth (`default_layer_scale`).
        drop_path: rate of stochastic depth, the same for every block (official code).
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        layer_scale_init: float | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ConfigError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        if layer_scale_init is None:
            layer_scale_init = default_layer_scale(depth)
        self.image_size = image_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.recompute = False  # recompute activations in backward (TRAIN.RECOMPUTE)
        self.patch_embed = PatchEmbedding(image_size, patch_size, in_channels, embed_dim)
        tokens = self.patch_embed.num_patches
        self.mixer_layers = nn.LayerList(
            ResBlock(embed_dim, tokens, mlp_ratio, layer_scale_init, dropout, drop_path)
            for _ in range(depth)
        )
        self.norm = Affine(embed_dim)
        self.head = _linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def freeze(self, part: int | str) -> None:
        """Takes layers out of training: no gradient, not in the optimizer, no drop path or dropout.

        ``part``: N, the patch embedding and the first N blocks; or ``backbone``, all but the head.
        """
        layers = [self.patch_embed, *self.mixer_layers, self.norm]
        if part != "backbone":
            layers = layers[: part + 1] if part else []
        for layer in layers:
            for parameter in layer.parameters():
                parameter.stop_gradient = True
            for inner in layer.sublayers():
                if isinstance(inner, DropPath):
                    inner.rate = 0.0
                elif isinstance(inner, nn.Dropout):
                    inner.p = 0.0

    def forward_features(self, images):
        """Images ``[B, 3, height, width]`` -> the mean of the normalised tokens, ``[B, C]``."""
        wanted, found = [self.in_channels, *[self.image_size] * 2], list(images.shape[1:])
        if any(size > 0 and size != want for size, want in zip(found, wanted)):  # -1: unknown
            raise ConfigError(
                f"the model takes images [B, {', '.join(map(str, wanted))}], found "
                f"{list(images.shape)}: resize the images, or build the model for that size "
                f"(DATA.IMAGE_SIZE) and resample its weights (MODEL.RESIZE_TOKENS)"
            )
        x = self.patch_embed(images)
        for block in self.mixer_layers:
            # Where nothing is trained before it, recomputing would cost a block its gradients.
            if self.recompute and self.training and not x.stop_gradient:
                x = paddle.distributed.fleet.utils.recompute(block, x)
            else:
                x = block(x)
        # The mean of the affine is the affine of the mean, and that is N times less work.
        return self.norm(x.mean(axis=1, keepdim=True)).squeeze(1)

    def forward(self, images):
        """Images ``[B, 3, height, width]``, normalised -> logits ``[B, K]``."""
        return self.head(self.forward_features(images))


def build_resmlp(config) -> ResMLP:
    """Builds the model of ``config.MODEL``; ConfigError while MODEL.NUM_CLASSES is ``auto``."""
    if config.MODEL.NUM_CLASSES == "auto":
        raise ConfigError(
            "MODEL.NUM_CLASSES is auto, and only a run counts the classes of its data: set the "
            "number (-opts MODEL.NUM_CLASSES 5), or use the config.yaml of a run"
        )
    model = ResMLP(
        image_size=config.DATA.IMAGE_SIZE,
        patch_size=config.MODEL.MIXER.PATCH_SIZE,
        in_channels=config.DATA.IMAGE_CHANNELS,
        num_classes=config.MODEL.NUM_CLASSES,
        embed_dim=config.MODEL.MIXER.EMBED_DIM,
        depth=config.MODEL.MIXER.DEPTH,
        mlp_ratio=config.MODEL.MIXER.MLP_RATIO,
        layer_scale_init=config.MODEL.MIXER.LAYER_SCALE_INIT,
        dropout=config.MODEL.DROPOUT,
        drop_path=config.MODEL.DROPPATH,
    )
    model.recompute = config.TRAIN.RECOMPUTE
    model.freeze(config.TRAIN.FREEZE)
    return model


build_res_mlp = build_resmlp  # the name in PPViT's first releases
