"""What each config key may hold, and how a value from YAML or the command line becomes it.

A rule is a function that returns the value in its proper type or raises ValueError; `config.py`
gives every key one. What joins several keys is in `settle`.
"""

from __future__ import annotations

import ast
import logging
import math
import os
import reprlib

from cli.errors import ConfigError

_short = reprlib.Repr()  # a hostile value may be huge
_short.maxlevel = 2


def _rule(expects: str, takes_text: bool = False, names: tuple = ()):
    """Marks a rule: ``takes_text`` of -opts as it stands, not as YAML; ``names`` to choose from."""

    def mark(rule):
        rule.expects, rule.takes_text, rule.names = expects, takes_text, names
        return rule

    return mark


def integer(low, high=2**31 - 1):
    bound = f"from {low} to {high}" if high < 2**31 - 1 else f"of at least {low}"
    return _number(int, f"a whole number {bound}", low, high)


def real(low, high=math.inf, open_low=False):
    bound = f"above {low}" if open_low else f"of at least {low}"
    most = "" if high == math.inf else f" and at most {high}"
    return _number(float, f"a number {bound}{most}", low, high, open_low)


def _number(kind, expects, low, high, open_low=False):
    """Text that is a number is taken: YAML reads ``5e-3`` as text (it wants ``5.0e-3``)."""

    @_rule(expects)
    def rule(value):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        value = float(value) if isinstance(value, str) else value
        if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
            raise ValueError
        if value != kind(value):
            raise ValueError
        return kind(value)

    return rule


@_rule("True or False")
def boolean(value):
    if value in (0, 1):  # True and False are 1 and 0
        return bool(value)
    raise ValueError


@_rule("a text", takes_text=True)
def text(value):
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError
    os.fsencode(value)  # a ValueError where it could be no path
    return value


@_rule("a path", takes_text=True)
def path(value):
    return os.path.expanduser(text(value))


def choice(*names):
    expects = f"one of {', '.join(names)}" if len(names) > 1 else names[0]

    @_rule(expects, takes_text=True, names=names)
    def rule(value):
        by_lower = {name.lower(): name for name in names}
        if not isinstance(value, str) or value.lower() not in by_lower:
            raise ValueError
        return by_lower[value.lower()]

    return rule


def sequence(item, length, kind=tuple, ordered=False):
    order = ", smaller first" if ordered else ""

    @_rule(f"{length or 'a list of'} numbers, each {item.expects}{order}")
    def rule(value):
        if isinstance(value, str):  # PPViT writes tuples as Python does
            value = ast.literal_eval(value)
        if not isinstance(value, (list, tuple)) or len(value) != (length or len(value)):
            raise ValueError
        value = kind(item(entry) for entry in value)
        if ordered and list(value) != sorted(value):
            raise ValueError
        return value

    return rule


def optional(inner):
    """None (YAML: null, or the word None) or what ``inner`` takes."""

    @_rule(f"{inner.expects}, or None", inner.takes_text)
    def rule(value):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return inner(value)

    return rule


def either(*rules):
    @_rule(", or ".join(inner.expects for inner in rules))
    def rule(value):
        for inner in rules:
            try:
                return inner(value)
            except (ValueError, TypeError):
                continue
        raise ValueError

    return rule


@_rule("increasing epochs such as '30, 60, 90'")
def milestones(value):
    if not isinstance(value, (list, tuple)):
        value = [part for part in str(value).split(",") if part.strip()]
    epochs = list(map(integer(1), value))
    if epochs != sorted(epochs):
        raise ValueError
    return ", ".join(map(str, epochs))


@_rule("a YAML file, or a list of them")
def files(value):
    names = [value or ""] if value is None or isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ValueError
    return [text(name) if name != "" else name for name in names]


def coerce(key: str, rule, value, where: str):
    """``value`` in the type that a rule takes; else a ConfigError that names the dotted key and
    ``where``, ``file:line`` or a flag.
    """
    try:
        return rule(value)
    except (ValueError, TypeError, OverflowError, SyntaxError, MemoryError, RecursionError):
        try:
            shown = _short.repr(value)
        except ValueError:  # Python writes no whole number of more than 4300 digits
            shown = "a huge number"
        raise ConfigError(f"{where}: {key} is {shown}; expected {rule.expects}")


def settle(config, where: str) -> None:
    """Judges what joins several keys, when all are known (a ConfigError names both), and shortens
    a warmup that does not fit.
    """
    train, mixer, size = config.TRAIN, config.MODEL.MIXER, config.DATA.IMAGE_SIZE
    patch, epochs = mixer.PATCH_SIZE, train.NUM_EPOCHS
    if size % patch:
        below, above = size // patch * patch, -(-size // patch) * patch
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"{where}: DATA.IMAGE_SIZE is {size}, not a multiple of MODEL.MIXER.PATCH_SIZE "
            f"{patch}; choose for example {nearest}"
        )
    if mixer.EMBED_DIM * mixer.MLP_RATIO < 1:
        raise ConfigError(f"{where}: MODEL.MIXER.MLP_RATIO leaves no hidden unit in the MLP")
    if train.FREEZE != "backbone" and train.FREEZE > mixer.DEPTH:
        raise ConfigError(
            f"{where}: TRAIN.FREEZE is {train.FREEZE}, but MODEL.MIXER.DEPTH is {mixer.DEPTH}; "
            "`backbone` freezes all but the head"
        )
    left = epochs + train.COOLDOWN_EPOCHS - train.LAST_EPOCH
    if left <= 0 and not (config.EVAL or config.MODEL.RESUME):  # a checkpoint knows better
        raise ConfigError(
            f"{where}: TRAIN.LAST_EPOCH is {train.LAST_EPOCH}, which leaves nothing of "
            f"TRAIN.NUM_EPOCHS {epochs}; lower it, or train longer"
        )
    schedule, warmup = train.LR_SCHEDULER.NAME, train.WARMUP_EPOCHS
    if warmup >= epochs and not config.EVAL and schedule != "cosine":  # which has no warmup
        outcome = "the learning rate does not come to TRAIN.BASE_LR"
        if schedule == "warmupcosine":  # the others go on after any warmup
            train.WARMUP_EPOCHS = epochs / 2
            outcome = f"shortened to {train.WARMUP_EPOCHS:g}"
        logging.getLogger("resmlp").warning(
            f"{where}: TRAIN.WARMUP_EPOCHS {warmup:g} does not fit into "
            f"TRAIN.NUM_EPOCHS {epochs}; {outcome}"
        )
