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
from collections.abc import Callable

from cli.errors import DataError
from loading import archives
from loading.files import list_images, split_folder
from loading.imagenet import val_number, validation_labels, wordnet_ids
from storage.files import printable, shorten

COUNTS = {"train": 1_281_167, "val": 50_000}
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_OFFICIAL = {"train": "ILSVRC2012_img_train", "val": "ILSVRC2012_img_val"}
ARCHIVES = tuple(f"{name}.tar" for name in _OFFICIAL.values())
_KAGGLE = "ILSVRC/Data/CLS-LOC"
_CLASS_TAR = re.compile(r"n[0-9]{8}\.tar")

Entry = tuple[str, str]  # (path relative to the data folder, WordNet id)


def find_imagenet(root: str, log: Callable[[str], None]) -> tuple[list[Entry], list[Entry]] | None:
    """The images to train and to validate on, where a folder has one of ImageNet's own layouts;
    either list may be empty. None: some other folder, or one folder per class on both sides.
    DataError for such a layout with images or classes that are not ImageNet's.
    """
    for folder in ("", "data", "ILSVRC2012_devkit_t12/data"):
        path = os.path.join(root, folder, GROUND_TRUTH)
        if os.path.isfile(path):
            log(explain_ground_truth(path))
    places = {side: _place(root, side) for side in COUNTS}
    train, val = places.values()
    tars = _names(train, _CLASS_TAR.fullmatch)
    val_images = [] if val in (None, root) else list_images(val)
    val_images += _names(root, val_number) if val == root else []
    official = any(os.path.basename(p or "").startswith("ILSVRC2012_") for p in (train, val))
    flat = any(val_number(path) and os.path.dirname(path) == val for path in val_images)
    if not (official or tars or flat):
        return None
    train_images = [] if train in (None, root) else list_images(train)
    train_images += [image for tar in tars for image in list_images(tar)]
    sides = (
        _train_entries(root, train, train_images),
        _val_entries(root, val_images, log) if val else [],
    )
    for (side, place), entries in zip(places.items(), sides):
        found = f"{describe(side, entries)}, in" if place else "not found in"
        log(f"ImageNet, {side}: {found} {printable(place or root)}")
    return sides


def describe(side: str, entries: list[Entry]) -> str:
    """The images and classes of a side; what differs from ImageNet's own is said."""
    classes = {name for _, name in entries}
    text = f"{len(entries):,} images of {len(classes):,} classes"
    if len(entries) != COUNTS[side]:
        text += f" (ImageNet has {COUNTS[side]:,})"
    if missing := [name for name in wordnet_ids() if name not in classes]:
        text += f"; without images: {shorten(missing, 5)}"
    return text


def explain_ground_truth(path: str) -> str:
    """Why the numbers of the development kit's file are not taken for labels."""
    return (
        f"{printable(path)}: not used: its numbers count the classes in the order of the "
        "development kit (ILSVRC2012_ID), not of the WordNet ids; the labels are known by the "
        "images' names: give the folder or archive that holds them"
    )


def _place(root: str, side: str) -> str | None:
    bases = [root, f"{root}/{_KAGGLE}", f"{root}/Data/CLS-LOC", f"{root}/CLS-LOC"]
    for name in sorted(os.listdir(root)):
        if name.lower().endswith(archives.ENDINGS) and "imagenet" in name.lower():
            bases.append(f"{root}/{name}/{_KAGGLE}")
    for base in bases:
        official = f"{base}/{_OFFICIAL[side]}"
        for place in (f"{official}.tar", official, split_folder(base, side)):
            if archives.is_folder(place):
                return place
    return root if _names(root, val_number if side == "val" else _CLASS_TAR.fullmatch) else None


def _names(folder: str | None, is_wanted: Callable) -> list[str]:
    """What lies directly in a folder of the disk. (Tars in a tar are folders there.)"""
    names = sorted(filter(is_wanted, os.listdir(folder))) if os.path.isdir(folder or "") else []
    return [os.path.join(folder, name) for name in names]


def _train_entries(root: str, place: str, paths: list[str]) -> list[Entry]:
    entries, known = [], set(wordnet_ids())
    for path in paths:
        name = os.path.relpath(path, place).split(os.sep)[0].removesuffix(".tar")
        if name not in known:
            raise DataError(f"{printable(path)}: {name!r} is no WordNet id of an ImageNet class")
        entries.append((os.path.relpath(path, root), name))
    return entries


def _val_entries(root: str, paths: list[str], log: Callable[[str], None]) -> list[Entry]:
    ids, labels, found = wordnet_ids(), validation_labels(), {}
    known = set(ids)
    for path in paths:
        number, folder = val_number(path), os.path.basename(os.path.dirname(path))
        if not number or number > len(labels):
            raise DataError(
                f"{printable(path)}: not the name of an ImageNet validation image "
                "(ILSVRC2012_val_00000001.JPEG to 00050000), so that its label is not known"
            )
        name = ids[labels[number - 1]]
        if folder in known and folder != name:
            raise DataError(
                f"{printable(path)}: this image is of class {name}, but lies in the folder of "
                f"{folder}"
            )
        entry = os.path.relpath(path, root), name
        if found.setdefault(number, entry) is not entry:
            both = f"{printable(path)} and {printable(os.path.join(root, found[number][0]))}"
            raise DataError(f"{both}: both are image {number}")
    if missing := [f"{n:08d}" for n in range(1, len(labels) + 1) if n not in found]:
        log(f"warning: {len(missing):,} validation images are missing: {shorten(missing, 5)}")
    return [found[number] for number in sorted(found)]
