"""Weights from and to PyTorch: timm's and facebookresearch/deit's names."""
