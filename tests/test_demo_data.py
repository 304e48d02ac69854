"""The demo's images: what the archive holds, how it is cut, how it is laid out."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.errors import DataError
from config import get_config
from demo import make_subset
from demo.fashion_mnist import CLASSES, SPLITS, Split, fingerprint, folder_name, read, write_archive
from demo.prepare import prepare
from loading.classes import data_classes
from loading.files import read_list, scan_folder
from loading.images import read_image

from .helpers.tiny_data import entries

ORIGINAL = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist


@pytest.fixture(scope="module")
def bundled():
    return read(make_subset.ARCHIVE)


@pytest.fixture
def splits():
    """A toy Fashion-MNIST: three training images a class in random order, one for validation."""
    rng = np.random.default_rng(0)
    labels = {"train": rng.permutation(np.repeat(np.arange(10), 3)), "val": np.arange(10)}
    return {
        name: Split(rng.integers(0, 256, (len(y), 28, 28), dtype=np.uint8), y.astype(np.uint8))
        for name, y in labels.items()
    }


def write_idx_folder(folder, splits, compress):
    """Writes idx files byte by byte as their specification says, by other means than the reader."""
    folder.mkdir()
    side = (28).to_bytes(4, "big")
    for name, stem in SPLITS.items():
        images, labels = splits[name]
        n = len(labels).to_bytes(4, "big")
        for kind, data in (
            ("images-idx3", b"\0\0\x08\x03" + n + side + side + images.tobytes()),
            ("labels-idx1", b"\0\0\x08\x01" + n + labels.tobytes()),
        ):
            file = folder / f"{stem}-{kind}-ubyte{'.gz' * compress}"
            file.write_bytes(gzip.compress(data) if compress else data)
    return folder


def test_the_archive_is_small_balanced_and_holds_out_1200_images_that_are_not_trained_on(bundled):
    assert make_subset.ARCHIVE.stat().st_size < 4_000_000
    for name, count in {"train": 940, "val": 120}.items():
        assert np.bincount(bundled[name].labels).tolist() == [count] * len(CLASSES)
    seen = {image.tobytes() for image in bundled["train"].images}
    assert not any(image.tobytes() in seen for image in bundled["val"].images)


@pytest.mark.skipif(not ORIGINAL.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_cutting_the_original_again_gives_the_archive(bundled):
    original, rng = read(ORIGINAL), np.random.default_rng(make_subset.SEED)
    again = {n: make_subset.cut(original[n], c, rng) for n, c in make_subset.PER_CLASS.items()}
    assert fingerprint(again) == fingerprint(bundled)


def test_a_cut_takes_as_many_of_each_class_with_their_own_labels_by_its_seed(splits):
    def cut(seed, count=2):
        return make_subset.cut(splits["train"], count, np.random.default_rng(seed))

    subset = cut(1)
    assert subset.labels.tolist() == np.repeat(np.arange(10), 2).tolist()
    label_of = {i.tobytes(): y for i, y in zip(splits["train"].images, splits["train"].labels)}
    assert [label_of[image.tobytes()] for image in subset.images] == subset.labels.tolist()
    assert np.array_equal(subset.images, cut(1).images)
    assert not np.array_equal(subset.images, cut(2).images)
    with pytest.raises(DataError, match="T-shirt/top has 3 images, 4"):
        cut(0, 4)


def test_the_same_splits_are_packed_into_the_same_bytes_and_read_back(splits, tmp_path):
    write_archive(splits, tmp_path / "a.tar.xz")
    write_archive(splits, tmp_path / "b.tar.xz")
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()
    assert fingerprint(read(tmp_path / "a.tar.xz")) == fingerprint(splits)


@pytest.mark.parametrize("compress", [True, False])
def test_a_folder_of_idx_files_is_read_gzipped_or_not(splits, tmp_path, compress):
    found = read(write_idx_folder(tmp_path / "idx", splits, compress))
    assert fingerprint(found) == fingerprint(splits)


def test_a_missing_or_damaged_source_is_named(splits, tmp_path):
    def refuse(source, message):
        with pytest.raises(DataError, match=message):
            read(source)

    folder = write_idx_folder(tmp_path / "idx", splits, compress=True)
    labels = folder / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-9])
    refuse(folder, "t10k-labels-idx1-ubyte.gz: cannot be read")
    labels.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    refuse(folder, "t10k-labels-idx1-ubyte is not a whole idx file")
    labels.write_bytes(gzip.compress(gzip.decompress(whole)[:-1] + b"\x0a"))
    refuse(folder, r"t10k: images \(10, 28, 28\) and labels \(10,\) up to 10; expected")
    labels.unlink()
    refuse(folder, "t10k-labels-idx1-ubyte .* is missing")
    refuse(tmp_path / "nothing.tar.xz", "no such file")
    (tmp_path / "text.tar.xz").write_text("text")
    refuse(tmp_path / "text.tar.xz", "cannot be read as a tar archive")


def test_the_layout_is_imagenets_and_keeps_every_pixel_label_and_name(splits, tmp_path):
    assert prepare(splits, tmp_path / "data") is True
    root = str(tmp_path / "data")
    for name, split in splits.items():
        index = read_list(f"{root}/{name}_list.txt", root, 10, False)
        assert list(index.labels) == split.labels.tolist()
        assert entries(index) == entries(scan_folder(root, name, 10))
        for i, pixels in enumerate(split.images):
            assert np.array_equal(np.asarray(read_image(index.path(i))), np.dstack([pixels] * 3))
            with Image.open(index.path(i)) as image:
                assert (image.format, image.mode) == ("PNG", "L")
    config = get_config()
    config.DATA.DATA_PATH, config.MODEL.NUM_CLASSES = root, 10
    assert data_classes(config).names == tuple(CLASSES)
    assert folder_name(0) == "0_t_shirt_top" and folder_name(9) == "9_ankle_boot"


def test_the_same_images_are_not_laid_out_again_and_others_replace_them(splits, tmp_path):
    prepare(splits, tmp_path / "data")
    before = os.stat(tmp_path / "data" / "train_list.txt").st_mtime_ns
    assert prepare(splits, tmp_path / "data") is False
    assert os.stat(tmp_path / "data" / "train_list.txt").st_mtime_ns == before
    smaller = {name: Split(s.images[:5], s.labels[:5]) for name, s in splits.items()}
    assert prepare(smaller, tmp_path / "data") is True
    assert len((tmp_path / "data" / "train_list.txt").read_text().splitlines()) == 5
    assert len(list((tmp_path / "data" / "train").rglob("*.png"))) == 5


def test_a_folder_that_it_did_not_make_is_refused_and_left_alone(splits, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="was not made by this script"):
        prepare(splits, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_leaves_nothing_half_made(splits, tmp_path, monkeypatch):
    calls = []

    def save(self, path):
        calls.append(path)
        if len(calls) > 7:
            raise OSError(28, "No space left on device")
        Path(path).touch()

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(DataError, match="No space left"):
        prepare(splits, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
