"""The curves of training runs, from their ``metrics.jsonl``."""

from __future__ import annotations

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

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps; None before the first epoch has ended."""
        return self.epoch[-1]["step"] / self.epoch[-1]["epoch"] if self.epoch else None

    @property
    def last_step(self) -> int:
        return max(record["step"] for record in self.step + self.epoch)

    def values(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Optimizer steps and values of the records that have ``key``."""
        found = [r for r in getattr(self, kind) if is_number(r.get(key))]
        return [r["step"] for r in found], [r[key] for r in found]


@dataclass(frozen=True)
class Curve:
    key: str
    label: str
    kind: str = "epoch"
    style: str = "-"
    color: str = _COLORS[0]  # where the figure shows one run; several have a colour each
    alpha: float = 1.0


_PANELS = (  # title, unit, curves
    (
        "Loss",
        "loss",
        (
            Curve("loss", "training, per report", "step", color=_COLORS[0], alpha=0.3),
            Curve("train_loss", "training", color=_COLORS[0]),
            Curve("val_loss", "validation", style="--", color=_COLORS[1]),
            Curve("ema_loss", "validation, EMA weights", style=":", color=_COLORS[2]),
        ),
    ),
    (
        "Top-1 accuracy, validation",
        "%",
        (
            Curve("val_top1", "weights as trained", style="--", color=_COLORS[1]),
            Curve("ema_top1", "EMA weights", style=":", color=_COLORS[2]),
        ),
    ),
    ("Learning rate", "learning rate", (Curve("lr", "learning rate", "step"),)),
    ("Speed of training", "images/s", (Curve("images_per_second", "images/s", "step"),)),
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
        if not _is_record(record):
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


def _is_record(record: object) -> bool:
    return (
        isinstance(record, dict)
        and record.get("kind") in ("step", "epoch")
        and all(is_number(record.get(key)) and record[key] >= 1 for key in ("step", "epoch"))
    )


def draw_curves(runs: Sequence[Run]):
    """Loss, top-1, learning rate and speed of runs in one figure, for `pictures.render`.

    One run has a colour per curve, several have a colour per run. UserError without Matplotlib.
    """
    figure = new_figure(12, 8, layout="constrained")
    from matplotlib.lines import Line2D

    in_epochs = all(run.steps_per_epoch for run in runs)
    scales = [run.steps_per_epoch if in_epochs else 1 for run in runs]
    end = max(run.last_step / scale for run, scale in zip(runs, scales))
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)  # inches
    figure.set(edgecolor="#8c959f", linewidth=2)  # a frame, on light pages and dark ones
    for axes, (title, unit, curves) in zip(figure.subplots(2, 2).flat, _PANELS):
        shown = []
        for curve in curves:
            for number, run in enumerate(runs):
                steps, values = run.values(curve.kind, curve.key)
                if not steps:
                    continue
                shown += [curve] if curve not in shown else []
                color = curve.color if len(runs) == 1 else _COLORS[number % len(_COLORS)]
                axes.plot(
                    [step / scales[number] for step in steps],
                    values,
                    curve.style,
                    color=color,
                    alpha=curve.alpha,
                    marker="." if len(steps) < 2 else None,
                )
        axes.set(title=title, ylabel=unit, xlabel="epoch" if in_epochs else "optimizer step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.02 * end)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if shown and title.startswith("Speed"):
            axes.set_ylim(0, axes.dataLim.ymax * 1.1)  # from zero: a dip shows in its true size
        if not shown:
            axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center")
        elif len(curves) > 1:
            axes.legend(
                [_key(Line2D, curve, many=len(runs) > 1) for curve in shown],
                [curve.label for curve in shown],
                frameon=False,
            )
    if len(runs) > 1:
        figure.legend(
            [Line2D([], [], color=_COLORS[i % len(_COLORS)]) for i in range(len(runs))],
            [run.name.replace("$", r"\$") for run in runs],
            loc="outside upper center",
            ncols=min(len(runs), 5),
            frameon=False,
        )
    return figure


def _key(line, curve: Curve, many: bool):
    """A line for the legend: black where the colours stand for the runs."""
    color = "black" if many else curve.color
    return line([], [], linestyle=curve.style, color=color, alpha=curve.alpha)
