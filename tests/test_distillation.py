"""The three kinds of teacher, what they see, and which are refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec

from cli.errors import ConfigError, DataError, WeightsError
from config import get_config
from distillation import Teacher, build_teacher
from loading.classes import ClassNames
from resmlp import build_resmlp

CLASSES = 5
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]


class Probe(paddle.nn.Layer):
    """Returns the pooled pixels it was given as logits; remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.dropout = paddle.nn.Dropout(0.9)
        self.weight = self.create_parameter([3])

    def forward(self, images):
        self.seen = self.dropout(images)
        return images.mean(axis=[2, 3]) * self.weight, "side branch"


def make_config(**train):
    config = get_config()
    config.MODEL.NUM_CLASSES, config.DATA.IMAGE_SIZE = CLASSES, 32
    config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD = MEAN, STD
    config.TRAIN.update(DISTILLATION_TYPE="hard", **train)
    return config


def make_teacher(**kwargs):
    settings = dict(image_size=8, mean=MEAN, std=STD, student=(MEAN, STD))
    return Teacher(Probe(), **{**settings, **kwargs})


def make_images(size, batch=2, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, size, size)).astype("float32")


# ------------------------------------------------------------------------------ what it sees
def column(values):
    return np.reshape(values, (3, 1, 1))


def test_the_teacher_sees_its_own_normalisation():
    images, mean, std = make_images(8), [0.1, 0.2, 0.6], [0.3, 0.25, 0.1]
    teacher = make_teacher(mean=mean, std=std)
    teacher(paddle.to_tensor(images))
    expected = (images * column(STD) + column(MEAN) - column(mean)) / column(std)
    np.testing.assert_allclose(teacher.network.seen.numpy(), expected, atol=1e-5)


def test_images_are_resized_to_the_teachers_size():
    ramp = np.broadcast_to(np.linspace(0, 1, 16, dtype="float32"), (1, 3, 16, 16))
    teacher = make_teacher(image_size=32)
    teacher(paddle.to_tensor(ramp))
    seen = teacher.network.seen.numpy()
    assert seen.shape == (1, 3, 32, 32)
    pixels = (np.arange(32) + 0.5) / 2 - 0.5  # where they lie among the 16
    expected = np.broadcast_to(np.clip(pixels / 15, 0, 1), seen.shape)
    np.testing.assert_allclose(seen, expected, atol=0.01)


def test_the_teacher_is_frozen_and_its_logits_come_in_the_order_of_the_students_classes():
    teacher = make_teacher(classes=ClassNames(("a", "b", "c"), "t"))
    images = paddle.to_tensor(make_images(8), stop_gradient=False)
    logits = teacher(images)
    assert logits.shape == [2, 3]  # the first of a tuple
    assert logits.stop_gradient and all(p.stop_gradient for p in teacher.network.parameters())
    # no dropout, and with the student's settings nothing else either
    np.testing.assert_array_equal(teacher.network.seen.numpy(), images.numpy())
    assert teacher.match(ClassNames(("a", "b", "c"), "s")) == ""
    assert "another order than in t" in teacher.match(ClassNames(("c", "a", "b"), "s"))
    np.testing.assert_array_equal(teacher(images).numpy(), logits.numpy()[:, [2, 0, 1]])
    with pytest.raises(DataError, match="'x' .label 1.; label 1 there is 'b'"):
        teacher.match(ClassNames(("a", "x", "c"), "s"))


# ----------------------------------------------------------------------------- three kinds
def test_a_vision_model_with_weights_is_a_teacher(tmp_path):
    reference = paddle.vision.models.squeezenet1_1(num_classes=CLASSES)
    weights, images = str(tmp_path / "weights.pdparams"), paddle.to_tensor(make_images(32))
    paddle.save(reference.state_dict(), weights)
    teacher = build_teacher(make_config(TEACHER_MODEL="squeezenet1_1", TEACHER_PRETRAINED=weights))
    reference.eval()
    np.testing.assert_array_equal(teacher(images).numpy(), reference(images).numpy())


SMALL = f"""
DATA: {{IMAGE_SIZE: 16, IMAGENET_MEAN: [0.0, 0.0, 0.0], IMAGENET_STD: [1.0, 1.0, 1.0]}}
MODEL: {{NUM_CLASSES: {CLASSES}, MIXER: {{PATCH_SIZE: 8, EMBED_DIM: 8, DEPTH: 1}}}}
"""


@pytest.fixture
def small_resmlp(tmp_path):
    """A YAML file, weights, and the model that they should become."""
    path, weights = str(tmp_path / "teacher.yaml"), str(tmp_path / "teacher.pdparams")
    Path(path).write_text(SMALL)
    model = build_resmlp(get_config(path))
    paddle.save(model.state_dict(), weights)
    return path, weights, model


def test_another_resmlp_is_a_teacher_with_its_own_size_and_normalisation_or_the_configs(
    small_resmlp,
):
    path, weights, model = small_resmlp
    model.eval()
    images = make_images(16)
    pixels = (images * column(STD) + column(MEAN)).astype("float32")
    own, given = {}, dict(TEACHER_IMAGE_SIZE=16, TEACHER_MEAN=MEAN, TEACHER_STD=STD)
    for options, seen in ((own, pixels), (given, images)):
        config = make_config(TEACHER_MODEL=path, TEACHER_PRETRAINED=weights, **options)
        teacher = build_teacher(config)
        assert teacher.image_size == 16
        logits, expected = teacher(paddle.to_tensor(images)), model(paddle.to_tensor(seen))
        np.testing.assert_allclose(logits.numpy(), expected.numpy(), atol=1e-5)
    assert teacher(paddle.to_tensor(make_images(32))).shape == [2, CLASSES]


class Pool(paddle.nn.Layer):
    def __init__(self, classes):
        super().__init__()
        self.head = paddle.nn.Linear(3, classes)

    def forward(self, images):
        return self.head(images.mean(axis=[2, 3]))


def save_pool(prefix, classes=CLASSES):
    model = Pool(classes)
    model.eval()
    paddle.jit.save(model, str(prefix), input_spec=[InputSpec([None, 3, None, None], "float32")])
    return model


def test_a_saved_network_is_a_teacher_and_an_export_says_its_own_size_and_normalisation(tmp_path):
    model, path = save_pool(tmp_path / "model"), tmp_path / "model.metadata"
    images, options = paddle.to_tensor(make_images(32)), {"TEACHER_MODEL": str(tmp_path / "model")}
    suffix = ".json" if (tmp_path / "model.json").exists() else ".pdmodel"
    for name in ("model", "model" + suffix):
        teacher = build_teacher(make_config(TEACHER_MODEL=str(tmp_path / name)))
        np.testing.assert_allclose(teacher(images).numpy(), model(images).numpy(), atol=1e-6)

    said = {"image_size": 16, "mean": [0.1, 0.2, 0.6], "std": [0.3, 0.25, 0.1]}
    path.write_text(json.dumps({**said, "class_names": list("abcde")}))
    teacher = build_teacher(make_config(**options))
    like = Teacher(teacher.network, 16, said["mean"], said["std"], (MEAN, STD))
    np.testing.assert_array_equal(teacher(images).numpy(), like(images).numpy())
    assert teacher.classes.names == tuple("abcde")
    assert build_teacher(make_config(**options, TEACHER_IMAGE_SIZE=8)).image_size == 8
    for names in (["class 0", "class 1"], None):  # invented
        path.write_text(json.dumps({**said, "class_names": names}))
        assert not build_teacher(make_config(**options)).classes
    path.write_text(json.dumps({**said, "preprocessing_inside": True}))
    refuse("preprocessing inside", **options)
    path.write_text("[]")
    refuse("no metadata of tools/export.py", **options)


# --------------------------------------------------------------------------------- refusals
def refuse(match, **train):
    with pytest.raises((ConfigError, WeightsError), match=match):
        build_teacher(make_config(**train))


@pytest.mark.parametrize(
    "message,model,weights,more",
    [
        ("DISTILLATION_TYPE is hard, but TRAIN.TEACHER_MODEL is None", None, None, {}),
        ("TEACHER_MODEL is 'resnet51'.*did you mean resnet", "resnet51", None, {}),
        ("TEACHER_MODEL is 'ResNet'", "ResNet", None, {}),
        ("TEACHER_MODEL a+: cannot be read: File name too long", "a" * 300, None, {}),
        ("resnet50 needs TRAIN.TEACHER_PRETRAINED", "resnet50", None, {}),
        ("needs TRAIN.TEACHER_PRETRAINED", "YAML", None, {}),
        ("not the weights of squeezenet1_1 with 5", "squeezenet1_1", "WEIGHTS", {}),
        ("not the weights .* _conv9.weight, _conv9.bias", "squeezenet1_1", "SEVEN", {}),
        (r"gives \[7\] values .* MODEL.NUM_CLASSES 5", "POOL", None, {}),
        ("the weights are for 5 classes, the model has 6", "SIX", "WEIGHTS", {}),
        ("images of 24 pixels.*set TRAIN.TEACHER", "YAML", "WEIGHTS", {"TEACHER_IMAGE_SIZE": 24}),
        ("holds its own weights", "POOL", "x.pdparams", {}),
    ],
)
def test_what_cannot_teach_is_refused(tmp_path, small_resmlp, message, model, weights, more):
    files = dict(zip(("YAML", "WEIGHTS"), small_resmlp), SIX=str(tmp_path / "six.yaml"))
    files.update(POOL=str(tmp_path / "pool"), SEVEN=str(tmp_path / "seven.pdparams"))
    Path(files["SIX"]).write_text(SMALL.replace("CLASSES: 5", "CLASSES: 6"))
    if model == "POOL":
        save_pool(tmp_path / "pool", classes=7)
    if weights == "SEVEN":
        other = paddle.vision.models.squeezenet1_1(num_classes=7)
        paddle.save(other.state_dict(), files["SEVEN"])
    teacher = dict(TEACHER_MODEL=files.get(model, model), **more)
    refuse(message, TEACHER_PRETRAINED=files.get(weights, weights), **teacher)


def test_a_damaged_saved_network_is_refused(tmp_path):
    save_pool(tmp_path / "pool")
    os.remove(tmp_path / "pool.pdiparams")
    refuse("there is no .*pool.pdiparams", TEACHER_MODEL=str(tmp_path / "pool"))
    for file in ("pool.json", "pool.pdmodel", "pool.pdiparams"):
        (tmp_path / file).write_bytes(b"{")
    refuse("pool: damaged, incomplete", TEACHER_MODEL=str(tmp_path / "pool"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("trap",)


def test_a_saved_network_cannot_run_code_through_its_notes(tmp_path, monkeypatch):
    """paddle.jit.load unpickles PREFIX.pdiparams.info."""
    monkeypatch.chdir(tmp_path)
    save_pool(tmp_path / "pool")
    (tmp_path / "pool.pdiparams.info").write_bytes(pickle.dumps(Evil()))
    refuse("refused", TEACHER_MODEL=str(tmp_path / "pool"))
    assert not os.path.exists("trap")
