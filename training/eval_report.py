"""The report of an evaluation: scores per class, confusion, calibration, confident mistakes."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cpu.resample import to_image
from loading.images import read_pixels
from storage.files import printable, write_atomically
from training.pictures import new_figure, new_grid, render

BINS = 15  # of the confidence, as in Guo et al., "On Calibration of Modern Neural Networks"
MISTAKES = 16  # in the picture
PICTURE_CLASSES = 1000  # more make a confusion matrix whose cells are smaller than its pixels
_NUMBERS = 20  # classes up to which its cells have numbers
_log = logging.getLogger("resmlp")


def class_scores(counts: np.ndarray) -> dict[str, float]:
    """Scores that weigh classes equally, in percent, from `Metrics.counts`.

    Balanced accuracy is the mean over classes with images of the share of them that is right.
    Macro F1 is the mean over classes that occur of 2 * right / (images + predictions).
    """
    images, right, predictions = counts
    both = images + predictions
    return {
        "balanced_accuracy": float(100 * np.mean(right[images > 0] / images[images > 0])),
        "macro_f1": float(100 * np.mean(2 * right[both > 0] / both[both > 0])),
    }


def worst_mistakes(rows: np.ndarray) -> np.ndarray:
    """The most confident mistakes among the rows of images, the first `MISTAKES`."""
    wrong = rows[rows[:, 2] != rows[:, 3]]
    return wrong[np.lexsort([wrong[:, 1], -wrong[:, 0]])[:MISTAKES]]


def write_report(metrics, names: Sequence[str], folder: Path, files=None) -> None:
    """Writes the files of a report (docs/tools.md); UserError if it cannot.

    ``metrics.rows``, float64 ``[images, 4]``: confidence (the probability of the prediction), place
    in the data set, label, prediction. Without ``names`` the classes have numbers. Of ``files``,
    the `ImageIndex` evaluated, the most confident mistakes are shown.
    """
    rows, classes = metrics.rows, metrics.counts.shape[1]
    names = names or [str(label) for label in range(classes)]
    confidence, right = rows[:, 0], rows[:, 2] == rows[:, 3]
    places = np.clip(np.ceil(confidence * BINS).astype("int64") - 1, 0, BINS - 1)
    # images, right ones, sum of confidence; bin i holds confidences in (i / BINS, (i + 1) / BINS]
    bins = [np.bincount(places, weights, BINS) for weights in (None, right, confidence)]
    error = 100 * float(np.abs(bins[1] - bins[2]).sum() / len(rows))
    scores = class_scores(metrics.counts)
    scores.update(calibration_error=error, negative_log_likelihood=metrics.loss)
    _log.info(", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in scores.items()))
    cells = np.unique(rows[:, 2:].astype("int64"), axis=0, return_counts=True)
    contents = {
        "per_class.csv": _per_class(metrics.counts, *cells, names),
        "report.json": (json.dumps(scores, indent=1) + "\n").encode(),
        "reliability.png": _draw_reliability(*bins, error),
    }
    if classes <= PICTURE_CLASSES:
        contents["confusion.png"] = _draw_confusion(metrics, *cells, names)
    else:
        _log.info(f"no confusion.png: {classes} classes are more than {PICTURE_CLASSES}")
    if files is not None:
        mistakes = worst_mistakes(rows)
        table = [
            [files.path(int(index)), names[int(label)], names[int(said)], f"{confidence:.6f}"]
            for confidence, index, label, said in mistakes
        ]
        contents["mistakes.csv"] = _csv([["image", "label", "prediction", "confidence"], *table])
        contents["mistakes.png"] = _draw_mistakes(mistakes, files, names)
    for name, data in contents.items():
        write_atomically(data, folder / name)
        _log.info(f"wrote {folder / name}")


def _per_class(counts, pairs, images_of_pairs, names: Sequence[str]) -> bytes:
    """Rows of each class, in percent; empty without images or predictions. Top-1 is its recall."""
    mistakes = {}  # label -> its most frequent wrong prediction (the first of several), and images
    for (label, other), count in zip(pairs.tolist(), images_of_pairs.tolist()):
        if label != other and count > mistakes.get(label, (0, 0))[1]:
            mistakes[label] = other, count
    rows = [["label", "name", "images", "top1", "most_confused_with", "confused"]]
    rows[0] += ["precision", "recall", "f1"]

    def percent(part: int, whole: int) -> str:
        return f"{100 * part / whole:.2f}" if whole else ""

    for label, (name, images, right, said) in enumerate(zip(names, *counts.tolist())):
        other, count = mistakes.get(label, (None, 0))
        recall = percent(right, images)
        row = [label, name, images, recall, names[other] if count else "", count]
        rows.append([*row, percent(right, said), recall, percent(2 * right, images + said)])
    return _csv(rows)


def _csv(rows: Iterable[Sequence]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _draw_reliability(images, right, confidence, error: float) -> bytes:
    """The reliability diagram as PNG: accuracy over confidence, and how many images, by bins."""
    some = images > 0
    figure = new_figure(5, 6, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges, width = 100 * np.arange(BINS) / BINS, 100 / BINS
    accuracy = 100 * right / np.maximum(images, 1)
    upper.bar(edges, accuracy, width, align="edge", edgecolor="white")
    mean = 100 * confidence[some] / images[some]
    upper.plot(mean, accuracy[some], "k.", label="mean confidence and accuracy")
    upper.plot([0, 100], [0, 100], "--", color="gray", label="calibrated")
    upper.legend(loc="upper left")
    title = f"expected calibration error {error:.2f} %"
    upper.set(ylabel="accuracy, %", ylim=(0, 100), xlim=(0, 100), title=title)
    lower.bar(edges, images, width, align="edge", edgecolor="white")
    lower.set(xlabel="confidence, %", ylabel="images")
    return render(figure)


def _draw_mistakes(mistakes: np.ndarray, files, names: Sequence[str]) -> bytes:
    """The images of mistakes as PNG, with their classes."""
    figure, grid = new_grid(max(len(mistakes), 4), 4, 2.6, 3.2, layout="constrained")
    for axes, (confidence, index, label, prediction) in zip(grid, mistakes):
        path = files.path(int(index))
        image = to_image(read_pixels(path, files.exif_orientation))
        image.thumbnail([224, 224])
        axes.imshow(image)
        said, true = (names[int(c)][:24] for c in (prediction, label))
        file = printable(Path(path).name)
        file = file if len(file) <= 30 else f"…{file[-29:]}"
        title = f"{file}\n{said} {100 * confidence:.1f} %\nlabel: {true}"
        axes.set_title(title, fontsize=8)
    return render(figure)


def _draw_confusion(metrics, pairs, images_of_pairs, names: Sequence[str]) -> bytes:
    """The confusion matrix as PNG, in percent of each label's images."""
    labels, predictions = pairs.T
    share = np.zeros([len(names), len(names)])
    share[labels, predictions] = 100 * images_of_pairs / metrics.counts[0][labels]
    side = 0.45 * len(names) if len(names) <= _NUMBERS else 0
    figure = new_figure(max(7, side + 2), max(6, side + 1), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="share of the label's images, %")
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
    if len(names) <= _NUMBERS:
        for row, column in np.argwhere(share >= 0.5):
            color = "white" if share[row, column] > 60 else "black"
            text = f"{share[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="predicted", ylabel="label", title=f"top-1 {metrics.top1:.2f} %")
    return render(figure)
