"""DINO's weighted k-NN and the linear probe against scikit-learn and NumPy in float64.

There are more features than are in memory at a time (8,192 and 4,096).
"""

from cpu import setup  # noqa: F401  isort: skip

import numpy as np
import pytest

from cli.errors import DataError
from tools.features import Features
from tools.knn import knn_accuracies, probe_accuracies


def clusters(count, classes, channels, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(0).normal(size=[classes, channels])
    features = centres[labels] + spread * rng.normal(size=[count, channels])
    return Features(features.astype("float32"), labels)


@pytest.fixture(scope="module")
def sets():
    return clusters(8400, 12, 6, 1), clusters(4200, 12, 6, 2)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_k_nn_is_float64s(sets, temperature):
    """Whose every step is made all at once."""
    features = (x.features.astype("float64") for x in sets)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in features)
    near = np.argsort(-(b @ a.T), axis=1, kind="stable")[:, :200]
    cosines, labels = np.take_along_axis(b @ a.T, near, 1), sets[0].labels[near]
    found = knn_accuracies(*sets, [1, 10, 20, 100, 200], temperature)
    for k, both in found.items():
        votes = np.zeros([len(labels), 12])
        rows = np.arange(len(labels))[:, None]
        np.add.at(votes, (rows, labels[:, :k]), np.exp(cosines[:, :k] / temperature))
        order = np.argsort(-votes, axis=1, kind="stable")[:, : min(5, k)]
        right = order == sets[1].labels[:, None]
        expected = 100 * right[:, 0].mean(), 100 * right.any(1).mean()
        assert both == pytest.approx(expected, abs=0.05)  # two images
    assert 30 < found[20][0] < 95 and len({one for one, _ in found.values()}) > 2
    half = (Features(x.features.astype("float16"), x.labels) for x in sets)
    assert knn_accuracies(*half, [20], temperature)[20][0] == pytest.approx(found[20][0], abs=0.3)


def test_k_nn_is_scikit_learns(sets):
    from sklearn.neighbors import KNeighborsClassifier

    train, val = sets
    for k, (top1, _) in knn_accuracies(train, val, [10, 100]).items():
        vote = lambda distances: np.exp((1 - distances) / 0.07)  # noqa: E731
        theirs = KNeighborsClassifier(k, weights=vote, metric="cosine", algorithm="brute")
        theirs.fit(train.features.astype("float64"), train.labels)
        score = theirs.score(val.features.astype("float64"), val.labels)
        assert top1 == pytest.approx(100 * score, abs=0.05)


def test_the_probe_is_scikit_learns_in_float64(sets, capsys):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scale, offset = [1, 10, 0.1, 1, 5, 0], [0, 50, 0, 0, 0, 1]
    train, val = (Features(x.features * scale + offset, x.labels) for x in sets)
    for c in (0.316, 1e-4):
        scaler = StandardScaler().fit(train.features)
        theirs = LogisticRegression(C=c, tol=1e-10, max_iter=5000)
        theirs.fit(scaler.transform(train.features), train.labels)
        odds = theirs.predict_proba(scaler.transform(val.features))
        right = np.argsort(-odds, axis=1)[:, :5] == val.labels[:, None]
        expected = 100 * right[:, 0].mean(), 100 * right.any(1).mean()
        assert probe_accuracies(train, val, c) == pytest.approx(expected, abs=0.05)
    assert capsys.readouterr().out == ""
    probe_accuracies(train, val, iterations=1)
    assert "warning: not converged after 1 iterations" in capsys.readouterr().out


def test_labels_are_names_and_not_places_and_features_have_to_fit(sets):
    """Large ones, and those that only one of the two has."""
    train, val = sets
    far = [x._replace(labels=x.labels * 10**7) for x in sets]
    assert knn_accuracies(*far, [10]) == knn_accuracies(train, val, [10])
    other = val._replace(labels=np.where(val.labels == 3, 10**8, val.labels))
    share = (val.labels == 3).mean()
    for scores in (knn_accuracies(train, other, [1])[1], probe_accuracies(train, other)):
        assert 0 < scores[0] <= 100 * (1 - share)
    with pytest.raises(DataError, match="6 and 5 channels: they are of different models"):
        knn_accuracies(train, Features(val.features[:, :5], val.labels), [10])
    with pytest.raises(DataError, match="there are only 8400 features"):
        knn_accuracies(train, val, [8401])
