"""PPViT's defaults where they are not ours: what a YAML that was written for it may count on."""

from __future__ import annotations

# PaddleViT's image_classification/ResMLP/config.py and main_multi_gpu.py, where that changes a
# result. It has no repeated augmentation, which is 1 here.
PPVIT = {
    "MODEL.DROPPATH": 0.1,
    "MODEL.MIXER.EMBED_DIM": 768,
    "TRAIN.NUM_EPOCHS": 300,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.WEIGHT_DECAY": 0.1,
    "TRAIN.BASE_LR": 0.001,
    "TRAIN.LINEAR_SCALED_LR": 512,
    "TRAIN.GRAD_CLIP": None,
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.REPEATED_AUG": 1,
}


def differences(config, given: set[str]) -> list[str]:
    """Keys not in ``given`` (set by nobody) where PPViT's default differs, with both values."""
    texts = []
    for key, theirs in PPVIT.items():
        value = config
        for name in key.split("."):
            value = value[name]
        if key not in given and value != theirs:
            texts.append(f"{key} {value} (PPViT {theirs})")
    return texts
