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
VERIFY_IMAGES = 16
# Percent of images for which int8 must have the eager model's top-1. Of 1,000 images, a trained
# model (99.6 to 99.9) falls below this once in a thousand times.
MIN_AGREEMENT = 99.0
AGREEMENT_IMAGES = 1000
AGREEMENT_BATCH = 32
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

    Returns the metadata: ``largest_difference`` to the eager model, relative to the largest output,
    of each format; ``int8``: ``int8_layers``, ``top1_agreement`` in percent, ``verified_on``.
    Raises UserError, and leaves no file, where one computes something else (int8: agrees for less
    than `MIN_AGREEMENT` percent), and for missing packages and unusable weights or images.
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
    job = Job(config, with_preprocessing, images)
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
        "verified_on": job.verified_on,
    }
    differences, int8 = {}, {}
    with _staging(output or beside_weights(config, "exported")) as folder:
        for name in formats:
            try:
                found = _EXPORTERS[name][1](job, folder / "model", metadata)
            except ModelError as error:
                raise UserError(f"-format {name}: {error}") from None
            differences[name] = found.pop("largest_difference")
            int8.update(found)
    return {**metadata, "largest_difference": differences, **({"int8": int8} if int8 else {})}


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
    """A model to export, its config, and what it makes of the images to verify it on."""

    def __init__(self, config, with_preprocessing: bool = False, sources: Sequence = ()):
        self.model, self.config, self.sources = load_model(config), config, sources
        self.normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
        self.with_preprocessing = with_preprocessing
        images, self.verified_on = verification_images(config, sources)
        self.inputs, self.expected = self.eager(images)

    @paddle.no_grad()
    def eager(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the exported file is to take of images, uint8 ``[B, H, W, 3]``, and to give."""
        normalized = self.normalize(paddle.to_tensor(images))
        logits = self.model(normalized)
        if self.with_preprocessing:
            return images, F.softmax(logits).numpy()
        return normalized.numpy(), logits.numpy()

    def save(self, prefix: Path) -> Path:
        """Saves the folded model with the inputs and outputs that were asked for."""
        model = fold(self.model)
        if self.with_preprocessing:
            model = WithPreprocessing(model, self.normalize)
            model.eval()
        return save_for_inference(model, prefix, self.inputs.shape[1:], str(self.inputs.dtype))

    def difference(self, name: str, run: Run) -> dict:
        """The largest difference for a batch and a single image; UserError above `TOLERANCE`."""
        errors = [np.abs(run(self.inputs[:n]) - self.expected[:n]).max() for n in (None, 1)]
        difference = float(np.max(errors) / np.abs(self.expected).max())
        if not difference <= TOLERANCE:  # NaN too
            raise UserError(
                f"-format {name}: the exported model is off by {difference:.1e} of its largest "
                f"output, more than {TOLERANCE:.0e}; nothing was written"
            )
        return {"largest_difference": difference}

    def agreement(self, run: Run, images: np.ndarray) -> dict:
        """How often a file has the eager model's top-1, percent, and the largest relative
        difference. Raises UserError below `MIN_AGREEMENT`.
        """
        found, expected = [], []
        for start in range(0, len(images), AGREEMENT_BATCH):
            inputs, outputs = self.eager(images[start : start + AGREEMENT_BATCH])
            found.append(run(inputs))
            expected.append(outputs)
        found, expected = np.concatenate(found), np.concatenate(expected)
        same = (found.argmax(1) == expected.argmax(1)) & np.isfinite(found).all(1)
        if (agreement := 100 * int(same.sum()) / len(images)) < MIN_AGREEMENT:
            raise UserError(
                f"-format onnx_int8: top-1 is as in float32 for {same.sum()} of {len(images)} "
                f"images ({agreement:.2f} %), less than {MIN_AGREEMENT} %; nothing was written"
            )
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        return {"top1_agreement": agreement, "largest_difference": error}


def _export_paddle(job: Job, prefix: Path, metadata: dict) -> dict:
    program = job.save(prefix)
    found = job.difference("paddle", open_paddle(program)[0])
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
    run, _ = open_onnx(file)
    if int8:
        images, described = verification_images(job.config, job.sources, AGREEMENT_IMAGES)
        found = {"int8_layers": layers, "verified_on": described, **job.agreement(run, images)}
    else:
        found = job.difference("onnx", run)
    model = onnx.load(file)
    onnx.helper.set_model_props(model, _texts({**metadata, **found}))
    onnx.save(model, file)
    return found


def _export_safetensors(job: Job, prefix: Path, metadata: dict) -> dict:
    from safetensors.numpy import save

    file = f"{prefix}.safetensors"
    state = {name: value.numpy() for name, value in job.model.state_dict().items()}
    write_file(file, save(state))
    again = read_weights(file).state
    found = {"largest_difference": max(float(np.abs(again[n] - state[n]).max()) for n in state)}
    if found["largest_difference"] != 0:  # NaN too
        raise UserError("-format safetensors: other weights were read back; nothing was written")
    write_file(file, save(state, metadata=_texts({**metadata, **found})))
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
    if args["formats"] != ["onnx_int8"]:
        print(f"verified on {metadata['verified_on']}")
    for name, difference in metadata["largest_difference"].items():
        print(f"{name}: largest difference {difference:.1e} of the largest output")
    if "int8" in metadata:
        agreement, images = (metadata["int8"][key] for key in ("top1_agreement", "verified_on"))
        print(f"onnx_int8: top-1 as in float32 for {agreement:.2f} % of {images}")


if __name__ == "__main__":
    run_as_script(main)
