"""Exported files compute what the model computes, say how to be used, and run on their own."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest
from PIL import Image, PngImagePlugin

import tools.export as export_module
import tools.infer_exported as infer_module
from cli.errors import DataError, UserError
from config import get_config
from cpu.resample import from_image
from loading.classes import ClassNames
from loading.images import read_image, read_pixels
from storage.weights import read_weights, write_weights
from tools.common import load_model, run_config
from tools.export import export, verification_images
from tools.infer_exported import ExportedModel, ModelError, load, open_paddle, preprocess
from tools.predict import predict
from transforms import build_eval_transform

from .helpers.tiny_run import NAMES, ROOT, logits_by_hand, make_images

MEAN, STD = (0.4, 0.5, 0.6), (0.229, 0.224, 0.225)  # tiny_run's, and the default
UNSEEN = np.random.default_rng(7).integers(0, 256, [5, 16, 16, 3], dtype=np.uint8)


@pytest.fixture(scope="module")
def logits(weights):
    return logits_by_hand(weights, UNSEEN, MEAN, STD)


def softmax(logits):
    exp = np.exp(logits.astype("float64") - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def normalized(images):
    x = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2).astype("float32"))


def model_file(folder, form="paddle"):
    names = {"onnx": ["model.onnx"], "int8": ["model.int8.onnx"]}
    names = names.get(form, ["model.json", "model.pdmodel"])
    return next(folder / name for name in names if (folder / name).exists())


@pytest.fixture(scope="module", params=["paddle", "onnx"])
def form(request):
    """A format whose packages are there."""
    for package in export_module.ONNX_PACKAGES * (request.param == "onnx"):
        pytest.importorskip(package)
    return request.param


only_onnx = pytest.mark.parametrize("form", ["onnx"], indirect=True)
only_paddle = pytest.mark.parametrize("form", ["paddle"], indirect=True)


@pytest.fixture(scope="module")
def exported(form, weights, tmp_path_factory):
    """The file and the metadata of a model that was exported as it is."""
    folder = tmp_path_factory.mktemp(form)
    metadata = export(weights, folder, [form])
    return model_file(folder, form), metadata


def assert_near(found, expected):
    """Within 1e-5 of the largest output, the bar for every export."""
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_outputs_of_any_batch_are_the_eager_models_and_the_metadata_says_how_to_get_them(
    exported, form, weights, tmp_path, logits
):
    file, returned = exported
    model = load(file, threads=1)
    for batch in (1, 3, 5):
        found = model.run(normalized(UNSEEN[:batch]))
        assert_near(found, logits[:batch])
        assert_near(model(UNSEEN[:batch]), softmax(logits[:batch]))
        assert (found.argmax(1) == logits[:batch].argmax(1)).all()
    pieces = np.concatenate([normalized(UNSEEN)] * 2)  # ten: on one thread 4 + 4 + 2
    assert_near(model.run(pieces), np.concatenate([logits] * 2))
    expected = {"preprocessing_inside": False, "image_size": 16, "crop_pct": 0.8}
    expected |= {"mean": list(MEAN), "class_names": list(NAMES)}
    expected |= {"verified_on": "16 generated images"}
    assert expected.items() <= model.metadata.items()
    assert 0 < model.metadata["largest_difference"] <= 1e-5
    for key in ("largest_difference", "top1_agreement"):
        assert list(returned[key].values()) == [model.metadata[key]]

    export(weights, tmp_path, [form], with_preprocessing=True)
    whole = load(model_file(tmp_path, form))
    for batch in (1, 5):
        assert_near(whole.run(UNSEEN[:batch]), softmax(logits[:batch]))
        assert_near(whole(UNSEEN[:batch]), softmax(logits[:batch]))


def test_safetensors_can_be_trained_on_from(weights, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    export(weights, tmp_path, ["safetensors"])
    (file,) = tmp_path.iterdir()
    heads = [
        load_model(run_config(path, weights.with_name("config.yaml"))).head.weight.numpy()
        for path in (file, weights)
    ]
    np.testing.assert_array_equal(*heads)
    with safetensors.safe_open(file, "np") as opened:
        metadata = {key: json.loads(text) for key, text in opened.metadata().items()}
    assert metadata["class_names"] == list(NAMES)
    assert metadata["largest_difference"] == 0


def test_classes_are_those_of_the_weights_whatever_lies_beside_them(weights, tmp_path):
    pytest.importorskip("safetensors")
    inside = ClassNames(("ant", "bee", "cow", "doe"), "")
    write_weights(read_weights(weights).state, tmp_path / "best.pdparams", inside)
    shutil.copy(weights.with_name("config.yaml"), tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))  # of a later run
    (tmp_path / "shown.txt").write_text("Ant\nBee\nCow\nDoe\n")
    export(tmp_path / "best.pdparams", tmp_path, ["paddle", "safetensors"])
    assert load(model_file(tmp_path)).metadata["class_names"] == list(inside.names)
    assert read_weights(tmp_path / "model.safetensors").classes.names == inside.names
    export(tmp_path / "best.pdparams", tmp_path, class_names=tmp_path / "shown.txt")
    metadata = load(model_file(tmp_path)).metadata
    assert metadata["class_names"] == ["Ant", "Bee", "Cow", "Doe"]
    assert metadata["classes"] == inside.record()


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_file_that_computes_something_else_is_not_left_behind(
    weights, tmp_path, monkeypatch, wrong
):
    fold = export_module.fold

    def fold_wrongly(model):
        folded = fold(model)
        folded.head.bias.set_value(folded.head.bias + wrong * folded.head.bias.abs().max())
        return folded

    monkeypatch.setattr(export_module, "fold", fold_wrongly)
    with pytest.raises(UserError, match="off by"):
        export(weights, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_gpu_s_products_and_linear_layers_stay_out_of_an_export(weights, tmp_path, monkeypatch):
    """The default device is a GPU: products are in TF32, and linear layers those of GPU builds."""
    device, matmul, is_cuda = ["gpu:0"], paddle.matmul, paddle.is_compiled_with_cuda

    def tf32(x):
        bits = x.numpy().view(np.uint32)
        return paddle.to_tensor((bits & np.uint32(0xFFFFE000)).view(np.float32))

    def product(x, y, *args, **options):
        if device[0] != "cpu" and paddle.in_dynamic_mode():
            x, y = tf32(x), tf32(y)
        return matmul(x, y, *args, **options)

    def is_compiled_with_cuda():
        asks = sys._getframe(1).f_globals["__name__"]
        return asks == "paddle.nn.functional.common" or is_cuda()

    monkeypatch.setattr(paddle, "get_device", lambda: device[0])
    monkeypatch.setattr(paddle, "set_device", lambda name: device.__setitem__(0, name))
    monkeypatch.setattr(paddle, "matmul", product)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", is_compiled_with_cuda)
    export(weights, tmp_path)  # TF32 is off by more than the tolerance
    assert b"linear_v2" not in model_file(tmp_path).read_bytes()  # paddle2onnx would abort
    assert device == ["gpu:0"]


def test_what_an_export_needs_is_said(weights, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install paddle2onnx onnx onnxruntime"):
            export("nowhere.pdparams", formats=["onnx"])
    for package in export_module.INT8_PACKAGES:
        pytest.importorskip(package)
    with pytest.raises(UserError, match="is not there; give -opts DATA.DATA_PATH DIR, or -images"):
        export(weights, tmp_path, ["onnx_int8"])


def test_int8_is_near_for_any_batch_and_says_how_far(weights, tmp_path, logits):
    for package in export_module.INT8_PACKAGES:
        pytest.importorskip(package)
    photos = make_images(tmp_path / "photos", 40)
    onnx = pytest.importorskip("onnx")
    returned = export(weights, tmp_path, ["onnx_int8"], images=photos)
    model = load(model_file(tmp_path, "int8"))
    for batch in (1, 3, 5):
        error = np.abs(model.run(normalized(UNSEEN[:batch])) - logits[:batch]).max()
        assert 1e-5 < error / np.abs(logits).max() < 0.02  # it is int8, and no worse
    expected = {"int8_layers": 4, "top1_agreement": 100.0, "verified_on": "40 given images"}
    assert expected.items() <= model.metadata.items()
    assert returned["largest_difference"] == {"onnx_int8": model.metadata["largest_difference"]}

    graph = onnx.load(str(model_file(tmp_path, "int8"))).graph
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
    shapes = [a.shape for a in arrays if a.dtype == np.int8 and a.ndim == 2]
    assert shapes == [(12, 24), (24, 12)] * 2  # the MLPs, as bytes of seven bits
    assert not [a for a in arrays if a.dtype == np.float32 and a.shape in shapes]
    assert max(np.abs(a.astype(int)).max() for a in arrays if a.dtype == np.int8) == 64

    export(weights, tmp_path, ["onnx_int8"], with_preprocessing=True, images=photos)
    found = load(model_file(tmp_path, "int8")).run(UNSEEN)
    assert np.abs(found - softmax(logits)).max() < 0.02


def test_in_int8_one_image_in_a_hundred_may_disagree_and_no_more(weights):
    images = np.random.default_rng(0).integers(0, 256, [200, 16, 16, 3], dtype=np.uint8)
    job = export_module.Job(run_config(weights), False, images)
    answers = job.expected.copy()
    first_class = np.flatnonzero(answers.argmax(1) == 0)  # which NaN would pass for

    def agreement(wrong):
        answers[first_class[-wrong:]] = np.nan
        parts = iter(np.split(answers, range(1, 200, 32)))
        return job.verify(lambda x: next(parts), int8=True)["top1_agreement"]

    assert agreement(2) == 99
    with pytest.raises(ModelError, match="197 of 200 images"):
        agreement(3)


def test_verification_prefers_given_images_then_the_validation_data(weights, tmp_path):
    given = make_images(tmp_path / "given", 2)
    data = tmp_path / "data"
    paths = make_images(data / "val", 20)
    lines = [f"{os.path.relpath(path, data)} {i % 4}\n" for i, path in enumerate(paths)]
    (data / "val_list.txt").write_text("".join(lines))
    config = run_config(weights, opts=["DATA.DATA_PATH", str(data)])
    batch, described = verification_images(config, given)
    assert described == "2 given images" and batch.shape == (2, 16, 16, 3)
    batch, described = verification_images(config)
    assert described == "16 validation images"
    last = build_eval_transform(config)(read_pixels(paths[-1]))
    np.testing.assert_array_equal(batch[-1], last)  # spread over all of them
    assert verification_images(config, limit=1000)[1] == "20 validation images"


@pytest.mark.parametrize("size, crop_pct", [(16, 1.0), (16, 0.8), (28, 0.85), (224, 0.875)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_prepared_or_refused_as_in_training_pixel_by_pixel(
    size, crop_pct, interpolation
):
    metadata = {"image_size": size, "crop_pct": crop_pct, "interpolation": interpolation}
    config = get_config()
    config.DATA.update({key.upper(): value for key, value in metadata.items()})
    transform, metadata["exif_orientation"] = build_eval_transform(config), False
    rng = np.random.default_rng(0)
    longest = 100 * size // transform.short, 1
    for height, width in [(16, 16), (33, 50), (51, 34), (300, 17), (257, 255), (20, 20), longest]:
        image = Image.fromarray(rng.integers(0, 256, [height, width, 3], dtype=np.uint8))
        np.testing.assert_array_equal(preprocess(image, metadata), transform(from_image(image)))
    for shape in ((1, 101), (101, 1)):  # too narrow
        with pytest.raises(ModelError, match=f"100 crops of {size}"):
            preprocess(Image.new("RGB", shape), metadata)
        with pytest.raises(DataError, match=f"100 crops of {size}"):
            transform(from_image(Image.new("RGB", shape)))


@only_paddle
def test_paddle_itself_loads_it(exported, logits):
    prefix = exported[0].with_suffix("")
    found = paddle.jit.load(str(prefix))(paddle.to_tensor(normalized(UNSEEN)))
    assert_near(found.numpy(), logits)
    found = open_paddle(exported[0], bf16=True)[0](normalized(UNSEEN))
    assert np.abs(found - logits).max() < 0.05 * np.abs(logits).max()


def test_inference_needs_none_of_the_training_code(exported, tmp_path):
    """One script and the model, copied elsewhere."""
    make_images(tmp_path / "photos" / "b", 1)
    make_images(tmp_path / "photos" / "a", 1)
    (tmp_path / "photos" / "notes.txt").write_text("none")
    (tmp_path / "photos" / "round").symlink_to("..")
    shutil.copytree(exported[0].parent, tmp_path / "model")
    shutil.copy(ROOT / "tools" / "infer_exported.py", tmp_path)
    model = f"model/{exported[0].name}"
    done = subprocess.run(
        [sys.executable, "infer_exported.py", model, "photos", "-top_k", "2"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()  # and nothing else
    assert header.split() == ["image", "confidence", "class"]
    assert [row.split("  ")[0] for row in rows] == ["photos/a/0.png", "", "photos/b/0.png", ""]
    assert all(row.split("  ")[-1] in NAMES for row in rows)
    assert " on the CPU" in done.stderr
    assert "2 others are passed over, such as photos/notes.txt: " in done.stderr


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="there may be a GPU")
def test_a_gpu_that_the_package_knows_nothing_of_is_refused(exported):
    with pytest.raises(ModelError, match="-gpu needs"):
        load(exported[0], gpu=True)


@only_onnx
def test_an_onnx_file_from_elsewhere_is_refused(exported, tmp_path):
    import onnx

    model = onnx.load(str(exported[0]))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {"names": "{0: 'person'}"})
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ModelError, match="no metadata of export.py"):
        load(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "ending, content, message",
    [
        (".metadata", None, r"no metadata of export.py \(Paddle's: copy model.metadata too\)"),
        (".metadata", b"{", "paddle cannot open it: "),
        (".metadata", b"{}", "no metadata of export.py"),
        (".pdiparams", None, "paddle cannot open it: .*No such file.*model.pdiparams"),
        (".pdiparams", b"cut", "model.pdiparams: not the file that was exported"),
        ("", b"cut", "not the file that was exported"),
    ],
)
@only_paddle
def test_a_paddle_model_that_is_not_whole_is_refused(exported, tmp_path, ending, content, message):
    program = shutil.copytree(exported[0].parent, tmp_path / "x") / exported[0].name
    changed = program.with_suffix(ending or program.suffix)
    changed.unlink()
    if content:
        changed.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load(program)


@pytest.mark.parametrize("inside, wrong", [(True, np.nan), (False, np.inf)])
def test_an_output_that_is_not_finite_or_has_no_names_is_an_error(inside, wrong):
    metadata = {"preprocessing_inside": inside, "mean": [0, 0, 0], "std": [1, 1, 1]}
    model = ExportedModel({**metadata, "class_names": "ab"}, lambda x: np.float32([[1, wrong]]))
    with pytest.raises(ModelError, match="NaN or infinite"):
        model(UNSEEN[:1])
    model.metadata["class_names"] = "a"
    with pytest.raises(ModelError, match="its metadata names 1 classes, but the model has 2"):
        model(UNSEEN[:1])


@pytest.mark.parametrize("dtype, largest", [("uint16", 65535), ("uint16", 4095), ("uint8", 255)])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_images_are_read_as_in_training(tmp_path, dtype, largest, ending):
    values = np.random.default_rng(0).integers(0, largest, [9, 7]).astype(dtype)
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"sBIT", b"\x0c")  # 12 bits are significant, of 16 as PNG has them
    options = {"pnginfo": chunks} if ending == "png" and dtype == "uint16" else {}
    Image.fromarray(values).save(tmp_path / f"x.{ending}", **options)
    with Image.open(tmp_path / f"x.{ending}") as image:
        theirs = np.asarray(infer_module.to_rgb(image))
    np.testing.assert_array_equal(theirs, np.asarray(read_image(str(tmp_path / f"x.{ending}"))))


def test_json_and_csv_have_what_predict_s_have_also_after_an_error(
    exported, weights, tmp_path, call
):
    paths = make_images(tmp_path, 2)
    (tmp_path / "x.jpg").write_text("not a JPEG")
    code, shown, said = call(
        infer_module.main, exported[0], paths[0], tmp_path / "x.jpg", os.devnull, paths[1], "-json"
    )
    assert code == 2 and said.splitlines()[-1] == "error: 2 of 4 images cannot be read"
    assert f"{tmp_path}/x.jpg: cannot be read" in said and "not a regular file" in said
    expected = predict(paths, weights)
    assert len(json.loads(shown)) == 2
    for found, one in zip(json.loads(shown), expected):
        assert found["image"] == one["image"]
        for entry, other in zip(found["predictions"], one["predictions"]):
            assert abs(entry.pop("confidence") - other["confidence"]) < 1e-5
            assert entry.items() <= other.items()
    code, shown, said = call(infer_module.main, exported[0], *paths, "-csv", "-top_k", 1)
    assert code == 0
    assert [row[0] for row in csv.reader(shown.splitlines())] == ["image", *paths]
    for flags, message in (
        (["-threads", -1], "-top_k, -batch_size and -threads are at least 1"),
        (["-json", "-csv"], "not allowed with argument -json"),
    ):
        code, _, said = call(infer_module.main, exported[0], *paths, *flags)
        assert code == 2 and message in said


@only_onnx
def test_openvino_gives_the_same(exported, logits):
    pytest.importorskip("openvino")
    model = load(exported[0], engine="openvino", threads=1)
    assert model.engine == "openvino on the CPU, 1 thread"
    assert_near(model(UNSEEN), softmax(logits))
    assert model.metadata == load(exported[0]).metadata


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("no.onnx", {}, "no.onnx: not a file model.onnx, model.json or model.pdmodel"),
        ("a.pt", {}, "a.pt: not a file model.onnx"),
        ("model.onnx", {}, "model.onnx: (onnxruntime cannot open it|running it needs)"),
        ("model.onnx", {"bf16": True}, "-bf16 needs a Paddle model, or -engine openvino"),
        ("model.onnx", {"engine": "onnxruntime"}, "running it needs `pip install onnxruntime`"),
        ("model.onnx", {"engine": "openvino"}, "running it needs `pip install openvino`"),
        ("model.json", {"engine": "openvino"}, "-engine openvino is for ONNX files; Paddle runs"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, monkeypatch, name, options, message):
    if "pip install" in message:
        monkeypatch.setitem(sys.modules, options["engine"], None)
    for file in ("model.onnx", "model.json", "a.pt"):
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ModelError, match=message):
        load(tmp_path / name, **options)
