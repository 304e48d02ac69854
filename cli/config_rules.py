"""What each config key may hold, and how a value from YAML or the command line becomes it.

`RULES` maps every dotted key to a rule: a function that returns the value in its proper type or
raises ValueError with what it expected. Rules that join several keys are in `check_consistency`.
"""

from __future__ import annotations

import ast
import math
import os
import reprlib

from cli.errors import ConfigError

_short = reprlib.Repr()  # a hostile value may be huge
_short.maxlevel = 2


# ------------------------------------------------------------------------------------ rules
def _integer(low, high=2**31 - 1):
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


def _real(low, high=math.inf, open_low=False):
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


def _boolean(value):
    if value in (0, 1):  # True and False are 1 and 0
        return bool(value)
    raise ValueError


_boolean.expects = "True or False"


def _text(value):
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError
    os.fsencode(value)  # a ValueError where it could be no path
    return value


_text.expects = "a text"


def _choice(*names):
    """One of a few names, whatever their case."""

    def rule(value):
        by_lower = {name.lower(): name for name in names}
        if not isinstance(value, str) or value.lower() not in by_lower:
            raise ValueError
        return by_lower[value.lower()]

    rule.expects = f"one of {', '.join(names)}"
    return rule


def _sequence(item, length, kind=tuple, ordered=False):
    def rule(value):
        if isinstance(value, str):  # PPViT writes tuples as Python does
            value = ast.literal_eval(value)
        if not isinstance(value, (list, tuple)) or len(value) != length:
            raise ValueError
        value = kind(item(entry) for entry in value)
        if ordered and list(value) != sorted(value):
            raise ValueError
        return value

    rule.expects = f"{length} numbers, each {item.expects}" + (", smaller first" if ordered else "")
    return rule


def _optional(inner):
    """None (YAML: null, or the word None) or what ``inner`` takes."""

    def rule(value):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        return inner(value)

    rule.expects = f"{inner.expects}, or None"
    return rule


def _either(*rules):
    def rule(value):
        for inner in rules:
            try:
                return inner(value)
            except (ValueError, TypeError):
                continue
        raise ValueError

    rule.expects = ", or ".join(inner.expects for inner in rules)
    return rule


def _milestones(value):
    """Epochs as PPViT writes them, '30, 60, 90'; a list or an empty text will do too."""
    if not isinstance(value, (list, tuple)):
        value = [part for part in str(value).split(",") if part.strip()]
    epochs = [_COUNT(part) for part in value]
    if epochs != sorted(epochs):
        raise ValueError
    return ", ".join(map(str, epochs))


_milestones.expects = "increasing epochs such as '30, 60, 90'"


def _files(value):
    """BASE: one file or a flat list of them; empty names stand for none."""
    names = [value or ""] if value is None or isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ValueError
    return [_text(name) if name != "" else name for name in names]


_files.expects = "a YAML file, or a list of them"

_COUNT = _integer(1)
_NATURAL = _integer(0)
_SHARE = _real(0.0, 1.0)  # probabilities and shares
_RATE = _real(0.0, 0.999)  # dropout and drop path: 1.0 would drop everything
_POSITIVE = _real(0.0, open_low=True)
_NOT_NEGATIVE = _real(0.0)
_SIDE = _integer(1, 8192)  # pixels
_ALPHA = _real(0.0, 1000.0)  # of Beta(alpha, alpha)
_INTERPOLATION = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_MEAN = _sequence(_real(0.0, 1.0), 3, list)
_STD = _sequence(_real(0.0, open_low=True), 3, list)

RULES = {
    "BASE": _files,
    "DATA.BATCH_SIZE": _COUNT,
    "DATA.BATCH_SIZE_EVAL": _optional(_COUNT),
    "DATA.DATA_PATH": _text,
    "DATA.DATASET": _choice("imagenet2012", "imagefolder"),
    "DATA.TRAIN_LIST": _text,
    "DATA.VAL_LIST": _text,
    "DATA.CLASS_NAMES": _optional(_text),
    "DATA.IMAGE_SIZE": _SIDE,
    "DATA.IMAGE_CHANNELS": _integer(3, 3),
    "DATA.CROP_PCT": _real(0.1, 1.0),
    "DATA.INTERPOLATION": _choice(*_INTERPOLATION),
    "DATA.TRAIN_INTERPOLATION": _choice("nearest", "bilinear", "bicubic", "random"),
    "DATA.NUM_WORKERS": _integer(0, 256),
    "DATA.IMAGENET_MEAN": _MEAN,
    "DATA.IMAGENET_STD": _STD,
    "DATA.DROP_LAST": _boolean,
    "DATA.BAD_IMAGE": _choice("error", "skip"),
    "DATA.BAD_IMAGE_LIMIT": _NATURAL,
    "DATA.ALLOW_OUTSIDE_PATHS": _boolean,
    "DATA.WORKER_TIMEOUT": _real(0.0, 1e6, open_low=True),
    "MODEL.TYPE": _text,
    "MODEL.NAME": _text,
    "MODEL.RESUME": _optional(_text),
    "MODEL.PRETRAINED": _optional(_text),
    "MODEL.PRETRAINED_KEY": _choice("auto", "model", "model_ema"),
    "MODEL.RESIZE_TOKENS": _boolean,
    "MODEL.NUM_CLASSES": _NATURAL,
    "MODEL.DROPOUT": _RATE,
    "MODEL.ATTENTION_DROPOUT": _RATE,
    "MODEL.DROPPATH": _RATE,
    "MODEL.MIXER.PATCH_SIZE": _COUNT,
    "MODEL.MIXER.EMBED_DIM": _integer(1, 65536),
    "MODEL.MIXER.DEPTH": _integer(1, 10000),
    "MODEL.MIXER.MLP_RATIO": _real(0.0, 1000.0, open_low=True),
    "MODEL.MIXER.LAYER_SCALE_INIT": _optional(_NOT_NEGATIVE),
    "TRAIN.LAST_EPOCH": _NATURAL,
    "TRAIN.NUM_EPOCHS": _COUNT,
    "TRAIN.WARMUP_EPOCHS": _NOT_NEGATIVE,
    "TRAIN.COOLDOWN_EPOCHS": _NATURAL,
    "TRAIN.WEIGHT_DECAY": _NOT_NEGATIVE,
    "TRAIN.BASE_LR": _POSITIVE,
    "TRAIN.WARMUP_START_LR": _NOT_NEGATIVE,
    "TRAIN.END_LR": _NOT_NEGATIVE,
    "TRAIN.LINEAR_SCALED_LR": _optional(_COUNT),
    "TRAIN.GRAD_CLIP": _optional(_POSITIVE),
    "TRAIN.ACCUM_ITER": _COUNT,
    "TRAIN.LAYER_DECAY": _optional(_real(0.0, 1.0, open_low=True)),
    "TRAIN.RECOMPUTE": _boolean,
    "TRAIN.NONFINITE": _choice("stop", "skip"),
    "TRAIN.NONFINITE_LIMIT": _COUNT,
    "TRAIN.LR_SCHEDULER.NAME": _choice("warmupcosine", "cosine", "constant", "step"),
    "TRAIN.LR_SCHEDULER.MILESTONES": _milestones,
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": _POSITIVE,
    "TRAIN.LR_SCHEDULER.DECAY_RATE": _real(0.0, 1.0, open_low=True),
    "TRAIN.OPTIMIZER.NAME": _choice("lamb", "adamw", "sgd"),
    "TRAIN.OPTIMIZER.EPS": _POSITIVE,
    "TRAIN.OPTIMIZER.BETAS": _sequence(_real(0.0, 0.9999999), 2),
    "TRAIN.OPTIMIZER.MOMENTUM": _RATE,
    "TRAIN.MODEL_EMA": _boolean,
    "TRAIN.MODEL_EMA_DECAY": _SHARE,
    "TRAIN.MODEL_EMA_WARMUP": _boolean,
    "TRAIN.MODEL_EMA_FORCE_CPU": _boolean,
    "TRAIN.LOSS": _choice("ce", "bce"),
    "TRAIN.BCE_TARGET_THRESHOLD": _optional(_SHARE),
    "TRAIN.SMOOTHING": _RATE,
    "TRAIN.REPEATED_AUG": _integer(1, 64),
    "TRAIN.CROP_SCALE": _sequence(_real(0.0, 1.0, open_low=True), 2, ordered=True),
    "TRAIN.CROP_RATIO": _sequence(_POSITIVE, 2, ordered=True),
    "TRAIN.HFLIP": _SHARE,
    "TRAIN.VFLIP": _SHARE,
    "TRAIN.COLOR_JITTER": _real(0.0, 10.0),
    "TRAIN.AUTO_AUGMENT": _either(_boolean, _text),
    "TRAIN.THREE_AUGMENT": _boolean,
    "TRAIN.RAND_AUGMENT": _either(_boolean, _text),
    "TRAIN.RAND_AUGMENT_LAYERS": _integer(0, 64),
    "TRAIN.RAND_AUGMENT_MAGNITUDE": _real(0.0, 10.0),
    "TRAIN.RAND_AUGMENT_MAGNITUDE_STD": _NOT_NEGATIVE,
    "TRAIN.RAND_AUGMENT_INCREASING": _boolean,
    "TRAIN.RAND_AUGMENT_PROB": _SHARE,
    "TRAIN.MIXUP_ALPHA": _ALPHA,
    "TRAIN.MIXUP_PROB": _SHARE,
    "TRAIN.MIXUP_SWITCH_PROB": _SHARE,
    "TRAIN.MIXUP_MODE": _choice("batch", "pair", "elem"),
    "TRAIN.CUTMIX_ALPHA": _ALPHA,
    "TRAIN.CUTMIX_MINMAX": _optional(_sequence(_SHARE, 2, ordered=True)),
    "TRAIN.RANDOM_ERASE_PROB": _SHARE,
    "TRAIN.RANDOM_ERASE_MODE": _choice("const", "rand", "pixel"),
    "TRAIN.RANDOM_ERASE_COUNT": _integer(1, 256),
    "TRAIN.RANDOM_ERASE_SPLIT": _boolean,
    "TRAIN.DISTILLATION_TYPE": _choice("none", "hard", "soft"),
    "TRAIN.DISTILLATION_ALPHA": _SHARE,
    "TRAIN.DISTILLATION_TAU": _POSITIVE,
    "TRAIN.TEACHER_MODEL": _optional(_text),
    "TRAIN.TEACHER_PRETRAINED": _optional(_text),
    "TRAIN.TEACHER_IMAGE_SIZE": _optional(_SIDE),
    "TRAIN.TEACHER_MEAN": _optional(_MEAN),
    "TRAIN.TEACHER_STD": _optional(_STD),
    "DIST.NPROCS": _integer(-1, 4096),  # -1: PPViT's word for all
    "SAVE": _text,
    "SAVE_FREQ": _COUNT,
    "SAVE_STEPS": _NATURAL,
    "SAVE_FAILURE": _choice("stop", "continue"),
    "KEEP_CHECKPOINTS": _COUNT,
    "KEEP_EVERY": _NATURAL,
    "REPORT_FREQ": _COUNT,
    "VALIDATE_FREQ": _COUNT,
    "SEED": _integer(0, 2**31 - 1),
    "EVAL": _boolean,
    "EVAL_REPORT": _boolean,
    "AMP": _boolean,
    "AMP_LEVEL": _choice("O1", "O2"),
    "AMP_DTYPE": _choice("float16", "bfloat16"),
    "DASHBOARD": _choice("none", "visualdl", "tensorboard"),
    "TAG": _text,
    "LOCAL_RANK": _integer(-1),
    "NGPUS": _integer(-1),
}


def coerce(key: str, value, where: str):
    """Returns ``value`` in the type that ``key`` takes.

    Args:
        key: dotted config key.
        value: a value as YAML, the command line or Python gave it.
        where: where it came from, for the message: ``file:line`` or a flag.

    Raises:
        ConfigError: the value has the wrong type or is out of range.
    """
    rule = RULES[key]
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
    """Checks what joins several keys.

    Raises:
        ConfigError: naming both keys.
    """
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
    schedule = config.TRAIN.LR_SCHEDULER.NAME
    if schedule == "warmupcosine" and config.TRAIN.WARMUP_EPOCHS >= config.TRAIN.NUM_EPOCHS:
        raise ConfigError(
            f"{where}: TRAIN.WARMUP_EPOCHS is {config.TRAIN.WARMUP_EPOCHS:g}, which leaves nothing "
            f"of TRAIN.NUM_EPOCHS {config.TRAIN.NUM_EPOCHS}; lower it, or train longer"
        )
    left = config.TRAIN.NUM_EPOCHS + config.TRAIN.COOLDOWN_EPOCHS - config.TRAIN.LAST_EPOCH
    if left <= 0 and not (config.EVAL or config.MODEL.RESUME):  # a checkpoint knows better
        raise ConfigError(
            f"{where}: TRAIN.LAST_EPOCH is {config.TRAIN.LAST_EPOCH}, which leaves nothing of "
            f"TRAIN.NUM_EPOCHS {config.TRAIN.NUM_EPOCHS}; lower it, or train longer"
        )
