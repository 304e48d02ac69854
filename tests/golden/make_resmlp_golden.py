"""Makes resmlp_timm.npz: a small ResMLP of timm's, with every parameter random, and its logits.

Needs torch and timm: python tests/golden/make_resmlp_golden.py
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

torch.manual_seed(0)
model = MlpMixer(
    img_size=24,
    patch_size=8,
    embed_dim=12,
    num_blocks=3,
    num_classes=7,
    mlp_ratio=4,
    block_layer=partial(ResBlock, init_values=1e-1),
    norm_layer=Affine,
)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.5)
model.eval()
images = torch.randn(3, 3, 24, 24)
with torch.no_grad():
    arrays = {
        "images": images,
        "logits": model(images),
        "features": model.forward_features(images).mean(1),
    }
arrays = {name: value.numpy() for name, value in arrays.items()}
weights = {f"timm/{name}": value.numpy() for name, value in model.state_dict().items()}
np.savez_compressed(Path(__file__).with_name("resmlp_timm.npz"), **arrays, **weights)
