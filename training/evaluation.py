"""Evaluation: every image once, exact counts over all ranks; and the run of ``-eval``."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F

from cli.errors import UserError
from datasets import build_loader
from loading.real_labels import read_real_labels
from parallel.process import Process, from_all, wait_for_all
from resmlp import build_resmlp, load_pretrained
from storage.run_folder import RunFolder
from storage.weights import WeightFile
from training.eval_report import class_scores, write_report
from training.precision import predictor
from utils import ProgressLine

_log = logging.getLogger("resmlp")


@dataclass
class Metrics:
    """What an evaluation found; accuracies in percent, the loss without label smoothing."""

    loss: float
    top1: float
    top5: float
    images: int
    seconds: float
    rows: np.ndarray | None = None  # float64 [images, 4], see `eval_report.write_report`
    # with several right labels an image; images without any are left out
    real_top1: float | None = None
    real_top5: float | None = None
    real_images: int | None = None
    # among the classes of the data, where the model has more
    subset_top1: float | None = None
    subset_top5: float | None = None
    subset_classes: int | None = None
    counts: np.ndarray | None = None  # int64 [3, K]: each class's images, right ones, predictions

    def score(self, name: str) -> float:
        """BEST_METRIC's value, negative for the loss: the higher the better."""
        if name == "loss":
            return -self.loss
        return getattr(self, name) if name in ("top1", "top5") else class_scores(self.counts)[name]

    @property
    def balanced_accuracy(self) -> float | None:
        """Percent (`class_scores`), where classes have unequal numbers of images; else None."""
        images = () if self.counts is None else self.counts[0]
        return self.score("balanced_accuracy") if len({*images} - {0}) > 1 else None

    def scores(self) -> dict[str, float]:
        """The numbers that were measured, by name: those of ``eval.json``."""
        values = {**vars(self), "balanced_accuracy": self.balanced_accuracy}
        del values["seconds"]
        return {k: value for k, value in values.items() if isinstance(value, (int, float))}

    def __str__(self) -> str:
        more, balanced = "", self.balanced_accuracy
        balanced = "" if balanced is None else f" (balanced accuracy {balanced:.2f} %)"
        if self.subset_classes:
            more = f"; among the {self.subset_classes} classes of the data: "
            more += f"top-1 {self.subset_top1:.2f} %, top-5 {self.subset_top5:.2f} %"
        if self.real_images:
            more += f"; real labels: top-1 {self.real_top1:.2f} %, top-5 {self.real_top5:.2f} %"
            more += f", {self.real_images} images"
        return (
            f"loss {self.loss:.4f}, top-1 {self.top1:.2f} %{balanced}, top-5 {self.top5:.2f} %, "
            f"{self.images} images, {self.images / max(self.seconds, 1e-9):.1f} images/s{more}"
        )


class Result(SimpleNamespace):
    """What a run ends with: ``folder``, ``rank``, the numbers of its last evaluation (of the EMA
    where there is one; None without any), ``best_top1`` of a training run. ``result["top1"]`` reads
    as ``result.top1``.
    """

    def __getitem__(self, name: str):
        return getattr(self, name)

    @classmethod
    def of(cls, folder: Path, rank: int, metrics: Metrics | None, best: float | None = None):
        names = ("top1", "top5", "loss", "images", "balanced_accuracy")
        found = {name: metrics and getattr(metrics, name) for name in names}
        return cls(folder=folder, rank=rank, **found, best_top1=best)


class _Sums:
    """What one model has made of the images so far; see `evaluate` for the arguments."""

    def __init__(self, num_classes: int, rows: bool, accepted, subset):
        self.num_classes, self.with_rows = num_classes, rows
        self.accepted, self.subset = accepted, subset or []
        inside = np.isin(np.arange(num_classes), self.subset)
        self.outside = paddle.to_tensor(np.where(inside, 0, -np.inf).astype("float32"))
        self.loss = paddle.zeros([], "float64")
        # hits of top-1 and top-k, the same in the subset, the same by `accepted` and the images
        # that have such labels; then `Metrics.counts`
        self.counts = paddle.zeros([7 + 3 * num_classes], "int64")
        self.rows = [np.zeros([0, 4])]  # `Metrics.rows`

    def add(self, logits: paddle.Tensor, labels: paddle.Tensor, indices) -> None:
        logits, classes = logits.astype("float32"), self.num_classes
        own = paddle.take_along_axis(logits, labels.unsqueeze(-1), 1)[:, 0]
        # (Paddle's log-softmax ends at 64 on a CPU.)
        self.loss += (paddle.logsumexp(logits, axis=-1) - own).astype("float64").sum()
        top = paddle.topk(logits, min(5, classes), axis=-1)[1]  # [B, k]
        hit = (top == labels.unsqueeze(-1)).astype("int64")
        hits = [hit[:, 0].sum(), hit.sum(), *paddle.zeros([5], "int64")]
        if self.subset:
            inside = paddle.topk(logits + self.outside, min(5, len(self.subset)), axis=-1)[1]
            inside = (inside == labels.unsqueeze(-1)).astype("int64")
            hits[2:4] = inside[:, 0].sum(), inside.sum()
        if self.accepted is not None:
            right = paddle.to_tensor(self.accepted[np.asarray(indices)])  # [B, M]
            found = (top.unsqueeze(2) == right.unsqueeze(1)).any(axis=2)  # [B, k]
            hits[4:] = found[:, 0].sum(), found.any(axis=1).sum(), (right >= 0).any(axis=1).sum()
        cells = [paddle.arange(7), labels + 7, labels + (7 + classes), top[:, 0] + 7 + 2 * classes]
        one = paddle.ones_like(labels)
        more = paddle.concat([paddle.stack(hits), one, hit[:, 0], one])
        self.counts = paddle.index_add(self.counts, paddle.concat(cells), 0, more)
        if self.with_rows:
            confidence = F.softmax(logits, axis=-1).max(axis=-1).numpy()
            row = confidence, indices, labels.numpy(), top[:, 0].numpy()
            self.rows.append(np.stack(row, axis=1).astype("float64"))

    def metrics(self, process: Process, seen: int, stopped: bool, start: float) -> Metrics | None:
        """The sums over all ranks as `Metrics`; None when any rank broke off."""
        own = np.array([float(self.loss), seen, stopped, *self.counts.numpy()])
        loss, total, stopped, *rest = np.sum(from_all(own, process), axis=0).tolist()
        if stopped:
            return None
        if not np.isfinite(loss):
            raise UserError(
                "evaluation: the loss is not finite; the weights hold or produce inf or NaN"
            )
        top1, topk, *inner = [100 * hits / total for hits in rest[:4]]
        metrics = Metrics(loss / total, top1, topk, int(total), time.monotonic() - start)
        metrics.counts = np.array(rest[7:], "int64").reshape(3, -1)
        if self.with_rows:
            rows = np.concatenate(from_all(np.concatenate(self.rows), process))
            metrics.rows = rows[rows[:, 1].argsort()]
        if self.accepted is not None:
            *right, labelled = rest[4:7]
            metrics.real_images = int(labelled)
            if labelled:
                metrics.real_top1, metrics.real_top5 = (100 * hits / labelled for hits in right)
        if self.subset:
            metrics.subset_top1, metrics.subset_top5 = inner
            metrics.subset_classes = len(self.subset)
        return metrics


@paddle.no_grad()
def evaluate(
    models: Sequence[Callable],
    loader,
    process: Process,
    num_classes: int,
    rows: bool = False,
    stop: Callable[[], bool] = lambda: False,
    label: str = "",
    accepted: np.ndarray | None = None,
    subset: list[int] | None = None,
) -> list[Metrics] | None:
    """Evaluates classifiers in one pass over a loader's whole data set; all ranks call together.

    Sums stay on the device and are reduced once, as integers and float64, so the counts are the
    same for any number of processes and any batch size.

    Args:
        models: each makes of uint8 images ``[B, H, W, 3]`` logits ``[B, K]``, K ``num_classes``;
            top-5 is top-K where K is smaller.
        rows: also collect `Metrics.rows`, batch by batch.
        stop: called before each batch: whether to break off.
        label: of a line on the terminal that shows how far it is.
        accepted: int64 ``[images, M]``, labels that count as right, filled up with -1: also
            measures ``real_top1`` and ``real_top5`` (a right one is among the predictions).
        subset: the classes that the data have: also measures ``subset_top1`` and ``subset_top5``,
            with the other logits left out, as the authors of ImageNet-A and -R do.

    Returns the metrics of each model, the same on every rank; None when any rank broke off.
    Raises UserError: a logit is not finite.
    """
    start, seen, stopped = time.monotonic(), 0, False
    bar = ProgressLine(label, process.main and bool(label))
    sums = [_Sums(num_classes, rows, accepted, subset) for _ in models]
    for number, (images, labels, indices) in enumerate(loader):
        if stopped := stop():
            break
        for model, own in zip(models, sums):
            own.add(model(images), labels, indices)
        seen += len(labels)
        bar(number + 1, len(loader))
    bar.end()
    wait_for_all(process)  # loading may keep one rank longer than a collective waits
    found = [own.metrics(process, seen, stopped, start) for own in sums]
    return None if None in found else found


def run_evaluation(config, process: Process, folder: RunFolder, weights: WeightFile) -> Result:
    """The run of ``-eval``: measures weights on the validation images, writes eval.json.

    UserError if weights, data or labels do not fit, or the report cannot be written.
    """
    share = process.rank, process.world
    loader = build_loader(config, "val", *share, _log.info, weights.classes)
    model, count = build_resmlp(config), config.MODEL.NUM_CLASSES
    for note in load_pretrained(model, config, file=weights):
        _log.info(note)
    model.eval()
    dataset, accepted = loader.dataset, None
    if config.EVAL_REAL_LABELS:
        accepted = read_real_labels(config.EVAL_REAL_LABELS, dataset.files, count)
    (metrics,) = evaluate(
        [predictor(config, process.on_gpu, model)],
        loader,
        process,
        count,
        config.EVAL_REPORT,
        label="evaluation",
        accepted=accepted,
        subset=dataset.files.subset,
    )
    _log.info(f"evaluation of {config.MODEL.NAME}: {metrics}")
    folder.write("eval.json", json.dumps(metrics.scores(), indent=1) + "\n")
    if config.EVAL_REPORT and process.main:
        write_report(metrics, dataset.classes.names, folder.path, dataset.files)
    return Result.of(folder.path, process.rank, metrics)
