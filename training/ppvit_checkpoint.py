"""PPViT's training checkpoints, read as the state that a run of ours goes on from.

Its ``main_multi_gpu.py`` has written two forms: since March 2022 one ``.pdparams`` with a dict of
``model``, ``model_ema``, ``optimizer``, ``epoch``, ``lr_scheduler`` and ``amp_grad_scaler``; before
that the weights alone, beside a ``.pdopt`` of the optimizer. Moments go by Paddle's own parameter
names there (``linear_12.w_0_moment1_0``), and ``paddle.save`` writes that name with each parameter.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import CheckpointError, WeightsError
from optimizer import by_parameter
from storage import safe_pickle
from storage.weights import NAME_TABLE, check_state

_EPOCH = re.compile(r"Epoch-(\d+)-Loss-")  # in the names of PPViT's files


def load(path: Path, config) -> dict | None:
    """Reads a checkpoint of PPViT's; None: it is no such file. UserError if it is damaged.

    Returns what `Learner.state` names, as arrays, with ``epoch`` (epochs done: the file's, else the
    config's, else that in the file's name) and ``notes``: a line for the log about each thing that
    was not carried over.
    """
    content, pair = _read(path) if path.suffix == ".pdparams" else None, path.with_suffix(".pdopt")
    if not isinstance(content, dict):
        return None
    if not isinstance(content.get("model"), dict):
        if not pair.is_file():
            return None
        content = {"model": content, "optimizer": _read(pair)}
    elif not content.keys() & {"optimizer", "epoch"}:
        return None
    epoch, named, notes = content.get("epoch"), _EPOCH.search(path.name), []
    if epoch is None:
        epoch = config.TRAIN.LAST_EPOCH or (int(named[1]) if named else None)
    if type(epoch) is not int or epoch < 0:
        raise CheckpointError(
            f"{path}: does not say how many epochs were done; give them with -last_epoch N"
        )
    optimizer = content.get("optimizer")
    optimizer = optimizer if isinstance(optimizer, dict) else {}
    own_names, model = _split(content["model"])
    state = {"epoch": epoch, "model": check_state(model, f"{path}: model"), "scaler": {}}
    state["optimizer"] = _moments(optimizer, own_names, path, notes)
    if state["optimizer"] and config.TRAIN.OPTIMIZER.NAME == "lamb":
        notes.append("the moments are of AdamW (PPViT has no LAMB); TRAIN.OPTIMIZER.NAME is lamb")
    if state["optimizer"] and config.TRAIN.WEIGHT_DECAY:
        notes.append(
            "weight decay on biases, Affine and LayerScale: PPViT's reaches them, ours not"
        )
    if isinstance(content.get("model_ema"), dict):
        state["model_ema"] = check_state(_split(content["model_ema"])[1], f"{path}: model_ema")
    if config.TRAIN.MODEL_EMA and "model_ema" not in state:
        notes.append("the file has no model_ema: the average starts from its weights")
    elif "model_ema" in state and not config.TRAIN.MODEL_EMA:
        notes.append("model_ema is left out: TRAIN.MODEL_EMA is False")
    scheduler = content.get("lr_scheduler", optimizer.get("LR_Scheduler"))
    rate = scheduler.get("last_lr") if isinstance(scheduler, dict) else None
    there = f" (rate {rate:.3g} there)" if isinstance(rate, float) else ""
    notes.append(f"lr_scheduler{there}: the rate is computed from the config")
    if config.AMP and config.AMP_DTYPE != "bfloat16":
        notes.append("amp_grad_scaler: the loss scale starts anew")
    notes.append(f"random numbers and the order of images: they are drawn from SEED {config.SEED}")
    notes.append("the best accuracy so far: the file does not say it")
    return {**state, "notes": [f"not carried over: {note}" for note in notes]}


def _pair(items: Any = ()) -> tuple:
    """A tensor in a container stays ``(name, array)``; `safe_pickle` itself drops the name."""
    if type(items) not in (tuple, list):
        raise WeightsError("a tuple of something that is no list")
    return tuple(items)


def _read(path: Path) -> Any:
    return safe_pickle.load(path, names={"builtins.tuple": _pair})


def _split(state: dict) -> tuple[dict[str, str], dict[str, Any]]:
    """A state dict as ``{Paddle's own name: name}`` and ``{name: array}``."""
    table = state.get(NAME_TABLE, {})  # of a flat file
    table = dict(table) if isinstance(table, dict) else {}
    arrays = {}
    for name, value in state.items():
        if type(value) is tuple and len(value) == 2:
            table[name], value = value
        if isinstance(value, np.ndarray):
            arrays[name] = value
    names = {own: name for name, own in table.items() if name in arrays}
    return names if len(names) == len(arrays) else {}, arrays


def _moments(optimizer: dict, own_names: dict[str, str], path: Path, notes: list[str]) -> dict:
    """The optimizer's state by the model's parameter names; empty, with a note, if unknown."""
    arrays = _split(optimizer)[1]
    if not arrays:
        notes.append("the optimizer's moments: there are none in the file")
        return {}
    if not own_names:
        notes.append("the optimizer's moments: the file does not say which parameter is which")
        return {}
    # Paddle counts the slots of a name: moment1_1 is of the second optimizer that was built.
    arrays = {re.sub(r"_\d+$", "_0", key): value for key, value in arrays.items()}
    arrays = check_state(arrays, f"{path}: optimizer")
    return by_parameter(arrays, own_names)
