"""Classifies features by those of labelled images: weighted k-NN, or a linear classifier.

python tools/knn.py train.safetensors val.safetensors [-k 10 20 100 200] [-temperature 0.07]
python tools/knn.py train.safetensors val.safetensors -probe [-c 0.316]

Both files are those of tools/features.py. k-NN is DINO's (facebookresearch/dino, eval_knn.py). The
probe is multinomial logistic regression on standardised features, as scikit-learn defines it, with
its C. Neither holds more than a part of the features in memory.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import paddle
import paddle.nn.functional as F

from cli.errors import DataError, UserError, run_as_script
from cli.parser import Parser
from tools.common import require
from tools.features import Features, read_features
from utils import ProgressLine

_QUERIES, _ROWS = 4096, 8192  # features at a time: of those to classify, and of those to learn from


def knn_accuracies(
    train: Features, val: Features, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 in percent of the weighted k-NN classifier, for each k.

    A neighbour votes for its class with exp(cosine / temperature). (With k below 5, top-5 is top-k;
    equal votes are counted for the smaller label.)

    Raises:
        DataError: other channels or weights; fewer than k features to learn from.
    """
    _check(train, val)
    most, classes = max(ks), _classes(train, val)
    if most > len(train.labels):
        raise DataError(f"-k {most}: there are only {len(train.labels)} features to learn from")
    hits = {k: np.zeros(2, "int64") for k in ks}
    bar = ProgressLine("k-NN")
    for start in range(0, len(val.labels), _QUERIES):
        truth = val.labels[start : start + _QUERIES]
        cosines, labels = _neighbours(train, val.features[start : start + _QUERIES], most)
        weights = np.exp(cosines.astype("float64") / temperature)
        cells = np.arange(len(truth))[:, None] * classes + labels
        for k in ks:
            votes = np.bincount(cells[:, :k].ravel(), weights[:, :k].ravel(), len(truth) * classes)
            order = np.argsort(-votes.reshape(-1, classes), axis=1, kind="stable")
            right = order[:, : min(5, k)] == truth[:, None]
            hits[k] += right[:, 0].sum(), right.sum()
        bar(start + len(truth), len(val.labels))
    bar.end()
    return {k: tuple(100 * float(n) / len(val.labels) for n in hits[k]) for k in ks}


def _neighbours(train: Features, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and labels ``[B, k]`` of the nearest features to learn from, the nearest first."""
    queries = _unit(queries)
    cosines, labels = paddle.zeros([len(queries), 0]), paddle.zeros([len(queries), 0], "int64")
    for start in range(0, len(train.labels), _ROWS):
        rows = _unit(train.features[start : start + _ROWS])
        near, index = paddle.topk(paddle.matmul(queries, rows, transpose_y=True), min(k, len(rows)))
        found = paddle.to_tensor(train.labels[start : start + _ROWS])[index]
        cosines, labels = paddle.concat([cosines, near], 1), paddle.concat([labels, found], 1)
        cosines, index = paddle.topk(cosines, min(k, cosines.shape[1]))
        labels = paddle.take_along_axis(labels, index, 1)
    return cosines.numpy(), labels.numpy()


def _unit(features: np.ndarray) -> paddle.Tensor:
    return F.normalize(paddle.to_tensor(np.asarray(features, "float32")), axis=1)


class Probe:
    """A linear classifier on standardised features: minimises, as scikit-learn does,
    ``c * (sum of cross-entropies) + |weight|^2 / 2``, in float64 with L-BFGS.

    Args:
        train: the features to learn from.
        classes: K.
        c: inverse strength of the penalty; there is none on the bias.
        iterations: at most.
        tolerance: ends when no component of the gradient (of the mean) is larger.

    Attributes:
        weight: float64 ``[C, K]``, for standardised features.
        bias: float64 ``[K]``.
        converged: whether the tolerance was reached.
    """

    def __init__(
        self,
        train: Features,
        classes: int,
        c: float = 0.316,
        iterations: int = 1000,
        tolerance: float = 1e-6,
    ):
        require("-probe", ("scipy",))
        from scipy.optimize import minimize

        self._train, self._c = train, c
        self._shape = train.features.shape[1] + 1, classes  # the bias is the last row
        self._standardise()
        bar, count = ProgressLine("probe"), itertools.count(1)
        found = minimize(
            self._objective,
            np.zeros(self._shape[0] * classes),
            jac=True,
            method="L-BFGS-B",
            callback=lambda vector: bar(next(count), iterations),
            options={"maxiter": iterations, "maxfun": 2 * iterations, "gtol": tolerance, "ftol": 0},
        )
        bar.end()
        self.converged = bool(np.abs(found.jac).max() <= tolerance)
        *weight, self.bias = found.x.reshape(self._shape)
        self.weight = np.array(weight)

    def _standardise(self) -> None:
        rows, total, squares = len(self._train.labels), 0.0, 0.0
        for part in _parts(self._train.features):
            total = total + part.sum(0)
        self._mean = total / rows
        for part in _parts(self._train.features):
            squares = squares + ((part - self._mean) ** 2).sum(0)
        self._std = np.sqrt(squares / rows)
        self._std[self._std == 0] = 1

    def logits(self, part: np.ndarray, both: np.ndarray | None = None) -> tuple:
        """Float64 ``[B, K]``, and the standardised features ``[B, C]`` with a column of ones."""
        both = np.vstack([self.weight, self.bias]) if both is None else both
        x = np.hstack([(part - self._mean) / self._std, np.ones([len(part), 1])])
        x = paddle.to_tensor(x)
        return paddle.matmul(x, paddle.to_tensor(both)), x

    def _objective(self, vector: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective over ``c`` and the number of features, and its gradient."""
        both, rows = vector.reshape(self._shape), len(self._train.labels)
        loss, gradient = 0.0, np.zeros(self._shape)
        for start, part in zip(range(0, rows, _ROWS), _parts(self._train.features)):
            labels = paddle.to_tensor(self._train.labels[start : start + _ROWS])
            logits, x = self.logits(part, both)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            error = F.softmax(logits) - F.one_hot(labels, self._shape[1]).astype("float64")
            gradient += paddle.matmul(x, error, transpose_x=True).numpy()
        penalty = both.copy()
        penalty[-1] = 0
        loss = loss / rows + (penalty**2).sum() / (2 * self._c * rows)
        return loss, (gradient / rows + penalty / (self._c * rows)).ravel()

    def accuracies(self, val: Features) -> tuple[float, float]:
        """Top-1 and top-5 in percent."""
        hits, k = np.zeros(2, "int64"), min(5, self._shape[1])
        for start, part in zip(range(0, len(val.labels), _ROWS), _parts(val.features)):
            top = paddle.topk(self.logits(part)[0], k)[1].numpy()
            right = top == val.labels[start : start + _ROWS, None]
            hits += right[:, 0].sum(), right.sum()
        return tuple(100 * float(n) / len(val.labels) for n in hits)


def _parts(features: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(features), _ROWS):
        yield np.asarray(features[start : start + _ROWS], "float64")


def _classes(train: Features, val: Features) -> int:
    return int(max(train.labels.max(), val.labels.max())) + 1


def _check(train: Features, val: Features) -> None:
    here, there = train.features.shape[1], val.features.shape[1]
    if here != there:
        raise DataError(f"features of {here} and {there} channels: they are of different models")
    if train.weights and val.weights and train.weights[-64:] != val.weights[-64:]:  # SHA-256
        raise DataError(
            f"features of different weights ({train.weights}; {val.weights}): write both with the "
            "same -pretrained"
        )


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
    _check(train, val)
    if args.probe:
        probe = Probe(train, _classes(train, val), args.c, args.iterations)
        if not probe.converged:
            print(f"warning: not converged after {args.iterations} iterations (-iterations)")
        print("linear probe: top-1 {:.2f} %, top-5 {:.2f} %".format(*probe.accuracies(val)))
        return
    fitting = [k for k in args.k if k <= len(train.labels)] or args.k
    if left := [k for k in args.k if k not in fitting]:
        print(f"left out: k {left}, for there are only {len(train.labels)} features to learn from")
    for k, (top1, top5) in knn_accuracies(train, val, fitting, args.temperature).items():
        print(f"{k}-NN: top-1 {top1:.2f} %, top-5 {top5:.2f} %")


if __name__ == "__main__":
    run_as_script(main)
