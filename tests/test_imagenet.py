"""tools/imagenet.py: ImageNet as it is downloaded, in stand-ins of a few images."""

import gzip
import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from cli.errors import DataError
from datasets import build_dataset
from loading import archives
from loading.files import read_list, scan_folder
from loading.imagenet import validation_labels, wordnet_ids
from tools.make_lists import make_lists
from tools.pack import Settings, pack

from .helpers.tiny_data import entries, make_config
from .helpers.transfer_data import tar_of

IDS = wordnet_ids()
NUMBERS = (1, 2, 293, 50_000)
TRAIN = {f"{IDS[k]}/{IDS[k]}_{i}.JPEG": k for k in (0, 7, 999) for i in (18, 1003)}
VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": int(validation_labels()[i - 1]) for i in NUMBERS}


def picture(name):
    """A picture of its own for every name."""
    pixels = np.random.default_rng(sum(map(ord, name))).integers(0, 255, (9, 11, 3), "uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def under(folder, names):
    return {f"{folder}/{name}": picture(name) for name in names}


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


CLASS_TARS = {
    f"{IDS[k]}.tar": tar_of({os.path.basename(p): picture(p) for p in TRAIN if TRAIN[p] == k})
    for k in (0, 7, 999)
}
VAL_IMAGES = {name: picture(name) for name in VAL}
KAGGLES = {**under("ILSVRC/Data/CLS-LOC/train", TRAIN), **under("ILSVRC/Data/CLS-LOC/val", VAL)}
TARS = {
    "ILSVRC2012_img_train.tar": tar_of(CLASS_TARS),
    "ILSVRC2012_img_val.tar": tar_of(VAL_IMAGES),
}
FOLDERS = {**under("train", TRAIN), **under("val", VAL)}
LAYOUTS = {
    "official tars": TARS,
    "class tars and a flat folder": {
        **{f"ILSVRC2012_img_train/{name}": data for name, data in CLASS_TARS.items()},
        **under("val", VAL),
    },
    "Kaggle's": KAGGLES,
    "Kaggle's zip": {"imagenet-object-localization-challenge.zip": zip_of(KAGGLES)},
    "Kaggle's tar": {"imagenet_object_localization_patched2019.tar": tar_of(KAGGLES)},
    "unpacked where the archives lay": {**CLASS_TARS, **VAL_IMAGES},
    "class folders and a flat val": FOLDERS,
}


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_the_first_labels_are_the_ones_that_everybody_knows():
    assert validation_labels()[:5].tolist() == [65, 970, 230, 809, 516]
    assert VAL["ILSVRC2012_val_00000293.JPEG"] == 0  # a tench
    assert np.bincount(validation_labels()).tolist() == [50] * 1000


def listed(root, side):
    """{file name: label} of a list."""
    index = read_list(f"{root}/{side}_list.txt", str(root), 1000, False)
    return {os.path.basename(path): label for path, label in entries(index).items()}


@pytest.mark.parametrize("files", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_labels_of_the_weights(files, tmp_path, capsys):
    write(tmp_path, files)
    make_lists(str(tmp_path), verify=True)
    assert listed(tmp_path, "train") == {os.path.basename(path): k for path, k in TRAIN.items()}
    assert listed(tmp_path, "val") == VAL
    assert (tmp_path / "classes.txt").read_text().split() == list(IDS)
    text = capsys.readouterr().out
    assert "6 images of 3 classes (ImageNet has 1,281,167)" in text
    assert "4 images of 4 classes (ImageNet has 50,000)" in text
    assert f"without images: {IDS[1]}, {IDS[2]}" in text
    assert "49,996 validation images are missing: 00000003, 00000004" in text
    assert "all 10 images can be decoded" in text
    options = ("MODEL.NUM_CLASSES", 1000, "DATA.DATASET", "imagenet2012")
    dataset = build_dataset(make_config(tmp_path, tmp_path, *options), "val")
    assert [dataset[0, i, i].label for i in range(4)] == list(VAL.values())


def test_the_folder_of_kaggles_images_is_enough(tmp_path):
    write(tmp_path, KAGGLES)
    make_lists(str(tmp_path / "ILSVRC"))
    assert listed(tmp_path / "ILSVRC", "val") == VAL


def test_the_validation_images_alone_are_enough_to_evaluate(tmp_path, capsys):
    write(tmp_path, under("val", VAL))
    make_lists(str(tmp_path))
    assert listed(tmp_path, "val") == VAL and not (tmp_path / "train_list.txt").exists()
    assert "train: not found" in capsys.readouterr().out
    make_lists(str(tmp_path), verify=True)
    assert capsys.readouterr().out == "all 4 images can be decoded\n"


@pytest.mark.parametrize(
    "path, message",
    [
        ("val/ILSVRC2012_val_00050001.JPEG", "not the name of an ImageNet validation image"),
        ("val/cat.JPEG", "not the name of an ImageNet validation image"),
        ("val/again/ILSVRC2012_val_00000001.JPEG", "both are image 1"),
        ("train/cats/1.JPEG", "'cats' is no WordNet id of an ImageNet class"),
    ],
)
def test_images_that_cannot_be_imagenets_are_named(path, message, tmp_path):
    write(tmp_path, {**FOLDERS, path: picture(path)})
    with pytest.raises(DataError, match=message):
        make_lists(str(tmp_path))
    assert not (tmp_path / "val_list.txt").exists()


def test_an_archive_that_is_truncated_before_or_later_is_one_error(tmp_path, capsys):
    write(tmp_path, TARS)
    path = tmp_path / "ILSVRC2012_img_val.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:1700])
    with pytest.raises(DataError, match=r"ILSVRC2012_img_val\.tar: cannot be read as an archive"):
        make_lists(str(tmp_path))
    path.write_bytes(whole)
    make_lists(str(tmp_path))
    os.truncate(path, 1700)
    archives.open_archive.cache_clear()
    capsys.readouterr()
    with pytest.raises(DataError, match=r"img_val\.tar: cannot be read.*behind the member"):
        make_lists(str(tmp_path), verify=True)
    with pytest.raises(DataError, match=r"img_val\.tar: cannot be read.*behind the member"):
        pack(str(tmp_path), str(tmp_path / "packed"), Settings(320, 90, 10), 1)
    assert not capsys.readouterr().out and not (tmp_path / "packed").exists()


def test_the_ground_truth_file_is_explained_and_not_believed(tmp_path):
    with pytest.raises(DataError, match="order of the development kit"):
        make_lists(str(tmp_path / "ILSVRC2012_validation_ground_truth.txt"))


def test_a_compressed_download_says_how_to_convert_it(tmp_path):
    write(tmp_path, {f"{name}.gz": gzip.compress(data) for name, data in TARS.items()})
    with pytest.raises(DataError, match=r"ILSVRC2012_img_.*\.tar\.gz: is compressed.* gzip -dc"):
        make_lists(str(tmp_path))


def test_a_folder_per_class_with_missing_classes_is_said_to_be_another_set(tmp_path, capsys):
    for side in ("train", "val"):
        write(tmp_path, {f"{side}/{path}": picture(side + path) for path in TRAIN})
    make_lists(str(tmp_path))
    train, val, warning, *_ = capsys.readouterr().out.splitlines()
    assert "train: 6 images of 3 classes (ImageNet has 1,281,167); without images" in train
    assert "val: 6 images of 3 classes (ImageNet has 50,000); without images" in val
    assert warning == "warning: the labels count these 3 classes, not ImageNet's 1,000"


def test_the_mains_say_what_a_flat_validation_folder_needs(tmp_path):
    train, val = under("train", ["cat/1.png", "dog/2.png"]), under("val", ["3.png", "4.png"])
    write(tmp_path, {**train, **val})
    with pytest.raises(DataError, match=r"2 images lie in it .* tools/make_lists\.py"):
        scan_folder(str(tmp_path), "val", 2)
