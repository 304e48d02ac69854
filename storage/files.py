"""Files of whatever kind: written whole or not at all, and how messages name them. (No Paddle.)"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from cli.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted
    fcntl = None

# Control characters, line breaks, and what `os.fsdecode` makes of bytes that are not UTF-8.
# (`str.isprintable` is also False for the joiners inside Persian words.)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def unreachable(path: str | os.PathLike) -> str:
    """Why the system cannot tell whether a path exists; empty if it can."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:  # a closed folder, too long a name, a zero byte
        return getattr(error, "strerror", None) or str(error)
    return ""


def lock(file: IO, wait: bool = False) -> None:
    """Takes the lock of an open file until it is closed; OSError where another process has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that appears as ``path`` when it is whole, or not at all (OSError).

    It lies beside ``path`` under a temporary name, is flushed to the disk and renamed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    try:
        with open(temporary, "wb") as file:
            with suppress(OSError):
                lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(temporary, path)
        if fcntl is None:
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_atomically(data: bytes, path: str | os.PathLike) -> None:
    """Writes a file by `atomic`; UserError where that fails, an earlier file is left as it was."""
    try:
        with atomic(path) as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def file_sha256(path: str | os.PathLike) -> str:
    """The sha256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Files that can be made again: ``resmlp`` in ``XDG_CACHE_HOME`` (``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~", ".cache").expanduser(), "resmlp")


def _remove_leftovers(path: Path) -> None:
    """Removes temporary files of writers of ``path`` that were killed: nobody holds their lock."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*-*.tmp"):
        with suppress(OSError):  # being written, or another's
            with open(leftover, "rb") as file:
                lock(file)
            leftover.unlink()


def shorten(names: list, limit: int = 6) -> str:
    """A list of names for a message, cut when it is long."""
    rest = len(names) - limit
    text = ", ".join(printable(str(name), 200) for name in names[:limit])
    return f"{text} and {rest} more" if rest > 0 else text


def printable(text: str, limit: int | None = None) -> str:
    """Text from a file for a message: escaped where it is control characters or not UTF-8."""
    shown = _UNPRINTABLE.sub(_escape, text[:limit])
    return f"{shown}..." if limit is not None and len(text) > limit else shown


def _escape(match: re.Match) -> str:
    byte = ord(match[0]) - 0xDC00  # of a file name that is not UTF-8
    if 0x80 <= byte <= 0xFF:
        return f"\\x{byte:02x}"
    return match[0].encode("unicode_escape").decode()
