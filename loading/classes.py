"""The classes of a data set: their number, names and labels. (No Paddle.)"""

from __future__ import annotations

import os

from cli.errors import DataError
from loading import archives
from loading.files import class_folders, evaluation_folder, find_classes, read_list
from loading.imagenet import wordnet_ids
from loading.images import reason_of, regular_size


def read_class_names(path: str, num_classes: int | str) -> list[str]:
    """Reads a text file of class names, line i the name of label i.

    Raises:
        DataError: unreadable, a line without a name, or not `num_classes` lines (``auto``: any).
    """
    try:
        regular_size(path)
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file.read().rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {reason_of(error)}; expected one class name a line") from None
    if "" in names:
        line = names.index("") + 1
        raise DataError(f"{path}:{line}: no name; expected one class name a line")
    if num_classes not in ("auto", len(names)):
        raise DataError(f"{path}: {len(names)} names but MODEL.NUM_CLASSES is {num_classes}")
    return names


def class_names(config) -> list[str] | None:
    """The names of the classes, by label: from DATA.CLASS_NAMES, else ``classes.txt`` in the data
    folder, else the folder names of an `imagefolder` tree; None where there are none.
    """
    imagefolder = config.DATA.DATASET == "imagefolder" and archives.is_folder(config.DATA.DATA_PATH)
    return _given_names(config) or (folder_classes(config) if imagefolder else None)


def _given_names(config) -> list[str] | None:
    beside = os.path.join(config.DATA.DATA_PATH, "classes.txt")
    path = config.DATA.CLASS_NAMES or (beside if os.path.isfile(beside) else None)
    return read_class_names(path, config.MODEL.NUM_CLASSES) if path else None


def with_num_classes(config):
    """The config, frozen, with a number where MODEL.NUM_CLASSES is ``auto``: as many classes as
    there are `class_names`, else the largest label of the training list (without one: of the
    validation list) and one more.

    Raises:
        DataError: there is no data folder, or what is in there cannot be read.
    """
    root, data = config.DATA.DATA_PATH, config.DATA
    if config.MODEL.NUM_CLASSES != "auto":
        return config
    if not archives.is_folder(root):
        raise DataError(
            f"{root}: no such data folder, and MODEL.NUM_CLASSES auto counts the classes there; "
            "set it with `-data_path` (tools: -opts DATA.DATA_PATH DIR), or set the number"
        )
    names, config = class_names(config), config.clone()
    if names is None:
        lists = [os.path.join(root, name) for name in (data.TRAIN_LIST, data.VAL_LIST)]
        path = next(filter(os.path.isfile, lists), lists[0])
        labels = read_list(path, root, 10**9, data.ALLOW_OUTSIDE_PATHS).labels
    config.defrost()
    config.MODEL.NUM_CLASSES = max(labels) + 1 if names is None else len(names)
    config.freeze()
    return config


def folder_classes(config) -> list[str]:
    """The class folders of an `imagefolder` tree by label.

    They are those of `find_classes`, unless the weights come from a run whose classes.txt has these
    very names in another order. (Runs used to sort numbers as texts.) The weights' order is kept
    then. With EVAL they are the classes of the weights, of which the data may have some only.

    Raises:
        DataError: as `find_classes`; with EVAL, folders that are no classes of the weights.
    """
    root, order = config.DATA.DATA_PATH, _run_classes(config)
    folder = evaluation_folder(root)
    if config.EVAL and archives.is_folder(folder) and (folders := class_folders(folder)):
        known = _known_classes(config, order, folders)
        for classes in known:
            if set(folders) <= set(classes):
                return classes
        if known:
            wrong = [name for name in folders if name not in known[0]]
            whose = "the classes.txt beside the weights" if len(known) == 1 else "ImageNet's ids"
            raise DataError(
                f"{folder}: {len(wrong)} of {len(folders)} class folders are not in {whose}, such "
                f"as {wrong[0]!r} (they have {known[0][0]!r}); weights of other classes need the "
                "classes.txt of their training beside them, one class folder a line"
            )
    classes = find_classes(root)
    return order if order and sorted(order) == sorted(classes) else classes


def _known_classes(config, order: list[str], folders: list[str]) -> list[list[str]]:
    """What the folders of the weights' classes may be called, by label; empty: nobody knows.

    They are called as in the run's classes.txt, unless that has names for people. ImageNet's, which
    1,000 classes are where nothing else is known, are called by their WordNet ids or by their
    numbers, as in ImageNet-V2.
    """
    count, imagenet = config.MODEL.NUM_CLASSES, list(wordnet_ids())
    if order and count == "auto":
        count = len(order)
    theirs = len(order) == count and order != imagenet
    if theirs and (set(folders) <= set(order) or order != _given_names(config)):
        return [order]
    if count != len(imagenet):
        return []
    numbers = [str(label) for label in range(count)]
    for name in folders:
        if name.isdecimal() and int(name) < count:
            numbers[int(name)] = name  # which may be 0007
    return [imagenet, numbers]


def _run_classes(config) -> list[str]:
    """The lines of the classes.txt beside the weights that the config names, if there is one."""
    for weights in filter(None, (config.MODEL.RESUME, config.MODEL.PRETRAINED)):
        folder = config.SAVE if weights == "auto" else os.path.dirname(weights)
        path = os.path.join(folder, "classes.txt")
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8-sig") as file:
                    return [line.strip() for line in file.read().rstrip().split("\n")]
            except (OSError, UnicodeDecodeError):
                return []
    return []
