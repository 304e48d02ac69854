"""What the tests of the tools share: the folder of a tiny run, and images to look at."""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
from PIL import Image

from cli.errors import UserError
from config import get_arguments, get_config, resolve_config
from launch import launch
from resmlp import build_resmlp
from storage.weights import write_weights

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ("cat", "dog", "tree, wood", "car")

_CONFIG = """
DATA: {IMAGE_SIZE: 16, CROP_PCT: 0.8, BATCH_SIZE: 4, IMAGENET_MEAN: [0.4, 0.5, 0.6]}
MODEL: {NUM_CLASSES: 4, MIXER: {PATCH_SIZE: 4, EMBED_DIM: 12, DEPTH: 2, MLP_RATIO: 2.0}}
"""


def make_run(folder: Path) -> Path:
    """Writes config.yaml, classes.txt and best.pdparams (random), and returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(_CONFIG)
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    rng = np.random.default_rng(0)
    state = build_resmlp(get_config(str(folder / "config.yaml"))).state_dict()
    state = {k: rng.normal(0.1, 0.5, v.shape).astype("float32") for k, v in state.items()}
    write_weights(state, folder / "best.pdparams")
    return folder / "best.pdparams"


def make_images(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    paths = []
    for number in range(count):
        small = rng.integers(0, 256, [5, 7, 3], dtype=np.uint8)
        image = Image.fromarray(small).resize((30 + 7 * number, 24 + 3 * number), Image.BICUBIC)
        paths.append(str(folder / f"{number}.png"))
        image.save(paths[-1])
    return paths


def crop_by_hand(path: str | Path, size: int = 16, short: int = 20) -> np.ndarray:
    """Resize the short side, bicubic, and cut out the middle; PIL and whole numbers only."""
    image = Image.open(path).convert("RGB")
    scale = short / min(image.size)
    wide = [short if side == min(image.size) else int(side * scale) for side in image.size]
    left, top = (round((side - size) / 2) for side in wide)
    return np.asarray(image.resize(wide, Image.BICUBIC).crop((left, top, left + size, top + size)))


def run_tool(name: str, *arguments, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


def run_here(command: list[str]) -> mock.Mock:
    """In place of `subprocess.run`: what a main does with its arguments, in this process."""
    try:
        code = launch(resolve_config(get_arguments(command[2:])), 1)
    except UserError:
        code = 2
    return mock.Mock(returncode=code)


def logits_by_hand(weights: Path, images: np.ndarray, mean, std) -> np.ndarray:
    """Logits ``[B, K]`` of uint8 images ``[B, H, W, 3]``, normalised by NumPy in float64."""
    config = get_config(str(weights.with_name("config.yaml")))
    model = build_resmlp(config)
    model.set_state_dict(paddle.load(str(weights)))
    model.eval()
    x = (images / 255.0 - np.array(mean)) / np.array(std)
    with paddle.no_grad():
        return model(paddle.to_tensor(x.transpose(0, 3, 1, 2).astype("float32"))).numpy()
