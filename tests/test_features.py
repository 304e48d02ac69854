"""Features of a data set: those of the model, in the order of the images."""

from cpu import setup  # noqa: F401  isort: skip

import os
import shutil
import sys

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.numpy import load_file, save

from cli.errors import DataError, UserError
from loading.classes import ClassNames
from tools import knn
from tools.common import load_model, run_config
from tools.features import read_features, write_features
from tools.knn import knn_accuracies

from .helpers.tiny_run import crop_by_hand, make_images, make_run, run_tool


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of four classes, and photographs of two others, to learn from and to classify."""
    folder = tmp_path_factory.mktemp("features")
    weights = make_run(folder / "run")
    for split, count in (("train", 5), ("val", 3)):
        for number, path in enumerate(make_images(folder / "images", count)):
            image = Image.open(path)
            place = folder / "data" / split / ("ant", "bee")[number % 2] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            (image if split == "train" else image.rotate(180)).save(place)
    return weights, folder / "data"


def written(run, output, split="val", dtype="float32", opts=()):
    """Writes the features of a model and data; N and C."""
    weights, data = run
    opts = ["DATA.DATASET", "imagefolder", "DATA.DATA_PATH", data, "DATA.NUM_WORKERS", 0, *opts]
    config = run_config(weights, opts=["MODEL.NUM_CLASSES", "auto", *opts])
    return write_features(config, split, str(output), dtype)


def by_hand(run, split):
    """Features of the images, each resized (short side 20) and cropped (16) by Pillow alone."""
    weights, data = run
    config = run_config(weights)
    paths = sorted((data / split).glob("*/*.png"))
    pixels = np.stack([crop_by_hand(path) for path in paths]) / 255
    x = (pixels - config.DATA.IMAGENET_MEAN) / config.DATA.IMAGENET_STD
    x = paddle.to_tensor(x.transpose(0, 3, 1, 2).astype("float32"))
    return load_model(config).forward_features(x).numpy(), paths


@pytest.mark.parametrize("split", ["train", "val"])
def test_features_are_the_models_before_the_head_of_images_cropped_as_in_evaluation(
    run, tmp_path, split
):
    output = str(tmp_path / "x.safetensors")
    expected, paths = by_hand(run, split)
    assert written(run, output, split) == expected.shape
    found, content = read_features(output), load_file(output)  # the library's reader
    assert np.allclose(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [int(path.parent.name == "bee") for path in paths]
    for name in ("features", "labels"):
        assert np.array_equal(content[name], getattr(found, name))
    names = content["names"].tobytes().decode().splitlines()
    assert names == [str(path.relative_to(run[1])) for path in paths]
    whole = os.path.getsize(output)
    written(run, output, split, "float16", ["DATA.BATCH_SIZE_EVAL", 2])
    half = read_features(output).features
    assert half.dtype == np.float16 and np.allclose(found.features, half, rtol=2e-3, atol=1e-3)
    assert whole - os.path.getsize(output) >= half.nbytes
    assert not list(tmp_path.glob("*.tmp"))


def test_what_is_no_whole_file_of_features_is_refused(run, tmp_path):
    path = tmp_path / "x.safetensors"
    written(run, path)
    data, features = path.read_bytes(), np.zeros([2, 3], "float32")
    for content in (
        *(data[:size] for size in (0, 4, 20, 90, len(data) // 2)),
        save({"a": np.zeros([2, 3])}),  # weights
        save({"features": features[:0], "labels": np.zeros(0, "int64")}),
        save({"features": features, "labels": np.array([-1, 0])}),
        data.replace(b'"__metadata__": {', b'"__metadata__":1,"a":{', 1),
        data.replace(b'"data_offsets": [0, ', b'"data_offsets": [], "a": [', 1),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match="no whole file of features"):
            read_features(str(path))
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: cannot be read: No such file"):
        read_features(str(path))
    os.mkfifo(path)
    with pytest.raises(DataError, match="x.safetensors: cannot be read: Not a regular file"):
        read_features(str(path))


def test_an_image_that_cannot_be_read_is_named_and_left_out(run, tmp_path, capsys):
    weights, data = run
    expected, paths = by_hand(run, "train")
    other, output = tmp_path / "data", tmp_path / "x.safetensors"
    shutil.copytree(data, other)
    for number in (1, 4):
        (other / paths[number].relative_to(data)).write_bytes(b"damaged")
    opts = ["DATA.BATCH_SIZE_EVAL", 2]
    assert written((weights, other), output, "train", opts=opts) == (3, 12)
    found = read_features(str(output))
    assert np.allclose(found.features, expected[[0, 2, 3]], rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [int(paths[i].parent.name == "bee") for i in (0, 2, 3)]
    said = capsys.readouterr().err
    assert "skipped 2 unreadable images" in said and f"{paths[1].name}: not an image" in said


def test_what_cannot_be_used_is_named_and_leaves_nothing(run, tmp_path):
    for words, name, *opts in (
        ("/best.pdparams: the weights do not fit", "x.safetensors", "MODEL.MIXER.DEPTH", 3),
        ("ends in .safetensors", "x.npy"),
        ("not finite in float16", "x.safetensors", "DATA.IMAGENET_STD", (1e-7,) * 3),
    ):
        with pytest.raises(UserError, match=words):
            written(run, tmp_path / name, dtype="float16", opts=opts)
    assert not list(tmp_path.iterdir())


def test_features_of_other_weights_are_not_mixed(run, tmp_path):
    weights, data = run
    state, sets = paddle.load(str(weights)), {}
    for name, parameter in {"run": None, "head": "head.bias", "body": "norm.beta"}.items():
        path = tmp_path / name / "best.pdparams"
        shutil.copytree(weights.parent, path.parent)
        if parameter:
            paddle.save({**state, parameter: state[parameter] + 1e-3}, str(path))
        written((path, data), path.with_name("x.safetensors"))
        sets[name] = read_features(str(path.with_name("x.safetensors")))
    for other in (sets["head"], sets["body"]._replace(weights="")):  # no mark: an older file
        knn_accuracies(sets["run"], other, [1])
    with pytest.raises(DataError, match=r"weights \(best.pdparams, .*same -pretrained$"):
        knn_accuracies(sets["run"], sets["body"], [1])


def test_features_of_other_classes_are_refused_and_of_another_order_mapped(run, tmp_path):
    weights, data = run
    for split in ("train", "val"):
        for old, new in (("ant", "a"), ("bee", "b")):
            shutil.copytree(data / split / old, tmp_path / split / new)
    sets, output = [], tmp_path / "x.safetensors"
    for folder in (data, tmp_path):
        written((weights, folder), output)
        sets.append(read_features(str(output)))
    one, other = sets
    assert one.classes.names == ("ant", "bee")
    with pytest.raises(DataError, match="2 of 2 classes are not among those of"):
        knn_accuracies(one, other, [1])
    turned = one._replace(classes=ClassNames(("bee", "ant"), "turned"), labels=1 - one.labels)
    assert knn_accuracies(one, turned, [1]) == {1: (100.0, 100.0)}


def test_features_and_k_nn_work_as_commands(run, tmp_path, monkeypatch, capsys):
    train, val = (str(tmp_path / f"{split}.safetensors") for split in ("train", "val"))
    written(run, train, "train")
    flags = ["-pretrained", run[0], "-data_path", run[1], "-output", val]
    result = run_tool("features", *flags, "-opts", "DATA.DATASET", "imagefolder", cwd=tmp_path)
    assert f"{val}: 3 images, 12 features each" in result.stdout, result.stderr
    for words, said in (
        (["-k", "3", "200"], "left out: k [200], for there are only 5 "),
        (["-probe"], "linear probe: top-1 "),
    ):
        monkeypatch.setattr(sys, "argv", ["knn", train, val, *words])
        knn.main()
        assert said in capsys.readouterr().out
