"""The published ResMLP weights: facts, in one place (README's table is rendered from here).

Accuracies are percent of the ImageNet-1k validation set at 224 pixels, crop 0.875, bicubic, as in
timm's results/results-imagenet.csv. DINO's weights have no trained head: theirs is the k-NN
accuracy that facebookresearch/deit gives in README_resmlp.md.
"""

from __future__ import annotations

from typing import NamedTuple

DOWNLOADS = "https://dl.fbaipublicfiles.com/deit/"


class Weights(NamedTuple):
    """One published set of weights."""

    name: str  # of the Paddle file that porting writes, without its suffix
    config: str  # the YAML in configs/, without its suffix
    timm: str  # timm's model and tag
    file: str  # facebookresearch/deit's file, below DOWNLOADS
    top1: float
    top5: float | None  # None: nobody published it
    training: str

    @property
    def url(self) -> str:
        """Where facebookresearch/deit's file is."""
        return DOWNLOADS + self.file


_LABELS, _DISTILLED, _DINO = "labels", "labels, distilled", "DINO, k-NN accuracy"
_22K = "ImageNet-22k, fine-tuned"
# fmt: off
ZOO = (
    Weights("resmlp_12_224", "resmlp_12_224",
            "resmlp_12_224.fb_in1k", "resmlp_12_no_dist.pth", 76.648, 93.178, _LABELS),
    Weights("resmlp_24_224", "resmlp_24_224",
            "resmlp_24_224.fb_in1k", "resmlp_24_no_dist.pth", 79.374, 94.546, _LABELS),
    Weights("resmlp_36_224", "resmlp_36_224",
            "resmlp_36_224.fb_in1k", "resmlp_36_no_dist.pth", 79.772, 94.884, _LABELS),
    Weights("resmlp_big_24_224", "resmlp_big_24_224",
            "resmlp_big_24_224.fb_in1k", "resmlpB_24_no_dist.pth", 81.036, 95.018, _LABELS),
    Weights("resmlp_12_distilled_224", "resmlp_12_distilled_224",
            "resmlp_12_224.fb_distilled_in1k", "resmlp_12_dist.pth", 77.954, 93.560, _DISTILLED),
    Weights("resmlp_24_distilled_224", "resmlp_24_distilled_224",
            "resmlp_24_224.fb_distilled_in1k", "resmlp_24_dist.pth", 80.756, 95.224, _DISTILLED),
    Weights("resmlp_36_distilled_224", "resmlp_36_distilled_224",
            "resmlp_36_224.fb_distilled_in1k", "resmlp_36_dist.pth", 81.148, 95.478, _DISTILLED),
    Weights("resmlp_big_24_distilled_224", "resmlp_big_24_distilled_224",
            "resmlp_big_24_224.fb_distilled_in1k", "resmlpB_24_dist.pth", 83.592, 96.650,
            _DISTILLED),
    Weights("resmlp_big_24_22k_224", "resmlp_big_24_22k_224",
            "resmlp_big_24_224.fb_in22k_ft_in1k", "resmlpB_24_22k.pth", 84.398, 97.112, _22K),
    Weights("resmlp_12_dino_224", "resmlp_12_224",
            "resmlp_12_224.fb_dino", "resmlp_12_dino.pth", 62.6, None, _DINO),
    Weights("resmlp_24_dino_224", "resmlp_24_224",
            "resmlp_24_224.fb_dino", "resmlp_24_dino.pth", 69.4, None, _DINO),
)
# fmt: on
