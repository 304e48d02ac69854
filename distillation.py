"""The teacher of a distillation: a frozen network that sees the images as it was trained to.

Build it after the student and its optimizer: a network built earlier shifts the automatic names of
Paddle's parameters, by which optimizer states are stored.
"""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import difflib
import json
import os
from pathlib import Path

import paddle
import paddle.nn.functional as F

from cli.errors import ConfigError, WeightsError
from config import get_config
from loading.classes import UNKNOWN, ClassNames
from resmlp import build_resmlp
from storage import safe_pickle
from storage.adapt import load_state
from storage.files import shorten, unreachable
from storage.weights import WeightFile, read_weights


class Teacher:
    """A frozen network (images -> logits ``[B, K]``), with its own normalisation and input size.

    ``mean`` and ``std`` are of its input, ``student`` the two of the images it is given.
    """

    def __init__(self, network, image_size: int, mean, std, student, classes=UNKNOWN):
        network.eval()
        for parameter in network.parameters():
            parameter.stop_gradient = True
        self.network, self.image_size = network, image_size
        self.classes, self._labels = classes, None
        # ((x * student_std + student_mean) - mean) / std, as one scale and one shift
        scale = [old / new for old, new in zip(student[1], std)]
        shift = [(old - new) / s for old, new, s in zip(student[0], mean, std)]
        self.scale = self.shift = None
        if any(s != 1 for s in scale) or any(shift):
            self.scale = paddle.to_tensor(scale, dtype="float32").reshape([1, -1, 1, 1])
            self.shift = paddle.to_tensor(shift, dtype="float32").reshape([1, -1, 1, 1])

    def match(self, student: ClassNames) -> str:
        """Brings the logits into the order of the student's classes; a line for the log, if any.

        DataError if the teacher has other classes.
        """
        labels, line = student.labels_in(self.classes, "a teacher has the student's classes")
        self._labels = labels and paddle.to_tensor(labels)
        return line

    @paddle.no_grad()
    def __call__(self, images: paddle.Tensor) -> paddle.Tensor:
        """Logits ``[B, K]`` of the student's augmented and normalised images ``[B, 3, H, W]``."""
        if self.scale is not None:
            images = images * self.scale + self.shift
        size = [self.image_size, self.image_size]
        if list(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bicubic")
        logits = self.network(images)
        # googlenet adds the logits of its side branches
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        return logits if self._labels is None else logits.index_select(self._labels, axis=1)


def build_teacher(config) -> Teacher:
    """Builds the teacher of TRAIN.TEACHER_* and tries it on two blank images.

    TEACHER_MODEL is the prefix of a network saved by ``paddle.jit.save``; or, with weights, a YAML
    file of another ResMLP or a name of ``paddle.vision.models``. Unless it has its own, which a
    YAML file and an export have, the student's size, mean and deviation stand in for a
    TEACHER_IMAGE_SIZE, _MEAN or _STD of None. ConfigError or WeightsError if it does not fit.
    """
    train, data = config.TRAIN, config.DATA
    name, weights, count = train.TEACHER_MODEL, train.TEACHER_PRETRAINED, config.MODEL.NUM_CLASSES
    if not name:
        raise ConfigError(
            f"TRAIN.DISTILLATION_TYPE is {train.DISTILLATION_TYPE}, but TRAIN.TEACHER_MODEL is None"
        )
    student = settings = data.IMAGE_SIZE, data.IMAGENET_MEAN, data.IMAGENET_STD
    if Path(name).suffix in (".yaml", ".yml"):
        own = get_config(name)
        settings = own.DATA.IMAGE_SIZE, own.DATA.IMAGENET_MEAN, own.DATA.IMAGENET_STD
        file, network = _teacher_weights(name, weights), build_resmlp(own)
        load_state(network, file.state)
        classes = file.classes
    elif (prefix := _saved_prefix(name)) is not None:
        settings, classes = _metadata(prefix) or (student, UNKNOWN)
        network = _saved_network(prefix, weights)
    else:
        network, classes = _vision_model(name, weights, count)
    given = train.TEACHER_IMAGE_SIZE, train.TEACHER_MEAN, train.TEACHER_STD
    size, mean, std = (value or its for value, its in zip(given, settings))
    teacher = Teacher(network, size, mean, std, student[1:], classes)
    blank = paddle.zeros([2, data.IMAGE_CHANNELS, data.IMAGE_SIZE, data.IMAGE_SIZE])
    try:  # before training starts
        shape = list(teacher(blank).shape)
    except Exception as error:
        raise ConfigError(
            f"TRAIN.TEACHER_MODEL {name} does not take images of {size} pixels in "
            f"batches of any size; set TRAIN.TEACHER_IMAGE_SIZE ({_last_line(error)})"
        ) from error
    if shape != [2, count]:
        raise ConfigError(
            f"TRAIN.TEACHER_MODEL {name} gives {shape[1:]} values for an image, not one for each "
            f"of MODEL.NUM_CLASSES {count}"
        )
    return teacher


def _vision_model(name: str, weights: str | None, classes: int) -> tuple:
    known = [n for n in paddle.vision.models.__all__ if n.islower()]  # the others are classes
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"TRAIN.TEACHER_MODEL is {name!r}: no network saved by paddle.jit.save (there is no "
            f"{name}.json or .pdmodel), no YAML file, no name of paddle.vision.models{hint}"
        )
    file = _teacher_weights(name, weights)
    network = getattr(paddle.vision.models, name)(pretrained=False, num_classes=classes)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: value.shape for key, value in file.state.items()}
    if differ := [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]:
        raise WeightsError(
            f"{weights}: not the weights of {name} with {classes} classes (MODEL.NUM_CLASSES); "
            f"missing, unexpected or of another shape: {shorten(differ)}"
        )
    network.set_state_dict(file.state)
    return network, file.classes


def _teacher_weights(name: str, weights: str | None) -> WeightFile:
    if not weights:
        raise ConfigError(
            f"TRAIN.TEACHER_MODEL {name} needs TRAIN.TEACHER_PRETRAINED, its weight file: "
            "an untrained teacher teaches noise"
        )
    return read_weights(weights)


def _saved_prefix(name: str) -> str | None:
    """The prefix of a network saved by `paddle.jit.save`; None where there is none."""
    prefix = name.removesuffix(".json").removesuffix(".pdmodel")
    files = [f"{prefix}.json", f"{prefix}.pdmodel"]
    if reason := unreachable(files[0]):
        raise ConfigError(f"TRAIN.TEACHER_MODEL {name}: cannot be read: {reason}")
    return prefix if any(map(os.path.isfile, files)) else None


def _metadata(prefix: str) -> tuple | None:
    """Size, mean, deviation; and classes: of tools/export.py's ``PREFIX.metadata``, if any."""
    path = Path(prefix + ".metadata")
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = [found[key] for key in ("image_size", "mean", "std")]
        inside, names = found.get("preprocessing_inside"), found.get("class_names")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: no metadata of tools/export.py ({error})") from None
    if inside:
        raise ConfigError(
            f"TRAIN.TEACHER_MODEL {prefix} has its preprocessing inside and gives probabilities; "
            "a teacher gives logits: export it without -with_preprocessing"
        )
    invented = names == [f"class {label}" for label in range(len(names or ()))]
    record = found.get("classes", {"names": [] if invented else names})
    return settings, ClassNames.of_record(record, str(path))


def _saved_network(prefix: str, weights: str | None) -> paddle.nn.Layer:
    if weights:
        raise ConfigError(
            f"TRAIN.TEACHER_MODEL {prefix} holds its own weights: leave TRAIN.TEACHER_PRETRAINED "
            "at None"
        )
    if not os.path.isfile(prefix + ".pdiparams"):
        raise WeightsError(f"TRAIN.TEACHER_MODEL {prefix}: there is no {prefix}.pdiparams")
    notes = prefix + ".pdiparams.info"
    if os.path.exists(notes):  # jit.load would unpickle it: refuse what is not plain data
        safe_pickle.load(notes)
    try:
        return paddle.jit.load(prefix)
    except Exception as error:  # ValueError, RuntimeError, or what Paddle's C++ makes of it
        raise WeightsError(
            f"TRAIN.TEACHER_MODEL {prefix}: damaged, incomplete, or of another Paddle version "
            f"({_last_line(error)})"
        ) from error


def _last_line(error: Exception) -> str:
    return str(error).rstrip().rpartition("\n")[2].strip() or type(error).__name__
