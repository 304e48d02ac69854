"""Draws speed.png and deit.png from the tables of docs/performance.md and docs/results.md."""

from pathlib import Path

import matplotlib.pyplot as plt

PICTURES = Path(__file__).parent
COLORS = "#0072b2", "#d55e00", "#009e73"


def rows_under(page: str, title: str, columns: int) -> list[list[str]]:
    """Cells of the tables with so many columns in the section of a page, without their heads."""
    section = PICTURES.parent.joinpath(page).read_text("utf-8").split(f"# {title}\n")[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| ")]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == columns and any(row[1:]) and row[1] != "seed"]


def draw_speed() -> None:
    rows = [r for r in rows_under("performance.md", "Performance", 7) if r[1] != "batch"][::-1]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, name in enumerate(("OpenVINO", "PyTorch's best form", "ours")):
        values = [float(row[5 - number] or 0) for row in rows]
        places = [place + 0.27 * (number - 1) for place in range(len(rows))]
        axes.barh(places, values, 0.25, label=name, color=COLORS[2 - number])
    axes.set_yticks(
        range(len(rows)), [f"{r[0].replace('`', '')}\nbatch {r[1]}, {r[2]}" for r in rows]
    )
    axes.set(title="resmlp_12 at 224 pixels on two cores", xlabel="images/s")
    save(figure, axes, "speed.png")


def draw_deit() -> None:
    rows = rows_under("results.md", "DeiT's own training beside ours", 10)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    names = list(dict.fromkeys(row[0] for row in rows))
    for number, (column, name) in enumerate(((2, "DeiT's main.py"), (6, "ours"))):
        points = [
            (float(r[column]), names.index(r[0]) + 0.2 * number)
            for r in rows
            if r[1].isdigit() and r[column]
        ]
        axes.plot(*zip(*points), "o", alpha=0.6, label=name, color=COLORS[1 - number])
    axes.set_yticks([n + 0.1 for n in range(len(names))], names)
    axes.invert_yaxis()
    axes.set(title="Validation loss after the last epoch, a dot a seed", xlabel="loss")
    save(figure, axes, "deit.png")


def save(figure, axes, name: str) -> None:
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.set(edgecolor="#8c959f", linewidth=2)  # a frame, on light pages and dark ones
    figure.savefig(PICTURES / name, dpi=100)


if __name__ == "__main__":
    draw_speed()
    draw_deit()
