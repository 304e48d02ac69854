"""What a report says beyond accuracy: scores of the confusion, calibration, confident mistakes."""

from __future__ import annotations

import numpy as np

from loading.images import read_image, upright
from parallel.process import Process, sum_over_ranks
from training.pictures import new_figure, render

BINS = 15  # of the confidence, as in Guo et al., "On Calibration of Modern Neural Networks"
MISTAKES = 16  # in the picture
_SCALE = 2**30  # confidences are summed as integers: exact, in any order, up to 2**23 images


class Calibration:
    """Counts how confident a classifier is and how right; its memory does not grow with images.

    Attributes:
        bins: int64 ``[BINS, 3]``: images, right ones and sum of confidence in units of 1 / 2**30
            of each bin; bin i holds confidences in (i / BINS, (i + 1) / BINS].
        mistakes: float64 ``[n, 4]``: confidence, image, label and prediction of the most
            confident mistakes, the most confident first.
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
        shared = np.zeros([process.world, MISTAKES, 5])
        shared[process.rank, : len(self.mistakes), :4] = self.mistakes
        shared[process.rank, : len(self.mistakes), 4] = 1  # a row that is filled
        sums = np.array(sum_over_ranks([*self.bins.ravel(), *shared.ravel()], process))
        self.bins = sums[: self.bins.size].astype("int64").reshape(BINS, 3)
        rows = sums[self.bins.size :].reshape(-1, 5)
        self._keep(rows[rows[:, 4] == 1, :4])

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

    def draw_mistakes(self, files, names: list[str]) -> bytes:
        """The most confident mistakes as PNG.

        Args:
            files: the data set's `ImageIndex`.
            names: of the classes.
        """
        columns = 4
        rows = -(-max(len(self.mistakes), 1) // columns)
        figure = new_figure(2.6 * columns, 3 * rows, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, (confidence, index, label, prediction) in zip(grid, self.mistakes):
            image = read_image(files.path(int(index)))
            image = upright(image) if files.exif_orientation else image
            image.thumbnail([224, 224])
            axes.imshow(image)
            said, true = (names[int(c)][:24] for c in (prediction, label))
            axes.set_title(f"{said} {100 * confidence:.1f} %\nlabel: {true}", fontsize=8)
        return render(figure)


def class_scores(counts: np.ndarray) -> dict[str, float]:
    """Scores that weigh classes equally, in percent, from `Metrics.counts`.

    Balanced accuracy is the mean over classes with images of the share of them that is right.
    Macro F1 is the mean over classes that occur, as label or prediction, of
    2 * right / (images + predictions).
    """
    images, right, predictions = counts
    both = images + predictions
    return {
        "balanced_accuracy": float(100 * np.mean(right[images > 0] / images[images > 0])),
        "macro_f1": float(100 * np.mean(2 * right[both > 0] / both[both > 0])),
    }
