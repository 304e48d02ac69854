"""tools/pack.py: a data set in tar shards, smaller."""

import json
import os
import subprocess
import sys
import tarfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from cli.errors import DataError, UserError
from cpu.resample import to_image
from loading import archives
from loading.images import read_pixels
from tools import pack as tool
from tools.pack import Settings, pack

from .helpers.runs import ROOT
from .helpers.tiny_data import make_config, make_data, samples


def test_small_pictures_are_copied_byte_for_byte(tmp_path):
    source = make_data(tmp_path / "data")
    pack(str(source), str(tmp_path / "packed"), Settings(320, 90, 10), 1)
    shown = ["train-00002.tar", "train_list.txt", "val-00000.tar", "val_list.txt"]
    assert sorted(os.listdir(tmp_path / "packed"))[-4:] == shown
    opts = ("DATA.DATASET", "imagenet2012")
    for split in ("train", "val"):
        packed = samples(make_config(tmp_path, tmp_path / "packed", *opts), split)
        assert packed == samples(make_config(tmp_path, source), split)
    assert (tmp_path / "packed" / "classes.txt").read_text() == "class_0\nclass_1\nclass_2\n"


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned by 90 degrees
LONG = Image.Exif()
LONG[0x0112], LONG[0x010E] = 6, "x" * 70_000  # more than a JPEG can hold


@pytest.mark.parametrize(
    "name,options",
    [("photo.jpg", {"exif": TURNED}), ("photo.png", {"exif": TURNED}), ("photo.jpg", {"xmp": XMP})]
    + [("photo.webp", {"exif": exif, "lossless": True}) for exif in (TURNED, LONG)]
    + [("photo.webp", {"xmp": XMP}), ("photo.tif", {"tiffinfo": {0x0112: 6}})],
)
def test_large_pictures_get_the_short_side_and_keep_their_rotation(tmp_path, name, options, capsys):
    source = make_data(tmp_path / "data")
    original = source / "train" / "class_1" / name
    x, y = np.meshgrid(np.arange(400), np.arange(300))
    pixels = np.stack([x * 255 // 400, y * 255 // 300, (x + y) % 256], -1)
    Image.fromarray(pixels.astype("uint8")).save(original, quality=95, **options)
    if "xmp" in options and not Image.open(original).getexif():
        pytest.skip("this Pillow knows no orientation by XMP")  # before 11.2
    pack(str(source), str(tmp_path / "packed"), Settings(60, 90, 100), 1)
    path = f"{tmp_path}/packed/train-00000.tar/train/class_1/{name}"
    expected = to_image(read_pixels(str(original), True)).resize((60, 80), Image.Resampling.BICUBIC)
    found = to_image(read_pixels(path, True))
    assert archives.read(path).startswith(b"\xff\xd8\xff") and found.size == (60, 80)
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).mean() < 4
    assert "34 pictures in 2 shards" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_keeps_the_shards_of_unchanged_pictures(tmp_path):
    source, output = make_data(tmp_path / "data"), tmp_path / "packed"
    pack(str(source), str(output), Settings(320, 90, 10), 1)
    times = {path.name: path.stat().st_mtime_ns for path in output.glob("train-*.tar")}
    content = (output / "train-00001.tar").read_bytes()
    (output / "train-00001.tar").unlink()
    (output / ".train-00001.tar.123-456.tmp").write_bytes(b"half")
    (output / "train_list.txt").unlink()
    replaced = source / "train" / "class_2" / "23.png"
    replaced.write_bytes((source / "val" / "class_2" / "2.png").read_bytes())
    pack(str(source), str(output), Settings(320, 90, 10), 1)
    same = [name for name in times if (output / name).stat().st_mtime_ns == times[name]]
    assert same == ["train-00000.tar"]
    assert (output / "train-00001.tar").read_bytes() == content
    assert len((output / "train_list.txt").read_text().splitlines()) == 24
    assert not list(output.glob(".*.tmp"))
    packed = archives.read(f"{output}/train-00002.tar/train/class_2/23.png")
    assert packed == replaced.read_bytes()


def test_lists_of_other_spellings_and_images_listed_twice_are_packed(tmp_path):
    source = make_data(tmp_path / "data")
    (source / "train" / "class_0").rename(source / "#0")
    paths = ["./#0/0.png 0", "./#0//3.png 0", "train//class_1/./1.png 1", "./#0/0.png 0"]
    (source / "train_list.txt").write_text("".join(f"{p}\n" for p in paths))
    pack(str(source), str(tmp_path / "packed"), Settings(320, 90, 3), 1)
    opts = ("DATA.DATASET", "imagenet2012")
    packed = samples(make_config(tmp_path, tmp_path / "packed", *opts), "train")
    assert packed == samples(make_config(tmp_path, source, *opts), "train") and len(packed) == 4


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
def test_pictures_that_do_not_decode_are_named_and_nothing_is_kept(
    tmp_path, short_side, damage, capsys
):
    source, settings = make_data(tmp_path / "data"), Settings(short_side, 90, 10)
    picture = source / "train" / "class_0" / "0.png"
    whole = picture.read_bytes()
    picture.write_bytes(damage(whole))
    with pytest.raises(DataError, match="1 pictures cannot be used"):
        pack(str(source), str(tmp_path / "packed"), settings, 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{picture}: " in line and not (tmp_path / "packed" / "train_list.txt").exists()
    picture.write_bytes(whole)
    pack(str(source), str(tmp_path / "packed"), settings, 1)


def test_a_shard_that_was_damaged_later_is_found_at_the_end(tmp_path, capsys):
    source, output = str(make_data(tmp_path / "data")), tmp_path / "packed"
    pack(source, str(output), Settings(320, 90, 100), 1)
    with tarfile.open(output / "val-00000.tar") as tar:
        start = tar.getmembers()[2].offset_data
    with open(output / "val-00000.tar", "r+b") as file:
        file.seek(start)
        file.write(b"not a picture any more")
    with pytest.raises(DataError, match="1 pictures cannot be used"):
        pack(source, str(output), Settings(320, 90, 100), 1)
    assert capsys.readouterr().out.endswith(f"; remove {output}/val-00000.tar\n")


def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(UserError, match="train-00000.tar: cannot be written: No space left"):
        pack(str(make_data(tmp_path / "data")), str(tmp_path / "packed"), Settings(9, 90, 10), 1)


def test_the_command_line_packs_as_it_says(tmp_path):
    source, output = str(make_data(tmp_path / "data")), tmp_path / "packed"

    def call(*flags):
        words = [sys.executable, "-OO", tool.__file__, source, "-output", str(output), *flags]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    done = call("-max_pixels", "255")
    assert (done.returncode, done.stderr[:6]) == (2, "error:")
    assert "256 pixels, more than" in done.stdout
    done = call("-workers", "100000")
    assert done.returncode == 0, done.stderr
    settings = json.loads((output / "pack.json").read_text())
    assert settings == {"short_side": 320, "quality": 85, "per_shard": 10000}
