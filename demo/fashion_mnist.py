"""Reads Fashion-MNIST: the idx files that it is published as, in a folder or a tar archive."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli.errors import DataError

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SPLITS = {"train": "train", "val": "t10k"}  # ImageNet's name of a split -> the one in idx files


class Split(NamedTuple):
    images: np.ndarray  # uint8 [n, 28, 28]
    labels: np.ndarray  # uint8 [n]


def read(source: str | Path) -> dict[str, Split]:
    """Reads ``train`` and ``val`` (the official test set) from a folder of the four idx files,
    gzipped or not, or a tar archive. Raises DataError where files are missing or wrong.
    """
    source = Path(source)
    files = (_read_folder if source.is_dir() else _read_archive)(source)
    splits = {}
    for split, stem in SPLITS.items():
        images = _parse_idx(files, f"{stem}-images-idx3-ubyte", source)
        labels = _parse_idx(files, f"{stem}-labels-idx1-ubyte", source)
        shapes = images.shape, labels.shape
        if shapes != ((len(labels), 28, 28), (len(labels),)) or labels.max(initial=0) > 9:
            raise DataError(
                f"{source}: {stem}: images {shapes[0]} and labels {shapes[1]} up to "
                f"{labels.max(initial=0)}; expected [n, 28, 28] and [n], 0 to 9"
            )
        splits[split] = Split(images, labels)
    return splits


def write_archive(splits: Mapping[str, Split], path: str | Path) -> None:
    """Writes both splits as a tar.xz of idx files; the same splits give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for split, stem in SPLITS.items():
            for kind, array in zip(("images-idx3", "labels-idx1"), splits[split]):
                data = _to_idx(array)
                member = tarfile.TarInfo(f"{stem}-{kind}-ubyte")  # no date, no owner
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    # Four bits of the pixel before as context (lc): 2 % smaller than the default three.
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
    Path(path).write_bytes(lzma.compress(buffer.getvalue(), filters=[lzma2]))


def fingerprint(splits: Mapping[str, Split]) -> str:
    arrays = [array for split in SPLITS for array in splits[split]]
    return hashlib.sha256(b"".join(map(_to_idx, arrays))).hexdigest()


def counts(splits: Mapping[str, Split]) -> str:
    return " and ".join(f"{len(split.labels):,} {name}" for name, split in splits.items())


def folder_name(label: int) -> str:
    """The folder of a class: its label first, so that folders sort by label (``9_ankle_boot``)."""
    return f"{label}_" + re.sub(r"\W+", "_", CLASSES[label].lower())


def _read_folder(folder: Path) -> dict[str, bytes]:
    files = {}
    try:
        for path in folder.glob("*-ubyte"):
            files[path.name] = path.read_bytes()
        for path in folder.glob("*-ubyte.gz"):
            files[path.name[: -len(".gz")]] = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:  # EOFError: a truncated gzip file
        raise DataError(f"{path}: cannot be read: {error}") from None
    return files


def _read_archive(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    files[member.name] = archive.extractfile(member).read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read as a tar archive: {error}") from None
    return files


def _parse_idx(files: Mapping[str, bytes], name: str, source: Path) -> np.ndarray:
    """Parses an idx file: two zeros, type 8 (uint8), rank, a big-endian length per axis, data."""
    if name not in files:
        raise DataError(f"{source}: {name} (or {name}.gz) is missing")
    data, rank = files[name], int(name.rsplit("idx", 1)[1][0])
    start = 4 + 4 * rank
    shape = np.frombuffer(data[4:start], ">u4")
    if data[:4] != bytes([0, 0, 8, rank]) or len(data) != start + np.prod(shape, dtype=np.int64):
        raise DataError(f"{source}: {name} is not a whole idx file of rank {rank}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape.astype(int))


def _to_idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + np.ascontiguousarray(array, np.uint8).tobytes()
