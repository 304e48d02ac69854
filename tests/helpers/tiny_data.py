"""A tiny data set that can be learned, and a config for it, for tests that train."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from config import get_config

CONFIG = """
DATA: {DATASET: imagefolder, IMAGE_SIZE: 16, CROP_PCT: 1.0, BATCH_SIZE: 8, NUM_WORKERS: 0}
MODEL: {NAME: tiny, NUM_CLASSES: 3, DROPPATH: 0.0, MIXER: {PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 2}}
TRAIN:
  NUM_EPOCHS: 2
  WARMUP_EPOCHS: 0
  BASE_LR: 0.003
  LINEAR_SCALED_LR: null
  REPEATED_AUG: 1
  RAND_AUGMENT: False
  COLOR_JITTER: 0.0
  CROP_SCALE: [1.0, 1.0]
  CROP_RATIO: [1.0, 1.0]
  HFLIP: 0.0
  MIXUP_ALPHA: 0.0
  CUTMIX_ALPHA: 0.0
  RANDOM_ERASE_PROB: 0.0
  OPTIMIZER: {NAME: adamw}
REPORT_FREQ: 1
"""


def make_data(folder: Path, train: int = 24, val: int = 9) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            label = number % 3
            pixels = rng.integers(0, 128, [16, 16, 3])
            pixels[..., label] += 100
            path = folder / split / f"class_{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype("uint8")).save(path)
    return folder


def write_lists(data: Path, root: Path | None = None, ending: str = "") -> None:
    """List files of the images of `make_data`; in ``root``: as if each split were an archive."""
    for split in ("train", "val"):
        images = sorted(data.glob(f"{split}/*/*.png"))
        lines = [f"{split}{ending}/{p.parent.name}/{p.name} {p.parent.name[-1]}\n" for p in images]
        ((root or data) / f"{split}_list.txt").write_text("".join(lines))


def samples(config, split: str = "train") -> list[tuple[int, bytes]]:
    """The label and pixels of every image of a split."""
    from datasets import build_dataset  # with Paddle, which not all tests need

    dataset = build_dataset(config, split)
    found = [dataset[0, index, index] for index in range(len(dataset))]
    assert not any(sample.error for sample in found)
    return [(sample.label, sample.image.tobytes()) for sample in found]


def make_tree(root: Path, classes=("ant", "bee"), splits=("train", "val"), count: int = 1) -> None:
    """Folders ``split/class`` with images of one colour."""
    for folder in (root / split / name for split in splits for name in classes):
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (8, 6)).save(folder / f"{number}.png")


def entries(index) -> dict[str, int]:
    """The paths and labels of an `ImageIndex`, in its order."""
    return {os.fsdecode(index.name(i)): label for i, label in enumerate(index.labels)}


def make_config(folder: Path, data: Path, *opts):
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG)
    places = ["DATA.DATA_PATH", data, "SAVE", folder / "run"]
    config = get_config(str(path), [str(item) for item in [*places, *opts]])
    config.freeze()
    return config
