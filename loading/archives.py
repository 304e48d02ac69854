"""Tar and zip archives as folders, ``train.tar/cat/1.jpg``, and tars in a tar. (No Paddle.)

The index of an archive is kept beside it (``.train.tar.index.npz``), or in the cache folder, until
it changes. Each read opens the archive: forked workers share no file, and 1,000 are not too many.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shlex
import struct
import sys
import tarfile
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np

from cli.errors import DataError, UserError
from storage.files import cache_folder, write_atomically

ENDINGS = (".tar", ".zip")
_COMPRESSED = {  # how a file begins, and what unpacks it
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
# Compressed tars are found too, to be refused.
_CUT = re.compile(r"\.(?:tar|zip|tgz|tar\.(?:gz|bz2|xz|zst))(?=/|$)", re.IGNORECASE)
_VERSION = 2  # of the index files
_TAR_BLOCK = 512  # bytes; a tar ends with blocks of zeros
_UTF8 = 0x800  # flag of a zip's member: so is its name
_LOCAL_HEADER = struct.Struct("<26x2H")  # of a zip member: lengths of its name and extra field
_opened: set[str] = set()  # archives that `split` need not look for on the disk


class Member(NamedTuple):
    """Where a member lies: ``size`` bytes at ``start``; ``length`` is what a zip makes of them."""

    start: int = 0
    size: int = 0
    length: int = 0
    method: int = -1  # a zip's
    crc: int = 0


def split(path: str) -> tuple[str, str] | None:
    """A path cut behind its archive, ``("data/train.tar", "cat/1.jpg")``; None if it has none."""
    path = os.fspath(path)
    text = path.replace(os.sep, "/")
    for match in _CUT.finditer(text):
        archive = path[: match.end()]
        if archive in _opened or os.path.isfile(archive):  # a folder may be called x.tar too
            return archive, text[match.end() :].strip("/")
    return None


def inside(path: str) -> tuple[Archive, str] | None:
    """As `split`, with the archive opened; DataError where it cannot be used."""
    found = split(path)
    return (open_archive(found[0]), found[1]) if found else None


def is_folder(path: str) -> bool:
    """Whether a path is a folder, on the disk or in an archive; an archive is one itself."""
    if os.path.isdir(path):
        return True
    found = inside(path)
    return found is not None and (not found[1] or any(found[0].under(found[1], empty=True)))


def exists(path: str) -> bool:
    """Whether a file or folder is there, on the disk or in an archive."""
    if os.path.lexists(path):
        return True
    found = inside(path)
    return found is not None and (found[0].find(found[1]) is not None or is_folder(path))


def read(path: str) -> bytes | None:
    """The bytes of an archive's member (`Archive.read`); None where the path leads into none."""
    found = inside(path)
    return found[0].read(found[1]) if found and found[1] else None


@cache
def open_archive(path: str) -> Archive:
    """The archive at a path, indexed once in a process."""
    archive = Archive(path)
    _opened.add(path)
    return archive


class Archive:
    """The members of a ``.tar`` (also of tars) or ``.zip``: names in order, and where each lies.

    1.28 million members take about 100 MB, in arrays that forked workers share. The name of an
    empty folder ends with a slash. DataError if it is damaged, compressed, or has unusable members.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._state = _state(file.fileno())
        except OSError as error:
            raise DataError(f"{path}: {(error.strerror or str(error)).lower()}") from None
        index = _load_index(path)
        # Not as arrays, of which a search would make an object at every step.
        self._names, self._where = index["names"].tobytes(), index["where"]
        self._ends = memoryview(np.insert(index["ends"], 0, 0))

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, number: int) -> bytes:
        """The name at a place of the sorted index."""
        return self._names[self._ends[number] : self._ends[number + 1]]

    def find(self, name: str) -> Member | None:
        """Where the member of a name lies; None if there is none."""
        wanted = os.fsencode(name)
        number = bisect_left(self, wanted)
        if number < len(self) and self[number] == wanted:
            return Member(*self._where[number].tolist())
        return None

    def under(self, folder: str, empty: bool = False) -> Iterator[str]:
        """The members in a folder (``""``: all), at any depth, sorted; with `empty` folders too."""
        prefix = os.fsencode(f"{folder}/" if folder else "")
        for number in range(bisect_left(self, prefix), len(self)):
            if not self[number].startswith(prefix):
                return
            if empty or self[number][-1:] != b"/":
                yield os.fsdecode(self[number])

    def folders(self, folder: str) -> list[str]:
        start = len(folder) + 1 if folder else 0
        names = (name[start:] for name in self.under(folder, empty=True))
        return sorted({name.partition("/")[0] for name in names if "/" in name})

    def read(self, name: str) -> bytes:
        """A member's bytes; OSError if there is none or it is damaged, DataError after a change."""
        member = self.find(name)
        if member is None:
            raise FileNotFoundError(errno.ENOENT, "No such member", f"{self.path}/{name}")
        with self._open(name) as file:
            file.seek(member.start)
            if member.method >= 0:  # a zip's: behind its local header
                file.seek(sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))), os.SEEK_CUR)
            data = file.read(member.size)
        if member.method == zipfile.ZIP_DEFLATED:
            with suppress(zlib.error):  # then its checksum is not right
                data = zlib.decompressobj(-15).decompress(data, member.length)
        whole = len(data) == member.length
        if not whole or (member.method >= 0 and zlib.crc32(data) != member.crc):
            raise OSError(errno.EIO, "The member is damaged", f"{self.path}/{name}")
        return data

    def _open(self, name: str) -> BinaryIO:
        with suppress(OSError):  # it is gone
            file = open(self.path, "rb")  # noqa: SIM115  (`read` closes it)
            if _state(file.fileno()) == self._state:
                return file
            file.close()
        raise DataError(
            f"{self.path}/{name}: the archive was changed while it was in use; start again"
        )


def _state(file: int) -> list[int]:
    """What changes when somebody writes or replaces an archive that is in use."""
    status = os.fstat(file)
    return [status.st_ino, status.st_size, status.st_mtime_ns]


# ----------------------------------------------------------------------------------- the index
def _load_index(path: str) -> dict[str, np.ndarray]:
    """The index that is kept for an archive, else a new one, which is then kept where it can be."""
    file, status = Path(path).absolute(), os.stat(path)
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    beside = file.with_name(f".{file.name}.index.npz")
    files = [beside, cache_folder() / f"{file.name}.{digest}.index.npz"]
    # A file that replaces another can be given its mtime, but not its ctime.
    stamp = [_VERSION, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    for file in files:
        broken = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
        with suppress(*broken), np.load(file, allow_pickle=False) as stored:
            if stored["stamp"].tolist() == stamp:
                return {key: stored[key] for key in ("names", "ends", "where")}
    index, buffer = _build_index(path), io.BytesIO()
    np.savez(buffer, stamp=np.array(stamp, "int64"), **index)
    for file in files:
        with suppress(UserError):
            write_atomically(buffer.getvalue(), file)
            break
    return index


def _build_index(path: str) -> dict[str, np.ndarray]:
    """Reads the headers of an archive once; raises as `Archive`."""
    with open(path, "rb") as file:
        head = file.read(6)
    if tool := next((tool for magic, tool in _COMPRESSED.items() if head.startswith(magic)), None):
        raise DataError(
            f"{path}: is compressed; images are read in place from uncompressed archives only: "
            f"{tool} -dc {shlex.quote(path)} > NEW.tar"
        )
    members: dict[bytes, Member] = {}
    is_tar, name = path.lower().endswith(".tar"), ""
    try:
        for name, member in _tar_members(path, members) if is_tar else _zip_members(path):
            key = os.fsencode(_checked_name(path, name) + "/" * name.endswith("/"))
            if key in members and not name.endswith("/"):
                _refuse(path, name, "is there twice; make the archive anew from a folder")
            members[key] = member
            if len(members) % 10000 == 0 and sys.stderr.isatty():
                print(f"\r{path}: {len(members)} members\033[K\r", end="", file=sys.stderr)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        place = f", behind the member {name!r}" if name else ""
        if not is_tar:  # of what is missing, it can name nothing
            place = f" (its members are listed at its end; unzip -t {shlex.quote(path)} checks it)"
        raise DataError(
            f"{path}: cannot be read as an archive: {error}{place}; is it whole?"
        ) from None
    members.pop(b"/", None)
    order = sorted(members)
    # Of folders only the empty ones: another is known by the name that follows it.
    order = [a for a, b in zip(order, [*order[1:], b""]) if a[-1:] != b"/" or not b.startswith(a)]
    return {
        "names": np.frombuffer(b"".join(order), np.uint8),
        "ends": np.cumsum([len(name) for name in order], dtype=np.int64),
        "where": np.array([members[name] for name in order], np.int64).reshape(-1, 5),
    }


def _checked_name(path: str, name: str) -> str:
    """A member's name without ``./``; refuses one that leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    is_root = name in ("./", "/")  # of what was packed
    if not is_root and (name.startswith("/") or ".." in parts or not parts or "\n" in name):
        _refuse(path, name, "is no path inside of the archive")
    return "/".join(parts)


def _refuse(path: str, name: str, reason: str) -> NoReturn:
    raise DataError(f"{path}: the member {name!r} {reason}")


def _tar_members(
    path: str, known: dict[bytes, Member], file=None, base: int = 0, prefix: str = ""
) -> Iterator[tuple[str, Member]]:
    """Names and places of a tar's files and folders, and of those in tars inside of it."""
    with tarfile.open(path, "r:", fileobj=file) as tar:
        for info in tar:
            tar.members.clear()  # or it keeps an object for each of a million
            name = prefix + info.name
            if info.isdir():
                yield f"{name}/", Member()
                continue
            if info.islnk():  # a second name of a file that came before
                target = known.get(os.fsencode(_checked_name(path, prefix + info.linkname)))
                if target is None:
                    _refuse(path, name, f"is a link to {info.linkname!r}, which is not there")
                yield name, target
                continue
            if not info.isreg() or info.issparse():
                _refuse(
                    path, name, "is no plain file; make the archive anew with tar -h, without -S"
                )
            start = base + info.offset_data
            if name.lower().endswith(".tar"):
                yield f"{name}/", Member()
                yield from _tar_members(path, known, tar.extractfile(info), start, f"{name}/")
            else:
                yield name, Member(start, info.size, info.size)
        _check_end(tar, prefix or "it")


def _check_end(tar: tarfile.TarFile, name: str) -> None:
    """Refuses what tarfile takes for whole: an end in the middle, or more behind the end."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
        raise tarfile.ReadError(f"{name} ends in the middle")
    while block := tar.fileobj.read(2**20):
        if block.count(0) != len(block):
            raise tarfile.ReadError(
                f"{name} goes on behind its end, at byte {tar.offset} (a damaged place, or two "
                "archives in one file, which `tar -ixf` unpacks)"
            )


def _zip_members(path: str) -> Iterator[tuple[str, Member]]:
    known, encoding = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), "cp437"
    with zipfile.ZipFile(path) as archive:
        unmarked = [i.orig_filename for i in archive.infolist() if not i.flag_bits & _UTF8]
        for tried in ("gb2312", "utf-8"):  # Windows' in China, Info-ZIP's; else as zipfile reads
            with suppress(UnicodeDecodeError):
                "\n".join(unmarked).encode("cp437").decode(tried)
                encoding = tried
        for info in archive.infolist():
            name = info.filename
            if not info.flag_bits & _UTF8:  # zipfile has read it as CP 437
                name = info.orig_filename.encode("cp437").decode(encoding)
            if info.is_dir():
                yield name, Member()
                continue
            if info.flag_bits & 1 or info.compress_type not in known:
                _refuse(path, name, "is encrypted or compressed in an unknown way")
            sizes = info.compress_size, info.file_size
            yield name, Member(info.header_offset, *sizes, info.compress_type, info.CRC)
