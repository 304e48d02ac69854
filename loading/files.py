"""Image files and their labels: list files, a folder per class, reading one image. (No Paddle.)

Two layouts of a data folder, DATA.DATASET:

    imagenet2012                              imagefolder
      train_list.txt    (train/n01/a.JPEG 0)    train/cat/a.jpg
      val_list.txt      (val/b.JPEG 0)          train/dog/b.jpg
      train/ val/                               val/cat/c.jpg
      classes.txt       (optional: names)       val/dog/d.jpg

An archive, ``train.tar`` or ``train.zip``, may stand for a folder; see archives.py.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from cli.errors import DataError
from loading import archives
from loading.imagenet import wordnet_ids

EXTENSIONS = (
    *(".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)

# Formats that Pillow decodes itself. (It would hand an .eps to Ghostscript, another program.)
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
try:
    from PIL import AvifImagePlugin  # Pillow 11.3 and later, where its wheel has the decoder

    if AvifImagePlugin.SUPPORTED:
        EXTENSIONS, _FORMATS = (*EXTENSIONS, ".avif"), (*_FORMATS, "AVIF")
except ImportError:
    pass

# What splits are called, in any case, the first name before the others. A `test` folder is neither:
# its images are for the very end, or have no labels.
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
_TEST_NAMES = ("test", "testing")

# Folders of operating systems, network drives and notebooks, which hold copies of images.
_JUNK = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "__pycache__")
_JUNK += ("system volume information", "thumbs.db", "desktop.ini")

_ORIENTATION = 0x112  # EXIF's tag: how the camera was held
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_BOM = b"\xef\xbb\xbf"  # with which Windows editors begin a UTF-8 file

# Control characters, line breaks, and what `os.fsdecode` makes of bytes that are not UTF-8.
# (`str.isprintable` is also False for the joiners inside Persian words.)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# Pillow warns above its limit and raises above twice the limit; `open_image` raises above it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Corrupt EXIF data, transparent palettes: the pixels are right, and no warning names its file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class BadImage(DataError):
    """An image file that is missing or cannot be decoded: `path` and `reason`."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{printable(path)}: {reason}")
        self.path, self.reason = path, reason


def regular_size(path: str) -> int:
    """Bytes of a file.

    Raises:
        OSError: missing; or a folder, a device, a pipe, which may block for ever when it is opened.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", path)
    return info.st_size


def open_image(path: str) -> Image.Image:
    """Opens an image file, to be used in ``with``; its pixels are decoded when they are asked for.

    Raises:
        BadImage: missing, unreadable, empty, not an image, larger than Pillow's limit.
    """
    try:
        data = archives.read(path)
        size = regular_size(path) if data is None else len(data)
        if size == 0:
            raise BadImage(path, "the file is empty")
        image = Image.open(path if data is None else io.BytesIO(data), formats=_FORMATS)
        pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if 0 < pixels <= (limit or pixels):
            return image
        image.close()
        if pixels:
            raise BadImage(path, f"{pixels:,} pixels, more than Pillow's limit of {limit:,}")
        raise BadImage(path, f"{image.width} x {image.height} pixels")
    except Exception as error:
        raise _bad_image(path, error) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, read: as ``convert("RGB")``, without copying one that is RGB.

    Pillow would cut 16-bit grey at 255, which makes it white: it is scaled by its range instead,
    with the upper 8 bits, as OpenCV does. Numbers without a known range are refused.

    Raises:
        BadImage: 32-bit integers or floating point.
    """
    image.load()
    if image.mode == "RGB":
        return image
    sixteen = image.mode.startswith("I;16")
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        sixteen = True  # what older Pillow makes of 16 bits
    if sixteen:
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(258, (16,))[0]  # BitsPerSample of a TIFF: 12 of a microscope or scanner
        grey = (np.asarray(image).astype(np.int32) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        inverted = tags.get(262) == 0  # WhiteIsZero, which Pillow heeds in 8 bits alone
        info, image = image.info, Image.fromarray(255 - grey if inverted else grey)
        image.info = info
    elif image.mode in ("I", "F"):
        raise BadImage(
            getattr(image, "filename", "image"),
            f"{'floating point' if image.mode == 'F' else '32-bit integers'}, whose black and "
            "white are not known; save it with 8 or 16 bits",
        )
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image in RGB (`to_rgb`), turned as its EXIF orientation says; with none, as it is."""
    rgb = to_rgb(image)  # read first: Pillow turns a TIFF by itself
    try:
        return rgb.transpose(_TURNS[image.getexif()[_ORIENTATION]])
    except Exception:  # no such entry; or broken EXIF data, on which Pillow raises anything
        return rgb


def read_image(path: str) -> Image.Image:
    """Decodes an image file to RGB as timm reads it (EXIF rotation ignored), by `to_rgb`.

    Raises:
        BadImage: as `open_image`; also truncated or broken files.
    """
    try:
        with open_image(path) as image:
            rgb = to_rgb(image)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise _bad_image(path, error) from None
    rgb.filename = path  # as `Image.open` sets it; a transform names it
    return rgb


def _bad_image(path: str, error: Exception) -> BadImage:
    if isinstance(error, BadImage):
        return error
    if isinstance(error, FileNotFoundError):
        return BadImage(path, "no such file")
    if isinstance(error, DataError):  # of its archive
        return BadImage(path, str(error))
    if isinstance(error, OSError) and error.strerror:  # the system's, not a decoder's
        return BadImage(path, _reason(error))
    if isinstance(error, Image.UnidentifiedImageError):
        return BadImage(path, "not an image of a known format")
    return BadImage(path, f"cannot be decoded ({type(error).__name__}: {error})")


class ImageIndex:
    """The files and labels of a data set, compact: one block of bytes and three arrays.

    1.28 million ImageNet entries take about 75 MB; forked loader workers share them, because
    nothing in here is a Python object per image whose reference count would touch its page.

    Args:
        root: the data folder.
        list_file: where the entries come from, for messages; None: found by scanning `root`.

    Attributes:
        notes: lines for the log: what a scan passed over.
        exif_orientation: DATA.EXIF_ORIENTATION, for who shows an image.
        subset: the labels that the class folders name, where the model has more classes.
    """

    exif_orientation = False

    def __init__(self, root: str, list_file: str | None = None):
        self.root = os.fsencode(os.path.abspath(root))
        self.list_file = list_file
        self.labels = array("i")
        self._names = bytearray()
        self._ends = array("q", [0])
        self._lines = array("i")
        self.notes: list[str] = []
        self.subset: list[int] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, name: bytes, label: int, line: int = 0) -> None:
        """Appends a file: its path relative to `root`, its class, its line in the list file."""
        self._names += name
        self._ends.append(len(self._names))
        self.labels.append(label)
        self._lines.append(line)

    def name(self, index: int) -> bytes:
        """Path relative to `root`, as it was added."""
        return bytes(self._names[self._ends[index] : self._ends[index + 1]])

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.root, self.name(index)))

    def where(self, index: int) -> str:
        """The path of an entry for a message, after ``list_file:line`` if it has one."""
        line = f"{self.list_file}:{self._lines[index]}: " if self.list_file else ""
        return line + printable(self.path(index))


def read_list(list_file: str, root: str, num_classes: int, allow_outside: bool) -> ImageIndex:
    """Reads ``relative/path label`` lines: the last field is the label, the rest is the path.

    Blank lines and lines that begin with ``#`` are skipped; fields are separated by spaces or
    tabs, and paths may contain spaces. Without `allow_outside`, ``..`` is resolved by the text
    alone: a link may point to another disk, and ``link/..`` is the folder that the link lies in.

    Args:
        list_file: the text file; paths in any encoding.
        root: the data folder that the paths are relative to.
        num_classes: labels are 0 .. num_classes - 1.
        allow_outside: accept paths that leave `root` (``../x.jpg``, ``/other/x.jpg``).

    Raises:
        DataError: the file is missing, empty or has a line that is none of this.
    """
    index = ImageIndex(root, list_file)
    folder = os.path.join(os.path.normpath(index.root), b"")
    labels: dict[bytes, int] = {}  # a few different ones, a million times
    try:
        regular_size(list_file)
        with open(list_file, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.strip() if number > 1 else line.removeprefix(_BOM).strip()
                if not line or line.startswith(b"#"):
                    continue
                try:
                    fields = line.rsplit(None, 1)
                    if b"\0" in line:
                        raise ValueError("zero bytes: it looks like UTF-16, save it as UTF-8")
                    if len(fields) < 2:
                        raise ValueError("expected `relative/path label`")
                    name, label = fields
                    if label not in labels:
                        labels[label] = _parse_label(label, num_classes)
                    if not allow_outside and (b".." in name or name.startswith(b"/")):
                        name = _inside(name, folder)
                except ValueError as problem:
                    raise DataError(f"{list_file}:{number}: {problem}, got {_show(line)}") from None
                index.add(name, labels[label], number)
    except OSError as error:
        raise DataError(
            f"{list_file}: {_reason(error)}; it lists the images of {root}, one `relative/path "
            "label` a line. tools/make_lists.py makes it from a folder per class, and "
            "`-dataset imagefolder` needs none"
        ) from None
    if not len(index):
        raise DataError(f"{list_file}: lists no images")
    return index


def find_classes(root: str) -> list[str]:
    """The class folders of a `DATASET: imagefolder` tree in order: label i is the i-th.

    They are those of ``root/train``, or of ``root/val`` where there is no ``train``.

    Raises:
        DataError: neither is there, it holds no folders, or as `class_folders`.
    """
    for split in SPLIT_NAMES:
        folder = split_folder(root, split)
        if archives.is_folder(folder):
            classes = class_folders(folder)
            if not classes:
                loose = len(list_images(folder))
                found = f"{loose} images without a class" if loose else "no class folders"
                raise DataError(
                    f"{folder}: {found}; expected {split}/<class>/<image>, a folder for each class"
                )
            return classes
    raise DataError(
        f"{root}: expected train/<class>/<image> and val/<class>/<image>; "
        "tools/make_lists.py splits a folder that has only classes"
    )


def split_folder(root: str, split: str) -> str:
    """The folder of a split: ``root/train``, ``root/Training``, or the archive ``root/train.tar``
    or ``.zip``; ``root/train`` where there is none.
    """
    names = os.listdir(root) if os.path.isdir(root) else []
    if inside := archives.split(root):
        names = archives.open_archive(inside[0]).folders(inside[1])
    found = []
    for name in names:
        stem, ending = os.path.splitext(name)
        packed = ending in archives.ENDINGS and os.path.isfile(os.path.join(root, name))
        known = (stem if packed else name).lower()
        if known in SPLIT_NAMES[split] and (packed or archives.is_folder(f"{root}/{name}")):
            found.append((packed, SPLIT_NAMES[split].index(known), name != split, name))
    return os.path.join(root, min(found)[-1] if found else split)


def evaluation_folder(root: str) -> str:
    """The folder with the class folders to evaluate on: that of ``val``, or `root` itself where it
    has no splits, as ImageNet-A and others are published.
    """
    folders = [split_folder(root, split) for split in SPLIT_NAMES]
    return folders[-1] if any(map(archives.is_folder, folders)) else root


def is_split_name(name: str) -> bool:
    """Whether a folder's name is one that splits have, so that it is hardly a class."""
    return any(name.lower() in names for names in (*SPLIT_NAMES.values(), _TEST_NAMES))


def passed_over(root: str) -> list[str]:
    """A line that names the folders beside those of the splits, which nothing is read from."""
    used = {os.path.basename(split_folder(root, split)) for split in SPLIT_NAMES}
    names = class_folders(root) if os.path.isdir(root) else []
    others = [name for name in names if name not in used] if used & set(names) else []
    return [f"{root}: not used: {', '.join(f'{name}/' for name in others)}"] if others else []


def scan_folder(
    root: str,
    split: str,
    num_classes: int,
    classes: list[str] | None = None,
    folder: str | None = None,
) -> ImageIndex:
    """Finds the images of ``root/split/<class>/``, at any depth, in the order of their names.

    Junk (`is_junk`) is passed over; files without an image's ending too, named in the `notes`.

    Args:
        root: the data folder.
        split: ``"train"`` or ``"val"``.
        num_classes: how many classes there are to be.
        classes: the class folders by label; None: `find_classes`.
        folder: where they are; None: `split_folder`.

    Raises:
        DataError: folders missing or empty, other classes than `num_classes` or than train's.
    """
    classes = find_classes(root) if classes is None else classes
    if len(classes) != num_classes:
        raise DataError(
            f"{root}: {len(classes)} class folders but MODEL.NUM_CLASSES is {num_classes}; "
            f"set it with `-opts MODEL.NUM_CLASSES {len(classes)}`"
        )
    folder = folder or split_folder(root, split)
    if not archives.is_folder(folder):
        raise DataError(f"{folder}: no such folder; expected {split}/<class>/<image>")
    there = set(class_folders(folder))
    unknown = sorted(there - set(classes))
    if unknown:
        raise DataError(f"{folder}: class {unknown[0]!r} is not among the folders of train")
    index, others = ImageIndex(root), []
    for label, name in enumerate(classes):
        for path in list_images(os.path.join(folder, name), others) if name in there else ():
            index.add(os.fsencode(os.path.relpath(path, root)), label)
    index.notes = describe_others(folder, others) + passed_over(root)
    if len(there) < num_classes:
        index.subset = [label for label, name in enumerate(classes) if name in there]
    if not len(index):
        there = f"; {index.notes[0]}" if others else ""
        if loose := len(list_images(folder)):
            there = (
                f" in class folders; {loose} images lie in it without one. tools/make_lists.py "
                "knows the labels of ImageNet's validation images, and reads others from a CSV file"
            )
        raise DataError(f"{folder}: no images ({' '.join(EXTENSIONS)}){there}")
    return index


def is_junk(name: str) -> bool:
    """Whether a file or folder is an operating system's or notebook's: hidden, ``__MACOSX``, ..."""
    return name.startswith(".") or name.lower() in _JUNK


def list_images(folder: str, others: list[str] | None = None) -> list[str]:
    """Paths of the image files under a folder, sorted; junk (`is_junk`) is passed over.

    Args:
        folder: on the disk or in an archive.
        others: takes the paths of files that have another ending.

    Raises:
        DataError: a folder that cannot be read, a link to a folder that it lies in.
    """
    found = []
    if inside := archives.split(folder):
        for name in archives.open_archive(inside[0]).under(inside[1]):
            if not any(map(is_junk, name.split("/"))):
                found.append(f"{inside[0]}/{name}")
    else:
        for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
            _check_link(parent)
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


def printable(path: str) -> str:
    """The path with control characters and whatever is not UTF-8 in it escaped, for a terminal."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


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
        raise DataError(f"{path}: {_reason(error)}; expected one class name a line") from None
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


def class_folders(folder: str) -> list[str]:
    """The names of the folders in a folder, as `sort_classes`; junk (`is_junk`) is passed over.

    Raises:
        DataError: the folder cannot be read, or a name is no line of a text file of names.
    """
    try:
        if inside := archives.split(folder):
            names = archives.open_archive(inside[0]).folders(inside[1])
        else:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        _refuse(error)
    names = sort_classes((name for name in names if not is_junk(name)), folder)
    for name in names:
        if printable(name) != name or not name.strip():
            raise DataError(
                f"{printable(os.path.join(folder, name))}: a class name is UTF-8 text without "
                "line breaks and control characters; rename the folder"
            )
    return names


def sort_classes(names: Iterable[str], where: str) -> list[str]:
    """Class names in the order of their labels: by name, but whole numbers by their value.

    ImageNet-V2's folders are 0 ... 999; as texts, 10 would come before 2.

    Raises:
        DataError: two names are one number, as 1 and 01.
    """
    names = sorted(names)
    if all(re.fullmatch("-?[0-9]{1,9}", name) for name in names):
        names.sort(key=int)
        for one, other in zip(names, names[1:]):
            if int(one) == int(other):
                raise DataError(f"{where}: the labels {one!r} and {other!r} are one number")
    return names


def _check_link(path: str) -> None:
    """Refuses a link to a folder above it: whoever follows it comes back to it for ever."""
    if os.path.islink(path):
        for above in Path(path).absolute().parents:
            if os.path.samefile(path, above):
                raise DataError(
                    f"{printable(path)}: a link to {printable(str(above))}, which it lies in, so "
                    "that all images there would be found again and again; remove the link"
                )


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"{printable(error.filename)}: {_reason(error)}") from None


def _parse_label(text: bytes, num_classes: int) -> int:
    if not text.isdigit():
        raise ValueError(f"the label {_show(text)} is not a whole number")
    if len(text) > 9 or int(text) >= num_classes:
        raise ValueError(
            f"the label {_show(text)} is not in 0 .. {num_classes - 1} "
            f"(MODEL.NUM_CLASSES {num_classes})"
        )
    return int(text)


def _inside(name: bytes, folder: bytes) -> bytes:
    """The path relative to the folder, without ``..``: what is opened is what was checked."""
    path = os.path.normpath(os.path.join(folder, name))
    if not path.startswith(folder):
        raise ValueError(
            f"the path {_show(name)} leaves the data folder {os.fsdecode(folder)} "
            "(DATA.ALLOW_OUTSIDE_PATHS True accepts it)"
        )
    return path[len(folder) :]


def _show(text: bytes) -> str:
    return repr(text[:100].decode("utf-8", "replace"))


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
