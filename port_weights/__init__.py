"""Weights from and to PyTorch: timm's and facebookresearch/deit's names."""

from cpu import setup  # noqa: F401  (before Paddle)
