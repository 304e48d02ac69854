"""ImageNet's WordNet ids and the names of its classes against timm's ImageNetInfo."""

import pytest

from loading.imagenet import wordnet_ids
from tools.common import IMAGENET_CLASSES

pytest.importorskip("timm")
from timm.data import ImageNetInfo  # noqa: E402


def test_label_i_is_the_wordnet_id_and_the_name_that_timm_gives_it():
    info = ImageNetInfo("imagenet-1k")
    assert wordnet_ids() == tuple(info.label_names())
    names = IMAGENET_CLASSES.read_text(encoding="utf-8").splitlines()
    assert names == [info.index_to_description(label) for label in range(1000)]
