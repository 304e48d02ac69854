"""Exports a trained model for deployment, and proves that the files compute the same.

    python tools/export.py -pretrained output/run/best.pdparams -format paddle onnx safetensors
    python tools/export.py -pretrained output/run/best.pdparams -format onnx_int8

Each file is run against the model it came from before it is left in place; how far it was off, and
what one needs to use it, stands in its metadata. tools/infer_exported.py runs it.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.static import InputSpec

from cli.errors import UserError, run_as_script
from cli.parser import Parser
from datasets import build_dataset
from storage.files import file_sha256
from storage.weights import read_weights
from tools.common import beside_weights, load_model, require, run_config, write_file
from tools.folding import fold
from tools.infer_exported import ModelError, Run, open_onnx, open_paddle
from tools.predict import find_class_names, find_images, read_view
from utils import Normalize

TOLERANCE = 1e-5  # largest difference to the eager model, relative to its largest output
# Percent of images for which int8 must have the eager model's top-1. Of 1,000 images, a trained
# model (99.6 to 99.9) falls below this once in a thousand times.
MIN_AGREEMENT = 99.0
VERIFY_IMAGES, INT8_IMAGES, BATCH = 16, 1000, 32
ONNX_PACKAGES = ("paddle2onnx", "onnx", "onnxruntime")
INT8_PACKAGES = (*ONNX_PACKAGES, "ml_dtypes")


class WithPreprocessing(nn.Layer):
    """Normalisation, a model, softmax: uint8 ``[B, H, W, 3]`` -> probabilities ``[B, K]``."""

    def __init__(self, model: nn.Layer, normalize: Normalize):
        super().__init__()
        self.model = model
        self.register_buffer("scale", normalize.scale)
        self.register_buffer("shift", normalize.shift)

    def forward(self, images):
        x = images.astype("float32") * self.scale + self.shift
        return F.softmax(self.model(x.transpose([0, 3, 1, 2])))


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """The CPU as Paddle's device, and linear layers as plain products.

    GPU builds multiply float32 in TF32, off by 1e-4 of the largest output; from 3.3 on they trace a
    linear layer as ``linear_v2``, which paddle2onnx does not know.
    """
    device, flags = paddle.get_device(), {}
    with contextlib.suppress(ValueError):  # earlier versions have no such flag
        flags = paddle.get_flags("FLAGS_use_legacy_linear")
    paddle.set_device("cpu")
    paddle.set_flags(dict.fromkeys(flags, True))
    try:
        yield
    finally:
        paddle.set_device(device)
        paddle.set_flags(flags)


@on_cpu()
def export(
    pretrained: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    formats: Sequence[str] = ("paddle",),
    cfg: str | os.PathLike | None = None,
    with_preprocessing: bool = False,
    images: Sequence[str | os.PathLike] = (),
    class_names: str | os.PathLike | None = None,
    opts: Sequence[str] = (),
) -> dict:
    """Writes a model in one or several formats; each file is verified before it appears.

    Arguments are those of the command (`-h`); without `with_preprocessing` a file takes normalised
    float32 ``[B, 3, H, W]`` and gives logits. ``safetensors`` are the weights alone, unfolded.

    Returns the metadata, with two entries of a value for each format: ``largest_difference`` to the
    eager model, relative to the largest output, and ``top1_agreement``, percent. Raises UserError,
    and leaves no file, where one computes something else (int8: agrees for less than
    `MIN_AGREEMENT` percent), and for missing packages and unusable weights or images.
    """
    for name in formats:
        require(f"-format {name}", _EXPORTERS[name][0])
    config = run_config(pretrained, cfg, opts)
    if not config.MODEL.NUM_CLASSES:
        raise UserError("MODEL.NUM_CLASSES is 0: a model without a head has no classes to export")
    if "onnx_int8" in formats and not images and not os.path.isdir(config.DATA.DATA_PATH):
        raise UserError(
            f"-format onnx_int8 is verified on real images: DATA.DATA_PATH {config.DATA.DATA_PATH} "
            "is not there; give -opts DATA.DATA_PATH DIR, or -images"
        )
    limit = INT8_IMAGES if "onnx_int8" in formats else VERIFY_IMAGES
    verify_on, described = verification_images(config, images, limit)
    job = Job(config, with_preprocessing, verify_on)
    metadata = {
        "model": config.MODEL.NAME,
        "weights": Path(config.MODEL.PRETRAINED).name,
        "paddle": paddle.__version__,
        "preprocessing_inside": with_preprocessing,
        "image_size": config.DATA.IMAGE_SIZE,
        "crop_pct": config.DATA.CROP_PCT,
        "interpolation": config.DATA.INTERPOLATION,
        "exif_orientation": config.DATA.EXIF_ORIENTATION,
        "mean": list(config.DATA.IMAGENET_MEAN),
        "std": list(config.DATA.IMAGENET_STD),
        "class_names": find_class_names(config, class_names, job.model.classes),
        "classes": job.model.classes.record(),  # what the weights know, for who compares them
        "verified_on": described,
    }
    found = {}
    with _staging(output or beside_weights(config, "exported")) as folder:
        for name in formats:
            try:
                found[name] = _EXPORTERS[name][1](job, folder / "model", metadata)
            except ModelError as error:
                raise UserError(f"-format {name}: {error}; nothing was written") from None
    for key in ("largest_difference", "top1_agreement"):
        metadata[key] = {name: values[key] for name, values in found.items()}
    return metadata


def verification_images(
    config, sources: Sequence[str | os.PathLike] = (), limit: int = VERIFY_IMAGES
) -> tuple[np.ndarray, str]:
    """At most ``limit`` images, uint8 ``[n, H, W, 3]``, as evaluation crops them; a line on them.

    They are spread over the sources (see `find_images`), without any over the config's validation
    data; where that is missing they are smooth and random.
    """
    if sources:
        paths, described = find_images(sources), "given images"
    elif os.path.isdir(config.DATA.DATA_PATH):
        files = build_dataset(config, "val").files
        paths, described = [files.path(i) for i in range(len(files))], "validation images"
    else:
        size, rng = config.DATA.IMAGE_SIZE, np.random.default_rng(0)
        coarse = rng.integers(0, 256, [limit, size // 8 + 1, size // 8 + 1, 3], "uint8")
        return coarse.repeat(8, 1).repeat(8, 2)[:, :size, :size], f"{limit} generated images"
    chosen = np.linspace(0, len(paths) - 1, min(limit, len(paths))).astype(int)
    images = np.stack([read_view(config, paths[i]) for i in chosen])
    return images, f"{len(images)} {described}"


class Job:
    """A model to export, and what it makes of images, uint8 ``[n, H, W, 3]``, to verify it on."""

    def __init__(self, config, with_preprocessing: bool, images: np.ndarray):
        self.model = load_model(config)
        self.normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
        self.with_preprocessing = with_preprocessing
        self.parts = np.split(images, range(1, len(images), BATCH))  # one alone, then batches
        self.expected = np.concatenate([self.eager(part) for part in self.parts])

    @paddle.no_grad()
    def eager(self, images: np.ndarray) -> np.ndarray:
        """What the exported file is to give for images."""
        logits = self.model(self.normalize(paddle.to_tensor(images)))
        return (F.softmax(logits) if self.with_preprocessing else logits).numpy()

    def inputs(self, images: np.ndarray) -> np.ndarray:
        """What the exported file takes of images."""
        if self.with_preprocessing:
            return images
        return self.normalize(paddle.to_tensor(images)).numpy()

    def save(self, prefix: Path) -> Path:
        """Saves the folded model with the inputs and outputs that were asked for."""
        model, inputs = fold(self.model), self.inputs(self.parts[0])
        if self.with_preprocessing:
            model = WithPreprocessing(model, self.normalize)
            model.eval()
        return save_for_inference(model, prefix, inputs.shape[1:], str(inputs.dtype))

    def verify(self, run: Run, int8: bool = False) -> dict:
        """The largest relative difference, and how often a file has the eager model's top-1,
        percent. Raises ModelError above `TOLERANCE`; in int8, below `MIN_AGREEMENT`.
        """
        found, expected = np.concatenate([run(self.inputs(x)) for x in self.parts]), self.expected
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        same = (found.argmax(1) == expected.argmax(1)) & np.isfinite(found).all(1)
        agreement = 100 * float(same.mean())
        limit, is_near = f"at most {TOLERANCE:.0e}", difference <= TOLERANCE  # not with NaN
        if int8:
            limit, is_near = f"the same for {MIN_AGREEMENT} %", agreement >= MIN_AGREEMENT
        if not is_near:
            raise ModelError(
                f"the file is off by {difference:.1e} of the model's largest output, with the same "
                f"top-1 for {same.sum()} of {len(same)} images; expected {limit}"
            )
        return {"largest_difference": difference, "top1_agreement": agreement}


def _export_paddle(job: Job, prefix: Path, metadata: dict) -> dict:
    program = job.save(prefix)
    found = job.verify(open_paddle(program)[0])
    files = [program, program.with_suffix(".pdiparams")]
    checksums = {file.suffix: file_sha256(file) for file in files}
    text = json.dumps({**metadata, **found, "sha256": checksums}, indent=2, ensure_ascii=False)
    write_file(f"{prefix}.metadata", text + "\n")  # .json would be a part of it for paddle.jit.load
    return found


def save_for_inference(
    layer: nn.Layer, prefix: Path, shape: Sequence[int], dtype: str = "float32"
) -> Path:
    """Saves a layer that takes any number of ``shape`` for Paddle Inference; returns the ``.json``
    (Paddle 3) or ``.pdmodel``.
    """
    paddle.jit.save(layer, str(prefix), input_spec=[InputSpec([None, *shape], dtype, "image")])
    files = [Path(f"{prefix}{suffix}") for suffix in (".json", ".pdmodel")]
    return next(file for file in files if file.exists())


def _export_onnx(job: Job, prefix: Path, metadata: dict, int8: bool = False) -> dict:
    import onnx

    from tools.onnx_graph import write_onnx

    file = Path(f"{prefix}{'.int8' * int8}.onnx")
    with tempfile.TemporaryDirectory() as folder:
        layers = write_onnx(job.save(Path(folder, "model")), file, int8)
    found = {"int8_layers": layers, **job.verify(open_onnx(file)[0], int8)}
    model = onnx.load(file)
    onnx.helper.set_model_props(model, _texts({**metadata, **found}))
    onnx.save(model, file)
    return found


def _export_safetensors(job: Job, prefix: Path, metadata: dict) -> dict:
    from safetensors.numpy import save

    file, found = f"{prefix}.safetensors", {"largest_difference": 0.0, "top1_agreement": 100.0}
    state = {name: value.numpy() for name, value in job.model.state_dict().items()}
    write_file(file, save(state, metadata=_texts({**metadata, **found})))
    again = read_weights(file).state
    if not all(np.array_equal(again[name], value) for name, value in state.items()):
        raise ModelError("other weights were read back")
    return found


def _texts(metadata: dict) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in metadata.items()}


_EXPORTERS = {  # format -> what needs to be installed, what writes and verifies the file
    "paddle": ((), _export_paddle),
    "onnx": (ONNX_PACKAGES, _export_onnx),
    "onnx_int8": (INT8_PACKAGES, partial(_export_onnx, int8=True)),
    "safetensors": (("safetensors",), _export_safetensors),
}


@contextlib.contextmanager
def _staging(output: str | os.PathLike) -> Iterator[Path]:
    """A folder whose files move to ``output`` at the end, all of them, or none after an error."""
    try:
        os.makedirs(output, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unverified-", dir=output) as folder:
            yield Path(folder)
            for file in Path(folder).iterdir():
                os.replace(file, Path(output, file.name))
    except OSError as error:
        raise UserError(f"-output {output}: cannot be written: {error.strerror or error}") from None


def main() -> None:
    parser = Parser("Exports a trained model, and verifies what it wrote.")
    parser.model_flags()
    parser.flag("output", "folder (default: `exported` beside the weights)", metavar="DIR")
    options = dict(dest="formats", nargs="+", default=["paddle"], choices=_EXPORTERS)
    parser.flag("format", " ".join(_EXPORTERS), metavar="NAME", **options)
    bytes_in = "uint8 [B, H, W, 3] in, probabilities out"
    parser.flag("with_preprocessing", bytes_in, action="store_true")
    verify_on = "images to verify on (default: validation data)"
    parser.flag("images", verify_on, nargs="+", default=(), metavar="FILE")
    parser.flag("class_names", "text file, one name a line", metavar="FILE")
    args = vars(parser.parse_args())
    metadata = export(**args)
    print(f"verified on {metadata['verified_on']}")
    for name, difference in metadata["largest_difference"].items():
        print(f"{name}: largest difference {difference:.1e} of the largest output")
        if name == "onnx_int8":
            agreement = metadata["top1_agreement"][name]
            print(f"{name}: top-1 as in float32 for {agreement:.2f} % of the images")


if __name__ == "__main__":
    run_as_script(main)
