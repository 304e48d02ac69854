"""tools/prepare.py: the official archives of CIFAR and Flowers-102, made here in small."""

import os
import subprocess
import sys

import numpy as np
import pytest

from cli.errors import DataError, UserError
from loading import archives
from loading.images import read_image
from tools import prepare as prepare_module
from tools.prepare import prepare

from .helpers.runs import ROOT
from .helpers.transfer_data import cifar10, cifar100, flowers102, write_mat, write_tar


@pytest.mark.parametrize("download", [cifar10, cifar100])  # of the latter, the fine labels
def test_cifar_keeps_every_pixel_label_and_name(tmp_path, download, capsys):
    archive, parts, classes = download(tmp_path / "cifar-binary.tar.gz")
    output = tmp_path / "out"
    prepare(archive, str(output))
    for split, part in (("train", parts[:-1]), ("val", parts[-1:])):
        rows = (output / f"{split}_list.txt").read_text().splitlines()
        paths, labels = zip(*(row.rsplit(" ", 1) for row in rows))
        images, expected = (np.concatenate(x) for x in zip(*(p[:2] for p in part)))
        assert [*map(int, labels)] == expected.tolist()
        found = [np.asarray(read_image(str(output / path))) for path in paths]
        np.testing.assert_array_equal(np.stack(found), images)
    assert (output / "classes.txt").read_text().split() == classes
    train = sum(len(labels) for _, labels, *_ in parts[:-1])
    said = f"out: {train} images to train on, {len(parts[-1][1])} to test\n"
    assert said in capsys.readouterr().out


def test_flowers_are_copied_byte_for_byte_with_the_labels_of_the_files_beside_them(tmp_path):
    archive, images = flowers102(tmp_path)
    prepare(archive, str(tmp_path / "out"))
    found = {}
    for split in ("train", "val"):
        for line in (tmp_path / "out" / f"{split}_list.txt").read_text().splitlines():
            path, label = line.rsplit(" ", 1)
            number = int(path[-9:-4])
            assert archives.read(str(tmp_path / "out" / path)) == images[f"jpg/{path[-15:]}"]
            assert int(label) == [2, 0, 1][(number - 1) % 3]
            found.setdefault(split, set()).add(number)
    assert found == {"train": {1, 2, 6, 9}, "val": {3, 4, 5, 7, 8}}
    assert not (tmp_path / "out" / "classes.txt").exists()


# ---------------------------------------------------------------------------------- mistakes
def refuse(expected, archive, output, error=DataError):
    with pytest.raises(error, match=expected):
        prepare(str(archive), str(output))
    assert not output.exists() or not os.listdir(output)


def test_each_kind_of_wrong_archive_has_its_message_and_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    refuse("none.tgz: No such file", tmp_path / "none.tgz", out, UserError)
    (tmp_path / "text.tar.gz").write_text("not a tar")
    refuse("text.tar.gz: cannot be read: [^\n]*; download it again$", tmp_path / "text.tar.gz", out)
    other = write_tar(tmp_path / "other.tar.gz", {"a/b.jpg": b"x"})
    refuse("other.tar.gz: neither CIFAR's binary version nor Flowers", other, out)
    archive, parts, _ = cifar10(tmp_path / "x.tar.gz", **{"data_batch_3.bin": b""})
    refuse("lacks data_batch_3.bin", archive, out)
    archive, parts, _ = cifar10(tmp_path / "y.tar.gz", **{"test_batch.bin": parts[0][2][:-7]})
    refuse("test_batch.bin ends within an image", archive, out)
    archive, parts, _ = cifar10(tmp_path / "z.tar.gz", **{"batches.meta.txt": b"one\ntwo\n"})
    refuse("has the label", archive, out)
    whole = (tmp_path / "z.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    refuse("cut.tar.gz: cannot be read", tmp_path / "cut.tar.gz", out)


def test_flowers_files_that_are_missing_or_do_not_fit_are_named(tmp_path):
    archive, images = flowers102(tmp_path)
    out = tmp_path / "out"
    (tmp_path / "setid.mat").rename(tmp_path / "kept")
    refuse("setid.mat: no such file.* belongs beside 102flowers.tgz", archive, out)
    (tmp_path / "setid.mat").write_text("<html>not found</html>")
    refuse("setid.mat: not a MATLAB file of version 5", archive, out)
    write_mat(tmp_path / "setid.mat", {"trnid": np.array([10], "uint16")})
    refuse("setid.mat: does not fit", archive, out)
    (tmp_path / "kept").rename(tmp_path / "setid.mat")
    del images["jpg/image_00004.jpg"]
    refuse("lacks image_00004.jpg", write_tar(tmp_path / "102flowers.tgz", images), out)


def test_the_script_says_how_to_use_what_it_made_and_leaves_a_full_folder_alone(tmp_path):
    archive, _, _ = cifar10(tmp_path / "x.tar.gz")
    out = str(tmp_path / "out")
    words = [sys.executable, "-OO", prepare_module.__file__, archive, "-output", out]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("use it with: -dataset imagenet2012 -data_path")
    before = sorted(os.listdir(out))
    with pytest.raises(UserError, match="out: is not empty"):
        prepare(archive, out)
    assert sorted(os.listdir(out)) == before
