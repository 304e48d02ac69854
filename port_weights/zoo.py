"""The published ResMLP weights: facts, in one place (README's table is rendered from here).

Accuracies are percent of the ImageNet-1k validation set at 224 pixels, crop 0.875, bicubic, as in
timm's results/results-imagenet.csv and, for a Paddle file, in PPViT's README. DINO's weights have
no trained head: theirs is the k-NN accuracy that facebookresearch/deit gives in README_resmlp.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

# Where files are fetched from: facebookresearch/deit's, and timm's or a mirror of it.
_HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
HOSTS = ("https://dl.fbaipublicfiles.com/", f"{_HUB}/")


class PaddleFile(NamedTuple):
    """PPViT's ``.pdparams`` of some weights: what PPViT measured with it, and where it is."""

    top1: float
    top5: float
    drive: str  # its id on Google Drive
    baidu: str  # its id on Baidu
    code: str  # that Baidu asks for: its link fills it in

    @property
    def links(self) -> str:
        drive = f"https://drive.google.com/file/d/{self.drive}/view?usp=sharing"
        baidu = f"https://pan.baidu.com/s/{self.baidu}?pwd={self.code}"
        return f"[google]({drive}) [baidu]({baidu})"


class Weights(NamedTuple):
    """One published set of weights."""

    name: str  # of the Paddle file that porting writes, without its suffix
    config: str  # the YAML in configs/, without its suffix
    timm: str  # timm's model and tag
    file: str  # facebookresearch/deit's file
    top1: float
    top5: float | None  # None: nobody published it
    training: str

    @property
    def url(self) -> str:
        return f"{HOSTS[0]}deit/{self.file}"

    @property
    def hub_url(self) -> str:
        """Where timm's file of the same values is; its host says its sha256."""
        return f"{HOSTS[1]}timm/{self.timm}/resolve/main/model.safetensors"

    def published(self, measure: str) -> float | None:
        """What `MEASURES` names, in percent; None: nobody published it."""
        if measure in ("top1", "top5"):
            return getattr(self, measure) if self.training != _DINO else None
        others = zip(("real", "v2", "sketch", "a", "r"), OTHER_SETS.get(self.name, ()))
        return dict(others).get(measure)

    @property
    def paddle(self) -> PaddleFile | None:
        """PPViT's file, ``<name>.pdparams``; None: it published none."""
        return PADDLE_FILES.get(self.name)


_LABELS, _DISTILLED, _DINO = "labels", "labels, distilled", "DINO, k-NN accuracy"
_22K = "ImageNet-22k, fine-tuned"
# PPViT's files, by name. It published none of resmlp_12_224, and none of DINO's.
PADDLE_FILES = {
    "resmlp_24_224": PaddleFile(
        79.38, 94.55, "15A5q1XSXBz-y1AcXhy_XaDymLLj2s2Tn", "1nLAvyG53REdwYNCLmp4yBA", "jdcx"
    ),
    "resmlp_36_224": PaddleFile(
        79.77, 94.89, "1WrhVm-7EKnLmPU18Xm0C7uIqrg-RwqZL", "1QD4EWmM9b2u1r8LsnV6rUA", "33w3"
    ),
    "resmlp_big_24_224": PaddleFile(
        81.04, 95.02, "1KLlFuzYb17tC5Mmue3dfyr2L_q4xHTZi", "1oXU6CR0z7O0XNwu_UdZv_w", "r9kb"
    ),
    "resmlp_12_distilled_224": PaddleFile(
        77.95, 93.56, "1cDMpAtCB0pPv6F-VUwvgwAaYtmP8IfRw", "15kJeZ_V1MMjTX9f1DBCgnw", "ghyp"
    ),
    "resmlp_24_distilled_224": PaddleFile(
        80.76, 95.22, "15d892ExqR1sIAjEn-cWGlljX54C3vihA", "1NgQtSwuAwsVVOB8U6N4Aqw", "sxnx"
    ),
    "resmlp_36_distilled_224": PaddleFile(
        81.15, 95.48, "1Laqz1oDg-kPh6eb6bekQqnE0m-JXeiep", "1p1xGOJbMzH_RWEj36ruQiw", "vt85"
    ),
    "resmlp_big_24_distilled_224": PaddleFile(
        83.59, 96.65, "199q0MN_BlQh9-HbB28RdxHj1ApMTHow-", "1yUrfbqW8vLODDiRV5WWkhQ", "4jk5"
    ),
    "resmlp_big_24_22k_224": PaddleFile(
        84.40, 97.11, "1zATKq1ruAI_kX49iqJOl-qomjm9il1LC", "1VrnRMbzzZBmLiR45YwICmA", "ve7i"
    ),
}


class Measure(NamedTuple):
    """An accuracy that was published for the zoo."""

    title: str
    data: str  # the set that it is measured on, as `tools/evaluate_zoo.py` calls it
    key: str  # of eval.json
    images: int  # of the whole set
    # The largest change (percent, rounded up to 0.01) of timm's own results of one of these weights
    # from release to release of timm, PyTorch, CUDA and Pillow (2021 to 2025).
    spread: float


MEASURES = {
    "top1": Measure("ImageNet", "val", "top1", 50000, 0.04),
    "top5": Measure("ImageNet, top-5", "val", "top5", 50000, 0.03),
    "real": Measure("ReaL", "val", "real_top1", 46837, 0.03),
    "v2": Measure("V2", "v2", "top1", 10000, 0.34),
    "sketch": Measure("Sketch", "sketch", "top1", 50889, 0.08),
    "a": Measure("A", "a", "subset_top1", 7500, 0.28),
    "r": Measure("R", "r", "subset_top1", 30000, 0.10),
}

# Top-1 with ImageNet-ReaL's labels; on ImageNet-V2 (matched frequency), -Sketch, -A and -R (the
# last two among their 200 classes): timm's results/results-imagenet-*.csv.
OTHER_SETS = {
    "resmlp_12_224": (83.566, 64.330, 25.526, 7.067, 38.450),
    "resmlp_24_224": (85.277, 67.700, 27.570, 12.467, 40.677),
    "resmlp_36_224": (85.623, 68.040, 29.739, 13.427, 43.010),
    "resmlp_big_24_224": (85.697, 68.280, 26.316, 22.627, 39.593),
    "resmlp_12_distilled_224": (84.724, 66.290, 26.322, 8.107, 39.883),
    "resmlp_24_distilled_224": (86.635, 69.620, 30.891, 16.227, 44.797),
    "resmlp_36_distilled_224": (86.980, 70.100, 31.099, 16.707, 44.730),
    "resmlp_big_24_distilled_224": (88.441, 73.380, 34.788, 33.787, 49.033),
    "resmlp_big_24_22k_224": (89.024, 74.200, 37.240, 40.467, 51.913),
}

# fmt: off
ZOO = (
    Weights("resmlp_12_224", "resmlp_12_224",
            "resmlp_12_224.fb_in1k", "resmlp_12_no_dist.pth", 76.660, 93.170, _LABELS),
    Weights("resmlp_24_224", "resmlp_24_224",
            "resmlp_24_224.fb_in1k", "resmlp_24_no_dist.pth", 79.380, 94.550, _LABELS),
    Weights("resmlp_36_224", "resmlp_36_224",
            "resmlp_36_224.fb_in1k", "resmlp_36_no_dist.pth", 79.772, 94.888, _LABELS),
    Weights("resmlp_big_24_224", "resmlp_big_24_224",
            "resmlp_big_24_224.fb_in1k", "resmlpB_24_no_dist.pth", 81.034, 95.026, _LABELS),
    Weights("resmlp_12_distilled_224", "resmlp_12_distilled_224",
            "resmlp_12_224.fb_distilled_in1k", "resmlp_12_dist.pth", 77.948, 93.570, _DISTILLED),
    Weights("resmlp_24_distilled_224", "resmlp_24_distilled_224",
            "resmlp_24_224.fb_distilled_in1k", "resmlp_24_dist.pth", 80.766, 95.220, _DISTILLED),
    Weights("resmlp_36_distilled_224", "resmlp_36_distilled_224",
            "resmlp_36_224.fb_distilled_in1k", "resmlp_36_dist.pth", 81.150, 95.508, _DISTILLED),
    Weights("resmlp_big_24_distilled_224", "resmlp_big_24_distilled_224",
            "resmlp_big_24_224.fb_distilled_in1k", "resmlpB_24_dist.pth", 83.594, 96.658,
            _DISTILLED),
    Weights("resmlp_big_24_22k_224", "resmlp_big_24_22k_224",
            "resmlp_big_24_224.fb_in22k_ft_in1k", "resmlpB_24_22k.pth", 84.414, 97.108, _22K),
    Weights("resmlp_12_dino_224", "resmlp_12_224",
            "resmlp_12_224.fb_dino", "resmlp_12_dino.pth", 62.6, None, _DINO),
    Weights("resmlp_24_dino_224", "resmlp_24_224",
            "resmlp_24_224.fb_dino", "resmlp_24_dino.pth", 69.4, None, _DINO),
)
# fmt: on


def find(name: str | os.PathLike) -> Weights | None:
    """The weights of a name: ours, perhaps with ``.pdparams``, timm's, a file's or an address."""
    names = {str(name), str(Path(name)).removesuffix(".pdparams")}  # ./x is x
    known = ((w, {w.name, w.timm, w.file, w.file[: -len(".pth")], w.url, w.hub_url}) for w in ZOO)
    return next((weights for weights, its in known if names & its), None)
