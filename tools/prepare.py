"""CIFAR-10, CIFAR-100 and Flowers-102, as they are downloaded, become data folders.

python tools/prepare.py cifar-10-binary.tar.gz -output cifar10
python tools/prepare.py 102flowers.tgz -output flowers102  # and its two .mat files beside it

    OUTPUT/train.tar  OUTPUT/val.tar               CIFAR's images as PNG, Flowers' as they are
    OUTPUT/train_list.txt  OUTPUT/val_list.txt     `relative/path label`: the mains read them so
    OUTPUT/classes.txt                             CIFAR's names (Flowers' archive has none)

The official test images are ``val``. Of Flowers-102 the official training and validation images
together are ``train``: 2,040, as the articles that fine-tune on it count them.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import contextlib
import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cli.errors import DataError, UserError, run_as_script
from cli.parser import Parser
from storage.files import atomic
from tools.common import require, write_file

_CIFAR = {  # a file that only this one has -> its files, bytes of labels before an image, names
    "data_batch_1.bin": (
        {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "val": ["test_batch.bin"]},
        *(1, "batches.meta.txt"),
    ),
    "train.bin": ({"train": ["train.bin"], "val": ["test.bin"]}, 2, "fine_label_names.txt"),
}
_PIXELS = 3 * 32 * 32  # of an image of CIFAR: red, green and blue plane
_SETS = {"trnid": "train", "valid": "train", "tstid": "val"}  # of setid.mat
_DAMAGED = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)

Picture = tuple[str, str, int, bytes]  # split, name in its archive, label, the file


def prepare(archive: str, output: str) -> None:
    """Writes the data folder `output` from an archive, which is recognised by what is in it.

    DataError: a damaged archive, or none of these, or a file beside it is missing. UserError:
    ``output`` holds something, or cannot be written.
    """
    if os.path.isdir(output) and os.listdir(output):
        raise UserError(f"-output {output}: is not empty; name another, or remove it")
    try:
        names, pictures = _open(archive)
        lists = _write_tars(pictures, Path(output))
    except _DAMAGED as error:
        reason = str(error).partition(":")[0]  # a line, of tarfile's several
        raise DataError(f"{archive}: cannot be read: {reason}; download it again") from None
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror}") from None
    if names:
        write_file(Path(output, "classes.txt"), "".join(f"{name}\n" for name in names))
    for split, lines in lists.items():
        write_file(Path(output, f"{split}_list.txt"), "".join(lines))
    print(f"{output}: {len(lists['train']):,} images to train on, {len(lists['val']):,} to test")
    print(f"use it with: -dataset imagenet2012 -data_path {output}")


def _open(archive: str) -> tuple[list[str], Iterator[Picture]]:
    """The names of the classes (none: []), and the images one after another."""
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            base = os.path.basename(member.name)
            if base.startswith("image_0"):
                return [], _flowers(archive)
            if member.isfile() and base.endswith((".bin", ".txt")):
                files[base] = tar.extractfile(member).read()
    for mark, (parts, head, meta) in _CIFAR.items():
        if mark in files:
            wanted = [*sum(parts.values(), []), meta]
            if missing := [name for name in wanted if name not in files]:
                raise DataError(f"{archive}: lacks {', '.join(missing)}; download it again")
            names = files[meta].decode().split()
            return names, _cifar(archive, files, parts, head, names)
    raise DataError(f"{archive}: neither CIFAR's binary version nor Flowers-102's images")


def _cifar(archive: str, files: dict, parts: dict, head: int, names: list) -> Iterator[Picture]:
    """The images of CIFAR's records: labels (the last one counts), then the planes."""
    for split, members in parts.items():
        data = np.frombuffer(b"".join(files[name] for name in members), "uint8")
        if len(data) % (head + _PIXELS):
            raise DataError(f"{archive}: {members[-1]} ends within an image; download it again")
        for number, record in enumerate(data.reshape(-1, head + _PIXELS)):
            label, file = int(record[head - 1]), io.BytesIO()
            if label >= len(names):
                raise DataError(f"{archive}: {split} image {number} has the label {label}")
            Image.fromarray(record[head:].reshape(3, 32, 32).transpose(1, 2, 0)).save(file, "PNG")
            yield split, f"{names[label]}/{number:05d}.png", label, file.getvalue()


def _flowers(archive: str) -> Iterator[Picture]:
    beside = Path(archive).parent
    labels = read_mat(beside / "imagelabels.mat").get("labels", np.zeros(0, "uint8"))
    sets = read_mat(beside / "setid.mat")
    splits = {int(i): split for key, split in _SETS.items() for i in sets.get(key, ())}
    if not splits or max(splits) > len(labels) or min(splits) < 1:
        raise DataError(f"{beside / 'setid.mat'}: does not fit {beside / 'imagelabels.mat'}")
    with tarfile.open(archive) as tar:
        for member in tar:
            name = os.path.basename(member.name)
            number = name[len("image_") : -len(".jpg")]
            if number.isdigit() and int(number) in splits:
                label = int(labels[int(number) - 1])  # from 1
                data = tar.extractfile(member).read()
                yield splits.pop(int(number)), f"{label}/{name}", label - 1, data
    if splits:
        raise DataError(f"{archive}: lacks image_{min(splits):05d}.jpg; download it again")


def _write_tars(pictures: Iterator[Picture], output: Path) -> dict[str, list[str]]:
    """Writes ``train.tar`` and ``val.tar``; the lines of their lists. After an error, neither."""
    lists: dict[str, list[str]] = {"train": [], "val": []}
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(atomic(output / f"{split}.tar")) for split in lists}
        tars = {s: stack.enter_context(tarfile.open(None, "w", file)) for s, file in files.items()}
        for split, name, label, data in pictures:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tars[split].addfile(info, io.BytesIO(data))
            lists[split].append(f"{split}.tar/{name} {label}\n")
    return lists


def read_mat(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The matrices of a MATLAB file by name, flat. Raises DataError; UserError without SciPy."""
    require("Flowers-102", ("scipy",))
    from scipy.io import loadmat

    try:
        with open(path, "rb") as file:
            arrays = loadmat(file).items()
        return {name: value.ravel() for name, value in arrays if isinstance(value, np.ndarray)}
    except FileNotFoundError:
        reason = "no such file; it belongs beside 102flowers.tgz"
    except Exception:  # whatever a damaged file leads SciPy to
        reason = "not a MATLAB file of version 5; download it again"
    raise DataError(f"{path}: {reason}")


def main() -> None:
    parser = Parser("Makes a data folder of CIFAR-10, CIFAR-100 or Flowers-102, as downloaded.")
    parser.paths("archive", "cifar-10-binary.tar.gz, cifar-100-binary.tar.gz or 102flowers.tgz")
    parser.flag("output", "data folder to make", metavar="DIR", required=True)
    args = parser.parse_args()
    prepare(args.archive, args.output)


if __name__ == "__main__":
    run_as_script(main)
