"""What ImageNet-1k's classes are called; labels follow the order of their WordNet ids."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The 1,000 WordNet ids, n01440764 ... n15075141, entry i that of label i.

    Source: the classes of ILSVRC 2012, as in timm's data/_info/imagenet_synsets.txt.
    """
    text = Path(__file__).with_name("imagenet_wnids.txt").read_text(encoding="ascii")
    return tuple(text.split())
