"""Images inside of tar and zip archives, read where they lie: an archive is a folder. (No Paddle.)

    data/train.tar/cat/1.jpg              a member of a tar
    ILSVRC2012_img_train.tar/n01440764.tar/n01440764_18.JPEG        a tar in a tar

An archive is indexed once, in one pass. The index is kept beside it (``.train.tar.index.npz``), or
in the cache folder where that cannot be written, and made anew when the archive has changed. Reads
are positioned (``pread``), so that forked loader workers share nothing but the open file. Nothing
is extracted.
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
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import NamedTuple, NoReturn

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
_VERSION = 1  # of the index files
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_TAR_BLOCK = 512  # bytes; a tar ends with blocks of zeros
_LOCAL_HEADER = struct.Struct("<26x2H")  # of a zip member: lengths of its name and extra field
_opened: set[str] = set()  # archives that `split` need not look for on the disk


class Member(NamedTuple):
    """Where a member lies: ``size`` bytes at ``start``; ``length`` is what a zip makes of them."""

    start: int
    size: int
    length: int
    method: int
    crc: int


def split(path: str) -> tuple[str, str] | None:
    """A path cut behind its archive: ``("data/train.tar", "cat/1.jpg")``; None if it has none.

    A folder may be called ``x.tar`` too: only a file is an archive.
    """
    path = os.fspath(path)
    text = path.replace(os.sep, "/")
    for match in _CUT.finditer(text):
        if path[: match.end()] in _opened or os.path.isfile(path[: match.end()]):
            return path[: match.end()], text[match.end() :].strip("/")
    return None


def is_folder(path: str) -> bool:
    """Whether a path is a folder, on the disk or in an archive; an archive is one itself."""
    if os.path.isdir(path):
        return True
    found = split(path)
    return found is not None and open_archive(found[0]).has_folder(found[1])


def exists(path: str) -> bool:
    """Whether a file or folder is there, on the disk or in an archive."""
    found = split(path)
    if found is None or not found[1]:
        return os.path.lexists(path)
    archive = open_archive(found[0])
    return archive.find(found[1]) is not None or archive.has_folder(found[1])


def read(path: str) -> bytes | None:
    """The bytes of an archive's member; None where the path leads into no archive.

    Raises:
        OSError: no such member, or a damaged one.
        DataError: the archive cannot be used, or has changed since it was indexed.
    """
    found = split(path)
    if found is None or not found[1]:
        return None
    return open_archive(found[0]).read(found[1])


def size(path: str) -> int | None:
    """The bytes of an archive's member; None where the path leads into no archive.

    Raises:
        FileNotFoundError: no such member.
        DataError: the archive cannot be read.
    """
    found = split(path)
    if found is None or not found[1]:
        return None
    member = open_archive(found[0]).find(found[1])
    if member is None:
        raise FileNotFoundError(2, "No such member", path)
    return member.length


@cache
def open_archive(path: str) -> Archive:
    """The archive at a path, indexed; opened once in a process."""
    _allow_open_files()
    archive = Archive(path)
    _opened.add(path)
    return archive


@cache
def _allow_open_files() -> None:
    """Lets this process keep more files open than the usual 1,024 (256 on a Mac): ImageNet may
    come as 1,000 tars.
    """
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        more = 2**14 if hard == resource.RLIM_INFINITY else min(2**14, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, more), hard))


class Archive:
    """The members of one archive: names in order, and where each lies.

    1.28 million members take about 100 MB, in arrays that forked workers share.

    Args:
        path: a ``.tar`` (also of tars) or ``.zip`` file.

    Raises:
        DataError: damaged, compressed as a whole, or with members that cannot be used.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115  (for as long as the process reads)
            self._stamp = _stamp(path)
        except OSError as error:
            raise DataError(f"{path}: {(error.strerror or str(error)).lower()}") from None
        index = _load_index(path, self._stamp)
        if index is None:
            index = _build_index(path)
            _save_index(path, self._stamp, index)
        # Not as arrays, of which a search would make an object at every step.
        self._names, self._where = index["names"].tobytes(), index["where"]
        self._ends = memoryview(np.insert(index["ends"], 0, 0))

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, number: int) -> bytes:
        """The name at a place of the sorted index."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._names[self._ends[number] : self._ends[number + 1]]

    def _search(self, wanted: bytes) -> int:
        """`bisect_left` for the names, in half of its time: every image that is read needs it."""
        names, ends, low, high = self._names, self._ends, 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if names[ends[middle] : ends[middle + 1]] < wanted:
                low = middle + 1
            else:
                high = middle
        return low

    def find(self, name: str) -> Member | None:
        """Where the member of a name lies; None if there is none."""
        wanted = os.fsencode(name)
        number = self._search(wanted)
        if number < len(self) and self[number] == wanted:
            return Member(*self._where[number].tolist())
        return None

    def under(self, folder: str) -> Iterator[str]:
        """The names of the members in a folder, at any depth, sorted; ``""`` is the whole."""
        prefix = os.fsencode(f"{folder}/" if folder else "")
        for number in range(self._search(prefix), len(self)):
            if not self[number].startswith(prefix):
                return
            yield os.fsdecode(self[number])

    def has_folder(self, folder: str) -> bool:
        """Whether a folder is there: an archive keeps only those that hold something."""
        return next(self.under(folder), None) is not None

    def folders(self, folder: str) -> list[str]:
        """The names of the folders directly in a folder, sorted."""
        start = len(folder) + 1 if folder else 0
        names = (name[start:] for name in self.under(folder))
        return sorted({name.partition("/")[0] for name in names if "/" in name})

    def read(self, name: str) -> bytes:
        """The bytes of a member.

        Raises:
            OSError: there is none of that name, or it is damaged.
            DataError: the archive has changed since it was indexed.
        """
        member = self.find(name)
        if member is None:
            raise FileNotFoundError(2, "No such member", f"{self.path}/{name}")
        try:
            unchanged = _stamp(self.path) == self._stamp
        except OSError:  # it is gone
            unchanged = False
        if not unchanged:
            raise DataError(
                f"{self.path}/{name}: the archive was changed while it was in use; start again"
            )
        start = member.start
        if member.method >= 0:  # a zip's: behind its local header
            start += _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(self._at(start, 30)))
        data = self._at(start, member.size)
        if member.method == _DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, member.length)
            except zlib.error:
                data = b""
        whole = len(data) == member.length
        if not whole or (member.method >= 0 and zlib.crc32(data) != member.crc):
            raise OSError(errno.EIO, "The member is damaged", f"{self.path}/{name}")
        return data

    def _at(self, start: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, start)
        with open(self.path, "rb") as file:  # Windows: a position of one's own
            file.seek(start)
            return file.read(size)


# ----------------------------------------------------------------------------------- the index
def _stamp(path: str) -> list[int]:
    """What tells that an archive is the one that was indexed."""
    status = os.stat(path)
    return [_VERSION, status.st_size, status.st_mtime_ns]


def _index_files(path: str) -> list[str]:
    """Where an index may lie: beside the archive, else in the cache folder."""
    folder, name = os.path.split(os.path.abspath(path))
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    return [
        os.path.join(folder, f".{name}.index.npz"),
        str(cache_folder() / f"{name}.{digest}.index.npz"),
    ]


def _load_index(path: str, stamp: list[int]) -> dict[str, np.ndarray] | None:
    for file in _index_files(path):
        broken = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
        with suppress(*broken), np.load(file, allow_pickle=False) as stored:
            if stored["stamp"].tolist() == stamp:
                return {key: stored[key] for key in ("names", "ends", "where")}
    return None


def _save_index(path: str, stamp: list[int], index: dict[str, np.ndarray]) -> None:
    """Keeps an index for the next time, where there is room for it."""
    buffer = io.BytesIO()
    np.savez(buffer, stamp=np.array(stamp, "int64"), **index)
    for file in _index_files(path):
        with suppress(UserError):
            write_atomically(buffer.getvalue(), file)
            return


def _build_index(path: str) -> dict[str, np.ndarray]:
    """Reads the headers of an archive once.

    Raises:
        DataError: as `Archive`.
    """
    members: dict[bytes, Member] = {}
    found = _tar_members if path.lower().endswith(".tar") else _zip_members
    shown, name = sys.stderr.isatty(), ""
    if tool := _compression(path):
        raise DataError(
            f"{path}: is compressed; images are read in place from uncompressed archives only: "
            f"{tool} -dc {shlex.quote(path)} > NEW.tar"
        )
    try:
        for name, member in found(path, members):
            key = os.fsencode(_checked_name(path, name))
            if key in members:
                _refuse(path, name, "is there twice; make the archive anew from a folder")
            members[key] = member
            if shown and len(members) % 10000 == 0:
                print(f"\r{path}: {len(members)} members indexed", end="", file=sys.stderr)
        if shown and len(members) >= 10000:
            print(file=sys.stderr)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        place = f", behind the member {name!r}" if name else ""
        if found is _zip_members:  # of what is missing, it can name nothing
            place = f" (its members are listed at its end; unzip -t {shlex.quote(path)} checks it)"
        raise DataError(
            f"{path}: cannot be read as an archive: {error}{place}; is it whole?"
        ) from None
    order = sorted(members)
    return {
        "names": np.frombuffer(b"".join(order), np.uint8),
        "ends": np.cumsum([len(name) for name in order], dtype=np.int64),
        "where": np.array([members[name] for name in order], np.int64).reshape(-1, 5),
    }


def _compression(path: str) -> str | None:
    """The program that a file is compressed with as a whole, if it is."""
    with open(path, "rb") as file:
        head = file.read(6)
    return next((tool for magic, tool in _COMPRESSED.items() if head.startswith(magic)), None)


def _checked_name(path: str, name: str) -> str:
    """A member's name without ``./``; refuses one that leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts or "\n" in name:
        _refuse(path, name, "is no path inside of the archive")
    return "/".join(parts)


def _refuse(path: str, name: str, reason: str) -> NoReturn:
    raise DataError(f"{path}: the member {name!r} {reason}")


def _tar_members(
    path: str, known: dict[bytes, Member], file=None, base: int = 0, prefix: str = ""
) -> Iterator[tuple[str, Member]]:
    """Names and places of a tar's files, and of those in tars inside of it."""
    with tarfile.open(path, "r:", fileobj=file) as tar:
        for info in tar:
            tar.members.clear()  # or it keeps an object for each of a million
            name = prefix + info.name
            if info.isdir():
                continue
            if info.islnk():  # a second name of a file that came before
                target = known.get(os.fsencode(_checked_name(path, prefix + info.linkname)))
                if target is None:
                    _refuse(path, name, f"is a link to {info.linkname!r}, which is not there")
                yield name, target
                continue
            if not info.isreg() or info.issparse():
                kind = "a sparse file" if info.issparse() else "a link or device"
                _refuse(path, name, f"is {kind}; make the archive anew with tar -h, without -S")
            start = base + info.offset_data
            if name.lower().endswith(".tar"):
                yield from _tar_members(path, known, tar.extractfile(info), start, f"{name}/")
            else:
                yield name, Member(start, info.size, info.size, -1, 0)
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):  # tarfile says nothing of it
            raise tarfile.ReadError(f"{prefix or 'it'} ends in the middle")


def _zip_members(path: str, known: dict[bytes, Member]) -> Iterator[tuple[str, Member]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1 or info.compress_type not in (_STORED, _DEFLATED):
                _refuse(path, info.filename, "is encrypted or compressed in an unknown way")
            yield (
                info.filename,
                Member(
                    info.header_offset,
                    info.compress_size,
                    info.file_size,
                    info.compress_type,
                    info.CRC,
                ),
            )
