"""Dashboards: each backend is read back by its own reader; a missing package stops nobody."""

import os
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from training.report import build_dashboard


def write_some(dashboard):
    dashboard.add_scalar("train/loss", 2.5, 10)
    dashboard.add_scalar("train/loss", 1.5, 20)
    dashboard.add_histogram("layer_scale/0.ls1", np.linspace(0, 1, 100), 10)
    image = np.full([8, 12, 3], 200, np.uint8)
    dashboard.add_image("train/images", image, 10, dataformats="HWC")
    dashboard.close()


@pytest.mark.parametrize(
    "kind, package", [("tensorboard", "tensorboardX"), ("visualdl",) * 2, ("none", "paddle")]
)
def test_a_missing_package_is_one_line_in_the_log(kind, package, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    assert build_dashboard(kind, tmp_path, 0) is None and not list(tmp_path.iterdir())
    lines = [f"DASHBOARD {kind} is off: `pip install {package}`"] if kind != "none" else []
    assert [message.split(" (")[0] for message in caplog.messages] == lines


def test_tensorboard_files_hold_what_was_written(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    write_some(build_dashboard("tensorboard", tmp_path, 0))
    (file,) = (tmp_path / "tensorboard").iterdir()
    values = {}
    data = file.read_bytes()
    while data:  # length, 4 bytes of check sum, event, 4 bytes of check sum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            values.setdefault(value.tag, []).append((event.step, value))
    assert [(step, v.simple_value) for step, v in values["train/loss"]] == [(10, 2.5), (20, 1.5)]
    ((_, histogram),) = values["layer_scale/0.ls1"]
    assert (histogram.histo.num, histogram.histo.max) == (100, 1.0)
    ((_, image),) = values["train/images"]
    assert (image.image.height, image.image.width) == (8, 12)


def test_a_resumed_run_drops_the_points_after_its_checkpoint(tmp_path, monkeypatch):
    writer = MagicMock(side_effect=lambda path, **_: os.makedirs(path, exist_ok=True))
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=writer))
    for step in (0, 5, 0):
        build_dashboard("tensorboard", tmp_path, step)
    assert [call.kwargs.get("purge_step") for call in writer.call_args_list] == [None, 6, 1]


def test_visualdl_files_hold_what_was_written(tmp_path):
    visualdl = pytest.importorskip("visualdl")

    write_some(build_dashboard("visualdl", tmp_path, 0))
    (file,) = (tmp_path / "visualdl").iterdir()
    reader = visualdl.LogReader(file_path=str(file))
    loss = reader.get_data("scalar", "train/loss")
    assert [(point.id, point.value) for point in loss] == [(10, 2.5), (20, 1.5)]
    assert len(reader.get_data("histogram", "layer_scale/0.ls1")) == 1
    assert len(reader.get_data("image", "train/images")) == 1
