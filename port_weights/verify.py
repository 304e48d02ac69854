"""The proof at the end of a port: the same logits as timm, or a checksum of what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from errors import WeightsError
from port_weights.architecture import Architecture

TOLERANCE = 1e-5  # of the largest logit, in float32


class Comparison(NamedTuple):
    """How far two models are apart on the same images."""

    images: int
    absolute: float  # the largest difference of a logit
    relative: float  # the same, over the largest logit
    top5_agree: bool  # the same classes, in the same order, for every image

    def __str__(self) -> str:
        return (
            f"{self.images} images through timm and Paddle: largest logit difference "
            f"{self.absolute:.2e}, relative {self.relative:.2e} (limit {TOLERANCE:.0e}); "
            f"top-5 {'agree' if self.top5_agree else 'differ'}"
        )


def have_timm() -> bool:
    """Whether torch and timm can be imported."""
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
    """Runs a Paddle model and timm's, which reads the PyTorch state dict by its own code.

    Args:
        model: our model, with the ported weights.
        torch_state: parameter name -> array, with timm's or facebookresearch/deit's names.
        architecture: of both.
        images: how many images of seeded normal noise to compare.

    Raises:
        WeightsError: timm refuses the state dict.
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
    pixels = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(pixels)).numpy()
    model.eval()
    with paddle.no_grad():
        found = model(paddle.to_tensor(pixels)).numpy()
    return compare_logits(expected, found)


def compare_logits(expected: np.ndarray, found: np.ndarray) -> Comparison:
    """Differences between two sets of logits ``[B, K]``."""
    absolute = float(np.abs(expected - found).max())
    top = [np.argsort(-logits, axis=1, kind="stable")[:, :5] for logits in (expected, found)]
    relative = absolute / max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
    return Comparison(len(expected), absolute, relative, bool((top[0] == top[1]).all()))


def check(comparison: Comparison) -> None:
    """Raises WeightsError where the models differ by more than `TOLERANCE` (or are not finite)."""
    if not comparison.relative < TOLERANCE:
        raise WeightsError(f"the port is wrong, nothing was written: {comparison}")


def checksum(state: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and values: equal for two state dicts that are bit-identical."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = np.ascontiguousarray(state[name], dtype="<f4")
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
