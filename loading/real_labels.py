"""ImageNet-ReaL: several right labels an image, for the 50,000 validation images.

Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159; its authors publish
the labels in github.com/google-research/reassessed-imagenet.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from cli.errors import DataError
from loading.files import ImageIndex
from loading.imagenet import val_number


def read_real_labels(path: str | os.PathLike, files: ImageIndex, num_classes: int) -> np.ndarray:
    """The right labels of each image, int64 ``[images, most labels]``, filled up with -1.

    ``path`` is ``real.json`` as its authors publish it; the images have ImageNet's names, in any
    order and folder. DataError if the file is not that list, lacks an image, or labels none.
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
        number = val_number(files.path(index)) or 0
        if not 1 <= number <= len(entries):  # entry n - 1 is of image n, whatever its folder
            raise DataError(
                f"{files.where(index)}: {path} has no labels for it; they go by the names "
                f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(entries):08d}.JPEG"
            )
        row = entries[number - 1]
        labels = row if isinstance(row, list) else [None]
        if not all(type(label) is int and 0 <= label < num_classes for label in labels):
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
