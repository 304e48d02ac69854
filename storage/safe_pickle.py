"""Reads a pickle as data: arrays, containers, numbers and strings, and nothing else.

A pickle is a program for a stack machine, and Python's own machine calls whatever function the file
names. This one has only the instructions that build plain data, and only the names that the files
of Paddle and NumPy need (`_NAMES`), each for a function of this module. No array is larger than the
bytes that the file holds for it. (`pickle.Unpickler` with an allow-list would be shorter, but
hashes any key: a hundred bytes of tuples in tuples keep it busy for hours.)
"""

from __future__ import annotations

import io
import os
import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np

from cli.errors import WeightsError
from storage.files import printable

MAX_DEPTH = 64  # containers inside containers
MAX_VALUES = 1_000_000  # counted as often as they are referred to: no "billion laughs"
MAX_STEPS = 1_000_000  # of the machine; an array takes about twenty
MAX_BITS = 1024  # of a whole number; Python refuses to print very long ones


@dataclass(eq=False)
class Foreign:
    """Stands for an object of a known kind that is no plain data: its name, never the object."""

    name: str


@dataclass(eq=False)
class _Pending:
    """A NumPy object between its creation and the instruction that fills it (BUILD)."""

    fill: Callable[[Any], Any]
    value: Any = None


def _dtype(code: str, *_: Any) -> _Pending:
    dtype = np.dtype(code if type(code) is str else object)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:  # no objects, records, dates, strings
        raise WeightsError(f"an array of type {dtype.name}, which is not plain numbers")
    # state: version, byte order, and six fields that only records and dates use
    return _Pending(lambda state: dtype.newbyteorder(state[1]))


def _new_array(*_: Any) -> _Pending:
    # state: version, shape, dtype, whether in Fortran order, bytes
    return _Pending(lambda state: _array(state[4], state[2], state[1], "F" if state[3] else "C"))


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """A read-only array over ``data``, whose size must be exactly what type and shape say."""
    if not isinstance(dtype, np.dtype) or type(shape) is not tuple or type(order) is not str:
        raise WeightsError("an array that is not plain numbers")
    if type(data) is str:  # as Python 2 wrote bytes
        data = data.encode("latin1")
    if type(data) not in (bytes, bytearray):
        raise WeightsError("an array that is not plain numbers")
    if any(type(size) is not int or size < 0 for size in shape):  # -1 would mean "the rest"
        raise ValueError("bad shape")
    array = np.frombuffer(data, dtype) if data else np.empty(0, dtype)
    array = array.reshape(shape, order=order)
    array.flags.writeable = False
    return array


def _dict(items: Any = ()) -> dict:
    result: dict = {}
    for key, value in items:
        _set_item(result, key, value)
    return result


def _tuple(items: Any = ()) -> Any:
    """A tuple, or the array of ``(name, array)``: so Paddle writes a tensor inside a container."""
    if type(items) not in (tuple, list):
        raise WeightsError("a tuple of something that is no list")
    is_tensor = len(items) == 2 and type(items[0]) is str and isinstance(items[1], np.ndarray)
    return items[1] if is_tensor else tuple(items)


def _bytes(data: Any = b"", encoding: str = "") -> bytes:
    """Protocol 2 has no bytes and writes them as text to be encoded."""
    if encoding not in ("latin1", "latin-1", ""):
        raise WeightsError("text to be encoded otherwise than as latin-1")
    return data.encode("latin1") if encoding else bytes(memoryview(data))


_NAMES: dict[str, Any] = {
    "numpy.dtype": _dtype,
    "numpy.ndarray": _new_array,
    "collections.OrderedDict": _dict,
    "builtins.tuple": _tuple,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _bytes,
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _NAMES[f"{_core}.multiarray._reconstruct"] = _new_array
    _NAMES[f"{_core}.multiarray.scalar"] = lambda dtype, data: _array(data, dtype, (), "C")[()]
    _NAMES[f"{_core}.numeric._frombuffer"] = _array

_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("INT", "LONG", "FLOAT", "UNICODE", "STRING"),  # of protocol 0, as are PUT, GET, LIST, DICT
}
# How a pickle of ours can begin; without PROTO it is of protocol 0 or 1.
_BEGINNINGS = ("PROTO", "MARK", "GLOBAL", "EMPTY_DICT", "EMPTY_LIST")
_SHORT = re.compile(r"expected \d+ bytes in|not enough data|no newline found|pickle exhausted")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_CONTAINERS = {  # of all values behind a MARK
    **{"TUPLE": tuple, "LIST": list},
    "DICT": lambda items: _dict(zip(items[::2], items[1::2])),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class _Machine:
    """The stack machine: `run` carries out one instruction.

    Args:
        budget: characters, bytes and items that functions may be handed in all: most copy them, and
            what is remembered can be handed over again and again.
        names: accepted names, beside `_NAMES` or instead of them.
        foreign: beginnings of names that become a `Foreign`.
        persistent: what the tuple of a persistent id stands for; None: files have none.
    """

    budget: int
    names: Mapping[str, Callable] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    persistent: Callable[[Any], Any] | None = None
    stack: list = field(default_factory=list)
    marked: list[list] = field(default_factory=list)  # the stacks below each MARK
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self, count: int) -> list:
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        start = len(self.stack) - count
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def pop_mark(self) -> list:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pay(self, arguments: tuple) -> tuple:
        sized = (str, bytes, bytearray, list, tuple, dict)
        self.budget -= sum(len(item) for item in arguments if isinstance(item, sized))
        if self.budget < 0:
            raise WeightsError("more data than bytes")
        return arguments

    def run(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in _LITERALS:
            if type(argument) is int and argument.bit_length() > MAX_BITS:
                raise WeightsError(f"a whole number of more than {MAX_BITS} bits")
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _TUPLES:
            push(tuple(self.pop(_TUPLES[name])))
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name in _CONTAINERS:
            items = self.pop_mark()
            self.stack.append(_CONTAINERS[name](items))
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(1) if name == "APPEND" else self.pop_mark()
            if not isinstance(self.stack[-1], Foreign):
                list.extend(self.stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop(2) if name == "SETITEM" else self.pop_mark()
            for key, value in zip(items[::2], items[1::2]):
                if not isinstance(self.stack[-1], Foreign):
                    _set_item(self.stack[-1], key, value)
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            item = self.memo[argument]
            filled = isinstance(item, _Pending) and item.value is not None
            push(item.value if filled else item)
        elif name == "GLOBAL":
            push(self.named(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            push(self.named(".".join(self.pop(2))))
        elif name == "BINPERSID" and self.persistent:
            push(self.persistent(*self.pop(1)))
        elif name in ("REDUCE", "NEWOBJ") and isinstance(self.stack[-2], Foreign):
            push(self.pop(2)[0])
        elif name == "BUILD" and isinstance(self.stack[-2], Foreign):
            self.pop(1)
        elif name == "REDUCE":
            function, arguments = self.pop(2)
            self.pay(arguments)
            try:
                push(function(*arguments))
            except WeightsError:
                if not self.foreign:
                    raise
                push(Foreign("numbers of another kind"))  # texts and dates of NumPy
        elif name == "BUILD":
            pending, state = self.pop(2)
            if isinstance(pending, dict) and self.foreign:  # a state_dict's `_metadata`
                push(pending)
                return
            if not isinstance(pending, _Pending):
                raise WeightsError("an object that is not plain data")
            pending.value = pending.fill(self.pay(state))
            push(pending.value)
        elif name not in ("PROTO", "FRAME", "STOP"):
            what = f"{name} ({argument})" if isinstance(argument, str) else name
            raise WeightsError(f"the pickle instruction {what}, which plain data does not need")

    def named(self, name: str) -> Any:
        name = name.replace("__builtin__", "builtins")  # as protocol 2 writes it
        if function := self.names.get(name) or _NAMES.get(name):
            return function  # of all that the stack can hold, REDUCE can call only these
        if name.startswith(self.foreign):
            return Foreign(name)
        raise WeightsError(f"{name}, which is not plain data")


def _set_item(target: dict, key: Any, value: Any) -> None:
    if type(key) not in (str, int, float, bool, type(None)):
        raise WeightsError("a dict with keys that are no strings or numbers")
    dict.__setitem__(target, key, value)


_LEAVES = (str, bytes, bytearray, int, float, type(None), np.ndarray, np.generic, Foreign)


def _count(item: Any, depth: int, known: dict[int, int]) -> int:
    """Values in ``item``; refuses leftovers of the machine, cycles and what is nested too deep."""
    if isinstance(item, _LEAVES):
        return 1
    if depth > MAX_DEPTH:
        raise WeightsError(f"containers nested deeper than {MAX_DEPTH} levels")
    if type(item) not in (list, tuple, dict):
        raise WeightsError(f"a {type(item).__name__.strip('_').lower()} that is not plain data")
    if id(item) not in known:
        children = item.values() if type(item) is dict else item
        total = 1 + sum(_count(child, depth + 1, known) for child in children)
        if total > MAX_VALUES:
            raise WeightsError(f"more than {MAX_VALUES:,} values")
        known[id(item)] = total
    return known[id(item)]


def load(path: str | os.PathLike, data: bytes | None = None, **options) -> Any:
    """Reads the plain data of a pickle file (protocol 0 to 5); no code of the file runs.

    A Paddle tensor inside a container is its array, read-only; ``OrderedDict`` becomes ``dict``.
    WeightsError if it is damaged, or asks for anything else.

    Args:
        data: the pickle, where it is not the whole file; ``path`` is for messages then.
        options: ``names``, ``foreign`` and ``persistent`` of the machine: what may stand there
            beside plain data.
    """
    try:
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            machine = _Machine(4 * file.seek(0, os.SEEK_END), **options)
            file.seek(0)
            for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if step == 0 and opcode.name not in _BEGINNINGS:
                    raise ValueError("not a pickle")
                if step == MAX_STEPS:
                    raise WeightsError(f"more than {MAX_STEPS:,} instructions")
                machine.run(opcode.name, argument)
            if file.read(1) or len(machine.stack) != 1 or machine.marked:
                raise ValueError("something is left over")
        (result,) = machine.stack
        _count(result, 0, {})
    except WeightsError as error:
        reason = printable(str(error), 200)
        raise WeightsError(f"{path}: refused, it holds {reason}; nothing of it was run") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # whatever a damaged file does to the machine or to NumPy
        reason = printable(str(error), 200) or type(error).__name__
        if _SHORT.match(reason):  # pickletools': an argument that goes on beyond the file
            reason = "the file ends too early"
        raise WeightsError(f"{path}: truncated, damaged, or not a Paddle file ({reason})") from None
    return result
