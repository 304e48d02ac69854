"""Every setting of a run: the config tree, YAML files with BASE, and command-line overrides.

    config = get_config("./configs/resmlp_12_224.yaml")

The tree is PPViT's, with more keys; the defaults are the paper's recipe: arXiv 2105.03404,
section 3.1; the authors' answer in facebookresearch/deit, issue 106; DeiT's code where these refer
to it. Each key is declared once:
``_C.KEY = default, rule  # meaning``, the rule being what it takes (`cli.config_rules`).
``python config.py`` prints all keys. This module imports no Paddle.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

import yaml
from yacs.config import CfgNode as CN

from cli.config_rules import (
    ALPHA,
    COUNT,
    INTERPOLATION,
    MEAN,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SHARE,
    SIDE,
    STD,
    boolean,
    check_consistency,
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
    text,
)
from cli.errors import ConfigError
from cli.parser import Parser
from cli.ppvit_defaults import differences

_C = CN()
_C.BASE = [""], files  # YAML files to merge first, relative to the file that names them

# ------------------------------------------------------------------------------------ data
_C.DATA = CN()
_C.DATA.BATCH_SIZE = 256, COUNT  # training images per process and step
# evaluation images per process and step; None: BATCH_SIZE
_C.DATA.BATCH_SIZE_EVAL = None, optional(COUNT)
_C.DATA.DATA_PATH = "/dataset/imagenet/", path  # the data folder
# imagenet2012: list files; imagefolder: a folder per class
_C.DATA.DATASET = "imagenet2012", choice("imagenet2012", "imagefolder")
_C.DATA.TRAIN_LIST = "train_list.txt", path  # in DATA_PATH: `relative/path label` a line
_C.DATA.VAL_LIST = "val_list.txt", path  # the same for validation
# a text file, one name a line; None: classes.txt in DATA_PATH
_C.DATA.CLASS_NAMES = None, optional(path)
_C.DATA.IMAGE_SIZE = 224, SIDE  # pixels; a multiple of MODEL.MIXER.PATCH_SIZE
_C.DATA.IMAGE_CHANNELS = 3, integer(3, 3)
# evaluation: short side to IMAGE_SIZE / CROP_PCT, then centre crop
_C.DATA.CROP_PCT = 0.875, real(0.1, 1.0)
_C.DATA.INTERPOLATION = "bicubic", choice(*INTERPOLATION)  # of the evaluation resize
# turn images upright as their EXIF says (phones); the published numbers ignore it
_C.DATA.EXIF_ORIENTATION = False, boolean
# DeiT; `random`: bilinear or bicubic a draw (timm)
_C.DATA.TRAIN_INTERPOLATION = "bicubic", choice("nearest", "bilinear", "bicubic", "random")
# loader processes per process; 0: load in the main process
_C.DATA.NUM_WORKERS = 2, integer(0, 256)
_C.DATA.IMAGENET_MEAN = [0.485, 0.456, 0.406], MEAN  # subtracted, of pixels from 0 to 1
_C.DATA.IMAGENET_STD = [0.229, 0.224, 0.225], STD  # divided by
_C.DATA.DROP_LAST = True, boolean  # training: drop a last batch that is smaller than the others
# error: stop and name it; skip: replace it (training only)
_C.DATA.BAD_IMAGE = "error", choice("error", "skip")
_C.DATA.BAD_IMAGE_LIMIT = 100, NATURAL  # BAD_IMAGE skip: stop above so many in an epoch
_C.DATA.ALLOW_OUTSIDE_PATHS = False, boolean  # may list files name files outside DATA_PATH?
# seconds without a batch before the loader counts as hung
_C.DATA.WORKER_TIMEOUT = 300.0, real(0.0, 1e6, open_low=True)

# ----------------------------------------------------------------------------------- model
_C.MODEL = CN()
_C.MODEL.TYPE = "resmlp", text  # PPViT's key, unused
_C.MODEL.NAME = "resmlp", text
# a training checkpoint, or `auto`: the newest whole one of the run
_C.MODEL.RESUME = None, optional(path)
_C.MODEL.PRETRAINED = None, optional(path)  # a weight file, with or without its suffix
# in a checkpoint: model_ema, model, or auto (EMA if there)
_C.MODEL.PRETRAINED_KEY = "auto", choice("auto", "model", "model_ema")
# resample token mixing when PRETRAINED has another resolution
_C.MODEL.RESIZE_TOKENS = False, boolean
# 0: features only; `auto`: as many as a run's data have (classes.txt, else folders or labels)
_C.MODEL.NUM_CLASSES = 1000, either(NATURAL, choice("auto"))
_C.MODEL.DROPOUT = 0.0, RATE  # in the MLPs
_C.MODEL.ATTENTION_DROPOUT = 0.0, RATE  # PPViT's key; ResMLP has no attention
_C.MODEL.DROPPATH = 0.05, RATE  # stochastic depth, the same for every block
_C.MODEL.MIXER = CN()
_C.MODEL.MIXER.PATCH_SIZE = 16, COUNT  # pixels
_C.MODEL.MIXER.EMBED_DIM = 384, integer(1, 65536)  # channels of a token
_C.MODEL.MIXER.DEPTH = 12, integer(1, 10000)  # blocks
_C.MODEL.MIXER.MLP_RATIO = (
    4.0,
    real(0.0, 1000.0, open_low=True),
)  # hidden units of the MLP per channel
# None: 0.1 / 1e-5 / 1e-6 up to 18 / 24 / more blocks
_C.MODEL.MIXER.LAYER_SCALE_INIT = None, optional(NOT_NEGATIVE)

# -------------------------------------------------------------------------------- training
_C.TRAIN = CN()
_C.TRAIN.LAST_EPOCH = 0, NATURAL  # epochs already done; a resumed checkpoint knows its own
_C.TRAIN.NUM_EPOCHS = 400, COUNT
_C.TRAIN.WARMUP_EPOCHS = (
    5.0,
    NOT_NEGATIVE,
)  # from WARMUP_START_LR, linearly; shortened where it does not fit
_C.TRAIN.COOLDOWN_EPOCHS = 0, NATURAL  # epochs at END_LR after NUM_EPOCHS (DeiT's 10 never run)
# on weight matrices only: not on biases, Affine, LayerScale
_C.TRAIN.WEIGHT_DECAY = 0.2, NOT_NEGATIVE
_C.TRAIN.BASE_LR = 5e-3, POSITIVE  # at a total batch of LINEAR_SCALED_LR
_C.TRAIN.WARMUP_START_LR = 1e-6, NOT_NEGATIVE
_C.TRAIN.END_LR = 1e-5, NOT_NEGATIVE
# BASE_LR *= total batch / this (DeiT: 512); None: as it is
_C.TRAIN.LINEAR_SCALED_LR = 2048, optional(COUNT)
# global norm; apex's and timm's LAMB clip at 1.0; None: no clipping
_C.TRAIN.GRAD_CLIP = 1.0, optional(POSITIVE)
_C.TRAIN.ACCUM_ITER = 1, COUNT  # batches per optimizer step
# fine-tuning: learning rate factor per block below the head
_C.TRAIN.LAYER_DECAY = None, optional(real(0.0, 1.0, open_low=True))
# fine-tuning: N: the patch embedding and the first N blocks stay as they are; backbone: all but the
# head; 0: nothing
_C.TRAIN.FREEZE = 0, either(NATURAL, choice("backbone"))
# evaluations without a better one after which training ends; 0: it goes to the last epoch
_C.TRAIN.EARLY_STOP = 0, NATURAL
_C.TRAIN.RECOMPUTE = False, boolean  # recompute activations in backward: less memory, more time
# a non-finite loss or gradient: stop, or skip the step
_C.TRAIN.NONFINITE = "stop", choice("stop", "skip")
_C.TRAIN.NONFINITE_LIMIT = 10, COUNT  # NONFINITE skip: stop after so many in a row

_C.TRAIN.LR_SCHEDULER = CN()
# warmupcosine, cosine (no warmup), constant, step
_C.TRAIN.LR_SCHEDULER.NAME = "warmupcosine", choice("warmupcosine", "cosine", "constant", "step")
# step: epochs; empty: every DECAY_EPOCHS
_C.TRAIN.LR_SCHEDULER.MILESTONES = "30, 60, 90", milestones
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30.0, POSITIVE  # step: epochs between drops
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1, real(0.0, 1.0, open_low=True)  # step: factor of each drop

_C.TRAIN.OPTIMIZER = CN()
# lamb (paper, section 3.1), adamw, sgd (Nesterov)
_C.TRAIN.OPTIMIZER.NAME = "lamb", choice("lamb", "adamw", "sgd")
_C.TRAIN.OPTIMIZER.EPS = 1e-8, POSITIVE
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999), sequence(real(0.0, 0.9999999), 2)
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9, RATE  # sgd

_C.TRAIN.MODEL_EMA = False, boolean  # keep a moving average of the weights
_C.TRAIN.MODEL_EMA_DECAY = 0.99996, SHARE
_C.TRAIN.MODEL_EMA_WARMUP = False, boolean  # decay min(MODEL_EMA_DECAY, (1 + step) / (10 + step))
_C.TRAIN.MODEL_EMA_FORCE_CPU = False, boolean  # PPViT's key; here the EMA stays on the device

_C.TRAIN.LOSS = "ce", choice("ce", "bce")  # ce, or bce (ResNet strikes back, arXiv 2110.00476)
# bce: targets above it become 1, others 0 (paper: 0.2)
_C.TRAIN.BCE_TARGET_THRESHOLD = None, optional(SHARE)
_C.TRAIN.SMOOTHING = 0.1, RATE  # label smoothing
# of the loss: balanced (images / (classes * images of the class)), or a number a class
_C.TRAIN.CLASS_WEIGHTS = "none", either(choice("none", "balanced"), sequence(POSITIVE, None, list))
# as many samples of each class in an epoch, which stays as long: images of rare classes come again
_C.TRAIN.BALANCED_SAMPLING = False, boolean

# augmentation of single images, in the loader's workers
_C.TRAIN.REPEATED_AUG = 3, integer(1, 64)  # copies of an image in an epoch's order (DeiT); 1: off
# share of the area that a random crop keeps
_C.TRAIN.CROP_SCALE = (0.08, 1.0), sequence(real(0.0, 1.0, open_low=True), 2, ordered=True)
# aspect ratio of a random crop
_C.TRAIN.CROP_RATIO = (0.75, 4 / 3), sequence(POSITIVE, 2, ordered=True)
_C.TRAIN.HFLIP = 0.5, SHARE  # probability
_C.TRAIN.VFLIP = 0.0, SHARE  # probability
_C.TRAIN.COLOR_JITTER = 0.4, real(0.0, 10.0)  # used where none of the next three is
# True or `original`, `v0`, ...; RAND_AUGMENT wins over it
_C.TRAIN.AUTO_AUGMENT = False, either(boolean, text)
# 3-Augment (DeiT III, with COLOR_JITTER 0.3); wins over both
_C.TRAIN.THREE_AUGMENT = False, boolean
# or timm's string, rand-m9-mstd0.5-inc1, in place of all numbers
_C.TRAIN.RAND_AUGMENT = True, either(boolean, text)
_C.TRAIN.RAND_AUGMENT_LAYERS = 2, integer(0, 64)  # operations an image
_C.TRAIN.RAND_AUGMENT_MAGNITUDE = 9.0, real(0.0, 10.0)  # of 10
_C.TRAIN.RAND_AUGMENT_MAGNITUDE_STD = 0.5, NOT_NEGATIVE
# severity grows with magnitude for every operation
_C.TRAIN.RAND_AUGMENT_INCREASING = True, boolean
_C.TRAIN.RAND_AUGMENT_PROB = 0.5, SHARE  # of each operation

# augmentation of batches, on the device
_C.TRAIN.MIXUP_ALPHA = 0.8, ALPHA  # of Beta(alpha, alpha); 0: no mixup
_C.TRAIN.MIXUP_PROB = 1.0, SHARE  # of mixing a batch at all
_C.TRAIN.MIXUP_SWITCH_PROB = 0.5, SHARE  # of cutmix instead of mixup
_C.TRAIN.MIXUP_MODE = "batch", choice("batch", "pair", "elem")  # one lambda a batch, pair or elem
_C.TRAIN.CUTMIX_ALPHA = 1.0, ALPHA  # 0: no cutmix
# (min, max) share of a side; turns CUTMIX_ALPHA off
_C.TRAIN.CUTMIX_MINMAX = None, optional(sequence(SHARE, 2, ordered=True))
_C.TRAIN.RANDOM_ERASE_PROB = 0.25, SHARE  # of each image
# const (zero), rand (a colour), pixel (noise)
_C.TRAIN.RANDOM_ERASE_MODE = "pixel", choice("const", "rand", "pixel")
_C.TRAIN.RANDOM_ERASE_COUNT = 1, integer(1, 256)  # boxes an image, at most
_C.TRAIN.RANDOM_ERASE_SPLIT = False, boolean  # leave the first half of a batch alone

# distillation (paper, sections 3.1, 3.2: hard, with the label loss on the same head)
_C.TRAIN.DISTILLATION_TYPE = "none", choice("none", "hard", "soft")  # none, hard, soft
_C.TRAIN.DISTILLATION_ALPHA = 0.5, SHARE  # share of the teacher's loss
_C.TRAIN.DISTILLATION_TAU = 1.0, POSITIVE  # temperature of soft distillation
# a paddle.vision.models name, a ResMLP YAML, a jit.saved prefix
_C.TRAIN.TEACHER_MODEL = None, optional(path)
_C.TRAIN.TEACHER_PRETRAINED = None, optional(path)  # the teacher's weight file
_C.TRAIN.TEACHER_IMAGE_SIZE = None, optional(SIDE)  # pixels; None: the student's
_C.TRAIN.TEACHER_MEAN = None, optional(MEAN)  # None: the student's
_C.TRAIN.TEACHER_STD = None, optional(STD)

# ---------------------------------------------------------------------------- distribution
_C.DIST = CN()
# processes of main_multi_gpu.py; 0: one a visible GPU, or one on CPU
_C.DIST.NPROCS = 0, integer(-1, 4096)

# ------------------------------------------------------------------------------------ misc
_C.SAVE = "./output", path  # a run's folder; this default gives each run a dated folder inside it
_C.SAVE_FREQ = 10, COUNT  # epochs between kept checkpoints (epoch_NNN)
# optimizer steps between saves of `last` within an epoch; 0: at its end only
_C.SAVE_STEPS = 0, NATURAL
# a checkpoint cannot be written: stop, or continue
_C.SAVE_FAILURE = "stop", choice("stop", "continue")
_C.KEEP_CHECKPOINTS = 3, COUNT  # newest epoch_NNN checkpoints to keep
_C.KEEP_EVERY = 0, NATURAL  # also keep every so many epochs for good; 0: none
_C.REPORT_FREQ = 50, COUNT  # optimizer steps between log lines
_C.VALIDATE_FREQ = 1, COUNT  # epochs between evaluations
# by what `best` is chosen: the highest (loss: the lowest); TRAIN.EARLY_STOP goes by it too
_C.BEST_METRIC = "top1", choice("top1", "top5", "loss", "balanced_accuracy", "macro_f1")
_C.SEED = 0, integer(0, 2**31 - 1)  # of everything random
_C.EVAL = False, boolean  # evaluate only
# per-class CSV, and a confusion matrix's picture up to 1000 classes
_C.EVAL_REPORT = False, boolean
_C.EVAL_REAL_LABELS = None, optional(path)  # ImageNet-ReaL's real.json: -eval measures it too
_C.AMP = False, boolean  # mixed precision: on a GPU, and on a CPU with fast bfloat16
# O1: a list of operations; O2: the whole model, float32 master weights (on a CPU: O1)
_C.AMP_LEVEL = "O1", choice("O1", "O2")
# float16 (with a loss scaler; on a CPU: bfloat16 if that is fast) or bfloat16 (without)
_C.AMP_DTYPE = "float16", choice("float16", "bfloat16")
_C.DASHBOARD = "none", choice("none", "visualdl", "tensorboard")  # none, visualdl, tensorboard
_C.TAG = "default", text  # PPViT's keys, accepted and unused: TAG, LOCAL_RANK, NGPUS
_C.LOCAL_RANK = 0, integer(-1)
_C.NGPUS = -1, integer(-1)


def _split(node: CN, prefix: str = "") -> dict:
    """Leaves the defaults in the tree; returns the rules by dotted key."""
    rules = {}
    for name, declared in node.items():
        if isinstance(declared, CN):
            rules.update(_split(declared, f"{prefix}{name}."))
        else:
            node[name], rules[prefix + name] = declared
    return rules


RULES = _split(_C)

_OURS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "configs")
_MAX_FILES = 100  # merged for one config, counted as often as BASE names them
_OLD_NAMES = {  # PPViT's first releases
    "MODEL.MIXER.HIDDEN_SIZE": "MODEL.MIXER.EMBED_DIM",
    "MODEL.MIXER.NUM_LAYERS": "MODEL.MIXER.DEPTH",
}


# ------------------------------------------------------------------------------ public API
def get_config(cfg_file: str | None = None) -> CN:
    """Returns the default config, merged with a YAML file if one is given.

    Args:
        cfg_file: path of a YAML file; its ``BASE`` files are merged before it.

    Raises:
        ConfigError: an unreadable file, an unknown key, a value of the wrong type or range.
    """
    config = _C.clone()
    if cfg_file:
        _merge_file(config, cfg_file)
        _settle(config, where=cfg_file)
    return config


def update_config(config: CN, args: argparse.Namespace) -> CN:
    """Merges parsed command-line arguments (see `get_arguments`) into ``config``; returns it.

    Raises:
        ConfigError: as `get_config`; the message names the flag.
    """
    config.defrost()
    if getattr(args, "cfg", None):
        _merge_file(config, args.cfg)
    for flag, (_, _, *keys) in _FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None and value is not False:
            for key in keys:
                _set(config, key, _parse(value, key, f"-{flag}"), where=f"-{flag}")
    opts = getattr(args, "opts", None) or []
    if len(opts) % 2:
        raise ConfigError(f"-opts takes KEY VALUE pairs, found an odd count: {' '.join(opts)}")
    for key, value in zip(opts[::2], opts[1::2]):
        _set(config, key, _parse(value, key, "-opts"), where="-opts")
    _settle(config, where="config")
    return config


def note_on_defaults(config: CN, args: argparse.Namespace) -> str | None:
    """One line on unset keys that PPViT has other defaults for; None: there is nothing to say.

    Our own YAML files, and those that build on one of them, hold the recipe that they mean.

    Args:
        config: the resolved config of a training.
        args: the arguments that it was resolved from.
    """
    files: list[str] = []
    if config.EVAL or not args.cfg:
        return None
    _merge_file(_C.clone(), args.cfg, merged=files)
    if any(os.path.dirname(path) == _OURS for path in files):
        return None
    given = {key for path in files for key, _, _ in _entries(_read_yaml(path), path, "", {})}
    given |= set((args.opts or [])[::2])  # no flag sets any of them
    unset = differences(config, {_OLD_NAMES.get(key, key) for key in given})
    return f"not set in {args.cfg}, so our default: {', '.join(unset)}" if unset else None


_FLAGS = {  # flag -> what it is, how help names its value, the keys that it sets
    "cfg": ("YAML config (default: the keys of config.py, a ResMLP-S12)", "FILE"),
    "dataset": ("how the data are laid out", None, "DATA.DATASET"),
    "data_path": ("data folder", "DIR", "DATA.DATA_PATH"),
    "image_size": ("pixels", "N", "DATA.IMAGE_SIZE"),
    "output": ("folder of this run; the default makes a dated one in it", "DIR", "SAVE"),
    "batch_size": (  # PPViT: both
        "images per process and step, training and evaluation",
        "N",
        "DATA.BATCH_SIZE",
        "DATA.BATCH_SIZE_EVAL",
    ),
    "batch_size_eval": ("the same, evaluation only", "N", "DATA.BATCH_SIZE_EVAL"),
    "accum_iter": ("batches per optimizer step", "N", "TRAIN.ACCUM_ITER"),
    "amp": ("mixed precision (on a CPU: bfloat16, if fast)", None, "AMP"),
    "nprocs": (
        "processes of main_multi_gpu.py; 0: one a GPU, or one on CPU",
        "N",
        "DIST.NPROCS",
    ),
    "pretrained": (
        "weight file, with or without its suffix, or the https address of a published one",
        "FILE",
        "MODEL.PRETRAINED",
    ),
    "resume": ("checkpoint (ours, PPViT's) to continue from, or `auto`", "FILE", "MODEL.RESUME"),
    "last_epoch": ("epochs done, where no checkpoint says it", "N", "TRAIN.LAST_EPOCH"),
    "eval": ("evaluate only", None, "EVAL"),
}
_GROUPS = {
    "data and model": ("cfg", "dataset", "data_path", "image_size"),
    "the run": ("output", "batch_size", "batch_size_eval", "accum_iter", "amp", "nprocs"),
    "where it starts": ("pretrained", "resume", "last_epoch", "eval"),
}


def get_arguments(argv: list[str] | None = None, description: str = "ResMLP") -> argparse.Namespace:
    """Parses the flags of the mains. Each works with one dash or two, with ``_`` or ``-``.

    Raises:
        ConfigError: an unknown flag, or one without its value.
    """
    parser = Parser(description)
    for title, flags in _GROUPS.items():
        parser.group(title)
        for flag in flags:
            help, metavar, *keys = _FLAGS[flag]
            options = dict(metavar=metavar) if metavar else {}
            if keys:
                node, name = _locate(_C, keys[0], where="config")
                if RULES[keys[0]] is boolean:
                    options = dict(action="store_true")
                elif node[name] is not None:
                    help += f" (default: {node[name]})"
                names = getattr(RULES[keys[0]], "names", ())
                if names:
                    options = dict(metavar="{" + ",".join(names) + "}")
            parser.flag(flag, help, **options)
    parser.flag("ngpus", argparse.SUPPRESS, dest="nprocs")
    parser.group("anything else")
    parser.opts_flag("any other keys: -opts TRAIN.BASE_LR 0.001 SEED 1")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------ describing
def describe_keys() -> str:
    """All keys as a YAML file: default, what it means, what it takes."""
    meanings, above = {}, ""
    for line in Path(__file__).read_text(encoding="utf-8").splitlines():
        declared = re.match(r"_C\.([A-Z_.]+) = .*?(?:  # (.*))?$", line)
        if declared:
            meanings[declared[1]] = declared[2] or above
        above = f"{above} {line[2:]}".strip() if line.startswith("# ") else ""
    lines = []
    for key, rule in RULES.items():
        node, name = _locate(_C, key, where="config")
        value = list(node[name]) if isinstance(node[name], tuple) else node[name]
        value = yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]
        lines.append(f"{key}: {value}  # {'; '.join(filter(None, (meanings[key], rule.expects)))}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------- merging
def _settle(config: CN, where: str) -> None:
    """Judges what joins several keys, when all are known: a base file, or a flag, may mend them."""
    check_consistency(config, where)
    train = config.TRAIN
    cosine = train.LR_SCHEDULER.NAME == "warmupcosine"  # the others go on after any warmup
    if cosine and train.WARMUP_EPOCHS >= train.NUM_EPOCHS and not config.EVAL:
        fits = train.NUM_EPOCHS / 2
        logging.getLogger("resmlp").warning(
            f"{where}: TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS:g} does not fit into "
            f"TRAIN.NUM_EPOCHS {train.NUM_EPOCHS}; shortened to {fits:g}"
        )
        train.WARMUP_EPOCHS = fits


def _merge_file(config: CN, path: str, chain: tuple = (), merged: list | None = None) -> None:
    """Merges a YAML file, its BASE files first.

    ``chain`` holds the files that led here, ``merged`` all files so far, each as often as it came.
    """
    path = os.path.expanduser(path)
    real = os.path.realpath(path)
    if real in chain:
        raise ConfigError(f"{path}: BASE leads back to this file: {' -> '.join([*chain, real])}")
    merged = [] if merged is None else merged
    merged.append(real)
    if len(merged) > _MAX_FILES:
        raise ConfigError(f"{path}: BASE leads to more than {_MAX_FILES} files; name each once")
    root = _read_yaml(path)
    entries = list(_entries(root, path, "", {}))
    for key, value, where in entries:
        if key == "BASE":
            for base in filter(None, coerce(key, RULES[key], value, where)):
                base_path = os.path.join(os.path.dirname(path), os.path.expanduser(base))
                _merge_file(config, base_path, (*chain, real), merged)
    for key, value, where in entries:
        if key != "BASE":
            _set(config, key, value, where)


def _read_yaml(path: str) -> yaml.Node | None:
    text = ""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        names = []
        with suppress(OSError):  # no such folder either, or it may not be listed
            names = os.listdir(os.path.dirname(path) or ".")
        names = [name for name in names if name.endswith((".yaml", ".yml"))]
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
    return root


def _entries(node: yaml.Node | None, path: str, prefix: str, lines: dict[str, int]):
    """Yields ``(dotted key, value, 'file:line')`` for every leaf of a YAML mapping.

    ``lines`` holds where each key stands in the file, whatever its spelling.
    """
    if node is None:
        return
    for key_node, value_node in node.value:
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
            if key in RULES:
                raise ConfigError(f"{where}: {key} takes a value, found a section")
            _locate(_C, key, where)
            yield from _entries(value_node, path, f"{key}.", lines)
            continue
        try:
            value = yaml.SafeLoader("").construct_object(value_node, deep=True)
        except Exception as error:  # PyYAML raises anything where a text does not fit its tag
            problem = getattr(error, "problem", None) or "its text does not fit its type"
            raise ConfigError(f"{where}: {_show(key)}: not a plain value: {problem[:200]}")
        yield key, value, where


def _set(config: CN, key: str, value, where: str) -> None:
    key = _OLD_NAMES.get(key, key)
    if key == "BASE":
        raise ConfigError(f"{where}: BASE belongs in a YAML file; name the file itself with -cfg")
    node, name = _locate(config, key, where)
    if isinstance(node[name], CN):
        if value is None:  # an empty section in a YAML file
            return
        raise ConfigError(f"{where}: {key} is a section; set one of {', '.join(node[name])}")
    node[name] = coerce(key, RULES[key], value, where)


def _locate(config: CN, key: str, where: str) -> tuple[CN, str]:
    """Finds the node that holds a dotted key, or says which known key is nearest."""
    node, names = config, key.split(".")
    for depth, name in enumerate(names):
        if not isinstance(node, CN) or name not in node:
            known = _all_keys(_C)
            same_name = [k for k in known if k.rsplit(".", 1)[-1] == names[-1].upper()]
            raise ConfigError(
                f"{where}: unknown config key {_show(key)}{_suggest(key, same_name or known)}"
            )
        if depth < len(names) - 1:
            node = node[name]
    return node, names[-1]


def _all_keys(node: CN, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CN):
            keys += _all_keys(value, f"{prefix}{name}.")
    return keys


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.upper(), [k.upper() for k in known], n=1, cutoff=0.4)
    by_upper = {k.upper(): k for k in known}
    return f"; did you mean {by_upper[near[0]]}?" if near else ""


def _parse(text, key: str, where: str):
    """Reads a value of the command line: a text as it stands, anything else as YAML."""
    takes_text = getattr(RULES.get(_OLD_NAMES.get(key, key)), "takes_text", False)
    if takes_text or not isinstance(text, str):
        return text
    try:
        return yaml.safe_load(text)
    except Exception:  # PyYAML raises anything where a text does not fit its tag
        raise ConfigError(f"{where}: {_show(key)}: cannot read the value {text[:80]!r}")


def _show(key: str) -> str:
    """A key for a message: as it is, if it could be one."""
    return key if key.isprintable() and len(key) <= 80 else repr(key[:80])


if __name__ == "__main__":
    print(describe_keys())
