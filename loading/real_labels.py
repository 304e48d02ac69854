"""ImageNet-ReaL: several right labels an image, for the 50,000 validation images.

Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159; its authors publish
the labels in github.com/google-research/reassessed-imagenet.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np

from cli.errors import DataError
from loading.files import ImageIndex

# Entry n - 1 of the file is of the image with number n, whatever folder it lies in.
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


def read_real_labels(path: str | os.PathLike, files: ImageIndex, num_classes: int) -> np.ndarray:
    """The right labels of each image of the validation set.

    Args:
        path: ``real.json`` as its authors publish it: a list of lists of labels.
        files: the images, named as ImageNet names them, in any order and folder.
        num_classes: labels are 0 .. num_classes - 1.

    Returns:
        int64 ``[images, most labels]``; a row is filled up with -1, and holds nothing else where
        the image has no label.

    Raises:
        DataError: the file is not that list; an image has another name or no entry in it; none
            has a label.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is no JSON; expected the published real.json") from None
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list with a list of labels for each image")
    rows = []
    for index in range(len(files)):
        found = _NUMBER.fullmatch(os.path.basename(files.path(index)))
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(entries):
            raise DataError(
                f"{files.where(index)}: {path} has no labels for it; they go by the names "
                f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(entries):08d}.JPEG"
            )
        row = entries[number - 1]
        known = isinstance(row, list) and all(
            type(label) is int and 0 <= label < num_classes for label in row
        )
        if not known:
            raise DataError(
                f"{path}: entry {number}: expected a list of labels 0 .. {num_classes - 1}, "
                f"found {json.dumps(row)[:60]}"
            )
        rows.append(row)
    if not any(rows):
        raise DataError(f"{path}: none of the {len(files)} images has a label in it")
    labels = np.full([len(rows), max(map(len, rows))], -1, "int64")
    for index, row in enumerate(rows):
        labels[index, : len(row)] = row
    return labels
