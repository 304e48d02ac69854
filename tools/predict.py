"""Classifies images with a trained model: a table, JSON, CSV, or a grid of pictures.

python tools/predict.py photo.jpg folder/ "other/*.png" -pretrained output/run/best.pdparams
find . -name "*.jpg" | python tools/predict.py - -pretrained best.pdparams -cfg run.yaml -csv
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F

from cli.errors import UserError, run_as_script
from cli.parser import Parser
from loading import archives
from loading.classes import UNKNOWN, ClassNames, data_classes, read_class_names
from loading.files import describe_others, list_images
from loading.images import BadImage, read_pixels
from parallel.process import gpu_count
from storage.files import printable
from tools.common import IMAGENET_CLASSES, load_model, run_config, write_file
from tools.infer_exported import print_results, top_classes
from training.pictures import new_grid, render
from training.precision import autocast, choose_precision
from transforms import build_eval_transform
from utils import Normalize

GRID_LIMIT = 64  # pictures in a grid


def predict(
    images: str | os.PathLike | Iterable[str | os.PathLike],
    pretrained: str | os.PathLike | None = None,
    cfg: str | os.PathLike | None = None,
    top_k: int = 5,
    class_names: str | os.PathLike | None = None,
    batch_size: int = 32,
    opts: Sequence[str] = (),
    grid: str | os.PathLike | None = None,
    show: Callable[[Iterator[dict]], Iterable[dict]] = iter,
    skip_bad: bool = False,
    amp: bool = False,
) -> list[dict]:
    """Classifies images as the evaluation does; arguments are the command's (`-h`), and

    - show: passes the results on as they come;
    - skip_bad: an image that cannot be read is named on standard error and left out; else that is
      a UserError, as are weights, config or names that do not fit.

    Returns of every image what `top_classes` does; the confidence is the softmax probability.
    """
    if top_k < 1 or batch_size < 1:
        raise UserError(f"top_k and batch_size are at least 1, found {top_k} and {batch_size}")
    paths = find_images([images] if isinstance(images, (str, os.PathLike)) else images)
    config = run_config(pretrained, cfg, ["AMP", True, *opts] if amp else opts)
    model = load_model(config)
    names = find_class_names(config, class_names, model.classes)
    if config.AMP:
        print(choose_precision(config, gpu_count() > 0)[1], file=sys.stderr)
    found = classify(model, config, paths, batch_size, skip_bad)
    results = list(show(top_classes(path, row, names, top_k) for path, row in found))
    if grid and results:
        write_file(grid, draw_grid(results[:GRID_LIMIT], partial(read_view, config)))
    return results


def find_images(sources: Iterable[str | os.PathLike]) -> list[str]:
    """The image files that are meant: files, all images under folders and in archives, patterns.

    A pattern that fits nothing stays, and is named as a missing file when it is read. UserError
    where nothing is found.
    """
    paths = []
    for source in filter(None, map(os.fspath, sources)):
        if archives.is_folder(source):
            others: list[str] = []
            found = list_images(source, others)
            for line in describe_others(source, others):
                print(line, file=sys.stderr)
            if not found:
                raise UserError(f"{source}: no images")
        elif os.path.exists(source) or not glob.has_magic(source):
            found = [source]
        else:
            found = sorted(p for p in glob.glob(source, recursive=True) if os.path.isfile(p))
        paths += found or [source]
    if not paths:
        raise UserError("no images to classify")
    return paths


def find_class_names(
    config, path: str | os.PathLike | None = None, classes: ClassNames = UNKNOWN
) -> list[str]:
    """The name of every class: from the file (DataError unless it has a name per class), else the
    weights' own (``classes``), DATA.CLASS_NAMES, the data folder, ImageNet-1k's, or plain numbers.
    """
    count = config.MODEL.NUM_CLASSES
    if path:
        names = read_class_names(os.fspath(path), count)
    else:
        names = (classes or data_classes(config)).names
    if not names and count == 1000:
        names = read_class_names(str(IMAGENET_CLASSES), count)
    names = names or [f"class {label}" for label in range(count)]
    return [printable(name) for name in names]  # they may be any bytes


def read_view(config, path: str) -> np.ndarray:
    """What the model sees of an image file: its crop in evaluation, uint8 ``[H, W, 3]``."""
    transform = build_eval_transform(config)  # and the limit of what is read
    return transform(read_pixels(path, config.DATA.EXIF_ORIENTATION), path=path)


@paddle.no_grad()
def classify(
    model, config, paths: Sequence[str], batch_size: int, skip_bad: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields path and probabilities ``[K]`` of each image."""
    if not config.MODEL.NUM_CLASSES:
        raise UserError("MODEL.NUM_CLASSES is 0: a model without a head has no classes to predict")
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    for start in range(0, len(paths), batch_size):
        found, views = [], []
        for path in paths[start : start + batch_size]:
            try:
                views.append(read_view(config, path))
                found.append(path)
            except BadImage as error:
                if not skip_bad:
                    raise
                print(f"error: {error}", file=sys.stderr, flush=True)
        if views:
            images = normalize(paddle.to_tensor(np.stack(views)))
            with autocast(config, gpu_count() > 0):
                probabilities = F.softmax(model(images))
            yield from zip(found, probabilities.numpy())


def draw_grid(results: Sequence[dict], view: Callable[[str], np.ndarray]) -> bytes:
    """A PNG of what the model saw, each picture over its three likeliest classes."""
    # inches: 2 for a picture, 0.25 above it, 0.65 below it for the classes
    figure, cells = new_grid(len(results), 4 if len(results) <= 16 else 8, 2.1, 2.9)
    height = figure.get_figheight()
    figure.subplots_adjust(0.02, 0.65 / height, 0.98, 1 - 0.25 / height, wspace=0.05, hspace=0.45)
    for axis, result in zip(cells, results):
        axis.imshow(view(result["image"]), interpolation="nearest")
        name = printable("/".join(Path(result["image"]).parts[-2:]))
        name = name if len(name) <= 32 else f"…{name[-31:]}"
        axis.set_title(name, fontsize=7, color="gray")
        for line, entry in enumerate(result["predictions"][:3]):
            name = entry["name"].split(",")[0]  # ImageNet's names are lists of synonyms
            text = f"{100 * entry['confidence']:5.1f} %  {name[:22]}"
            weight, color = ("normal", "dimgray") if line else ("bold", "black")
            style = dict(transform=axis.transAxes, fontsize=8, fontweight=weight, color=color)
            axis.text(0.0, -0.08 - 0.1 * line, text, **style)
    return render(figure)


def main() -> None:
    parser = Parser("Classifies images with a trained model.")
    parser.paths("images", "files, folders, archives, patterns; -: paths from stdin", nargs="+")
    parser.model_flags()
    parser.flag("top_k", "classes to name per image", type=int, default=5, metavar="K")
    parser.flag("batch_size", "images at a time", type=int, default=32)
    parser.flag("amp", "mixed precision (on a CPU: bfloat16, if fast)", action="store_true")
    parser.flag("class_names", "text file, one name a line", metavar="FILE")
    parser.flag("json", "print JSON", action="store_true")
    parser.flag("csv", "print CSV", action="store_true")
    parser.flag("grid", "draw pictures and classes into a PNG", metavar="FILE")
    args = vars(parser.parse_args())
    form = [name for name in ("json", "csv") if args.pop(name)]
    if len(form) > 1:
        raise UserError("command line: -json and -csv: choose one")
    images = []
    for source in args.pop("images"):
        names = sys.stdin.buffer.read().splitlines() if source == "-" else [source]
        images += map(os.fsdecode, names)
    images = find_images(images)
    show = partial(print_results, paths=images, form="".join(form))
    results = predict(images, show=show, skip_bad=True, **args)
    if args["grid"] and results:
        print(f"wrote {args['grid']}", file=sys.stderr)  # JSON and CSV on stdout stay whole
    if bad := len(images) - len(results):
        raise UserError(f"{bad} of {len(images)} images cannot be read")


if __name__ == "__main__":
    run_as_script(main)
