"""Exported files compute what the model computes, say how to be used, and run on their own."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

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
from tools.infer_exported import (
    ExportedModel,
    ModelError,
    classify,
    load,
    open_paddle,
    preprocess,
)
from tools.predict import predict
from transforms import build_eval_transform

from .helpers.tiny_run import NAMES, ROOT, logits_by_hand, make_images, make_run, run_tool

MEAN, STD = (0.4, 0.5, 0.6), (0.229, 0.224, 0.225)  # tiny_run's, and the default
UNSEEN = np.random.default_rng(7).integers(0, 256, [5, 16, 16, 3], dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def logits(weights):
    return logits_by_hand(weights, UNSEEN, MEAN, STD)


def softmax(logits):
    exp = np.exp(logits.astype("float64") - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def normalized(images):
    x = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2).astype("float32"))


def require(name):
    if name.startswith("onnx"):
        for package in (
            export_module.INT8_PACKAGES if "int8" in name else export_module.ONNX_PACKAGES
        ):
            pytest.importorskip(package)


@pytest.fixture(scope="module", params=["paddle", "onnx"])
def exported(request, weights, tmp_path_factory):
    """The folder, the file and the metadata of a model that was exported as it is."""
    require(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    metadata = export(weights, folder, [request.param])
    return folder, model_file(folder), metadata


@pytest.fixture(scope="module", params=["paddle", "onnx"])
def exported_whole(request, weights, tmp_path_factory):
    """The file of a model with preprocessing and softmax inside."""
    require(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    export(weights, folder, [request.param], with_preprocessing=True)
    return model_file(folder)


def model_file(folder):
    (file,) = (
        file
        for file in folder.iterdir()
        if file.suffix in (".onnx", ".pdmodel") or file.name == "model.json"
    )
    return file


def assert_near(found, expected):
    """Within 1e-5 of the largest output, the bar for every export."""
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_logits_of_any_batch_are_the_eager_models(exported, logits, batch):
    _, file, _ = exported
    model = load(file)
    found = model.run(normalized(UNSEEN[:batch]))
    assert_near(found, logits[:batch])
    assert_near(model(UNSEEN[:batch]), softmax(logits[:batch]))
    assert (found.argmax(1) == logits[:batch].argmax(1)).all()


@pytest.mark.parametrize("batch", [1, 5])
def test_the_whole_model_maps_bytes_to_probabilities(exported_whole, logits, batch):
    assert_near(load(exported_whole).run(UNSEEN[:batch]), softmax(logits[:batch]))
    assert_near(load(exported_whole)(UNSEEN[:batch]), softmax(logits[:batch]))


def test_a_batch_in_pieces_is_whole_again(exported, logits):
    run = load(exported[1], threads=1).run
    batch = np.concatenate([normalized(UNSEEN)] * 2)  # ten: on one thread 4 + 4 + 2
    assert_near(run(batch), np.concatenate([logits] * 2))


def test_the_metadata_says_how_to_use_the_file(exported):
    folder, file, returned = exported
    metadata = load(file).metadata
    assert metadata["preprocessing_inside"] is False
    assert metadata["image_size"] == 16 and metadata["crop_pct"] == 0.8
    assert metadata["mean"] == list(MEAN) and metadata["class_names"] == list(NAMES)
    assert metadata["verified_on"] == "16 generated images"
    assert 0 < metadata["largest_difference"] <= 1e-5
    assert list(returned["largest_difference"].values()) == [metadata["largest_difference"]]
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_safetensors_can_be_trained_on_from(weights, tmp_path, logits):
    safetensors = pytest.importorskip("safetensors")
    export(weights, tmp_path, ["safetensors"])
    file = tmp_path / "model.safetensors"
    model = load_model(run_config(file, weights.with_name("config.yaml")))
    np.testing.assert_array_equal(
        model.head.weight.numpy(), load_model(run_config(weights)).head.weight.numpy()
    )
    with safetensors.safe_open(file, "np") as opened:
        metadata = {key: json.loads(text) for key, text in opened.metadata().items()}
    assert metadata["class_names"] == list(NAMES)
    assert metadata["largest_difference"] < 1e-6  # not 0: one image is another product than a batch


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


@pytest.fixture
def as_on_a_gpu(monkeypatch):
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
    return device


def test_a_gpu_s_products_and_linear_layers_stay_out_of_an_export(weights, tmp_path, as_on_a_gpu):
    export(weights, tmp_path)  # TF32 is off by more than the tolerance
    assert b"linear_v2" not in model_file(tmp_path).read_bytes()  # paddle2onnx would abort
    assert as_on_a_gpu == ["gpu:0"]


def test_a_missing_package_is_named_before_anything_is_done(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install paddle2onnx onnx onnxruntime"):
        export("nowhere.pdparams", formats=["onnx"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("photos"), 40)


@pytest.fixture(scope="module")
def exported_int8(weights, photos, tmp_path_factory):
    """The file and the metadata of a model that was exported in int8."""
    require("onnx_int8")
    folder = tmp_path_factory.mktemp("int8")
    metadata = export(weights, folder, ["onnx_int8"], images=photos)
    return model_file(folder), metadata


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_int8_is_near_for_any_batch(exported_int8, logits, batch):
    found = load(exported_int8[0]).run(normalized(UNSEEN[:batch]))
    error = np.abs(found - logits[:batch]).max() / np.abs(logits).max()
    assert 1e-5 < error < 0.02  # it is int8, and no worse


def test_int8_holds_the_mlps_as_bytes_of_seven_bits(exported_int8):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(exported_int8[0])).graph
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
    shapes = [a.shape for a in arrays if a.dtype == np.int8 and a.ndim == 2]
    assert shapes == [(12, 24), (24, 12)] * 2
    assert not [a for a in arrays if a.dtype == np.float32 and a.shape in shapes]
    assert max(np.abs(a.astype(int)).max() for a in arrays if a.dtype == np.int8) == 64


def test_int8_metadata_has_the_agreement_and_what_it_was_found_on(exported_int8, photos):
    file, returned = exported_int8
    metadata = load(file).metadata
    expected = {"int8_layers": 4, "top1_agreement": 100.0, "verified_on": "40 given images"}
    assert {key: metadata[key] for key in expected} == expected == returned["int8"]
    assert returned["largest_difference"] == {"onnx_int8": metadata["largest_difference"]}
    ((path, entries),) = classify(load(file), photos[:1])
    assert len(entries) == 4 and path == photos[0]


def test_int8_takes_bytes_too(weights, photos, tmp_path, logits):
    require("onnx_int8")
    export(weights, tmp_path, ["onnx_int8"], with_preprocessing=True, images=photos)
    found = load(model_file(tmp_path)).run(UNSEEN)
    assert np.abs(found - softmax(logits)).max() < 0.02


def test_what_a_killed_export_has_left_is_removed(weights, tmp_path):
    (tmp_path / ".unverified").mkdir()
    (tmp_path / ".unverified" / "model.onnx").write_bytes(b"half")
    export(weights, tmp_path, ["safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_int8_that_disagrees_is_not_left_behind(weights, photos, tmp_path, monkeypatch):
    require("onnx_int8")
    monkeypatch.setattr(export_module, "MIN_AGREEMENT", 100.1)
    with pytest.raises(UserError, match=r"for \d+ of 40 images .* less than 100.1 %"):
        export(weights, tmp_path, ["onnx", "onnx_int8"], images=photos)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong, passes", [(0, True), (2, True), (3, False)])
def test_one_image_in_a_hundred_may_disagree_and_no_more(weights, wrong, passes):
    images = np.random.default_rng(0).integers(0, 256, [200, 16, 16, 3], dtype=np.uint8)
    job = export_module.Job(run_config(weights))
    answers = job.eager(images)[1]
    first_class = np.flatnonzero(answers.argmax(1) == 0)  # which NaN would pass for
    answers[first_class[-3:][:wrong]] = np.nan
    parts = iter(np.split(answers, range(32, 200, 32)))
    if passes:
        found = job.agreement(lambda x: next(parts), images)
        assert found["top1_agreement"] == 100 - wrong / 2
    else:
        with pytest.raises(UserError, match="197 of 200 images"):
            job.agreement(lambda x: next(parts), images)


def test_int8_asks_for_real_images(weights, tmp_path):
    require("onnx_int8")
    with pytest.raises(UserError, match="is not there; give -opts DATA.DATA_PATH DIR, or -images"):
        export(weights, tmp_path, ["onnx_int8"])


def test_onnx_weights_are_initializers(weights, tmp_path):
    require("onnx")
    onnx = pytest.importorskip("onnx")
    export(weights, tmp_path, ["onnx"])
    model = onnx.load(str(model_file(tmp_path)))
    onnx.checker.check_model(model, full_check=True)
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(products) >= 6 and all(weights & set(node.input) for node in products)
    assert weights <= {name for node in model.graph.node for name in node.input}
    assert not [node for node in model.graph.node if node.op_type == "Constant"]
    assert [domain.domain for domain in model.opset_import] == [""]


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
def test_images_are_prepared_as_in_training_pixel_by_pixel(size, crop_pct, interpolation):
    config = get_config()
    config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT = size, crop_pct
    config.DATA.INTERPOLATION = interpolation
    transform = build_eval_transform(config)
    metadata = {"image_size": size, "crop_pct": crop_pct, "interpolation": interpolation}
    metadata = {**metadata, "exif_orientation": False}
    rng = np.random.default_rng(0)
    for height, width in [(16, 16), (33, 50), (51, 34), (300, 17), (257, 255), (20, 20)]:
        image = Image.fromarray(rng.integers(0, 256, [height, width, 3], dtype=np.uint8))
        np.testing.assert_array_equal(preprocess(image, metadata), transform(from_image(image)))


@pytest.mark.parametrize("shape, fits", [((1, 100), True), ((1, 101), False), ((101, 1), False)])
def test_an_image_too_narrow_to_resize_is_refused_as_in_training(shape, fits):
    config, image = get_config(), Image.new("RGB", shape)
    config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT = 16, 1.0
    metadata = {"image_size": 16, "crop_pct": 1.0, "interpolation": "bicubic"}
    metadata["exif_orientation"] = False
    if fits:
        assert preprocess(image, metadata).shape == (16, 16, 3)
        return
    with pytest.raises(ModelError, match="100 crops of 16"):
        preprocess(image, metadata)
    with pytest.raises(DataError, match="100 crops of 16"):
        build_eval_transform(config)(from_image(image))


def test_classes_are_those_of_predict(exported, weights, tmp_path):
    paths = make_images(tmp_path, 3)
    for result, (path, entries) in zip(predict(paths, weights), classify(load(exported[1]), paths)):
        assert path == result["image"]
        for entry, (label, share) in zip(result["predictions"], entries):
            assert label == entry["class"] and abs(share - entry["confidence"]) < 1e-5


def test_paddle_itself_loads_it(weights, tmp_path, logits):
    """As a teacher does; it takes every JSON file of that name for a part of the network."""
    (tmp_path / "model.metadata.json").write_text("{}")  # of an earlier export
    export(weights, tmp_path)
    found = paddle.jit.load(str(tmp_path / "model"))(paddle.to_tensor(normalized(UNSEEN)))
    assert_near(found.numpy(), logits)


def test_bfloat16_is_near(weights, tmp_path, logits):
    export(weights, tmp_path)
    found = open_paddle(model_file(tmp_path), bf16=True)(normalized(UNSEEN))
    assert np.abs(found - logits).max() < 0.05 * np.abs(logits).max()


def test_inference_needs_none_of_the_training_code(exported_whole, tmp_path):
    """One script and the model, copied elsewhere."""
    (image,) = make_images(tmp_path, 1)
    shutil.copytree(exported_whole.parent, tmp_path / "model")
    shutil.copy(ROOT / "tools" / "infer_exported.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "infer_exported.py", f"model/{exported_whole.name}", image, "-top_k", "2"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()  # and nothing else
    assert len(rows) == 2
    assert " on the CPU" in done.stderr
    assert header.split() == ["image", "confidence", "class"]
    assert all(row.split("  ")[-1] in NAMES for row in rows)


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="there may be a GPU")
def test_a_gpu_that_the_package_knows_nothing_of_is_refused(exported):
    with pytest.raises(ModelError, match="-gpu needs"):
        load(exported[1], gpu=True)


def test_onnxruntime_that_falls_back_to_the_cpu_is_refused(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Session:
        def __init__(self, *_, providers):
            self.get_providers = lambda: providers[-1:]  # as where CUDA's libraries are missing

        def get_modelmeta(self):
            return SimpleNamespace(custom_metadata_map={})

        def get_inputs(self):
            return [SimpleNamespace(name="image")]

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    infer_module.open_onnx(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="-gpu: onnxruntime cannot load its CUDA provider"):
        infer_module.open_onnx(tmp_path / "model.onnx", gpu=True)


def test_a_model_without_metadata_of_ours_is_refused(exported, tmp_path):
    folder, file, _ = exported
    for part in folder.iterdir():
        if not part.name.endswith(".metadata"):
            shutil.copy(part, tmp_path)
    advice = "copy it together with the model"
    if file.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        model = onnx.load(str(file))
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {"names": "{0: 'person'}"})  # from elsewhere
        onnx.save(model, str(tmp_path / file.name))
        advice = "metadata lacks preprocessing_inside, image_size"
    with pytest.raises(ModelError, match=advice):
        load(tmp_path / file.name)


@pytest.mark.parametrize("content", ["5", "null", "{"])
def test_metadata_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "model.json").touch()
    for name in ("model.metadata.json", "model.metadata"):  # the first of an earlier export
        (tmp_path / name).write_text(content)
        with pytest.raises(ModelError, match=f"{name}: not from export.py: "):
            load(tmp_path / "model.json")


def test_a_paddle_model_without_its_weights_is_refused(tmp_path):
    (tmp_path / "model.json").touch()
    with pytest.raises(ModelError, match="model.pdiparams: not there"):
        open_paddle(tmp_path / "model.json")


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_output_that_is_not_finite_or_has_no_names_is_an_error(inside, wrong):
    metadata = {"preprocessing_inside": inside, "mean": [0, 0, 0], "std": [1, 1, 1]}
    model = ExportedModel({**metadata, "class_names": "ab"}, lambda x: np.float32([[1, wrong]]))
    with pytest.raises(ModelError, match="NaN or infinite"):
        model(UNSEEN[:1])
    model.metadata["class_names"] = "a"
    with pytest.raises(ModelError, match="its metadata names 1 classes, but the model has 2"):
        model(UNSEEN[:1])


def test_an_output_that_is_closed_early_ends_it_quietly(monkeypatch):
    """As by `... | head`."""

    def closed(args):
        raise BrokenPipeError

    monkeypatch.setattr(sys, "argv", ["infer_exported", "model.onnx", "x.jpg"])
    monkeypatch.setattr(infer_module, "find_images", closed)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert infer_module.main() == 0


def test_names_that_the_output_cannot_encode_are_shown_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    path = os.fsdecode(b"caf\xe9.jpg")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["infer_exported", "model.onnx", path])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    model = ExportedModel({"class_names": ["\xfcn\xef"]}, None)
    monkeypatch.setattr(infer_module, "load", lambda *_: model)
    monkeypatch.setattr(infer_module, "classify", lambda *_: [(path, [(0, 1.0)])])
    assert infer_module.main() == 0
    stream.flush()
    shown = stream.buffer.getvalue().decode("ascii").splitlines()[1]
    assert shown.split() == ["caf\\udce9.jpg", "100.00", "%", "\\xfcn\\xef"]


@pytest.mark.parametrize("flag, value", [("-threads", 0), ("-threads", 99999), ("-top_k", "x")])
def test_a_count_out_of_range_is_refused(tmp_path, flag, value):
    done = run_tool("infer_exported", "model.onnx", "x.png", flag, value, cwd=tmp_path)
    assert done.returncode == 2 and f": expected 1 to 1024, found {value}\n" in done.stderr


def test_what_is_no_image_is_named_and_left_out_where_that_is_asked_for(exported, tmp_path):
    (tmp_path / "x.jpg").write_text("not a JPEG")
    good = make_images(tmp_path / "good", 2)
    paths, bad = [good[0], str(tmp_path / "x.jpg"), os.devnull, good[1]], []
    found = list(classify(load(exported[1]), paths, batch_size=2, on_bad=bad.append))
    assert [path for path, _ in found] == good
    assert bad[0].startswith(f"{tmp_path}/x.jpg: cannot be read") and len(bad) == 2
    assert bad[1].endswith("not a regular file")
    with pytest.raises(ModelError, match=r"x\.jpg: cannot be read"):
        list(classify(load(exported[1]), paths))


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


@pytest.mark.parametrize("suffix", [".pdiparams", ".program"])
def test_a_paddle_model_that_is_cut_or_changed_is_refused(exported, tmp_path, suffix):
    _, file, _ = exported
    if file.suffix == ".onnx":
        pytest.skip("for Paddle")
    folder = shutil.copytree(file.parent, tmp_path / "copy")
    file = folder / file.name
    changed = file if suffix == ".program" else file.with_suffix(suffix)
    changed.write_bytes(changed.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{changed.name}: not the file that was exported"):
        load(file)


def test_folders_are_searched_and_what_is_passed_over_is_counted(exported, tmp_path):
    make_images(tmp_path / "photos" / "b", 1)
    make_images(tmp_path / "photos" / "a", 2)
    (tmp_path / "photos" / "notes.txt").write_text("none")
    (tmp_path / "photos" / "round").symlink_to("..")
    done = run_tool("infer_exported", exported[1], "photos", "-top_k", 1, "-csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    header, *rows = csv.reader(done.stdout.splitlines())
    assert header == ["image", "rank", "class", "name", "confidence"]
    assert [row[0] for row in rows] == ["photos/a/0.png", "photos/a/1.png", "photos/b/0.png"]
    assert {row[3] for row in rows} <= set(NAMES)
    assert "2 others are passed over, such as photos/notes.txt: " in done.stderr


def test_json_has_what_predict_s_has_also_after_an_error(exported, weights, tmp_path):
    paths = make_images(tmp_path, 2)
    (tmp_path / "x.jpg").write_text("not a JPEG")
    done = run_tool("infer_exported", exported[1], *paths, "x.jpg", "-json", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: 1 of 3 images cannot be read"
    for found, expected in zip(json.loads(done.stdout), predict(paths, weights)):
        assert found["image"] == expected["image"]
        for one, other in zip(found["predictions"], expected["predictions"]):
            assert abs(one.pop("confidence") - other.pop("confidence")) < 1e-5 and one == other


def test_openvino_gives_the_same(exported, logits):
    pytest.importorskip("openvino")
    if exported[1].suffix != ".onnx":
        with pytest.raises(ModelError, match="-engine openvino is for ONNX files; Paddle runs"):
            load(exported[1], engine="openvino")
        return
    model = load(exported[1], engine="openvino", threads=1)
    assert model.engine == "openvino on the CPU, 1 thread"
    assert_near(model(UNSEEN), softmax(logits))
    assert model.metadata == load(exported[1]).metadata


def test_an_engine_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").touch()
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ModelError, match=f"model.onnx: running it needs `pip install {name}`"):
            load(tmp_path / "model.onnx", engine=name)


def test_threads_keep_to_the_cores_of_the_process():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        "from tools.infer_exported import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(
    "name, content", [("model.onnx", None), ("model.onnx", b"x"), ("a.pt", b"")]
)
def test_what_is_no_model_is_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name.split(".")[0]):
        load(tmp_path / name)


def test_the_script_reports_the_difference(weights, tmp_path):
    done = run_tool("export", "-pretrained", weights, "-format", "tflite", cwd=tmp_path)
    assert "invalid choice: 'tflite' (choose from" in done.stderr and done.stderr.count("\n") == 1
    done = run_tool("export", "-pretrained", weights, "-output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("verified on 16 generated images\npaddle: largest difference ")
