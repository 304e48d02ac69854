"""Classifies features by those of labelled images: weighted k-NN, or a linear classifier.

python tools/knn.py train.safetensors val.safetensors [-k 10 20 100 200] [-temperature 0.07]
python tools/knn.py train.safetensors val.safetensors -probe [-c 0.316]

Both files are those of tools/features.py. k-NN is DINO's (facebookresearch/dino, eval_knn.py); it
holds a part of the features in memory at a time. The probe is scikit-learn's LogisticRegression on
standardised features; it holds all to learn from.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import warnings
from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F

from cli.errors import DataError, UserError, run_as_script
from cli.parser import Parser
from tools.features import Features, read_features
from utils import ProgressLine

_QUERIES, _ROWS = 4096, 8192  # features at a time: of those to classify, and of those to learn from


def knn_accuracies(
    train: Features, val: Features, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 in percent of the weighted k-NN classifier, for each k.

    A neighbour votes for its class with exp(cosine / temperature); of equal votes the smaller label
    wins, and with k below 5, top-5 is top-k. A k above the features to learn from is left out, with
    a line; DataError if there is no other, or as `comparable`.
    """
    val, count = comparable(train, val), len(train.labels)
    if min(ks) > count:
        raise DataError(f"-k {max(ks)}: there are only {count} features to learn from")
    if left := [k for k in ks if k > count]:
        print(f"left out: k {left}, for there are only {count} features to learn from")
    ks = [k for k in ks if k <= count]
    classes, columns = np.unique(train.labels, return_inverse=True)
    top, bar = {k: [] for k in ks}, ProgressLine("k-NN")
    for start in range(0, len(val.labels), _QUERIES):
        cosines, near = _neighbours(train, val.features[start : start + _QUERIES], max(ks))
        weights = np.exp(cosines.astype("float64") / temperature)
        cells = np.arange(len(near))[:, None] * len(classes) + columns[near]
        for k in ks:
            size = len(near) * len(classes)
            votes = np.bincount(cells[:, :k].ravel(), weights[:, :k].ravel(), size)
            order = np.argsort(-votes.reshape(len(near), -1), axis=1, kind="stable")
            top[k].append(classes[order[:, : min(5, k)]])
        bar(start + len(near), len(val.labels))
    bar.end()
    return {k: _accuracies(np.concatenate(top[k]), val.labels) for k in ks}


def _accuracies(top: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Top-1 and top-5 in percent; ``top`` are the likeliest classes, ``[N, up to 5]``."""
    right = top == labels[:, None]
    return 100 * float(right[:, 0].mean()), 100 * float(right.any(1).mean())


def _neighbours(train: Features, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and indices ``[B, k]`` of the nearest features to learn from, the nearest first."""
    queries = _unit(queries)
    cosines, indices = paddle.zeros([len(queries), 0]), paddle.zeros([len(queries), 0], "int64")
    for start in range(0, len(train.labels), _ROWS):
        rows = _unit(train.features[start : start + _ROWS])
        near, index = paddle.topk(paddle.matmul(queries, rows, transpose_y=True), min(k, len(rows)))
        cosines = paddle.concat([cosines, near], 1)
        indices = paddle.concat([indices, index + start], 1)
        cosines, index = paddle.topk(cosines, min(k, cosines.shape[1]))
        indices = paddle.take_along_axis(indices, index, 1)
    return cosines.numpy(), indices.numpy()


def _unit(features: np.ndarray) -> paddle.Tensor:
    return F.normalize(paddle.to_tensor(np.asarray(features, "float32")), axis=1)


def probe_accuracies(
    train: Features, val: Features, c: float = 0.316, iterations: int = 1000
) -> tuple[float, float]:
    """Top-1 and top-5 in percent of a linear classifier, with a warning if it did not converge."""
    val = comparable(train, val)
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise UserError("-probe needs `pip install scikit-learn`") from None
    if (train.labels == train.labels[0]).all():
        raise DataError("-probe: the features to learn from are all of one class")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=iterations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said below
        classifier.fit(np.asarray(train.features, "float32"), train.labels)
    if classifier[-1].n_iter_.max() >= iterations:
        print(f"warning: not converged after {iterations} iterations (-iterations)")
    odds = classifier.predict_proba(np.asarray(val.features, "float32"))
    order = np.argsort(-odds, axis=1, kind="stable")[:, :5]
    return _accuracies(classifier.classes_[order], val.labels)


def comparable(train: Features, val: Features) -> Features:
    """``val`` with the labels of ``train``; DataError for other channels, weights or classes."""
    here, there = train.features.shape[1], val.features.shape[1]
    if here != there:
        raise DataError(f"features of {here} and {there} channels: they are of different models")
    if train.weights and val.weights and train.weights[-64:] != val.weights[-64:]:  # SHA-256
        different = f"features of different weights ({train.weights}; {val.weights})"
        raise DataError(f"{different}: write both with the same -pretrained")
    labels, line = val.classes.labels_in(train.classes, subset=True)
    if line:
        print(line)
    return val if labels is None else val._replace(labels=np.array(labels)[val.labels])


def main() -> None:
    parser = Parser(__doc__)
    parser.paths("train", "features to learn from")
    parser.paths("val", "features to classify")
    ks = [10, 20, 100, 200]
    parser.flag("k", f"neighbours (default: {ks})", type=int, nargs="+", metavar="N", default=ks)
    parser.flag("temperature", "of the votes", type=float, metavar="T", default=0.07)
    parser.flag("probe", "a linear classifier in place of k-NN", action="store_true")
    parser.flag("c", "of the probe: scikit-learn's C", type=float, metavar="C", default=0.316)
    parser.flag("iterations", "of the probe, at most", type=int, metavar="N", default=1000)
    args = parser.parse_args()
    if min(*args.k, args.iterations) < 1 or not (args.temperature > 0 and args.c > 0):
        raise UserError("-k, -temperature, -c and -iterations are above 0")
    train, val = read_features(args.train), read_features(args.val)
    if args.probe:
        scores = probe_accuracies(train, val, args.c, args.iterations)
        print("linear probe: top-1 {:.2f} %, top-5 {:.2f} %".format(*scores))
        return
    for k, (top1, top5) in knn_accuracies(train, val, args.k, args.temperature).items():
        print(f"{k}-NN: top-1 {top1:.2f} %, top-5 {top5:.2f} %")


if __name__ == "__main__":
    run_as_script(main)
