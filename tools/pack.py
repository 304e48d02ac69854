"""Copies a data set with smaller JPEGs into tar shards that the mains read without unpacking.

python tools/pack.py imagenet -output packed -short_side 320

Takes list files, or train/ and val/ with a folder per class (also in archives). Pictures whose
short side is longer are resized to it (bicubic) and saved as JPEG; others are copied byte for byte.
Run again, it goes on where it was stopped, and makes shards anew whose pictures have changed. At
the end every picture is decoded once more.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import contextlib
import hashlib
import io
import json
import math
import os
import tarfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cli.errors import DataError, UserError, run_as_script
from cli.parser import Parser
from cpu.resample import from_image, operations, to_image
from loading import archives
from loading.files import (
    SPLIT_NAMES,
    ImageIndex,
    find_classes,
    read_list,
    scan_folder,
    split_folder,
)
from loading.images import BadImage, read_image, read_pixels
from storage.files import atomic, printable
from tools.common import write_file
from tools.processes import map_in_processes
from transforms import resized_size

_MEASURED = 50  # of so many re-encoded pictures, one is compared with what was encoded
_MAX_PIXELS = 10**9  # of one picture: 4 GB while it is decoded
_ORIENTATION = 0x112  # EXIF's tag
_LONGEST_EXIF = 65_533  # bytes that a JPEG has room for


class Settings(NamedTuple):
    """What a packed data set was made with; a run that goes on needs the same."""

    short_side: int  # pixels
    quality: int  # of JPEG
    per_shard: int  # pictures


class Shard(NamedTuple):
    path: str
    files: ImageIndex
    indices: range

    def name(self, index: int) -> str:
        """Of a picture in the tar: its path without ``./`` and ``//``."""
        return os.path.normpath(os.fsdecode(self.files.name(index)))


def pack(source: str, output: str, settings: Settings, workers: int | None = None) -> None:
    """Packs the data folder `source` into the folder `output`.

    DataError: the data set cannot be read, or pictures not decoded (each is named). UserError:
    `output` holds something else, or cannot be written; as `map_in_processes`.
    """
    splits = _splits(source)
    if not splits:
        raise DataError(f"{source}: neither list files nor train/<class>/<image> are there")
    shards, lists = [], {}
    for split, files in splits.items():
        files.open_archives()
        lists[split] = []
        for number, first in enumerate(range(0, len(files), settings.per_shard)):
            indices = range(len(files))[first : first + settings.per_shard]
            tar = f"{split}-{number:05d}.tar"
            shards.append(shard := Shard(os.path.join(output, tar), files, indices))
            lists[split] += (f"{tar}/{shard.name(i)} {files.labels[i]}\n" for i in indices)
    _claim(output, settings)
    made = list(map_in_processes(partial(_make, settings), shards, workers))
    bad = [line for lines, *_ in made for line in lines]
    archives.open_archive.cache_clear()  # a shard of that name may be another now
    if not bad:
        bad = [line for lines in map_in_processes(_verify, shards, workers) for line in lines]
    if bad:
        print("\n".join(bad))
        raise DataError(f"{len(bad)} pictures cannot be used; mend or remove them, run it again")
    for split, lines in lists.items():
        write_file(os.path.join(output, f"{split}_list.txt"), os.fsencode("".join(lines)))
    names = Path(source, "classes.txt")
    if names.is_file():
        write_file(Path(output, "classes.txt"), names.read_text(encoding="utf-8-sig"))
    elif not Path(source, "train_list.txt").is_file():
        lines = [f"{name}\n" for name in find_classes(source)]
        write_file(Path(output, "classes.txt"), "".join(lines))
    count = sum(len(shard.indices) for shard in shards)
    written = sum(os.path.getsize(shard.path) for shard in shards)
    print(f"{count} pictures in {len(shards)} shards, {written / 1e6:,.1f} MB; all decode")
    if read := sum(size for _, size, _ in made):
        print(f"of this run: {read / 1e6:,.1f} MB of originals were read")
    if psnr := [value for *_, values in made for value in values]:
        print(
            f"what JPEG costs: {np.mean(psnr):.1f} dB on average, {min(psnr):.1f} dB at worst, "
            f"in {len(psnr)} pictures that were compared"
        )
    print(f"use it with: -dataset imagenet2012 -data_path {output}")


def _splits(source: str) -> dict[str, ImageIndex]:
    lists = {split: os.path.join(source, f"{split}_list.txt") for split in SPLIT_NAMES}
    if there := {split: path for split, path in lists.items() if os.path.isfile(path)}:
        return {s: read_list(path, source, 10**9, False) for s, path in there.items()}
    there = [s for s in SPLIT_NAMES if archives.is_folder(split_folder(source, s))]
    return {split: scan_folder(source, split, len(find_classes(source))) for split in there}


def _claim(output: str, settings: Settings) -> None:
    """Makes the folder, or sees that what is in it was begun with the same settings."""
    note = Path(output, "pack.json")
    text = json.dumps(settings._asdict(), indent=1) + "\n"
    if note.is_file():
        if (old := note.read_text()) != text:
            raise UserError(
                f"{note}: this folder was begun with {' '.join(old.split())}, not with "
                f"{' '.join(text.split())}; go on with the same, or name another -output"
            )
    elif os.path.isdir(output) and os.listdir(output):
        raise UserError(f"-output {output}: is not empty, and holds no packed data set")
    else:
        write_file(note, text)


def _make(settings: Settings, shard: Shard) -> tuple[list[str], int, list[float]]:
    """Writes one shard, unless it is there, of these very files; whole or not at all.

    Returns a line for each picture that does not decode, the originals' bytes, and the dB of those
    that were compared.
    """
    bad, names, read, psnr = [], set(), 0, []
    path, sources = Path(shard.path), _digest_of_sources(shard)
    note = path.with_name(f".{path.name}.sources")
    if path.is_file() and note.is_file() and note.read_text() == sources:
        return bad, read, psnr
    try:
        with (
            contextlib.suppress(BadImage),
            atomic(path) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar,
        ):
            for index in shard.indices:
                if (name := shard.name(index)) in names:
                    continue  # listed twice
                names.add(name)
                try:
                    original, data = _encoded(shard.files.path(index), settings, index, psnr)
                except BadImage as error:
                    bad.append(f"{shard.files.where(index)}: {error.reason}")
                    continue
                read += original
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            if bad:
                raise BadImage(shard.path, "is not kept")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    if not bad:
        write_file(note, sources)
    return bad, read, psnr


def _digest_of_sources(shard: Shard) -> str:
    """Of the names, sizes and times of a shard's files (of archives: the archives')."""
    digest = hashlib.sha256()
    for index in shard.indices:
        path = shard.files.path(index)
        with contextlib.suppress(OSError):  # a missing file is named when it is read
            status = os.stat((archives.split(path) or [path])[0])
            digest.update(os.fsencode(shard.name(index)))
            digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _encoded(path: str, settings: Settings, index: int, psnr: list[float]) -> tuple[int, bytes]:
    """The number of a picture's bytes, and the bytes that they become."""
    whole = read_image(path)  # a small one too: it may be damaged
    data = archives.read(path) or Path(path).read_bytes()
    if min(whole.size) <= settings.short_side:
        return len(data), data
    size, bicubic = resized_size(*whole.size, settings.short_side), Image.Resampling.BICUBIC
    image = to_image(operations().resize(from_image(whole), size, bicubic))
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=settings.quality, exif=_exif(whole))
    except (OSError, ValueError) as error:  # 65,500 pixels are the longest side
        raise BadImage(path, f"{image.width} x {image.height} pixels: {error}") from None
    if index % _MEASURED == 0:
        error = np.asarray(image, "float64") - np.asarray(Image.open(buffer), "float64")
        psnr.append(10 * math.log10(255**2 / max(np.mean(error**2), 1e-9)))
    return len(data), buffer.getvalue()


def _exif(image: Image.Image) -> bytes:
    """The EXIF data of a picture for a JPEG, with the orientation that `read_pixels` goes by."""
    orientation, least = None, Image.Exif()
    with contextlib.suppress(Exception):  # Pillow raises anything on broken data
        orientation = image.getexif().get(_ORIENTATION)  # from XMP where EXIF has none
        data = image.getexif().tobytes()
        if len(data) <= _LONGEST_EXIF:
            return data if len(image.getexif()) else b""
    if orientation in range(2, 9):
        least[_ORIENTATION] = orientation
    return least.tobytes() if len(least) else b""


def _verify(shard: Shard) -> list[str]:
    """Decodes every picture of a shard; returns what is wrong with them."""
    wrong = []
    for name in dict.fromkeys(map(shard.name, shard.indices)):
        try:
            read_pixels(os.path.join(shard.path, name))
        except BadImage as bad:
            wrong.append(f"{bad}; remove {printable(shard.path)}")
    return wrong


def main() -> None:
    parser = Parser("Copies a data set with smaller JPEGs into tar shards.")
    parser.paths("source", "a data folder: list files, or train/ and val/")
    parser.flag("output", "the new data folder", required=True, metavar="DIR")
    quality = "of JPEG (default: 85; 90: 0.9 dB better, 25 %% more bytes, decoded more slowly)"
    number = dict(type=int, metavar="N")
    parser.flag("short_side", "pixels", default=320, **number)
    parser.flag("quality", quality, default=85, **number)
    parser.flag("per_shard", "pictures", default=10_000, **number)
    pixels = "of a picture; larger ones are refused"
    parser.flag("max_pixels", pixels, default=_MAX_PIXELS, **number)
    parser.flag("workers", "processes (default: one a core)", **number)
    args = parser.parse_args()
    if min(args.short_side, args.quality, args.per_shard, args.max_pixels) < 1:
        raise UserError("-short_side, -quality, -per_shard and -max_pixels are at least 1")
    Image.MAX_IMAGE_PIXELS = args.max_pixels
    settings = Settings(args.short_side, args.quality, args.per_shard)
    pack(args.source, args.output, settings, args.workers)


if __name__ == "__main__":
    run_as_script(main)
