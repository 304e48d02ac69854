"""Reads and writes PyTorch's weight files, reading them without torch (but those before 1.6)."""

from __future__ import annotations

import argparse
import io
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import WeightsError
from storage import safe_pickle
from storage.files import printable, shorten, unreachable, write_atomically
from storage.weights import (
    CONTAINERS,
    TORCH_BEGINNINGS,
    check_state,
    refuse_text,
    safe_load,
    without_prefixes,
    write_weights,
)

TORCH_SUFFIXES = (".pth", ".pt", ".bin")


def read_torch_weights(path: str, key: str = "auto") -> tuple[dict[str, np.ndarray], str]:
    """Reads a state dict with PyTorch's names, in float32, and the key that was taken ("": none).

    ``key`` says which of a training checkpoint; ``auto`` takes the first that is there of
    model_ema, state_dict_ema, model, state_dict. Raises WeightsError: no such file; it holds no
    weights, or more than weights; torch is missing.
    """
    if not os.path.isfile(path):
        raise WeightsError(f"{path}: {unreachable(path) or 'no such file'}")
    content = _load(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    containers = [name for name in CONTAINERS if isinstance(content.get(name), Mapping)]
    taken = ""
    if containers:
        taken = containers[0] if key == "auto" else key
        if taken not in containers:
            raise WeightsError(f"{path}: has no {key}; it holds {shorten(list(content))}")
        content = content[taken]
    content = without_prefixes(content, path)
    return check_state({name: _to_numpy(value) for name, value in content.items()}, path), taken


def write_torch_weights(state: Mapping[str, np.ndarray], path: str) -> None:
    """Writes ``.safetensors``, or with any other suffix a file for ``torch.load``. Raises
    WeightsError if it cannot be written, or torch is needed and missing.
    """
    if Path(path).suffix == ".safetensors":
        write_weights(state, path)
        return
    torch = _import_torch(path)
    buffer = io.BytesIO()
    torch.save({name: torch.tensor(value) for name, value in state.items()}, buffer)
    write_atomically(buffer.getvalue(), path)


def _load(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None
    if head[8:9] == b"{":
        return safe_load(path)
    refuse_text(head, path)
    if not head.startswith(TORCH_BEGINNINGS) and Path(path).suffix == ".pdparams":
        raise WeightsError(f"{path}: a Paddle file already; use it with -pretrained")
    if head.startswith(b"PK"):
        return _read_zip(path)
    torch = _import_torch(path)  # as PyTorch wrote files before 1.6
    try:  # DeiT and timm keep their arguments in training checkpoints: a plain namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged or hostile file provokes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        named = [line for line in reason if "GLOBAL" in line or "Unsupported" in line]
        reason = (named or reason)[0].strip()
        guess = "" if "GLOBAL" in reason else "truncated, damaged, or not a PyTorch file; "
        raise WeightsError(f"{path}: {guess}torch refuses it: {reason}") from None


def _read_zip(path: str) -> Any:
    """The pickle of a file of PyTorch 1.6 and later, of which nothing is run, with its numbers."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise ValueError("not what torch.save writes")
            folder = pickles[0][: -len("data.pkl")]
            if f"{folder}constants.pkl" in archive.namelist():
                raise WeightsError(f"{path}: a TorchScript program; save its state_dict()")
            big = f"{folder}byteorder" in archive.namelist()
            order = ">" if big and archive.read(f"{folder}byteorder") == b"big" else "<"
            storages: dict[str, np.ndarray] = {}

            def storage(key: tuple) -> np.ndarray:
                _, kind, name, _, _ = key
                code = _STORAGES.get(getattr(kind, "name", ""))
                if code is None or type(name) is not str:
                    raise WeightsError("a tensor that is not plain numbers")
                if name not in storages:
                    entry = archive.getinfo(f"{folder}data/{name}")
                    if entry.compress_type != zipfile.ZIP_STORED:  # no bombs
                        raise ValueError("compressed")
                    storages[name] = np.frombuffer(archive.read(entry), order + code)
                return storages[name]

            content = archive.read(pickles[0])
            options = dict(names=_TENSORS, foreign=_FOREIGN, persistent=storage)
            return safe_pickle.read(io.BytesIO(content), len(content), path, **options)
    except (OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = printable(str(error), 200)
        raise WeightsError(
            f"{path}: truncated, damaged, or not a PyTorch file ({reason})"
        ) from None


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A read-only view of a storage, inside of it."""
    whole = [offset, *size, *stride]
    if any(type(number) is not int or number < 0 for number in whole) or len(size) != len(stride):
        raise ValueError("bad shape")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride))
    if math.prod(size) and (last >= len(storage) or math.prod(size) > len(storage)):
        raise ValueError("a tensor beyond its numbers")
    bytes_ = [step * storage.itemsize for step in stride]
    start = storage[offset:] if math.prod(size) else storage[:0]
    return np.lib.stride_tricks.as_strided(start, size, bytes_, writeable=False)


_TENSORS = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}
_STORAGES = {  # bfloat16 as uint16, as Paddle writes it
    **{"torch.FloatStorage": "f4", "torch.DoubleStorage": "f8", "torch.HalfStorage": "f2"},
    **{"torch.BFloat16Storage": "u2", "torch.LongStorage": "i8", "torch.IntStorage": "i4"},
    **{"torch.ShortStorage": "i2", "torch.CharStorage": "i1", "torch.ByteStorage": "u1"},
    "torch.BoolStorage": "?",
}
# What training scripts keep beside the weights: arguments, paths, dates, sizes, numbers.
_FOREIGN = (
    *("argparse.", "pathlib.", "datetime.", "collections.", "numpy.", "torch.", "yacs."),
    *("builtins.list", "builtins.dict", "builtins.int", "builtins.float", "builtins.set"),
)


def _import_torch(path: str):
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{path}: needs torch (`pip install -r port_weights/requirements.txt`); "
            f"a .safetensors file needs none"
        ) from None
    return torch


def _to_numpy(value: Any) -> Any:
    """An array of a tensor; anything else stays, for `check_state` to refuse."""
    if isinstance(value, np.ndarray) or not hasattr(value, "is_floating_point"):
        return value
    return value.detach().float().numpy() if value.is_floating_point() else value.numpy()
