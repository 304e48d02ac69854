"""ImageNet (ILSVRC 2012) in the layouts in which it is downloaded, for make_lists.

    ILSVRC2012_img_train.tar    a tar of 1,000 tars, or unpacked once (n01440764.tar ...) or twice
    ILSVRC2012_img_val.tar      50,000 images without a folder per class, or unpacked
    n01440764.tar ..., ILSVRC2012_val_00000001.JPEG ...          unpacked where the archives lay
    ILSVRC/Data/CLS-LOC/{train,val}                              Kaggle's, also in its zip or a tar

The labels of the validation images go by the numbers in their names, see `validation_labels`.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from cli.errors import DataError
from loading import archives
from loading.files import list_images, split_folder
from loading.imagenet import val_number, validation_labels, wordnet_ids
from storage.files import printable, shorten

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_COUNTS = {"train": 1_281_167, "val": 50_000}
_KAGGLE = "ILSVRC/Data/CLS-LOC"
# What may lie loose in a folder: the tars of the classes, the images to validate on.
_PARTS = {"train": re.compile(r"n[0-9]{8}\.tar").fullmatch, "val": val_number}


class Entry(NamedTuple):
    path: str  # relative to the data folder
    name: str  # of the class; of ImageNet its WordNet id
    side: str  # "train" or "val"; empty: to be drawn


def find_imagenet(root: str) -> list[Entry] | None:
    """The images where a folder has one of ImageNet's own layouts, perhaps of one side only. None:
    some other folder, or one folder per class on both sides.

    DataError for such a layout with images or classes that are not ImageNet's.
    """
    train, val = (_place(root, side) for side in ARCHIVES)
    tars = _parts(train, "train")
    val_images = _parts(root, "val") if val == root else list_images(val) if val else []
    official = any(os.path.basename(p or "").startswith("ILSVRC2012_") for p in (train, val))
    flat = any(val_number(path) and os.path.dirname(path) == val for path in val_images)
    if not (official or tars or flat):
        return None
    folders = [folder for folder in (train, *tars) if folder not in (None, root)]
    train_images = [path for folder in folders for path in list_images(folder)]
    entries = _train_entries(root, train, train_images)
    entries += _val_entries(root, val_images) if val else []
    for side, place in zip(ARCHIVES, (train, val)):
        found = f"{describe(side, entries)}, in" if place else "not found in"
        print(f"ImageNet, {side}: {found} {printable(place or root)}")
    return entries


def describe(side: str, entries: list[Entry]) -> str:
    """The images and classes of a side; what differs from ImageNet's own is said."""
    names = [entry.name for entry in entries if entry.side in (side, "")]
    text = f"{len(names):,} images of {len(set(names)):,} classes"
    if len(names) != _COUNTS[side]:
        text += f" (ImageNet has {_COUNTS[side]:,})"
    if missing := sorted(set(wordnet_ids()).difference(names)):
        text += f"; without images: {shorten(missing, 5)}"
    return text


def _place(root: str, side: str) -> str | None:
    """The folder or archive of a side; `root` itself where its parts lie loose in there."""
    bases = [root, f"{root}/{_KAGGLE}", f"{root}/Data/CLS-LOC", f"{root}/CLS-LOC"]
    for name in sorted(os.listdir(root)):
        if name.lower().endswith(archives.ENDINGS) and "imagenet" in name.lower():
            bases.append(f"{root}/{name}/{_KAGGLE}")
    for base in bases:
        official = f"{base}/{ARCHIVES[side]}"
        for place in (official, official.removesuffix(".tar"), split_folder(base, side)):
            if archives.is_folder(place):
                return place
    return root if _parts(root, side) else None


def _parts(folder: str | None, side: str) -> list[str]:
    """What lies loose in a folder of the disk. (Tars in a tar are folders there.)"""
    names = os.listdir(folder) if os.path.isdir(folder or "") else []
    return [os.path.join(folder, name) for name in sorted(filter(_PARTS[side], names))]


def _train_entries(root: str, place: str, paths: list[str]) -> list[Entry]:
    entries, known = [], set(wordnet_ids())
    for path in paths:
        name = os.path.relpath(path, place).split(os.sep)[0].removesuffix(".tar")
        if name not in known:
            raise DataError(f"{printable(path)}: {name!r} is no WordNet id of an ImageNet class")
        entries.append(Entry(os.path.relpath(path, root), name, "train"))
    return entries


def _val_entries(root: str, paths: list[str]) -> list[Entry]:
    """The entries by the numbers of the images, whichever folders they lie in."""
    ids, labels, found = wordnet_ids(), validation_labels(), {}
    for path in paths:
        number = val_number(path)
        if not number or number > len(labels):
            raise DataError(
                f"{printable(path)}: not the name of an ImageNet validation image "
                "(ILSVRC2012_val_00000001.JPEG to 00050000), so that its label is not known"
            )
        name = ids[labels[number - 1]]
        entry = Entry(os.path.relpath(path, root), name, "val")
        if found.setdefault(number, entry) is not entry:
            both = f"{printable(path)} and {printable(os.path.join(root, found[number].path))}"
            raise DataError(f"{both}: both are image {number}")
    if missing := [f"{n:08d}" for n in range(1, len(labels) + 1) if n not in found]:
        print(f"warning: {len(missing):,} validation images are missing: {shorten(missing, 5)}")
    return [found[number] for number in sorted(found)]
