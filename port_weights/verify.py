"""The proof at the end of a port: the same outputs as timm, or a checksum of what was written.

Outputs are compared in float64, relative to how much they differ from image to image. A fresh
head is zero and a fresh LayerScale 1e-6, so logits, or float32, would not show what a block does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from cli.errors import WeightsError
from port_weights.architecture import Architecture

TOLERANCE = 1e-9  # of the spread, in float64


Outputs = tuple[np.ndarray, np.ndarray]  # features [B, C], logits [B, K]


class Difference(NamedTuple):
    """How far two arrays ``[B, ...]`` of outputs are apart."""

    error: float  # the largest
    spread: float  # the largest difference between two images

    @property
    def relative(self) -> float:
        return self.error / self.spread if self.spread else (float("inf") if self.error else 0.0)


class Comparison(NamedTuple):
    """How far two models are apart on the same images."""

    images: int
    features: Difference
    logits: Difference

    def __str__(self) -> str:
        no_head = "" if self.logits.spread else " (the head gives all images the same)"
        return (
            f"{self.images} images through timm and Paddle in float64: features differ by "
            f"{self.features.relative:.1e} of their spread, logits by "
            f"{self.logits.relative:.1e}{no_head} (limit {TOLERANCE:.0e})"
        )


def have_timm() -> bool:
    try:
        import timm  # noqa: F401
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def timm_model(architecture: Architecture):
    """timm's own ResMLP of an architecture, in evaluation mode."""
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    return MlpMixer(
        num_classes=architecture.num_classes,
        img_size=architecture.image_size,
        in_chans=architecture.in_channels,
        patch_size=architecture.patch_size,
        num_blocks=architecture.depth,
        embed_dim=architecture.embed_dim,
        mlp_ratio=architecture.mlp_ratio,
        block_layer=partial(ResBlock, init_values=1e-5),
        norm_layer=Affine,
    ).eval()


def compare_with_timm(
    model, torch_state: Mapping[str, np.ndarray], architecture: Architecture, images: int = 2
) -> Comparison:
    """Runs a Paddle model, in float64, and timm's, which reads the state dict by its own code. The
    ``images``, at least 2, are seeded normal noise. Raises WeightsError where timm refuses.
    """
    import paddle
    import torch
    from timm.models.mlp_mixer import checkpoint_filter_fn

    reference = timm_model(architecture)
    tensors = {name: torch.tensor(value) for name, value in torch_state.items()}
    try:
        reference.load_state_dict(checkpoint_filter_fn(tensors, reference), strict=True)
    except RuntimeError as error:
        raise WeightsError(f"timm refuses the weights: {' '.join(str(error).split())}") from None
    size = (images, architecture.in_channels, *(architecture.image_size,) * 2)
    pixels = np.random.default_rng(0).standard_normal(size)
    with torch.no_grad():
        tokens = reference.double().forward_features(torch.from_numpy(pixels))
        pooled = reference.forward_head(tokens, pre_logits=True).numpy()
        expected = pooled, reference.forward_head(tokens).numpy()
    model.eval()
    model.to(dtype="float64")
    with paddle.no_grad():
        features = model.forward_features(paddle.to_tensor(pixels))
        found = features.numpy(), model.head(features).numpy()
    return compare_outputs(expected, found)


def compare_outputs(expected: Outputs, found: Outputs) -> Comparison:
    """Differences between the outputs of two models."""
    features, logits = (
        Difference(float(np.abs(a - b).max()), float(np.ptp(a, axis=0).max()))
        for a, b in zip(expected, found)
    )
    return Comparison(len(expected[0]), features, logits)


def check(comparison: Comparison) -> None:
    """Raises WeightsError where the models differ by more than `TOLERANCE` or are not finite, and
    where features that are the same for every image prove nothing.
    """
    if comparison.features.spread == 0:
        raise WeightsError(
            "nothing was written: the features are the same for every image, so that no port of "
            "these weights can be proven"
        )
    if not all(part.relative < TOLERANCE for part in (comparison.features, comparison.logits)):
        raise WeightsError(f"the port is wrong, nothing was written: {comparison}")


def checksum(state: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and values: equal for two state dicts that are bit-identical."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = np.ascontiguousarray(state[name], dtype="<f4")
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
