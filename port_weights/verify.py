"""The proof at the end of a port: the same outputs as timm, or a checksum of what was written.

Outputs are compared in float64, relative to how much they differ from image to image. A fresh
head is zero and a fresh LayerScale 1e-6, so logits, or float32, would not show what a block does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial

import numpy as np

from cli.errors import WeightsError
from port_weights.architecture import Architecture

TOLERANCE = 1e-9  # of the spread, in float64


def have_timm() -> bool:
    try:
        import timm  # noqa: F401
        import torch  # noqa: F401
    except ImportError:  # also of a torch that cannot be loaded
        return False
    return True


def compare_with_timm(
    model, torch_state: Mapping[str, np.ndarray], architecture: Architecture
) -> str:
    """Runs a Paddle model, in float64, and timm's, which reads the state dict by its own code, on
    two images of seeded normal noise. As `compare_outputs`; WeightsError too where timm refuses.
    """
    import paddle
    import torch
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, checkpoint_filter_fn

    reference = MlpMixer(
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
    tensors = {name: torch.tensor(value) for name, value in torch_state.items()}
    try:
        reference.load_state_dict(checkpoint_filter_fn(tensors, reference), strict=True)
    except RuntimeError as error:
        raise WeightsError(f"timm refuses the weights: {' '.join(str(error).split())}") from None
    size = (2, architecture.in_channels, *(architecture.image_size,) * 2)
    pixels = np.random.default_rng(0).standard_normal(size)
    with torch.no_grad():
        tokens = reference.double().forward_features(torch.from_numpy(pixels))
        pooled = reference.forward_head(tokens, pre_logits=True).numpy()
        expected = pooled, reference.forward_head(tokens).numpy()
    model.eval()
    model.to(dtype="float64")
    with paddle.no_grad():
        features = model.forward_features(paddle.to_tensor(pixels))
        return compare_outputs(expected, (features.numpy(), model.head(features).numpy()))


def compare_outputs(
    expected: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray]
) -> str:
    """A line that proves that two models have the same outputs: features [B, C], logits [B, K].

    WeightsError where they differ by more than `TOLERANCE` or are not finite, and where features
    that are the same for every image prove nothing.
    """
    spreads = [float(np.ptp(array, axis=0).max()) for array in expected]  # from image to image
    errors = [float(np.abs(a - b).max()) for a, b in zip(expected, found)]
    if spreads[0] == 0:
        raise WeightsError(
            "nothing was written: the features are the same for every image, so that no port of "
            "these weights can be proven"
        )
    # a head that gives all images the same must give exactly that
    features, logits = (error / (spread or 1e-300) for error, spread in zip(errors, spreads))
    no_head = "" if spreads[1] else " (the head gives all images the same)"
    line = (
        f"{len(expected[0])} images through timm and Paddle in float64: features differ by "
        f"{features:.1e} of their spread, logits by {logits:.1e}{no_head} (limit {TOLERANCE:.0e})"
    )
    if not (features < TOLERANCE and logits < TOLERANCE):
        raise WeightsError(f"the port is wrong, nothing was written: {line}")
    return line


def checksum(state: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and values: equal for two state dicts that are bit-identical."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = np.ascontiguousarray(state[name], dtype="<f4")
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
