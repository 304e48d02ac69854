"""The folder of a run: who may write into it, its config, log, metrics and class names."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from cli.errors import CheckpointError, UserError
from storage.checkpoints import BEST, LAST
from storage.files import fcntl, lock, write_atomically

DEFAULT = "./output"  # config.SAVE as it comes: each run gets a dated folder inside it
_log = logging.getLogger("resmlp")


def choose_folder(config) -> Path:
    """The folder of a run: that of ``-output``, else a resumed run's own, else
    ``output/train-<date>`` or ``output/eval-<date>``, as PPViT's.
    """
    chosen, resume = Path(config.SAVE), config.MODEL.RESUME
    if os.path.normpath(config.SAVE) != os.path.normpath(DEFAULT):
        return chosen
    if resume == "auto" and not config.EVAL:
        runs = chosen.glob(f"train-*/{LAST}")
        if newest := max(runs, key=lambda path: (path.stat().st_mtime, path), default=None):
            return newest.parent  # its name has the local time, which may have gone back
    elif resume and not config.EVAL and os.path.isfile(Path(resume).parent / "config.yaml"):
        return Path(resume).parent
    name = f"{'eval' if config.EVAL else 'train'}-{time.strftime('%Y%m%d-%H-%M-%S')}"
    names = (name, *(f"{name}-{number}" for number in range(2, 10**6)))
    return next(chosen / name for name in names if not os.path.exists(chosen / name))


class RunFolder:
    """A claimed folder. Only rank 0 writes the shared files; every rank has a log of its own.

    An evaluation may write beside a training run. With ``resume`` (``MODEL.RESUME``) ``auto``, or a
    file in the folder, it may hold a run. UserError if it cannot be made, or is in use.
    """

    def __init__(self, path: Path, rank: int, training: bool, resume: str | None = None):
        self.path, self.main = Path(path), rank == 0
        self.metrics_lines = 0  # on the disk
        self._unwritten: list[str] = []
        self._lock = None
        if os.path.isfile(self.path):
            raise UserError(f"-output {self.path}: is a file, not a folder")
        name = ("log" if training else "eval_log") + ("" if self.main else f".rank{rank}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if training and self.main:
                self._claim(resume)
            _log.addHandler(_LogFile(self.path / f"{name}.txt"))
        except (UserError, OSError) as error:
            self.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"-output {self.path}: cannot be written: {error.strerror or error}")

    def _claim(self, resume: str | None) -> None:
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115  (held to the very end)
        try:
            lock(self._lock)
        except BlockingIOError:
            raise UserError(f"-output {self.path}: a run that is still going uses this folder")
        except OSError as error:  # Lustre without flock, say
            self._lock = None
            _log.warning(f"{self.path}: cannot be locked ({error.strerror}): keep others out")
        own = resume == "auto" or (resume and Path(resume).parent.resolve() == self.path.resolve())
        if not own and any((self.path / n).exists() for n in (LAST, BEST, "metrics.jsonl")):
            raise UserError(
                f"-output {self.path}: holds an earlier run; continue it with -resume auto, or "
                f"name another folder"
            )
        for leftover in self.path.glob(".*.tmp"):  # of a run that was killed while it wrote
            leftover.unlink()

    def close(self) -> None:
        """Lets another run have the folder. The log stays open, to say how the run ended."""
        if self._lock is not None:
            if fcntl is not None:  # forked workers have the file open too
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()
            self._lock = None

    def write(self, name: str, text: str) -> None:
        """Writes a small text file in UTF-8, by rank 0, as `write_atomically`."""
        if self.main:
            write_atomically(text.encode(), self.path / name)

    def rewind_metrics(self, lines: int) -> None:
        """Cuts metrics.jsonl to its first ``lines`` lines: a checkpoint says where it stood."""
        if not self.main:
            return
        path = self.path / "metrics.jsonl"
        content = path.read_bytes() if path.is_file() else b""
        kept = [line for line in content.split(b"\n") if line][:lines]
        if len(kept) < lines:
            _log.warning(f"{path}: has {len(kept)} of the {lines} records up to the checkpoint")
        write_atomically(b"".join(line + b"\n" for line in kept), path)
        self.metrics_lines = len(kept)

    def add_metrics(self, record: dict) -> None:
        """Appends one record to metrics.jsonl; what a full disk refuses is kept for later."""
        if not self.main:
            return
        self._unwritten.append(json.dumps(record) + "\n")
        with suppress(CheckpointError):  # which is raised before the next checkpoint
            self.flush_metrics()

    def flush_metrics(self) -> None:
        """Brings all records to the disk, as before each checkpoint. CheckpointError if that fails;
        the file then ends with the last whole record.
        """
        if not self._unwritten:
            return
        path = self.path / "metrics.jsonl"
        size = None
        try:
            with open(path, "ab") as file:
                size = file.tell()
                file.write("".join(self._unwritten).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(path, size)
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}")
        self.metrics_lines += len(self._unwritten)
        self._unwritten = []


class _LogFile(logging.FileHandler):
    """Of lines that it cannot write (a full disk, say) it says so once."""

    warned = False

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.warned:
            self.warned, reason = True, sys.exc_info()[1]
            reason = getattr(reason, "strerror", reason)
            _log.warning(f"{self.baseFilename}: lines of the log are lost: {reason}")
