"""loading/archives.py: tar and zip files as folders."""

import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from cli.errors import DataError
from datasets import build_dataset
from loading import archives
from loading.files import find_classes, scan_folder
from loading.images import BadImage, read_image

from .helpers.tiny_data import make_config, make_data, samples, write_lists
from .helpers.transfer_data import tar_of

FILES = {"cat/1.jpg": b"one", "cat/sub/2.jpg": b"two" * 999, "dog/3.jpg": b""}


def add(tar, name, data=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path, files=FILES):
    path.write_bytes(tar_of(files))
    return str(path)


def tree_of(folder):
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def by_program(*words):
    def write(folder, path):
        if not shutil.which(words[0]):
            pytest.skip(f"{words[0]} is not installed")
        subprocess.run([*words, path, "."], cwd=folder, check=True)

    return write


def write_zip(path, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    return str(path)


WRITERS = {
    "GNU.tar": by_program("tar", "-cf"),
    "bsd.tar": by_program("bsdtar", "-cf"),
    "old.tar": by_program("tar", "--format=v7", "-cf"),
    "python.tar": lambda folder, path: write_tar(path),
    "InfoZIP.zip": by_program("zip", "-qr"),
    "python.zip": lambda folder, path: write_zip(path),
    "deflated.zip": lambda folder, path: write_zip(path, zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("name, write", WRITERS.items())
def test_members_read_as_the_files_they_were(tmp_path, name, write):
    path = tmp_path / name
    write(tree_of(tmp_path / "tree"), path)
    path = str(path)
    for name, data in FILES.items():
        assert archives.read(f"{path}/{name}") == data
    assert list(archives.open_archive(path).under("")) == sorted(FILES)
    assert list(archives.open_archive(path).under("cat")) == ["cat/1.jpg", "cat/sub/2.jpg"]
    assert archives.open_archive(path).folders("") == ["cat", "dog"]
    assert archives.is_folder(f"{path}/cat") and not archives.is_folder(f"{path}/ca")
    assert archives.exists(f"{path}/dog/3.jpg") and not archives.exists(f"{path}/dog/4.jpg")


def test_a_tar_in_a_tar_is_a_folder_and_a_second_name_of_a_file_is_that_file(tmp_path):
    with tarfile.open(tmp_path / "out.tar", "w") as tar:
        add(tar, "in.tar", tar_of(FILES))
        add(tar, "a.jpg", b"data")
        add(tar, "b.jpg", b"", type=tarfile.LNKTYPE, linkname="a.jpg")
    assert archives.read(f"{tmp_path}/out.tar/in.tar/cat/sub/2.jpg") == FILES["cat/sub/2.jpg"]
    assert archives.open_archive(f"{tmp_path}/out.tar").folders("in.tar") == ["cat", "dog"]
    assert archives.read(f"{tmp_path}/out.tar/b.jpg") == b"data"


def test_an_index_is_kept_until_the_archive_changes(tmp_path):
    def reopened():
        archives.open_archive.cache_clear()
        return list(archives.open_archive(path).under(""))

    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"one"})
    kept, before = tmp_path / ".a.tar.index.npz", os.stat(path)
    assert reopened() == ["a.jpg"]
    written = kept.stat().st_mtime_ns
    assert reopened() == ["a.jpg"] and kept.stat().st_mtime_ns == written
    write_tar(tmp_path / "a.tar", {"b.jpg": b"two"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    assert os.stat(path).st_size == before.st_size and reopened() == ["b.jpg"]
    kept.write_bytes(b"PK\3\4 half")  # or it is damaged
    assert reopened() == ["b.jpg"] and archives.read(f"{path}/b.jpg") == b"two"


def test_an_archive_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):  # the superuser, who may run this test, reads any file
        raise PermissionError(13, "Permission denied", args[0])

    path = write_tar(tmp_path / "a.tar")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match="a.tar: permission denied$"):
        archives.open_archive(path)


def _longer(path):
    path.write_bytes(path.read_bytes() + b"more")


def _another(path):
    write_tar(path.with_name("new"), {**FILES, "cat/1.jpg": b"other"})
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [_longer, _another, Path.unlink])
def test_an_archive_that_changes_in_use_is_refused(tmp_path, change):
    path = write_tar(tmp_path / "a.tar")
    archives.open_archive(path)
    change(tmp_path / "a.tar")
    with pytest.raises(DataError, match="a.tar/cat/1.jpg: the archive was changed while it was in"):
        archives.open_archive(path).read("cat/1.jpg")


@pytest.mark.parametrize(
    "cut, last", [(100, ""), (512, "cat/1.jpg"), (1600, "cat/sub/2.jpg"), (3000, "cat/sub/2.jpg")]
)
def test_a_truncated_tar_is_refused_at_whatever_place(tmp_path, cut, last):
    path = write_tar(tmp_path / "a.tar")
    os.truncate(path, cut)
    where = f".*, behind the member '{last}'" if last else ""
    with pytest.raises(DataError, match=f"a.tar: cannot be read as an archive{where}"):
        archives.open_archive(path)


def _zero_a_header(data):
    at = 512 * 3  # cat/1.jpg and the beginning of cat/sub/2.jpg stay
    return data[:at] + bytes(4096) + data[at + 4096 :]


@pytest.mark.parametrize("damage", [lambda data: data * 2, _zero_a_header])
@pytest.mark.parametrize("inner", [False, True])
def test_a_tar_that_goes_on_behind_its_end_is_refused(tmp_path, damage, inner):
    data = damage(tar_of({f"{number}.jpg": b"x" * 700 for number in range(9)}))
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({"in.tar": data}) if inner else data)
    with pytest.raises(DataError, match="a.tar: .* goes on behind its end, at byte"):
        archives.open_archive(str(path))
    path.write_bytes(tar_of(FILES) + bytes(2**21))  # it may end in many zeros
    assert len(archives.open_archive(str(path))) == len(FILES)


@pytest.mark.parametrize(
    "encoding, names",
    [
        ("utf-8", ["猫/一.jpg", "Käse/1.jpg"]),  # as Info-ZIP writes them
        ("gb2312", ["老虎/一.jpg", "dog/1.jpg"]),  # as Windows does in China
        ("cp437", ["Größe/1.jpg", "año/é.jpg"]),
    ],
)
def test_names_of_a_zip_that_are_not_marked_as_utf8_are_read(tmp_path, encoding, names):
    path, raw = tmp_path / "a.zip", [name.encode(encoding) for name in names]
    places = [bytes([65 + i]) * len(name) for i, name in enumerate(raw)]
    with zipfile.ZipFile(path, "w") as archive:
        for place in places:
            archive.writestr(place.decode(), b"data")
    data = path.read_bytes()
    for place, name in zip(places, raw):
        data = data.replace(place, name)
    path.write_bytes(data)
    assert sorted(archives.open_archive(str(path)).under("")) == sorted(names)
    assert archives.read(f"{path}/{names[0]}") == b"data"


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_a_class_folder_without_images_is_a_class_as_on_the_disk(tmp_path, ending):
    make_data(tmp_path / "data")
    (tmp_path / "data/train/class_1a/empty").mkdir(parents=True)
    expected = find_classes(str(tmp_path / "data"))
    shutil.make_archive(str(tmp_path / "packed/train"), ending, tmp_path / "data/train")
    assert find_classes(str(tmp_path / "packed")) == expected and "class_1a" in expected
    index = scan_folder(str(tmp_path / "packed"), "train", 4)
    assert index.labels == scan_folder(str(tmp_path / "data"), "train", 4).labels


def test_a_damaged_zip_is_refused_and_a_damaged_member_of_one_named(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(b"twotwo", b"owtowt", 1))
    with pytest.raises(BadImage, match="^[^ ]*/a.zip/cat/sub/2.jpg: the member is damaged$"):
        read_image(f"{path}/cat/sub/2.jpg")
    with pytest.raises(BadImage, match="a.zip/y.jpg: no such file"):
        read_image(f"{path}/y.jpg")
    os.truncate(path, len(data) - 30)
    archives.open_archive.cache_clear()
    with pytest.raises(DataError, match=f"a.zip: cannot be .* at its end; unzip -t {path} checks"):
        archives.open_archive(path)


@pytest.mark.parametrize(
    "members, message",
    [
        ([("../out.jpg", {})], "'../out.jpg' is no path inside"),
        ([("/etc/x.jpg", {})], "'/etc/x.jpg' is no path inside"),
        ([("a.jpg", {}), ("./a.jpg", {})], "'./a.jpg' is there twice"),
        (
            [("a.jpg", {"type": tarfile.SYMTYPE, "linkname": "b"})],
            "'a.jpg' is no plain file",
        ),
        ([("a.jpg", {"type": tarfile.LNKTYPE, "linkname": "b"})], "is a link to 'b', which is not"),
        ([("a.jpg", {"type": tarfile.FIFOTYPE})], "'a.jpg' is no plain file"),
        ([("a.jpg", {"type": tarfile.GNUTYPE_SPARSE})], "'a.jpg' is no plain file"),
    ],
)
def test_members_that_cannot_be_used_are_named(tmp_path, members, message):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, fields in members:
            add(tar, name, b"" if fields else b"x", **fields)
    with pytest.raises(DataError, match="a.tar: the member .*" + message.split("'", 1)[1]):
        archives.open_archive(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("name, tool", [("a.tar", "gzip"), ("a.tar.gz", "gzip"), ("b.tgz", "xz")])
def test_a_compressed_tar_says_how_to_convert_it(tmp_path, name, tool):
    path = str(tmp_path / name)
    with tarfile.open(path, "w:" + {"gzip": "gz"}.get(tool, tool)) as tar:
        add(tar, "a.jpg")
    with pytest.raises(DataError, match=f"is compressed.*: {tool} -dc {path} > NEW.tar"):
        archives.read(f"{path}/a.jpg")
    subprocess.run(f"{tool} -dc {path} > {tmp_path}/NEW.tar", shell=True, check=True)
    assert archives.read(f"{tmp_path}/NEW.tar/a.jpg") == b"x"


def test_an_index_goes_to_the_cache_where_the_archive_cannot_have_it_beside(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "a.tar")
    (tmp_path / ".a.tar.index.npz").mkdir()  # cannot be replaced by a file
    assert archives.read(f"{path}/cat/1.jpg") == b"one"
    assert [file.suffix for file in (tmp_path / "cache" / "resmlp").iterdir()] == [".npz"]


def test_a_folder_that_is_called_like_an_archive_is_a_folder(tmp_path):
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "a.jpg").write_bytes(b"a")
    path = str(tmp_path / "x.tar" / "a.jpg")
    assert archives.split(path) is archives.read(path) is None


def packed(files, to, ending):
    """The data set with an archive in the place of each split, and lists that lead into it."""
    to.mkdir()
    for split in ("train", "val"):
        shutil.make_archive(str(to / split), ending, files / split)
    write_lists(files)
    write_lists(files, to, f".{ending}")
    return to


@pytest.mark.parametrize("dataset", ["imagenet2012", "imagefolder"])
@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_a_packed_data_set_gives_the_samples_of_its_files(tmp_path, ending, dataset):
    files = make_data(tmp_path / "files")
    archive = packed(files, tmp_path / "packed", ending)
    for split, count in (("train", 24), ("val", 9)):
        expected = samples(make_config(tmp_path, files, "DATA.DATASET", dataset), split)
        assert len(expected) == count
        found = samples(make_config(tmp_path, archive, "DATA.DATASET", dataset), split)
        assert found == expected


def test_images_of_an_archive_that_is_replaced_in_use_are_not_skipped(tmp_path):
    data = packed(make_data(tmp_path / "files"), tmp_path / "packed", "tar")
    opts = [("DATA.BAD_IMAGE", policy) for policy in ("error", "skip")]
    datasets = [build_dataset(make_config(tmp_path, data, *opt), "train") for opt in opts]
    _another(data / "train.tar")
    for dataset in datasets:
        error = dataset[0, 0, 0].error
        assert error.count("train.tar") == 1 and error.endswith("while it was in use; start again")


def test_the_archives_of_a_list_are_opened_before_workers_are_forked(tmp_path):
    data = make_data(tmp_path / "data")
    subprocess.run("tar -cf a.tar train; tar -cf b.tar val", shell=True, cwd=data, check=True)
    lines = [f"a.tar/train/class_{i}/{i}.png {i}\n" for i in range(3)]
    (data / "train_list.txt").write_text("".join(lines) + "b.tar/val/class_0/0.png 0\n" + lines[0])
    config = make_config(tmp_path, data, "DATA.DATASET", "imagenet2012")
    dataset = build_dataset(config, "train")
    assert archives.open_archive.cache_info().currsize == 2
    assert not any(dataset[0, i, i].error for i in range(5))
    (data / "b.tar").write_bytes(b"no tar")
    archives.open_archive.cache_clear()
    with pytest.raises(DataError, match="b.tar: cannot be read as an archive"):
        build_dataset(config, "train")
