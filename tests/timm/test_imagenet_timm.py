"""ImageNet's WordNet ids, and accuracy on sets with some of its classes, against timm."""

from importlib.resources import files

import numpy as np
import paddle
import pytest
from PIL import Image

from config import get_config
from datasets import build_dataset
from loading.imagenet import wordnet_ids
from parallel.process import Process
from tools.common import IMAGENET_CLASSES
from training.evaluation import evaluate

pytest.importorskip("timm")
import torch  # noqa: E402
from timm.data import ImageNetInfo  # noqa: E402
from timm.utils import accuracy  # noqa: E402


def test_label_i_is_the_wordnet_id_and_the_name_that_timm_gives_it():
    info = ImageNetInfo("imagenet-1k")
    assert wordnet_ids() == tuple(info.label_names())
    names = IMAGENET_CLASSES.read_text(encoding="utf-8").splitlines()
    assert names == [info.index_to_description(label) for label in range(1000)]


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_accuracies_on_imagenet_a_and_r_are_timms(tmp_path, name):
    """timm: labels by the order of the folders, logits of the classes in its list of indices."""
    info = files("timm.data") / "_info"
    folders = (info / f"{name}_synsets.txt").read_text().split()
    indices = [int(line) for line in (info / f"{name}_indices.txt").read_text().split()]
    for folder in folders:
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "x.png")
    config = get_config()
    config.EVAL, config.DATA.DATASET, config.DATA.DATA_PATH = True, "imagefolder", str(tmp_path)
    index = build_dataset(config, "val").files
    assert index.subset == indices

    rng = np.random.default_rng(0)
    logits = rng.normal(size=[200, 1000]).astype("float32")
    labels = np.array(index.labels, "int64")
    logits[np.arange(200), labels] += rng.uniform(0, 4, 200)
    batches = [
        (paddle.to_tensor(logits[i : i + 30]), paddle.to_tensor(labels[i : i + 30]), [])
        for i in range(0, 200, 30)
    ]
    (ours,) = evaluate([lambda x: x], batches, Process(), 1000, subset=index.subset)
    outputs = torch.from_numpy(logits)
    theirs = accuracy(outputs[:, indices], torch.arange(200), (1, 5))
    assert [ours.subset_top1, ours.subset_top5] == pytest.approx([float(v) for v in theirs])
    theirs = accuracy(outputs, torch.from_numpy(labels), (1, 5))
    assert [ours.top1, ours.top5] == pytest.approx([float(v) for v in theirs])
    assert ours.subset_top1 > ours.top1 > 0 and ours.subset_classes == 200
