"""What fine-tuning can do beside the recipe: freezing, early stopping."""

import re
import shutil

import numpy as np
import paddle
import pytest

import engine
from datasets import build_loader
from engine import Metrics, Trainer, run
from loading.classes import data_classes
from resmlp import ResMLP
from storage import checkpoints
from storage.weights import read_weights, write_weights
from tools.export import export
from training.saving import first_model

from .helpers.runs import log_of, metrics
from .helpers.tiny_data import make_config, make_data

PARTS = [1, 3, "backbone"]  # of a model of three blocks


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, data):
    config = make_config(tmp_path_factory.mktemp("pretrained"), data, "TRAIN.NUM_EPOCHS", 1)
    return run(config)["folder"] / "last.pdparams"


def tiny(part=0, **changes):
    paddle.seed(3)
    settings = dict(image_size=16, patch_size=8, num_classes=5, embed_dim=12, depth=3)
    model = ResMLP(**{**settings, **changes})
    model.freeze(part)
    return model


def frozen_names(model, part):
    if part == "backbone":
        return {name for name, _ in model.named_parameters() if not name.startswith("head.")}
    parts = [f"mixer_layers.{block}." for block in range(part)] + ["patch_embed."]
    return {n for n, _ in model.named_parameters() if any(map(n.startswith, parts))}


def gradients(model, images):
    (model(images) ** 2).mean().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------- classes of the weights
@pytest.mark.parametrize("inside", [True, False])
def test_a_head_for_other_classes_is_initialised_and_one_for_the_same_ones_kept(
    tmp_path, data, pretrained, inside, caplog
):
    caplog.set_level("INFO", "resmlp")
    others = shutil.copytree(data, tmp_path / "others")
    for split in ("train", "val"):
        (others / split / "class_1").rename(others / split / "bus")
    if not inside:  # as runs of earlier commits left them: beside the weights
        file = read_weights(pretrained)
        write_weights(file.state, tmp_path / "weights.pdparams")
        (tmp_path / "classes.txt").write_text("\n".join(file.classes.names))
        pretrained = tmp_path / "weights.pdparams"
    weights = read_weights(pretrained)
    head, found = weights.state["head.weight"], []
    for root in (data, others):
        config = make_config(tmp_path, root, "MODEL.PRETRAINED", pretrained, "SAVE", root.name)
        found.append(first_model(config, None, weights, data_classes(config)))
    assert np.array_equal(found[0].head.weight.numpy(), head)
    assert not np.array_equal(found[1].head.weight.numpy(), head)
    (line,) = [r.getMessage() for r in caplog.records if "head initialised" in r.getMessage()]
    assert re.search("1 of 3 classes .* such as 'bus' .label 0.*'class_1'", line)


# ------------------------------------------------------------------------------- freezing
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_frozen_layers_get_no_gradient_and_the_others_the_same_one(part, recompute):
    images = paddle.randn([4, 3, 16, 16])
    whole, model = gradients(tiny(), images), tiny(part)
    model.recompute = recompute
    found, frozen = gradients(model, images), frozen_names(model, part)
    assert found.keys() == whole.keys() - frozen
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, whole[name], rtol=1e-4, atol=1e-7)


def test_frozen_layers_drop_nothing_and_end_the_backward_pass():
    model = tiny(2, dropout=0.5, drop_path=0.5)
    model.train()
    x = model.patch_embed(paddle.randn([64, 3, 16, 16]))
    first, second, third = model.mixer_layers
    assert (first(x).numpy() == first(x).numpy()).all()
    assert (third(x).numpy() != third(x).numpy()).any()
    wanted = [not x.stop_gradient for x in (first(x), second(first(x)), third(x))]
    assert wanted == [False, False, True]


def test_a_run_leaves_frozen_weights_as_they_are_and_its_weights_can_be_exported(
    tmp_path, data, pretrained
):
    opts = ["MODEL.PRETRAINED", pretrained, "TRAIN.FREEZE", 1, "TRAIN.MODEL_EMA", True]
    folder = run(make_config(tmp_path, data, *opts))["folder"]
    first, last = (checkpoints.load(path) for path in (pretrained, folder / "last.pdparams"))
    frozen = frozen_names(tiny(), 1)
    for key in ("model", "model_ema"):
        same = {k for k, v in last[key].items() if (v == first["model"][k]).all()}
        assert same == frozen
    assert last["optimizer"].keys() == first["model"].keys() - frozen
    log = log_of(folder)
    assert "weight decay 0.2 on 4 tensors" in log and "; 14 frozen (0.01 M)" in log
    exported = export(folder / "last", images=[data / "val"])
    assert exported["largest_difference"]["paddle"] < 1e-5


# ---------------------------------------------------------- early stopping, the best weights
@pytest.fixture
def scripted(tmp_path, data, monkeypatch):
    """Makes a run whose evaluations find these values of top-1; returns it, and its epochs."""

    def script(values, *opts, losses=()):
        losses = [*losses, *[1.0] * len(values)]
        found = (Metrics(loss, float(top1), 100.0, 9, 1.0) for loss, top1 in zip(losses, values))
        monkeypatch.setattr(Trainer, "evaluate", lambda *_: [next(found)])
        result = run(make_config(tmp_path, data, *opts))
        return result, [record["epoch"] for record in metrics(result.folder, "epoch")]

    return script


def test_rank_0_decides_for_all_whether_training_ends(scripted, monkeypatch):
    """After -resume of an epoch's checkpoint it may alone know the best score."""
    ended, original = iter([False, False, False, True]), engine.from_main

    def from_main(value, process):
        return next(ended) if isinstance(value, bool) else original(value, process)

    monkeypatch.setattr(engine, "from_main", from_main)
    opts = ["TRAIN.EARLY_STOP", 1, "TRAIN.NUM_EPOCHS", 3]
    assert scripted([10, 0, 0, 0], *opts)[1] == [1, 2, 3]


def test_training_ends_after_so_many_evaluations_without_a_better_one(scripted):
    opts = ["TRAIN.NUM_EPOCHS", 9, "TRAIN.EARLY_STOP", 3, "MODEL.RESUME", "auto"]
    assert scripted([20, 10], "TRAIN.NUM_EPOCHS", 2)[1] == [1, 2]
    result, epochs = scripted([15, 30, 20, 30, 10, 0, 0], *opts)  # a resumed run counts on
    assert (result.best_top1, epochs) == (30.0, [1, 2, 3, 4, 5, 6, 7])
    log = log_of(result.folder)
    assert "stopped early: 3 evaluations without a better one (TRAIN.EARLY_STOP)" in log
    assert scripted([0, 0], *opts)[1] == epochs  # there is nothing left to do


def best_place(result):
    return checkpoints.load(result.folder / "best.pdparams")["place"]


def test_the_best_weights_can_be_those_of_the_lowest_loss(scripted):
    opts = ["TRAIN.NUM_EPOCHS", 9, "BEST_METRIC", "loss", "TRAIN.EARLY_STOP", 2]
    result, epochs = scripted([50, 40, 60, 70], *opts, losses=[0.9, 0.3, 0.5, 0.4])
    place = best_place(result)
    assert (place["epoch"], place["best_epoch"], place["best_score"]) == (2, 2, -0.3)
    assert (result.best_top1, epochs) == (40.0, [1, 2, 3, 4])
    log = log_of(result.folder)
    assert "done: best top-1 40.00 %, after epoch 2, chosen by loss (0.3), in" in log


@pytest.mark.parametrize("older, metric, best", [(False, "loss", 3), (True, "top1", 1)])
def test_another_metric_in_a_run_that_goes_on_begins_anew(scripted, older, metric, best):
    result, _ = scripted([50, 40], losses=[0.9, 0.8])
    if older:  # from before there was a choice
        last = result.folder / "last.pdparams"
        state = checkpoints.load(last)
        for name in ("best_score", "stale"):
            del state["place"][name]
        state["config"] = state["config"].replace("BEST_METRIC: top1\n", "")
        checkpoints.save(state, last)
    opts = ["MODEL.RESUME", "auto", "TRAIN.NUM_EPOCHS", 4, "BEST_METRIC", metric]
    assert best_place(scripted([30, 20], *opts, losses=[0.95, 0.99])[0])["best_epoch"] == best


# ------------------------------------------------------------------------ unequal classes
@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Eight images of two classes and two of the third; of the validation images 3, 3 and 1."""
    root = make_data(tmp_path_factory.mktemp("unequal"))
    for split, left in (("train", 2), ("val", 1)):
        for path in sorted((root / split / "class_2").iterdir())[left:]:
            path.unlink()
    return root


def test_the_loader_of_a_run_samples_classes_equally(tmp_path, unequal):
    for balanced, expected in ((True, [6, 6, 6]), (False, [8, 8, 2])):
        opts = ["TRAIN.BALANCED_SAMPLING", balanced, "DATA.BATCH_SIZE", 9]
        loader = build_loader(make_config(tmp_path, unequal, *opts), "train")
        labels = np.concatenate([batch.labels.numpy() for batch in loader])
        assert np.bincount(labels).tolist() == expected


def test_class_weights_of_a_run_are_those_of_its_training_images(tmp_path, unequal):
    heads = []
    for weights in ("none", "balanced", [0.75, 0.75, 3.0]):  # 18 / (3 * 8), 18 / (3 * 2)
        opts = ["TRAIN.CLASS_WEIGHTS", weights, "TRAIN.NUM_EPOCHS", 1]
        folder = run(make_config(tmp_path / str(len(heads)), unequal, *opts)).folder
        heads.append(checkpoints.load(folder / "last.pdparams")["model"]["head.weight"])
    assert (heads[1] == heads[2]).all() and (heads[1] != heads[0]).any()


def test_a_run_on_unequal_classes_with_all_that_is_there_for_them(tmp_path, unequal):
    opts = "TRAIN.BALANCED_SAMPLING True TRAIN.CLASS_WEIGHTS balanced TRAIN.MIXUP_ALPHA 0.8 "
    opts += "BEST_METRIC balanced_accuracy DATA.BATCH_SIZE 6 TRAIN.NUM_EPOCHS 4"
    result = run(make_config(tmp_path, unequal, *opts.split()))
    log = log_of(result.folder)
    assert f"(balanced accuracy {result.balanced_accuracy:.2f} %)" in log
    assert "chosen by balanced_accuracy (" in log
    record = metrics(result.folder)[-1]
    assert record["val_balanced_accuracy"] == result.balanced_accuracy
