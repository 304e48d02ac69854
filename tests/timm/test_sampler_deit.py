"""Repeated augmentation against timm's RepeatAugSampler, which is DeiT's RASampler."""

import numpy as np
import pytest

from loading.samplers import train_indices

pytest.importorskip("timm")
from timm.data.distributed_sampler import RepeatAugSampler  # noqa: E402


@pytest.mark.parametrize("num_images", [1, 10, 255, 256, 300, 1000, 1281])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_each_rank_takes_the_places_of_the_shuffled_order_that_timm_takes(num_images, world):
    order = train_indices(num_images, seed=0, epoch=0)  # without repeats: the shuffled order
    place = np.argsort(order)
    for rank in range(world):
        theirs = RepeatAugSampler(range(num_images), world, rank, shuffle=False, num_repeats=3)
        ours = train_indices(num_images, 0, 0, rank, world, repeats=3)
        assert place[ours].tolist() == list(theirs)
