"""What a weight file tells about its model: the architecture, read off the shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cli.errors import WeightsError


class Architecture(NamedTuple):
    """The arguments of `resmlp.ResMLP` that shapes fix; sizes in pixels."""

    image_size: int
    patch_size: int
    in_channels: int
    num_classes: int
    embed_dim: int
    depth: int
    mlp_ratio: float

    def differences(self, config: Any) -> list[str]:
        """Config keys that describe another model, both values; without a head any classes fit."""
        data, model, mixer = config.DATA, config.MODEL, config.MODEL.MIXER
        keys = (
            ("DATA.IMAGE_SIZE", data.IMAGE_SIZE, self.image_size),
            ("DATA.IMAGE_CHANNELS", data.IMAGE_CHANNELS, self.in_channels),
            ("MODEL.NUM_CLASSES", model.NUM_CLASSES, self.num_classes or model.NUM_CLASSES),
            ("MODEL.MIXER.PATCH_SIZE", mixer.PATCH_SIZE, self.patch_size),
            ("MODEL.MIXER.EMBED_DIM", mixer.EMBED_DIM, self.embed_dim),
            ("MODEL.MIXER.DEPTH", mixer.DEPTH, self.depth),
            ("MODEL.MIXER.MLP_RATIO", mixer.MLP_RATIO, self.mlp_ratio),
        )
        return [f"{key} is {ours}, the file has {its}" for key, ours, its in keys if ours != its]


def infer(state: Mapping[str, np.ndarray]) -> Architecture:
    """Reads the architecture off a Paddle state dict; WeightsError if it cannot be ResMLP's."""
    blocks = [re.match(r"mixer_layers\.(\d+)\.", name) for name in state]
    numbers = {int(block[1]) for block in blocks if block}
    _, tokens = _shape(state, "mixer_layers.0.linear_tokens.weight", 2)
    dim, channels, patch, _ = _shape(state, "patch_embed.patch_embed.weight", 4)
    _, hidden = _shape(state, "mixer_layers.0.mlp_channels.fc1.weight", 2)
    has_head = "head.weight" in state
    grid = math.isqrt(tokens)
    if grid**2 != tokens or not grid * dim * channels * patch * hidden:
        raise WeightsError(f"not a ResMLP: {tokens} tokens of {dim} channels, patches of {patch}")
    return Architecture(
        image_size=grid * patch,
        patch_size=patch,
        in_channels=channels,
        num_classes=_shape(state, "head.weight", 2)[1] if has_head else 0,
        embed_dim=dim,
        depth=len(numbers),
        mlp_ratio=hidden / dim,
    )


def _shape(state: Mapping[str, np.ndarray], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise WeightsError(f"not a ResMLP, or not whole: there is no {name}")
    if state[name].ndim != dimensions:
        raise WeightsError(f"not a ResMLP: {name} has the shape {list(state[name].shape)}")
    return state[name].shape
