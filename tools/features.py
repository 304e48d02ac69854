"""Writes the features of a data set: after mean pooling, before the head.

python tools/features.py -pretrained resmlp_12_dino_224 -cfg configs/resmlp_12_224.yaml \
    -data_path /dataset/imagenet -split train -output train.safetensors

The images are cropped as in evaluation, those to train on too; one that cannot be read is named and
left out. The output has `features` [N, C], `labels` [N] and `names` (bytes, a path a line), and the
names of weights and classes. tools/knn.py reads it.
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
from resmlp import build_resmlp
from storage.adapt import load_pretrained, read_pretrained
from storage.files import atomic, printable
from tools.common import run_config
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
        dtype: ``"float32"`` or ``"float16"``.

    Returns N, without the images that cannot be read, and C. Raises UserError for weights or data
    that cannot be used, a feature that is not finite, a file that cannot be written.
    """
    if not output.endswith(".safetensors"):
        raise UserError(f"-output {output}: expected a name that ends in .safetensors")
    model, weights = _without_head(config)
    resample.prepare(lambda line: None)  # before workers are forked
    evaluate = build_eval_transform(config)
    dataset = replace(
        build_dataset(config, split), transform=lambda image, rng: evaluate(image), leave_out=True
    )
    files, batch_size = dataset.files, config.DATA.BATCH_SIZE_EVAL or config.DATA.BATCH_SIZE
    loader = loader_of(config, dataset, EvalBatchSampler(len(files), batch_size))
    loader.skip_limit, loader.log = len(files), lambda line: None
    about = {"weights": weights, "classes": json.dumps(dataset.classes.record())}
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    bar, channels = ProgressLine("features"), model.embed_dim
    kept: list[int] = []  # images whose features are written
    longest = _header(about, dtype, len(files), channels, 10**12)
    try:
        with atomic(output) as file:
            file.write(longest)
            for images, _, indices in loader:
                with np.errstate(over="ignore"):  # found as not finite
                    found = model.forward_features(normalize(images)).numpy().astype(dtype)
                if not np.isfinite(found).all():
                    where = config.MODEL.PRETRAINED
                    raise UserError(f"{where}: a feature is not finite in {dtype}")
                file.write(found.tobytes())
                kept += indices
                bar(kept[-1] + 1, len(files))
            names = b"".join(files.name(index) + b"\n" for index in kept)
            file.write(np.asarray(files.labels, "<i8")[kept].tobytes() + names)
            file.seek(0)
            header = _header(about, dtype, len(kept), channels, len(names))
            file.write(longest[:8] + header[8:].ljust(len(longest) - 8))
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    finally:
        bar.end()
    for _, reason in sorted(loader.skipped.items()):
        print(f"left out: {reason}", file=sys.stderr)
    return len(kept), channels


def _without_head(config):
    """The model of a config whose output are features, and `Features.weights`."""
    config = config.clone()
    config.defrost()
    config.MODEL.NUM_CLASSES = 0
    model = build_resmlp(config)
    file = read_pretrained(config.MODEL.PRETRAINED, config.MODEL.PRETRAINED_KEY)
    state = {name: value for name, value in file.state.items() if not name.startswith("head.")}
    for note in load_pretrained(model, config, file=replace(file, state=state))[1:]:
        print(note)
    model.eval()
    return model, f"{printable(Path(config.MODEL.PRETRAINED).name)}, SHA-256 {checksum(state)}"


def _header(about: dict, dtype: str, count: int, channels: int, names: int) -> bytes:
    """What stands before the features, the labels and ``names`` bytes; a multiple of 8 long."""
    entries, end = {"__metadata__": about}, 0
    for name, kind, shape, size in (
        ("features", _TYPES[dtype], [count, channels], np.dtype(dtype).itemsize * count * channels),
        ("labels", "I64", [count], 8 * count),
        ("names", "U8", [names], names),
    ):
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def read_features(path: str) -> Features:
    """Opens a file of `write_features`, mapped from the disk; DataError if it is not whole."""
    try:
        regular_size(path)
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(min(start - 8, 2**24)))
        named, arrays = dict(about.get("__metadata__", {})), []
        for name in ("features", "labels"):
            dtype = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}[about[name]["dtype"]]
            begin = start + about[name]["data_offsets"][0]
            arrays.append(np.memmap(path, dtype, "r", begin, tuple(about[name]["shape"])))
        features, labels = arrays
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise ValueError
        if (features.dtype.kind, labels.dtype.kind) != ("f", "i") or labels.min() < 0:
            raise ValueError
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        raise DataError(f"{path}: no whole file of features (tools/features.py)") from None
    classes = ClassNames.of_record(named.get("classes"), path)
    return Features(features, np.asarray(labels), str(named.get("weights", "")), classes)


def main() -> None:
    parser = Parser(__doc__)
    parser.model_flags()
    parser.flag("data_path", "data folder", metavar="DIR", required=True)
    parser.flag("split", "train or val", choices=("train", "val"), default="val")
    parser.flag("output", "file to write, .safetensors", metavar="FILE", required=True)
    parser.flag("dtype", "of the features", choices=tuple(_TYPES), default="float32")
    args = parser.parse_args()
    opts = ["MODEL.NUM_CLASSES", "auto", "DATA.DATA_PATH", args.data_path, *args.opts]
    config = run_config(args.pretrained, args.cfg, opts)
    count, channels = write_features(config, args.split, args.output, args.dtype)
    print(f"{args.output}: {count} images, {channels} features each")


if __name__ == "__main__":
    run_as_script(main)
