"""PyTorch's weight files as arrays: without torch, but for files from before PyTorch 1.6."""

from __future__ import annotations

import argparse
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import WeightsError
from storage import safe_pickle
from storage.files import printable

BEGINNINGS = (b"PK\x03\x04", b"\x80\x02\x8a\n")  # a zip archive; before 1.6, a pickled number


def load(path: Path, head: bytes) -> Any:
    """What ``torch.save`` wrote, of which nothing is run; bfloat16 is ``uint16``, as in Paddle's.

    ``head`` is how the file begins. WeightsError if it is damaged, holds code, or torch is needed
    and missing.
    """
    if head.startswith(BEGINNINGS[0]):
        return _load_zip(path)
    torch = import_torch(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DeiT's and timm's arguments
            return _arrays(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises whatever a damaged or hostile file provokes
        named = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        reason = printable((named or [type(error).__name__])[0], 200)
        raise WeightsError(
            f"{path}: truncated, damaged, or not only weights; torch refuses it: {reason}"
        ) from None


def import_torch(path: Path):
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{path}: needs torch (`pip install -r port_weights/requirements.txt`); "
            f"a .safetensors file needs none"
        ) from None
    return torch


def _arrays(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _arrays(value) for name, value in content.items()}
    if not hasattr(content, "is_floating_point"):
        return content
    return content.detach().float().numpy() if content.is_floating_point() else content.numpy()


def _load_zip(path: Path) -> Any:
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

            options = dict(names=_TENSORS, foreign=_FOREIGN, persistent=storage)
            return safe_pickle.load(path, archive.read(pickles[0]), **options)
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
