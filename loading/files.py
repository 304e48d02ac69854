"""Image files and their labels: list files, or a folder per class. (No Paddle.)

An archive, ``train.tar`` or ``train.zip``, may stand for a folder; see archives.py.
"""

from __future__ import annotations

import os
import re
import unicodedata
import zlib
from array import array
from codecs import BOM_UTF8  # with which Windows editors begin a file
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from cli.errors import DataError
from loading import archives
from loading.images import EXTENSIONS, open_regular, reason_of
from storage.files import printable

# What splits are called, in any case, the first name before the others. A `test` folder is neither:
# its images are for the very end, or have no labels.
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}

# Folders of operating systems, network drives and notebooks, which hold copies of images.
_JUNK = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "__pycache__")
_JUNK += ("system volume information", "thumbs.db", "desktop.ini")

# One of these lies in the folder of each run and of each packed data set.
_OUTPUTS = ("config.yaml", "metrics.jsonl", "eval_log.txt", "pack.json")


class ImageIndex:
    """The files and labels of a data set, compact: one block of bytes and three arrays.

    1.28 million ImageNet entries take about 75 MB; forked loader workers share them, because no
    Python object per image has a reference count that would touch its page.
    """

    def __init__(self, root: str, list_file: str | None = None):
        self.root = os.fsencode(os.path.abspath(root))  # the data folder
        self.list_file = list_file  # where the entries come from; None: from a scan
        self.labels = array("i")
        self._names, self._ends, self._lines = bytearray(), array("q", [0]), array("i")
        self.notes: list[str] = []  # for the log: what a scan passed over
        self.subset: list[int] | None = None  # labels of the folders, where the model has more
        self.exif_orientation = False  # DATA.EXIF_ORIENTATION, for who shows an image

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, name: bytes, label: int, line: int = 0) -> None:
        """Appends a file: its path relative to `root`, its class, its line in the list file."""
        self._names += name
        self._ends.append(len(self._names))
        self.labels.append(label)
        self._lines.append(line)

    def name(self, index: int) -> bytes:
        return bytes(self._names[self._ends[index] : self._ends[index + 1]])

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.root, self.name(index)))

    def fingerprint(self) -> list[int]:
        """The number of images, and a CRC-32 of labels and paths, an archive's as its folder's."""
        names = self._names.replace(b".tar/", b"/").replace(b".zip/", b"/")
        return [len(self), zlib.crc32(self.labels, zlib.crc32(names))]

    def open_archives(self) -> None:
        """Indexes the archives that files are in, so that workers forked later share it all."""
        if not any(end in self._names for end in (b".tar/", b".zip/")):
            return
        last = b"\0"  # the archive of the file before, which most often is that of the next
        for index in range(len(self)):
            if self.name(index).startswith(last):
                continue
            if found := archives.inside(self.path(index)):
                last = os.path.relpath(os.fsencode(found[0].path), self.root) + b"/"

    def where(self, index: int) -> str:
        """The path of an entry for a message, after ``list_file:line`` if it has one."""
        line = f"{self.list_file}:{self._lines[index]}: " if self.list_file else ""
        return line + printable(self.path(index))


def read_list(list_file: str, root: str, num_classes: int, allow_outside: bool) -> ImageIndex:
    """Reads ``relative/path label`` lines: the last field is the label, the rest is the path.

    Blank lines and ``#`` lines are skipped; paths may contain spaces, in any encoding. Labels are
    below `num_classes`. Without `allow_outside` no path may leave `root`; ``..`` is resolved by the
    text alone: a link may point to another disk. DataError if a line is none of this.
    """
    index, labels = ImageIndex(root, list_file), {}  # a few labels, a million times
    folder = b"" if allow_outside else os.path.join(os.path.normpath(index.root), b"")
    try:
        with open_regular(list_file) as file:
            for number, line in enumerate(file, 1):
                line = line.strip() if number > 1 else line.removeprefix(BOM_UTF8).strip()
                if not line or line.startswith(b"#"):
                    continue
                if b"\0" in line:
                    raise ValueError("zero bytes: it looks like UTF-16, save it as UTF-8")
                fields = line.rsplit(None, 1)
                if len(fields) < 2:
                    raise ValueError("expected `relative/path label`")
                name, label = fields
                if label not in labels:
                    labels[label] = _parse_label(label, num_classes)
                if folder and (b".." in name or name.startswith(b"/")):
                    name = _inside(name, folder)
                index.add(name, labels[label], number)
    except ValueError as problem:
        raise DataError(f"{list_file}:{number}: {problem}, got {_show(line)}") from None
    except OSError as error:
        raise DataError(
            f"{list_file}: {reason_of(error)}; it lists the images of {root}, one `relative/path "
            "label` a line. tools/make_lists.py makes it from a folder per class, and "
            "`-dataset imagefolder` needs none"
        ) from None
    if not len(index):
        raise DataError(f"{list_file}: lists no images")
    return index


def _parse_label(label: bytes, num_classes: int) -> int:
    if not label.isdigit():
        raise ValueError(f"the label {_show(label)} is not a whole number")
    if len(label) > 9 or int(label) >= num_classes:
        known = f"0 .. {num_classes - 1} (MODEL.NUM_CLASSES {num_classes})"
        raise ValueError(f"the label {_show(label)} is not in {known}")
    return int(label)


def _inside(name: bytes, folder: bytes) -> bytes:
    """A path without ``..``: what is opened is what was checked to lie in the data folder."""
    path = os.path.normpath(os.path.join(folder, name))
    if not path.startswith(folder):
        raise ValueError(
            f"the path {_show(name)} leaves the data folder {os.fsdecode(folder)} "
            "(DATA.ALLOW_OUTSIDE_PATHS True accepts it)"
        )
    return path[len(folder) :]


def find_classes(root: str) -> list[str]:
    """The class folders of ``root/train``, or else ``root/val``, by label. DataError: none."""
    for split in SPLIT_NAMES:
        folder = split_folder(root, split)
        if archives.is_folder(folder):
            if classes := class_folders(folder):
                return classes
            loose = len(list_images(folder))
            found = f"{loose} images without a class" if loose else "no class folders"
            raise DataError(
                f"{folder}: {found}; expected {split}/<class>/<image>, a folder for each class"
            )
    raise DataError(
        f"{root}: expected train/<class>/<image> and val/<class>/<image>; "
        "tools/make_lists.py splits a folder that has only classes"
    )


def split_folder(root: str, split: str) -> str:
    """``root/train``, ``root/Training``, or the archive ``root/train.tar`` or ``.zip``."""
    inside, found = archives.inside(root), []
    on_disk = os.listdir(root) if os.path.isdir(root) else []
    for name in inside[0].folders(inside[1]) if inside else on_disk:
        stem, ending = os.path.splitext(name)
        packed = ending in archives.ENDINGS and os.path.isfile(os.path.join(root, name))
        known = (stem if packed else name).lower()
        if known in SPLIT_NAMES[split] and (packed or archives.is_folder(f"{root}/{name}")):
            found.append((packed, SPLIT_NAMES[split].index(known), name != split, name))
    return os.path.join(root, min(found)[-1] if found else split)


def evaluation_folder(root: str) -> str:
    """That of ``val``, or `root` itself if it has no splits, as ImageNet-A and others have none."""
    folders = [split_folder(root, split) for split in SPLIT_NAMES]
    return folders[-1] if any(map(archives.is_folder, folders)) else root


def passed_over(root: str) -> list[str]:
    """A line that names unused folders: beside the splits', or written by runs."""
    used, others = [split_folder(root, split) for split in SPLIT_NAMES], []
    for folder in filter(os.path.isdir, [root, *used]):
        beside = folder == root and any(map(archives.is_folder, used))
        paths = [os.path.join(folder, name) for name in _folders(folder)]
        others += [path for path in paths if path not in used and (beside or is_output(path))]
    shown = ", ".join(f"{printable(os.path.relpath(path, root))}/" for path in others)
    return [f"{root}: not used: {shown}"] if others else []


def scan_folder(
    root: str, split: str, num_classes: int, classes: Iterable[str] | None = None
) -> ImageIndex:
    """Finds the images of ``root/split/<class>/``, at any depth, in the order of their names.

    Junk (`is_junk`) is passed over; files without an image's ending too, named in the `notes`.
    `classes` are the class folders by label (None: `find_classes`). DataError if there are none,
    or other classes than `num_classes` or train's.
    """
    classes = [one_name(name) for name in (find_classes(root) if classes is None else classes)]
    if len(classes) != num_classes:
        raise DataError(
            f"{root}: {len(classes)} class folders but MODEL.NUM_CLASSES is {num_classes}; "
            f"set it with `-opts MODEL.NUM_CLASSES {len(classes)}`"
        )
    folder = split_folder(root, "train") if split == "train" else evaluation_folder(root)
    if not archives.is_folder(folder):
        raise DataError(f"{folder}: no such folder; expected {split}/<class>/<image>")
    there = {one_name(name): name for name in class_folders(folder)}
    if unknown := sorted(there.keys() - set(classes)):
        raise DataError(f"{folder}: class {unknown[0]!r} is not among the folders of train")
    index, others = ImageIndex(root), []
    found = [(label, name) for label, name in enumerate(classes) if name in there]
    for label, name in found:
        for path in list_images(os.path.join(folder, there[name]), others):
            index.add(os.fsencode(os.path.relpath(path, root)), label)
    index.notes = describe_others(folder, others) + passed_over(root)
    if len(found) < num_classes:
        index.subset = [label for label, _ in found]
    if not len(index):
        why = f"; {index.notes[0]}" if others else ""
        if loose := len(list_images(folder)):
            why = (
                f" in class folders; {loose} images lie in it without one. tools/make_lists.py "
                "knows the labels of ImageNet's validation images, and reads others from a CSV file"
            )
        raise DataError(f"{folder}: no images ({' '.join(EXTENSIONS)}){why}")
    return index


def is_junk(name: str) -> bool:
    """Whether a file or folder is an operating system's or notebook's: hidden, ``__MACOSX``, ..."""
    return name.startswith(".") or name.lower() in _JUNK


def list_images(folder: str, others: list[str] | None = None) -> list[str]:
    """The image files under a folder or archive, sorted, without junk; `others` takes the paths of
    other files. DataError if a folder cannot be read, or is a link to one that it lies in.
    """
    found = []
    if inside := archives.inside(folder):
        archive, place = inside
        for name in archive.under(place):
            if not any(map(is_junk, name.split("/"))):
                found.append(f"{archive.path}/{name}")
    else:
        for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
            if os.path.islink(parent):
                _refuse_loop(parent)
            folders[:] = [name for name in folders if not is_junk(name)]
            found += [os.path.join(parent, name) for name in files if not is_junk(name)]
        found.sort()
    if others is not None:
        others += [path for path in found if not path.lower().endswith(EXTENSIONS)]
    return [path for path in found if path.lower().endswith(EXTENSIONS)]


def describe_others(folder: str, others: list[str]) -> list[str]:
    """A line about the files of a folder that were passed over for their ending, if there are."""
    if not others:
        return []
    counts = Counter(os.path.splitext(path)[1].lower() or "none" for path in others)
    kinds = ", ".join(f"{kind} ({count})" for kind, count in counts.most_common(5))
    return [
        f"warning: {printable(folder)}: {len(others)} files are passed over, for they have no "
        f"image's ending: {printable(kinds)}, such as {printable(others[0])}"
    ]


def is_output(folder: str) -> bool:
    """Whether a folder on the disk was written by a run, pack.py or make_lists.py, or has runs."""

    def is_run(path: str) -> bool:
        return any(os.path.isfile(os.path.join(path, name)) for name in _OUTPUTS)

    if is_run(folder):
        return True
    entries = []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.lower().endswith(EXTENSIONS):
                    return False  # soon, in the folder of a class
                entries.append(entry)
        if folders := [entry.path for entry in entries if entry.is_dir()]:
            return any(map(is_run, folders))
    except OSError as error:  # also of a link that leads to itself
        _refuse(error)
    return any(entry.name in ("train_list.txt", "val_list.txt") for entry in entries)


def _folders(folder: str) -> list[str]:
    """The names of the folders in a folder, without junk (`is_junk`)."""
    if inside := archives.inside(folder):
        names = inside[0].folders(inside[1])
    else:
        _, names, _ = next(os.walk(folder, onerror=_refuse))
    return sorted(name for name in names if not is_junk(name))


def class_folders(folder: str) -> list[str]:
    """The names of a folder's class folders, as `sort_classes`, without junk and runs' outputs.
    DataError if it cannot be read, or a name is no line of a text file of names.
    """
    on_disk = os.path.isdir(folder)
    names = [n for n in _folders(folder) if not (on_disk and is_output(os.path.join(folder, n)))]
    names = sort_classes(names, folder)
    if twice := [name for name, count in Counter(map(one_name, names)).items() if count > 1]:
        raise DataError(
            f"{folder}: two folders are called {twice[0]!r}, in Unicode's NFC and NFD; join them"
        )
    for name in names:
        if printable(name) != name or not name.strip():
            raise DataError(
                f"{printable(os.path.join(folder, name))}: a class name is UTF-8 text without "
                "line breaks and control characters; rename the folder"
            )
    return names


def one_name(name: str) -> str:
    """A class name in Unicode's NFC: macOS and others write accents in two ways."""
    return unicodedata.normalize("NFC", name)


def sort_classes(names: Iterable[str], where: str) -> list[str]:
    """Class names in the order of their labels: by name, but whole numbers by their value."""
    names = sorted(names)
    if all(re.fullmatch("-?[0-9]{1,9}", name) for name in names):
        names.sort(key=int)
        for one, other in zip(names, names[1:]):
            if int(one) == int(other):
                raise DataError(f"{where}: the labels {one!r} and {other!r} are one number")
    return names


def _refuse_loop(link: str) -> None:
    """DataError for a link to a folder above it: who follows it comes back to it for ever."""
    for above in Path(link).absolute().parents:
        if os.path.samefile(link, above):
            raise DataError(
                f"{printable(link)}: a link to {printable(str(above))}, which it lies in, so that "
                "all images there would be found again and again; remove the link"
            )


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"{printable(error.filename)}: {reason_of(error)}") from None


def _show(text: bytes) -> str:
    return repr(text[:100].decode("utf-8", "replace"))
