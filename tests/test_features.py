"""Features of a data set: those of the model, in the order of the images, in both formats."""

from cpu import setup  # noqa: F401  isort: skip

import os
import shutil

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.numpy import load_file

from cli.errors import DataError, UserError, WeightsError
from config import get_config
from loading.classes import ClassNames
from resmlp import build_resmlp
from tools.common import run_config
from tools.features import read_features, write_features
from tools.knn import knn_accuracies

from .helpers.tiny_run import make_images, make_run, run_tool


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


def config_of(run, *opts):
    weights, data = run
    opts = ["DATA.DATASET", "imagefolder", "DATA.DATA_PATH", data, *opts]
    return run_config(weights, opts=["MODEL.NUM_CLASSES", "auto", "DATA.NUM_WORKERS", 0, *opts])


def by_hand(run, split):
    """Features of the images, each resized (short side 20) and cropped (16) by Pillow alone."""
    weights, data = run
    config = get_config(str(weights.with_name("config.yaml")))
    model = build_resmlp(config)
    model.set_state_dict(paddle.load(str(weights)))
    model.eval()
    paths = sorted((data / split).glob("*/*.png"))
    found = []
    for path in paths:
        image = Image.open(path)
        scale = 20 / min(image.size)
        size = [int(side * scale) if side != min(image.size) else 20 for side in image.size]
        image = image.resize(size, Image.BICUBIC)
        left, top = (int(round((side - 16) / 2)) for side in size)
        pixels = np.asarray(image.crop((left, top, left + 16, top + 16))) / 255
        x = (pixels - config.DATA.IMAGENET_MEAN) / config.DATA.IMAGENET_STD
        x = paddle.to_tensor(x.transpose(2, 0, 1)[None].astype("float32"))
        found.append(model.forward_features(x).numpy()[0])
    return np.array(found), paths


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("ending", ["safetensors", "npy"])
def test_features_are_the_models_before_the_head_of_images_cropped_as_in_evaluation(
    run, tmp_path, split, ending
):
    output = str(tmp_path / f"x.{ending}")
    expected, paths = by_hand(run, split)
    assert write_features(config_of(run), split, output) == expected.shape
    found = read_features(output)
    assert np.allclose(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [int(path.parent.name == "bee") for path in paths]
    if ending == "npy":
        names = (tmp_path / "x.names.txt").read_bytes()
    else:
        content = load_file(output)  # the library's reader
        names = content["names"].tobytes()
        assert np.array_equal(content["features"], found.features)
        assert np.array_equal(content["labels"], found.labels)
    assert names.decode().splitlines() == [str(path.relative_to(run[1])) for path in paths]
    assert not list(tmp_path.glob("*.tmp"))


def test_half_precision_takes_half_the_bytes_and_batches_change_nothing(run, tmp_path):
    write_features(config_of(run), "train", str(tmp_path / "a.npy"))
    opts = "DATA.BATCH_SIZE_EVAL", 2
    write_features(config_of(run, *opts), "train", str(tmp_path / "b.safetensors"), "float16")
    whole, half = (read_features(str(tmp_path / n)).features for n in ("a.npy", "b.safetensors"))
    assert half.dtype == np.float16 and np.allclose(whole, half, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("ending", ["safetensors", "npy"])
def test_a_file_that_is_not_whole_is_refused(run, tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    write_features(config_of(run), "val", str(path))
    data = path.read_bytes()
    for size in (0, 4, 20, 90, len(data) // 2):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match="no whole file of features"):
            read_features(str(path))
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: cannot be read: No such file"):
        read_features(str(path))


@pytest.mark.parametrize("ending", ["safetensors", "npy"])
def test_an_image_that_cannot_be_read_is_named_and_left_out(run, tmp_path, ending, capsys):
    weights, data = run
    expected, paths = by_hand(run, "train")
    other = tmp_path / "data"
    shutil.copytree(data, other)
    for path in (paths[1], paths[-1]):  # one of them the last: there is no next one
        (other / path.relative_to(data)).write_bytes(b"damaged")
    left = [0, *range(2, len(paths) - 1)]
    output = str(tmp_path / f"x.{ending}")
    config = config_of((weights, other), "DATA.BATCH_SIZE_EVAL", 2)
    assert write_features(config, "train", output) == (len(left), 12)
    assert np.allclose(read_features(output).features, expected[left], rtol=1e-4, atol=1e-5)
    assert len(read_features(output).labels) == len(left)
    said = capsys.readouterr().err
    assert said.count("left out: ") == 2 and f"{paths[1].name}: not an image" in said


@pytest.mark.parametrize(
    ("dtype", "labels"),
    [("float32", ["a", "b"]), ("float32", [0, -1]), ("float32", [0.5, 1]), ("S4", [0, 1])],
)
def test_other_numbers_than_features_and_labels_are_refused(tmp_path, dtype, labels):
    np.save(tmp_path / "x.npy", np.zeros([2, 3], dtype))
    with pytest.raises(DataError, match="x.labels.npy: cannot be read: No such file"):
        read_features(str(tmp_path / "x.npy"))
    np.save(tmp_path / "x.labels.npy", labels)
    with pytest.raises(DataError, match="x.npy: no whole file of features"):
        read_features(str(tmp_path / "x.npy"))


def test_a_number_too_large_for_a_label_and_a_pipe_are_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros([2, 3], "float32"))
    np.save(tmp_path / "x.labels.npy", [0, 10**12])
    with pytest.raises(DataError, match="1000000000000 is no label"):
        read_features(str(tmp_path / "x.npy"))
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(DataError, match="pipe.safetensors: cannot be read: Not a regular file"):
        read_features(str(tmp_path / "pipe.safetensors"))


def test_weights_that_do_not_fit_are_named(run, tmp_path):
    config = config_of(run, "MODEL.MIXER.DEPTH", 3)
    with pytest.raises(WeightsError, match=r"/best.pdparams: the weights do not fit the model"):
        write_features(config, "val", str(tmp_path / "x.npy"))


@pytest.mark.parametrize("ending", ["safetensors", "npy"])
def test_features_of_other_weights_are_not_mixed(run, tmp_path, ending):
    weights, data = run
    state = paddle.load(str(weights))
    others = {"head": "head.bias", "body": "norm.beta"}
    for name, parameter in others.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(weights.with_name("config.yaml").read_text())
        changed = {**state, parameter: state[parameter] + 1e-3}
        paddle.save(changed, str(folder / "best.pdparams"))
    sets = {}
    for name in ("run", *others):
        path = weights if name == "run" else tmp_path / name / "best.pdparams"
        output = str(tmp_path / f"{name}.{ending}")
        write_features(config_of((path, data)), "val", output)
        sets[name] = read_features(output)
    for other in (sets["head"], sets["body"]._replace(weights="")):  # no mark: an older file
        knn_accuracies(sets["run"], other, [1])
    with pytest.raises(DataError, match=r"weights \(best.pdparams, .*same -pretrained$"):
        knn_accuracies(sets["run"], sets["body"], [1])


@pytest.mark.parametrize("ending", ["safetensors", "npy"])
def test_features_of_other_classes_are_refused_and_of_another_order_mapped(run, tmp_path, ending):
    weights, data = run
    sets = {}
    for name, folders in {"one": ("ant", "bee"), "other": ("a", "b")}.items():
        for old, new in zip(("ant", "bee"), folders):
            for split in ("train", "val"):
                shutil.copytree(data / split / old, tmp_path / name / split / new)
        write_features(config_of((weights, tmp_path / name)), "val", str(tmp_path / f"x.{ending}"))
        sets[name] = read_features(str(tmp_path / f"x.{ending}"))
    assert sets["one"].classes.names == ("ant", "bee")
    with pytest.raises(DataError, match="2 of 2 classes are not among those of"):
        knn_accuracies(sets["one"], sets["other"], [1])
    turned = sets["one"]._replace(
        classes=ClassNames(("bee", "ant"), "turned"), labels=1 - sets["one"].labels
    )
    assert knn_accuracies(sets["one"], turned, [1]) == {1: (100.0, 100.0)}


def test_what_cannot_be_written_leaves_nothing(run, tmp_path):
    with pytest.raises(UserError, match=r"ends in .safetensors or .npy"):
        write_features(config_of(run), "val", str(tmp_path / "x.csv"))
    with pytest.raises(UserError, match="not finite in float16"):
        opts = "DATA.IMAGENET_STD", "[1e-7,1e-7,1e-7]"
        write_features(config_of(run, *opts), "val", str(tmp_path / "x.npy"), "float16")
    assert not list(tmp_path.iterdir())


def test_features_and_k_nn_work_as_commands(run, tmp_path):
    weights, data = run
    for split in ("train", "val"):
        flags = ["-pretrained", weights, "-data_path", data, "-split", split]
        flags += ["-output", f"{split}.npy", "-opts", "DATA.DATASET", "imagefolder"]
        result = run_tool("features", *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert "val.npy: 3 images, 12 features each" in result.stdout
    result = run_tool("knn", "train.npy", "val.npy", "-k", 3, 5, 200, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "left out: k [200], for there are only 5 features" in result.stdout
    assert "3-NN: top-1 " in result.stdout and "5-NN: top-1 " in result.stdout
    result = run_tool("knn", "train.npy", "val.npy", "-probe", cwd=tmp_path)
    assert result.returncode == 0 and "linear probe: top-1 " in result.stdout
