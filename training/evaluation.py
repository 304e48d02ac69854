"""Evaluation: every image once, exact counts over all ranks, and reports per class."""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F

from cli.errors import UserError
from parallel.process import Process, sum_over_ranks, wait_for_all


@dataclass
class Metrics:
    """What an evaluation found; accuracies in percent, the loss without label smoothing."""

    loss: float
    top1: float
    top5: float
    images: int
    seconds: float
    confusion: np.ndarray | None = None  # int64 [K, K]: rows are labels, columns predictions

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, "
            f"{self.images} images, {self.images / max(self.seconds, 1e-9):.1f} images/s"
        )


@paddle.no_grad()
def evaluate(
    predict: Callable,
    loader,
    process: Process,
    num_classes: int,
    confusion: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Metrics | None:
    """Evaluates a classifier on a loader's whole data set.

    Sums stay on the device and are reduced once, as integers and float64, so the counts are the
    same for any number of processes and any batch size.

    Args:
        predict: uint8 images ``[B, H, W, 3]`` -> logits ``[B, K]``.
        loader: this rank's share of the images (datasets.build_loader, split ``val``).
        process: this process; all ranks must call together.
        num_classes: K; top-5 is top-K where K is smaller.
        confusion: also count labels against predictions.
        stop: asked before each batch whether to break off.
        progress: called after each batch with batches done and in all.

    Returns:
        The metrics, the same on every rank; None when any rank broke off.

    Raises:
        UserError: a logit is not finite.
    """
    start = time.time()
    k = min(5, num_classes)
    loss_sum = paddle.zeros([], "float64")
    hits = paddle.zeros([2], "int64")  # top-1, top-k
    seen, matrix = 0, np.zeros([num_classes, num_classes], "int64") if confusion else None
    stopped = False
    for number, (images, labels, _) in enumerate(loader):
        stopped = stop()
        if stopped:
            break
        logits = predict(images).astype("float32")
        losses = F.cross_entropy(logits, labels, reduction="none").astype("float64")
        top = paddle.topk(logits, k, axis=-1)[1]  # [B, k]
        hit = (top == labels.unsqueeze(-1)).astype("int64")
        hits += paddle.stack([hit[:, 0].sum(), hit.sum()])
        loss_sum += losses.sum()
        seen += len(labels)
        if confusion:
            np.add.at(matrix, (labels.numpy(), top[:, 0].numpy()), 1)
        progress(number + 1, len(loader))
    wait_for_all(process)  # loading may keep one rank longer than a collective waits
    loss, top1, topk, total, stopped = sum_over_ranks(
        [float(loss_sum), *hits.numpy().tolist(), seen, stopped], process
    )
    if stopped:
        return None
    if not np.isfinite(loss):
        raise UserError(
            "evaluation: the loss is not finite; the weights hold or produce inf or NaN"
        )
    if confusion:
        matrix = np.array(sum_over_ranks(matrix.ravel().tolist(), process)).astype("int64")
        matrix = matrix.reshape(num_classes, num_classes)
    return Metrics(
        loss / total,
        100 * top1 / total,
        100 * topk / total,
        int(total),
        time.time() - start,
        matrix,
    )


def write_report(metrics: Metrics, names: list[str] | None, folder: Path) -> list[Path]:
    """Writes ``per_class.csv`` (label, name, images, top-1 in percent, most frequent mistake) and
    ``confusion.png`` from an evaluation made with ``confusion=True``; returns both paths.
    """
    matrix = metrics.confusion
    names = names or [str(label) for label in range(len(matrix))]
    table = folder / "per_class.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "name", "images", "top1", "most_confused_with", "confused"])
        for label, row in enumerate(matrix):
            mistakes = row.copy()
            mistakes[label] = 0
            other, images = int(mistakes.argmax()), int(row.sum())
            wrong = [names[other], int(mistakes[other])] if mistakes[other] else ["", 0]
            top1 = f"{100 * row[label] / images:.2f}" if images else ""
            writer.writerow([label, names[label], images, top1, *wrong])
    picture = folder / "confusion.png"
    _draw_confusion(matrix, names, metrics, picture)
    return [table, picture]


def _draw_confusion(matrix, names, metrics, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, axes = pyplot.subplots(figsize=(7, 6), constrained_layout=True)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="share of the label's images, %")
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="label", title=f"top-1 {metrics.top1:.2f} %")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
