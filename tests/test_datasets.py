"""From the config to batches: the same for any number of workers; each mistake is one error."""

import os
import shutil
import threading
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

import datasets
from cli.errors import DataError
from config import get_config
from cpu.resample import to_image
from datasets import build_dataset, build_loader
from loading import images
from transforms import EvalTransform

from .helpers.tiny_data import make_config, make_data

NUM_IMAGES, NUM_CLASSES, SIZE = 23, 5, 8


def random_transform(image, rng):
    """Keeps the image's colour in one pixel; the others are random."""
    array = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    array[0, 0] = plain_transform(image)[0, 0]
    return array


def plain_transform(image, rng=None):
    return np.array(to_image(image))


@pytest.fixture(autouse=True)
def plain_transforms(monkeypatch):
    monkeypatch.setattr(datasets, "build_train_transform", lambda config: random_transform)
    monkeypatch.setattr(datasets, "build_eval_transform", lambda config: plain_transform)


@pytest.fixture
def config(tmp_path):
    """A data folder of uniform images; the red of image i is i, its label i % 5."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        lines = []
        for i in range(NUM_IMAGES):
            Image.new("RGB", (SIZE, SIZE), (i, 0, 0)).save(tmp_path / split / f"{i}.png")
            lines.append(f"{split}/{i}.png {i % NUM_CLASSES}\n")
        (tmp_path / f"{split}_list.txt").write_text("".join(lines))
    config = get_config()
    config.MODEL.NUM_CLASSES = NUM_CLASSES
    config.DATA.update(DATA_PATH=str(tmp_path), IMAGE_SIZE=SIZE, BATCH_SIZE=4, NUM_WORKERS=0)
    config.TRAIN.REPEATED_AUG = 1
    return config


Arrays = namedtuple("Arrays", "images labels indices")


def run(loader):
    """A pass over the data as arrays, so that no tensor outlives it."""
    return [Arrays(b.images.numpy(), b.labels.numpy(), list(b.indices)) for b in loader]


def passes(config, split="train", epochs=(0,), start=0, **kwargs):
    loader = build_loader(config, split, **kwargs)
    result = []
    for epoch in epochs:
        if split == "train":
            loader.sampler.set_epoch(epoch, start)
        result += run(loader)
    return result


def assert_equal(some, others):
    assert len(some) == len(others) > 0
    for a, b in zip(some, others):
        assert a.indices == b.indices
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.images, b.images)


# -------------------------------------------------------------------------------- batches
def test_a_batch_is_uint8_images_int64_labels_and_their_indices(config):
    loader = build_loader(config, "train")
    assert len(loader) == NUM_IMAGES // 4
    for batch in loader:
        assert list(batch.images.shape) == [4, SIZE, SIZE, 3]
        assert str(batch.images.dtype) == "paddle.uint8"
        assert str(batch.labels.dtype) == "paddle.int64"
        assert batch.images.numpy()[:, 0, 0, 0].tolist() == batch.indices
        assert batch.labels.numpy().tolist() == [i % NUM_CLASSES for i in batch.indices]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_in_order_with_a_small_last_batch(config, workers):
    config.DATA.update(NUM_WORKERS=workers, BATCH_SIZE_EVAL=10)
    batches = passes(config, "val")
    assert [batch.indices for batch in batches] == [[*range(10)], [*range(10, 20)], [20, 21, 22]]
    for batch in batches:
        assert (batch.images == np.array(batch.indices)[:, None, None, None] * [1, 0, 0]).all()


def test_a_process_without_images_to_evaluate_gets_no_batch(config):
    config.DATA.NUM_WORKERS = 2
    loader = build_loader(config, "val", rank=30, world=31)
    assert (len(loader), list(loader)) == (0, [])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(config, workers):
    alone = passes(config, epochs=(0, 1))
    config.DATA.NUM_WORKERS = workers
    assert_equal(passes(config, epochs=(0, 1)), alone)


def test_a_small_shared_memory_changes_nothing_but_a_line_in_the_log(config, monkeypatch):
    alone, lines = passes(config), []
    config.DATA.NUM_WORKERS = 2
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(4 * 4 * SIZE**2 * 3))
    assert_equal(passes(config, log=lines.append), alone)
    assert len(lines) == 1 and "--shm-size" in lines[0]


def test_two_processes_see_what_one_with_twice_the_batch_sees_pixel_by_pixel(config):
    ranks = [passes(config, epochs=(1,), rank=rank, world=2) for rank in range(2)]
    config.DATA.BATCH_SIZE = 8
    for k, batch in enumerate(passes(config, epochs=(1,))):
        for rank in range(2):
            assert ranks[rank][k].indices == batch.indices[rank::2]
            np.testing.assert_array_equal(ranks[rank][k].images, batch.images[rank::2])


@pytest.fixture
def decoded(monkeypatch):
    paths, read = [], datasets.read_pixels
    monkeypatch.setattr(datasets, "read_pixels", lambda *args: paths.append(args) or read(*args))
    return paths


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_resumed_epoch_goes_on_at_the_next_batch_and_decodes_none_before(
    config, decoded, repeats
):
    config.TRAIN.REPEATED_AUG = repeats
    whole = passes(config, epochs=(3,))
    del decoded[:]
    assert_equal(passes(config, epochs=(3,), start=12), whole[3:])
    assert len(decoded) <= (NUM_IMAGES // 4 - 3) * 4


def test_the_copies_of_repeated_augmentation_differ_and_are_decoded_once(config, decoded):
    config.TRAIN.REPEATED_AUG, config.DATA.BATCH_SIZE = 3, 12
    (batch, *_) = passes(config)
    assert len(decoded) == len(set(batch.indices)) == 4
    for i in range(0, 12, 3):
        assert len(set(batch.indices[i : i + 3])) == 1
        assert len({image.tobytes() for image in batch.images[i : i + 3]}) == 3


def test_seed_and_epoch_change_the_order_and_the_pixels(config):
    def pixels(seed, epoch):
        config.SEED = seed
        found = passes(config, epochs=(epoch,))
        return {i: image.tobytes() for b in found for i, image in zip(b.indices, b.images)}

    base = pixels(0, 0)
    assert base == pixels(0, 0)
    for other in (pixels(1, 0), pixels(0, 1)):
        assert list(other) != list(base)
        assert all(other[i] != base[i] for i in base.keys() & other.keys())


# -------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "lines, message",
    [
        ("train/none.png 0", "train_list.txt:1: .*train/none.png: no such file"),
        (None, "make_lists.py"),
        ("train\\0.png 0", "no such file; .* with forward slashes"),
        (f"train/{'0' * 300}.png 0", "train_list.txt:1: .*.png: file name too long; the paths"),
    ],
)
def test_a_missing_list_first_image_or_folder_says_what_to_do(config, tmp_path, lines, message):
    (tmp_path / "train_list.txt").unlink()
    if lines:
        (tmp_path / "train_list.txt").write_text(f"{lines}\n")
    with pytest.raises(DataError, match=message):
        build_dataset(config, "train")
    config.DATA.DATA_PATH = str(tmp_path / "none")
    with pytest.raises(DataError, match="none: no such data folder.*-data_path"):
        build_dataset(config, "train")


@pytest.mark.parametrize("names, empty", [("", "1, 3"), ("a\nb\nc\nd\ne\n", "1 (b), 3 (d)")])
def test_classes_without_an_image_and_a_single_class_are_one_warning(
    config, tmp_path, names, empty
):
    if names:
        (tmp_path / "classes.txt").write_text(names)
    (tmp_path / "val_list.txt").write_text("val/0.png 0\nval/2.png 2\nval/4.png 4\n")
    lines = []
    for split in ("train", "val"):
        build_loader(config, split, log=lines.append)
    assert lines == [f"warning: 2 of 5 classes have no image in val: {empty}"]
    config.MODEL.NUM_CLASSES = 1
    (tmp_path / "classes.txt").unlink(missing_ok=True)
    (tmp_path / "train_list.txt").write_text("".join(f"train/{i}.png 0\n" for i in range(8)))
    build_loader(config, "train", log=lines.append)
    assert lines[1:] == ["warning: there is one class: an accuracy of 100 % says nothing"]


def test_dark_grey_of_16_bits_is_warned_of_once_before_workers_are_forked(
    config, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(images, "dark_grey", [])
    for number in range(NUM_IMAGES):
        grey = np.full((SIZE, SIZE), 4000, np.uint16)
        Image.fromarray(grey).save(tmp_path / f"train/{number}.png")
    config.DATA.NUM_WORKERS = 2
    passes(config)
    assert [record.process for record in caplog.records] == [os.getpid()]


def test_a_missing_decoder_is_one_line(config, monkeypatch):
    monkeypatch.setattr(images, "simplejpeg", None)
    images.simplejpeg_is_right.cache_clear()
    lines = []
    try:
        for split in ("train", "val"):
            build_loader(config, split, log=lines.append)
    finally:
        images.simplejpeg_is_right.cache_clear()
    assert len(lines) == 1 and "JPEGs are decoded by Pillow" in lines[0]


def test_a_training_set_smaller_than_one_step_says_so(config):
    config.DATA.BATCH_SIZE = 12
    with pytest.raises(DataError, match="23 images do not fill one step of 2 x 12"):
        build_loader(config, "train", world=2)
    config.DATA.DROP_LAST = False
    assert len(build_loader(config, "train", world=2)) == 1


def spoil(tmp_path, *numbers, split="train"):
    for i in numbers:
        (tmp_path / split / f"{i}.png").write_bytes(b"no image")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_key_sets_the_largest_image(tmp_path, monkeypatch, split):
    monkeypatch.undo()  # the real transforms
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # put back in the end
    data = make_data(tmp_path / "data")
    for limit in (256, 255):
        config = make_config(tmp_path, data, "DATA.MAX_IMAGE_PIXELS", limit)
        refused = "0.png: 256 pixels, more" in build_dataset(config, split)[0, 0, 0].error
        assert refused == (limit < 256)


def test_an_image_too_narrow_to_be_evaluated_is_named_with_its_line(config, tmp_path, monkeypatch):
    transform = EvalTransform(SIZE, SIZE, Image.Resampling.BICUBIC)
    monkeypatch.setattr(datasets, "build_eval_transform", lambda config: transform)
    Image.new("RGB", (1, 101)).save(tmp_path / "val/7.png")
    with pytest.raises(DataError, match=r"val_list.txt:8: .*val/7.png: 1 x 101 pixels, too narrow"):
        passes(config, "val")
    Image.new("RGB", (1, 100)).save(tmp_path / "val/7.png")
    assert len(passes(config, "val")) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_by_the_next_counted_and_listed(config, tmp_path, workers):
    spoil(tmp_path, 3, 4, 22)
    config.DATA.update(BAD_IMAGE="skip", NUM_WORKERS=workers, DROP_LAST=False)
    lines = []
    loader = build_loader(config, "train", log=lines.append)
    seen = sorted(i for batch in run(loader) for i in batch.indices)
    assert seen == sorted([*(set(range(NUM_IMAGES)) - {3, 4, 22}), 5, 5, 0])
    assert lines[0] == "warning: skipped 3 unreadable images:"
    for line, number in zip(lines[1:], (3, 4, 22)):
        assert f"train_list.txt:{number + 1}: " in line and "not an image" in line
    for number in (3, 4, 22):
        Image.new("RGB", (SIZE, SIZE), (number, 0, 0)).save(tmp_path / f"train/{number}.png")
    del lines[:]
    run(loader)  # counted anew
    assert lines == []


def test_more_skipped_images_than_the_limit_stop_the_run(config, tmp_path):
    spoil(tmp_path, 3, 10, 17)
    config.DATA.update(BAD_IMAGE="skip", DROP_LAST=False, BAD_IMAGE_LIMIT=3)
    assert len(passes(config, log=lambda line: None)) == 6
    config.DATA.BAD_IMAGE_LIMIT = 2
    with pytest.raises(DataError, match="more than 2 unreadable.*BAD_IMAGE_LIMIT.*train/"):
        passes(config)
    spoil(tmp_path, *range(NUM_IMAGES))
    with pytest.raises(DataError, match="not an image"):
        passes(config)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_in_training_leaves_out_what_is_skipped_and_one_by_itself_never(
    config, tmp_path, workers
):
    spoil(tmp_path, 6, *range(8, 12), split="val")  # of one batch and a whole one
    config.DATA.update(BAD_IMAGE="skip", NUM_WORKERS=workers)
    lines = []
    seen = [i for batch in passes(config, "val", log=lines.append) for i in batch.indices]
    assert seen == [i for i in range(NUM_IMAGES) if i not in (6, 8, 9, 10, 11)]
    assert lines[0] == "warning: skipped 5 unreadable images:" and "val/6.png" in lines[1]
    config.EVAL = True
    with pytest.raises(DataError, match="val_list.txt:7: .*not an image") as caught:
        passes(config, "val")
    assert "BAD_IMAGE" not in str(caught.value)  # it would not help


def test_a_failing_transform_arrives_with_its_traceback_and_is_not_skipped(config, monkeypatch):
    def fail(image, rng):
        return 1 // 0

    monkeypatch.setattr(datasets, "build_train_transform", lambda config: fail)
    config.DATA.update(BAD_IMAGE="skip", NUM_WORKERS=2)
    with pytest.raises(DataError, match="(?s)png: transform failed.*in fail.*ZeroDivisionError"):
        passes(config)


@pytest.mark.parametrize("cores, expected", [(1, 1), (2, 1), (4, 3), (64, 5)])
def test_auto_workers_are_the_cores_of_this_process_less_one(config, monkeypatch, cores, expected):
    monkeypatch.setattr(datasets.setup, "usable_cores", lambda: cores)
    config.DATA.NUM_WORKERS, lines = "auto", []
    assert build_loader(config, "train", log=lines.append).num_workers == expected  # of 5 batches
    assert len(lines) == 1 and f"by {expected} worker" in lines[0] and f"{cores} core" in lines[0]
    assert build_loader(config, "val", log=lines.append).num_workers and len(lines) == 1


def test_in_a_thread_images_are_loaded_in_turn_and_a_line_says_so(config):
    config.DATA.NUM_WORKERS, lines, found = 2, [], []

    def load():
        loader = build_loader(config, "val", log=lines.append)
        found.extend(batch.indices for batch in loader)

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert [index for batch in found for index in batch] == list(range(23))
    assert "Paddle has no loader workers in a thread: images are loaded in turn" in lines
