"""Curves of runs: what is read from metrics.jsonl, and that the pictures and the page are whole."""

import json
import os

import pytest
from PIL import Image

from cli.errors import UserError
from training.plots import draw_curves, read_metrics

from .helpers.tiny_run import run_tool


def step(number, **values):
    return {"kind": "step", "epoch": (number - 1) // 4 + 1, "step": number, "lr": 1e-3, **values}


def epoch(number, **values):
    return {"kind": "epoch", "epoch": number, "step": 4 * number, "train_loss": 2.0, **values}


def write_run(folder, records, tail=""):
    folder.mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records) + tail
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def run(tmp_path):
    records = [step(2, loss=2.5, images_per_second=80), step(4, loss=2.0, images_per_second=90)]
    records += [epoch(1, val_top1=40.0), epoch(2, val_top1=30.0)]
    return write_run(tmp_path / "first", records)


@pytest.mark.parametrize(
    "record",
    [{"kind": "epoch", "step": 5}, epoch(0), {**epoch(1), "epoch": "1"}, 5, '{"kind": "st']
    + [{**step(1), "step": float("inf")}],
)
def test_a_record_that_cannot_be_placed_is_refused_by_its_number(tmp_path, record):
    torn = record if isinstance(record, str) else json.dumps(record)
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a record"):
        read_metrics(write_run(tmp_path / "odd", [step(1)], f"{torn}\n{json.dumps(step(2))}"))


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("records", "tail", "kind", "key", "expected"),
    [
        ([step(1), step(2)], '{"kind": "step", "ep', "step", "lr", ([1, 2], [1e-3] * 2)),  # torn
        ([step(n, loss=v) for n, v in enumerate([2, INF, NAN], 1)], "", "step", "loss", ([1], [2])),
        (
            [step(n, loss=v) for n, v in ((2, 9), (4, 9), (6, 9), (3, 1), (5, 1))],  # resumed
            *("", "step", "loss", ([2, 3, 5], [9, 1, 1])),
        ),
        ([epoch(1), epoch(2, val_top1=50), epoch(3)], "", "epoch", "val_top1", ([8], [50])),
    ],
)
def test_points_are_what_was_logged_last_whole_and_finite(
    tmp_path, records, tail, kind, key, expected
):
    run = read_metrics(write_run(tmp_path / "run", records, tail))
    assert run.values(kind, key) == expected
    draw_curves([run])


def test_a_run_whose_folder_is_not_utf8_has_a_name_that_can_be_drawn(tmp_path):
    folder = write_run(tmp_path / "plain", [step(1)])
    odd = folder.with_name(os.fsdecode(b"caf\xe9"))
    try:
        folder.rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert read_metrics(odd).name == "caf\\xe9"


def test_curves_stand_at_their_epochs_or_in_the_first_at_steps_under_names_and_units(run, tmp_path):
    loss, top1, rate, speed = draw_curves([read_metrics(run)]).axes
    per_report, training = loss.lines
    assert list(per_report.get_xdata()) == [0.5, 1.0]  # steps 2 and 4 of 4 an epoch
    assert list(training.get_ydata()) == [2.0, 2.0]
    assert [text.get_text() for text in top1.get_legend().get_texts()] == ["weights as trained"]
    assert [axes.get_ylabel() for axes in (top1, speed)] == ["%", "images/s"]
    assert {axes.get_xlabel() for axes in (loss, top1, rate, speed)} == {"epoch"}
    young = write_run(tmp_path / "young", [step(1, loss=2.0), step(2, loss=1.0)])
    axes = draw_curves([read_metrics(young)]).axes
    assert {a.get_xlabel() for a in axes} == {"optimizer step"}
    assert list(axes[0].lines[0].get_xdata()) == [1, 2]


def test_several_runs_have_a_colour_each(run, tmp_path):
    second = write_run(tmp_path / "second", [epoch(1)])
    figure = draw_curves([read_metrics(run), read_metrics(second)])
    colors = [line.get_color() for line in figure.axes[0].lines if not line.get_alpha()]
    assert len(colors) == len(set(colors)) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]


def test_the_script_draws_a_picture_and_a_page_that_needs_nothing_else(run, tmp_path):
    done = run_tool("plot_metrics", run, "-html", "sub/curves.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "sub" / "curves.html").read_text()
    assert "40.00 % (epoch 1)" in page
    assert "<svg" in page and "src=" not in page and "<link" not in page
    assert Image.open(run / "curves.png").size == (1320, 880)
    done = run_tool("plot_metrics", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere") and done.stderr.count("\n") == 1
    with pytest.raises(UserError, match="metrics.jsonl: holds no records"):
        read_metrics(write_run(tmp_path / "empty", []))
