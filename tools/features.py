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
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle

from cli.errors import DataError, UserError, run_as_script
from cli.parser import Parser
from cli.progress import ProgressLine, line_start
from cpu import resample
from datasets import build_dataset, loader_of
from loading.classes import UNKNOWN, ClassNames
from loading.images import open_regular
from loading.samplers import EvalBatchSampler
from port_weights.verify import checksum
from resmlp import build_resmlp
from storage.adapt import load_pretrained, read_pretrained
from storage.files import atomic, printable
from tools.common import run_config
from transforms import build_eval_transform
from utils import Normalize

_TYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1"}  # of safetensors; NumPy's


class Features(NamedTuple):
    features: np.ndarray  # [N, C], float32 or float16, mapped: read from the disk where it is used
    labels: np.ndarray  # int64 [N]
    weights: str = ""  # the name of their file, and at the end the SHA-256 of their values
    classes: ClassNames = UNKNOWN


@paddle.no_grad()
def write_features(config, split: str, output: str, dtype: str = "float32") -> tuple[int, int]:
    """Computes the features of a split, in the order of its list or folders; returns N and C.

    They go to the disk batch by batch, under a temporary name until all are there. UserError for
    weights or data that cannot be used, features that are not finite, a file that is not written.
    """
    if not output.endswith(".safetensors"):
        raise UserError(f"-output {output}: expected a name that ends in .safetensors")
    model = build_resmlp(config)
    weights = read_pretrained(config.MODEL.PRETRAINED, config.MODEL.PRETRAINED_KEY)
    state = {name: value for name, value in weights.state.items() if not name.startswith("head.")}
    notes = load_pretrained(model, config, new_head=True, file=replace(weights, state=state))
    for note in notes[2:]:  # the first are on the file, and on a head that is not used
        print(note)
    model.eval()
    resample.prepare(lambda line: None)  # before workers are forked
    dataset, transform = build_dataset(config, split), build_eval_transform(config)
    dataset = replace(dataset, transform=transform, leave_out=True)
    files, batch_size = dataset.files, config.DATA.BATCH_SIZE_EVAL or config.DATA.BATCH_SIZE
    sampler = EvalBatchSampler(len(files), batch_size)

    def log(line: str) -> None:
        print(f"{line_start(sys.stderr)}{line}", file=sys.stderr)

    loader = loader_of(config, dataset, sampler, log=log, say_workers=False)
    loader.skip_limit = len(files)
    name = printable(Path(config.MODEL.PRETRAINED).name)
    about = {
        "weights": f"{name}, SHA-256 {checksum(state)}",
        "classes": json.dumps(dataset.classes.record()),
    }
    length = len(json.dumps(about)) // 8 * 8 + 512  # of a header with room for all sizes
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    bar, kept = ProgressLine("features"), []  # images whose features are written
    try:
        with atomic(output) as file:
            file.seek(8 + length)
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
            entries, end = {"__metadata__": about}, 0
            for name, kind, *shape in (
                ("features", f"F{dtype[5:]}", len(kept), model.embed_dim),
                ("labels", "I64", len(kept)),
                ("names", "U8", len(names)),
            ):
                begin, end = end, end + math.prod(shape) * np.dtype(_TYPES[kind]).itemsize
                entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
            file.seek(0)
            file.write(length.to_bytes(8, "little") + json.dumps(entries).encode().ljust(length))
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    finally:
        bar.end()
    return len(kept), model.embed_dim


def read_features(path: str) -> Features:
    """Opens a file of `write_features`, mapped from the disk; DataError if it is not whole."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(min(length, 2**24)))
        named, arrays = dict(about.get("__metadata__", {})), []
        for entry in (about["features"], about["labels"]):
            start = 8 + length + entry["data_offsets"][0]
            shape = tuple(entry["shape"])
            arrays.append(np.memmap(path, _TYPES[entry["dtype"]], "r", start, shape))
        features, labels = arrays
        if features.shape != (len(labels), features.shape[-1]) or labels.min() < 0:
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
    parser.flag("dtype", "of the features", choices=("float32", "float16"), default="float32")
    args = parser.parse_args()
    opts = ["MODEL.NUM_CLASSES", "auto", "DATA.DATA_PATH", args.data_path, *args.opts]
    config = run_config(args.pretrained, args.cfg, opts)
    count, channels = write_features(config, args.split, args.output, args.dtype)
    print(f"{args.output}: {count} images, {channels} features each")


if __name__ == "__main__":
    run_as_script(main)
