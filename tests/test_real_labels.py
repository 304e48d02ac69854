"""ImageNet-ReaL: which labels an image has, and how predictions are counted with them."""

import json

import numpy as np
import paddle
import pytest
from PIL import Image

import engine
from cli.errors import DataError
from loading.files import ImageIndex
from loading.real_labels import read_real_labels
from parallel.process import Process
from training.evaluation import evaluate

from .helpers.tiny_data import make_config, make_data


def index_of(*numbers):
    files = ImageIndex("/data")
    for number in numbers:
        files.add(f"val/x/ILSVRC2012_val_{number:08d}.JPEG".encode(), 0)
    return files


def write(tmp_path, contents):
    path = tmp_path / "real.json"
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return path


@pytest.mark.parametrize(
    "contents, message",
    [
        ("[[1]", "is no JSON; expected the published real.json"),
        ({"a": 1}, "expected a list with a list of labels"),
        ([[1], [8]], r"entry 2: expected a list of labels 0 .. 7, found \[8\]"),
        ([[1], 3], "entry 2: expected a list of labels 0 .. 7, found 3"),
        ([[1]], "ILSVRC2012_val_00000002.JPEG: .*has no labels for it"),
        ([[], []], "none of the 2 images has a label"),
        (None, "real.json: cannot be read: No such file"),
    ],
)
def test_a_file_that_is_not_real_json_is_refused(tmp_path, contents, message):
    path = tmp_path / "real.json" if contents is None else write(tmp_path, contents)
    with pytest.raises(DataError, match=message):
        read_real_labels(path, index_of(1, 2), 8)


def test_labels_go_by_the_number_in_an_images_name(tmp_path):
    path, files = write(tmp_path, [[7], [], [1, 2]]), index_of(3, 1, 2)
    assert read_real_labels(path, files, 8).tolist() == [[1, 2], [7, -1], [-1, -1]]
    files.add(b"val/cat.png", 0)
    with pytest.raises(DataError, match="cat.png: .*has no labels for it; they go by the names"):
        read_real_labels(path, files, 8)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_counts_are_timms_on_the_same_predictions(tmp_path, batch):
    torch = pytest.importorskip("torch")
    timm_data = pytest.importorskip("timm.data")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=[90, 12]).astype("float32")
    real = [rng.choice(12, rng.integers(0, 4), replace=False).tolist() for _ in range(90)]
    path = write(tmp_path, real)
    order = rng.permutation(90)
    files = index_of(*(order + 1))
    names = [files.path(index) for index in range(90)]
    theirs = timm_data.RealLabelsImagenet(names, real_json=str(path), topk=(1, 5))
    theirs.add_result(torch.from_numpy(logits))
    cuts = [range(i, min(i + batch, 90)) for i in range(0, 90, batch)]
    loader = [
        (paddle.to_tensor(logits[list(c)]), paddle.zeros([len(c)], "int64"), list(c)) for c in cuts
    ]
    accepted = read_real_labels(path, files, 12)
    (ours,) = evaluate([lambda x: x], loader, Process(), 12, accepted=accepted)
    assert ours.real_top1 == pytest.approx(theirs.get_accuracy(1), abs=1e-9)
    assert ours.real_top5 == pytest.approx(theirs.get_accuracy(5), abs=1e-9)
    assert ours.real_images == sum(map(bool, real))


def test_an_evaluation_gives_both_accuracies(tmp_path):
    data = make_data(tmp_path / "data")
    engine.run(make_config(tmp_path, data))
    for number, path in enumerate(sorted(data.glob("val/*/*.png")), 1):
        Image.open(path).save(path.with_name(f"ILSVRC2012_val_{number:08d}.png"))
        path.unlink()
    opts = ["EVAL", True, "MODEL.PRETRAINED", tmp_path / "run" / "last"]
    opts += ["EVAL_REAL_LABELS", write(tmp_path, [[0, 1, 2]] * 8 + [[]])]
    engine.run(make_config(tmp_path, data, *opts))
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (found["real_top1"], found["real_images"], found["images"]) == (100.0, 8, 9)
