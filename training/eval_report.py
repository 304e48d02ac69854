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
from parallel.process import Process, sum_over_ranks
from storage.files import printable, write_atomically
from training.pictures import new_figure, new_grid, render

BINS = 15  # of the confidence, as in Guo et al., "On Calibration of Modern Neural Networks"
MISTAKES = 16  # in the picture
PICTURE_CLASSES = 1000  # more make a confusion matrix whose cells are smaller than its pixels
_NUMBERS = 20  # classes up to which its cells have numbers
_log = logging.getLogger("resmlp")
_SCALE = 2**30  # confidences are summed as integers: exact, in any order, up to 2**23 images


class Calibration:
    """Counts how confident a classifier is and how right; its memory does not grow with images.

    ``bins``, int64 ``[BINS, 3]``: images, right ones, sum of confidence in units of 1 / 2**30; bin
    i holds confidences in (i / BINS, (i + 1) / BINS]. ``mistakes``, float64 ``[n, 4]``: confidence,
    image, label and prediction, the most confident first.
    """

    def __init__(self):
        self.bins = np.zeros([BINS, 3], "int64")
        self.mistakes = np.zeros([0, 4])

    def add(self, confidence, indices, labels, predictions) -> None:
        """Adds a batch: probability of the prediction, place in the data set, label, prediction."""
        right = labels == predictions
        places = np.clip(np.ceil(confidence * BINS).astype("int64") - 1, 0, BINS - 1)
        units = np.rint(confidence.astype("float64") * _SCALE).astype("int64")
        np.add.at(self.bins, places, np.stack([np.ones_like(units), right, units], axis=1))
        batch = np.stack([confidence, indices, labels, predictions], axis=1).astype("float64")
        self._keep(np.concatenate([self.mistakes, batch[~right]]))

    def _keep(self, mistakes: np.ndarray) -> None:
        order = np.lexsort([mistakes[:, 1], -mistakes[:, 0]])[:MISTAKES]
        self.mistakes = mistakes[order]

    def reduce(self, process: Process) -> None:
        """Makes this the counts and mistakes of all ranks, on every rank."""
        shared = np.zeros([process.world, MISTAKES, 4])
        shared[process.rank, : len(self.mistakes)] = self.mistakes
        sums = np.array(sum_over_ranks([*self.bins.ravel(), *shared.ravel()], process))
        self.bins = sums[: self.bins.size].astype("int64").reshape(BINS, 3)
        rows = sums[self.bins.size :].reshape(-1, 4)
        self._keep(rows[rows[:, 0] > 0])  # the others are not filled

    def error(self) -> float:
        """Expected calibration error in percent."""
        images, right, units = self.bins.T
        return 100 * float(np.abs(right - units / _SCALE).sum() / images.sum())

    def draw(self) -> bytes:
        """The reliability diagram as PNG: accuracy over confidence, and how many images."""
        images, right, units = self.bins.T
        some = images > 0
        figure = new_figure(5, 6, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        edges, width = 100 * np.arange(BINS) / BINS, 100 / BINS
        accuracy = 100 * right / np.maximum(images, 1)
        upper.bar(edges, accuracy, width, align="edge", edgecolor="white")
        confidence = 100 * units[some] / _SCALE / images[some]
        upper.plot(confidence, accuracy[some], "k.", label="mean confidence and accuracy")
        upper.plot([0, 100], [0, 100], "--", color="gray", label="calibrated")
        upper.legend(loc="upper left")
        title = f"expected calibration error {self.error():.2f} %"
        upper.set(ylabel="accuracy, %", ylim=(0, 100), xlim=(0, 100), title=title)
        lower.bar(edges, images, width, align="edge", edgecolor="white")
        lower.set(xlabel="confidence, %", ylabel="images")
        return render(figure)

    def draw_mistakes(self, files, names: Sequence[str]) -> bytes:
        """The most confident mistakes as PNG: images of an `ImageIndex`, classes by name."""
        count = max(len(self.mistakes), 4)
        figure, grid = new_grid(count, 4, 2.6, 3.2, layout="constrained")
        for axes, (confidence, index, label, prediction) in zip(grid, self.mistakes):
            image = to_image(read_pixels(files.path(int(index)), files.exif_orientation))
            image.thumbnail([224, 224])
            axes.imshow(image)
            said, true = (names[int(c)][:24] for c in (prediction, label))
            file = printable(Path(files.path(int(index))).name)
            file = file if len(file) <= 30 else f"…{file[-29:]}"
            title = f"{file}\n{said} {100 * confidence:.1f} %\nlabel: {true}"
            axes.set_title(title, fontsize=8)
        return render(figure)


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


def write_report(metrics, names: Sequence[str], folder: Path, files=None) -> None:
    """Writes the files of a report (docs/tools.md); UserError if it cannot.

    ``metrics`` are of an evaluation with ``confusion=True``; without ``names`` the classes have
    numbers. Of ``files``, the `ImageIndex` evaluated, the most confident mistakes are shown.
    """
    calibration, classes = metrics.calibration, metrics.counts.shape[1]
    names = names or [str(label) for label in range(classes)]
    scores = class_scores(metrics.counts)
    scores.update(calibration_error=calibration.error(), negative_log_likelihood=metrics.loss)
    _log.info(", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in scores.items()))
    contents = {
        "per_class.csv": _per_class(metrics, names),
        "report.json": (json.dumps(scores, indent=1) + "\n").encode(),
        "reliability.png": calibration.draw(),
    }
    if classes <= PICTURE_CLASSES:
        contents["confusion.png"] = _draw_confusion(metrics, names)
    else:
        _log.info(f"no confusion.png: {classes} classes are more than {PICTURE_CLASSES}")
    if files is not None:
        rows = [
            [files.path(int(index)), names[int(label)], names[int(said)], f"{confidence:.6f}"]
            for confidence, index, label, said in calibration.mistakes
        ]
        contents["mistakes.csv"] = _csv([["image", "label", "prediction", "confidence"], *rows])
        contents["mistakes.png"] = calibration.draw_mistakes(files, names)
    for name, data in contents.items():
        write_atomically(data, folder / name)
        _log.info(f"wrote {folder / name}")


def _per_class(metrics, names: Sequence[str]) -> bytes:
    """Rows of each class, in percent; empty without images or predictions. Top-1 is its recall."""
    wrong = metrics.confusion[:, 0] != metrics.confusion[:, 1]
    mistakes = {}  # label -> its most frequent wrong prediction (the first of several), and images
    for label, other, count in metrics.confusion[wrong].tolist():
        if count > mistakes.get(label, (0, 0))[1]:
            mistakes[label] = other, count
    rows = [["label", "name", "images", "top1", "most_confused_with", "confused"]]
    rows[0] += ["precision", "recall", "f1"]

    def percent(part: int, whole: int) -> str:
        return f"{100 * part / whole:.2f}" if whole else ""

    for label, (name, images, right, said) in enumerate(zip(names, *metrics.counts.tolist())):
        other, count = mistakes.get(label, (None, 0))
        recall = percent(right, images)
        row = [label, name, images, recall, names[other] if count else "", count]
        rows.append([*row, percent(right, said), recall, percent(2 * right, images + said)])
    return _csv(rows)


def _csv(rows: Iterable[Sequence]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _draw_confusion(metrics, names: Sequence[str]) -> bytes:
    """The confusion matrix as PNG, in percent of each label's images."""
    labels, predictions, counts = metrics.confusion.T
    share = np.zeros([len(names), len(names)])
    share[labels, predictions] = 100 * counts / metrics.counts[0][labels]
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
