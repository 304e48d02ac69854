"""Copies a data set with smaller JPEGs into tar shards that the mains read without unpacking.

python tools/pack.py imagenet -output packed -short_side 320

Takes list files, or train/ and val/ with a folder per class (also in archives), and writes
train-00000.tar ..., train_list.txt, val_list.txt and classes.txt. Pictures whose short side is
longer are resized to it (bicubic) and saved as JPEG; the others are copied byte for byte. Run
again, it goes on where it was stopped. At the end every picture is decoded once more.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import contextlib
import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cli.errors import DataError, UserError, run_as_script
from cli.parser import Parser
from cpu.resample import from_image, operations, to_image
from cpu.setup import default_threads
from loading import archives
from loading.files import ImageIndex, find_classes, read_list, scan_folder
from loading.images import BadImage, open_image, read_image, regular_size
from storage.files import atomic, printable
from tools.common import write_file
from transforms import resized_size

SPLITS = ("train", "val")
SETTINGS = "pack.json"
_MEASURED = 50  # of so many re-encoded pictures, one is compared with what was encoded


@dataclass(frozen=True)
class Settings:
    """What a packed data set was made with; a run that goes on needs the same."""

    short_side: int  # pixels
    quality: int  # of JPEG, 1 .. 95
    per_shard: int  # pictures


class Shard(NamedTuple):
    """What became of one shard."""

    bad: list[str]
    read: int  # bytes of the originals
    psnr: list[float]  # dB, of the pictures that were compared


def pack(
    source: str,
    output: str,
    settings: Settings,
    workers: int | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Packs a data set.

    Args:
        source: a data folder with list files, or with a folder per class in train/ and val/.
        output: the new data folder.
        settings: sizes and quality.
        workers: processes; None: one a core that this process may use.
        log: takes one line of text.

    Raises:
        DataError: the data set cannot be read; pictures that cannot be decoded (each is logged,
            and no lists are written).
        UserError: `output` holds something else, or cannot be written.
    """
    splits = {split: files for split in SPLITS if (files := _files(source, split)) is not None}
    if not splits:
        raise DataError(f"{source}: neither list files nor train/<class>/<image> are there")
    for files in splits.values():
        files.open_archives()
    _claim(output, settings)
    plan = list(_plan(splits, output, settings))
    try:
        with ProcessPoolExecutor(workers or default_threads()) as pool:
            made = list(pool.map(_make_shard, *zip(*plan)))
            bad = [line for shard in made for line in shard.bad]
            if not bad:
                bad = [line for lines in pool.map(_verify, *[*zip(*plan)][:3]) for line in lines]
    except BrokenProcessPool:
        raise UserError("a process that packed died; out of memory? Run it again") from None
    for line in bad:
        log(line)
    if bad:
        raise DataError(f"{len(bad)} pictures cannot be used; mend or remove them, run it again")
    for split, files in splits.items():
        lines = (_line(split, files, i, settings.per_shard) for i in range(len(files)))
        write_file(os.path.join(output, f"{split}_list.txt"), b"".join(lines))
    names = _class_names(source)
    if names is not None:
        write_file(os.path.join(output, "classes.txt"), names)
    _tell(plan, made, log)
    log(f"use it with: -dataset imagenet2012 -data_path {output}")


def _files(source: str, split: str) -> ImageIndex | None:
    """The pictures of a split, from its list or its folders."""
    list_file = os.path.join(source, f"{split}_list.txt")
    if os.path.isfile(list_file):
        return read_list(list_file, source, 10**9, allow_outside=False)
    if any(os.path.isfile(os.path.join(source, f"{other}_list.txt")) for other in SPLITS):
        return None
    if not any(os.path.exists(os.path.join(source, split + end)) for end in ("", ".tar", ".zip")):
        return None
    return scan_folder(source, split, len(find_classes(source)))


def _class_names(source: str) -> str | None:
    file = Path(source, "classes.txt")
    if file.is_file():
        return file.read_text(encoding="utf-8-sig")
    if os.path.isfile(os.path.join(source, "train_list.txt")):
        return None
    return "".join(f"{name}\n" for name in find_classes(source))


def _claim(output: str, settings: Settings) -> None:
    """Makes the folder, or sees that what is in it was begun with the same settings."""
    note = Path(output, SETTINGS)
    text = json.dumps(asdict(settings), indent=1) + "\n"
    if note.is_file():
        old = note.read_text()
        if old != text:
            raise UserError(
                f"{note}: this folder was begun with {' '.join(old.split())}, not with "
                f"{' '.join(text.split())}; go on with the same, or name another -output"
            )
    elif os.path.isdir(output) and os.listdir(output):
        raise UserError(f"-output {output}: is not empty, and holds no packed data set")
    else:
        write_file(note, text)


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"


def _plan(splits: dict[str, ImageIndex], output: str, settings: Settings) -> Iterator[tuple]:
    """The arguments of `_make_shard`, a shard at a time."""
    for split, files in splits.items():
        for number in range(math.ceil(len(files) / settings.per_shard)):
            first = number * settings.per_shard
            last = min(first + settings.per_shard, len(files))
            path = os.path.join(output, _shard_name(split, number))
            yield path, files, range(first, last), settings


def _line(split: str, files: ImageIndex, index: int, per_shard: int) -> bytes:
    shard = os.fsencode(_shard_name(split, index // per_shard))
    return b"%s/%s %d\n" % (shard, files.name(index), files.labels[index])


def _make_shard(path: str, files: ImageIndex, indices: range, settings: Settings) -> Shard:
    """Writes one shard, unless it is there: it gets its name when it is whole."""
    made = Shard([], 0, [])
    if os.path.isfile(path):
        return made
    read = 0
    with (
        contextlib.suppress(BadImage),
        atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for index in indices:
            try:
                original, data = _encoded(files.path(index), settings, index, made.psnr)
            except BadImage as bad:
                made.bad.append(f"{files.where(index)}: {bad.reason}")
                continue
            read += original
            info = tarfile.TarInfo(os.fsdecode(files.name(index)))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if made.bad:
            raise BadImage(path, "is not kept")
    return made._replace(read=read)


def _encoded(path: str, settings: Settings, index: int, psnr: list[float]) -> tuple[int, bytes]:
    """The bytes of a picture as they were (their number), and as they shall be."""
    with open_image(path) as image:
        small = min(image.size) <= settings.short_side
        exif = image.info.get("exif", b"")  # the rotation of a phone
    image = read_image(path)  # a small one too: it may be damaged
    data = archives.read(path)
    original = regular_size(path) if data is None else len(data)
    if small:
        return original, Path(path).read_bytes() if data is None else data
    size, bicubic = resized_size(*image.size, settings.short_side), Image.Resampling.BICUBIC
    image = to_image(operations().resize(from_image(image), size, bicubic))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.quality, exif=exif)
    if index % _MEASURED == 0:
        psnr.append(_psnr(image, Image.open(buffer)))
    return original, buffer.getvalue()


def _psnr(one: Image.Image, other: Image.Image) -> float:
    """The peak signal-to-noise ratio of two pictures, dB."""
    error = np.asarray(one, "float64") - np.asarray(other, "float64")
    return 10 * math.log10(255**2 / max(np.mean(error**2), 1e-9))


def _verify(path: str, files: ImageIndex, indices: range) -> list[str]:
    """Decodes every picture of a shard; returns what is wrong with them."""
    wrong = []
    archive = archives.Archive(path)
    if len(archive) != len(indices):
        return [f"{path}: {len(archive)} pictures, expected {len(indices)}; remove it"]
    for index in indices:
        try:
            read_image(os.path.join(path, os.fsdecode(files.name(index))))
        except BadImage as bad:
            wrong.append(f"{bad}; remove {printable(path)}")
    return wrong


def _tell(plan: list[tuple], made: list[Shard], log: Callable[[str], None]) -> None:
    count = sum(len(indices) for _, _, indices, _ in plan)
    written = sum(os.path.getsize(path) for path, *_ in plan)
    log(f"{count} pictures in {len(plan)} shards, {written / 1e6:,.1f} MB; all decode")
    read, psnr = sum(shard.read for shard in made), [x for shard in made for x in shard.psnr]
    if read:
        log(f"of this run: {read / 1e6:,.1f} MB of originals were read")
    if psnr:
        log(
            f"what JPEG costs: {np.mean(psnr):.1f} dB on average, {min(psnr):.1f} dB at worst, "
            f"in {len(psnr)} pictures that were compared"
        )


def _from(low: int, high: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdigit() or not low <= int(text) <= high:
            raise UserError(f"command line: {text!r} is not a number from {low} to {high}")
        return int(text)

    return whole_number


def main() -> None:
    parser = Parser("Copies a data set with smaller JPEGs into tar shards.")
    parser.add_argument("source", help="a data folder: list files, or train/ and val/")
    parser.flag("output", "the new data folder", required=True, metavar="FOLDER")
    size = _from(1, 65500)
    parser.flag("short_side", "pixels (default: 320)", type=size, default=320, metavar="N")
    quality = "of JPEG (default: 85; 90: 0.9 dB better, 25 %% more bytes, decoded more slowly)"
    parser.flag("quality", quality, type=_from(1, 95), default=85, metavar="N")
    many = _from(1, 10**6)
    parser.flag("per_shard", "pictures (default: 10000)", type=many, default=10000, metavar="N")
    parser.flag("workers", "processes (default: one a core)", type=_from(1, 512), metavar="N")
    args = parser.parse_args()
    settings = Settings(args.short_side, args.quality, args.per_shard)
    pack(args.source, args.output, settings, args.workers)


if __name__ == "__main__":
    run_as_script(main)
