"""Weight files: found, read without running anything of theirs, checked, and written.

    file = read_weights("resmlp_24_224")      # .pdparams or .safetensors; or PyTorch's x.pth
    load_state(model, file.state)             # resmlp.py: strict

Imports no Paddle. Arrays that are read are read-only.
"""

from __future__ import annotations

import difflib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import WeightsError
from loading.classes import UNKNOWN, ClassNames
from storage import safe_pickle, torch_files
from storage.files import printable, shorten, unreachable, write_atomically

SUFFIXES = ("", ".pdparams", ".safetensors")
KEYS = ("auto", "model", "model_ema")
# Where training checkpoints keep a model: PPViT's and DeiT's name, timm's; averaged weights first.
CONTAINERS = ("model_ema", "state_dict_ema", "model", "state_dict")
# DistributedDataParallel, torch.compile, Paddle's DataParallel.
_PREFIXES = ("module.", "_orig_mod.", "_layers.")
# Names of parameters, which paddle.save adds to a flat state dict and paddle.load drops. Under its
# own name, which paddle.load takes for one more of them, our files keep `ClassNames.record`.
NAME_TABLE = "StructuredToParameterName@@"
CLASSES = "classes"  # the record in checkpoints, and in the metadata of safetensors
_SAFETENSORS_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class WeightFile:
    """The weights that a file holds: parameter name -> float32 array, as the file names them.

    ``key`` is which of a checkpoint they are (``model``, ``model_ema``); empty: of no checkpoint.
    """

    state: dict[str, np.ndarray]
    key: str
    path: str
    classes: ClassNames = UNKNOWN

    def __str__(self) -> str:
        return f"{self.key} of {self.path}" if self.key else self.path


def find_file(path: str | os.PathLike) -> Path:
    """The file that is meant, with or without its suffix (PPViT leaves ``.pdparams`` out).

    WeightsError if there is none; it lists files with a similar name.
    """
    path = Path(path)
    for suffix in SUFFIXES:
        candidate = path.with_name(path.name + suffix) if path.name else path
        if os.path.isfile(candidate):
            return candidate
    if os.path.isdir(path):
        raise WeightsError(f"{path}: a folder, not a weight file")
    if reason := unreachable(path):
        raise WeightsError(f"{path}: cannot be read: {reason}")
    if not os.path.isdir(path.parent):
        raise WeightsError(f"{path}: no such weight file (there is no folder {path.parent})")
    names = []
    with suppress(OSError):  # a folder that may be entered, but not listed
        names = [name for name in os.listdir(path.parent) if name.endswith(SUFFIXES[1:])]
    near = difflib.get_close_matches(path.name, names, n=3)
    near += [name for name in names if Path(name).stem.startswith(path.name) and name not in near]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else ""
    raise WeightsError(f"{path}: no such weight file (nor with .pdparams, .safetensors){hint}")


def safe_load(path: str | os.PathLike) -> Any:
    """What a file of weights (its suffix: see `find_file`) holds; nothing of it is run. bfloat16 is
    ``uint16``, as Paddle writes it. WeightsError if it cannot be read.
    """
    path = find_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None
    if head[8:9] == b"{":  # after the length of its header, any eight bytes
        return _read_safetensors(path)
    refuse_text(head, path)
    if head.startswith(torch_files.BEGINNINGS):
        return torch_files.load(path, head)
    return safe_pickle.load(path)


def refuse_text(head: bytes, path: str | os.PathLike) -> None:
    """WeightsError if a file's first 16 bytes are nothing, a git-lfs pointer or a web page."""
    if not head:
        raise WeightsError(f"{path}: the file is empty")
    if head.startswith(b"version https://"):
        raise WeightsError(f"{path}: a git-lfs pointer (a text); fetch the file by `git lfs pull`")
    if head.lstrip().startswith(b"<"):
        raise WeightsError(f"{path}: a web page (a text), not weights; download the file again")


def read_weights(path: str | os.PathLike, key: str = "auto") -> WeightFile:
    """Reads one model's weights: a state dict, or the one inside a training checkpoint.

    ``key``: ``model``, ``model_ema``, or ``auto``: ``model_ema`` where there is one (which one
    evaluates and fine-tunes, as with PPViT and timm), else ``model``. timm's ``state_dict_ema`` and
    ``state_dict`` mean the same; as keys, just these. WeightsError as `safe_load`, `check_state`.
    """
    path = find_file(path)
    content = safe_load(path)
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    classes = ClassNames.of_record(content.get(CLASSES), str(path))
    if isinstance(table := content.pop(NAME_TABLE, None), dict) and not classes:
        classes = ClassNames.of_record(table.get(NAME_TABLE), str(path))
    state, taken = _choose(content, key, path)
    state = check_state(_without_prefixes(state, path), str(path))
    classes = classes or ClassNames.beside(path)
    if len(classes) != len(state.get("head.bias", ())):
        classes = UNKNOWN  # a classes.txt of something else
    return WeightFile(state, taken, str(path), classes)


def check_state(state: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    """The state as float32 arrays; ``uint16`` is bfloat16, as Paddle writes it.

    WeightsError names the entries that are something else, or not finite.
    """
    if not state:
        raise WeightsError(f"{source}: holds no weights")
    foreign = [n for n, v in state.items() if not isinstance(n, str) or not _is_float(v)]
    if foreign:
        kinds = {str(getattr(state[name], "dtype", type(state[name]).__name__)) for name in foreign}
        raise WeightsError(
            f"{source}: not weights in floating point ({', '.join(sorted(kinds))}): "
            f"{shorten(foreign)}"
        )
    arrays = {id(value): value for value in state.values()}  # one may have many names
    with np.errstate(over="ignore"):  # float64 beyond float32: found as infinite below
        arrays = {key: _float32(value) for key, value in arrays.items()}
    infinite = {key for key, value in arrays.items() if not np.isfinite(value).all()}
    wrong = [name for name, value in state.items() if id(value) in infinite]
    if wrong:
        raise WeightsError(f"{source}: NaN or infinite values in {shorten(wrong)}")
    return {name: arrays[id(value)] for name, value in state.items()}


def write_weights(
    state: Mapping[str, Any], path: str | os.PathLike, classes: ClassNames = UNKNOWN
) -> None:
    """Writes arrays or tensors as ``*.safetensors``, else in the format of ``paddle.save``.

    The file is either whole or, with a UserError, not there.
    """
    arrays = {
        name: np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.numpy())
        for name, value in state.items()
    }
    record = json.dumps(classes.record()) if classes else ""
    if Path(path).suffix == ".safetensors":
        from safetensors.numpy import save

        data = save(arrays, metadata={"format": "np"} | ({CLASSES: record} if record else {}))
    else:
        table = {NAME_TABLE: {name: name for name in arrays} | {NAME_TABLE: record}}
        data = pickle.dumps(arrays | table if record else arrays, protocol=4)
    write_atomically(data, path)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts the name of the weights' file before a `WeightsError`."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError:
        raise WeightsError(f"{path}: reading it needs `pip install safetensors`") from None
    try:
        data, result = path.read_bytes(), {}
        for name, entry in deserialize(data):
            if (kind := entry["dtype"]) not in _SAFETENSORS_TYPES:
                raise WeightsError(f"{path}: {shorten([name])} is {kind}, not floating point")
            values = np.frombuffer(entry["data"], _SAFETENSORS_TYPES[kind])
            result[name] = values.reshape(entry["shape"])
    except (SafetensorError, MemoryError, ValueError, OverflowError) as error:
        reason = printable(str(error), 200) or type(error).__name__
        raise WeightsError(f"{path}: truncated or damaged ({reason})") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {**result, NAME_TABLE: {NAME_TABLE: header.get("__metadata__", {}).get(CLASSES)}}


def _choose(content: dict, key: str, path: Path) -> tuple[dict, str]:
    """The state dict that ``key`` means, and the key that was taken."""
    nested = [name for name in CONTAINERS if isinstance(content.get(name), dict)]
    if not nested and key != "model_ema" and not any(type(v) is dict for v in content.values()):
        return content, ""
    wanted = {"auto": CONTAINERS, "model": CONTAINERS[2:], "model_ema": CONTAINERS[:2]}
    for name in nested:
        if name in wanted.get(key, (key,)):
            return content[name], name
    wanted = "model" if key == "auto" else key
    raise WeightsError(f"{path}: has no {wanted}; it holds {shorten(list(content))}")


def _without_prefixes(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The state dict without the prefixes of wrapped models, and without a table of names."""
    result = {}
    for name, value in state.items():
        if name == NAME_TABLE:
            continue
        while isinstance(name, str) and name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if name in result:
            raise WeightsError(
                f"{path}: some parameters are there twice, with a prefix and without"
            )
        result[name] = value
    return result


def _is_float(value: Any) -> bool:
    is_array = isinstance(value, (np.ndarray, np.generic))  # a scalar has no dimensions
    return is_array and (value.dtype.kind == "f" or value.dtype == np.uint16)


def _float32(value: np.ndarray | np.generic) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype == np.uint16:  # bfloat16: the upper half of a float32
        return (value.astype("<u4") << 16).view("<f4")
    return value.astype(np.float32, copy=False)
