"""The curves of training runs, from their ``metrics.jsonl``."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cli.errors import UserError
from storage.files import printable
from training.pictures import new_figure

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")


@dataclass
class Run:
    """What a run has logged: its records by kind, each list in the order of the steps."""

    name: str
    step: list[dict] = field(default_factory=list)  # every REPORT_FREQ optimizer steps
    epoch: list[dict] = field(default_factory=list)  # at the end of every epoch

    def values(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Optimizer steps and values of the records that have ``key``."""
        found = [r for r in getattr(self, kind) if is_number(r.get(key))]
        return [r["step"] for r in found], [r[key] for r in found]


_TRAINING, _VALIDATION = dict(color=_COLORS[0]), dict(linestyle="--", color=_COLORS[1])
_EMA = dict(linestyle=":", color=_COLORS[2])
_UNITS = {"Loss": "loss", "Top-1 accuracy, validation": "%", "Learning rate": "learning rate"}
_UNITS["Speed of training"] = "images/s"
_CURVES = (  # panel, records' kind and key, label, how it is drawn
    ("Loss", "step", "loss", "training, per report", {**_TRAINING, "alpha": 0.3}),
    ("Loss", "epoch", "train_loss", "training", _TRAINING),
    ("Loss", "epoch", "val_loss", "validation", _VALIDATION),
    ("Loss", "epoch", "ema_loss", "validation, EMA weights", _EMA),
    ("Top-1 accuracy, validation", "epoch", "val_top1", "weights as trained", _VALIDATION),
    ("Top-1 accuracy, validation", "epoch", "ema_top1", "EMA weights", _EMA),
    ("Learning rate", "step", "lr", "", _TRAINING),
    ("Speed of training", "step", "images_per_second", "", _TRAINING),
)


def read_metrics(folder: str | os.PathLike) -> Run:
    """Reads ``metrics.jsonl`` of a run's folder (or the file itself).

    Of a step that was logged twice, because a run was resumed, the last record counts. A torn last
    line is left out. UserError if there is no such file, no record, or another bad line.
    """
    path = Path(folder)
    name = path.resolve().name if path.is_dir() else path.resolve().parent.name
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a training run") from None
    run = Run(printable(name))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            record = None
        if not (
            isinstance(record, dict)
            and record.get("kind") in ("step", "epoch")
            and all(is_number(record.get(key)) and record[key] >= 1 for key in ("step", "epoch"))
        ):
            raise UserError(f"{path}:{number}: not a record of a run: {line[:60]!r}")
        records = getattr(run, record["kind"])
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    if not (run.step or run.epoch):
        raise UserError(f"{path}: holds no records yet")
    return run


def is_number(value: object) -> bool:
    """Whether a value can be drawn; a loss that went to infinity or NaN cannot."""
    return isinstance(value, (int, float)) and abs(value) < 1e100


def draw_curves(runs: Sequence[Run]):
    """Loss, top-1, learning rate and speed of runs in one figure, for `pictures.render`.

    One run has a colour per curve, several have a colour per run. UserError without Matplotlib.
    """
    figure, many = new_figure(12, 8, layout="constrained"), len(runs) > 1
    from matplotlib.lines import Line2D

    in_epochs, scales = all(run.epoch for run in runs), [1] * len(runs)
    if in_epochs:  # by the steps of an epoch
        scales = [run.epoch[-1]["step"] / run.epoch[-1]["epoch"] for run in runs]
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)  # inches
    figure.set(edgecolor="#8c959f", linewidth=2)  # a frame, on light pages and dark ones
    for axes, (title, unit) in zip(figure.subplots(2, 2).flat, _UNITS.items()):
        keys = {}  # for the legend, by label: black where the colours stand for the runs
        for panel, kind, key, label, style in _CURVES:
            for run, scale, color in zip(runs, scales, itertools.cycle(_COLORS)):
                steps, values = run.values(kind, key)
                if steps and panel == title:
                    drawn = {**style, "color": color} if many else style
                    marker = "." if len(steps) < 2 else None
                    axes.plot([step / scale for step in steps], values, marker=marker, **drawn)
                    keys[label] = Line2D([], [], **{**style, "color": "black"} if many else style)
        axes.set(title=title, ylabel=unit, xlabel="epoch" if in_epochs else "optimizer step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        ends = [max(r["step"] for r in run.step + run.epoch) for run in runs]
        axes.set_xlim(0, 1.02 * max(end / scale for end, scale in zip(ends, scales)))
        axes.xaxis.get_major_locator().set_params(integer=True)
        if keys and title.startswith("Speed"):
            axes.set_ylim(0, axes.dataLim.ymax * 1.1)  # from zero: a dip shows in its true size
        if not keys:
            axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center")
        elif "" not in keys:
            axes.legend(keys.values(), keys, frameon=False)
    if many:
        figure.legend(
            [Line2D([], [], color=color) for _, color in zip(runs, itertools.cycle(_COLORS))],
            [run.name.replace("$", r"\$") for run in runs],
            loc="outside upper center",
            ncols=min(len(runs), 5),
            frameon=False,
        )
    return figure
