"""Makes train_list.txt, val_list.txt and classes.txt for a folder of images; nothing is copied.

python tools/make_lists.py flowers -val_fraction 0.2 -verify    # flowers/<class>/<image>
python tools/make_lists.py imagenet                              # imagenet/{train,val}/<class>/...
python tools/make_lists.py photos/labels.csv                     # lines of path,label

Archives may stand for folders; ImageNet is known as it is downloaded (imagenet.py). Labels count
the classes in the order of their names, numbers by value. Where train/ and val/ are not both there,
each image is drawn by its own content and a seed, so that it stays where it is when others are
added, renamed or removed.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import csv
import hashlib
import io
import os
import random
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial

from cli.errors import DataError, run_as_script
from cli.parser import Parser
from cli.progress import ProgressLine
from loading import archives
from loading.files import (
    SPLIT_NAMES,
    class_folders,
    describe_others,
    find_classes,
    list_images,
    passed_over,
    read_list,
    sort_classes,
    split_folder,
)
from loading.imagenet import val_number, wordnet_ids
from loading.images import EXTENSIONS, BadImage, open_regular, read_pixels, reason_of
from storage.files import atomic, printable, shorten
from tools import imagenet
from tools.imagenet import Entry
from tools.processes import map_in_processes

FILES = TRAIN_LIST, VAL_LIST, CLASSES = "train_list.txt", "val_list.txt", "classes.txt"
_REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SAMPLE = 4096  # bytes at three places of a file by which it is drawn
_NO_CLASSES = {"test", "testing"}.union(*SPLIT_NAMES.values())  # names of folders
_MISSING = ("nan", "null", "none", "na", "n/a", "#n/a", "?")  # labels that tables mean as no label


def make_lists(
    source: str,
    val_fraction: float = 0.1,
    seed: int = 0,
    verify: bool = False,
    force: bool = False,
    workers: int | None = None,
    output: str | None = None,
) -> tuple[list[str], list[Entry]]:
    """Splits the images of a folder or CSV file and writes the three files beside them, or into
    ``output``; ``verify`` first decodes every image, and where lists exist checks those alone.

    Returns the classes by label (none where lists were checked) and the images. DataError for no
    such layout, unusable names, the same content on both sides, images that cannot be decoded (each
    is named), lists that exist.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"-val_fraction is {val_fraction}; give a share between 0 and 1")
    root = source if os.path.isdir(source) else os.path.dirname(source) or "."
    if os.path.basename(source) in imagenet.ARCHIVES.values():
        source = root  # they are looked at together
    folder = os.path.abspath(output) if output else root
    there = [path for name in FILES if os.path.exists(path := os.path.join(folder, name))]
    only_check = bool(there) and not force
    if only_check and not verify:
        raise DataError(f"{there[0]} is there already; -force replaces it, -verify checks it")
    before: list[Entry] = []
    with suppress(*[DataError] * force):  # what is replaced need not be readable
        before = _read_lists(folder, root) if there else []
    classes, entries = ([], before) if only_check else _find(source, root)
    paths = list(dict.fromkeys(entry.path for entry in entries))
    if verify:
        _check_images([os.path.join(root, path) for path in paths], workers)
    if val_number(next((entry.path for entry in entries if entry.side == "val"), "")):
        content = {path: os.fsencode(path) for path in paths}  # ImageNet's halves are as published
    else:
        content = contents(root, paths, workers)
    _check_repeats(root, entries, content)
    if only_check:
        return classes, entries
    if not entries[0].side:
        entries = _draw(entries, content, val_fraction, seed, before)
    _write_lists(classes, entries, folder)
    train, val = (sum(entry.side == side for entry in entries) for side in SPLIT_NAMES)
    print(f"{root}: {train} images to train on, {val} to validate on, {len(classes)} classes")
    for count, name in ((train, TRAIN_LIST), (val, VAL_LIST)):
        if not count:
            print(f"warning: {name} is not written: no images for it (training needs some)")
    print(f"use them with: {_next_command(classes, bool(train), root, folder)}")
    return classes, entries


def _find(source: str, root: str) -> tuple[list[str], list[Entry]]:
    """The classes of a source, and its images."""
    if os.path.basename(source) == imagenet.GROUND_TRUTH:
        raise DataError(
            f"{source}: not used: its numbers count the classes in the order of the development "
            "kit (ILSVRC2012_ID), not of the WordNet ids; the labels are known by the images' "
            "names: give the folder or archive that holds them"
        )
    if os.path.isdir(source) and (found := imagenet.find_imagenet(source)):
        return list(wordnet_ids()), found
    if archives.is_folder(source):
        classes, entries = _find_folders(source, root)
    else:
        entries = _read_csv(source, root)
        classes = sort_classes({entry.name for entry in entries}, source)
    if len(classes) < 2:
        for name in os.listdir(root) if os.path.isdir(source) else ():
            archives.is_folder(os.path.join(root, name))  # says why a compressed tar is not read
        raise DataError(
            f"{source}: found {len(classes)} classes; expected <class>/<image>, or train/<class>/"
            "<image> and val/<class>/<image>, or a CSV file of path,label"
        )
    if not entries:
        raise DataError(f"{source}: no images ({' '.join(EXTENSIONS)})")
    alike = defaultdict(list)
    for name in classes:
        if printable(name) != name:
            raise DataError(f"{name!r}: not a class name that fits on a line of {CLASSES} (UTF-8)")
        alike[" ".join(unicodedata.normalize("NFC", name).casefold().split())].append(ascii(name))
    for path, *_ in entries:
        if "\n" in path or path != path.rstrip():
            raise DataError(f"{path!r}: a path in a list cannot hold line breaks or end in spaces")
    used = {entry.name for entry in entries}
    if empty := [name for name in classes if name not in used]:
        print(f"warning: {len(empty)} of {len(classes)} classes have no image: {shorten(empty, 5)}")
    for names in alike.values():
        if len(names) > 1:
            print(f"warning: {len(names)} classes are called almost alike: {', '.join(names)}")
    return classes, entries


def _find_folders(source: str, root: str) -> tuple[list[str], list[Entry]]:
    folders = {side: split_folder(source, side) for side in SPLIT_NAMES}
    there = [side for side, folder in folders.items() if archives.is_folder(folder)]
    if there == ["val"]:
        raise DataError(f"{folders['val']}: there is no train/ beside it to train on")
    besides = [name for name in class_folders(source) if name.lower() not in _NO_CLASSES]
    if there == ["train"] and len(besides) > 1 and not class_folders(folders["train"]):
        there = []  # trains among buses and cars
    classes = find_classes(source) if there else class_folders(source)
    if len(there) < 2:
        folders = {"": folders["train"] if there else source}
    entries, others = [], []
    for side, folder in folders.items():
        for name in class_folders(folder):
            paths = list_images(os.path.join(folder, name), others)
            entries += [Entry(os.path.relpath(path, root), name, side) for path in paths]
    if unknown := sorted({entry.name for entry in entries} - set(classes)):
        raise DataError(f"{folders['val']}: class {unknown[0]!r} is not among the folders of train")
    for line in describe_others(source, others) + passed_over(source):
        print(line)
    if there and classes and set(classes) <= set(wordnet_ids()):
        for side in there:
            print(f"ImageNet, {side}: {imagenet.describe(side, entries)}")
        if len(classes) < len(wordnet_ids()):
            print(f"warning: the labels count these {len(classes)} classes, not ImageNet's 1,000")
    return classes, entries


def _read_csv(file: str, root: str) -> list[Entry]:
    """Lines of ``path,label``, relative to the file; a first line without an image is a header."""
    try:
        with open_regular(
            file, "r", encoding="utf-8-sig", errors="surrogateescape", newline=""
        ) as stream:
            reader = csv.reader(stream)
            rows = [(f"{file}:{reader.line_num}", [cell.strip() for cell in r]) for r in reader]
    except (OSError, csv.Error) as error:
        reason = f"{reason_of(error)}; expected lines of path,label in UTF-8"
        raise DataError(f"{file}: {reason}") from None
    label_of, first_line = {}, {}  # by path; where a label is first
    for number, (where, cells) in enumerate(row for row in rows if any(row[1])):
        file_path = os.path.join(root, cells[0])
        is_file = archives.exists(file_path) and not archives.is_folder(file_path)
        if not number and not is_file and not cells[0].lower().endswith(EXTENSIONS):
            print(f"{where}: taken for a header: {printable(','.join(cells))}")
            continue
        if len(cells) != 2 or not all(cells):
            raise DataError(f"{where}: expected path,label, got {','.join(cells)!r}")
        path = os.path.relpath(file_path, root)
        if path.split(os.sep)[0] == os.pardir:
            raise DataError(f"{where}: {cells[0]!r} is not inside the folder of the file")
        if not is_file:
            raise DataError(f"{where}: {printable(os.path.join(root, path))}: no such file")
        if path in label_of:
            raise DataError(f"{where}: {path!r} is listed more than once")
        label_of[path] = cells[1]
        first_line.setdefault(cells[1], where)
    _check_labels(first_line)
    return [Entry(path, label, "") for path, label in label_of.items()]


def _check_labels(first_line: dict[str, str]) -> None:
    """Refuses labels that are several; a warning for those that may be none."""
    for label, where in first_line.items():
        parts = re.split(r"[\s,;|+&/]+", label)
        numbers = re.fullmatch(r"\d+([\s,;|]+\d+)+", label)
        if len(parts) > 1 and (numbers or all(part in first_line for part in parts)):
            raise DataError(
                f"{where}: {label!r} is several labels of one image; here an image has one: keep "
                "one, or join them to a name of its own (scab_and_rust)"
            )
        if label.lower() in _MISSING:
            print(f"warning: {where}: the label {label!r} is a class like any other")


def _read_lists(folder: str, root: str) -> list[Entry]:
    """What the lists of a folder say, of those that are there; labels in the place of names."""
    lists = {"train": f"{folder}/{TRAIN_LIST}", "val": f"{folder}/{VAL_LIST}"}
    entries = []
    for side, path in ({s: p for s, p in lists.items() if os.path.exists(p)} or lists).items():
        index = read_list(path, root, 10**9, allow_outside=True)
        index.open_archives()  # a damaged one is one error, not that of all its images
        for number, label in enumerate(index.labels):
            path = os.path.normpath(os.fsdecode(index.name(number)))
            entries.append(Entry(path, str(label), side))
    return entries


def contents(root: str, paths: Sequence[str], workers: int | None = None) -> dict[str, bytes]:
    """By path, 16 bytes of a file's size, start, middle and end; and of all, where these agree."""
    found = dict(zip(paths, map_in_processes(partial(_digest, root, False), paths, workers)))
    counts = Counter(found.values())
    alike = [path for path in paths if counts[found[path]] > 1]
    for path, digest in zip(alike, map_in_processes(partial(_digest, root, True), alike, workers)):
        found[path] += digest
    return found


def _digest(root: str, whole: bool, path: str) -> bytes:
    path = os.path.join(root, path)
    try:
        data = archives.read(path)
        with open_regular(path) if data is None else io.BytesIO(data) as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.blake2b(str(size).encode(), digest_size=16)
            for start in [0] if whole else [0, size // 2, max(0, size - _SAMPLE)]:
                file.seek(start)
                digest.update(file.read(size if whole else _SAMPLE))
    except OSError as error:
        raise DataError(f"{printable(path)}: {reason_of(error)}") from None
    return digest.digest()


def _check_repeats(root: str, entries: list[Entry], content: dict[str, bytes]) -> None:
    """Names pictures that are there several times; refuses those on both sides."""
    groups = defaultdict(list)
    for entry in entries:
        groups[content[entry.path]].append(entry)
    groups = [group for group in groups.values() if len(group) > 1]
    alike = [paths for group in groups if len(paths := sorted({path for path, *_ in group})) > 1]
    if alike:
        kept = "" if entries[0].side else ": each stays on one side"
        pair = " and ".join(map(printable, alike[0][:2]))
        plural = "s" * (len(alike) > 1)
        print(f"{len(alike)} group{plural} of identical files (such as {pair}){kept}")
    lines = Counter((path, side) for group in groups for path, _, side in group)
    if again := [f"{path} in {side}" for (path, side), count in lines.items() if count > 1]:
        print(f"warning: {len(again)} images are listed more than once: {shorten(again, 3)}")
    leaks = []
    for group in groups:
        if len({name for _, name, _ in group}) > 1:  # at most one of the labels is right
            places = ", ".join(f"{printable(path)} ({name})" for path, name, _ in group)
            print(f"warning: one picture under several labels: {places}")
        where = {side: path for path, _, side in reversed(group)}
        if len(where) > 1:
            leaks.append(where)
            print(f"in both train and val: {', '.join(printable(path) for path, *_ in group)}")
    if leaks:
        one, other = (printable(leaks[0][side]) for side in ("train", "val"))
        first = f"{one} and {other} are the same image" if one != other else f"{one} is in both"
        raise DataError(
            f"{root}: {first}, and {len(leaks) - 1} more are in both train and val: remove one of "
            "each"
        )


def _draw(
    entries: list[Entry], content: dict, val_fraction: float, seed: int, before: list[Entry]
) -> list[Entry]:
    """Draws each image by its content: identical files share a side, and a class of two or more has
    an image on each. What the lists of `before` moved for that stays there.
    """
    key_of = {entry.path: content[entry.path][:16] for entry in entries}
    was_val = {key_of[path]: side == "val" for path, _, side in before if path in key_of}
    drawn = {key: random.Random(b"%d %s" % (seed, key)).random() for key in key_of.values()}
    by_class, is_val = defaultdict(dict), {}
    for entry in entries:
        by_class[entry.name][key_of[entry.path]] = None
    for _, keys in sorted(by_class.items()):
        val = {key: is_val.get(key, drawn[key] < val_fraction) for key in keys}
        old = [key for key in keys if key in was_val]
        if len({val[key] for key in old}) == 1:  # then one of them was moved
            val.update((key, was_val[key]) for key in old)
        for wanted, enough in ((False, 1), (True, 2)):
            if len(keys) >= enough and wanted not in val.values():
                free = [key for key in keys if key not in was_val] or keys
                val[(min if wanted else max)(free, key=drawn.get)] = wanted
        is_val.update(val)
    moved = [path for path, key in key_of.items() if was_val.get(key, is_val[key]) != is_val[key]]
    if moved:
        print(
            f"warning: {len(moved)} images were on the other side in the lists before, such as "
            f"{printable(moved[0])}: earlier weights may have learned what is validated on now"
        )
    sides = ("val" if is_val[key_of[entry.path]] else "train" for entry in entries)
    return [entry._replace(side=side) for entry, side in zip(entries, sides)]


def _check_images(paths: Sequence[str], workers: int | None) -> None:
    """Decodes every image, in parallel; a `DataError` after a line about each that cannot be."""
    progress, bad = ProgressLine("verify"), []
    for done, problem in enumerate(map_in_processes(_problem, paths, workers), 1):
        bad += filter(None, [problem])
        progress(done, len(paths))
    progress.end()
    for line in bad:
        print(line)
    if bad:
        raise DataError(f"{len(bad)} of {len(paths)} images cannot be decoded")
    print(f"all {len(paths)} images can be decoded")


def _problem(path: str) -> str:
    try:
        read_pixels(path)
        return ""
    except BadImage as error:
        return str(error)


def _write_lists(classes: list[str], entries: list[Entry], folder: str) -> None:
    label = {name: i for i, name in enumerate(classes)}
    lists = {side: [] for side in SPLIT_NAMES}
    for path, name, side in entries:
        begin = "./" * path.startswith("#")  # which would begin a comment
        lists[side].append(f"{begin}{path} {label[name]}")
    try:
        with ExitStack() as stack:  # all get their names when all are written
            for file_name, lines in zip(FILES, (*lists.values(), classes)):
                if lines:
                    file = stack.enter_context(atomic(os.path.join(folder, file_name)))
                    file.write(os.fsencode("".join(f"{line}\n" for line in lines)))
    except OSError as error:
        raise DataError(f"{folder}: cannot write the lists: {error.strerror}") from None


def _next_command(classes: list[str], can_train: bool, root: str, lists: str) -> str:
    """The next command: fine-tuning on the lists, or ImageNet's training or evaluation."""
    config, flags = "resmlp_finetune", ["-pretrained=resmlp_12_224"]
    if classes == list(wordnet_ids()):
        config, flags = "resmlp_12_224", [] if can_train else ["-eval", *flags]
    here = os.path.relpath(_REPOSITORY)
    here = _REPOSITORY if here.startswith(os.pardir) else here
    main = os.path.normpath(f"{here}/main_single_gpu.py")
    cfg = os.path.normpath(f"{here}/configs/{config}.yaml")
    name = os.path.basename(os.path.abspath(root))
    words = ["python", main, f"-cfg={cfg}", f"-data_path={root}", *flags, f"-output=output/{name}"]
    if lists != root:
        words += ["-opts"]
        for key, file in zip(("TRAIN_LIST", "VAL_LIST", "CLASS_NAMES"), FILES):
            words += [f"DATA.{key}", os.path.join(lists, file)]
    return shlex.join(words)


def main() -> None:
    parser = Parser("Makes train_list.txt, val_list.txt and classes.txt for a folder of images.")
    parser.paths(
        "source",
        "a folder with a folder per class, or with train/ and val/ of such; ImageNet as it is "
        "downloaded; or a CSV file of path,label",
    )
    share = "share of the images to validate on, where there is no val/ (default: 0.1)"
    parser.flag("val_fraction", share, type=float, default=0.1, metavar="SHARE")
    parser.flag("seed", "of the split (default: 0)", type=int, default=0, metavar="N")
    check = "decode every image and list the bad ones; checks lists that are there already"
    parser.flag("verify", check, action="store_true")
    parser.flag("force", "replace lists that are there already", action="store_true")
    parser.flag("output", "folder for the lists (default: beside the images)", metavar="DIR")
    parser.flag("workers", "processes for -verify (default: one a core)", type=int, metavar="N")
    make_lists(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_as_script(main)
