"""Draws the curves of one or several training runs from their ``metrics.jsonl``: PNG and HTML.

python tools/plot_metrics.py output/first output/second -output curves.png -html curves.html
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

from pathlib import Path
from statistics import median

from cli.errors import run_as_script
from cli.parser import Parser
from tools.common import html_page, html_table, write_file
from training.pictures import render
from training.plots import Run, draw_curves, is_number, read_metrics

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
    losses = [last("train_loss"), last("val_loss")]
    return [run.name, epochs, *losses, best("val_top1"), best("ema_top1"), speed]


def main() -> None:
    parser = Parser("Curves of training runs, from their metrics.jsonl.")
    parser.paths("runs", "folders of runs", nargs="+", metavar="DIR")
    parser.flag("output", "picture (default: curves.png in the first run)", metavar="FILE")
    parser.flag("html", "also a self-contained HTML page", metavar="FILE")
    args = parser.parse_args()
    output = args.output or Path(args.runs[0]) / "curves.png"
    runs = [read_metrics(folder) for folder in args.runs]
    figure = draw_curves(runs)
    write_file(output, render(figure))
    if args.html:
        svg = render(figure, "svg").decode("utf-8")
        table = html_table(_HEADER, map(_summary, runs))
        title = f"Training run{'s' * (len(runs) > 1)} {', '.join(run.name for run in runs)}"
        sections = [("Results", table), ("Curves", svg[svg.index("<svg") :])]
        write_file(args.html, html_page(title, sections))
    print("wrote", output, *(["and", args.html] if args.html else []))


if __name__ == "__main__":
    run_as_script(main)
