"""Every setting of a run: the config tree, YAML files with BASE, and command-line overrides.

    config = get_config("./configs/resmlp_12_224.yaml")

The tree is PPViT's, with more keys; the defaults are the paper's recipe: arXiv 2105.03404,
section 3.1; the authors' answer in facebookresearch/deit, issue 106; DeiT's code where these refer
to it. Each key is declared once, with the rule of what it takes (`cli.config_rules`) and its
meaning; ``python config.py`` prints all of them. This module imports no Paddle.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections import namedtuple
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path

import yaml
from yacs.config import CfgNode as CN

from cli.config_rules import (
    boolean,
    choice,
    coerce,
    either,
    files,
    integer,
    milestones,
    optional,
    path,
    real,
    sequence,
    settle,
    text,
)
from cli.errors import ConfigError, run_as_script
from cli.parser import Parser

Key = namedtuple("Key", "default rule meaning")


def key(default, rule, meaning: str) -> tuple:  # a plain one, which is all that yacs takes
    """Declares a key; a default of None makes None a value that may be given."""
    return default, optional(rule) if default is None else rule, meaning


COUNT = integer(1)
NATURAL = integer(0)
SHARE = real(0.0, 1.0)  # probabilities and shares
FRACTION = real(0.0, 1.0, open_low=True)
RATE = real(0.0, 0.999)  # dropout and drop path: 1.0 would drop everything
POSITIVE = real(0.0, open_low=True)
NOT_NEGATIVE = real(0.0)
SIDE = integer(1, 8192)  # pixels
ALPHA = real(0.0, 1000.0)  # of Beta(alpha, alpha)
MEAN = sequence(SHARE, 3, list)
STD = sequence(POSITIVE, 3, list)
INTERPOLATION = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")

_C = CN()
_C.BASE = key([""], files, "YAML files to merge first, relative to the file that names them")

# ------------------------------------------------------------------------------------ data
data = _C.DATA = CN()
data.BATCH_SIZE = key(256, COUNT, "images per process and step")
data.BATCH_SIZE_EVAL = key(None, COUNT, "the same in evaluation; None: BATCH_SIZE")
data.DATA_PATH = key("/dataset/imagenet/", path, "the data folder")
data.DATASET = key("imagenet2012", choice("imagenet2012", "imagefolder"), "list files, or folders")
data.TRAIN_LIST = key("train_list.txt", path, "in DATA_PATH: `relative/path label` a line")
data.VAL_LIST = key("val_list.txt", path, "the same for validation")
data.CLASS_NAMES = key(None, path, "one name a line; None: classes.txt in DATA_PATH")
data.IMAGE_SIZE = key(224, SIDE, "pixels; a multiple of MODEL.MIXER.PATCH_SIZE")
data.IMAGE_CHANNELS = key(3, integer(3, 3), "RGB")
data.CROP_PCT = key(0.875, real(0.1, 1.0), "evaluation: short side to IMAGE_SIZE / CROP_PCT, crop")
data.INTERPOLATION = key("bicubic", choice(*INTERPOLATION), "of the resize in evaluation")
data.EXIF_ORIENTATION = key(False, boolean, "turn images upright; published numbers do not")
data.TRAIN_INTERPOLATION = key(
    "bicubic",
    choice("nearest", "bilinear", "bicubic", "random"),
    "random: bilinear or bicubic a draw (timm); DeiT: bicubic",
)
data.NUM_WORKERS = key(
    "auto", either(integer(0, 256), choice("auto")), "loader processes per process; 0: none"
)
data.MAX_IMAGE_PIXELS = key(89_478_485, COUNT, "more are refused; Pillow's own limit")
data.IMAGENET_MEAN = key([0.485, 0.456, 0.406], MEAN, "subtracted, of pixels from 0 to 1")
data.IMAGENET_STD = key([0.229, 0.224, 0.225], STD, "divided by")
data.DROP_LAST = key(True, boolean, "training: drop a last batch that is smaller than the others")
data.BAD_IMAGE = key(
    "error", choice("error", "skip"), "or skip: train without it, and log it; not with -eval"
)
data.BAD_IMAGE_LIMIT = key(100, NATURAL, "BAD_IMAGE skip: stop above so many in an epoch")
data.ALLOW_OUTSIDE_PATHS = key(False, boolean, "may list files name files outside DATA_PATH?")
data.WORKER_TIMEOUT = key(300.0, real(0.0, 1e6, open_low=True), "seconds without a batch")

# ----------------------------------------------------------------------------------- model
model = _C.MODEL = CN()
model.NAME = key("resmlp", text, "of the model, for logs")
model.RESUME = key(None, path, "a training checkpoint; auto: the run's newest whole one")
model.PRETRAINED = key(None, path, "weight file, a name of the zoo, or a published file's address")
model.PRETRAINED_KEY = key(
    "auto", choice("auto", "model", "model_ema"), "of a checkpoint; auto: EMA if there"
)
model.RESIZE_TOKENS = key(False, boolean, "resample token mixing for another resolution")
model.NUM_CLASSES = key(1000, either(NATURAL, choice("auto")), "0: features; auto: as in the data")
model.DROPOUT = key(0.0, RATE, "in the MLPs")
model.DROPPATH = key(0.05, RATE, "stochastic depth, the same for every block")
mixer = _C.MODEL.MIXER = CN()
mixer.PATCH_SIZE = key(16, COUNT, "pixels")
mixer.EMBED_DIM = key(384, integer(1, 65536), "channels of a token")
mixer.DEPTH = key(12, integer(1, 10000), "blocks")
mixer.MLP_RATIO = key(4.0, real(0.0, 1000.0, open_low=True), "hidden units a channel")
mixer.LAYER_SCALE_INIT = key(None, NOT_NEGATIVE, "None: 0.1, 1e-5, 1e-6 up to 18, 24, more blocks")

# -------------------------------------------------------------------------------- training
train = _C.TRAIN = CN()
train.LAST_EPOCH = key(0, NATURAL, "epochs done, where no checkpoint says it")
train.NUM_EPOCHS = key(400, COUNT, "epochs in all")
train.WARMUP_EPOCHS = key(5.0, NOT_NEGATIVE, "linear; shortened where it does not fit")
train.COOLDOWN_EPOCHS = key(0, NATURAL, "epochs at END_LR after NUM_EPOCHS (DeiT's 10 never run)")
train.WEIGHT_DECAY = key(0.2, NOT_NEGATIVE, "of weight matrices, not of biases, Affine, LayerScale")
train.BASE_LR = key(5e-3, POSITIVE, "at a total batch of LINEAR_SCALED_LR")
train.WARMUP_START_LR = key(1e-6, NOT_NEGATIVE, "learning rate of the first step")
train.END_LR = key(1e-5, NOT_NEGATIVE, "learning rate at the end")
train.LINEAR_SCALED_LR = key(2048, optional(COUNT), "BASE_LR *= total batch / this (DeiT: 512)")
train.GRAD_CLIP = key(1.0, optional(POSITIVE), "global norm, as apex's and timm's LAMB; None: off")
train.ACCUM_ITER = key(1, COUNT, "batches per optimizer step")
train.LAYER_DECAY = key(None, FRACTION, "rate factor a block below the head")
train.FREEZE = key(
    0, either(NATURAL, choice("backbone")), "N: patch embedding, N blocks; backbone: all but head"
)
train.EARLY_STOP = key(0, NATURAL, "evaluations without a better one that end training; 0: never")
train.RECOMPUTE = key(False, boolean, "recompute activations in backward: less memory, more time")
train.NONFINITE = key("stop", choice("stop", "skip"), "a loss or gradient that is not finite")
train.NONFINITE_LIMIT = key(10, COUNT, "NONFINITE skip: stop after so many in a row")

schedule = _C.TRAIN.LR_SCHEDULER = CN()
schedule.NAME = key(
    "warmupcosine", choice("warmupcosine", "cosine", "constant", "step"), "cosine: no warmup"
)
schedule.MILESTONES = key("30, 60, 90", milestones, "step: epochs; empty: every DECAY_EPOCHS")
schedule.DECAY_EPOCHS = key(30.0, POSITIVE, "step: epochs between drops")
schedule.DECAY_RATE = key(0.1, FRACTION, "step: factor of each drop")

optimizer = _C.TRAIN.OPTIMIZER = CN()
optimizer.NAME = key("lamb", choice("lamb", "adamw", "sgd"), "paper: lamb; sgd: Nesterov")
optimizer.EPS = key(1e-8, POSITIVE, "of lamb and adamw")
optimizer.BETAS = key((0.9, 0.999), sequence(real(0.0, 0.9999999), 2), "of lamb and adamw")
optimizer.MOMENTUM = key(0.9, RATE, "sgd")

train.MODEL_EMA = key(False, boolean, "keep a moving average of the weights")
train.MODEL_EMA_DECAY = key(0.99996, SHARE, "share of the old average that a step keeps")
train.MODEL_EMA_WARMUP = key(False, boolean, "decay min(MODEL_EMA_DECAY, (1 + step) / (10 + step))")

train.LOSS = key("ce", choice("ce", "bce"), "bce: ResNet strikes back, arXiv 2110.00476")
train.BCE_TARGET_THRESHOLD = key(None, SHARE, "bce: targets above it are 1, others 0")
train.SMOOTHING = key(0.1, RATE, "label smoothing")
train.CLASS_WEIGHTS = key(
    "none",
    either(choice("none", "balanced"), sequence(POSITIVE, None, list)),
    "of the loss: balanced (images / (classes * images of the class)), or a number a class",
)
train.BALANCED_SAMPLING = key(False, boolean, "draw each class equally often")

# augmentation of single images, in the loader's workers
train.REPEATED_AUG = key(3, integer(1, 64), "copies of an image in an epoch's order (DeiT); 1: off")
train.CROP_SCALE = key(
    (0.08, 1.0), sequence(FRACTION, 2, ordered=True), "share of the area of a random crop"
)
train.CROP_RATIO = key((0.75, 4 / 3), sequence(POSITIVE, 2, ordered=True), "width / height")
train.HFLIP = key(0.5, SHARE, "probability")
train.VFLIP = key(0.0, SHARE, "probability")
train.COLOR_JITTER = key(0.4, real(0.0, 10.0), "used where none of the next three is")
train.AUTO_AUGMENT = key(False, either(boolean, text), "or original, v0, ...; RAND_AUGMENT wins")
train.THREE_AUGMENT = key(False, boolean, "DeiT III, with COLOR_JITTER 0.3; wins over both")
train.RAND_AUGMENT = key(True, either(boolean, text), "or timm's string, rand-m9-mstd0.5-inc1")
train.RAND_AUGMENT_LAYERS = key(2, integer(0, 64), "operations an image")
train.RAND_AUGMENT_MAGNITUDE = key(9.0, real(0.0, 10.0), "of 10")
train.RAND_AUGMENT_MAGNITUDE_STD = key(0.5, NOT_NEGATIVE, "of the magnitude of an operation")
train.RAND_AUGMENT_INCREASING = key(True, boolean, "severity grows with magnitude")
train.RAND_AUGMENT_PROB = key(0.5, SHARE, "of each operation")

# augmentation of batches, on the device
train.MIXUP_ALPHA = key(0.8, ALPHA, "of Beta(alpha, alpha); 0: no mixup")
train.MIXUP_PROB = key(1.0, SHARE, "of mixing a batch at all")
train.MIXUP_SWITCH_PROB = key(0.5, SHARE, "of cutmix instead of mixup")
train.MIXUP_MODE = key("batch", choice("batch", "pair", "elem"), "what shares one lambda")
train.CUTMIX_ALPHA = key(1.0, ALPHA, "0: no cutmix")
train.CUTMIX_MINMAX = key(
    None, sequence(SHARE, 2, ordered=True), "(min, max) share of a side; turns CUTMIX_ALPHA off"
)
train.RANDOM_ERASE_PROB = key(0.25, SHARE, "of each image")
train.RANDOM_ERASE_MODE = key("pixel", choice("const", "rand", "pixel"), "zero, a colour, noise")
train.RANDOM_ERASE_COUNT = key(1, integer(1, 256), "boxes an image, at most")
train.RANDOM_ERASE_SPLIT = key(False, boolean, "leave the first half of a batch alone")

# distillation (paper, sections 3.1, 3.2: hard, with the label loss on the same head)
train.DISTILLATION_TYPE = key("none", choice("none", "hard", "soft"), "paper, section 3.2: hard")
train.DISTILLATION_ALPHA = key(0.5, SHARE, "share of the teacher's loss")
train.DISTILLATION_TAU = key(1.0, POSITIVE, "temperature of soft distillation")
train.TEACHER_MODEL = key(None, path, "a name in paddle.vision.models, a YAML, or an export")
train.TEACHER_PRETRAINED = key(None, path, "its weight file")
train.TEACHER_IMAGE_SIZE = key(None, SIDE, "pixels; None: the student's")
train.TEACHER_MEAN = key(None, MEAN, "None: the student's")
train.TEACHER_STD = key(None, STD, "None: the student's")

# ---------------------------------------------------------------------------- distribution
_C.DIST = CN()
_C.DIST.NPROCS = key(0, integer(-1, 4096), "processes; 0: one a visible GPU, or one on CPU")

# ------------------------------------------------------------------------------------ misc
_C.SAVE = key("./output", path, "a run's folder; the default makes a dated one in it")
_C.SAVE_FREQ = key(10, COUNT, "epochs between kept checkpoints (epoch_NNN)")
_C.SAVE_STEPS = key(0, NATURAL, "steps between saves of `last`; 0: at an epoch's end")
_C.KEEP_CHECKPOINTS = key(3, COUNT, "newest epoch_NNN checkpoints to keep")
_C.KEEP_EVERY = key(0, NATURAL, "also keep every so many epochs for good; 0: none")
_C.REPORT_FREQ = key(50, COUNT, "optimizer steps between log lines")
_C.VALIDATE_FREQ = key(1, COUNT, "epochs between evaluations")
_C.BEST_METRIC = key(
    "top1",
    choice("top1", "top5", "loss", "balanced_accuracy", "macro_f1"),
    "by which `best` is chosen, and TRAIN.EARLY_STOP goes",
)
_C.SEED = key(0, integer(0, 2**31 - 1), "of everything random")
_C.EVAL = key(False, boolean, "evaluate only")
_C.EVAL_REPORT = key(False, boolean, "tables and pictures per class, of mistakes and confidence")
_C.EVAL_REAL_LABELS = key(None, path, "ImageNet-ReaL's real.json: -eval measures it too")
_C.AMP = key(False, boolean, "mixed precision: on a GPU, and on a CPU with fast bfloat16")
_C.AMP_LEVEL = key("O1", choice("O1", "O2"), "O1: float32 weights; O2: of earlier versions only")
_C.AMP_DTYPE = key(
    "auto",
    choice("auto", "float16", "bfloat16"),
    "auto: bfloat16 where the device computes it, else float16 on a GPU, float32 on a CPU",
)
_C.DASHBOARD = key(
    "none",
    choice("none", "visualdl", "tensorboard"),
    "curves for a dashboard, beside metrics.jsonl",
)


KEYS: dict[str, Key] = {}  # by dotted name
_SECTIONS: dict[str, CN] = {}


def _index(node: CN, prefix: str = "") -> None:
    """Fills `KEYS` and `_SECTIONS`, and leaves the defaults in the tree."""
    for name, declared in node.items():
        if isinstance(declared, CN):
            _SECTIONS[prefix + name] = declared
            _index(declared, f"{prefix}{name}.")
        else:
            KEYS[prefix + name] = Key(*declared)
            node[name] = declared[0]


_index(_C)
# Keys that nothing here reads, most of them PPViT's: accepted, and left out of the tree
_IGNORED = ("MODEL.TYPE", "MODEL.ATTENTION_DROPOUT", "TRAIN.MODEL_EMA_FORCE_CPU")
_IGNORED += ("TAG", "LOCAL_RANK", "NGPUS", "SAVE_FAILURE")

_OURS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "configs")
_MAX_FILES = 100  # merged for one config, counted as often as BASE names them
_OLD_NAMES = {  # PPViT's first releases
    "MODEL.MIXER.HIDDEN_SIZE": "MODEL.MIXER.EMBED_DIM",
    "MODEL.MIXER.NUM_LAYERS": "MODEL.MIXER.DEPTH",
}
# PPViT's defaults where they are not ours, which a YAML written for it may count on: PaddleViT's
# image_classification/ResMLP/config.py and main_multi_gpu.py, where that changes a result. It has
# no repeated augmentation, which is 1 here.
PPVIT = {
    "MODEL.DROPPATH": 0.1,
    "MODEL.MIXER.EMBED_DIM": 768,
    "TRAIN.NUM_EPOCHS": 300,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.WEIGHT_DECAY": 0.1,
    "TRAIN.BASE_LR": 0.001,
    "TRAIN.LINEAR_SCALED_LR": 512,
    "TRAIN.GRAD_CLIP": None,
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.REPEATED_AUG": 1,
}


# ------------------------------------------------------------------------------ public API
def get_config(cfg_file: str | None = None, opts: Sequence[str] = ()) -> CN:
    """The default config, merged with a YAML file (its ``BASE`` files first), then with ``opts``,
    ``KEY, VALUE, ...``. ConfigError: an unreadable file, unknown key, wrong type or range.
    """
    return update_config(_C.clone(), argparse.Namespace(cfg=cfg_file, opts=opts))


def update_config(config: CN, args: argparse.Namespace) -> CN:
    """Merges a main's arguments into ``config``: their file, the flags, then ``-opts``."""
    config.defrost()
    _merge(config, args)
    return config


def resolve_config(args: argparse.Namespace) -> CN:
    """The frozen config of a run, from a main's arguments.

    Prints one line on unset keys that PPViT has other defaults for. Our own YAML files, and those
    that build on one of them, hold the recipe that they mean.
    """
    config = _C.clone()
    given, files = _merge(config, args)
    ours = any(os.path.dirname(path) == _OURS for path in files)
    if files and not (ours or config.EVAL):
        values = {key: reduce(dict.get, key.split("."), config) for key in PPVIT.keys() - given}
        differ = [key for key in PPVIT if key in values and values[key] != PPVIT[key]]
        if differ:
            told = ", ".join(f"{key} {values[key]} (PPViT {PPVIT[key]})" for key in differ)
            print(f"not set in {args.cfg}, so our default: {told}", flush=True)
    config.freeze()
    return config


def _merge(config: CN, args: argparse.Namespace) -> tuple[set[str], list[str]]:
    """Merges as `update_config`; returns the dotted keys that were set, and the files read."""
    cfg, opts = getattr(args, "cfg", None), getattr(args, "opts", None) or ()
    if len(opts) % 2:
        raise ConfigError(f"-opts takes KEY VALUE pairs, found an odd count: {' '.join(opts)}")
    settings, files = [], []  # dotted key, text, and where it comes from
    for flags in _FLAGS.values():
        for flag, (_, *keys) in flags.items():
            if value := getattr(args, flag, None):
                settings += [(key, value, f"-{flag}") for key in keys]
    for key, value in zip(opts[::2], opts[1::2]):
        settings.append((_OLD_NAMES.get(key, key), value, "-opts"))
    entries = list(_read_entries(cfg, files)) if cfg else []
    entries += [(key, _parse(text, key, where), where) for key, text, where in settings]
    for entry in entries:
        _set(config, *entry)
    settle(config, where="config" if settings else cfg or "config")
    return {key for key, _, _ in entries}, files


_FLAGS = {  # group -> flag -> how help names its value, and the keys that it sets
    "data and model": {
        "cfg": ("FILE",),
        "dataset": ("", "DATA.DATASET"),
        "data_path": ("DIR", "DATA.DATA_PATH"),
        "image_size": ("N", "DATA.IMAGE_SIZE"),
    },
    "the run": {
        "output": ("DIR", "SAVE"),
        "batch_size": ("N", "DATA.BATCH_SIZE", "DATA.BATCH_SIZE_EVAL"),  # PPViT: both
        "batch_size_eval": ("N", "DATA.BATCH_SIZE_EVAL"),
        "accum_iter": ("N", "TRAIN.ACCUM_ITER"),
        "amp": ("", "AMP"),
        "nprocs": ("N", "DIST.NPROCS"),
    },
    "where it starts": {
        "pretrained": ("FILE", "MODEL.PRETRAINED"),
        "resume": ("FILE", "MODEL.RESUME"),
        "last_epoch": ("N", "TRAIN.LAST_EPOCH"),
        "eval": ("", "EVAL"),
    },
}


def get_arguments(argv: list[str] | None = None, description: str = "ResMLP") -> argparse.Namespace:
    """Parses the flags of the mains. ConfigError if one is unknown, or has no value."""
    parser = Parser(description)
    for title, flags in _FLAGS.items():
        parser.group(title)
        for flag, (metavar, *keys) in flags.items():
            if not keys:
                parser.flag(flag, "YAML config (default: the keys of config.py)", metavar=metavar)
                continue
            default, rule, help = KEYS[keys[0]]
            options = dict(metavar=metavar or "{" + ",".join(rule.names) + "}")
            if rule is boolean:
                options = dict(action="store_true")
            elif default is not None:
                help += f" (default: {default})"
            parser.flag(flag, help, **options)
    parser.flag("ngpus", argparse.SUPPRESS, dest="nprocs")
    parser.group("anything else")
    parser.opts_flag("any other keys: -opts TRAIN.BASE_LR 0.001 SEED 1")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------ describing
def describe_keys() -> str:
    """All keys as a YAML file: default, what it means, what it takes."""
    lines = []
    for name, (default, rule, meaning) in KEYS.items():
        value = list(default) if isinstance(default, tuple) else default
        value = yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]
        lines.append(f"{name}: {value}  # {meaning}; {rule.expects}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------- merging
def _read_entries(path: str, files: list[str], chain: tuple = ()) -> Iterator[tuple]:
    """Yields ``(dotted key, value, 'file:line')`` of a YAML file, those of its BASE files first;
    ``files``: all that were read so far; ``chain``: those that led here.
    """
    path = os.path.expanduser(path)
    real = os.path.realpath(path)
    if real in chain:
        raise ConfigError(f"{path}: BASE leads back to this file: {' -> '.join([*chain, real])}")
    files.append(real)
    if len(files) > _MAX_FILES:
        raise ConfigError(f"{path}: BASE leads to more than {_MAX_FILES} files; name each once")
    entries = list(_entries(_read_yaml(path), path, "", {}))
    for key, value, where in entries:
        if key == "BASE":
            for base in filter(None, coerce(key, KEYS[key].rule, value, where)):
                base_path = os.path.join(os.path.dirname(path), os.path.expanduser(base))
                yield from _read_entries(base_path, files, (*chain, real))
    yield from (entry for entry in entries if entry[0] != "BASE")


def _read_yaml(path: str) -> list[tuple[yaml.Node, yaml.Node]]:
    text = ""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        names = [found.name for found in Path(path).parent.glob("*.y*ml")]
        raise ConfigError(f"{path}: no such config file{_suggest(os.path.basename(path), names)}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}")
    except yaml.reader.ReaderError as error:  # has a position, but no mark
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {str(error).splitlines()[0]}")
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}")
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected `KEY: value` lines, found a {root.id}")
    return root.value if root else []


def _entries(pairs: list, path: str, prefix: str, lines: dict[str, int]):
    """What `_read_entries` yields, of a YAML mapping; fills ``lines`` by key."""
    for key_node, value_node in pairs:
        line = key_node.start_mark.line + 1
        where = f"{path}:{line}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key must be a plain name")
        key = f"{prefix}{key_node.value}"
        name = _OLD_NAMES.get(key, key)
        if name in lines:
            first = f"first in line {lines[name]}"
            raise ConfigError(f"{where}: {_show(key)} is given twice in this file, {first}")
        lines[name] = line
        if isinstance(value_node, yaml.MappingNode):
            if key in KEYS:
                raise ConfigError(f"{where}: {key} takes a value, found a section")
            _require_known(key, where)
            yield from _entries(value_node.value, path, f"{key}.", lines)
            continue
        try:
            value = yaml.SafeLoader("").construct_object(value_node, deep=True)
        except Exception as error:  # PyYAML raises anything where a text does not fit its tag
            problem = getattr(error, "problem", None) or "its text does not fit its type"
            raise ConfigError(f"{where}: {_show(key)}: not a plain value: {problem[:200]}")
        yield name, value, where


def _set(config: CN, key: str, value, where: str) -> None:
    if key in _IGNORED:
        return
    if key == "BASE":
        raise ConfigError(f"{where}: BASE belongs in a YAML file; name the file itself with -cfg")
    _require_known(key, where)
    if key in KEYS:
        *sections, name = key.split(".")
        reduce(dict.get, sections, config)[name] = coerce(key, KEYS[key].rule, value, where)
    elif value is not None:  # as an empty section in a YAML file is
        names = ", ".join(_SECTIONS[key])
        raise ConfigError(f"{where}: {key} is a section; set one of {names}")


def _require_known(key: str, where: str) -> None:
    """Says which known key is nearest, if a dotted key is none."""
    if key not in KEYS and key not in _SECTIONS:
        known, last = [*KEYS, *_SECTIONS], key.upper().rpartition(".")[2]
        same_name = [k for k in known if k.rpartition(".")[2] == last]
        raise ConfigError(
            f"{where}: unknown config key {_show(key)}{_suggest(key, same_name or known)}"
        )


def _suggest(name: str, known: list[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


def _parse(text, key: str, where: str):
    """Reads a value of the command line: a text as it stands, anything else as YAML."""
    if not isinstance(text, str) or (key in KEYS and KEYS[key].rule.takes_text):
        return text
    try:
        return yaml.safe_load(text)
    except Exception:  # PyYAML raises anything where a text does not fit its tag
        raise ConfigError(f"{where}: {_show(key)}: cannot read the value {text[:80]!r}")


def _show(key: str) -> str:
    """A key for a message: as it is, if it could be one."""
    return key if key.isprintable() and len(key) <= 80 else repr(key[:80])


if __name__ == "__main__":
    run_as_script(lambda: print(describe_keys(), flush=True))
