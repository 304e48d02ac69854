"""make_lists: folders and CSV files to list files that the loader reads; leaks and bad images."""

import os
import shutil
import subprocess
import sys
from multiprocessing.process import BaseProcess

import pytest
from PIL import Image

import tools.make_lists as tool
from cli.errors import DataError
from loading.classes import read_class_names
from loading.files import read_list, scan_folder
from tools.make_lists import find_identical, make_lists


def save(path, value):
    """An image of its own for every value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value % 256, value // 256, 7)).save(path)


def make_classes(root, counts, start=0):
    value = start
    for name, count in counts.items():
        for i in range(count):
            save(root / name / f"{i:03d}.png", value)
            value += 1


def run(source, **kwargs):
    lines = []
    return make_lists(str(source), log=lines.append, **kwargs), lines


def listed(root, name, num_classes):
    """What the loader reads from a list: {path: label}."""
    index = read_list(os.path.join(root, name), str(root), num_classes, False)
    return {os.fsdecode(index.name(i)): index.labels[i] for i in range(len(index))}


def test_classes_are_split_each_by_the_share_and_every_image_is_listed_once(tmp_path):
    make_classes(tmp_path, {"b": 40, "a": 20, "c d": 1})
    run(tmp_path, val_fraction=0.25)
    train, val = listed(tmp_path, "train_list.txt", 3), listed(tmp_path, "val_list.txt", 3)
    assert not train.keys() & val.keys()
    assert len(train) + len(val) == 61
    assert [sum(label == k for label in val.values()) for k in range(3)] == [5, 10, 0]
    names = read_class_names(str(tmp_path / "classes.txt"), 3)
    assert names == ["a", "b", "c d"]
    for path, label in {**train, **val}.items():
        assert path.split("/")[0] == names[label]
        assert (tmp_path / path).is_file()


def test_both_sides_get_an_image_of_a_class_that_has_two(tmp_path):
    make_classes(tmp_path, {"a": 2, "b": 2})
    for fraction in (0.01, 0.99):
        split, _ = run(tmp_path, val_fraction=fraction, force=True)
        assert sorted(name for _, name in split.val) == ["a", "b"]
        assert len(split.train) == 2


def test_the_split_hangs_on_the_seed_alone(tmp_path):
    make_classes(tmp_path, {"a": 30, "b": 30})
    first = run(tmp_path, seed=1, force=True)[0]
    assert first == run(tmp_path, seed=1, force=True)[0]
    assert first != run(tmp_path, seed=2, force=True)[0]


def test_train_and_val_folders_are_the_split_with_the_labels_of_imagefolder(tmp_path):
    make_classes(tmp_path / "train", {"ant": 3, "bee": 3, "Cow": 2})
    make_classes(tmp_path / "val", {"ant": 1, "bee": 2}, start=100)
    run(tmp_path)
    for side in ("train", "val"):
        index = scan_folder(str(tmp_path), side, 3)
        expected = {os.fsdecode(index.name(i)): index.labels[i] for i in range(len(index))}
        assert listed(tmp_path, f"{side}_list.txt", 3) == expected
    save(tmp_path / "val/wasp/0.png", 999)
    with pytest.raises(DataError, match="'wasp' is not among"):
        run(tmp_path, force=True)


def test_a_train_folder_alone_is_split(tmp_path):
    make_classes(tmp_path / "train", {"a": 4, "b": 4})
    save(tmp_path / "test/unlabelled/0.png", 99)
    split, _ = run(tmp_path)
    assert split.classes == ["a", "b"]
    assert all(path.startswith("train/") for path, _ in split.train + split.val)


@pytest.mark.parametrize("train,val", [("Train", "Val"), ("train", "valid")])
def test_other_names_of_the_split_are_the_split(tmp_path, train, val):
    make_classes(tmp_path / train, {"a": 3, "b": 3})
    make_classes(tmp_path / val, {"a": 1, "b": 1}, start=100)
    save(tmp_path / "test/a/0.png", 999)
    split, lines = run(tmp_path)
    assert split.classes == ["a", "b"]
    assert [path for path, _ in split.val] == [f"{val}/a/000.png", f"{val}/b/000.png"]
    assert lines[0] == f"{tmp_path}: not used: test/"


def test_trains_among_buses_and_cars_are_a_class(tmp_path):
    make_classes(tmp_path, {"bus": 2, "car": 2, "train": 2})
    assert run(tmp_path)[0].classes == ["bus", "car", "train"]


def test_folders_that_are_numbers_are_ordered_by_value(tmp_path):
    make_classes(tmp_path, {str(i): 2 for i in range(12)})
    assert run(tmp_path)[0].classes == [str(i) for i in range(12)]


def test_an_empty_class_keeps_its_label_and_what_was_passed_over_is_named(tmp_path):
    make_classes(tmp_path, {"a": 2, "c": 2, "__MACOSX": 2})
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.heic").write_bytes(b"?")
    split, lines = run(tmp_path)
    assert split.classes == ["a", "b", "c"]
    assert "1 files are passed over" in lines[0] and ".heic (1)" in lines[0]
    assert lines[1] == "warning: 1 of 3 classes have no image: b"


def test_lists_can_be_written_elsewhere_and_point_to_the_images(tmp_path):
    make_classes(tmp_path / "data", {"a": 3, "b": 3})
    _, lines = run(tmp_path / "data", output=str(tmp_path / "lists"))
    assert sorted(os.listdir(tmp_path / "lists")) == sorted(tool.FILES)
    assert sorted(os.listdir(tmp_path / "data")) == ["a", "b"]
    assert f"DATA.TRAIN_LIST {tmp_path}/lists/train_list.txt" in lines[-1]
    index = read_list(str(tmp_path / "lists/train_list.txt"), str(tmp_path / "data"), 2, False)
    assert all(os.path.isfile(index.path(i)) for i in range(len(index)))


def test_a_csv_file_names_paths_and_labels(tmp_path):
    for i in range(6):
        save(tmp_path / f"img/{i}, x.png", i)
    rows = [f'"img/{i}, x.png", {"dog" if i % 2 else "cat"}' for i in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows, ""]))
    split, _ = run(tmp_path / "labels.csv", val_fraction=0.3)
    assert split.classes == ["cat", "dog"]
    both = {**listed(tmp_path, "train_list.txt", 2), **listed(tmp_path, "val_list.txt", 2)}
    assert both == {f"img/{i}, x.png": i % 2 for i in range(6)}


def test_whole_numbers_of_a_csv_are_ordered_by_value(tmp_path):
    for i in range(11):
        save(tmp_path / f"{i}.png", i)
    (tmp_path / "labels.csv").write_text("".join(f"{i}.png,{i}\n" for i in range(11)))
    run(tmp_path / "labels.csv")
    assert listed(tmp_path, "train_list.txt", 11) == {f"{i}.png": i for i in range(11)}


def test_labels_that_only_look_like_numbers_are_names(tmp_path):
    save(tmp_path / "a.png", 1), save(tmp_path / "b.png", 2)
    (tmp_path / "labels.csv").write_text("a.png,²\nb.png,10\n", encoding="utf-8")
    assert run(tmp_path / "labels.csv")[0].classes == ["10", "²"]


def test_lists_without_an_image_to_validate_on_are_pointed_out(tmp_path):
    make_classes(tmp_path, {"a": 1, "b": 1})
    assert "warning: val_list.txt is not written" in run(tmp_path)[1][1]


@pytest.mark.parametrize(
    "text,expected",
    [
        ("a.png,1\n./b.png,01\n", "the labels '01' and '1' are one number"),
        (b"a.png,x\nb.png,caf\xe9\n", "caf.*not a class name that fits on a line"),
        ("a.png,x\nb.png,\x1b[2J\n", "not a class name that fits on a line"),
        ("a.png,x\nb.png\n", "labels.csv:2: expected path,label"),
        ("a.png,x\n\nb.png,x,y\n", "labels.csv:3: expected path,label"),
        ("a.png,x\nnone.png,y\n", "labels.csv:2: .*none.png: no such file"),
        ("a.png,x\n../a.png,y\n", "labels.csv:2: '../a.png' is not inside"),
        ("a.png,x\n./a.png,y\n", "'a.png' is listed more than once"),
        ("a.png,x\na\0.png,y\n", "labels.csv: .*path,label in UTF-8"),
        ("a.png,x\n", "found 1 classes"),
        ("", "found 0 classes"),
    ],
)
def test_mistakes_in_a_csv_are_named(tmp_path, text, expected):
    save(tmp_path / "a.png", 1), save(tmp_path / "b.png", 2)
    (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=expected):
        run(tmp_path / "labels.csv")


@pytest.mark.parametrize("name", ["none", "none.csv"])
def test_a_source_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(DataError, match="none.*no such file"):
        run(tmp_path / name)


def test_paths_that_look_like_comments_survive_the_list(tmp_path):
    make_classes(tmp_path, {"#1": 2, "b": 2})
    run(tmp_path)
    paths = {**listed(tmp_path, "train_list.txt", 2), **listed(tmp_path, "val_list.txt", 2)}
    assert sorted(paths.values()) == [0, 0, 1, 1]
    assert all((tmp_path / path).is_file() for path in paths)


def test_names_that_a_list_cannot_express_are_refused(tmp_path):
    make_classes(tmp_path, {"a": 2, "b\nc": 2})
    with pytest.raises(DataError, match="line breaks"):
        run(tmp_path)


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\rb"])
def test_class_folders_that_training_would_refuse_are_refused(tmp_path, name):
    make_classes(tmp_path, {"a": 2, "b": 2})
    os.rename(tmp_path / "b", os.fsencode(tmp_path) + b"/" + name)
    with pytest.raises(DataError, match="class name is UTF-8 text"):
        run(tmp_path)


def test_a_pipe_among_the_images_is_named_and_a_pipe_of_labels_too(tmp_path):
    make_classes(tmp_path, {"a": 2, "b": 2})
    os.mkfifo(tmp_path / "a/pipe.png")
    for source in (tmp_path, tmp_path / "a/pipe.png"):
        with pytest.raises(DataError, match="a/pipe.png: not a regular file"):
            run(source)


# ------------------------------------------------------------------------------------ leaks
def test_the_same_content_in_train_and_val_is_refused_and_named(tmp_path):
    make_classes(tmp_path / "train", {"a": 3, "b": 3})
    make_classes(tmp_path / "val", {"a": 2, "b": 2}, start=100)
    (tmp_path / "val/b/copy.png").write_bytes((tmp_path / "train/a/001.png").read_bytes())
    with pytest.raises(DataError, match="train/a/001.png and val/b/copy.png are the same"):
        run(tmp_path)
    assert not (tmp_path / "train_list.txt").exists()


def test_every_leak_is_named(tmp_path):
    make_classes(tmp_path / "train", {"a": 3, "b": 3})
    (tmp_path / "val").mkdir()
    shutil.copytree(tmp_path / "train/a", tmp_path / "val/a")
    lines = []
    with pytest.raises(DataError, match="2 more are in both"):
        make_lists(str(tmp_path), log=lines.append)
    leaks = [f"in both train and val: train/a/{i:03d}.png, val/a/{i:03d}.png" for i in range(3)]
    assert [line for line in lines if line.startswith("in both")] == leaks


def test_one_picture_under_several_labels_is_named_with_them(tmp_path):
    make_classes(tmp_path, {"a": 3, "b": 3})
    save(tmp_path / "a/x.png", 99), save(tmp_path / "b/y.png", 99)
    assert "warning: one picture under several labels: a/x.png (a), b/y.png (b)" in run(tmp_path)[1]


def test_copies_within_one_side_are_no_leak(tmp_path):
    make_classes(tmp_path / "train", {"a": 3, "b": 3})
    make_classes(tmp_path / "val", {"a": 2, "b": 2}, start=100)
    (tmp_path / "train/b/copy.png").write_bytes((tmp_path / "train/a/001.png").read_bytes())
    assert len(run(tmp_path)[0].train) == 7


@pytest.mark.parametrize("seed", range(5))
def test_a_split_keeps_identical_files_on_one_side(tmp_path, seed):
    make_classes(tmp_path, {"a": 4, "b": 4})
    for name in ("a", "b"):
        for i in range(4):
            data = (tmp_path / "a" / f"{i:03d}.png").read_bytes()
            (tmp_path / name / f"copy{i}.png").write_bytes(data)
    split, lines = run(tmp_path, val_fraction=0.5, seed=seed)
    sides = [{(tmp_path / path).read_bytes() for path, _ in s} for s in (split.train, split.val)]
    assert not sides[0] & sides[1]
    assert len(split.train) + len(split.val) == 16
    assert "4 groups of identical files" in lines[0]


def test_identical_files_are_found_by_their_whole_content(tmp_path):
    start = bytes(5000)
    contents = {
        "a": start + b"1",
        "b": start + b"2",
        "c": start + b"1",
        "d": b"1" + start,
        "e": b"",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    assert find_identical(str(tmp_path), list(contents)) == [["a", "c"]]


# ----------------------------------------------------------------------- checking, writing
def test_verify_lists_every_bad_image_and_writes_nothing(tmp_path):
    make_classes(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "a/003.png").write_bytes(b"no image")
    os.truncate(tmp_path / "b/004.png", 50)
    lines = []
    with pytest.raises(DataError, match="2 of 20 images cannot be decoded"):
        make_lists(str(tmp_path), verify=True, workers=2, log=lines.append)
    assert sorted(os.path.relpath(line.split(":")[0], tmp_path) for line in lines) == [
        "a/003.png",
        "b/004.png",
    ]
    assert not (tmp_path / "train_list.txt").exists()


def test_verify_keeps_to_the_cores_of_the_process(tmp_path, monkeypatch):
    make_classes(tmp_path, {"a": 30, "b": 30})  # in pieces of 16 for each process that is free
    started, start, cores = [], BaseProcess.start, os.sched_getaffinity(0)

    def remember(process):
        started.append(process)
        start(process)

    monkeypatch.setattr(BaseProcess, "start", remember)
    os.sched_setaffinity(0, [min(cores)])
    try:
        run(tmp_path, verify=True)
    finally:
        os.sched_setaffinity(0, cores)
    assert len(started) == 1


def test_verify_checks_lists_that_are_there_and_changes_nothing(tmp_path):
    make_classes(tmp_path, {"a": 3, "b": 3})
    _, lines = run(tmp_path, verify=True, workers=1)
    assert lines[0] == "all 6 images can be decoded"
    before = (tmp_path / "train_list.txt").read_bytes()
    make_classes(tmp_path, {"c": 3}, start=50)  # not in the lists
    assert run(tmp_path, verify=True, workers=1)[1] == ["all 6 images can be decoded"]
    os.remove(tmp_path / before.split()[0].decode())
    with pytest.raises(DataError, match="1 of 6"):
        run(tmp_path, verify=True, workers=1)
    assert (tmp_path / "train_list.txt").read_bytes() == before


def test_lists_are_replaced_only_by_force(tmp_path):
    make_classes(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "classes.txt").write_text("mine\n")
    with pytest.raises(DataError, match="classes.txt is there already; -force"):
        run(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "classes.txt"]
    run(tmp_path, force=True)
    assert (tmp_path / "classes.txt").read_text() == "a\nb\n"


def test_a_write_that_fails_leaves_the_old_lists_whole(tmp_path, monkeypatch):
    make_classes(tmp_path, {"a": 3, "b": 3})
    run(tmp_path)
    before = (tmp_path / "train_list.txt").read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool.os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        run(tmp_path, seed=5, force=True)
    assert (tmp_path / "train_list.txt").read_bytes() == before


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"workers": 0}, {"workers": -3}])
def test_an_impossible_number_is_refused_with_its_flag(tmp_path, wrong):
    make_classes(tmp_path, {"a": 2, "b": 2})
    ((flag, value),) = wrong.items()
    with pytest.raises(DataError, match=f"-{flag} is {value}; give a number from"):
        run(tmp_path, verify=True, **wrong)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_an_impossible_share_is_refused(tmp_path, fraction):
    with pytest.raises(DataError, match="val_fraction"):
        run(tmp_path, val_fraction=fraction)


def test_the_script_takes_flags_with_one_dash_or_two_and_tells_how_to_go_on(tmp_path):
    make_classes(tmp_path, {"a": 5, "b": 5})
    script = os.path.abspath(tool.__file__)

    def call(*flags):
        command = [sys.executable, script, str(tmp_path), *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd="/")

    result = call("-val_fraction", "0.4", "--seed", "3", "-verify")
    assert result.returncode == 0, result.stderr
    assert f"-data_path {tmp_path} -opts MODEL.NUM_CLASSES 2" in result.stdout
    assert len(listed(tmp_path, "val_list.txt", 2)) == 4
    result = call()
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "-force" in result.stderr
