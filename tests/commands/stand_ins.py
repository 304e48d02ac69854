"""What the pages take for granted, in small: data, published weights, a run of the demo, SLURM."""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from config import get_config
from demo.fashion_mnist import Split, read, write_archive
from demo.make_subset import ARCHIVE
from demo.prepare import prepare
from loading.imagenet import wordnet_ids
from port_weights import zoo
from port_weights.export_timm_weights import write_torch_weights
from port_weights.names import convert
from resmlp import build_resmlp
from storage.weights import write_weights
from tests.helpers.transfer_data import cifar10, flowers102

from . import tables
from .pages import ROOT

FLOWERS = ("daisy", "dandelion", "roses", "sunflowers", "tulips")

SLURM = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "here"}
_PROGRAMS = {"srun": 'exec "$@"', "scontrol": "echo 127.0.0.1"}


def make(folder: Path) -> None:
    rng = np.random.default_rng(0)
    repository = folder / "repository"
    _imagenet(folder / "dataset" / "imagenet", folder / "shared", rng)
    _photo(repository / "photo.jpg", rng)
    for name in FLOWERS:
        for number in range(3):
            _photo(repository / "photos" / name / f"{number}.jpg", rng)
    _weights(repository)
    cifar10(repository / "cifar-10-binary.tar.gz")
    flowers102(repository)
    _demo(repository, folder / "shared")
    for name, line in _PROGRAMS.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)


def _imagenet(root: Path, images: Path, rng: np.random.Generator) -> None:
    """1,000 classes of links to images of four, where nobody writes; and a set of two classes."""
    root.mkdir(parents=True)
    for name in wordnet_ids():
        (images / "train" / name).mkdir(parents=True)
    for side in ("train", "val"):
        for name in wordnet_ids()[::250]:
            _photo(images / side / name / f"{name}_1.JPEG", rng)
        (root / side).symlink_to(images / side)
    for name in wordnet_ids()[6:12:5]:
        _photo(root.with_name("imagenet-a") / name / "1.jpg", rng)


def _photo(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = rng.integers(0, 256, [6, 8, 3], dtype=np.uint8)
    Image.fromarray(small).resize((320, 240), Image.BICUBIC).save(path)


def _weights(repository: Path) -> None:
    states = {}
    for name in ("resmlp_12_224", "resmlp_24_224", "resmlp_24_distilled_224"):
        config = get_config(str(ROOT / "configs" / f"{name}.yaml"))
        config.MODEL.MIXER.DEPTH = tables.DEPTH
        state = {key: value.numpy() for key, value in build_resmlp(config).state_dict().items()}
        states[name] = state
        write_weights(state, repository / f"{name}.pdparams")
    write_weights(state, repository / "weights" / f"{name}.pdparams")
    write_torch_weights(convert(state, "paddle", "timm")[0], repository / "model.safetensors")
    if importlib.util.find_spec("torch"):
        for name in ("resmlp_12_224", "resmlp_24_distilled_224"):
            theirs = convert(states[name], "paddle", "facebook")[0]
            write_torch_weights(theirs, repository / zoo.find(name).file)


def _demo(repository: Path, images: Path) -> None:
    data = images / "demo"
    splits = read(ARCHIVE)
    few = {name: Split(s.images[::94], s.labels[::94]) for name, s in splits.items()}
    write_archive(few, repository.parent / "fashion_mnist.tar.xz")
    prepare({**splits, "train": few["train"]}, data)
    (repository / "demo").mkdir()
    (repository / "demo" / "data").symlink_to(data)
    subprocess.run(
        [sys.executable, ROOT / "main_single_gpu.py", "-output=output/demo"]
        + [f"-cfg={ROOT}/configs/resmlp_demo.yaml"]
        + ["-opts", "TRAIN.NUM_EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"],
        cwd=repository,
        check=True,
    )


def copy(stand_ins: Path, folder: Path) -> Path:
    shutil.copytree(stand_ins, folder, symlinks=True, ignore=lambda *_: {"shared"})
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in os.fsdecode(tracked.stdout).rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            target = folder / "repository" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    for files, pattern, replacement, _ in tables.IN_THE_CLONE:
        for path in (folder / "repository").glob(files):
            path.write_text(re.sub(pattern, replacement, path.read_text()))
    return folder / "repository"
