"""Makes train_list.txt, val_list.txt and classes.txt for a folder of images; nothing is copied.

python tools/make_lists.py flowers -val_fraction 0.2 -verify    # flowers/<class>/<image>
python tools/make_lists.py imagenet                              # imagenet/{train,val}/<class>/...
python tools/make_lists.py photos/labels.csv                     # lines of path,label

Tar and zip archives may stand for folders. ImageNet is known in the layouts in which it is
downloaded (see imagenet.py): the official tars, unpacked or not, and Kaggle's.

The lists lie in the folder itself (a CSV's: the one it lies in), so that the mains take it with
`-dataset imagenet2012 -data_path FOLDER`; -output writes them elsewhere. Labels count the classes
in the order of their names, whole numbers by value. Where there are train/ and val/ (or Training/,
valid/, Validation/), they are the split. Else the classes (those in train/, if it is there alone)
are split each by its share, with a seed, and identical files stay on one side.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import csv
import hashlib
import io
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from cli.errors import DataError, run_as_script
from cli.parser import Parser
from cpu.setup import physical_cores
from loading import archives
from loading.files import (
    SPLIT_NAMES,
    class_folders,
    describe_others,
    find_classes,
    is_split_name,
    list_images,
    passed_over,
    read_list,
    sort_classes,
    split_folder,
)
from loading.imagenet import wordnet_ids
from loading.images import EXTENSIONS, BadImage, read_image, regular_size
from storage.files import atomic, printable, shorten
from tools import imagenet

FILES = TRAIN_LIST, VAL_LIST, CLASSES = "train_list.txt", "val_list.txt", "classes.txt"

Entry = tuple[str, str]  # (path relative to the data folder, class name)


@dataclass
class Split:
    """The images of a data folder, by side."""

    root: str
    classes: list[str]  # by label; empty where lists that were there have been checked
    train: list[Entry]
    val: list[Entry]


def make_lists(
    source: str,
    val_fraction: float = 0.1,
    seed: int = 0,
    verify: bool = False,
    force: bool = False,
    workers: int | None = None,
    log: Callable[[str], None] = print,
    output: str | None = None,
) -> Split:
    """Splits the images of a folder or CSV file and writes the three files beside them.

    Args:
        source: a folder with a folder per class, or with train/ and val/ of such; or a CSV file.
        val_fraction: share of each class's images to validate on, where there is no val/.
        seed: of that split.
        verify: first decode every image. Where the lists are there already, check those, and
            write nothing.
        force: replace lists that are there.
        workers: processes that decode; None: one a core.
        log: takes one line of text.
        output: folder for the files; None: beside the images. (Their paths stay relative to the
            images' folder.)

    Raises:
        DataError: no such layout, unusable names, the same content on both sides, images that
            cannot be decoded (each is logged), lists that are there already.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"-val_fraction is {val_fraction}; give a share between 0 and 1")
    if seed < 0:
        raise DataError(f"-seed is {seed}; give a number from 0 up")
    if workers is not None and workers < 1:
        raise DataError(f"-workers is {workers}; give a number from 1 up")
    root = source if os.path.isdir(source) else os.path.dirname(source) or "."
    if os.path.basename(source) in imagenet.ARCHIVES:
        source = root  # one of ImageNet's archives: they are looked at together
    folder = root if output is None else os.path.abspath(os.path.expanduser(output))
    there = [path for name in FILES if os.path.exists(path := os.path.join(folder, name))]
    if there and not force and not verify:
        raise DataError(f"{there[0]} is there already; -force replaces it, -verify checks it")
    only_check = bool(there) and not force
    split = (
        _read_lists(folder, root)
        if only_check
        else _find_split(source, root, val_fraction, seed, log)
    )
    if verify:
        paths = [os.path.join(root, path) for path, _ in split.train + split.val]
        check_images(paths, workers, log)
    if only_check:
        return split
    _write_lists(split, folder)
    counts = f"{len(split.train)} images to train on, {len(split.val)} to validate on"
    log(f"{root}: {counts}, {len(split.classes)} classes")
    for side, name in ((split.train, TRAIN_LIST), (split.val, VAL_LIST)):
        if not side:
            log(f"warning: {name} is not written: no images for it (training needs some)")
    keys = f"MODEL.NUM_CLASSES {len(split.classes)}"
    if output is not None:
        for key, name in zip(("TRAIN_LIST", "VAL_LIST", "CLASS_NAMES"), FILES):
            keys += f" DATA.{key} {shlex.quote(os.path.join(folder, name))}"
    log(f"use them with: -dataset imagenet2012 -data_path {root} -opts {keys}")
    return split


# --------------------------------------------------------------------------- what is there
def _find_split(source: str, root: str, val_fraction: float, seed: int, log) -> Split:
    sides, others = None, []
    if os.path.basename(source) == imagenet.GROUND_TRUTH:
        raise DataError(imagenet.explain_ground_truth(source))
    if os.path.isdir(source) and (found := imagenet.find_imagenet(source, log)):
        return Split(root, list(wordnet_ids()), *found)
    if not archives.is_folder(source):
        entries = _read_csv(source, root)
        classes = sort_classes({name for _, name in entries}, source)
    else:
        folders = {side: split_folder(source, side) for side in SPLIT_NAMES}
        there = [side for side, folder in folders.items() if archives.is_folder(folder)]
        if there == ["val"]:
            raise DataError(f"{folders['val']}: there is no train/ beside it to train on")
        besides = [name for name in class_folders(source) if not is_split_name(name)]
        if there == ["train"] and len(besides) > 1 and not class_folders(folders["train"]):
            there = []  # trains among buses and cars
        classes = find_classes(source) if there else class_folders(source)
        scanned = [folders[side] for side in there] or [source]
        scans = [_scan(root, folder, others) for folder in scanned]
        entries = sum(scans, [])
        if len(there) == 2:
            sides = scans
            unknown = sorted({name for _, name in sides[1]} - set(classes))
            if unknown:
                raise DataError(
                    f"{folders['val']}: class {unknown[0]!r} is not among the folders of train"
                )
        for line in describe_others(source, others) + passed_over(source):
            log(line)
        if there and classes and set(classes) <= set(wordnet_ids()):
            for side, scan in zip(there, scans):
                log(f"ImageNet, {side}: {imagenet.describe(side, scan)}")
            if len(classes) < len(wordnet_ids()):
                log(f"warning: the labels count these {len(classes)} classes, not ImageNet's 1,000")
    if len(classes) < 2:
        for name in os.listdir(root) if os.path.isdir(source) else ():
            archives.is_folder(os.path.join(root, name))  # says why a compressed tar is not read
        raise DataError(
            f"{source}: found {len(classes)} classes; expected <class>/<image>, or train/<class>/"
            "<image> and val/<class>/<image>, or a CSV file of path,label"
        )
    if not entries:
        raise DataError(f"{source}: no images ({' '.join(EXTENSIONS)})")
    for path, name in entries:
        _check_names(path, name)
    empty = [name for name in classes if name not in {name for _, name in entries}]
    if empty:
        log(f"warning: {len(empty)} of {len(classes)} classes have no image: {shorten(empty, 5)}")
    twins = find_identical(root, [path for path, _ in entries])
    label = dict(entries)
    contradictions = [group for group in twins if len({label[path] for path in group}) > 1]
    if twins and sides is None:
        first = twins[0]
        log(
            f"{len(twins)} groups of identical files (such as {printable(first[0])} and "
            f"{printable(first[1])}): each stays on one side; "
            f"{len(contradictions)} of them under several labels"
        )
    for group in contradictions:  # at most one of the labels is right
        places = ", ".join(f"{printable(path)} ({label[path]})" for path in group)
        log(f"warning: one picture under several labels: {places}")
    if sides is not None:
        _refuse_leaks(root, twins, {path for path, _ in sides[1]}, log)
        return Split(root, classes, *sides)
    return Split(root, classes, *_divide(entries, twins, val_fraction, seed))


def _scan(root: str, folder: str, others: list[str]) -> list[Entry]:
    """The images of ``folder/<class>/``, relative to `root`; `others` takes what is no image."""
    return [
        (os.path.relpath(path, root), name)
        for name in class_folders(folder)
        for path in list_images(os.path.join(folder, name), others)
    ]


def _read_csv(file: str, root: str) -> list[Entry]:
    """Lines of ``path,label``; paths are relative to the file's folder. A header is passed over."""
    entries = []
    try:
        regular_size(file)
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream)
            for row in reader:
                fields = [field.strip() for field in row]
                if not any(fields) or (not entries and fields[0].lower() in _HEADERS):
                    continue
                where = f"{file}:{reader.line_num}"
                if len(fields) != 2 or not all(fields):
                    raise DataError(f"{where}: expected path,label, got {','.join(row)!r}")
                path = os.path.relpath(os.path.join(root, fields[0]), root)
                if path.split(os.sep)[0] == os.pardir:
                    raise DataError(f"{where}: {fields[0]!r} is not inside the folder of the file")
                if not _is_file(os.path.join(root, path)):
                    raise DataError(f"{where}: {os.path.join(root, path)}: no such file")
                entries.append((path, fields[1]))
    except (OSError, csv.Error, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"{error}; expected path,label in UTF-8"
        raise DataError(f"{file}: {reason[0].lower()}{reason[1:]}") from None
    repeated = [path for path, count in Counter(path for path, _ in entries).items() if count > 1]
    if repeated:
        raise DataError(f"{file}: {repeated[0]!r} is listed more than once")
    return entries


_HEADERS = ("path", "file", "filename", "image", "name")


def _check_names(path: str, name: str) -> None:
    """Refuses what a list file cannot express."""
    if "\n" in path or path != path.rstrip():
        raise DataError(f"{path!r}: a path in a list file cannot hold line breaks or end in spaces")
    if printable(name) != name or name != name.strip() or not name:
        raise DataError(f"{name!r}: not a class name that fits on a line of {CLASSES} (UTF-8)")


def _read_lists(folder: str, root: str) -> Split:
    sides, there = [[], []], [os.path.exists(os.path.join(folder, name)) for name in FILES[:2]]
    for side, name, is_there in zip(sides, FILES, there):
        if any(there) and not is_there:  # there were images for the other alone
            continue
        index = read_list(os.path.join(folder, name), root, 10**9, allow_outside=True)
        index.open_archives()  # a damaged one is one error, not that of all its images
        side += [(os.fsdecode(index.name(i)), "") for i in range(len(index))]
    return Split(root, [], *sides)


# ------------------------------------------------------------------------------- splitting
def find_identical(root: str, paths: Sequence[str]) -> list[list[str]]:
    """Groups of files with the same content.

    Only files of one size are read, and only those that begin alike are read to their end.
    """
    signature: dict[str, tuple] = dict.fromkeys(paths, ())
    suspects = list(paths)
    with ThreadPoolExecutor() as pool:
        for look in (_size, _digest_head, _digest):
            try:
                values = list(pool.map(look, [os.path.join(root, path) for path in suspects]))
            except OSError as error:
                reason = (error.strerror or "").lower()
                raise DataError(f"{printable(error.filename)}: {reason}") from None
            for path, value in zip(suspects, values):
                signature[path] += (value,)
            counts = Counter(signature[path] for path in suspects)
            suspects = [path for path in suspects if counts[signature[path]] > 1]
    groups = defaultdict(list)
    for path in suspects:
        groups[signature[path]].append(path)
    return list(groups.values())


def _size(path: str) -> int:
    size = archives.size(path)
    return regular_size(path) if size is None else size


def _is_file(path: str) -> bool:
    try:
        return _size(path) >= 0
    except OSError:
        return False


def _digest_head(path: str) -> bytes:
    with _open(path) as file:
        return hashlib.blake2b(file.read(4096)).digest()


def _digest(path: str) -> bytes:
    digest = hashlib.blake2b()
    with _open(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _open(path: str) -> BinaryIO:
    data = archives.read(path)
    return open(path, "rb") if data is None else io.BytesIO(data)


def _refuse_leaks(root: str, twins: list[list[str]], val: set[str], log) -> None:
    leaks = [group for group in twins if 0 < sum(path in val for path in group) < len(group)]
    for group in leaks:
        log(f"in both train and val: {', '.join(map(printable, group))}")
    if leaks:
        train_path = next(path for path in leaks[0] if path not in val)
        val_path = next(path for path in leaks[0] if path in val)
        raise DataError(
            f"{root}: {printable(train_path)} and {printable(val_path)} are the same image, and "
            f"{len(leaks) - 1} more are in both train and val: remove one of each"
        )


def _divide(
    entries: list[Entry], twins: list[list[str]], val_fraction: float, seed: int
) -> tuple[list[Entry], list[Entry]]:
    """Splits every class by `val_fraction`; identical files count as one.

    Both sides get at least one of each class that has two.
    """
    class_of = dict(entries)
    later = {path for group in twins for path in group[1:]}
    group_of = {group[0]: group for group in twins}
    by_class = defaultdict(list)
    for path, name in entries:
        if path not in later:
            by_class[name].append(group_of.get(path, [path]))
    chosen: set[str] = set()
    for number, name in enumerate(sorted(by_class)):
        groups = by_class[name]
        count = min(max(round(len(groups) * val_fraction), 1), len(groups) - 1)
        order = np.random.default_rng((seed, number)).permutation(len(groups))
        chosen.update(path for i in order[:count] for path in groups[i])
    train = [(path, name) for path, name in class_of.items() if path not in chosen]
    val = [(path, name) for path, name in class_of.items() if path in chosen]
    return train, val


# -------------------------------------------------------------------- checking and writing
def check_images(paths: Sequence[str], workers: int | None, log: Callable[[str], None]) -> None:
    """Decodes every image, in parallel, with a progress bar.

    Raises:
        DataError: some cannot be decoded; each was logged.
    """
    from utils import ProgressLine  # imports Paddle, which nothing else here needs

    progress, bad = ProgressLine("verify"), []
    try:
        with ProcessPoolExecutor(workers or physical_cores()) as pool:
            for done, reason in enumerate(pool.map(_problem, paths, chunksize=16), 1):
                if reason:
                    bad.append(reason)
                progress(done, len(paths))
    except BrokenProcessPool:
        raise DataError("a process that decoded images died; out of memory?") from None
    finally:
        progress.end()
    for line in bad:
        log(line)
    if bad:
        raise DataError(f"{len(bad)} of {len(paths)} images cannot be decoded")
    log(f"all {len(paths)} images can be decoded")


def _problem(path: str) -> str | None:
    try:
        read_image(path)
    except BadImage as error:
        return str(error)
    return None


def _write_lists(split: Split, folder: str) -> None:
    label = {name: str(i) for i, name in enumerate(split.classes)}
    contents = {
        TRAIN_LIST: [f"{_listed(path)} {label[name]}" for path, name in split.train],
        VAL_LIST: [f"{_listed(path)} {label[name]}" for path, name in split.val],
        CLASSES: split.classes,
    }
    contents = {name: lines for name, lines in contents.items() if lines}
    try:
        with ExitStack() as stack:  # all get their names when all are written
            for name, lines in contents.items():
                file = stack.enter_context(atomic(os.path.join(folder, name)))
                file.write(os.fsencode("".join(f"{line}\n" for line in lines)))
    except OSError as error:
        raise DataError(f"{folder}: cannot write the lists: {error.strerror}") from None


def _listed(path: str) -> str:
    """The path so that a list file's reader does not take its line for a comment."""
    return os.path.join(".", path) if path.startswith("#") else path


def main() -> None:
    parser = Parser("Makes train_list.txt, val_list.txt and classes.txt for a folder of images.")
    parser.paths(
        "source",
        "a folder with a folder per class, or with train/ and val/ of such; ImageNet as it is "
        "downloaded; or a CSV file of path,label",
    )
    parser.flag(
        "val_fraction",
        "share of each class to validate on, where there is no val/ (default: 0.1)",
        type=float,
        default=0.1,
        metavar="SHARE",
    )
    parser.flag("seed", "of the split (default: 0)", type=int, default=0, metavar="N")
    parser.flag(
        "verify",
        "decode every image and list the bad ones; checks lists that are there already",
        action="store_true",
    )
    parser.flag("force", "replace lists that are there already", action="store_true")
    parser.flag("output", "folder for the lists (default: beside the images)", metavar="FOLDER")
    parser.flag("workers", "processes for -verify (default: one a core)", type=int, metavar="N")
    make_lists(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_as_script(main)
