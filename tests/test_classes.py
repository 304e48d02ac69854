"""Class names: where they come from, and what is done where two sets of them meet."""

import json
import os
import unicodedata

import paddle
import pytest

from cli.errors import DataError
from config import get_config
from datasets import build_dataset
from loading.classes import UNKNOWN, ClassNames, data_classes, with_num_classes
from loading.imagenet import wordnet_ids
from resmlp import build_resmlp
from storage.weights import read_weights, write_weights

from .helpers.tiny_data import entries, make_tree

NFC, NFD = (unicodedata.normalize(form, "caf\xe9") for form in ("NFC", "NFD"))


def named(*names, source="here", folders=()):
    return ClassNames(names, source, folders)


def make_lists(root, *classes):
    """List files over a tree, with the labels and names of these classes."""
    for split in ("train", "val"):
        lines = [f"{split}/{name}/0.png {label}\n" for label, name in enumerate(classes)]
        (root / f"{split}_list.txt").write_text("".join(lines))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))


def make_config(root, num_classes=2, evaluate=False, **data):
    config = get_config()
    config.MODEL.NUM_CLASSES, config.EVAL = num_classes, evaluate
    config.DATA.update({"DATA_PATH": str(root), **data})
    return config


def folders_config(root, num_classes=2, evaluate=False, **data):
    return make_config(root, num_classes, evaluate, DATASET="imagefolder", **data)


# ------------------------------------------------------------------------- where two sets meet
@pytest.mark.parametrize(
    "one,other,labels",
    [
        (named("a", "b"), named("a", "b"), None),
        (named("a", "b"), UNKNOWN, None),
        (UNKNOWN, named("a", "b"), None),
        (named("a", "b"), named("b", "a"), [1, 0]),
        (named(NFC, "b"), named("b", NFD), [1, 0]),
        (named("10", "2"), named("2", "10"), [1, 0]),
        (named("A", "B", folders=("a", "b")), named("X", "Y", folders=("b", "a")), [1, 0]),
        (named("A", "B", folders=("a", "b")), named("b", "a"), [1, 0]),
        (named("b", "a"), named("A", "B", folders=("a", "b")), [1, 0]),
        (named("A", "B", folders=("a", "b")), named("A", "B"), None),
        (named("x", "x", "y"), named("x", "x", "y"), None),
        (named(*(f"for people {label}" for label in range(1000))), named(*wordnet_ids()), None),
    ],
)
def test_labels_of_equal_names_are_mapped(one, other, labels):
    found, line = one.labels_in(other)
    assert found == labels and bool(line) == (labels is not None)


@pytest.mark.parametrize(
    "mine,theirs,shown",
    [
        (["a", "x"], ["a", "b"], "1 of 2 classes .* such as 'x' .label 1.; label 1 there is 'b'$"),
        (["a", "b"], ["a", "b", "c"], "1 classes of there are missing, such as 'c' .label 2 there"),
        (["a", "b", "c"], ["a", "b"], "1 of 3 classes are not among .* 'c' .label 2.; label 0 the"),
        (["a", "a", "b"], ["a", "b", "b"], "'a' is the name of two classes"),
        (["pe\u200bar"], ["x", "pear"], r"such as 'pe\\u200bar' .*; label 1 there is 'pear'$"),
        (["\x1b[2J"], ["a"], r"such as '.{1,2}x1b\[2J'"),
    ],
)
def test_other_names_are_refused_by_their_first_difference(mine, theirs, shown):
    with pytest.raises(DataError, match=shown) as caught:
        named(*mine).labels_in(named(*theirs, source="there"))
    assert "\n" not in str(caught.value)


def test_some_of_the_classes_are_a_subset_where_that_is_allowed():
    theirs = named("a", "b", "c")
    assert named("b", "c").labels_in(theirs, subset=True) == ([1, 2], "")
    labels, line = named("c", "a").labels_in(theirs, subset=True)
    assert labels == [2, 0] and "another order than in here (label 0 is 'c', not 'a')" in line
    with pytest.raises(DataError, match="'x'; label 0 there is 'a'"):
        named("x").labels_in(theirs, subset=True)


# ------------------------------------------------------------------------------- kept in files
def test_a_record_of_names_comes_back_and_what_is_none_is_unknown():
    for folders in ((), ("a", NFD)):
        classes = named("Ant", "Biene \U0001f41d", folders=folders)
        for record in (classes.record(), json.dumps(classes.record())):
            assert ClassNames.of_record(record, "here") == classes
    none = [None, 3, [], {}, {"names": "ab"}, {"names": [1]}, {"names": ["a"], "folders": 1}, "["]
    assert not any(ClassNames.of_record(record, "x") for record in none)


@pytest.mark.parametrize("name", ["w.pdparams", "w.safetensors"])
def test_weight_files_carry_class_names_beside_the_published_parameters(tmp_path, name):
    config, classes = get_config(), named("cat", NFD, folders=("c", "d"))
    config.DATA.IMAGE_SIZE, config.MODEL.NUM_CLASSES = 16, 2
    config.MODEL.MIXER.PATCH_SIZE, config.MODEL.MIXER.EMBED_DIM, config.MODEL.MIXER.DEPTH = 8, 4, 1
    model = build_resmlp(config)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    write_weights(state, tmp_path / name, classes)
    found = read_weights(tmp_path / name)
    assert found.classes == named(*classes.names, source=str(tmp_path / name), folders=("c", "d"))
    assert found.state.keys() == state.keys()
    if name.endswith(".pdparams"):
        loaded = paddle.load(str(tmp_path / name))
        assert loaded.keys() == state.keys()
        assert model.set_state_dict(loaded) == ([], [])


def test_a_file_of_names_beside_weights_counts_where_it_has_as_many(tmp_path):
    write_weights({"head.bias": paddle.zeros([2]).numpy()}, tmp_path / "w.pdparams")
    assert not read_weights(tmp_path / "w").classes
    for text, count in (("a\nb\n", 2), ("a\nb\nc\n", 0)):
        (tmp_path / "classes.txt").write_text(text)
        assert len(read_weights(tmp_path / "w").classes) == count


# ---------------------------------------------------------------------------- of a data folder
def test_class_names_come_from_the_key_then_the_file_then_the_folders(tmp_path):
    make_tree(tmp_path)
    assert not data_classes(make_config(tmp_path))
    assert data_classes(folders_config(tmp_path)).names == ("ant", "bee")
    (tmp_path / "classes.txt").write_text("red ant\nhoney bee\n")
    found = data_classes(folders_config(tmp_path))
    assert (found.names, found.folders) == (("red ant", "honey bee"), ("ant", "bee"))
    (tmp_path / "mine.txt").write_text("a\r\nb")
    found = data_classes(make_config(tmp_path, CLASS_NAMES=str(tmp_path / "mine.txt")))
    assert found.names == ("a", "b")
    assert not data_classes(folders_config(tmp_path / "none"))


@pytest.mark.parametrize(
    "content,message",
    [
        (b"one\ntwo\nthree\n", "3 names but MODEL.NUM_CLASSES is 2"),
        (b"\xff\xfe\n", "one class name a line"),
        (b"", "txt:1: no name"),
        (b"ant\n\nbee\n", "txt:2: no name"),
        (None, "not a regular file"),
    ],
)
def test_a_file_of_class_names_that_does_not_fit_is_refused(tmp_path, content, message):
    if content is None:
        (tmp_path / "classes.txt").mkdir()
    else:
        (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=f"classes.txt.*{message}|classes.{message}"):
        data_classes(make_config(tmp_path))


def test_classes_are_counted_by_weights_names_folders_and_labels(tmp_path):
    def count(weights=UNKNOWN, **data):
        config = make_config(tmp_path, "auto", **data)
        counted = with_num_classes(config, weights)
        assert counted.is_frozen() and config.MODEL.NUM_CLASSES == "auto"
        return counted.MODEL.NUM_CLASSES

    make_tree(tmp_path)
    assert count(DATASET="imagefolder") == 2
    (tmp_path / "val_list.txt").write_text("val/a.jpg 6\n")
    assert count() == 7  # evaluation without a training list
    (tmp_path / "train_list.txt").write_text("train/a.jpg 0\ntrain/b.jpg 4\n")
    assert count() == 5
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\nf\n")
    assert count() == count(DATASET="imagefolder") == 6
    (tmp_path / "mine.txt").write_text("a\nb\nc")
    assert count(CLASS_NAMES=str(tmp_path / "mine.txt")) == 3
    with pytest.raises(DataError, match="no such data folder.*NUM_CLASSES auto"):
        count(DATA_PATH=str(tmp_path / "none"))
    assert count(named("a", "b"), DATA_PATH=str(tmp_path / "none")) == 2
    config = make_config(tmp_path / "none")
    assert with_num_classes(config) is config


# ---------------------------------------------------------------------- of data beside weights
@pytest.mark.parametrize("evaluate", [False, True])
def test_labels_of_lists_and_folders_become_those_of_the_weights(tmp_path, evaluate):
    make_tree(tmp_path, ("2", "10"))
    weights = named("10", "2", source="old run")
    dataset = build_dataset(folders_config(tmp_path, 2, evaluate), "val", weights)
    names = [dataset.files.name(i) for i in range(2)]
    assert names == [b"val/10/0.png", b"val/2/0.png"] and list(dataset.files.labels) == [0, 1]
    make_lists(tmp_path, "2", "10")
    dataset = build_dataset(make_config(tmp_path, 2, evaluate), "val", weights)
    assert list(dataset.files.labels) == [1, 0] and dataset.classes.names == ("10", "2")
    assert any("another order than in old run" in n for n in dataset.files.notes) == evaluate


def test_lists_without_names_have_those_of_the_weights(tmp_path):
    make_tree(tmp_path)
    make_lists(tmp_path, "ant", "bee")
    (tmp_path / "classes.txt").unlink()
    for count, names in ((2, ("ant", "bee")), (3, ())):
        dataset = build_dataset(make_config(tmp_path, count), "val", named("ant", "bee"))
        assert dataset.classes.names == names


@pytest.mark.parametrize("kind", [make_config, folders_config])
@pytest.mark.parametrize("evaluate", [False, True])
def test_data_of_other_classes_than_the_weights_are_refused(tmp_path, kind, evaluate):
    make_tree(tmp_path, ("bee", "red ant"))
    make_lists(tmp_path, "bee", "red ant")
    config, weights = kind(tmp_path, 2, evaluate), named("ant", "bee", source="run")
    with pytest.raises(DataError, match="not among those of run, such as 'red ant'.*'ant'"):
        build_dataset(config, "val", weights)


ANIMALS = named("cow", "bee", "ant", "10", source="the run")


@pytest.mark.parametrize("places", [[""], ["val"], ["train", "val"]])  # or a subset of one's own
@pytest.mark.parametrize(
    "names, weights, expected",
    [
        (("10", "ant", "cow"), ANIMALS, [0, 2, 3]),
        (("elk", "ant", "cow"), ANIMALS, "the run, such as 'elk'"),
        (("n15075141", "n01443537"), UNKNOWN, [1, 999]),
        (("7", "0010", "999"), UNKNOWN, [7, 10, 999]),
        (("n01443537", "n99999999"), UNKNOWN, "ImageNet, such as 'n99999999'"),
        (("tench", "n01443537"), UNKNOWN, "ImageNet, such as 'tench'"),
        (("1000",), UNKNOWN, "ImageNet, such as '1000'"),
    ],
)
def test_folders_to_evaluate_on_may_be_some_of_the_classes_of_the_weights_or_imagenet(
    tmp_path, names, weights, expected, places
):
    make_tree(tmp_path, names, places)
    config = folders_config(tmp_path, len(weights) or 1000, True)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=f": 1 of {len(names)} class.* {expected}"):
            build_dataset(config, "val", weights)
    else:
        dataset = build_dataset(config, "val", weights)
        assert list(dataset.files.labels) == dataset.files.subset == expected
        assert dataset.classes.names[0] in ("cow", "n01440764", "0")
        folders = [os.path.basename(os.path.dirname(name)) for name in entries(dataset.files)]
        assert folders == [dataset.classes.names[label] for label in expected]


def test_all_folders_of_imagenet_are_no_subset(tmp_path):
    for name in wordnet_ids():
        (tmp_path / "val" / name).mkdir(parents=True)
    make_tree(tmp_path, ("n01443537",), ["val"])
    files = build_dataset(folders_config(tmp_path, 1000, True), "val").files
    assert list(files.labels) == [1] and files.subset is None


@pytest.mark.parametrize("train, val", [("n01443537", "n01443537"), (NFC, NFD)])
def test_in_training_wordnet_ids_are_classes_and_splits_may_write_a_name_in_two_ways(
    tmp_path, train, val
):
    make_tree(tmp_path, (train, "n15075141"), ["train"])
    make_tree(tmp_path, (val, "n15075141"), ["val"])
    for split in ("train", "val"):
        assert set(build_dataset(folders_config(tmp_path), split).files.labels) == {0, 1}


def test_a_runs_names_for_people_do_not_hinder_its_evaluation(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "classes.txt").write_text("red ant\nhoney bee\n")
    for folders in ((), ("ant", "bee")):  # as earlier runs left them, and as they do now
        weights = named("red ant", "honey bee", folders=folders)
        dataset = build_dataset(folders_config(tmp_path, 2, True), "val", weights)
        assert list(dataset.files.labels) == [0, 1] and dataset.classes.names == weights.names
