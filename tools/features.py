"""Writes the features of a data set: after mean pooling, before the head.

python tools/features.py -pretrained resmlp_12_dino_224 -cfg configs/resmlp_12_224.yaml \
    -data_path /dataset/imagenet -split train -output train.safetensors

The images are cropped as in evaluation, those to train on too; one that cannot be read is named and
left out. The output is one safetensors file with `features` [N, C], `labels` [N] and `names`
(bytes, a path a line), and the names of weights and classes; or, as `.npy`, the features beside
`.labels.npy`, `.names.txt`, `.weights.txt` and `.classes.json`. tools/knn.py reads both.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle

from cli.errors import DataError, UserError, run_as_script
from cli.parser import Parser
from cpu import resample
from datasets import build_dataset, loader_of
from loading.classes import UNKNOWN, ClassNames
from loading.images import regular_size
from loading.samplers import EvalBatchSampler
from port_weights.verify import checksum
from resmlp import build_resmlp, load_state
from storage.adapt import read_pretrained
from storage.files import atomic, printable
from storage.weights import naming
from tools.common import run_config, write_file
from transforms import build_eval_transform
from utils import Normalize, ProgressLine

_TYPES = {"float32": "F32", "float16": "F16"}  # NumPy's name -> that of safetensors


class Features(NamedTuple):
    features: np.ndarray  # [N, C], float32 or float16, mapped: read from the disk where it is used
    labels: np.ndarray  # int64 [N]
    weights: str = ""  # the name of their file, and at the end the SHA-256 of their values
    classes: ClassNames = UNKNOWN


@paddle.no_grad()
def write_features(config, split: str, output: str, dtype: str = "float32") -> tuple[int, int]:
    """Computes the features of a split, in the order of its list or folders.

    They go to the disk batch by batch, under a temporary name until all are there.

    Args:
        config: of the model and the data; MODEL.NUM_CLASSES is that of the data.
        output: ``.safetensors`` or ``.npy``.
        dtype: ``"float32"`` or ``"float16"``.

    Returns N, without the images that cannot be read, and C. Raises UserError for weights or data
    that cannot be used, a feature that is not finite, a file that cannot be written.
    """
    npy = output.endswith(".npy")
    if not npy and not output.endswith(".safetensors"):
        raise UserError(f"-output {output}: expected a name that ends in .safetensors or .npy")
    model, weights = _without_head(config)
    files, loader = _loader(config, split)
    about = {"weights": weights, "classes": json.dumps(loader.dataset.classes.record())}
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    kept: list[int] = []  # images whose features are written
    bar, channels = ProgressLine("features"), model.embed_dim
    longest = _header(npy, [len(files), channels], dtype, 10**12, about)
    try:
        with atomic(output) as file:
            file.write(longest)
            starts = range(0, len(files), loader.sampler.batch_size)
            for start, (images, _, indices) in zip(starts, loader):
                with np.errstate(over="ignore"):  # found as not finite
                    found = model.forward_features(normalize(images)).numpy().astype(dtype)
                # In the place of an unreadable image the loader has the next one.
                own = [row for row, index in enumerate(indices) if index == start + row]
                if not np.isfinite(found[own]).all():
                    raise UserError(
                        f"{config.MODEL.PRETRAINED}: a feature is not finite in {dtype}"
                    )
                file.write(found[own].tobytes())
                kept += [start + row for row in own]
                bar(start + len(indices), len(files))
            labels = np.array([files.labels[index] for index in kept], "<i8")
            names = b"".join(files.name(index) + b"\n" for index in kept)
            if npy:
                np.save(_beside(output, ".labels.npy"), labels)
                write_file(_beside(output, ".names.txt"), names)
                write_file(_beside(output, ".weights.txt"), weights)
                write_file(_beside(output, ".classes.json"), about["classes"])
            else:
                file.write(labels.tobytes() + names)
            file.seek(0)
            shape = [len(kept), channels]
            file.write(_header(npy, shape, dtype, len(names), about, len(longest)))
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    finally:
        bar.end()
    for _, reason in sorted(loader.skipped.items()):
        print(f"left out: {reason}", file=sys.stderr)
    return len(kept), channels


def _loader(config, split: str):
    dataset, evaluate = build_dataset(config, split), build_eval_transform(config)
    files = dataset.files
    resample.prepare(lambda line: None)  # before workers are forked
    options = dict(replace_limit=len(files), keep_last=False)
    dataset = replace(dataset, transform=lambda image, rng: evaluate(image), **options)
    batch = config.DATA.BATCH_SIZE_EVAL or config.DATA.BATCH_SIZE
    loader = loader_of(config, dataset, EvalBatchSampler(len(files), batch))
    loader.skip_limit, loader.log = len(files), lambda line: None
    return files, loader


def _without_head(config):
    """The model of a config whose output are features, and `Features.weights`."""
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = 0
    model = build_resmlp(config)
    file = read_pretrained(config.MODEL.PRETRAINED, config.MODEL.PRETRAINED_KEY)
    state = {name: value for name, value in file.state.items() if not name.startswith("head.")}
    with naming(file.path):
        notes = load_state(model, state, resize_tokens=config.MODEL.RESIZE_TOKENS)
    for note in notes:
        print(note)
    model.eval()
    return model, f"{printable(Path(config.MODEL.PRETRAINED).name)}, SHA-256 {checksum(state)}"


def _header(npy: bool, shape: list, dtype: str, names: int, about: dict, length: int = 0) -> bytes:
    """What stands before the features, the labels and ``names`` bytes; at least of a length."""
    if npy:
        descr = np.dtype(dtype).newbyteorder("<").str
        text = str({"descr": descr, "fortran_order": False, "shape": tuple(shape)})
        return b"\x93NUMPY\x01\0\x76\0" + text.encode().ljust(0x75) + b"\n"
    count, channels = shape
    entries, end = {"__metadata__": about}, 0
    for name, kind, sizes, size in (
        ("features", _TYPES[dtype], shape, np.dtype(dtype).itemsize * count * channels),
        ("labels", "I64", [count], 8 * count),
        ("names", "U8", [names], names),
    ):
        entries[name] = {"dtype": kind, "shape": sizes, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    text = text.ljust(max(length - 8, len(text) + -len(text) % 8))
    return len(text).to_bytes(8, "little") + text


def _beside(path: str, ending: str) -> str:
    return path[: -len(".npy")] + ending


def read_features(path: str) -> Features:
    """Opens a file of `write_features`, mapped from the disk; DataError if it is not whole."""
    try:
        regular_size(path)
        if path.endswith(".npy"):
            features = np.load(path, mmap_mode="r")
            labels = np.load(_beside(path, ".labels.npy"))
            texts = [Path(_beside(path, end)) for end in (".weights.txt", ".classes.json")]
            weights, classes = (t.read_text("utf-8") if t.is_file() else "" for t in texts)
        else:
            with open(path, "rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                about = json.loads(file.read(min(start - 8, 2**24)))
            named = about.get("__metadata__", {})
            weights, classes = str(named.get("weights", "")), named.get("classes", "")
            parts = []
            for name in ("features", "labels"):
                kind, (begin, _) = about[name]["dtype"], about[name]["data_offsets"]
                dtype = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}[kind]
                shape = tuple(about[name]["shape"])
                parts.append(np.memmap(path, dtype, "r", start + begin, shape))
            features, labels = parts
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise ValueError
        if (features.dtype.kind, labels.dtype.kind) != ("f", "i") or labels.min() < 0:
            raise ValueError
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{error.filename or path}: cannot be read: {reason}") from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError):
        raise DataError(f"{path}: no whole file of features (tools/features.py)") from None
    if labels.max() >= 10**9:  # as in a list
        raise DataError(f"{path}: {labels.max()} is no label; expected less than 1,000,000,000")
    classes = ClassNames.of_record(classes, path)
    return Features(features, np.asarray(labels, "int64"), weights, classes)


def main() -> None:
    parser = Parser(__doc__)
    parser.model_flags()
    parser.flag("data_path", "data folder", metavar="DIR", required=True)
    parser.flag("split", "train or val", choices=("train", "val"), default="val")
    parser.flag("output", "file to write, .safetensors or .npy", metavar="FILE", required=True)
    parser.flag("dtype", "of the features", choices=tuple(_TYPES), default="float32")
    args = parser.parse_args()
    opts = ["MODEL.NUM_CLASSES", "auto", "DATA.DATA_PATH", args.data_path, *args.opts]
    config = run_config(args.pretrained, args.cfg, opts)
    count, channels = write_features(config, args.split, args.output, args.dtype)
    print(f"{args.output}: {count} images, {channels} features each")


if __name__ == "__main__":
    run_as_script(main)
