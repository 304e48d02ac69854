"""Makes resmlp_timm.npz: a small ResMLP of timm's, with every parameter random, and its logits;
and training_timm.npz: 60 steps of another under DeiT's recipe, recorded.

The latter holds the first weights, the batches after timm's whole augmentation (crop, flip,
RandAugment, erasing, mixup or CutMix, smoothed targets), the masks of drop path, the rates, and the
losses of timm's LAMB in float32. Pixels are rounded to 1/32, for the size of the file.

Needs torch and timm: python tests/golden/make_golden.py
"""

import random
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.optim import create_optimizer_v2

STEPS, BATCH, SIZE, CLASSES, DEPTH, KEEP = 60, 4, 16, 10, 2, 0.9
ROOT = Path(__file__).resolve().parent.parent.parent


def posterize(image, bits, original=ImageOps.posterize):
    """Recent versions of Pillow refuse to keep no bit, which timm's policy may draw."""
    return original(image, bits) if bits else Image.new(image.mode, image.size)


def recorded_batches():
    """Images ``[STEPS, BATCH, 3, SIZE, SIZE]`` and targets ``[STEPS, BATCH, CLASSES]``."""
    sys.path.insert(0, str(ROOT))
    from demo.fashion_mnist import read
    from demo.make_subset import ARCHIVE

    split = read(ARCHIVE)["train"]
    transform = create_transform(
        SIZE,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)
    images, targets = [], []
    for first in range(0, STEPS * BATCH, BATCH):
        one = slice(first, first + BATCH)
        pictures = [Image.fromarray(pixels).convert("RGB") for pixels in split.images[one]]
        labels = torch.from_numpy(split.labels[one].astype("int64"))
        mixed = mixup(torch.stack([transform(picture) for picture in pictures]), labels)
        images.append(mixed[0].numpy())
        targets.append(mixed[1].numpy())
    return np.stack(images), np.stack(targets)


def mixer(size, patch, dim, depth, classes, **options):
    """timm's ResMLP of any size."""
    block, shape = partial(ResBlock, init_values=0.1), dict(img_size=size, patch_size=patch)
    shape.update(embed_dim=dim, num_blocks=depth, num_classes=classes, mlp_ratio=4)
    return MlpMixer(**shape, block_layer=block, norm_layer=Affine, **options)


def optimizer_of_timm(model, name, lr, decay, **options):
    """Decay on matrices, as DeiT has it; timm's own grouping would take its [1, 1, C] Affines."""
    groups = [{"params": [], "weight_decay": decay}, {"params": [], "weight_decay": 0.0}]
    for key, parameter in model.named_parameters():
        groups[not key.endswith(".weight")]["params"].append(parameter)
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, eps=1e-8, **options)


def save(name, model_state, **arrays):
    weights = {f"timm/{key}": value.numpy() for key, value in model_state.items()}
    np.savez_compressed(Path(__file__).with_name(name), **arrays, **weights)


@torch.no_grad()
def make_model():
    torch.manual_seed(0)
    model = mixer(24, 8, 12, 3, 7)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.eval()
    images = torch.randn(3, 3, 24, 24)
    arrays = dict(
        images=images, logits=model(images), features=model.forward_features(images).mean(1)
    )
    save("resmlp_timm.npz", model.state_dict(), **{k: v.numpy() for k, v in arrays.items()})


def make_training():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with patch.object(ImageOps, "posterize", posterize):
        images, targets = recorded_batches()
    images = np.clip(np.rint(images * 32), -128, 127).astype("int8")
    kept = torch.rand(STEPS, 2 * DEPTH, BATCH) < KEEP
    rates = 0.01 * np.minimum(1.0, np.arange(1, STEPS + 1) / 10)

    model = mixer(SIZE, 4, 24, DEPTH, CLASSES, drop_path_rate=1 - KEEP)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = optimizer_of_timm(model, "lamb", 0.01, 0.2)
    criterion, losses = SoftTargetCrossEntropy(), []
    for step in range(STEPS):
        masks = iter(kept[step] / KEEP)
        dropped = lambda self, x: x * next(masks)[:, None, None]  # noqa: B023, E731
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        with patch.object(DropPath, "forward", dropped):
            x = torch.from_numpy(images[step].astype("float32") / 32)
            loss = criterion(model(x), torch.from_numpy(targets[step]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    arrays = dict(images=images, targets=targets, kept=kept.numpy(), rates=rates)
    save("training_timm.npz", first, losses=np.array(losses), **arrays)
    print(f"losses: first {losses[0]:.4f}, mean of the last ten {np.mean(losses[-10:]):.4f}")


if __name__ == "__main__":
    make_model()
    make_training()
