import csv
import json
import logging
import tracemalloc

import numpy as np
import paddle
import pytest
from PIL import Image

import engine
from cli.errors import UserError
from loading.imagenet import wordnet_ids
from parallel.process import Process
from resmlp import build_resmlp
from storage.weights import write_weights
from training.eval_report import worst_mistakes, write_report
from training.evaluation import Metrics, evaluate

from .helpers.tiny_data import make_config


def run(logits, labels, batch=4, **options):
    """Metrics of logits, which stand in place of images."""
    logits = logits.astype("float32")
    cuts = [np.arange(i, min(i + batch, len(labels))) for i in range(0, len(labels), batch)]
    loader = [
        (paddle.to_tensor(logits[cut]), paddle.to_tensor(labels[cut]), cut.tolist()) for cut in cuts
    ]
    (found,) = evaluate([lambda x: x], loader, Process(), logits.shape[1], **options)
    return found


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
def test_metrics_are_numpys_for_any_batch_size(batch):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=[50, 9]), rng.integers(0, 9, 50)
    found = run(logits, labels, batch)
    order = np.argsort(-logits, axis=1)
    top1 = 100 * np.mean(order[:, 0] == labels)
    top5 = 100 * np.mean((order[:, :5] == labels[:, None]).any(1))
    shifted = logits - logits.max(1, keepdims=True)
    loss = np.mean(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(50), labels])
    assert (found.top1, found.top5, found.images) == (top1, top5, 50)
    assert np.isclose(found.loss, loss, rtol=1e-6)
    assert (type(found.top1), type(found.images)) == (float, int)  # a result is printed


@pytest.mark.parametrize(
    "logits, labels, expected",
    [
        ([[0, 500.0, -500.0], [300.0, 0, 0]], [2, 1], {"loss": (1000 + 300) / 2}),  # no upper end
        (np.eye(3), [0, 0, 0], {"top5": 100.0, "top1": 100 / 3}),  # fewer classes than five
        (np.zeros([10, 10]), range(10), {"top1": 10.0}),  # equal logits are not all called right
    ],
)
def test_metrics_at_the_edges(logits, labels, expected):
    found = run(np.array(logits), np.array(labels))
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-6)


def test_balanced_accuracy_is_said_where_classes_are_unequal():
    predictions = np.array([0, 0, 0, 1, 1, 2])
    unequal = run(np.eye(4)[predictions], np.array([0, 0, 0, 0, 1, 1]))
    assert unequal.counts.tolist() == [[4, 2, 0, 0], [3, 1, 0, 0], [3, 2, 1, 0]]
    assert unequal.balanced_accuracy == unequal.score("balanced_accuracy") == 62.5
    assert "top-1 66.67 % (balanced accuracy 62.50 %), top-5" in str(unequal)
    equal = run(np.eye(4)[predictions], np.array([0, 0, 0, 1, 1, 1]))
    assert equal.balanced_accuracy is None and "balanced" not in str(equal)
    assert unequal.score("top5") == 100.0 and unequal.score("loss") == -unequal.loss
    assert unequal.score("macro_f1") == pytest.approx(100 * (6 / 7 + 1 / 2 + 0) / 3)


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def metrics_of(pairs, classes):
    """Those of an evaluation with so many images of these labels and predictions."""
    labels, predictions = np.concatenate([[pair] * count for *pair, count in pairs]).T
    right = labels[labels == predictions]
    counts = np.stack([np.bincount(x, None, classes) for x in (labels, right, predictions)])
    rows = np.stack([np.full(len(labels), 0.5), np.arange(len(labels)), labels, predictions], 1)
    return Metrics(0.0, 30.0, 100.0, 10, 1.0, rows, counts=counts)


def test_the_report_names_each_class_with_its_most_frequent_mistake(tmp_path):
    metrics = metrics_of([[0, 0, 3], [0, 1, 1], [0, 2, 2], [2, 0, 4]], 3)
    write_report(metrics, ["a", "b", "$c"], tmp_path)
    assert rows_of(tmp_path / "per_class.csv") == [
        ["0", "a", "6", "50.00", "$c", "2", "42.86", "50.00", "46.15"],
        ["1", "b", "0", "", "", "0", "0.00", "", "0.00"],
        ["2", "$c", "4", "0.00", "a", "4", "0.00", "0.00", "0.00"],
    ]
    assert Image.open(tmp_path / "confusion.png").size > (300, 300)
    assert [path.name for path in tmp_path.glob("*.csv")] == ["per_class.csv"]


def test_very_many_classes_are_reported_without_a_picture_or_their_square_in_memory(
    tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    classes = 10**5
    metrics = metrics_of([[7, 7, 1], [7, classes - 1, 2]], classes)
    tracemalloc.start()
    write_report(metrics, (), tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert rows_of(tmp_path / "per_class.csv")[7][:6] == ["7", "7", "3", "33.33", "99999", "2"]
    assert "no confusion.png: 100000 classes are more than 1000" in caplog.text
    assert not (tmp_path / "confusion.png").exists()


def test_a_folder_with_some_classes_of_imagenet_is_evaluated_among_them_too(tmp_path):
    config = make_config(tmp_path, tmp_path / "a", "MODEL.NUM_CLASSES", 1000, "EVAL", True)
    rng = np.random.default_rng(0)
    for label in (1, 6, 999):
        path = tmp_path / "a" / wordnet_ids()[label] / "x.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, [16, 16, 3], dtype=np.uint8)).save(path)
    state = {name: value.numpy() for name, value in build_resmlp(config).state_dict().items()}
    state["head.weight"][:], state["head.bias"][:] = 0, 0
    state["head.bias"][[0, 6]] = 2, 1  # all images are of class 0; among the three, of class 6
    write_weights(state, tmp_path / "w.pdparams")
    opts = ["MODEL.PRETRAINED", tmp_path / "w", "EVAL", True, "EVAL_REPORT", True]
    engine.run(make_config(tmp_path, tmp_path / "a", "MODEL.NUM_CLASSES", 1000, *opts))
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (found["top1"], found["images"], found["subset_classes"]) == (0.0, 3, 3)
    assert found["subset_top1"] == 100 / 3 and found["subset_top5"] == 100.0
    rows = rows_of(tmp_path / "run" / "per_class.csv")
    assert rows[6][:6] == ["6", "n01498041", "1", "0.00", "n01440764", "1"]
    mistakes = rows_of(tmp_path / "run" / "mistakes.csv")
    assert len(mistakes) == 3 and {row[2] for row in mistakes} == {"n01440764"}
    assert mistakes[0][0] == str(tmp_path / "a" / mistakes[0][1] / "x.png")


def test_a_logit_that_is_not_finite_is_an_error():
    logits = np.eye(3)
    logits[1, 1] = np.nan
    with pytest.raises(UserError, match="not finite"):
        run(logits, np.arange(3))


def softmax(logits):
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def test_the_scores_of_a_report_are_scikit_learns(tmp_path):
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss
    from sklearn.metrics import precision_recall_fscore_support as scores_of_classes

    rng = np.random.default_rng(3)
    logits, labels = 2 * rng.normal(size=[400, 6]).astype("float32"), rng.integers(0, 5, 400)
    logits[np.arange(400), labels] += 2
    logits[:, 4] -= 1
    write_report(run(logits, labels, 7, rows=True), (), tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    odds, predictions = softmax(logits.astype("float64")), logits.argmax(1)
    right, sure = predictions == labels, odds.max(1)
    accuracy, confidence = calibration_curve(right, sure, n_bins=15)
    share = np.histogram(sure, np.linspace(0, 1, 16))[0] / 400
    gap = 100 * np.sum(share[share > 0] * np.abs(accuracy - confidence))
    assert found["balanced_accuracy"] == pytest.approx(
        100 * balanced_accuracy_score(labels, predictions)
    )
    assert found["macro_f1"] == pytest.approx(100 * f1_score(labels, predictions, average="macro"))
    assert found["calibration_error"] == pytest.approx(gap, abs=1e-4)
    assert found["negative_log_likelihood"] == pytest.approx(
        log_loss(labels, odds, labels=range(6)), rel=1e-5
    )
    expected = 100 * np.array(scores_of_classes(labels, predictions, labels=range(5))[:3]).T
    rows = np.array([row[6:] for row in rows_of(tmp_path / "per_class.csv")[:5]], "float64")
    np.testing.assert_allclose(rows, expected, atol=0.0051)
    assert Image.open(tmp_path / "reliability.png").size > (300, 300)


def test_the_most_confident_mistakes_are_kept_in_order_for_any_batch_size():
    rng = np.random.default_rng(4)
    logits, labels = rng.normal(size=[300, 6]), rng.integers(0, 6, 300)
    sure, predictions = softmax(logits).max(1), logits.argmax(1)
    wrong = [i for i in np.argsort(-sure) if predictions[i] != labels[i]][:16]
    for batch in (1, 7, 300):
        mistakes = worst_mistakes(run(logits, labels, batch, rows=True).rows)
        assert mistakes[:, 1].tolist() == wrong
        assert mistakes[:, 2].tolist() == labels[wrong].tolist()
        assert mistakes[:, 3].tolist() == predictions[wrong].tolist()
        assert np.allclose(mistakes[:, 0], sure[wrong], atol=1e-6)
