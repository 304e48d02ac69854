"""DATA.EXIF_ORIENTATION: images are turned as Pillow's own ImageOps does, the same everywhere."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from cpu.resample import from_image, to_image
from datasets import build_loader
from loading.images import open_image, read_pixels, upright
from tools import infer_exported
from tools.export import export
from tools.predict import predict
from transforms import build_eval_transform, build_train_transform

from .helpers.tiny_data import make_config
from .helpers.tiny_run import make_run

ORIENTATION = 0x112
SAVE = {"jpg": dict(quality=95), "png": {}, "webp": dict(lossless=True), "tif": {}}


def pixels(width=24, height=16, mode="RGB"):
    """An image without any symmetry."""
    small = np.random.default_rng(0).integers(0, 256, [3, 4, 3], dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC).convert(mode)


def save(path, orientation, image=None):
    """Writes an image that says how the camera was held."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or pixels()).save(path, exif=exif, **SAVE[path.suffix[1:]])
    return str(path)


def expected_of(path):
    """The upright image, by Pillow."""
    with Image.open(path) as image:
        image.load()
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def turned(path):
    return np.asarray(to_image(read_pixels(path, exif_orientation=True)))


CASES = [(ending, "RGB", orientation) for ending in SAVE for orientation in range(1, 9)]
CASES += [("jpg", "L", 6), ("jpg", "CMYK", 6), ("png", "P", 6), ("png", "LA", 6)]


@pytest.mark.parametrize("ending, mode, orientation", CASES)
def test_an_image_is_turned_as_pillow_turns_it(tmp_path, ending, mode, orientation):
    path = save(tmp_path / f"x.{ending}", orientation, pixels(mode=mode))
    expected = expected_of(path)
    if ending == "png":
        assert expected.shape == ((16, 24, 3) if orientation < 5 else (24, 16, 3))
    np.testing.assert_array_equal(turned(path), expected)
    with open_image(path) as image:
        np.testing.assert_array_equal(upright(image), expected)
    np.testing.assert_array_equal(infer_exported.upright(Image.open(path)), expected)


def test_sixteen_bit_grey_is_turned_and_scaled(tmp_path):
    values = np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 160
    path = save(tmp_path / "x.png", 6, Image.fromarray(values))
    for found in (turned(path), np.asarray(infer_exported.upright(Image.open(path)))):
        assert (found == np.rot90(values >> 8, -1)[..., None]).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff", b"", 9])
def test_an_image_with_broken_or_odd_exif_data_stays_as_it_is(tmp_path, exif):
    path = tmp_path / "x.jpg"
    if exif == 9:  # no such orientation
        save(path, exif)
    else:
        pixels().save(path, exif=exif)
    assert turned(str(path)).shape == (16, 24, 3)
    assert infer_exported.upright(Image.open(path)).size == (24, 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same picture, held in eight ways; the last of each class to validate on."""
    root = tmp_path_factory.mktemp("data")
    for orientation in range(1, 9):
        split = "train" if orientation < 7 else "val"
        ending = "jpg" if orientation == 6 else "png"
        save(root / split / f"class_{orientation % 2}" / f"{orientation}.{ending}", orientation)
    return root


@pytest.mark.parametrize("wanted", [True, False])
def test_training_and_evaluation_see_what_the_key_says(tmp_path, data, wanted):
    opts = ["DATA.EXIF_ORIENTATION", wanted, "DATA.BATCH_SIZE", 2, "TRAIN.REPEATED_AUG", 3]
    config = make_config(tmp_path, data, *opts, "MODEL.NUM_CLASSES", 2)
    for split, build in (("train", build_train_transform), ("val", build_eval_transform)):
        loader, transform = build_loader(config, split, log=lambda line: None), build(config)
        for images, _, indices in loader:
            for image, index in zip(images.numpy(), indices):
                path = loader.dataset.files.path(index)
                expected = from_image(Image.fromarray(expected_of(path)))
                expected = expected if wanted else read_pixels(path)
                rng = [np.random.default_rng(0)] * (split == "train")  # draws nothing that shows
                np.testing.assert_array_equal(image, transform(expected, *rng))


def test_predictions_and_the_exported_model_turn_images_as_the_run_does(tmp_path, data):
    weights = make_run(tmp_path / "run")
    held, flat = str(data / "val" / "class_1" / "7.png"), str(tmp_path / "flat.png")
    Image.fromarray(expected_of(held)).save(flat)

    def confidences(path, wanted):
        (result,) = predict(path, weights, opts=["DATA.EXIF_ORIENTATION", wanted])
        return [(entry["class"], entry["confidence"]) for entry in result["predictions"]]

    assert confidences(held, True) == confidences(flat, True) == confidences(flat, False)
    assert confidences(held, False) != confidences(flat, False)

    for wanted in (True, False):
        folder = tmp_path / str(wanted)
        metadata = export(weights, folder, images=[flat], opts=["DATA.EXIF_ORIENTATION", wanted])
        assert metadata["exif_orientation"] is wanted
        (program,) = [*folder.glob("model.json"), *folder.glob("model.pdmodel")]
        model = infer_exported.load(program)
        (result,) = infer_exported.classify(model, [held])
        found = [(entry["class"], entry["confidence"]) for entry in result["predictions"]]
        expected = confidences(held, wanted)
        assert [label for label, _ in found] == [label for label, _ in expected]
        np.testing.assert_allclose([p for _, p in found], [p for _, p in expected], rtol=1e-4)

    del metadata["exif_orientation"]  # of a model that was exported before there was the key
    (folder / "model.metadata").write_text(json.dumps(metadata))
    assert list(infer_exported.classify(infer_exported.load(program), [held])) == [result]
