"""Classifies images with an exported model, in onnxruntime, Paddle Inference or OpenVINO.

    python infer_exported.py exported/model.onnx photo.jpg folder/ -csv

A server needs this one file beside the model, NumPy, Pillow, and one of the three. How to prepare
an image, and the names of the classes, stand in the metadata that tools/export.py writes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import hashlib
import importlib
import json
import os
import re
import stat
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image, ImageOps

# EXIF's orientations: whether to mirror left and right first, and quarter turns, counter-clockwise.
_TURNS = {2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF")  # Pillow's own
_ENDINGS = tuple(e for e, kind in Image.registered_extensions().items() if kind in _FORMATS)
_FORMATS = [kind for kind in _FORMATS if kind in Image.OPEN]  # AVIF: from Pillow 11.3 on

# Larger batches go in pieces whose activations fit a CPU's caches: an eighth (float32) to a fifth
# (int8) less time for 32 images with resmlp_12.
_IMAGES_PER_THREAD = 4

_NO_GPU = "-gpu needs onnxruntime-gpu or paddlepaddle-gpu, with the CUDA and cuDNN it was built for"
_NO_BF16 = "-bf16 needs a Paddle model, or -engine openvino and a processor that has bfloat16"

Run = Callable[[np.ndarray], np.ndarray]  # an array as the file takes it -> its output [B, K]
Opened = tuple[Run, dict]  # with the file's metadata, in ONNX files a JSON text an entry


class ModelError(Exception):
    """A model or image that cannot be used; the message is one line."""


@dataclass
class ExportedModel:
    metadata: dict
    run: Run
    engine: str = ""  # a line that says what runs it, and where

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Cropped images, uint8 ``[B, H, W, 3]`` -> probabilities, float32 ``[B, K]``."""
        inside = self.metadata["preprocessing_inside"]
        if not inside:
            mean, std = (np.array(self.metadata[name], np.float32) for name in ("mean", "std"))
            normalized = (images.astype(np.float32) / 255 - mean) / std
            images = np.ascontiguousarray(normalized.transpose(0, 3, 1, 2))
        output = self.run(images)
        if (names := len(self.metadata["class_names"])) != (classes := output.shape[1]):
            raise ModelError(f"its metadata names {names} classes, but the model has {classes}")
        if not np.isfinite(output).all():
            raise ModelError("the model gives NaN or infinite values; export it again")
        if inside:
            return output
        exp = np.exp(output - output.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)


def load(
    path: str | os.PathLike,
    bf16: bool = False,
    gpu: bool = False,
    threads: int | None = None,
    engine: str | None = None,
) -> ExportedModel:
    """Opens ``model.onnx``, ``model.int8.onnx``, or Paddle's ``model.json`` or ``model.pdmodel``;
    arguments as the flags. Raises ModelError: no such model, no metadata, a missing package, what
    the engine cannot do.
    """
    path, threads = Path(path), threads or usable_cores()
    if path.suffix not in (".onnx", ".json", ".pdmodel") or not path.is_file():
        raise ModelError(f"{path}: not a file model.onnx, model.json or model.pdmodel")
    openers = {"onnxruntime": open_onnx, "openvino": open_openvino}
    if path.suffix != ".onnx":
        openers = {"Paddle Inference": open_paddle}
    engine = engine or next(iter(openers))
    if engine not in openers:
        raise ModelError(f"-engine {engine} is for ONNX files; Paddle runs {path}")
    run, metadata = openers[engine](path, bf16, gpu, threads)
    if "preprocessing_inside" not in metadata:
        raise ModelError(f"{path}: no metadata of export.py (Paddle's: copy model.metadata too)")
    if path.suffix == ".onnx":
        metadata = {key: json.loads(text) for key, text in metadata.items()}
    place = "the GPU" if gpu else f"the CPU, {threads} thread{'s' * (threads > 1)}"
    return ExportedModel(metadata, run, f"{engine} on {place}")


# What follows opens a file; ``threads`` 0: one per core.


def open_onnx(path: Path, bf16: bool = False, gpu: bool = False, threads: int = 0) -> Opened:
    if bf16:
        raise ModelError(_NO_BF16)
    threads = threads or usable_cores()
    providers = ["CUDAExecutionProvider"] * gpu + ["CPUExecutionProvider"]
    with _engine("onnxruntime", path) as onnxruntime:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        if gpu and providers[0] not in session.get_providers():  # it falls back without exception
            raise ModelError(_NO_GPU)
    name = session.get_inputs()[0].name

    def run(images: np.ndarray) -> np.ndarray:
        size = len(images) if gpu else _IMAGES_PER_THREAD * threads
        pieces = [images[start : start + size] for start in range(0, len(images), size)]
        return np.concatenate([session.run(None, {name: piece})[0] for piece in pieces])

    return run, session.get_modelmeta().custom_metadata_map


def open_openvino(path: Path, bf16: bool = False, gpu: bool = False, threads: int = 0) -> Opened:
    if gpu:
        raise ModelError(_NO_GPU)
    options = {
        "PERFORMANCE_HINT": "LATENCY",  # one request at a time, with all threads
        "INFERENCE_NUM_THREADS": threads or usable_cores(),
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
    }
    with _engine("openvino", path) as openvino:
        network = openvino.Core().read_model(str(path))
        model = openvino.Core().compile_model(network, "CPU", options)
        if bf16 and model.get_property("INFERENCE_PRECISION_HINT") != openvino.Type.bf16:
            raise ModelError(_NO_BF16)
    texts = dict(network.get_rt_info()).get("framework", {})
    return lambda images: model(images)[0], {k: text.astype(str) for k, text in texts.items()}


def open_paddle(path: Path, bf16: bool = False, gpu: bool = False, threads: int = 0) -> Opened:
    warnings.filterwarnings("ignore", message="No ccache found")  # nothing is compiled here
    with _engine("paddle", path) as paddle:
        described = path.with_suffix(".metadata")
        metadata = json.loads(described.read_text("utf-8")) if described.is_file() else {}
        for suffix, checksum in metadata.get("sha256", {}).items():  # Paddle reads files cut short
            file = path.with_suffix(suffix)
            if hashlib.sha256(file.read_bytes()).hexdigest() != checksum:
                raise ModelError(f"{file}: not the file that was exported; copy it again")
        if gpu and not paddle.is_compiled_with_cuda():
            raise ModelError(_NO_GPU)
        config = paddle.inference.Config(str(path), str(path.with_suffix(".pdiparams")))
        config.disable_glog_info()
        if gpu:
            config.enable_use_gpu(256, 0)  # MB to begin with, device
        else:
            config.disable_gpu()
            config.enable_mkldnn()
            config.set_cpu_math_library_num_threads(threads or usable_cores())
            if bf16:
                config.enable_mkldnn_bfloat16()
        predictor = paddle.inference.create_predictor(config)
    source = predictor.get_input_handle(predictor.get_input_names()[0])
    target = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(images: np.ndarray) -> np.ndarray:
        source.copy_from_cpu(images)
        with notes_to_stderr():  # the first run prints one
            predictor.run()
        return target.copy_to_cpu()

    return run, metadata


@contextlib.contextmanager
def _engine(name: str, path: Path) -> Iterator:
    """The engine's package. Its exceptions have many lines, a ModelError has one."""
    try:
        yield importlib.import_module(name)
    except ModelError:
        raise
    except ImportError:
        package = "paddlepaddle" if name == "paddle" else name
        raise ModelError(f"{path}: running it needs `pip install {package}`") from None
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise ModelError(f"{path}: {name} cannot open it: {reason}") from None


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    groups = Path("/sys/fs/cgroup")  # of version 2, or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = map(int, " ".join((groups / n).read_text() for n in names).split())
            cores = min(cores, quota // period) if quota > 0 else cores
    return max(1, cores)


@contextlib.contextmanager
def notes_to_stderr() -> Iterator[None]:
    """Sends what Paddle's C++ code prints to standard error: standard output is for results."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows
            ctypes.CDLL(None).fflush(None)  # what C++ still holds
        os.dup2(stdout, 1)
        os.close(stdout)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB as training reads it: of 16-bit grey the upper 8 bits. Raises ModelError for
    32-bit integers and floating point, whose black and white are not known.
    """
    tags, bits = getattr(image, "tag_v2", {}), 16
    if tags:
        bits = tags.get(258, (16,))[0]  # also 12
    elif image.format == "PNG" and image.mode.startswith("I"):
        end = image.fp.tell()  # of the chunks before the pixels
        image.fp.seek(0)
        if found := re.search(rb"\0\0\0\x01sBIT([\x08-\x10])", image.fp.read(end)):
            bits = found[1][0]
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int32)
        shift = 8 if values.max() >> bits else bits - 8  # 8: more than those are used
        grey = (values >> shift).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(255 - grey if tags.get(262) == 0 else grey)  # 0: white is zero
    elif image.mode in ("I", "F"):
        unknown = "32-bit integers or floating point, whose black and white are not known"
        raise ModelError(f"{unknown}; save it with 8 or 16 bits")
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says; with none, as it is."""
    rgb = to_rgb(image)  # read first: Pillow turns a TIFF by itself
    try:
        mirrored, turns = _TURNS[image.getexif()[0x112]]
        return (ImageOps.mirror(rgb) if mirrored else rgb).rotate(90 * turns, expand=True)
    except Exception:  # no such entry; or broken EXIF data, on which Pillow raises anything
        return rgb


def preprocess(image: Image.Image, metadata: dict) -> np.ndarray:
    """Resizes the short side to ``floor(image_size / crop_pct)`` and cuts out the middle, uint8
    ``[image_size, image_size, 3]``, with the pixels of training's evaluation, timm and torchvision.
    """
    image = upright(image) if metadata.get("exif_orientation") else to_rgb(image)
    (width, height), size = image.size, metadata["image_size"]
    short = int(size / metadata["crop_pct"])
    resized = tuple(int(short * side / min(width, height)) for side in (width, height))
    if max(resized) > 100 * size:
        raise ModelError(
            f"{width} x {height} pixels, too narrow: resized to {resized[0]} x {resized[1]}, "
            f"longer than 100 crops of {size}"
        )
    image = image.resize(resized, Image.Resampling[metadata["interpolation"].upper()])
    left, top = (int(round((side - size) / 2.0)) for side in resized)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def classify(
    model: ExportedModel, paths: Sequence[str], top_k: int = 5, batch_size: int = 8
) -> Iterator[dict]:
    """Yields of every image what `top_classes` returns. What cannot be read is named on standard
    error.
    """
    for start in range(0, len(paths), batch_size):
        batch, images = [], []
        for path in paths[start : start + batch_size]:
            try:
                if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block for ever
                    raise ModelError("not a regular file")
                with Image.open(path, formats=_FORMATS) as image:
                    images.append(preprocess(image, model.metadata))
                batch.append(path)
            except Exception as error:  # decoders raise whatever a broken file leads them to
                reason = getattr(error, "strerror", None) or error
                print(f"error: {path}: cannot be read: {reason}", file=sys.stderr)
        for path, row in zip(batch, model(np.stack(images)) if images else ()):
            yield top_classes(path, row, model.metadata["class_names"], top_k)


def top_classes(path: str, row: np.ndarray, names: Sequence[str], top_k: int) -> dict:
    """``{"image": path, "predictions": [{"class": 3, "name": "Dress", "confidence": 0.93}, ...]}``
    of an image's probabilities ``[K]``, the `top_k` likeliest first.
    """
    top = np.argsort(-row, kind="stable")[:top_k].tolist()
    top = [{"class": k, "name": names[k], "confidence": float(row[k])} for k in top]
    return {"image": path, "predictions": top}


def print_results(results: Iterable[dict], paths: Sequence[str], form: str) -> Iterator[dict]:
    """Prints what `top_classes` found in ``paths`` as "json", "csv" or a table, and passes it on.
    JSON is whole also after an error.
    """
    number, width = 0, max(map(len, ["image", *map(_printable, paths)]))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    try:
        for number, result in enumerate(results, 1):
            path, entries = result["image"], result["predictions"]
            if form == "json":  # in ASCII, which every terminal and pipe takes
                text = textwrap.indent(json.dumps(result, indent=2), "  ")
                print("[\n" if number == 1 else ",\n", text, sep="", end="")
            elif form == "csv":
                if number == 1:
                    writer.writerow(("image", "rank", "class", "name", "confidence"))
                for rank, entry in enumerate(entries, 1):
                    confidence = f"{entry['confidence']:.6f}"
                    writer.writerow((path, rank, entry["class"], entry["name"], confidence))
            else:
                if number == 1:
                    print(f"{'image':{width}}  confidence  class")
                path = _printable(path)
                for entry in entries:
                    print(f"{path:{width}}  {100 * entry['confidence']:8.2f} %  {entry['name']}")
                    path = ""  # named once
            sys.stdout.flush()
            yield result
    finally:
        if form == "json":
            print("\n]" if number else "[]", flush=True)


def _printable(path: str) -> str:
    path = os.fsencode(path).decode("utf-8", "backslashreplace")  # a name may be any bytes
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path)


def find_images(sources: Iterable[str]) -> tuple[list[str], list[str]]:
    """Files as named and all images of folders; and the rest: other files, linked folders."""
    images, others = [], []

    def refuse(error: OSError) -> None:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}")

    for source in sources:
        if not os.path.isdir(source):
            images.append(source)
            continue
        for folder, folders, names in os.walk(source, onerror=refuse):
            folders.sort()
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for name in sorted(names + links):
                is_image = name.lower().endswith(_ENDINGS) and not name.startswith(".")
                (images if is_image else others).append(os.path.join(folder, name))
    return images, others


def _arguments() -> argparse.Namespace:
    about = "Classifies images with an exported model."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    path = os.path.expanduser
    parser.add_argument("model", type=path, help="model.onnx, model.json or model.pdmodel")
    parser.add_argument("images", nargs="+", type=path, help="image files, and folders of them")

    def flag(name: str, help: str, part=parser, **options) -> None:
        spellings = dict.fromkeys((f"-{name}", f"--{name}", f"--{name.replace('_', '-')}"))
        part.add_argument(*spellings, help=help, **options)

    flag("top_k", "classes to name per image (default: 5)", type=int, default=5, metavar="K")
    flag("batch_size", "images at a time (default: 8)", type=int, default=8, metavar="N")
    form = dict(part=parser.add_mutually_exclusive_group(), dest="form", action="store_const")
    flag("json", "print JSON: paths, labels, names, probabilities", const="json", **form)
    flag("csv", "print CSV, a line for each image and class", const="csv", **form)
    flag("engine", "for model.onnx (default: onnxruntime)", choices=("onnxruntime", "openvino"))
    flag("threads", "CPU threads (default: all cores it may use)", type=int, metavar="N")
    flag("bf16", "bfloat16 on a CPU: Paddle models, -engine openvino", action="store_true")
    flag("gpu", "run on the first GPU, or fail", action="store_true")
    args = parser.parse_args()
    if min(args.top_k, args.batch_size, args.threads or 1) < 1:
        parser.error("-top_k, -batch_size and -threads are at least 1")
    return args


def main() -> int:
    args = _arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # names that it cannot encode: escaped
    try:
        images, others = find_images(args.images)
        if not images:
            raise ModelError(f"{args.images[0]}: no images")
        model = load(args.model, args.bf16, args.gpu, args.threads, args.engine)
        print(f"{args.model}: {model.engine}", file=sys.stderr)
        results = classify(model, images, args.top_k, args.batch_size)
        bad = len(images) - sum(1 for _ in print_results(results, images, args.form))
        if others:
            line = f"{len(others)} others are passed over, such as {others[0]}: no image's ending"
            print(line, file=sys.stderr)
        if bad:
            raise ModelError(f"{bad} of {len(images)} images cannot be read")
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... | head` closed the output: nothing left to say
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
