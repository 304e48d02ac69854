"""tools/imagenet.py: ImageNet as it is downloaded, in stand-ins of a few images."""

import gzip
import io
import os
import tarfile
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

from .helpers.tiny_data import make_config

IDS = wordnet_ids()
NUMBERS = (1, 2, 293, 50_000)
TRAIN = {f"{IDS[k]}/{IDS[k]}_{i}.JPEG": k for k in (0, 7, 999) for i in (18, 1003)}
VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": int(validation_labels()[i - 1]) for i in NUMBERS}
DEVKIT = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archives.open_archive.cache_clear()


def picture(name):
    """A picture of its own for every name."""
    pixels = np.random.default_rng(sum(map(ord, name))).integers(0, 255, (9, 11, 3), "uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def class_tar(wnid):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in TRAIN:
            if path.startswith(wnid):
                add(tar, os.path.basename(path), picture(path))
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def as_official_tars(root):
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as tar:
        for wnid in (IDS[0], IDS[7], IDS[999]):
            add(tar, f"{wnid}.tar", class_tar(wnid))
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for name in VAL:
            add(tar, name, picture(name))


def as_class_tars_and_a_flat_folder(root):
    for wnid in (IDS[0], IDS[7], IDS[999]):
        write(root / "ILSVRC2012_img_train" / f"{wnid}.tar", class_tar(wnid))
    for name in VAL:
        write(root / "val" / name, picture(name))
    write(root / DEVKIT, b"490\n361\n")


def as_kaggle(root, prefix="ILSVRC/Data/CLS-LOC"):
    for path in TRAIN:
        write(root / prefix / "train" / path, picture(path))
    for name in VAL:
        write(root / prefix / "val" / name, picture(name))


def as_kaggles_zip(root):
    with zipfile.ZipFile(root / "imagenet-object-localization-challenge.zip", "w") as archive:
        for path in TRAIN:
            archive.writestr(f"ILSVRC/Data/CLS-LOC/train/{path}", picture(path))
        for name in VAL:
            archive.writestr(f"ILSVRC/Data/CLS-LOC/val/{name}", picture(name))


def as_kaggles_tar(root):
    as_kaggle(root / "unpacked")
    with tarfile.open(root / "imagenet_object_localization_patched2019.tar", "w") as tar:
        tar.add(root / "unpacked" / "ILSVRC", "ILSVRC")


def as_unpacked_where_the_archives_lay(root):
    for wnid in (IDS[0], IDS[7], IDS[999]):
        write(root / f"{wnid}.tar", class_tar(wnid))
    for name in VAL:
        write(root / name, picture(name))


def as_class_folders_with_a_flat_val(root):
    as_kaggle(root, prefix="")


def test_the_first_labels_are_the_ones_that_everybody_knows():
    assert validation_labels()[:5].tolist() == [65, 970, 230, 809, 516]
    assert VAL["ILSVRC2012_val_00000293.JPEG"] == 0  # a tench
    assert np.bincount(validation_labels()).tolist() == [50] * 1000


LAYOUTS = [
    as_official_tars,
    as_class_tars_and_a_flat_folder,
    as_kaggle,
    as_kaggles_zip,
    as_kaggles_tar,
    as_unpacked_where_the_archives_lay,
    as_class_folders_with_a_flat_val,
]


def listed(root, side):
    """{file name: label} of a list."""
    index = read_list(f"{root}/{side}_list.txt", str(root), 1000, False)
    names = [os.path.basename(os.fsdecode(index.name(i))) for i in range(len(index))]
    return dict(zip(names, index.labels))


@pytest.mark.parametrize("lay_out", LAYOUTS)
def test_every_layout_gives_the_labels_of_the_weights(lay_out, tmp_path):
    lay_out(tmp_path)
    lines = []
    make_lists(str(tmp_path), verify=True, log=lines.append)
    assert listed(tmp_path, "train") == {os.path.basename(path): k for path, k in TRAIN.items()}
    assert listed(tmp_path, "val") == VAL
    assert (tmp_path / "classes.txt").read_text().split() == list(IDS)
    text = "\n".join(lines)
    assert "6 images of 3 classes (ImageNet has 1,281,167)" in text
    assert "4 images of 4 classes (ImageNet has 50,000)" in text
    assert f"without images: {IDS[1]}, {IDS[2]}" in text
    assert "49,996 validation images are missing: 00000003, 00000004" in text
    assert (DEVKIT.split("/")[-1] in text) == (tmp_path / DEVKIT).exists()
    assert "all 10 images can be decoded" in text
    options = ("MODEL.NUM_CLASSES", 1000, "DATA.DATASET", "imagenet2012")
    config = make_config(tmp_path, tmp_path, *options)
    dataset = build_dataset(config, "val")
    assert [dataset[0, i, i].label for i in range(4)] == list(VAL.values())


def test_the_folder_of_kaggles_images_is_enough(tmp_path):
    as_kaggle(tmp_path)
    make_lists(str(tmp_path / "ILSVRC"), log=print)
    assert listed(tmp_path / "ILSVRC", "val") == VAL


def test_the_validation_images_alone_are_enough_to_evaluate(tmp_path):
    for name in VAL:
        write(tmp_path / "val" / name, picture(name))
    lines = []
    make_lists(str(tmp_path), log=lines.append)
    assert listed(tmp_path, "val") == VAL
    assert not (tmp_path / "train_list.txt").exists()
    assert any("train: not found" in line for line in lines)
    make_lists(str(tmp_path), verify=True, log=lines.append)
    assert lines[-1] == "all 4 images can be decoded"


@pytest.mark.parametrize(
    "path, message",
    [
        ("val/ILSVRC2012_val_00050001.JPEG", "not the name of an ImageNet validation image"),
        ("val/cat.JPEG", "not the name of an ImageNet validation image"),
        (f"val/{IDS[3]}/ILSVRC2012_val_00000007.JPEG", f"lies in the folder of {IDS[3]}"),
        ("val/again/ILSVRC2012_val_00000001.JPEG", "both are image 1"),
        ("train/cats/1.JPEG", "'cats' is no WordNet id of an ImageNet class"),
    ],
)
def test_images_that_cannot_be_imagenets_are_named(path, message, tmp_path):
    as_class_folders_with_a_flat_val(tmp_path)
    write(tmp_path / path, picture(path))
    with pytest.raises(DataError, match=message):
        make_lists(str(tmp_path), log=print)
    assert not (tmp_path / "val_list.txt").exists()


def test_an_archive_that_is_truncated_before_or_later_is_one_error(tmp_path):
    as_official_tars(tmp_path)
    path = tmp_path / "ILSVRC2012_img_val.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:1700])
    with pytest.raises(DataError, match=r"ILSVRC2012_img_val\.tar: cannot be read as an archive"):
        make_lists(str(tmp_path), log=print)
    path.write_bytes(whole)
    make_lists(str(tmp_path), log=print)
    os.truncate(path, 1700)
    archives.open_archive.cache_clear()
    lines = []
    with pytest.raises(DataError, match=r"img_val\.tar: cannot be read.*behind the member"):
        make_lists(str(tmp_path), verify=True, log=lines.append)
    with pytest.raises(DataError, match=r"img_val\.tar: cannot be read.*behind the member"):
        pack(str(tmp_path), str(tmp_path / "packed"), Settings(320, 90, 10), 1, lines.append)
    assert not lines and not (tmp_path / "packed").exists()


def test_the_ground_truth_file_is_explained_and_not_believed(tmp_path):
    write(tmp_path / DEVKIT, b"490\n361\n")
    with pytest.raises(DataError, match="order of the development kit"):
        make_lists(str(tmp_path / DEVKIT), log=print)
    lines = []
    with pytest.raises(DataError, match="found . classes"):
        make_lists(str(tmp_path), log=lines.append)
    assert "order of the development kit" in lines[0]


def test_a_compressed_download_says_how_to_convert_it(tmp_path):
    as_official_tars(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with pytest.raises(DataError, match=r"ILSVRC2012_img_.*\.tar\.gz: is compressed.* gzip -dc"):
        make_lists(str(tmp_path), log=print)


def test_a_folder_per_class_with_missing_classes_is_said_to_be_another_set(tmp_path):
    for path in TRAIN:
        for side in ("train", "val"):
            write(tmp_path / side / path, picture(side + path))
    lines = []
    make_lists(str(tmp_path), log=lines.append)
    assert "train: 6 images of 3 classes (ImageNet has 1,281,167); without images" in lines[0]
    assert "val: 6 images of 3 classes (ImageNet has 50,000); without images" in lines[1]
    assert lines[2] == "warning: the labels count these 3 classes, not ImageNet's 1,000"


def test_the_mains_say_what_a_flat_validation_folder_needs(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "val/3.png", "val/4.png"):
        write(tmp_path / name, picture(name))
    with pytest.raises(DataError, match=r"2 images lie in it .* tools/make_lists\.py"):
        scan_folder(str(tmp_path), "val", 2)
