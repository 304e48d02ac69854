"""What each config key may hold, and how a value from YAML or the command line becomes it.

A rule is a function that returns the value in its proper type or raises ValueError; its attribute
`expects` says what it takes. `config.py` gives every key one. What joins several keys is in
`check_consistency`.
"""

from __future__ import annotations

import ast
import math
import os
import reprlib

from cli.errors import ConfigError

_short = reprlib.Repr()  # a hostile value may be huge
_short.maxlevel = 2


def integer(low, high=2**31 - 1):
    def rule(value):
        value = _number(value)
        if value != int(value) or not low <= value <= high:
            raise ValueError
        return int(value)

    rule.expects = (
        f"a whole number of at least {low}"
        if high == 2**31 - 1
        else (f"a whole number from {low} to {high}")
    )
    return rule


def real(low, high=math.inf, open_low=False):
    def rule(value):
        value = float(_number(value))
        if not low <= value <= high or (open_low and value == low):
            raise ValueError
        return value

    bound = f"above {low}" if open_low else f"of at least {low}"
    rule.expects = f"a number {bound}" + ("" if high == math.inf else f" and at most {high}")
    return rule


def _number(value):
    """YAML reads ``5e-3`` as text (it wants ``5.0e-3``): take text that is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    if isinstance(value, str):
        value = float(value)
    if not math.isfinite(value):
        raise ValueError
    return value


def boolean(value):
    if value in (0, 1):  # True and False are 1 and 0
        return bool(value)
    raise ValueError


boolean.expects = "True or False"


def text(value):
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError
    os.fsencode(value)  # a ValueError where it could be no path
    return value


text.expects = "a text"
text.takes_text = True  # of -opts, as it stands; other values are read as YAML


def path(value):
    return os.path.expanduser(text(value))


path.expects = "a path"
path.takes_text = True


def choice(*names):
    def rule(value):
        by_lower = {name.lower(): name for name in names}
        if not isinstance(value, str) or value.lower() not in by_lower:
            raise ValueError
        return by_lower[value.lower()]

    rule.expects = f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    rule.names = names
    rule.takes_text = True
    return rule


def sequence(item, length, kind=tuple, ordered=False):
    def rule(value):
        if isinstance(value, str):  # PPViT writes tuples as Python does
            value = ast.literal_eval(value)
        if not isinstance(value, (list, tuple)) or len(value) != (length or len(value)):
            raise ValueError
        value = kind(item(entry) for entry in value)
        if ordered and list(value) != sorted(value):
            raise ValueError
        return value

    rule.expects = f"{length or 'a list of'} numbers, each {item.expects}" + (
        ", smaller first" if ordered else ""
    )
    return rule


def optional(inner):
    """None (YAML: null, or the word None) or what ``inner`` takes."""

    def rule(value):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return inner(value)

    rule.expects = f"{inner.expects}, or None"
    rule.takes_text = getattr(inner, "takes_text", False)
    return rule


def either(*rules):
    def rule(value):
        for inner in rules:
            try:
                return inner(value)
            except (ValueError, TypeError):
                continue
        raise ValueError

    rule.expects = ", or ".join(inner.expects for inner in rules)
    return rule


def milestones(value):
    """Epochs as PPViT writes them, '30, 60, 90'; a list or an empty text will do too."""
    if not isinstance(value, (list, tuple)):
        value = [part for part in str(value).split(",") if part.strip()]
    epochs = [COUNT(part) for part in value]
    if epochs != sorted(epochs):
        raise ValueError
    return ", ".join(map(str, epochs))


milestones.expects = "increasing epochs such as '30, 60, 90'"


def files(value):
    """BASE: one file or a flat list of them; empty names stand for none."""
    names = [value or ""] if value is None or isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ValueError
    return [text(name) if name != "" else name for name in names]


files.expects = "a YAML file, or a list of them"

COUNT = integer(1)
NATURAL = integer(0)
SHARE = real(0.0, 1.0)  # probabilities and shares
RATE = real(0.0, 0.999)  # dropout and drop path: 1.0 would drop everything
POSITIVE = real(0.0, open_low=True)
NOT_NEGATIVE = real(0.0)
SIDE = integer(1, 8192)  # pixels
ALPHA = real(0.0, 1000.0)  # of Beta(alpha, alpha)
INTERPOLATION = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
MEAN = sequence(real(0.0, 1.0), 3, list)
STD = sequence(real(0.0, open_low=True), 3, list)


def coerce(key: str, rule, value, where: str):
    """Returns ``value`` in the type that a rule takes.

    ``key`` (dotted) and ``where`` (``file:line`` or a flag) are for the message of the ConfigError
    for a wrong type or range.
    """
    try:
        return rule(value)
    except (ValueError, TypeError, OverflowError, SyntaxError, MemoryError, RecursionError):
        raise ConfigError(f"{where}: {key} is {_show(value)}; expected {rule.expects}")


def _show(value) -> str:
    try:
        return _short.repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a huge number"


def check_consistency(config, where: str = "config") -> None:
    """Checks what joins several keys; the ConfigError names both."""
    size, patch = config.DATA.IMAGE_SIZE, config.MODEL.MIXER.PATCH_SIZE
    if size % patch:
        below, above = size // patch * patch, -(-size // patch) * patch
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"{where}: DATA.IMAGE_SIZE is {size}, not a multiple of MODEL.MIXER.PATCH_SIZE "
            f"{patch}; choose for example {nearest}"
        )
    if config.MODEL.MIXER.EMBED_DIM * config.MODEL.MIXER.MLP_RATIO < 1:
        raise ConfigError(f"{where}: MODEL.MIXER.MLP_RATIO leaves no hidden unit in the MLP")
    frozen, depth = config.TRAIN.FREEZE, config.MODEL.MIXER.DEPTH
    if frozen != "backbone" and frozen > depth:
        raise ConfigError(
            f"{where}: TRAIN.FREEZE is {frozen}, but MODEL.MIXER.DEPTH is {depth}; `backbone` "
            f"freezes all but the head"
        )
    left = config.TRAIN.NUM_EPOCHS + config.TRAIN.COOLDOWN_EPOCHS - config.TRAIN.LAST_EPOCH
    if left <= 0 and not (config.EVAL or config.MODEL.RESUME):  # a checkpoint knows better
        raise ConfigError(
            f"{where}: TRAIN.LAST_EPOCH is {config.TRAIN.LAST_EPOCH}, which leaves nothing of "
            f"TRAIN.NUM_EPOCHS {config.TRAIN.NUM_EPOCHS}; lower it, or train longer"
        )
