"""What is done to a whole training batch on the device: normalise, erase, mix."""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import numpy as np
import paddle

from mixup import Mixup
from random_erasing import RandomErasing
from utils import Normalize, to_device


class BatchAugment:
    """Turns a batch as the loader yields it into what the model and the loss take.

    Of DATA it uses IMAGENET_MEAN/STD, of TRAIN RANDOM_ERASE_*, MIXUP_* and CUTMIX_*.
    """

    def __init__(self, config):
        self.normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
        train, self.erase, self.mix = config.TRAIN, None, None
        if train.RANDOM_ERASE_PROB:
            self.erase = RandomErasing(
                train.RANDOM_ERASE_PROB,
                train.RANDOM_ERASE_MODE,
                train.RANDOM_ERASE_COUNT,
                train.RANDOM_ERASE_SPLIT,
            )
        cutmix = train.CUTMIX_ALPHA > 0 or train.CUTMIX_MINMAX is not None
        if train.MIXUP_PROB and (cutmix or train.MIXUP_ALPHA > 0):
            self.mix = Mixup(
                config.MODEL.NUM_CLASSES,
                train.MIXUP_ALPHA,
                train.CUTMIX_ALPHA,
                train.CUTMIX_MINMAX,
                train.MIXUP_PROB,
                train.MIXUP_SWITCH_PROB,
                train.MIXUP_MODE,
                train.SMOOTHING,
            )

    def __call__(self, images: paddle.Tensor, labels: paddle.Tensor, rng: np.random.Generator):
        """uint8 images ``[B, H, W, 3]``, int64 labels ``[B]`` -> float32 ``[B, 3, H, W]``, targets.

        These are the labels, or after mixing ``[B, K]``. Erasing noise is of Paddle's generator.
        """
        batch, height, width, channels = images.shape
        images = self.normalize(images)
        erasing = self.erase.plan(rng, batch, channels, height, width) if self.erase else []
        mixing = self.mix.plan(rng, batch, height, width) if self.mix else []
        plan = to_device([*erasing, *mixing])
        if erasing:
            images = self.erase.apply(images, plan[: len(erasing)])
        if self.mix:
            return self.mix.apply(images, labels, plan[len(erasing) :])
        return images, labels
