"""Parameter names and layouts: ours (PPViT's), timm's, and facebookresearch/deit's.

PyTorch keeps a linear layer as ``[out, in]``, Paddle as ``[in, out]``. Which tensors are linear
layers is known by name: a square one, or a convolution, would not tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

FORMATS = ("timm", "facebook")
_MODULES = (  # ours, timm's, facebookresearch/deit's; {} is the number of the block
    ("patch_embed.patch_embed", "stem.proj", "patch_embed.proj"),
    ("mixer_layers.{}.norm1", "blocks.{}.norm1", "blocks.{}.norm1"),
    ("mixer_layers.{}.linear_tokens", "blocks.{}.linear_tokens", "blocks.{}.attn"),
    ("mixer_layers.{}.ls1", "blocks.{}.ls1", "blocks.{}.gamma_1"),
    ("mixer_layers.{}.norm2", "blocks.{}.norm2", "blocks.{}.norm2"),
    ("mixer_layers.{}.mlp_channels.fc1", "blocks.{}.mlp_channels.fc1", "blocks.{}.mlp.fc1"),
    ("mixer_layers.{}.mlp_channels.fc2", "blocks.{}.mlp_channels.fc2", "blocks.{}.mlp.fc2"),
    ("mixer_layers.{}.ls2", "blocks.{}.ls2", "blocks.{}.gamma_2"),
    ("norm", "norm", "norm"),
    ("head", "head", "head"),
)
_COLUMN = {"paddle": 0, "timm": 1, "facebook": 2}
_LINEAR = re.compile(r"(.*\.(linear_tokens|fc1|fc2)|head)\.weight")  # our names
_AFFINE = re.compile(r".*norm[12]?\.(alpha|beta)")


def translate(name: str, source: str, target: str) -> str | None:
    """A parameter's name in another format (``paddle``, ``timm``, ``facebook``), or None."""
    block = re.search(r"\.(\d+)\.", name)
    general = name.replace(block[0], ".{}.", 1) if block else name
    for module in _MODULES:
        stem, other = module[_COLUMN[source]], module[_COLUMN[target]]
        if general == stem or general.rpartition(".")[0] == stem:
            renamed = other + general[len(stem) :]
            return renamed.replace("{}", block[1], 1) if block else renamed
    return None


def torch_format(names: Any) -> str:
    """``timm`` or ``facebook``, by names of parameters; empty: they are of neither."""
    stems = {"stem.proj.weight": "timm", "patch_embed.proj.weight": "facebook"}
    return next((style for name, style in stems.items() if name in names), "")


def convert(
    state: Mapping[str, np.ndarray], source: str, target: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Names and lays out a state dict anew, from or to ``paddle``; unknown names are marked.

    Returns it, and for every new name a line that says what became of the tensor. Affine is
    ``[1, 1, C]``, and ``[C]`` in facebookresearch/deit's.
    """
    result, report = {}, {}
    for name, value in state.items():
        renamed = translate(name, source, target) or f"{name} (not ResMLP's)"
        ours = renamed if target == "paddle" else name
        array, how = value, "as it is"
        if _LINEAR.fullmatch(ours) and value.ndim == 2:
            array, how = value.T, "transposed"
        elif _AFFINE.fullmatch(ours) and (target == "facebook" or value.ndim == 1):
            array, how = value.reshape(-1 if target == "facebook" else (1, 1, -1)), "reshaped"
        result[renamed] = np.ascontiguousarray(array)
        shapes = f"{list(value.shape)} -> {list(array.shape)}"
        report[renamed] = f"{name:36} -> {renamed:44} {shapes:36} {how}"
    return result, report
