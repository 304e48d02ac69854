"""Reads and writes PyTorch's weight files; torch is imported only where a file needs it."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import WeightsError
from storage.weights import (
    TORCH_BEGINNINGS,
    check_state,
    refuse_text,
    safe_load,
    shorten,
    unreachable,
    write_atomically,
    write_weights,
)

# Where training checkpoints keep a model: DeiT's, timm's; averaged weights first.
_CONTAINERS = ("model_ema", "state_dict_ema", "model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def read_torch_weights(path: str, key: str = "auto") -> tuple[dict[str, np.ndarray], str]:
    """Reads a state dict with PyTorch's names.

    Args:
        path: ``.safetensors``, or whatever ``torch.load`` reads (``.pth``, ``.bin``, ...).
        key: which state dict of a training checkpoint; ``auto`` takes the first that is there of
            model_ema, state_dict_ema, model, state_dict.

    Returns:
        The state dict in float32, and the key that was taken (empty: the file is a state dict).

    Raises:
        WeightsError: no such file; it holds no weights, or more than weights; torch is missing.
    """
    if not os.path.isfile(path):
        raise WeightsError(f"{path}: {unreachable(path) or 'no such file'}")
    content = _load(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    containers = [name for name in _CONTAINERS if isinstance(content.get(name), Mapping)]
    taken = ""
    if containers:
        taken = containers[0] if key == "auto" else key
        if taken not in containers:
            raise WeightsError(f"{path}: has no {key}; it holds {shorten(list(content))}")
        content = content[taken]
    state = {_without_prefix(name): _to_numpy(value) for name, value in content.items()}
    if len(state) != len(content):
        raise WeightsError(f"{path}: some parameters are there twice, with a prefix and without")
    return check_state(state, path), taken


def write_torch_weights(state: Mapping[str, np.ndarray], path: str) -> None:
    """Writes ``.safetensors``, or with any other suffix a file for ``torch.load``.

    Raises:
        WeightsError: the file cannot be written; torch is needed and missing.
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
    torch = _import_torch(path)
    try:  # DeiT and timm keep their arguments in training checkpoints: a plain namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged or hostile file provokes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        named = [line for line in reason if "GLOBAL" in line or "Unsupported" in line]
        reason = (named or reason)[0].strip()
        guess = "" if "GLOBAL" in reason else "truncated, damaged, or not a PyTorch file; "
        raise WeightsError(f"{path}: {guess}torch refuses it: {reason}") from None


def _import_torch(path: str):
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{path}: needs torch (`pip install -r port_weights/requirements.txt`); "
            f"a .safetensors file needs none"
        ) from None
    return torch


def _without_prefix(name: Any) -> Any:
    for prefix in _PREFIXES:
        if isinstance(name, str) and name.startswith(prefix):
            return _without_prefix(name[len(prefix) :])
    return name


def _to_numpy(value: Any) -> Any:
    """An array of a tensor; anything else stays, for `check_state` to refuse."""
    if isinstance(value, np.ndarray) or not hasattr(value, "is_floating_point"):
        return value
    return value.detach().float().numpy() if value.is_floating_point() else value.numpy()
