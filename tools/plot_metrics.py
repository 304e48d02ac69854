"""Draws the curves of one or several training runs from their ``metrics.jsonl``: PNG and HTML.

python tools/plot_metrics.py output/first output/second -output curves.png -html curves.html
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from cli.errors import run_as_script
from cli.parser import Parser
from tools.common import html_page, html_table, write_file
from training.pictures import render
from training.plots import Run, draw_curves, is_number, read_metrics


def plot_metrics(
    folders: Sequence[str | os.PathLike],
    output_png: str | os.PathLike,
    output_html: str | os.PathLike | None = None,
) -> None:
    """Draws loss, top-1, learning rate and speed of runs; the HTML page has a table of results too.
    Raises UserError: a run has no readable ``metrics.jsonl``, an output cannot be written.
    """
    runs = [read_metrics(folder) for folder in folders]
    figure = draw_curves(runs)
    write_file(output_png, render(figure, "png"))
    if output_html:
        svg = render(figure, "svg").decode("utf-8")
        sections = [
            ("Results", html_table(_HEADER, map(_summary, runs))),
            ("Curves", svg[svg.index("<svg") :]),
        ]
        title = "Training run" + ("s " if len(runs) > 1 else " ") + ", ".join(r.name for r in runs)
        write_file(output_html, html_page(title, sections))


_HEADER = ("run", "epochs", "train loss", "val loss", "best top-1", "best EMA top-1", "images/s")


def _summary(run: Run) -> list[str]:
    def last(key: str) -> str:
        _, values = run.values("epoch", key)
        return f"{values[-1]:.4f}" if values else "-"

    def best(key: str) -> str:
        found = [r for r in run.epoch if is_number(r.get(key))]
        top = max(found, key=lambda r: r[key], default=None)
        return f"{top[key]:.2f} % (epoch {top['epoch']})" if top else "-"

    _, speeds = run.values("step", "images_per_second")
    speed = f"{median(speeds):.0f}" if speeds else "-"
    epochs = str(run.epoch[-1]["epoch"] if run.epoch else 0)
    return [
        run.name, epochs, last("train_loss"), last("val_loss"), best("val_top1"), best("ema_top1"),
        speed,
    ]  # fmt: skip


def main() -> None:
    parser = Parser("Curves of training runs, from their metrics.jsonl.")
    parser.paths("runs", "folders of runs", nargs="+", metavar="DIR")
    parser.flag("output", "picture (default: curves.png in the first run)", metavar="FILE")
    parser.flag("html", "also a self-contained HTML page", metavar="FILE")
    args = parser.parse_args()
    output = args.output or Path(args.runs[0]) / "curves.png"
    plot_metrics(args.runs, output, args.html)
    print("wrote", output, *(["and", args.html] if args.html else []))


if __name__ == "__main__":
    run_as_script(main)
