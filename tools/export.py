"""Exports a trained model for deployment, and proves that the files compute the same.

    python tools/export.py -pretrained output/run/best.pdparams -format paddle onnx safetensors

Affine and LayerScale are folded into the linear layers, the batch size is free, and each file is
run against the model it came from before it is left in place. What one needs to use it (crop,
mean, class names), and how far it was off, stands in its metadata. tools/infer_exported.py runs it.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import runtime  # noqa: F401  isort: skip

import contextlib
import importlib.util
import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.static import InputSpec

from datasets import build_dataset
from errors import UserError, run_as_script
from folding import fold
from images import read_image
from resmlp import build_resmlp, load_state
from tools.common import Parser, load_model, run_config, write_file
from tools.infer_exported import ModelError, Run, open_onnx, open_paddle
from tools.predict import find_class_names, find_images
from transforms import build_eval_transform
from utils import Normalize
from weights import read_weights

TOLERANCE = 1e-5  # largest difference to the eager model, relative to its largest output
VERIFY_IMAGES = 16
OPSET = 17  # of ONNX


class WithPreprocessing(nn.Layer):
    """Normalisation, a model, softmax: uint8 ``[B, H, W, 3]`` -> probabilities ``[B, K]``.

    Args:
        model: normalised images to logits.
        mean, std: per channel, for values from 0 to 1.
    """

    def __init__(self, model: nn.Layer, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        mean, std = np.array(mean, "float64"), np.array(std, "float64")
        self.model = model
        self.register_buffer("scale", paddle.to_tensor((1 / (255 * std)).astype("float32")))
        self.register_buffer("shift", paddle.to_tensor((-mean / std).astype("float32")))

    def forward(self, images):
        x = images.astype("float32") * self.scale + self.shift
        return F.softmax(self.model(x.transpose([0, 3, 1, 2])))


def export(
    pretrained: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    formats: Sequence[str] = ("paddle",),
    cfg: str | os.PathLike | None = None,
    with_preprocessing: bool = False,
    images: Iterable[str | os.PathLike] = (),
    class_names: str | os.PathLike | None = None,
    opts: Sequence[str] = (),
) -> dict:
    """Writes a model in one or several formats; each file is verified before it appears.

    Args:
        pretrained: weight file or checkpoint; None: the config's MODEL.PRETRAINED.
        output: folder for the files ``model.*``; None: ``exported`` beside the weights.
        formats: of ``paddle`` (for Paddle Inference), ``onnx`` and ``safetensors``. The last is to
            go on from, here or elsewhere: the weights alone, unfolded, under their own names.
        cfg: YAML file; None: ``config.yaml`` beside the weights.
        with_preprocessing: normalisation and softmax inside the model: uint8 ``[B, H, W, 3]`` in,
            probabilities out; else normalised float32 ``[B, 3, H, W]`` in, logits out.
        images: images to verify on; none: see `verification_images`.
        class_names: text file, one name a line; None: see `predict.find_class_names`.
        opts: further config keys, ``KEY, VALUE, ...``.

    Returns:
        The metadata. Its ``largest_difference`` has, for each format, that to the eager model,
        relative to the largest output.

    Raises:
        UserError: a missing package; weights or images that cannot be used; a file that computes
            something else, which is not left behind.
    """
    _check_formats(formats)
    config = run_config(pretrained, cfg, opts)
    if not config.MODEL.NUM_CLASSES:
        raise UserError("MODEL.NUM_CLASSES is 0: a model without a head has no classes to export")
    batch, described = verification_images(config, images)
    job = _Job(load_model(config), config, with_preprocessing, batch)
    metadata = {
        "model": config.MODEL.NAME,
        "weights": Path(config.MODEL.PRETRAINED).name,
        "paddle": paddle.__version__,
        "preprocessing_inside": with_preprocessing,
        "image_size": config.DATA.IMAGE_SIZE,
        "crop_pct": config.DATA.CROP_PCT,
        "interpolation": config.DATA.INTERPOLATION,
        "mean": list(config.DATA.IMAGENET_MEAN),
        "std": list(config.DATA.IMAGENET_STD),
        "class_names": find_class_names(config, class_names),
        "verified_on": described,
    }
    differences = {}
    with _staging(output or Path(config.MODEL.PRETRAINED).with_name("exported")) as folder:
        for name in formats:
            try:
                differences[name] = _EXPORTERS[name][1](job, folder / "model", metadata)
            except ModelError as error:
                raise UserError(f"-format {name}: {error}") from None
    return {**metadata, "largest_difference": differences}


def verification_images(
    config, sources: Iterable[str | os.PathLike] = ()
) -> tuple[np.ndarray, str]:
    """A few images, cropped as in evaluation, and a line that says what they are.

    Args:
        config: for the crop and the data folder.
        sources: files, folders, glob patterns; none: images spread over the validation data where
            the config's data folder is there, else smooth random ones.

    Returns:
        uint8 ``[n, H, W, 3]``, n at most `VERIFY_IMAGES`; the line.
    """
    transform = build_eval_transform(config)
    sources = list(sources)
    if sources:
        paths, described = find_images(sources)[:VERIFY_IMAGES], "given images"
    elif os.path.isdir(config.DATA.DATA_PATH):
        files = build_dataset(config, "val").files
        chosen = np.linspace(0, len(files) - 1, min(VERIFY_IMAGES, len(files))).astype(int)
        paths, described = [files.path(i) for i in chosen], "validation images"
    else:
        size, rng = config.DATA.IMAGE_SIZE, np.random.default_rng(0)
        coarse = rng.integers(0, 256, [VERIFY_IMAGES, size // 8 + 1, size // 8 + 1, 3])
        images = coarse.repeat(8, 1).repeat(8, 2)[:, :size, :size].astype("uint8")
        return images, f"{VERIFY_IMAGES} generated images"
    return np.stack([transform(read_image(path)) for path in paths]), f"{len(paths)} {described}"


@dataclass
class _Job:
    """A model to export, and images to verify it on."""

    model: nn.Layer
    config: object
    with_preprocessing: bool
    images: np.ndarray  # uint8 [n, H, W, 3]

    @paddle.no_grad()
    def __post_init__(self):
        data = self.config.DATA
        normalized = Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)(paddle.to_tensor(self.images))
        self.expected = self.model(normalized)
        self.inputs = normalized.numpy()
        if self.with_preprocessing:
            self.inputs, self.expected = self.images, F.softmax(self.expected)
        self.expected = self.expected.numpy()

    def deployed(self, model: nn.Layer) -> nn.Layer:
        """The model with the inputs and outputs that were asked for."""
        data = self.config.DATA
        if self.with_preprocessing:
            model = WithPreprocessing(model, data.IMAGENET_MEAN, data.IMAGENET_STD)
        model.eval()
        return model

    def difference(self, name: str, run: Run) -> float:
        """The largest difference of an exported file, for a batch and for a single image.

        Raises:
            UserError: it is above `TOLERANCE`.
        """
        outputs = [run(self.inputs), run(self.inputs[:1])]
        errors = [np.abs(out - self.expected[: len(out)]).max() for out in outputs]
        difference = float(max(errors) / np.abs(self.expected).max())
        if not difference <= TOLERANCE:  # NaN too
            raise UserError(
                f"-format {name}: the exported model is off by {difference:.1e} of its largest "
                f"output, more than {TOLERANCE:.0e}; nothing was written"
            )
        return difference


def _export_paddle(job: _Job, prefix: Path, metadata: dict) -> float:
    difference = job.difference("paddle", open_paddle(_save(job, prefix)))
    text = json.dumps({**metadata, "largest_difference": difference}, indent=2, ensure_ascii=False)
    write_file(f"{prefix}.metadata.json", text + "\n")
    return difference


def _save(job: _Job, prefix: Path) -> Path:
    """Saves the folded model for Paddle Inference: ``.json`` (Paddle 3) or ``.pdmodel``."""
    size = job.config.DATA.IMAGE_SIZE
    spec = InputSpec([None, 3, size, size], "float32", "image")
    if job.with_preprocessing:
        spec = InputSpec([None, size, size, 3], "uint8", "image")
    paddle.jit.save(job.deployed(fold(job.model)), str(prefix), input_spec=[spec])
    files = [Path(f"{prefix}{suffix}") for suffix in (".json", ".pdmodel")]
    return next(file for file in files if file.exists())


def _export_onnx(job: _Job, prefix: Path, metadata: dict) -> float:
    import onnx

    file = f"{prefix}.onnx"
    with tempfile.TemporaryDirectory() as folder:
        _convert_to_onnx(_save(job, Path(folder) / "model"), file)
    difference = job.difference("onnx", open_onnx(file)[0])
    model = onnx.load(file)
    onnx.helper.set_model_props(model, _texts(metadata, difference))
    onnx.save(model, file)
    return difference


def _convert_to_onnx(source: Path, file: str) -> None:
    try:
        import paddle2onnx

        options = {"opset_version": OPSET, "verbose": False}
        if "optimize_tool" in inspect.signature(paddle2onnx.export).parameters:
            options["optimize_tool"] = "None"  # the default installs packages while it runs
        paddle2onnx.export(str(source), str(source.with_suffix(".pdiparams")), file, **options)
    except Exception as error:  # its version must match Paddle's, and shows that in many ways
        raise UserError(
            f"-format onnx: paddle2onnx failed ({type(error).__name__}: {error}); Paddle 3 takes "
            "paddle2onnx 2.1, Paddle 2.6 takes 1.3"
        ) from error


def _export_safetensors(job: _Job, prefix: Path, metadata: dict) -> float:
    from safetensors.numpy import save

    file = f"{prefix}.safetensors"
    state = {name: value.numpy() for name, value in job.model.state_dict().items()}
    write_file(file, save(state))
    again = build_resmlp(job.config)
    load_state(again, read_weights(file).state)
    again = job.deployed(again)
    with paddle.no_grad():
        difference = job.difference("safetensors", lambda x: again(paddle.to_tensor(x)).numpy())
    write_file(file, save(state, metadata=_texts(metadata, difference)))
    return difference


def _texts(metadata: dict, difference: float) -> dict[str, str]:
    """Metadata as ONNX and safetensors take it: a JSON text for each key."""
    return {k: json.dumps(v) for k, v in {**metadata, "largest_difference": difference}.items()}


_EXPORTERS = {  # format -> what needs to be installed, what writes and verifies the file
    "paddle": ((), _export_paddle),
    "onnx": (("paddle2onnx", "onnx", "onnxruntime"), _export_onnx),
    "safetensors": (("safetensors",), _export_safetensors),
}


def _check_formats(formats: Sequence[str]) -> None:
    for name in formats:
        if name not in _EXPORTERS:
            raise UserError(f"-format is {name!r}; choose from {', '.join(_EXPORTERS)}")
        missing = [p for p in _EXPORTERS[name][0] if importlib.util.find_spec(p) is None]
        if missing:
            raise UserError(f"-format {name} needs `pip install {' '.join(missing)}`")


@contextlib.contextmanager
def _staging(output: str | os.PathLike) -> Iterator[Path]:
    """A folder whose files move to ``output`` at the end, all of them, or none after an error."""
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".unverified-") as folder:
            yield Path(folder)
            for file in Path(folder).iterdir():
                os.replace(file, output / file.name)
    except OSError as error:
        raise UserError(f"-output {output}: cannot be written: {error.strerror or error}") from None


def main() -> None:
    parser = Parser("Exports a trained model, and verifies what it wrote.")
    parser.model_flags()
    parser.flag("output", "folder for model.* (default: `exported` beside the weights)")
    parser.flag("format", " ".join(_EXPORTERS), nargs="+", default=["paddle"], metavar="NAME")
    parser.flag(
        "with_preprocessing", "uint8 [B, H, W, 3] in, probabilities out", action="store_true"
    )
    parser.flag("images", "images to verify on (default: validation data)", nargs="+", default=())
    parser.flag("class_names", "text file, one name a line", metavar="FILE")
    args = parser.parse_args()
    metadata = export(
        args.pretrained,
        args.output,
        args.format,
        args.cfg,
        args.with_preprocessing,
        args.images,
        args.class_names,
        args.opts,
    )
    print(f"verified on {metadata['verified_on']}")
    for name, difference in metadata["largest_difference"].items():
        print(f"{name}: largest difference {difference:.1e} of the largest output")


if __name__ == "__main__":
    run_as_script(main)
