"""Class names: where they come from, and what is done where two sets of them meet."""

import json
import unicodedata

import paddle
import pytest

from cli.errors import DataError
from config import get_config
from datasets import build_dataset
from loading.classes import (
    UNKNOWN,
    ClassNames,
    data_classes,
    read_class_names,
    with_num_classes,
)
from loading.files import scan_folder
from loading.imagenet import wordnet_ids
from resmlp import build_resmlp
from storage.weights import read_weights, write_weights

from .helpers.tiny_data import make_tree

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
        (["a", "a", "b"], ["b", "a", "a"], "'a' is the name of two classes"),
        (["\u0440ear"], ["pear"], "character 1 is U.0440 CYRILLIC .* here, U.0070 LATIN SMALL .*P"),
        (["pear "], ["pear"], "'pear ' .*'pear' .character 5 is U.0020 SPACE here, the end there"),
        (["pe\u200bar"], ["pear"], "character 3 is U.200B ZERO WIDTH SPACE here"),
        (["Pear"], ["x", "pear"], "label 1 there is 'pear' .character 1 is U.0050 LATIN CAPITAL"),
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
@pytest.mark.parametrize("folders", [(), ("a", NFD)])
def test_a_record_of_names_comes_back(folders):
    classes = named("Ant", "Biene \U0001f41d", folders=folders)
    for record in (classes.record(), json.dumps(classes.record())):
        assert ClassNames.of_record(record, "here") == classes


@pytest.mark.parametrize(
    "record",
    [None, 3, [], {}, {"names": "ab"}, {"names": [1]}, {"names": ["a"], "folders": 1}, "["],
)
def test_what_is_no_record_is_unknown(record):
    assert not ClassNames.of_record(record, "x")


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
    with pytest.raises(DataError):
        read_class_names(str(tmp_path / "classes.txt"), 2)


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


def test_two_folders_of_one_name_are_refused_and_two_splits_may_write_it_differently(tmp_path):
    make_tree(tmp_path, (NFC, "b"), ["train"])
    make_tree(tmp_path, (NFD,), ["val"])
    assert list(scan_folder(str(tmp_path), "val", 2).labels) == [1]
    make_tree(tmp_path, (NFD,), ["train"])
    with pytest.raises(DataError, match="two folders are called .*NFC and NFD"):
        data_classes(folders_config(tmp_path))


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


@pytest.mark.parametrize("count", [2, 3])
def test_lists_without_names_have_those_of_the_weights(tmp_path, count):
    make_tree(tmp_path)
    make_lists(tmp_path, "ant", "bee")
    (tmp_path / "classes.txt").unlink()
    classes = build_dataset(make_config(tmp_path, count), "val", named("ant", "bee")).classes
    assert classes.names == (("ant", "bee") if count == 2 else ())


@pytest.mark.parametrize("kind", [make_config, folders_config])
@pytest.mark.parametrize("evaluate", [False, True])
def test_data_of_other_classes_than_the_weights_are_refused(tmp_path, kind, evaluate):
    make_tree(tmp_path, ("bee", "red ant"))
    make_lists(tmp_path, "bee", "red ant")
    config, weights = kind(tmp_path, 2, evaluate), named("ant", "bee", source="run")
    with pytest.raises(DataError, match="not among those of run, such as 'red ant'.*'ant'"):
        build_dataset(config, "val", weights)


@pytest.mark.parametrize("place, train", [("", False), ("val", False), ("val", True)])
@pytest.mark.parametrize(
    "names, labels",
    [(("n15075141", "n01443537"), [1, 999]), (("7", "0010", "999"), [7, 10, 999])],
)
def test_wordnet_ids_and_numbers_of_some_classes_are_labels_of_imagenet(
    tmp_path, names, labels, place, train
):
    make_tree(tmp_path / place, names, [""])
    if train:  # somebody's own subset; these weights have all 1,000 classes
        make_tree(tmp_path, names, ["train"])
    dataset = build_dataset(folders_config(tmp_path, 1000, True), "val")
    assert list(dataset.files.labels) == dataset.files.subset == labels
    assert dataset.classes.names[0] in ("n01440764", "0")


def test_all_folders_of_imagenet_are_no_subset(tmp_path):
    for name in wordnet_ids():
        (tmp_path / "val" / name).mkdir(parents=True)
    make_tree(tmp_path, ("n01443537",), ["val"])
    files = build_dataset(folders_config(tmp_path, 1000, True), "val").files
    assert list(files.labels) == [1] and files.subset is None


@pytest.mark.parametrize("names", [("n01443537", "n99999999"), ("tench", "n01443537"), ("1000",)])
def test_folders_that_are_no_classes_of_imagenet_are_named(tmp_path, names):
    make_tree(tmp_path, classes=names, splits=("val",))
    wrong = [name for name in names if name != "n01443537"][0]
    message = f"val: 1 of {len(names)} class.* ImageNet, such as {wrong!r}"
    with pytest.raises(DataError, match=message):
        build_dataset(folders_config(tmp_path, 1000, True), "val")


def test_in_training_the_wordnet_ids_of_a_subset_are_classes_of_their_own(tmp_path):
    make_tree(tmp_path, classes=("n01443537", "n15075141"))
    config = folders_config(tmp_path)
    for split in ("train", "val"):
        assert set(build_dataset(config, split).files.labels) == {0, 1}


def test_folders_to_evaluate_on_may_be_some_of_the_classes_of_the_weights(tmp_path):
    make_tree(tmp_path, ("10", "ant", "cow"), ["val"])
    config = folders_config(tmp_path, 4, True)
    files = build_dataset(config, "val", named("cow", "bee", "ant", "10")).files
    assert sorted(files.labels) == files.subset == [0, 2, 3]
    assert [files.name(i) for i in (0, 2)] == [b"val/cow/0.png", b"val/10/0.png"]
    with pytest.raises(DataError, match="val: 1 of 3 classes .* the run, such as '10'"):
        build_dataset(config, "val", named("cow", "bee", "ant", "elk", source="the run"))


def test_a_runs_names_for_people_do_not_hinder_its_evaluation(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "classes.txt").write_text("red ant\nhoney bee\n")
    for folders in ((), ("ant", "bee")):  # as earlier runs left them, and as they do now
        weights = named("red ant", "honey bee", folders=folders)
        dataset = build_dataset(folders_config(tmp_path, 2, True), "val", weights)
        assert list(dataset.files.labels) == [0, 1] and dataset.classes.names == weights.names
