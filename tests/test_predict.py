"""Predictions: the right pixels, the right names, every way to name images and to see results."""

import csv
import json
import os
import re
import tarfile

import numpy as np
import paddle
import pytest
from PIL import Image

import tools.predict as predict_module
from cli.errors import DataError, UserError
from config import get_config
from cpu import onednn
from tools.common import IMAGENET_CLASSES, load_model, run_config
from tools.predict import draw_grid, find_class_names, find_images, predict, print_results

from .helpers.tiny_run import NAMES, crop_by_hand, logits_by_hand, make_images, run_tool

MEAN, STD = (0.4, 0.5, 0.6), (0.229, 0.224, 0.225)  # tiny_run's, and the default


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), 5)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_confidences_are_the_softmax_of_the_evaluation_crop(weights, images, batch_size):
    results = predict(images, weights, top_k=100, batch_size=batch_size)
    logits = logits_by_hand(weights, np.stack([crop_by_hand(p) for p in images]), MEAN, STD)
    exp = np.exp(logits.astype("float64"))
    for result, row, path in zip(results, exp / exp.sum(1, keepdims=True), images):
        found = result["predictions"]
        assert result["image"] == path
        assert [p["class"] for p in found] == np.argsort(-row).tolist()
        assert [p["name"] for p in found] == [NAMES[p["class"]] for p in found]
        np.testing.assert_allclose([p["confidence"] for p in found], -np.sort(-row), 1e-4)


def test_files_folders_and_patterns_name_images(tmp_path, capsys):
    paths = make_images(tmp_path / "deep" / "er", 2)
    (tmp_path / "deep" / "photo.heic").write_text("no image")
    assert find_images([tmp_path]) == paths
    assert "1 files are passed over" in (said := capsys.readouterr().err) and ".heic" in said
    assert find_images([f"{tmp_path}/**/*.png"]) == paths
    assert find_images([paths[1], paths[0]]) == [paths[1], paths[0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        find_images([tmp_path / "empty"])
    path = tmp_path / "cat[1].png"  # a file, though its name is like a pattern
    path.write_bytes(b"")
    assert find_images([path]) == [str(path)]


@pytest.mark.parametrize("inside", ["", "/b", "/b/0.png"])
def test_archives_and_folders_and_files_in_them_name_images(weights, images, tmp_path, inside):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in (0, 1):
            tar.add(images[number], f"b/{number}.png")
    expected = predict(images[: 1 if inside.endswith("png") else 2], weights)
    found = predict(f"{tmp_path}/x.tar{inside}", weights)
    assert [r["predictions"] for r in found] == [r["predictions"] for r in expected]


def test_a_missing_image_is_named_whatever_its_name_looks_like(weights):
    for name in ("x.png", "x[1].png", "none/*.png"):
        with pytest.raises(DataError, match=rf"^{re.escape(name)}: no such file"):
            predict(name, weights)


@pytest.mark.parametrize("form", ["-csv", "-json", None])
def test_a_broken_image_among_others_is_named_and_the_others_are_classified(
    weights, images, tmp_path, call, form
):
    (tmp_path / "x.png").write_bytes(b"no image")
    flags = ["-pretrained", weights, "-top_k", "1", *filter(None, [form])]
    code, shown, said = call(predict_module.main, images[0], "x.png", images[1], *flags)
    unknown = "error: x.png: not an image of a known format"
    assert (code, said) == (2, f"{unknown}\nerror: 1 of 3 images cannot be read\n")
    if form == "-json":
        assert [found["image"] for found in json.loads(shown)] == images[:2]
    else:
        header, *rows = shown.splitlines()
        assert header.startswith("image,rank" if form else "image ")
        assert [row.split("," if form else None)[0] for row in rows] == images[:2]


def test_names_come_from_the_file_then_the_weights_then_the_config(weights, tmp_path):
    own, other, lone = (tmp_path / name for name in ("own.txt", "other.txt", "lone.pdparams"))
    own.write_text("a\x1b[2J\nb\nc\nd\u00e9\n", encoding="utf-8")
    other.write_text("e\nf\ng\nh\n")
    config = run_config(weights, opts=["DATA.CLASS_NAMES", str(other)])
    classes = load_model(config).classes
    escaped = ["a\\x1b[2J", "b", "c", "d\u00e9"]  # nothing for a terminal to obey
    assert find_class_names(config, own, classes) == escaped
    assert find_class_names(config, None, classes) == list(NAMES)
    assert find_class_names(config) == list("efgh")
    own.write_text("a\nb\n")
    with pytest.raises(DataError, match="2 names"):
        find_class_names(config, own)
    lone.write_bytes(weights.read_bytes())
    config = run_config(lone, weights.with_name("config.yaml"))
    assert find_class_names(config, None, load_model(config).classes)[3] == "class 3"
    config = weights.with_name("config.yaml")
    for given, words in (((lone,), r"-cfg.*config\.yaml"), ((), "-pre"), ((None, config), "-pre")):
        with pytest.raises(UserError, match=words):
            run_config(*given)


def test_a_thousand_classes_are_imagenets():
    names = find_class_names(get_config(opts=["DATA.DATA_PATH", "nowhere"]))
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca"
    assert names[281] == "tabby, tabby cat" and names[999].startswith("toilet tissue")
    assert "Apache" in IMAGENET_CLASSES.with_suffix(".NOTICE.txt").read_text()


@pytest.mark.parametrize("form", ["table", "csv"])
def test_a_table_names_an_image_once_and_csv_quotes_names_with_commas(capsys, form):
    one = {"class": 0, "name": "cat", "confidence": 0.9345}
    two = {"class": 1, "name": "tree, wood", "confidence": 0.0655}
    path = "\x1b[2J\udce9.png" if form == "table" else "\x1b[2J.png"
    results = [{"image": path, "predictions": [one, two]}]
    assert list(print_results(results, [path], form)) == results
    if form == "csv":
        *_, row = csv.reader(capsys.readouterr().out.splitlines())
        assert row == ["\x1b[2J.png", "2", "1", "tree, wood", "0.065500"]
    else:
        assert capsys.readouterr().out.splitlines() == [
            "image            confidence  class",
            "\\x1b[2J\\xe9.png     93.45 %  cat",
            "                     6.55 %  tree, wood",
        ]


def test_a_grid_that_cannot_be_written_loses_no_result(weights, images, tmp_path, call):
    (tmp_path / "file").touch()
    code, shown, said = call(
        predict_module.main, *images, "-pretrained", weights, "-grid", "file/grid.png", "-json"
    )
    assert code == 2 and "grid.png: cannot be written" in said
    assert len(json.loads(shown)) == len(images)


def test_the_script_reads_paths_from_standard_input_prints_json_and_draws(
    weights, images, tmp_path, call
):
    flags = ["-pretrained", weights, "--top-k", "2", "-json", "-grid", "grid.png"]
    code, shown, said = call(
        predict_module.main, "-", *flags, stdin="\n\n".join(images).encode() + b"\n"
    )
    assert code == 0 and "wrote grid.png" in said
    assert json.loads(shown) == predict(images, weights, top_k=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).reshape(-1, 3)
    assert (grid == crop_by_hand(images[0])[8, 8]).all(axis=1).sum() > 100  # one enlarged pixel


@pytest.mark.parametrize(("asked", "switch"), [("-amp", "on"), ("-opts AMP True", "off")])
def test_amp_is_bfloat16_by_onednn_and_else_float32_and_says_which(
    weights, images, monkeypatch, tmp_path, switch, asked
):
    monkeypatch.setenv("RESMLP_ONEDNN", switch)
    insist = ["-json", "-opts", "AMP_DTYPE", "bfloat16", "AMP_LEVEL", "O2", *asked.split()]
    done = run_tool("predict", *images, "-pretrained", weights, *insist, cwd=tmp_path)
    expected, found = predict(images, weights), json.loads(done.stdout)
    differences = []
    for one, other in zip(expected, found):
        other = {entry["class"]: entry["confidence"] for entry in other["predictions"]}
        differences += [abs(x["confidence"] - other[x["class"]]) for x in one["predictions"]]
    half = switch == "on" and onednn.has(paddle.float32)
    low, high = (1e-5, 0.05) if half else (0, 1e-6)
    assert low <= max(differences) < high
    assert done.stderr.count("AMP: ") == 1 and ("in float32" in done.stderr) == (not half)
    assert ("this is O1" in done.stderr) == half


def test_names_of_any_bytes_come_from_standard_input_go_out_as_ascii_and_are_drawn(
    monkeypatch, call
):
    names = [b"caf\xe9.png", "ünï.png".encode()]

    def fake(images, show, **_):
        return list(show({"image": image, "predictions": []} for image in images))

    monkeypatch.setattr(predict_module, "predict", fake)
    _, shown, _ = call(predict_module.main, "-", "-json", stdin=b"\n".join(names))
    results = json.loads(shown)
    assert shown.isascii() and [os.fsencode(found["image"]) for found in results] == names
    grid = draw_grid(results, lambda path: np.zeros([4, 4, 3], "uint8"))
    assert grid.startswith(b"\x89PNG")
