"""ImageNet (ILSVRC 2012) in the layouts in which it is downloaded, for make_lists.

    ILSVRC2012_img_train.tar    a tar of 1,000 tars, or unpacked once (n01440764.tar ...) or twice
    ILSVRC2012_img_val.tar      50,000 images without a folder per class, or unpacked
    n01440764.tar ..., ILSVRC2012_val_00000001.JPEG ...          unpacked where the archives lay
    ILSVRC/Data/CLS-LOC/{train,val}, LOC_val_solution.csv        Kaggle's, also in its zip or a tar

The labels of the validation images go by the numbers in their names, see `validation_labels`.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from functools import cache

from cli.errors import DataError
from loading import archives
from loading.files import list_images, split_folder
from loading.imagenet import val_number, validation_labels, wordnet_ids
from loading.images import regular_size
from storage.files import printable, shorten

COUNTS = {"train": 1_281_167, "val": 50_000}
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_OFFICIAL = {"train": "ILSVRC2012_img_train", "val": "ILSVRC2012_img_val"}
ARCHIVES = tuple(f"{name}.tar" for name in _OFFICIAL.values())
_KAGGLE = "ILSVRC/Data/CLS-LOC"
_KAGGLE_LABELS = "LOC_val_solution.csv"
_CLASS_TAR = re.compile(r"n[0-9]{8}\.tar")

Entry = tuple[str, str]  # (path relative to the data folder, WordNet id)


def find_imagenet(root: str, log: Callable[[str], None]) -> tuple[list[Entry], list[Entry]] | None:
    """The images to train and to validate on, where a folder has one of ImageNet's own layouts.

    Returns:
        Two lists, one of which may be empty; None: some other folder, or one folder per class on
        both sides, which needs nothing of this.

    Raises:
        DataError: such a layout with images or classes that are not ImageNet's.
    """
    for folder in ("", "data", "ILSVRC2012_devkit_t12/data"):
        path = os.path.join(root, folder, GROUND_TRUTH)
        if os.path.isfile(path):
            log(explain_ground_truth(path))
    places = {side: _place(root, side) for side in COUNTS}
    images = {side: _images(root, side, place) for side, place in places.items()}
    flat = [path for path in images["val"] if os.path.dirname(path) == places["val"]]
    tars = _class_tars(places["train"]) if places["train"] else []
    named = any(
        os.path.basename(place or "").startswith("ILSVRC2012_") for place in places.values()
    )
    if not (named or tars or root in places.values() or any(map(val_number, flat))):
        return None
    images["train"] += [image for tar in tars for image in list_images(tar)]
    train = [_train_entry(root, places["train"], path) for path in images["train"]]
    val = _val_entries(root, images["val"], log) if places["val"] else []
    for side, entries in (("train", train), ("val", val)):
        if places[side]:
            log(f"ImageNet, {side}: {describe(side, entries)}, in {printable(places[side])}")
        else:
            log(f"ImageNet, {side}: not found in {printable(root)}")
    return train, val


def describe(side: str, entries: list[Entry]) -> str:
    """The images and classes of a side; what differs from ImageNet's own is said."""
    classes = {name for _, name in entries}
    text = f"{len(entries):,} images of {len(classes):,} classes"
    if len(entries) != COUNTS[side]:
        text += f" (ImageNet has {COUNTS[side]:,})"
    missing = [name for name in wordnet_ids() if name not in classes]
    if missing:
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
    """The folder or archive that holds a side."""
    bases = [root, f"{root}/{_KAGGLE}", f"{root}/Data/CLS-LOC", f"{root}/CLS-LOC"]
    for name in sorted(os.listdir(root)):
        if name.lower().endswith(archives.ENDINGS) and "imagenet" in name.lower():
            bases.append(f"{root}/{name}/{_KAGGLE}")
    for base in bases:
        for name in (f"{_OFFICIAL[side]}.tar", _OFFICIAL[side], None):
            place = split_folder(base, side) if name is None else f"{base}/{name}"
            if archives.is_folder(place):
                return place
    is_loose = val_number if side == "val" else _CLASS_TAR.fullmatch
    return root if any(map(is_loose, os.listdir(root))) else None


def _images(root: str, side: str, place: str | None) -> list[str]:
    if place is None or (place == root and side == "train"):
        return []  # class tars are looked for separately
    if place == root:
        return [os.path.join(root, name) for name in sorted(os.listdir(root)) if val_number(name)]
    return list_images(place)


def _class_tars(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []  # tars in a tar are folders of its index
    names = sorted(filter(_CLASS_TAR.fullmatch, os.listdir(folder)))
    return [os.path.join(folder, name) for name in names]


@cache
def _known() -> frozenset[str]:
    return frozenset(wordnet_ids())


def _train_entry(root: str, place: str, path: str) -> Entry:
    name = os.path.relpath(path, place).split(os.sep)[0].removesuffix(".tar")
    if name not in _known():
        raise DataError(f"{printable(path)}: {name!r} is not the WordNet id of an ImageNet class")
    return os.path.relpath(path, root), name


def _val_entries(root: str, paths: list[str], log) -> list[Entry]:
    labels = validation_labels()
    known = {number: wordnet_ids()[label] for number, label in enumerate(labels, 1)}
    numbers: dict[int, str] = {}
    for path in paths:
        number = val_number(path)
        if not number or number > len(labels):
            raise DataError(
                f"{printable(path)}: not the name of an ImageNet validation image "
                "(ILSVRC2012_val_00000001.JPEG to 00050000), so that its label is not known"
            )
        if number in numbers:
            raise DataError(
                f"{printable(path)} and {printable(numbers[number])}: both are image {number}"
            )
        numbers[number] = path
    _check_folders(numbers, known)
    missing = [f"{n:08d}" for n in range(1, len(labels) + 1) if n not in numbers]
    if missing:
        log(f"warning: {len(missing):,} validation images are missing: {shorten(missing, 5)}")
    near = [os.path.normpath(os.path.join(root, *[".."] * up)) for up in range(4)]
    for path in (os.path.join(folder, _KAGGLE_LABELS) for folder in near):
        if os.path.isfile(path):
            known = _with_kaggles(known, path, log)
            break
    return [
        (os.path.relpath(path, root), known[number]) for number, path in sorted(numbers.items())
    ]


def _check_folders(numbers: dict[int, str], known: dict[int, str]) -> None:
    """Where the images lie in a folder per class after all, it has to be their class."""
    for number, path in numbers.items():
        folder = os.path.basename(os.path.dirname(path))
        if folder in _known() and folder != known[number]:
            raise DataError(
                f"{printable(path)}: this image is of class {known[number]}, but lies in the "
                f"folder of {folder}"
            )


def _with_kaggles(known: dict[int, str], path: str, log) -> dict[int, str]:
    """The labels of Kaggle's ``ImageId,PredictionString`` lines, which should be the known ones."""
    found = {}
    try:
        regular_size(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line, row in enumerate(csv.reader(file), 1):
                number = val_number(f"{row[0]}.JPEG") if len(row) > 1 else None
                if number in known:
                    found[number] = row[1].split(" ")[0]
                    if found[number] not in _known():
                        raise DataError(f"{path}:{line}: {found[number]!r} is no ImageNet class")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    other = [number for number, name in found.items() if name != known[number]]
    log(f"{path}: labels of {len(found):,} images")
    if other:
        log(
            f"warning: {len(other):,} of them are not the known ones, such as "
            f"{found[other[0]]} for ILSVRC2012_val_{other[0]:08d} ({known[other[0]]}); "
            "the file's are taken"
        )
    return {**known, **found}
