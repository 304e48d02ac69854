"""Fits a state dict to a model: another head, another resolution, or one clear refusal."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from paddle import nn

from cli.errors import WeightsError
from parallel.process import Process, main_first
from port_weights.download import published_file
from port_weights.names import convert, torch_format
from storage.files import shorten
from storage.weights import WeightFile, naming, read_weights


def load_pretrained(
    model: nn.Layer, config, new_head: bool | str = False, file: WeightFile | None = None
) -> list[str]:
    """Loads the weights that a config's ``MODEL`` section names; returns lines for the log.

    ``new_head`` as in `load_state`; ``file`` is what `read_pretrained` has found there already.
    WeightsError if the weights cannot be had or read, or do not fit the model.
    """
    file = file or read_pretrained(config.MODEL.PRETRAINED, config.MODEL.PRETRAINED_KEY)
    with naming(file.path):
        notes = load_state(model, file.state, new_head, config.MODEL.RESIZE_TOKENS)
    return [f"weights: {file}", *notes]


def read_pretrained(
    name: str | os.PathLike, key: str = "auto", process: Process | None = None
) -> WeightFile:
    """Reads a weight file, or published weights; PyTorch's get our names and layout.

    ``name`` is a file, else a name of the zoo (`port_weights.zoo.find`) or the https address of a
    published file; ``key`` and errors are as in `read_weights`. Of the ranks of ``process``, 0
    downloads.
    """
    with main_first(process or Process()) as main:
        path = published_file(name) if main else None
    file = read_weights(path or published_file(name) or name, key)
    if theirs := torch_format(file.state):
        file = replace(file, state=convert(file.state, theirs, "paddle")[0])
    return file


def load_state(
    model: nn.Layer,
    state: Mapping[str, np.ndarray],
    new_head: bool | str = False,
    resize_tokens: bool = False,
) -> list[str]:
    """Loads a state dict into the model: all of it or, with a WeightsError, nothing.

    Args:
        new_head: accept weights for another number of classes; the head keeps its initialisation.
            A text: it does in any case, for that reason.
        resize_tokens: accept weights for another image size; token mixing is resampled.

    Returns a line for the log about each adaptation that was made.
    """
    state, notes = dict(state), []
    _adapt_head(state, model, new_head, notes)
    _adapt_tokens(state, model, resize_tokens, notes)
    _check_match(state, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.set_state_dict(state)
    return notes


def _adapt_head(state: dict, model: nn.Layer, new_head: bool | str, notes: list[str]) -> None:
    """Puts the model's own head into the state dict where the file's has other classes."""
    head = state.get("head.weight", np.empty((model.embed_dim, 0)))
    if head.ndim != 2 or head.shape[0] != model.embed_dim:
        return  # not only another number of classes: `_check_match` says what else
    found, wanted = head.shape[1], model.num_classes
    other_classes = isinstance(new_head, str) and found == wanted
    if (found == wanted and not other_classes) or (not found and not new_head):
        return
    if wanted and not new_head:
        raise WeightsError(
            f"the weights are for {found} classes, the model has {wanted}: set "
            f"MODEL.NUM_CLASSES {found}, or train a new head first"
        )
    if not wanted:
        notes.append(f"the head of the file ({found} classes) is left out: the model has none")
    elif not found:
        notes.append(f"head initialised for {wanted} classes: the file has none")
    else:
        reason = new_head if other_classes else f"the file's has {found}"
        notes.append(f"head initialised for {wanted} classes: {reason}")
    for name in ("head.weight", "head.bias"):
        state.pop(name, None)
    state.update((f"head.{n}", value.numpy()) for n, value in model.head.state_dict().items())


def _adapt_tokens(state: dict, model: nn.Layer, resize_tokens: bool, notes: list[str]) -> None:
    """Resamples the token-mixing layers where the file's are for another number of patches."""
    name = "mixer_layers.{}.linear_tokens.{}".format
    weight, kernel = state.get(name(0, "weight")), state.get("patch_embed.patch_embed.weight")
    new_grid, patch = model.patch_embed.grid_size, model.image_size // model.patch_embed.grid_size
    if weight is None or kernel is None or kernel.shape[2:] != (patch, patch):
        return  # not only another resolution: `_check_match` says what else
    tokens = weight.shape[-1] if weight.ndim else 0
    old_grid = math.isqrt(tokens)
    if old_grid in (0, new_grid) or old_grid**2 != tokens or weight.shape != (tokens, tokens):
        return
    sizes = (
        f"from {old_grid * patch} x {old_grid * patch} pixels ({tokens} tokens) "
        f"to {model.image_size} x {model.image_size} ({new_grid**2} tokens)"
    )
    if not resize_tokens:
        raise WeightsError(
            f"the weights are for another image size: set MODEL.RESIZE_TOKENS True to resample "
            f"the token mixing {sizes}, or DATA.IMAGE_SIZE {old_grid * patch}"
        )
    for block in range(len(model.mixer_layers)):
        weight, bias = state.get(name(block, "weight")), state.get(name(block, "bias"))
        if weight is None or bias is None or (*weight.shape, *bias.shape) != (tokens,) * 3:
            continue  # `_check_match` names it
        weight, bias = resample_tokens(weight, bias, new_grid)
        state[name(block, "weight")], state[name(block, "bias")] = weight, bias
    notes.append(f"token mixing resampled {sizes}")


def resample_tokens(
    weight: np.ndarray, bias: np.ndarray, new_grid: int
) -> tuple[np.ndarray, np.ndarray]:
    """A token-mixing layer for another patch grid, as if the tokens were resampled around it.

    The new layer brings the new grid's tokens to the old grid, mixes them, and brings the result to
    the new grid, with bicubic interpolation both ways. So the sum of an output token's weights does
    not grow with the number of tokens, and a layer of the same size stays as it is.

    Args:
        weight, bias: ``[T, T]``, input tokens first (Paddle's layout), and ``[T]``, T a square.
        new_grid: patches along a side of the new grid.
    """
    old_grid = math.isqrt(len(bias))
    to_new, to_old = _bicubic(old_grid, new_grid), _bicubic(new_grid, old_grid)
    to_new, to_old = np.kron(to_new, to_new), np.kron(to_old, to_old)  # rows, then columns
    weight = to_old.T @ weight.astype(np.float64) @ to_new.T  # [T_in, T_out]
    return weight.astype(np.float32), (to_new @ bias.astype(np.float64)).astype(np.float32)


def _bicubic(old: int, new: int) -> np.ndarray:
    """Matrix ``[new, old]`` that resamples a line of ``old`` values; its rows sum to one.

    Keys' cubic with a = -0.5, stretched where the line shrinks, as Pillow and PyTorch do.
    """
    stretch = max(old / new, 1.0)
    centers = (np.arange(new) + 0.5) * (old / new) - 0.5  # of the new values, on the old line
    x = np.abs(np.arange(old) - centers[:, None]) / stretch
    near = 1.5 * x**3 - 2.5 * x**2 + 1.0
    far = -0.5 * x**3 + 2.5 * x**2 - 4.0 * x + 2.0
    matrix = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    return matrix / matrix.sum(axis=1, keepdims=True)


def _check_match(state: Mapping[str, np.ndarray], wanted: Mapping[str, tuple]) -> None:
    """Raises with everything that is missing, unexpected or of another shape."""
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {list(state[name].shape)}, needed {list(shape)}"
            + (" (transposed?)" if state[name].shape == shape[::-1] else "")
            for name, shape in wanted.items()
            if name in state and state[name].shape != shape
        ],
    }
    if not any(problems.values()):
        return
    details = "; ".join(f"{kind}: {shorten(found)}" for kind, found in problems.items() if found)
    if {"stem.proj.weight", "patch_embed.proj.weight"} & set(state):
        details += " (PyTorch's names: port the file with port_weights/load_timm_weights.py)"
    raise WeightsError(f"the weights do not fit the model; {details}")
