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
from tools.infer_exported import print_result
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
    show: Callable[[dict, int], None] = lambda result, width: None,
    on_bad: Callable[[BadImage], None] | None = None,
    amp: bool = False,
) -> list[dict]:
    """Classifies images as the evaluation does; arguments are the command's (`-h`), and

    - show: takes each result as soon as it is there, and the length of the longest path;
    - on_bad: takes the error of each image that cannot be read, which is left out; without it that
      is a UserError, as are weights, config or names that do not fit.

    Returns ``{"image": path, "predictions": [{"class": 3, "name": "Dress", "confidence": 0.93},
    ...]}`` per image, the likeliest class first; the confidence is the softmax probability.
    """
    if top_k < 1 or batch_size < 1:
        raise UserError(f"top_k and batch_size are at least 1, found {top_k} and {batch_size}")
    paths = find_images([images] if isinstance(images, (str, os.PathLike)) else images)
    config = run_config(pretrained, cfg, ["AMP", True, *opts] if amp else opts)
    model = load_model(config)
    names = find_class_names(config, class_names, model.classes)
    if config.AMP:
        print(choose_precision(config, gpu_count() > 0)[1], file=sys.stderr)
    results, views = [], []
    width = max(len(printable(path)) for path in paths)
    for path, view, row in classify(model, config, paths, batch_size, on_bad):
        if grid and len(views) < GRID_LIMIT:
            views.append(view)
        top = np.argsort(-row, kind="stable")[:top_k].tolist()
        top = [{"class": k, "name": names[k], "confidence": float(row[k])} for k in top]
        results.append({"image": path, "predictions": top})
        show(results[-1], width)
    if grid and results:
        write_file(grid, draw_grid(results, views))
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


@paddle.no_grad()
def classify(
    model, config, paths: Sequence[str], batch_size: int, on_bad: Callable | None
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields path, view (uint8 ``[H, W, 3]``) and probabilities ``[K]`` of each image."""
    if not config.MODEL.NUM_CLASSES:
        raise UserError("MODEL.NUM_CLASSES is 0: a model without a head has no classes to predict")
    transform = build_eval_transform(config)
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    for start in range(0, len(paths), batch_size):
        found, views = [], []
        for path in paths[start : start + batch_size]:
            try:
                pixels = read_pixels(path, config.DATA.EXIF_ORIENTATION)
                views.append(transform(pixels, path=path))
                found.append(path)
            except BadImage as error:
                if on_bad is None:
                    raise
                on_bad(error)
        if views:
            images = normalize(paddle.to_tensor(np.stack(views)))
            with autocast(config, gpu_count() > 0):
                probabilities = F.softmax(model(images))
            yield from zip(found, views, probabilities.numpy())


def draw_grid(results: Sequence[dict], views: Sequence[np.ndarray]) -> bytes:
    """A PNG of what the model saw, each picture over its three likeliest classes."""
    # inches: 2 for a picture, 0.25 above it, 0.65 below it for the classes
    figure, cells = new_grid(len(views), 4 if len(views) <= 16 else 8, 2.1, 2.9)
    height = figure.get_figheight()
    figure.subplots_adjust(0.02, 0.65 / height, 0.98, 1 - 0.25 / height, wspace=0.05, hspace=0.45)
    for axis, view, result in zip(cells, views, results):
        axis.imshow(view, interpolation="nearest")
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
    args = parser.parse_args()
    if args.json and args.csv:
        raise UserError("command line: -json and -csv: choose one")
    images = []
    for source in args.images:
        names = sys.stdin.buffer.read().splitlines() if source == "-" else [source]
        images += map(os.fsdecode, names)
    form = "json" if args.json else "csv" if args.csv else "table"
    shown, bad = [], []

    def show(result: dict, width: int) -> None:
        print_result(result, width, form, first=not shown)
        shown.append(result)

    def on_bad(error: BadImage) -> None:
        bad.append(error)
        print(f"error: {error}", file=sys.stderr, flush=True)

    own = ("images", "json", "csv")
    options = {name: value for name, value in vars(args).items() if name not in own}
    try:
        predict(images, show=show, on_bad=on_bad, **options)
    finally:
        if args.json and (shown or bad):
            print("\n]" if shown else "[]", flush=True)
    if args.grid and shown:
        print(f"wrote {args.grid}", file=sys.stderr)  # JSON and CSV on stdout stay whole
    if bad:
        raise UserError(f"{len(bad)} of {len(bad) + len(shown)} images cannot be read")


if __name__ == "__main__":
    run_as_script(main)
