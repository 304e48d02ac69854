"""Classifies images with an exported model, with Paddle Inference or onnxruntime.

    python infer_exported.py exported/model.onnx photo.jpg other.png
    python infer_exported.py exported/model.json photo.jpg -bf16

This one file is all that a server needs beside the exported model: NumPy, Pillow, and Paddle or
onnxruntime. It imports nothing of the training code. How to prepare an image, and the names of the
classes, stand in the model's metadata, which tools/export.py writes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import reprlib
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

_RESAMPLING = {
    "nearest": Image.NEAREST,
    "bilinear": Image.BILINEAR,
    "bicubic": Image.BICUBIC,
    "lanczos": Image.LANCZOS,
    "box": Image.BOX,
    "hamming": Image.HAMMING,
}

_TURNS = {  # by EXIF's orientation
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_270,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_90,
}

_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's own decoders
try:
    from PIL import AvifImagePlugin

    _FORMATS += ("AVIF",) * AvifImagePlugin.SUPPORTED
except ImportError:  # before Pillow 11.3
    pass


def _three_numbers(above: float) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, list)
        and len(value) == 3
        and all(type(number) in (int, float) and above < number < math.inf for number in value)
    )


_RULES = {  # key of the metadata -> what it is to be, and whether a value is that
    "preprocessing_inside": ("true or false", lambda v: isinstance(v, bool)),
    "image_size": ("a whole number from 1 to 8192", lambda v: type(v) is int and 1 <= v <= 8192),
    "crop_pct": (
        "a number from 0.01 to 1",
        lambda v: type(v) in (int, float) and 0.01 <= v <= 1,
    ),
    "interpolation": (f"one of {', '.join(_RESAMPLING)}", lambda v: v in list(_RESAMPLING)),
    "exif_orientation": ("true or false", lambda v: isinstance(v, bool)),
    "mean": ("three numbers", _three_numbers(above=-math.inf)),
    "std": ("three numbers above 0", _three_numbers(above=0)),
    "class_names": (
        "a list of names",
        lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    ),
}

# A larger batch goes through a CPU in pieces whose activations stay in its caches: a resmlp_12 in
# int8 takes a fifth less time for 32 images so, in float32 an eighth less.
_IMAGES_PER_THREAD = 4

Run = Callable[[np.ndarray], np.ndarray]  # an array as the file takes it -> its output [B, K]


class ModelError(Exception):
    """A model or image that cannot be used; the message is one line."""


# ---------------------------------------------------------------------------------- models
@dataclass(eq=False)
class ExportedModel:
    """A model with its metadata: ``model(images)`` takes uint8 ``[B, H, W, 3]``.

    Attributes:
        metadata: what export.py wrote about the model.
        run: float32 or uint8 array in, as the file takes it -> its output ``[B, K]``.
    """

    metadata: dict
    run: Run

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Cropped images, uint8 ``[B, H, W, 3]`` -> probabilities, float32 ``[B, K]``.

        Raises:
            ModelError: the model gives NaN or infinite values.
        """
        inside = self.metadata["preprocessing_inside"]
        if not inside:
            mean = np.array(self.metadata["mean"], np.float32)
            std = np.array(self.metadata["std"], np.float32)
            normalized = (images.astype(np.float32) / 255 - mean) / std
            images = np.ascontiguousarray(normalized.transpose(0, 3, 1, 2))
        output = self.run(images)
        if not np.isfinite(output).all():
            raise ModelError("the model gives NaN or infinite values; export it again")
        if inside:
            return output
        exp = np.exp(output - output.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)


def load(
    path: str | os.PathLike, bf16: bool = False, gpu: bool = False, threads: int | None = None
) -> ExportedModel:
    """Opens an exported model.

    Args:
        path: ``model.onnx`` or ``model.int8.onnx``; or ``model.json`` or ``model.pdmodel`` of
            Paddle.
        bf16: compute in bfloat16 (Paddle Inference on CPU), logits to about two digits. Faster or
            slower, as the processor has it: measure (a Xeon with the AVX-512 instructions for it,
            but without AMX, was slower than in float32).
        gpu: run on the first GPU.
        threads: CPU threads; None: one per core that the process may use.

    Raises:
        ModelError: no such model, no metadata or such as do not fit it, a missing package.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".json", ".pdmodel"):
        raise ModelError(f"{path}: expected model.onnx, model.json or model.pdmodel")
    if not path.is_file():
        raise ModelError(f"{path}: no such model")
    if path.suffix == ".onnx":
        if bf16:
            raise ModelError("-bf16 is for Paddle models")
        described = path
        run, metadata = open_onnx(path, gpu, threads)
    else:
        earlier = path.with_suffix(".metadata.json")  # what it was called once
        kept = earlier.is_file() and not path.with_suffix(".metadata").is_file()
        described = earlier if kept else _beside(path, ".metadata")
        try:
            metadata = json.loads(described.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{described}: {getattr(error, 'strerror', None) or error}") from None
        if isinstance(metadata, dict):
            _check_files(path, metadata.get("sha256", {}))
        run = open_paddle(path, bf16, gpu, threads)
    _check(metadata, described)
    model = ExportedModel(metadata, run)
    size, inside = metadata["image_size"], metadata["preprocessing_inside"]
    try:
        classes = model(np.zeros([1, size, size, 3], np.uint8)).shape[1]
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except Exception:  # Paddle's and onnxruntime's own, which do not say why
        raise ModelError(
            f"{described}: the model cannot run with image_size {size}, "
            f"preprocessing_inside {json.dumps(inside)}"
        ) from None
    names = len(metadata["class_names"])
    if names != classes:
        raise ModelError(f"{described}: {names} class_names, but the model has {classes} classes")
    return model


def _beside(path: Path, suffix: str) -> Path:
    """A file that belongs to a Paddle model."""
    file = path.with_suffix(suffix)
    if not file.is_file():
        raise ModelError(f"{file}: not there; copy it together with the model")
    return file


def _check_files(path: Path, checksums: dict[str, str]) -> None:
    """Compares a Paddle model's files with the checksums in its metadata: Paddle reads parameters
    that are cut short without a word. (Models exported earlier have none.)
    """
    for suffix, expected in checksums.items():
        file = _beside(path, suffix)
        if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise ModelError(
                f"{file}: not the file that was exported (its checksum differs): cut or changed on "
                "the way? Copy it again"
            )


def _check(metadata: object, described: Path) -> None:
    """Raises a `ModelError` that names the first key that is not as export.py writes it."""
    if not isinstance(metadata, dict):
        found = reprlib.repr(metadata)
        raise ModelError(f"{described}: not from export.py: it is {found}, not an object")
    metadata.setdefault("exif_orientation", False)  # models exported earlier have none
    missing = [key for key in _RULES if key not in metadata]
    if missing:
        raise ModelError(
            f"{described}: not from export.py: its metadata lacks {', '.join(missing)}"
        )
    for key, (expected, fits) in _RULES.items():
        if not fits(metadata[key]):
            found = reprlib.repr(metadata[key])
            raise ModelError(f"{described}: {key} is {found}; expected {expected}")


def open_onnx(path: Path, gpu: bool = False, threads: int | None = None) -> tuple[Run, dict]:
    """Opens a file in onnxruntime; returns what runs it, and its metadata."""
    try:
        import onnxruntime
    except ImportError:
        raise ModelError(f"{path}: running it needs `pip install onnxruntime`") from None
    threads = threads or usable_cores()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    providers = ["CUDAExecutionProvider"] * gpu + ["CPUExecutionProvider"]
    if not set(providers) <= set(onnxruntime.get_available_providers()):
        raise ModelError("-gpu needs `pip install onnxruntime-gpu`, in the place of onnxruntime")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        texts = session.get_modelmeta().custom_metadata_map
    except Exception as error:  # onnxruntime's own classes, which it does not export
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: onnxruntime cannot open it: {reason}") from None
    if gpu and providers[0] not in session.get_providers():  # it falls back without an exception
        raise ModelError(
            "-gpu: onnxruntime cannot load its CUDA provider (the reason stands above): install "
            "the CUDA and cuDNN that this onnxruntime-gpu was built for"
        )
    name = session.get_inputs()[0].name

    def run(images: np.ndarray) -> np.ndarray:
        size = len(images) if gpu else _IMAGES_PER_THREAD * threads
        pieces = [images[start : start + size] for start in range(0, len(images), size)]
        return np.concatenate([session.run(None, {name: piece})[0] for piece in pieces])

    return run, {key: _parse(text) for key, text in texts.items()}


def _engine(path: str) -> str:
    return "onnxruntime" if path.endswith(".onnx") else "Paddle Inference"


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max"
        return cores


def _parse(text: str) -> object:
    """JSON as export.py writes it, or the text as it is: a file from elsewhere is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def open_paddle(
    path: Path, bf16: bool = False, gpu: bool = False, threads: int | None = None
) -> Run:
    """Opens a file in Paddle Inference; returns what runs it."""
    weights = _beside(path, ".pdiparams")  # without them Paddle would compute NaN
    warnings.filterwarnings("ignore", message="No ccache found")  # nothing is compiled here
    try:
        import paddle
        from paddle import inference
    except ImportError:
        raise ModelError(f"{path}: running it needs `pip install paddlepaddle`") from None
    config = inference.Config(str(path), str(weights))
    config.disable_glog_info()
    if gpu and not paddle.is_compiled_with_cuda():
        raise ModelError("-gpu needs a Paddle that was built with CUDA; this one is for CPUs")
    if gpu:
        config.enable_use_gpu(256, 0)  # MB to begin with, device
    else:
        config.disable_gpu()
        config.enable_mkldnn()
        config.set_cpu_math_library_num_threads(threads or usable_cores())
        if bf16:
            config.enable_mkldnn_bfloat16()
    try:
        predictor = inference.create_predictor(config)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(f"{path}: Paddle Inference cannot open it: {reason}") from None
    source = predictor.get_input_handle(predictor.get_input_names()[0])
    target = predictor.get_output_handle(predictor.get_output_names()[0])

    guards = [notes_to_stderr()]  # of the first run, which prints a note

    def run(images: np.ndarray) -> np.ndarray:
        source.copy_from_cpu(images)
        with guards.pop() if guards else contextlib.nullcontext():
            predictor.run()
        return target.copy_to_cpu()

    return run


@contextlib.contextmanager
def notes_to_stderr() -> Iterator[None]:
    """Sends what Paddle's C++ code prints to standard error: standard output is for results."""
    try:
        stdout = os.dup(1)
    except OSError:  # closed
        yield
        return
    try:
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows
            ctypes.CDLL(None).fflush(None)  # what C++ still holds
        os.dup2(stdout, 1)
        os.close(stdout)


# ---------------------------------------------------------------------------------- images
def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB as training reads it: 16-bit grey by its upper 8 bits, where Pillow would
    make it white.

    Raises:
        ModelError: 32-bit integers or floating point, whose black and white are not known.
    """
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(258, (16,))[0]  # of a TIFF: also 12
        grey = (np.asarray(image).astype(np.int32) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(255 - grey if tags.get(262) == 0 else grey)  # 0: white is zero
    elif image.mode in ("I", "F"):
        raise ModelError(
            "32-bit integers or floating point, whose black and white are not known; save it "
            "with 8 or 16 bits"
        )
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image in RGB, turned as its EXIF orientation says; with none, as it is."""
    rgb = to_rgb(image)  # read first: Pillow turns a TIFF by itself
    try:
        return rgb.transpose(_TURNS[image.getexif()[0x112]])
    except Exception:  # no such entry; or broken EXIF data, on which Pillow raises anything
        return rgb


def preprocess(image: Image.Image, metadata: dict) -> np.ndarray:
    """Resizes the short side to ``floor(image_size / crop_pct)`` and cuts out the middle, as the
    evaluation in training does (and timm and torchvision), pixel by pixel; before that the image
    is turned upright, where training does so.

    Returns:
        uint8 ``[image_size, image_size, 3]``.

    Raises:
        ModelError: the image is so narrow that its resized long side would fill the memory.
    """
    size = metadata["image_size"]
    short = int(size / metadata["crop_pct"])
    image = upright(image) if metadata.get("exif_orientation") else image
    width, height = image.size
    if width <= height:
        resized = short, int(short * height / width)
    else:
        resized = int(short * width / height), short
    if max(resized) > 100 * size:
        raise ModelError(
            f"{width} x {height} pixels, too narrow: resized to {resized[0]} x {resized[1]}, "
            f"longer than 100 crops of {size}"
        )
    image = to_rgb(image)
    if resized != image.size:
        image = image.resize(resized, _RESAMPLING[metadata["interpolation"]])
    left, top = (int(round((side - size) / 2.0)) for side in resized)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def classify(
    model: ExportedModel,
    paths: Sequence[str],
    top_k: int = 5,
    batch_size: int = 8,
    on_bad: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Yields for every image its path and ``(label, probability)``, the most likely first.

    Args:
        model: as `load` gives it.
        paths: image files.
        top_k: labels per image.
        batch_size: images at a time.
        on_bad: takes a line about each image that cannot be read, which is left out.

    Raises:
        ModelError: an image that cannot be read, without `on_bad`.
    """
    for start in range(0, len(paths), batch_size):
        batch, images = [], []
        for path in paths[start : start + batch_size]:
            try:
                if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block for ever
                    raise ModelError("not a regular file")
                with Image.open(path, formats=_FORMATS) as image:
                    images.append(preprocess(image, model.metadata))
            except Exception as error:  # decoders raise whatever a broken file leads them to
                reason = getattr(error, "strerror", None) or error
                problem = f"{path}: cannot be read: {reason}"
                if on_bad is None:
                    raise ModelError(problem) from None
                on_bad(problem)
            else:
                batch.append(path)
        for path, row in zip(batch, model(np.stack(images)) if images else ()):
            order = np.argsort(-row, kind="stable")[:top_k]
            yield path, [(int(label), float(row[label])) for label in order]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "model", type=os.path.expanduser, help="model.onnx, model.json or model.pdmodel"
    )
    parser.add_argument("images", nargs="+", type=os.path.expanduser, help="image files")
    parser.add_argument("-top_k", "--top_k", "--top-k", type=int, default=5, metavar="K")
    parser.add_argument("-batch_size", "--batch_size", "--batch-size", type=int, default=8)
    parser.add_argument(
        "-threads", "--threads", type=int, help="CPU threads (default: all it may use)"
    )
    parser.add_argument("-bf16", "--bf16", action="store_true", help="bfloat16, Paddle on CPU")
    parser.add_argument("-gpu", "--gpu", action="store_true", help="run on the first GPU")
    args = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # names that it cannot encode are shown escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        threads = 1 if args.threads is None else args.threads
        if min(args.top_k, args.batch_size, threads) < 1 or threads > 1024:
            raise ModelError(
                "-top_k, -batch_size and -threads are at least 1, -threads at most 1024"
            )
        model = load(args.model, args.bf16, args.gpu, args.threads)
        bad = []

        def on_bad(problem: str) -> None:
            bad.append(problem)
            print(f"error: {problem}", file=sys.stderr)

        where = "the GPU" if args.gpu else "the CPU"
        print(f"{args.model}: {_engine(args.model)} on {where}", file=sys.stderr)
        width = max(map(len, args.images))
        print(f"{'image':{width}}  confidence  class")
        for path, entries in classify(model, args.images, args.top_k, args.batch_size, on_bad):
            for label, share in entries:
                name = model.metadata["class_names"][label]
                print(f"{path:{width}}  {100 * share:8.2f} %  {name}", flush=True)
                path = ""  # named once
        if bad:
            raise ModelError(f"{len(bad)} of {len(args.images)} images cannot be read")
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
