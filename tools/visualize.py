"""Pictures of what a ResMLP has learned, and of what it is trained on: PNG files and one HTML page.

    python tools/visualize.py -pretrained output/run/best.pdparams -images photo.jpg other.jpg

token_mixing.png shows rows of the token-mixing matrices as maps over the patch grid (paper, figure
2); what the others show, `_TEXTS` says.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import paddle

from batch_augment import BatchAugment
from cli.errors import DataError, UserError, run_as_script
from cli.parser import Parser
from datasets import build_loader
from loading.images import read_pixels
from mixup import smooth_one_hot
from resmlp import ResMLP
from tools.common import beside_weights, html_image, html_page, load_model, run_config, write_file
from tools.predict import find_class_names, find_images
from training.pictures import new_figure, new_grid, render
from transforms import build_eval_transform
from utils import Normalize, step_rng

MAX_LAYERS = 6  # layers whose token mixing is drawn where none are chosen
MAX_SIDE = 6  # maps along a side of a layer's mosaic: the central ones, as in the paper
MAX_IMAGES = 6
BATCH = 16  # training images

_TEXTS = {  # picture -> heading, explanation
    "token_mixing": (
        "Token mixing",
        "One map for each output patch, placed where that patch is in the image (the central ones "
        "of a large grid). A map shows how much the output patch, marked by a dot, takes from each "
        "input patch: red adds, blue subtracts. Each layer has its own scale. "
        "Sparse are weights below 5 % of the largest.",
    ),
    "magnitudes": (
        "LayerScale and Affine",
        "Magnitude by layer: the median over the channels, and the range of the middle 80 %. "
        "LayerScale is how much a branch adds to the residual stream; alpha and beta are the scale "
        "and shift of the Affine layers that stand where other networks normalise.",
    ),
    "contributions": (
        "What every patch contributes",
        "The head is linear in the mean of the tokens, so a logit is exactly the sum of one term "
        "for each patch and the bias. Red patches speak for the class, blue ones against it.",
    ),
    "batch": (
        "A training batch",
        "Images as the model sees them in training, after augmentation, random erasing and mixing, "
        "with the shares of their targets.",
    ),
}


def token_maps(model: ResMLP, layer: int) -> np.ndarray:
    """What each output token takes from each input token, ``[N, grid, grid]``, N = grid * grid."""
    weight = model.mixer_layers[layer].linear_tokens.weight.numpy()  # [tokens in, tokens out]
    grid = model.patch_embed.grid_size
    return weight.T.reshape(-1, grid, grid)


@paddle.no_grad()
def contributions(model: ResMLP, images: paddle.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What each patch adds to each logit, ``[B, grid, grid, K]``, and the logits ``[B, K]``.

    The logits are ``head(mean_n norm(x_n))``: patch n adds ``norm(x_n) . W[:, k] / N`` to logit k.
    """
    x = model.patch_embed(images)
    for block in model.mixer_layers:
        x = block(x)
    grid = model.patch_embed.grid_size
    terms = paddle.matmul(model.norm(x), model.head.weight) / grid**2  # [B, N, C] -> [B, N, K]
    return terms.reshape([-1, grid, grid, model.num_classes]).numpy(), model(images).numpy()


def training_batch(config) -> tuple[np.ndarray, np.ndarray]:
    """The first batch of a run, made visible again: uint8 ``[B, H, W, 3]``, targets ``[B, K]``."""
    augment, batch = BatchAugment(config), next(iter(build_loader(config, "train")))
    images, targets = augment(batch.images, batch.labels, step_rng(config.SEED, 0, 0, 0))
    if targets.ndim == 1:
        targets = smooth_one_hot(targets, config.MODEL.NUM_CLASSES, config.TRAIN.SMOOTHING)
    return augment.normalize.undo(images), targets.numpy()


def draw_token_mixing(model: ResMLP, layers: Sequence[int]):
    columns = 2 if len(layers) in (2, 4) else 3
    figure, cells = new_grid(len(layers), columns, 4, 4.2, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, wspace=0.08, hspace=0.05)  # layers apart from maps
    for axis, layer in zip(cells, layers):
        maps = token_maps(model, layer)
        sparse = (np.abs(maps) < 0.05 * np.abs(maps).max()).mean()  # as in the paper's figure 3
        mosaic, dots = tile_maps(maps)
        limit = np.nanquantile(np.abs(mosaic), 0.995)
        axis.imshow(mosaic, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.plot(*dots, ".", color="black", markersize=2)
        axis.set_title(f"layer {layer + 1}, scale ±{limit:.2g}, {100 * sparse:.0f} % sparse")
    return figure


def tile_maps(maps: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The central maps side by side with a gap between, and x and y of each one's own patch."""
    grid = maps.shape[-1]
    side = min(grid, MAX_SIDE)
    first = (grid - side) // 2
    shown = slice(first, first + side)
    tiles = np.full([side, grid + 1, side, grid + 1], np.nan)  # [row, y, column, x]
    tiles[:, :grid, :, :grid] = maps.reshape([grid] * 4)[shown, shown].transpose(0, 2, 1, 3)
    mosaic = tiles.reshape(side * (grid + 1), -1)[:-1, :-1]
    own = np.arange(side) * (grid + 2) + first
    return mosaic, (np.tile(own, side), np.repeat(own, side))


def draw_magnitudes(model: ResMLP):
    states = [block.state_dict() for block in model.mixer_layers]
    layers = np.arange(1, len(states) + 1)
    figure = new_figure(13, 4, layout="constrained")
    panels = (
        ("LayerScale", {"ls1": "token mixing", "ls2": "channel MLP"}),
        ("Affine alpha", {"norm1.alpha": "before token mixing", "norm2.alpha": "before the MLP"}),
        ("Affine beta", {"norm1.beta": "before token mixing", "norm2.beta": "before the MLP"}),
    )
    for axis, (title, curves) in zip(figure.subplots(1, 3), panels):
        for (name, label), color in zip(curves.items(), ("#0072b2", "#d55e00")):
            values = np.abs([state[name].numpy().ravel() for state in states])  # [layers, C]
            low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=1)
            axis.plot(layers, middle, "o-", color=color, label=label, markersize=4)
            axis.fill_between(layers, low, high, color=color, alpha=0.15)
        axis.set(title=title, xlabel="layer", ylabel="absolute value")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    return figure


def draw_contributions(
    views: np.ndarray,
    terms: np.ndarray,
    logits: np.ndarray,
    names: Sequence[str],
    label: int | None = None,
):
    """Views (uint8 ``[B, H, W, 3]``) and contributions to ``label`` or two likely classes."""
    classes = (
        np.argsort(-logits, axis=1)[:, :2] if label is None else np.full([len(views), 1], label)
    )
    columns, size = 1 + classes.shape[1], views.shape[1]
    width = 2.8 + 0.6 / columns
    figure, cells = new_grid(len(views) * columns, columns, width, 3.2, layout="constrained")
    cells = cells.reshape(-1, columns)
    for axes, view, term, logit, chosen in zip(cells, views, terms, logits, classes):
        limit = np.abs(term[..., chosen]).max()
        axes[0].imshow(view)
        axes[0].set_title("image", fontsize=9)
        for axis, k in zip(axes[1:], chosen):
            axis.imshow(view.mean(axis=2), cmap="gray", vmin=-255, vmax=255)  # pale, to colour it
            colours = dict(cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.6)
            extent = (-0.5, size - 0.5, size - 0.5, -0.5)
            shown = axis.imshow(term[..., k], extent=extent, **colours)
            title = f"{names[k].split(',')[0][:24]}\nlogit {logit[k]:.2f}"
            axis.set_title(title, fontsize=9)
        figure.colorbar(shown, ax=axes[1:], shrink=0.8)
    return figure


def draw_batch(images: np.ndarray, targets: np.ndarray, names: Sequence[str]):
    figure, cells = new_grid(len(images), 8, 1.7, 2.2, layout="constrained")
    for axis, image, target in zip(cells, images, targets):
        axis.imshow(image)
        top = [k for k in np.argsort(-target)[:2] if target[k] > 0.05 or k == target.argmax()]
        lines = [f"{100 * target[k]:.0f} % {names[k].split(',')[0][:18]}" for k in top]
        axis.set_title("\n".join(lines), fontsize=8)
    return figure


def visualize(
    pretrained: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    cfg: str | os.PathLike | None = None,
    images: Iterable[str | os.PathLike] = (),
    layers: Sequence[int] = (),
    label: int | None = None,
    class_names: str | os.PathLike | None = None,
    opts: Sequence[str] = (),
) -> list[Path]:
    """Draws the pictures, and a page ``index.html`` that gathers them; returns the files.

    Arguments are those of the command (`-h`). batch.png is drawn where the config's training
    images are there. Raises UserError for weights, images or data that cannot be used, and a layer
    or class that is not there.
    """
    few = ["DATA.BATCH_SIZE", BATCH, "DATA.NUM_WORKERS", 0, "DATA.DROP_LAST", False]
    config = run_config(pretrained, cfg, [*opts, *few])
    model, data = load_model(config), config.DATA
    names = find_class_names(config, class_names, model.classes)
    figures = {
        "token_mixing": draw_token_mixing(model, choose_layers(layers, len(model.mixer_layers))),
        "magnitudes": draw_magnitudes(model),
    }
    paths = find_images(images)[:MAX_IMAGES] if images else []
    if paths:
        if not 0 <= (label or 0) < model.num_classes:
            raise UserError(f"class {label}: the model has classes 0 to {model.num_classes - 1}")
        transform = build_eval_transform(config)
        normalize = Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)
        pixels = [read_pixels(path, data.EXIF_ORIENTATION) for path in paths]
        views = np.stack([transform(image, path=path) for image, path in zip(pixels, paths)])
        terms, logits = contributions(model, normalize(paddle.to_tensor(views)))
        figures["contributions"] = draw_contributions(views, terms, logits, names, label)
    try:
        figures["batch"] = draw_batch(*training_batch(config), names)
    except DataError as error:
        print(f"no batch.png: {error}", file=sys.stderr)

    output = Path(output or beside_weights(config, "pictures"))
    files, sections = [output / f"{name}.png" for name in figures], []
    for file, (name, figure) in zip(files, figures.items()):
        write_file(file, render(figure))
        heading, text = _TEXTS[name]
        sections.append((heading, f"<p>{text}</p>\n{html_image(file, heading)}"))
    files.append(output / "index.html")
    write_file(files[-1], html_page(f"{config.MODEL.NAME}: what it has learned", sections))
    return files


def choose_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Layers from 0: the given ones, which count from 1, or some from the first to the last."""
    for layer in layers:
        if not 1 <= layer <= depth:
            raise UserError(f"layer {layer}: the model has layers 1 to {depth}")
    spread = np.linspace(0, depth - 1, MAX_LAYERS).round().astype(int).tolist()
    return [layer - 1 for layer in layers] or sorted(set(spread))


def main() -> None:
    parser = Parser("Draws what a ResMLP has learned and what it is trained on.")
    parser.model_flags()
    parser.flag("output", "folder (default: `pictures` beside the weights)", metavar="DIR")
    parser.flag("images", "images to explain", nargs="+", default=(), metavar="FILE")
    layers = "layers whose token mixing to draw, from 1"
    parser.flag("layers", layers, nargs="+", type=int, default=())
    parser.flag("label", "class to explain (default: the two likeliest)", type=int, metavar="K")
    parser.flag("class_names", "text file, one name a line", metavar="FILE")
    files = visualize(**vars(parser.parse_args()))
    print("\n".join(f"wrote {file}" for file in files))


if __name__ == "__main__":
    run_as_script(main)
