"""Training checkpoints: whole or not there at all, checked on reading, rotated.

A checkpoint is a pickle of plain containers, numbers, text and NumPy arrays, which ``paddle.load``
opens too. Here it is read without running code (`weights.safe_load`).
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cli.errors import CheckpointError, UserError
from storage.files import unreachable
from storage.weights import safe_load

LAST, BEST = "last.pdparams", "best.pdparams"
_EPOCH = re.compile(r"epoch_(\d+)\.pdparams")
_log = logging.getLogger("resmlp")


def epoch_name(epoch: int) -> str:
    """File name of the checkpoint kept after an epoch (counted from 1)."""
    return f"epoch_{epoch:03d}.pdparams"


def to_numpy(tree: Any) -> Any:
    """Copies a tree of tensors to the host, as arrays; everything else stays as it is."""
    if isinstance(tree, dict):
        return {key: to_numpy(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [to_numpy(value) for value in tree]
    return np.asarray(tree.numpy()) if hasattr(tree, "numpy") else tree


def save(state: dict, path: str | os.PathLike, names: Sequence[str] = ()) -> None:
    """Writes a checkpoint so that at every moment ``path`` is the old file or the new one.

    ``state`` is a tree of arrays (`to_numpy`). It gets the further ``names`` first (`duplicate`):
    once ``path`` is the new file, everything is done. CheckpointError: nothing is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            pickle.dump({**state, "checksum": checksum(state)}, file, protocol=4)
            file.flush()
            os.fsync(file.fileno())
        try:
            for name in names:
                duplicate(temporary, name)
        finally:
            _replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written: {error.strerror or error}; the earlier "
            f"checkpoints are untouched"
        )


def is_writing(folder: str | os.PathLike, since: float) -> bool:
    """Whether a checkpoint is being written there, by a run that began at ``since`` (Unix time)."""
    try:
        return os.path.getmtime(Path(folder, f".{LAST}.tmp")) > since
    except OSError:
        return False


def duplicate(path: str | os.PathLike, name: str) -> None:
    """Gives a saved checkpoint a second name in its folder: a hard link, or else a copy."""
    path = Path(path)
    temporary = path.with_name(f".{name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        _replace(temporary, path.with_name(name))
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{path.with_name(name)}: cannot be written: {error.strerror}")


def find(path: str | os.PathLike) -> Path:
    """The file that a user's ``path`` means, with or without ``.pdparams``; it may not exist."""
    whole = Path(f"{path}.pdparams")
    return whole if os.path.isfile(whole) and not os.path.isfile(path) else Path(path)


def load(
    path: str | os.PathLike, foreign: Callable[[Path], dict | None] = lambda path: None
) -> dict:
    """Reads a checkpoint back (with or without ``.pdparams``) and checks that it is whole.

    ``foreign`` reads a file of another project's; it returns None for what it does not know.
    CheckpointError if it is missing, damaged, or no training checkpoint.
    """
    path = find(path)
    if os.path.isdir(path):
        raise CheckpointError(
            f"{path}: a folder; continue its run with -output {path} -resume auto"
        )
    if reason := unreachable(path):
        raise CheckpointError(f"{path}: cannot be read: {reason}")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = safe_load(path)
    except UserError as error:
        raise CheckpointError(str(error))
    if not isinstance(state, dict) or "checksum" not in state or "optimizer" not in state:
        if (other := foreign(path)) is not None:
            return other
        raise CheckpointError(
            f"{path}: holds weights, not the state of a training run; start from it with "
            f"-pretrained instead of -resume"
        )
    expected = state.pop("checksum")
    if checksum(state) != expected:
        raise CheckpointError(f"{path}: the checkpoint is damaged (its checksum does not agree)")
    return state


def load_newest(folder: str | os.PathLike) -> tuple[dict, Path] | None:
    """The newest whole checkpoint of a run's folder, and its file; None if there is none.

    Damaged ones are logged. CheckpointError if there are checkpoints, and none is whole.
    """
    folder = Path(folder)
    names = [LAST, *map(epoch_name, _kept_epochs(folder)), BEST]
    paths = [folder / name for name in names if os.path.isfile(folder / name)]
    newest = None
    for path in paths:
        try:
            state = load(path)
        except CheckpointError as error:
            _log.warning(f"{error}; looking for an earlier one")
            continue
        if newest is None or state["place"]["step"] > newest[0]["place"]["step"]:
            newest = state, path
        if path.name == LAST:  # always the newest, if it is whole
            break
    if paths and newest is None:
        raise CheckpointError(f"{folder}: none of its {len(paths)} checkpoints is whole")
    return newest


def rotate(folder: str | os.PathLike, keep: int, keep_every: int) -> None:
    """Deletes old epoch checkpoints: the newest ``keep`` stay, and every ``keep_every``-th."""
    folder = Path(folder)
    try:
        for epoch in sorted(_kept_epochs(folder), reverse=True)[keep:]:
            if not keep_every or epoch % keep_every:
                (folder / epoch_name(epoch)).unlink(missing_ok=True)
    except OSError as error:  # what was just saved is whole
        _log.warning(f"{folder}: old checkpoints cannot be deleted: {error.strerror}")


def go_back_to(path: str | os.PathLike, state: dict) -> None:
    """Makes an earlier checkpoint the last one of its folder, for a run that goes on from there.

    Later ones are renamed ``abandoned_...``, so that ``-resume auto`` and rotation pass them over.
    ``best`` is the best of its time again, if that is still there.
    """
    path, place = Path(path), state["place"]
    later = [epoch_name(e) for e in _kept_epochs(path.parent) if e > place["epoch"]]
    best = path.with_name(BEST)
    try:
        if best.is_file() and load(best)["place"]["best_epoch"] != place["best_epoch"]:
            later.append(BEST)
    except CheckpointError:
        later.append(BEST)
    for name in later:
        try:
            os.replace(path.with_name(name), path.with_name(f"abandoned_{name}"))
        except OSError as error:
            raise CheckpointError(f"{path.with_name(name)}: cannot be renamed: {error.strerror}")
        _log.info(f"{path.with_name(name)}: later than {path.name}, now abandoned_{name}")
    best_epoch = path.with_name(epoch_name(place["best_epoch"]))
    if not best.exists() and best_epoch.is_file():
        duplicate(best_epoch, BEST)
    duplicate(path, LAST)


def checksum(tree: Any, value: int = 0) -> int:
    """CRC-32 over every key, number, text and array of a tree, in order."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            value = checksum(item, zlib.crc32(repr(key).encode(), value))
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            value = checksum(item, value)
    elif isinstance(tree, np.ndarray):
        header = f"{tree.dtype.str}{tree.shape}".encode()
        value = zlib.crc32(np.ascontiguousarray(tree).data, zlib.crc32(header, value))
    else:
        value = zlib.crc32(repr(tree).encode(), value)
    return value


def config_changes(old: str, new: str) -> list[str]:
    """``KEY old -> new`` for what differs between two YAML configs, without keys that are gone."""
    return list(_changes(yaml.safe_load(old), yaml.safe_load(new)))


def _changes(old: dict, new: dict, prefix: str = "") -> Iterator[str]:
    for key, value in new.items():
        if isinstance(value, dict):
            yield from _changes(old.get(key, {}), value, f"{prefix}{key}.")
        elif key not in old or old[key] != value:
            yield f"{prefix}{key} {old.get(key, '(none)')} -> {value}"


def _kept_epochs(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}")
    return [int(match[1]) for match in map(_EPOCH.fullmatch, names) if match]


def _replace(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
