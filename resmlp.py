"""ResMLP in Paddle: residual blocks of a token-mixing linear layer and a channel MLP.

Paper: "ResMLP: Feedforward networks for image classification with data-efficient training"
(arXiv 2105.03404). The official code is ``resmlp_models.py`` of facebookresearch/deit. Parameter
names are PPViT's, so that its published weight files load unchanged.

Letters in shape comments: B batch, N tokens (patches), C channels (embed_dim), H hidden units,
K classes.
"""

from __future__ import annotations

import runtime  # noqa: F401  isort: skip  (prepares the process, before Paddle is imported)

import math
from collections.abc import Mapping

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.nn.initializer import Constant, Normal, Uniform

import cpu_ops
from errors import ConfigError, WeightsError
from weights import read_weights, shorten

runtime.set_threads()


def default_layer_scale(depth: int) -> float:
    """The initial LayerScale for a depth: 0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 beyond.

    Source: CaiT (arXiv 2103.17239, section 3), which ResMLP follows.
    """
    if depth <= 18:
        return 0.1
    return 1e-5 if depth <= 24 else 1e-6


def _linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer initialised as in the official code: normal 0.02, zero bias.

    (Its ``trunc_normal_`` cuts at -2 and 2, a hundred deviations away; Paddle's versions disagree
    on where theirs cuts.)
    """
    return nn.Linear(
        in_features,
        out_features,
        weight_attr=paddle.ParamAttr(initializer=Normal(std=0.02)),
        bias_attr=paddle.ParamAttr(initializer=Constant(0.0)),
    )


def _in_precision_of(weight, x):
    """``x`` in the precision of a weight: float16 under AMP O2, whose stream stays float32."""
    return x if x.dtype == weight.dtype else x.astype(weight.dtype)


class Affine(nn.Layer):
    """``alpha * x + beta`` per channel: ResMLP's replacement for LayerNorm (paper, eq. 1).

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = self.create_parameter([1, 1, dim], default_initializer=Constant(1.0))
        self.beta = self.create_parameter([1, 1, dim], default_initializer=Constant(0.0))

    def forward(self, x):
        return self.alpha * x + self.beta


class DropPath(nn.Layer):
    """Drops a residual branch per sample while training (stochastic depth, arXiv 1603.09382).

    Args:
        rate: probability that a sample's branch is dropped; what is kept is scaled by 1/(1-rate).
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
    """Cuts the image into patches and embeds each: a convolution whose stride is its kernel.

    Args:
        image_size: height and width of the input, pixels.
        patch_size: height and width of a patch, pixels.
        in_channels: channels of the input.
        embed_dim: channels C of a token.
    """

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
            weight_attr=paddle.ParamAttr(initializer=Uniform(-bound, bound)),
            bias_attr=paddle.ParamAttr(initializer=Uniform(-bound, bound)),
        )

    def forward(self, images):
        if cpu_ops.usable(self):  # the same function, faster on a CPU
            return cpu_ops.embed_patches(images, self.patch_embed)
        x = self.patch_embed(images)  # [B, 3, height, width] -> [B, C, grid, grid]
        return x.flatten(2).transpose([0, 2, 1])  # -> [B, N, C]


class Mlp(nn.Layer):
    """The channel MLP: C -> H -> C with GELU between.

    Args:
        dim: channels C.
        hidden_dim: hidden units H.
        dropout: dropout rate after each linear layer.
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = _linear(dim, hidden_dim)
        self.fc2 = _linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = _in_precision_of(self.fc1.weight, x)
        x = self.dropout(F.gelu(self.fc1(x)))  # [B, N, C] -> [B, N, H]
        return self.dropout(self.fc2(x))  # -> [B, N, C]


class ResBlock(nn.Layer):
    """One ResMLP layer: a linear layer mixes tokens, then an MLP mixes channels (paper, eq. 2-3).

    Args:
        dim: channels C.
        num_tokens: tokens N.
        mlp_ratio: hidden units of the MLP, as a multiple of C.
        layer_scale_init: initial value of both LayerScale vectors.
        dropout: dropout rate inside the MLP.
        drop_path: stochastic depth rate of both branches.
    """

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
        x = _in_precision_of(weight, x)
        return paddle.matmul(weight, x, transpose_x=True) + bias.unsqueeze(-1)  # [B, N, C]

    def forward(self, x):
        if cpu_ops.usable(self):  # the same function, faster on a CPU
            mask = self.drop_path.mask
            x = cpu_ops.mix_tokens(x, self.norm1, self.linear_tokens, self.ls1, mask(x))
            return cpu_ops.mix_channels(x, self.norm2, self.mlp_channels, self.ls2, mask(x))
        x = x + self.drop_path(self.ls1 * self.mix_tokens(self.norm1(x)))
        return x + self.drop_path(self.ls2 * self.mlp_channels(self.norm2(x)))


# Layers whose own parameters, Affine and LayerScale, stay float32 under AMP O2 (in O1 all do). What
# they are multiplied with is promoted, so the residual stream is float32 too: a LayerScale of 1e-6
# times a float16 activation would underflow, and added to a float16 one would be lost.
FLOAT32_LAYERS = [Affine, ResBlock]


class ResMLP(nn.Layer):
    """ResMLP image classifier.

    Args:
        image_size: height and width of the input, pixels; a multiple of ``patch_size``.
        patch_size: height and width of a patch, pixels.
        in_channels: channels of the input.
        num_classes: classes K; 0 leaves out the head, and the model returns features ``[B, C]``.
        embed_dim: channels C.
        depth: number of blocks.
        mlp_ratio: hidden units of the channel MLP, as a multiple of C.
        layer_scale_init: initial LayerScale; None chooses by depth (`default_layer_scale`).
        dropout: dropout rate in the channel MLPs.
        drop_path: stochastic depth rate, the same for every block (official code).

    Raises:
        ConfigError: ``image_size`` is not a multiple of ``patch_size``.
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
        self.mixer_layers = nn.LayerList(
            ResBlock(
                embed_dim,
                self.patch_embed.num_patches,
                mlp_ratio,
                layer_scale_init,
                dropout,
                drop_path,
            )
            for _ in range(depth)
        )
        self.norm = Affine(embed_dim)
        self.head = _linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, images):
        """Images ``[B, 3, height, width]`` -> the mean of the normalised tokens, ``[B, C]``."""
        self._check_size(images)
        x = self.patch_embed(images)
        for block in self.mixer_layers:
            if self.recompute and self.training:
                x = paddle.distributed.fleet.utils.recompute(block, x)
            else:
                x = block(x)
        # The mean of the affine is the affine of the mean, and that is N times less work.
        return self.norm(x.mean(axis=1, keepdim=True)).squeeze(1)

    def forward(self, images):
        """Images ``[B, 3, height, width]``, normalised -> logits ``[B, K]``."""
        return self.head(self.forward_features(images))

    def _check_size(self, images) -> None:
        expected = [self.in_channels, self.image_size, self.image_size]
        found = list(images.shape[1:])
        if any(size > 0 and size != want for size, want in zip(found, expected)):  # -1: unknown
            raise ConfigError(
                f"the model takes images [B, {', '.join(map(str, expected))}], found "
                f"{list(images.shape)}: resize the images, or build the model for that size "
                f"(DATA.IMAGE_SIZE) and resample its weights (MODEL.RESIZE_TOKENS)"
            )


def build_resmlp(config) -> ResMLP:
    """Builds the model that a config describes (``config.MODEL``, ``config.DATA.IMAGE_SIZE``)."""
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
    return model


build_res_mlp = build_resmlp  # the name in PPViT's first releases


# Weights of another head or another resolution.


def load_pretrained(model: ResMLP, config, new_head: bool = False) -> list[str]:
    """Loads the weight file that a config names, as its ``MODEL`` section says.

    Args:
        model: receives the weights.
        config: PRETRAINED, PRETRAINED_KEY and RESIZE_TOKENS of its ``MODEL`` are used.
        new_head: see `load_state`: for training on other classes.

    Returns:
        Lines for the log: what was read, and each adaptation that was made.

    Raises:
        WeightsError: the file cannot be read, or does not fit the model.
    """
    file = read_weights(config.MODEL.PRETRAINED, config.MODEL.PRETRAINED_KEY)
    try:
        notes = load_state(model, file.state, new_head, config.MODEL.RESIZE_TOKENS)
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from None
    return [f"weights: {file}", *notes]


def load_state(
    model: ResMLP,
    state: Mapping[str, np.ndarray],
    new_head: bool = False,
    resize_tokens: bool = False,
) -> list[str]:
    """Loads a state dict into the model, all of it or (with an error) nothing.

    Args:
        model: receives the weights.
        state: parameter name -> array, as `weights.read_weights` returns it.
        new_head: accept weights for another number of classes; the head keeps its initialisation.
        resize_tokens: accept weights for another image size; token mixing is resampled.

    Returns:
        One line for the log about each adaptation that was made.

    Raises:
        WeightsError: the state dict does not fit; the model is as it was.
    """
    state, notes = adapt_state_dict(state, model, new_head, resize_tokens)
    missing, unexpected = model.set_state_dict(state)  # only warns about what it skips
    if missing or unexpected:
        raise WeightsError(f"Paddle skipped weights: {shorten([*missing, *unexpected])}")
    return notes


def adapt_state_dict(
    state: Mapping[str, np.ndarray],
    model: ResMLP,
    new_head: bool = False,
    resize_tokens: bool = False,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The state dict as the model needs it; arguments and errors as for `load_state`.

    Returns:
        The state dict, with exactly the model's names and shapes, and the notes for the log.
    """
    state, notes = dict(state), []
    _adapt_head(state, model, new_head, notes)
    _adapt_tokens(state, model, resize_tokens, notes)
    _check_match(state, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    return state, notes


def _adapt_head(state: dict, model: ResMLP, new_head: bool, notes: list[str]) -> None:
    """Puts the model's own head into the state dict where the file's has other classes."""
    head = state.get("head.weight", np.empty((model.embed_dim, 0)))
    if head.ndim != 2 or head.shape[0] != model.embed_dim:
        return  # not only another number of classes: `_check_match` says what else
    found, wanted = head.shape[1], model.num_classes
    if found == wanted or (not found and not new_head):
        return
    if wanted and not new_head:
        raise WeightsError(
            f"the weights are for {found} classes, the model has {wanted}: set "
            f"MODEL.NUM_CLASSES {found}, or train a new head first"
        )
    if not wanted:
        notes.append(f"the head of the file ({found} classes) is left out: the model has none")
    elif not found:
        notes.append(f"head initialised for {wanted} classes: the file has none")
    else:
        notes.append(f"head initialised for {wanted} classes: the file's has {found}")
    for name in ("head.weight", "head.bias"):
        state.pop(name, None)
    state.update((f"head.{n}", value.numpy()) for n, value in model.head.state_dict().items())


def _adapt_tokens(state: dict, model: ResMLP, resize_tokens: bool, notes: list[str]) -> None:
    """Resamples the token-mixing layers where the file's are for another number of patches."""
    name = "mixer_layers.{}.linear_tokens.{}".format
    weight, kernel = state.get(name(0, "weight")), state.get("patch_embed.patch_embed.weight")
    new_grid, patch = model.patch_embed.grid_size, model.image_size // model.patch_embed.grid_size
    if weight is None or kernel is None or kernel.shape[2:] != (patch, patch):
        return  # not only another resolution: `_check_match` says what else
    tokens = weight.shape[-1] if weight.ndim else 0
    old_grid = math.isqrt(tokens)
    if old_grid in (0, new_grid) or old_grid**2 != tokens or weight.shape != (tokens, tokens):
        return
    sizes = (
        f"from {old_grid * patch} x {old_grid * patch} pixels ({tokens} tokens) "
        f"to {model.image_size} x {model.image_size} ({new_grid**2} tokens)"
    )
    if not resize_tokens:
        raise WeightsError(
            f"the weights are for another image size: set MODEL.RESIZE_TOKENS True to resample "
            f"the token mixing {sizes}, or DATA.IMAGE_SIZE {old_grid * patch}"
        )
    for block in range(len(model.mixer_layers)):
        weight, bias = state.get(name(block, "weight")), state.get(name(block, "bias"))
        if weight is None or bias is None or (*weight.shape, *bias.shape) != (tokens,) * 3:
            continue  # `_check_match` names it
        weight, bias = resample_tokens(weight, bias, new_grid)
        state[name(block, "weight")], state[name(block, "bias")] = weight, bias
    notes.append(f"token mixing resampled {sizes}")


def resample_tokens(
    weight: np.ndarray, bias: np.ndarray, new_grid: int
) -> tuple[np.ndarray, np.ndarray]:
    """A token-mixing layer for another patch grid, as if the tokens were resampled around it.

    The weights are a kernel over four axes (input row and column, output row and column). The
    new layer is: bring the new grid's tokens to the old grid, mix them, bring the result to the
    new grid, with bicubic interpolation both ways. So what an output token sums its inputs to is
    interpolated from the old layer, not multiplied by the number of tokens, and a layer of the
    same size stays as it is.

    Args:
        weight: ``[T, T]``, input tokens first (Paddle's layout), T a square number.
        bias: ``[T]``.
        new_grid: patches along a side of the new grid.

    Returns:
        Weight and bias for ``new_grid ** 2`` tokens, float32.
    """
    old_grid = math.isqrt(len(bias))
    to_new, to_old = _bicubic(old_grid, new_grid), _bicubic(new_grid, old_grid)
    to_new, to_old = np.kron(to_new, to_new), np.kron(to_old, to_old)  # rows, then columns
    weight = to_old.T @ weight.astype(np.float64) @ to_new.T  # [T_in, T_out]
    return weight.astype(np.float32), (to_new @ bias.astype(np.float64)).astype(np.float32)


def _bicubic(old: int, new: int) -> np.ndarray:
    """Matrix ``[new, old]`` that resamples a line of ``old`` values; its rows sum to one.

    Keys' cubic with a = -0.5, stretched where the line shrinks, renormalised at the borders: as
    Pillow and (antialiased) PyTorch do.
    """
    stretch = max(old / new, 1.0)
    centers = (np.arange(new) + 0.5) * (old / new) - 0.5  # of the new values, on the old line
    x = np.abs(np.arange(old) - centers[:, None]) / stretch
    near = 1.5 * x**3 - 2.5 * x**2 + 1.0
    far = -0.5 * x**3 + 2.5 * x**2 - 4.0 * x + 2.0
    matrix = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    return matrix / matrix.sum(axis=1, keepdims=True)


def _check_match(state: Mapping[str, np.ndarray], wanted: Mapping[str, tuple]) -> None:
    """Raises with everything that is missing, unexpected or of another shape."""
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {list(state[name].shape)}, needed {list(shape)}"
            + (" (transposed?)" if state[name].shape == shape[::-1] else "")
            for name, shape in wanted.items()
            if name in state and state[name].shape != shape
        ],
    }
    if not any(problems.values()):
        return
    details = "; ".join(f"{kind}: {shorten(found)}" for kind, found in problems.items() if found)
    if {"stem.proj.weight", "patch_embed.proj.weight"} & set(state):
        details += " (PyTorch's names: port the file with port_weights/load_timm_weights.py)"
    raise WeightsError(f"the weights do not fit the model; {details}")
