"""make_lists: folders and CSV files to list files that the loader reads; leaks and bad images."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from unittest import mock

import pytest
from PIL import Image

import tools.make_lists as tool
from cli.errors import DataError, UserError
from loading.classes import read_class_names
from loading.files import read_list, scan_folder
from tools.make_lists import contents, make_lists

from .helpers.runs import ROOT
from .helpers.tiny_data import entries


def save(path, value):
    """An image of its own for every value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value % 256, value // 256, 7)).save(path)


def make_classes(root, counts, start=0):
    for name, count in counts.items():
        for i in range(count):
            save(root / name / f"{i:03d}.png", start + i)
        start += count


def run(source, **kwargs):
    """The classes, each side's paths and classes, and the lines that are printed."""
    with redirect_stdout(io.StringIO()) as printed:
        classes, entries = make_lists(str(source), **kwargs)
    sides = {s: [(p, n) for p, n, side in entries if side == s] for s in ("train", "val")}
    return classes, sides, printed.getvalue().splitlines()


def listed(root, name, num_classes=2):
    """What the loader reads from a list: {path: label}."""
    return entries(read_list(os.path.join(root, name), str(root), num_classes, False))


def test_classes_are_drawn_by_the_share_and_every_image_is_listed_once(tmp_path):
    make_classes(tmp_path, {"b": 400, "#a": 200, "c d": 1})  # "#" would begin a comment
    run(tmp_path, val_fraction=0.25)
    train, val = (listed(tmp_path, f"{side}_list.txt", 3) for side in ("train", "val"))
    assert not train.keys() & val.keys() and len(train) + len(val) == 601
    counts = [sum(label == k for label in val.values()) for k in range(3)]
    assert 35 < counts[0] < 65 and 75 < counts[1] < 125 and counts[2] == 0
    names = read_class_names(str(tmp_path / "classes.txt"), 3)
    assert names == ["#a", "b", "c d"]
    for path, label in {**train, **val}.items():
        assert path.removeprefix("./").split("/")[0] == names[label]
        assert (tmp_path / path).is_file()


def test_both_sides_get_an_image_of_a_class_that_has_two(tmp_path):
    make_classes(tmp_path, {"a": 1, "b": 1})
    assert "warning: val_list.txt is not written" in run(tmp_path)[-1][1]
    make_classes(tmp_path, {"a": 2, "b": 2})
    for fraction in (0.01, 0.99):
        _, sides, _ = run(tmp_path, val_fraction=fraction, force=True)
        assert sorted(name for _, name in sides["val"]) == ["a", "b"]
        assert len(sides["train"]) == 2


def test_the_split_hangs_on_the_seed_and_moved_images_are_said(tmp_path):
    make_classes(tmp_path, {"a": 30, "b": 30})
    first = run(tmp_path, seed=1)
    assert first == run(tmp_path, seed=1, force=True)
    _, other, lines = run(tmp_path, seed=2, force=True)
    moved = len(set(first[1]["val"]) ^ set(other["val"]))
    assert moved and f"warning: {moved} images were on the other side in the lists" in lines[0]


@pytest.mark.parametrize("count", [2, 3, 60])  # of small classes, one image had to be moved
@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_images_stay_on_their_side_when_others_come_go_and_are_renamed(tmp_path, count, fraction):
    make_classes(tmp_path, {"b": count, "c": count})
    _, sides, _ = run(tmp_path, val_fraction=fraction)
    train, val = ({(tmp_path / p).read_bytes() for p, _ in x} for x in sides.values())
    make_classes(tmp_path, {"a": 5}, 500)
    for i in range(40):
        save(tmp_path / f"b/x{i}.png", 1000 + i)
    shutil.copy(tmp_path / "b/000.png", tmp_path / "b/0.png")  # identical
    if count > 3:
        (tmp_path / "c/000.png").unlink()
        os.rename(tmp_path / "c/001.png", tmp_path / "c/renamed.png")
        os.rename(tmp_path / "c/002.png", tmp_path / "b/relabelled.png")
    _, sides, lines = run(tmp_path, val_fraction=fraction, force=True)
    now_train, now_val = ({(tmp_path / p).read_bytes() for p, _ in x} for x in sides.values())
    assert not now_val & train and not now_train & val
    assert not any("other side" in line for line in lines)


def test_train_and_val_folders_are_the_split_with_the_labels_of_imagefolder(tmp_path):
    make_classes(tmp_path / "train", {"ant": 3, "bee": 3, "Cow": 2})
    make_classes(tmp_path / "val", {"ant": 1, "bee": 2}, start=100)
    shutil.copy(tmp_path / "train/ant/001.png", tmp_path / "train/bee/copy.png")  # no leak
    copies = "train/ant/001.png (ant), train/bee/copy.png (bee)"
    assert f"warning: one picture under several labels: {copies}" in run(tmp_path)[-1]
    for side in ("train", "val"):
        expected = entries(scan_folder(str(tmp_path), side, 3))
        assert listed(tmp_path, f"{side}_list.txt", 3) == expected
    save(tmp_path / "val/wasp/0.png", 999)
    with pytest.raises(DataError, match="'wasp' is not among"):
        run(tmp_path, force=True)


def test_a_train_folder_alone_is_split(tmp_path):
    make_classes(tmp_path / "Training", {"a": 4, "b": 4})
    save(tmp_path / "test/unlabelled/0.png", 99)
    classes, sides, lines = run(tmp_path)
    assert classes == ["a", "b"] and lines[0] == f"{tmp_path}: not used: test/"
    assert all(path.startswith("Training/") for path, _ in sides["train"] + sides["val"])


@pytest.mark.parametrize(
    "names", [["bus", "car", "train"], [str(i) for i in range(12)], ["10", "²"]]
)
def test_trains_among_buses_are_a_class_and_numbers_are_ordered_by_value(tmp_path, names):
    make_classes(tmp_path, dict.fromkeys(names, 2))
    assert run(tmp_path)[0] == run(write_csv(tmp_path / "csv", names))[0] == names


def test_an_empty_class_keeps_its_label_and_what_was_passed_over_is_named(tmp_path):
    make_classes(tmp_path, {"a": 2, "c": 2, "__MACOSX": 2, "output/train-1": 1})
    (tmp_path / "output/train-1/config.yaml").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.heic").write_bytes(b"?")
    classes, _, lines = run(tmp_path)
    assert classes == ["a", "b", "c"]
    assert "1 files are passed over" in lines[0] and ".heic (1)" in lines[0]
    assert lines[1] == f"{tmp_path}: not used: output/"
    assert lines[2] == "warning: 1 of 3 classes have no image: b"


def test_lists_can_be_written_elsewhere_and_point_to_the_images(tmp_path):
    make_classes(tmp_path / "data", {"a": 3, "b": 3})
    lines = run(tmp_path / "data", output=str(tmp_path / "lists"))[-1]
    assert sorted(os.listdir(tmp_path / "lists")) == sorted(tool.FILES)
    assert sorted(os.listdir(tmp_path / "data")) == ["a", "b"]
    assert f"DATA.TRAIN_LIST {tmp_path}/lists/train_list.txt" in lines[-1]
    index = read_list(str(tmp_path / "lists/train_list.txt"), str(tmp_path / "data"), 2, False)
    assert all(os.path.isfile(index.path(i)) for i in range(len(index)))


# -------------------------------------------------------------------------------------- CSV
def write_csv(root, labels):
    """A CSV file of an image for each label."""
    for i, _ in enumerate(labels):
        save(root / f"{i}.png", i)
    rows = "".join(f'{i}.png,"{label}"\n' for i, label in enumerate(labels))
    (root / "labels.csv").write_text(rows, encoding="utf-8")
    return root / "labels.csv"


@pytest.mark.parametrize("header", ["path,label", "image_path,label", "a,b,c"])
def test_a_csv_file_names_paths_and_labels_under_any_header(tmp_path, header):
    for i in range(6):
        save(tmp_path / f"img/{i}, x.png", i)
    rows = [f'"img/{i}, x.png", {"dog" if i % 2 else "cat"}' for i in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join([header, *rows, ""]))
    classes, _, lines = run(tmp_path / "labels.csv", val_fraction=0.3)
    assert classes == ["cat", "dog"]
    both = {**listed(tmp_path, "train_list.txt"), **listed(tmp_path, "val_list.txt")}
    assert both == {f"img/{i}, x.png": i % 2 for i in range(6)}
    assert lines[0] == f"{tmp_path}/labels.csv:1: taken for a header: {header}"


@pytest.mark.parametrize(
    "labels,expected",
    [
        (["Cat", "cat", "dog"], "warning: 2 classes are called almost alike: 'Cat', 'cat'"),
        (["caf\u00e9", "cafe\u0301"], r"warning: 2 .* alike: 'cafe\\u0301', 'caf\\xe9'"),
        (["a", "nan", "b", "NULL"], "warning: .*:2: the label 'nan' is a class"),
        (["golden retriever", "golden eagle", "eagle"], None),
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], None),
        (["scab", "rust", "scab rust"], DataError),
        (["scab", "rust", "scab,rust"], DataError),
        (["x", "0 3 5"], DataError),
    ],
)
def test_labels_that_are_several_or_none_or_alike_are_said(tmp_path, labels, expected):
    file = write_csv(tmp_path, labels)
    if expected is DataError:
        with pytest.raises(DataError, match=f":{len(labels)}: .* is several labels of one image"):
            run(file)
        return
    classes, _, lines = run(file)
    assert len(classes) == len(labels)
    warnings = [line for line in lines if "class" in line and "warning" in line]
    assert any(re.match(expected, line) for line in warnings) if expected else not warnings


@pytest.mark.parametrize(
    "text,expected",
    [
        ("a.png,1\n./b.png,01\n", "the labels '01' and '1' are one number"),
        (b"a.png,x\nb.png,caf\xe9\n", "caf.*not a class name that fits on a line"),
        ("a.png,x\nb.png,\x1b[2J\n", "not a class name that fits on a line"),
        ("a.png,x\nb.png\n", "labels.csv:2: expected path,label"),
        ("a.png,x\n\nb.png,x,y\n", "labels.csv:3: expected path,label"),
        ("a.png,x\nnone.png,y\n", "labels.csv:2: .*none.png: no such file"),
        ("none.png,y\na.png,x\n", "labels.csv:1: .*none.png: no such file"),
        ("id,y\nnone,y\na.png,x\n", "labels.csv:2: .*none: no such file"),
        ("a.png,x\n../a.png,y\n", "labels.csv:2: '../a.png' is not inside"),
        ("a.png,x\n./a.png,y\n", "'a.png' is listed more than once"),
        ("a.png,x\na\0.png,y\n", "labels.csv"),
        ("a.png,x\n", "found 1 classes"),
        ("", "found 0 classes"),
    ],
)
def test_mistakes_in_a_csv_are_named(tmp_path, text, expected):
    save(tmp_path / "a.png", 1), save(tmp_path / "b.png", 2)
    (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=expected):
        run(tmp_path / "labels.csv")


def test_a_source_that_is_not_there_and_a_pipe_as_an_image_or_file_are_named(tmp_path):
    make_classes(tmp_path, {"a": 2, "b": 2})
    os.mkfifo(tmp_path / "a/pipe.png")
    pipe, none = "a/pipe.png: not a regular file", "none.*: no such file"
    for name, message in (("", pipe), ("a/pipe.png", pipe), ("none", none), ("none.csv", none)):
        with pytest.raises(DataError, match=message):
            run(tmp_path / name)


# ------------------------------------------------------------------------------------ leaks
def test_every_picture_on_both_sides_is_named_and_refused(tmp_path, capsys):
    make_classes(tmp_path / "train", {"a": 3, "b": 3})
    save(tmp_path / "val/b/0.png", 100)
    shutil.copytree(tmp_path / "train/a", tmp_path / "val/a")
    said = "train/a/000.png and val/a/000.png are the same image, and 2 more are in both"
    with pytest.raises(DataError, match=said):
        make_lists(str(tmp_path))
    leaks = [f"in both train and val: train/a/{i:03d}.png, val/a/{i:03d}.png" for i in range(3)]
    assert capsys.readouterr().out.splitlines()[1:] == leaks
    assert not (tmp_path / "train_list.txt").exists()


def test_lists_that_are_there_are_checked_for_repeats_leaks_and_contradictions(tmp_path):
    make_classes(tmp_path, {"a": 4, "b": 3})
    shutil.copy(tmp_path / "b/000.png", tmp_path / "b/copy.png")
    (tmp_path / "train_list.txt").write_text("a/000.png 0\n./a//000.png 0\na/001.png 0\n")
    (tmp_path / "val_list.txt").write_text("a/003.png 0\nb/000.png 1\nb/copy.png 0\n")
    before = [(tmp_path / name).read_bytes() for name in tool.FILES[:2]]
    assert run(tmp_path, verify=True, workers=1)[-1] == [  # of the eight images only these
        "all 5 images can be decoded",
        "1 group of identical files (such as b/000.png and b/copy.png)",
        "warning: 1 images are listed more than once: a/000.png in train",
        "warning: one picture under several labels: b/000.png (1), b/copy.png (0)",
    ]
    assert before == [(tmp_path / name).read_bytes() for name in tool.FILES[:2]]
    (tmp_path / "val_list.txt").write_text("a/002.png 0\n")
    (tmp_path / "a/002.png").unlink()
    with pytest.raises(DataError, match="1 of 3 images cannot be decoded"):
        run(tmp_path, verify=True, workers=1)
    (tmp_path / "val_list.txt").write_text("a/000.png 1\n")
    with pytest.raises(DataError, match="a/000.png is in both, and 0 more are in both train"):
        run(tmp_path, verify=True, workers=1)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_keeps_identical_files_on_one_side(tmp_path, seed):
    make_classes(tmp_path, {"a": 4, "b": 4})
    for name in ("a", "b"):
        for i in range(4):
            shutil.copy(tmp_path / "a" / f"{i:03d}.png", tmp_path / name / f"copy{i}.png")
    _, split, lines = run(tmp_path, val_fraction=0.5, seed=seed)
    train, val = ([(tmp_path / path).read_bytes() for path, _ in x] for x in split.values())
    assert not set(train) & set(val) and len(train + val) == 16
    assert "4 groups of identical files" in lines[0]


def test_contents_are_told_apart_by_the_whole_file_and_drawn_by_a_part(tmp_path):
    start = bytes(50_000)
    files = {"a": start + b"1", "b": start + b"2", "c": start + b"1", "d": b"1" + start, "e": b""}
    files["f"] = start[:20_000] + b"1" + start[20_000:]  # between the places that are looked at
    files["g"] = start[:20_000] + b"2" + start[20_000:]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = contents(str(tmp_path), list(files))
    assert found["a"] == found["c"] and len(set(found.values())) == 6
    assert found["f"][:16] == found["g"][:16] and len({key[:16] for key in found.values()}) == 5


# ----------------------------------------------------------------------- checking, writing
def test_verify_lists_every_bad_image_and_writes_nothing(tmp_path, capsys):
    make_classes(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "a/003.png").write_bytes(b"no image")
    os.truncate(tmp_path / "b/004.png", 50)
    with pytest.raises(DataError, match="2 of 20 images cannot be decoded"):
        make_lists(str(tmp_path), verify=True, workers=2)
    said = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"{tmp_path}/a/003.png", f"{tmp_path}/b/004.png"]
    assert not (tmp_path / "train_list.txt").exists()


def test_lists_are_replaced_only_by_force_and_whole(tmp_path, monkeypatch):
    make_classes(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "classes.txt").write_text("mine\n")
    with pytest.raises(DataError, match="classes.txt is there already; -force"):
        run(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "classes.txt"]
    run(tmp_path, force=True)
    assert (tmp_path / "classes.txt").read_text() == "a\nb\n"
    before = (tmp_path / "train_list.txt").read_bytes()
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(tool.os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        run(tmp_path, val_fraction=0.6, force=True)
    assert (tmp_path / "train_list.txt").read_bytes() == before


@pytest.mark.parametrize("flag, value", [("workers", 0), ("val_fraction", 1.0)])
def test_an_impossible_number_is_refused_with_its_flag(tmp_path, flag, value):
    make_classes(tmp_path, {"a": 2, "b": 2})
    with pytest.raises(UserError, match=f"-{flag} is {value}; give a "):
        run(tmp_path, verify=True, **{flag: value})


def test_the_script_tells_the_whole_next_command(tmp_path):
    make_classes(tmp_path / "my photos", {"a": 5, "b": 5})

    def call(*flags):
        words = [sys.executable, "-OO", os.path.abspath(tool.__file__), "my photos", *flags]
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)

    result = call("-val_fraction", "0.4", "--seed", "3", "-verify")
    assert result.returncode == 0, result.stderr
    line = result.stdout.splitlines()[-1]
    words = shlex.split(line.partition("use them with: ")[2])
    assert words == [
        *("python", f"{ROOT}/main_single_gpu.py", f"-cfg={ROOT}/configs/resmlp_finetune.yaml"),
        *("-data_path=my photos", "-pretrained=resmlp_12_224", "-output=output/my photos"),
    ]
    result = call()
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "-force" in result.stderr
