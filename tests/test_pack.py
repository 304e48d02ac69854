"""tools/pack.py: a data set in tar shards, smaller."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from cli.errors import DataError, UserError
from datasets import build_dataset
from loading import archives
from loading.images import read_image
from tools.pack import Settings, main, pack

from .helpers.tiny_data import make_config, make_data


@pytest.fixture(autouse=True)
def no_opened_archives():
    archives.open_archive.cache_clear()


def photograph(path, width, height, **options):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1)
    Image.fromarray(pixels.astype("uint8")).save(path, quality=95, **options)


def data_of(config, split="train"):
    data = build_dataset(config, split)
    samples = [data[(0, index, index)] for index in range(len(data))]
    assert not any(sample.error for sample in samples)
    return [(sample.label, sample.image.tobytes()) for sample in samples]


def test_small_pictures_are_copied_byte_for_byte(tmp_path):
    source = make_data(tmp_path / "data")
    pack(str(source), str(tmp_path / "packed"), Settings(320, 90, 10), 1)
    assert sorted(os.listdir(tmp_path / "packed"))[-4:] == [
        "train-00002.tar",
        "train_list.txt",
        "val-00000.tar",
        "val_list.txt",
    ]
    opts = ("DATA.DATASET", "imagenet2012")
    for split in ("train", "val"):
        packed = data_of(make_config(tmp_path, tmp_path / "packed", *opts), split)
        assert packed == data_of(make_config(tmp_path, source), split)
    assert (tmp_path / "packed" / "classes.txt").read_text() == "class_0\nclass_1\nclass_2\n"


def test_large_pictures_get_the_short_side_and_keep_their_rotation(tmp_path):
    source = make_data(tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photograph(source / "train" / "class_1" / "photo.jpg", 400, 300, exif=exif)
    lines = []
    pack(str(source), str(tmp_path / "packed"), Settings(60, 90, 100), 1, lines.append)
    path = f"{tmp_path}/packed/train-00000.tar/train/class_1/photo.jpg"
    with Image.open(io.BytesIO(archives.read(path))) as image:
        assert image.size == (80, 60) and image.format == "JPEG"
        assert image.getexif()[0x0112] == 6
    expected = read_image(str(source / "train/class_1/photo.jpg")).resize((80, 60), 3)
    error = np.abs(np.asarray(read_image(path), int) - np.asarray(expected, int))
    assert error.mean() < 4
    assert any("34 pictures in 2 shards" in line for line in lines)


def test_a_stopped_run_goes_on_and_keeps_whole_shards(tmp_path):
    source, output = str(make_data(tmp_path / "data")), tmp_path / "packed"
    pack(source, str(output), Settings(320, 90, 10), 1)
    first = (output / "train-00000.tar").stat().st_mtime_ns
    content = (output / "train-00001.tar").read_bytes()
    (output / "train-00001.tar").unlink()
    (output / ".train-00001.tar.123-456.tmp").write_bytes(b"half")
    (output / "train_list.txt").unlink()
    pack(source, str(output), Settings(320, 90, 10), 1)
    assert (output / "train-00000.tar").stat().st_mtime_ns == first
    assert (output / "train-00001.tar").read_bytes() == content
    assert len((output / "train_list.txt").read_text().splitlines()) == 24
    assert not list(output.glob(".*.tmp"))


def test_other_settings_do_not_mix_into_a_packed_set(tmp_path):
    source, output = str(make_data(tmp_path / "data")), str(tmp_path / "packed")
    pack(source, output, Settings(320, 90, 10), 1)
    said = r"pack.json: this folder was begun with .*: 320, .*, not with .*: 160, .*go on with"
    with pytest.raises(UserError, match=said):
        pack(source, output, Settings(160, 90, 10), 1)
    with pytest.raises(UserError, match="is not empty"):
        pack(source, source, Settings(160, 90, 10), 1)


@pytest.mark.parametrize("short_side", [8, 320])  # resized, or copied as it is
@pytest.mark.parametrize("damage", [lambda data: b"no picture", lambda data: data[:-60]])
def test_pictures_that_do_not_decode_are_named_and_nothing_is_kept(tmp_path, short_side, damage):
    source, settings = make_data(tmp_path / "data"), Settings(short_side, 90, 10)
    picture = source / "train" / "class_0" / "0.png"
    whole = picture.read_bytes()
    picture.write_bytes(damage(whole))
    lines = []
    with pytest.raises(DataError, match="1 pictures cannot be used"):
        pack(str(source), str(tmp_path / "packed"), settings, 1, lines.append)
    assert len(lines) == 1 and f"{picture}: " in lines[0]
    assert not (tmp_path / "packed" / "train_list.txt").exists()
    picture.write_bytes(whole)
    pack(str(source), str(tmp_path / "packed"), settings, 1, lines.append)


def test_a_shard_that_was_damaged_later_is_found_at_the_end(tmp_path):
    source, output = str(make_data(tmp_path / "data")), tmp_path / "packed"
    pack(source, str(output), Settings(320, 90, 100), 1)
    with tarfile.open(output / "val-00000.tar") as tar:
        start = tar.getmembers()[2].offset_data
    with open(output / "val-00000.tar", "r+b") as file:
        file.seek(start)
        file.write(b"not a picture any more")
    lines = []
    with pytest.raises(DataError, match="1 pictures cannot be used"):
        pack(source, str(output), Settings(320, 90, 100), 1, lines.append)
    assert lines[0].endswith(f"; remove {output}/val-00000.tar")


def test_the_command_line_packs_as_it_says(tmp_path, monkeypatch):
    source, output = str(make_data(tmp_path / "data")), tmp_path / "packed"
    monkeypatch.setattr("sys.argv", ["pack.py", source, "-output", str(output), "-workers", "1"])
    main()
    settings = json.loads((output / "pack.json").read_text())
    assert settings == {"short_side": 320, "quality": 85, "per_shard": 10000}
