"""Every setting of a run: the config tree, YAML files with BASE, and command-line overrides.

    config = get_config("./configs/resmlp_12_224.yaml")

The tree is PPViT's, with more keys; the defaults are the paper's recipe: arXiv 2105.03404,
section 3.1; the authors' answer in facebookresearch/deit, issue 106; DeiT's code where these refer
to it. This module imports no Paddle.
"""

from __future__ import annotations

import argparse
import difflib
import os
from contextlib import suppress

import yaml
from yacs.config import CfgNode as CN

from cli.config_rules import RULES, check_consistency, coerce
from cli.errors import ConfigError

_C = CN()
_C.BASE = [""]  # YAML files to merge first, relative to the file that names them

# ------------------------------------------------------------------------------------ data
_C.DATA = CN()
_C.DATA.BATCH_SIZE = 256  # training images per process and step
_C.DATA.BATCH_SIZE_EVAL = None  # evaluation images per process and step; None: BATCH_SIZE
_C.DATA.DATA_PATH = "/dataset/imagenet/"  # the data folder
_C.DATA.DATASET = "imagenet2012"  # imagenet2012: list files; imagefolder: a folder per class
_C.DATA.TRAIN_LIST = "train_list.txt"  # in DATA_PATH: `relative/path label` a line
_C.DATA.VAL_LIST = "val_list.txt"
_C.DATA.CLASS_NAMES = None  # a text file, one name a line; None: classes.txt in DATA_PATH
_C.DATA.IMAGE_SIZE = 224  # pixels; a multiple of MODEL.MIXER.PATCH_SIZE
_C.DATA.IMAGE_CHANNELS = 3
_C.DATA.CROP_PCT = 0.875  # evaluation: short side to IMAGE_SIZE / CROP_PCT, then centre crop
_C.DATA.INTERPOLATION = "bicubic"  # of the evaluation resize
_C.DATA.TRAIN_INTERPOLATION = "bicubic"  # DeiT; `random`: bilinear or bicubic a draw (timm)
_C.DATA.NUM_WORKERS = 2  # loader processes per process; 0: load in the main process
_C.DATA.IMAGENET_MEAN = [0.485, 0.456, 0.406]
_C.DATA.IMAGENET_STD = [0.229, 0.224, 0.225]
_C.DATA.DROP_LAST = True  # training: drop a last batch that is smaller than the others
_C.DATA.BAD_IMAGE = "error"  # error: stop and name it; skip: replace it (training only)
_C.DATA.BAD_IMAGE_LIMIT = 100  # BAD_IMAGE skip: stop above so many in an epoch
_C.DATA.ALLOW_OUTSIDE_PATHS = False  # may list files name files outside DATA_PATH?
_C.DATA.WORKER_TIMEOUT = 300.0  # seconds without a batch before the loader counts as hung

# ----------------------------------------------------------------------------------- model
_C.MODEL = CN()
_C.MODEL.TYPE = "resmlp"
_C.MODEL.NAME = "resmlp"
_C.MODEL.RESUME = None  # a training checkpoint, or `auto`: the newest whole one of the run
_C.MODEL.PRETRAINED = None  # a weight file, with or without its suffix
_C.MODEL.PRETRAINED_KEY = "auto"  # in a checkpoint: model_ema, model, or auto (EMA if there)
_C.MODEL.RESIZE_TOKENS = False  # resample token mixing when PRETRAINED has another resolution
_C.MODEL.NUM_CLASSES = 1000
_C.MODEL.DROPOUT = 0.0
_C.MODEL.ATTENTION_DROPOUT = 0.0  # PPViT's key; ResMLP has no attention
_C.MODEL.DROPPATH = 0.05  # stochastic depth, the same for every block
_C.MODEL.MIXER = CN()
_C.MODEL.MIXER.PATCH_SIZE = 16  # pixels
_C.MODEL.MIXER.EMBED_DIM = 384
_C.MODEL.MIXER.DEPTH = 12
_C.MODEL.MIXER.MLP_RATIO = 4.0
_C.MODEL.MIXER.LAYER_SCALE_INIT = None  # None: 0.1 / 1e-5 / 1e-6 up to 18 / 24 / more blocks

# -------------------------------------------------------------------------------- training
_C.TRAIN = CN()
_C.TRAIN.LAST_EPOCH = 0  # epochs already done; a resumed checkpoint knows its own
_C.TRAIN.NUM_EPOCHS = 400
_C.TRAIN.WARMUP_EPOCHS = 5.0
_C.TRAIN.COOLDOWN_EPOCHS = 0  # epochs at END_LR after NUM_EPOCHS (DeiT's 10 never run)
_C.TRAIN.WEIGHT_DECAY = 0.2  # on weight matrices only: not on biases, Affine, LayerScale
_C.TRAIN.BASE_LR = 5e-3  # at a total batch of LINEAR_SCALED_LR
_C.TRAIN.WARMUP_START_LR = 1e-6
_C.TRAIN.END_LR = 1e-5
_C.TRAIN.LINEAR_SCALED_LR = 2048  # BASE_LR *= total batch / this (DeiT: 512); None: as it is
_C.TRAIN.GRAD_CLIP = 1.0  # global norm; apex's and timm's LAMB clip at 1.0; None: no clipping
_C.TRAIN.ACCUM_ITER = 1  # batches per optimizer step
_C.TRAIN.LAYER_DECAY = None  # fine-tuning: learning rate factor per block below the head
_C.TRAIN.RECOMPUTE = False  # recompute activations in backward: less memory, more time
_C.TRAIN.NONFINITE = "stop"  # a non-finite loss or gradient: stop, or skip the step
_C.TRAIN.NONFINITE_LIMIT = 10  # NONFINITE skip: stop after so many in a row

_C.TRAIN.LR_SCHEDULER = CN()
_C.TRAIN.LR_SCHEDULER.NAME = "warmupcosine"  # warmupcosine, cosine (no warmup), constant, step
_C.TRAIN.LR_SCHEDULER.MILESTONES = "30, 60, 90"  # step: epochs; empty: every DECAY_EPOCHS
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30.0
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1

_C.TRAIN.OPTIMIZER = CN()
_C.TRAIN.OPTIMIZER.NAME = "lamb"  # lamb (paper, section 3.1), adamw, sgd (Nesterov)
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # sgd

_C.TRAIN.MODEL_EMA = False
_C.TRAIN.MODEL_EMA_DECAY = 0.99996
_C.TRAIN.MODEL_EMA_WARMUP = False  # decay min(MODEL_EMA_DECAY, (1 + step) / (10 + step))
_C.TRAIN.MODEL_EMA_FORCE_CPU = False  # PPViT's key; here the EMA stays on the device

_C.TRAIN.LOSS = "ce"  # ce, or bce (ResNet strikes back, arXiv 2110.00476)
_C.TRAIN.BCE_TARGET_THRESHOLD = None  # bce: targets above it become 1, others 0 (paper: 0.2)
_C.TRAIN.SMOOTHING = 0.1

# augmentation of single images, in the loader's workers
_C.TRAIN.REPEATED_AUG = 3  # copies of an image in an epoch's order (DeiT); 1: off
_C.TRAIN.CROP_SCALE = (0.08, 1.0)  # share of the area that a random crop keeps
_C.TRAIN.CROP_RATIO = (0.75, 4 / 3)  # aspect ratio of a random crop
_C.TRAIN.HFLIP = 0.5
_C.TRAIN.VFLIP = 0.0
_C.TRAIN.COLOR_JITTER = 0.4  # used where none of the next three is
_C.TRAIN.AUTO_AUGMENT = False  # True or `original`, `v0`, ...; RAND_AUGMENT wins over it
_C.TRAIN.THREE_AUGMENT = False  # 3-Augment (DeiT III, with COLOR_JITTER 0.3); wins over both
_C.TRAIN.RAND_AUGMENT = True  # or timm's string, rand-m9-mstd0.5-inc1, in place of all numbers
_C.TRAIN.RAND_AUGMENT_LAYERS = 2  # operations an image
_C.TRAIN.RAND_AUGMENT_MAGNITUDE = 9.0  # of 10
_C.TRAIN.RAND_AUGMENT_MAGNITUDE_STD = 0.5
_C.TRAIN.RAND_AUGMENT_INCREASING = True  # severity grows with magnitude for every operation
_C.TRAIN.RAND_AUGMENT_PROB = 0.5  # of each operation

# augmentation of batches, on the device
_C.TRAIN.MIXUP_ALPHA = 0.8
_C.TRAIN.MIXUP_PROB = 1.0
_C.TRAIN.MIXUP_SWITCH_PROB = 0.5  # of cutmix instead of mixup
_C.TRAIN.MIXUP_MODE = "batch"  # one lambda a batch, pair or elem
_C.TRAIN.CUTMIX_ALPHA = 1.0
_C.TRAIN.CUTMIX_MINMAX = None  # (min, max) share of a side; turns CUTMIX_ALPHA off
_C.TRAIN.RANDOM_ERASE_PROB = 0.25
_C.TRAIN.RANDOM_ERASE_MODE = "pixel"  # const (zero), rand (a colour), pixel (noise)
_C.TRAIN.RANDOM_ERASE_COUNT = 1  # boxes an image, at most
_C.TRAIN.RANDOM_ERASE_SPLIT = False  # leave the first half of a batch alone

# distillation (paper, sections 3.1, 3.2: hard, with the label loss on the same head)
_C.TRAIN.DISTILLATION_TYPE = "none"  # none, hard, soft
_C.TRAIN.DISTILLATION_ALPHA = 0.5  # share of the teacher's loss
_C.TRAIN.DISTILLATION_TAU = 1.0  # temperature of soft distillation
_C.TRAIN.TEACHER_MODEL = None  # a paddle.vision.models name, a ResMLP YAML, a jit.saved prefix
_C.TRAIN.TEACHER_PRETRAINED = None  # the teacher's weight file
_C.TRAIN.TEACHER_IMAGE_SIZE = None  # pixels; None: the student's
_C.TRAIN.TEACHER_MEAN = None  # None: the student's
_C.TRAIN.TEACHER_STD = None

# ---------------------------------------------------------------------------- distribution
_C.DIST = CN()
_C.DIST.NPROCS = 0  # processes of main_multi_gpu.py; 0: one a visible GPU, or one on CPU

# ------------------------------------------------------------------------------------ misc
_C.SAVE = "./output"  # a run's folder; this default gives each run a dated folder inside it
_C.SAVE_FREQ = 10  # epochs between kept checkpoints (epoch_NNN)
_C.SAVE_STEPS = 0  # optimizer steps between saves of `last` within an epoch; 0: at its end only
_C.SAVE_FAILURE = "stop"  # a checkpoint cannot be written: stop, or continue
_C.KEEP_CHECKPOINTS = 3  # newest epoch_NNN checkpoints to keep
_C.KEEP_EVERY = 0  # also keep every so many epochs for good; 0: none
_C.REPORT_FREQ = 50  # optimizer steps between log lines
_C.VALIDATE_FREQ = 1  # epochs between evaluations
_C.SEED = 0
_C.EVAL = False  # evaluate only
_C.EVAL_REPORT = False  # per-class CSV, and a confusion matrix's picture up to 1000 classes
_C.AMP = False  # mixed precision, on GPU (Paddle has none on CPU)
_C.AMP_LEVEL = "O1"  # O1: a list of operations; O2: the whole model, float32 master weights
_C.AMP_DTYPE = "float16"  # float16 (with a loss scaler) or bfloat16 (without)
_C.DASHBOARD = "none"  # none, visualdl, tensorboard
_C.TAG = "default"  # PPViT's keys, accepted and unused:
_C.LOCAL_RANK = 0
_C.NGPUS = -1

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
    return config


def update_config(config: CN, args: argparse.Namespace) -> CN:
    """Merges parsed command-line arguments (see `get_arguments`) into ``config``; returns it.

    Raises:
        ConfigError: as `get_config`; the message names the flag.
    """
    config.defrost()
    for flag in ("cfg", *_FLAGS):
        if getattr(args, flag, None) == "":  # `-pretrained=$FILE`, and FILE is not set
            raise ConfigError(f"-{flag} is empty; leave it out, or give it a value")
    if getattr(args, "cfg", None):
        _merge_file(config, args.cfg)
    for flag, keys in _FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None and value is not False:
            for key in keys:
                _set(config, key, value, where=f"-{flag}")
    opts = getattr(args, "opts", None) or []
    if len(opts) % 2:
        raise ConfigError(f"-opts takes KEY VALUE pairs, found an odd count: {' '.join(opts)}")
    for key, text in zip(opts[::2], opts[1::2]):
        _set(config, key, _parse(text, key), where="-opts")
    check_consistency(config)
    return config


def check_config(config: CN) -> CN:
    """Checks every value of a config that was edited by hand; returns it.

    Raises:
        ConfigError: the first wrong value, by its key.
    """
    for key in RULES:
        node, name = _locate(config, key, where="config")
        coerce(key, node[name], where="config")
    check_consistency(config)
    return config


_FLAGS = {  # flag -> the keys that it sets
    "dataset": ["DATA.DATASET"],
    "data_path": ["DATA.DATA_PATH"],
    "output": ["SAVE"],
    "batch_size": ["DATA.BATCH_SIZE", "DATA.BATCH_SIZE_EVAL"],  # PPViT: both
    "batch_size_eval": ["DATA.BATCH_SIZE_EVAL"],
    "image_size": ["DATA.IMAGE_SIZE"],
    "accum_iter": ["TRAIN.ACCUM_ITER"],
    "pretrained": ["MODEL.PRETRAINED"],
    "resume": ["MODEL.RESUME"],
    "last_epoch": ["TRAIN.LAST_EPOCH"],
    "nprocs": ["DIST.NPROCS"],
    "eval": ["EVAL"],
    "amp": ["AMP"],
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"command line: {message} (see -h)")


def get_arguments(argv: list[str] | None = None, description: str = "ResMLP") -> argparse.Namespace:
    """Parses the flags of the mains. Each works with one dash or two, with ``_`` or ``-``.

    Raises:
        ConfigError: an unknown flag or a value that is no number where one is due.
    """
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name, help, **kwargs):
        dashed = name.replace("_", "-")
        flags = dict.fromkeys([f"-{name}", f"--{name}", f"-{dashed}", f"--{dashed}"])
        parser.add_argument(*flags, dest=name, help=help, **kwargs)

    add("cfg", "YAML config (default: the keys of config.py, a ResMLP-S12)", metavar="FILE")
    add("dataset", "imagenet2012 (list files) or imagefolder (a folder per class)")
    add("data_path", "data folder", metavar="DIR")
    add("output", "folder of this run (default: a dated folder in ./output)", metavar="DIR")
    add("batch_size", "images per process and step, training and evaluation", type=int)
    add("batch_size_eval", "images per process and step, evaluation", type=int)
    add("image_size", "pixels", type=int)
    add("accum_iter", "batches per optimizer step", type=int)
    add("pretrained", "weight file, with or without its suffix", metavar="FILE")
    add("resume", "checkpoint to continue from, or `auto`", metavar="FILE")
    add("last_epoch", "epochs already done, where the checkpoint does not say", type=int)
    add("nprocs", "processes of main_multi_gpu.py (0: one a GPU, or one on CPU)", type=int)
    parser.add_argument("-ngpus", "--ngpus", dest="nprocs", type=int, help=argparse.SUPPRESS)
    add("eval", "evaluate only", action="store_true")
    add("amp", "mixed precision on GPU", action="store_true")
    add(
        "opts",
        "any other keys: -opts TRAIN.BASE_LR 0.001 SEED 1",
        nargs="+",
        action="extend",
        metavar="KEY VALUE",
    )
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------- merging
def _merge_file(config: CN, path: str, chain: tuple = (), merged: list | None = None) -> None:
    """Merges a YAML file, its BASE files first.

    ``chain`` holds the files that led here, ``merged`` all files so far, each as often as it came.
    """
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
            for base in filter(None, coerce(key, value, where)):
                base_path = os.path.join(os.path.dirname(path), base)
                _merge_file(config, base_path, (*chain, real), merged)
    for key, value, where in entries:
        if key != "BASE":
            _set(config, key, value, where)
    if not chain:  # a base may leave to its heir what makes it consistent
        check_consistency(config, where=path)


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
    node[name] = coerce(key, value, where)


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


def _parse(text: str, key: str):
    """Reads a value of ``-opts`` as YAML."""
    try:
        return yaml.safe_load(text)
    except Exception:  # PyYAML raises anything where a text does not fit its tag
        raise ConfigError(f"-opts: {_show(key)}: cannot read the value {text[:80]!r}")


def _show(key: str) -> str:
    """A key for a message: as it is, if it could be one."""
    return key if key.isprintable() and len(key) <= 80 else repr(key[:80])
