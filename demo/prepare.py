"""Lays Fashion-MNIST out as PNG files in the structure of ImageNet2012.

python demo/prepare.py -output demo/data                                # the bundled subset
python demo/prepare.py -idx /usr/share/datasets/fashion-mnist -output fmnist   # all of it

    OUTPUT/train/0_t_shirt_top/00000.png ...    OUTPUT/train_list.txt    `relative/path label`
    OUTPUT/val/0_t_shirt_top/00000.png ...      OUTPUT/val_list.txt
    OUTPUT/classes.txt                          the names of the classes

The folder appears whole or not at all, and is not made again while it holds the same images.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from cli.errors import DataError, run_as_script
from cli.parser import Parser
from demo.fashion_mnist import CLASSES, Split, counts, fingerprint, folder_name, read
from demo.make_subset import ARCHIVE

_MARK = ".fashion_mnist"  # in a folder that this script made: the fingerprint of its images


def prepare(splits: Mapping[str, Split], output: str | Path) -> bool:
    """Lays the splits out under ``output``; False if they were there already. Raises DataError
    where it holds something else or is not writable.
    """
    output, mark, found = Path(output), fingerprint(splits), None
    with contextlib.suppress(OSError):
        found = (output / _MARK).read_text()
    if found == mark:
        return False
    if found is None and output.exists() and (output.is_file() or any(output.iterdir())):
        raise DataError(f"{output}: exists, and was not made by this script; name another -output")
    draft = output.with_name(f"{output.name}.partial-{os.getpid()}")
    try:
        _write(splits, draft)
        (draft / _MARK).write_text(mark)
        if output.exists():
            shutil.rmtree(output)
        draft.rename(output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True


def _write(splits: Mapping[str, Split], folder: Path) -> None:
    for name, split in splits.items():
        for label in range(len(CLASSES)):
            (folder / name / folder_name(label)).mkdir(parents=True)
        lines = []
        for i, (pixels, label) in enumerate(zip(split.images, split.labels)):
            path = f"{name}/{folder_name(label)}/{i:05d}.png"
            Image.fromarray(pixels).save(folder / path)
            lines.append(f"{path} {label}\n")
        (folder / f"{name}_list.txt").write_text("".join(lines))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def main() -> None:
    parser = Parser("Lays Fashion-MNIST out as PNG files in the structure of ImageNet2012.")
    parser.flag("output", "folder to make", metavar="DIR", required=True)
    idx = "folder of the original idx files (default: the bundled subset)"
    parser.flag("idx", idx, metavar="DIR")
    args = parser.parse_args()
    splits = read(args.idx or ARCHIVE)
    made = prepare(splits, args.output)
    print(f"{args.output}: {counts(splits)} images" + ("" if made else " (there already)"))


if __name__ == "__main__":
    run_as_script(main)
