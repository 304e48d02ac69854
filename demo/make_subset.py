"""Cuts the balanced subset of Fashion-MNIST that the demo trains on, and packs it.

python demo/make_subset.py -idx /usr/share/datasets/fashion-mnist

The idx files are those of Debian's package dataset-fashion-mnist. The subset is a pure function of
them and the seed: this command gives the archive in this folder again, pixel by pixel.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from cli.errors import DataError, run_as_script
from cli.parser import Parser
from demo.fashion_mnist import CLASSES, Split, counts, fingerprint, read, write_archive

ARCHIVE = Path(__file__).with_name("fashion_mnist_subset.tar.xz")
PER_CLASS = {"train": 940, "val": 120}  # as many as fit into 4 MB
SEED = 0


def cut(split: Split, per_class: int, rng: np.random.Generator) -> Split:
    """``per_class`` images of each class in turn, in the original order; DataError for too few."""
    chosen = []
    for label, name in enumerate(CLASSES):
        members = np.flatnonzero(split.labels == label)
        if len(members) < per_class:
            raise DataError(f"class {name} has {len(members)} images, {per_class} are asked for")
        chosen += sorted(rng.permutation(members)[:per_class])
    return Split(split.images[chosen], split.labels[chosen])


def main() -> None:
    parser = Parser("Cuts the balanced subset of Fashion-MNIST that the demo trains on.")
    parser.flag("idx", "folder of the original idx files", metavar="DIR", required=True)
    parser.flag("output", f"archive (default: {ARCHIVE.name})", metavar="FILE", default=ARCHIVE)
    args = parser.parse_args()
    rng, full = np.random.default_rng(SEED), read(args.idx)
    subset = {name: cut(full[name], PER_CLASS[name], rng) for name in PER_CLASS}
    write_archive(subset, args.output)
    size = Path(args.output).stat().st_size
    print(f"{args.output}: {counts(subset)} images, {size:,} bytes, {fingerprint(subset)[:16]}")


if __name__ == "__main__":
    run_as_script(main)
