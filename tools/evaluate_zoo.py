"""Evaluates every published weight file of a folder; a table beside the published numbers.

python tools/evaluate_zoo.py -weights downloads -data_path /dataset/imagenet -output output/zoo \
    [-real real.json] [-v2 DIR] [-sketch DIR] [-a DIR] [-r DIR] [-nprocs N]

A file is known by its name, or that of its folder. Each set is evaluated as `main_multi_gpu.py
-eval` does. What an earlier call has measured is kept, unless file, data or options have changed.
Ends with 1 where a file cannot be used or an evaluation fails.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cli.errors import UserError, run_as_script
from cli.parser import Parser
from config import get_config
from datasets import build_dataset
from loading import archives
from port_weights.zoo import MEASURES, Weights, find
from storage.files import file_sha256
from tools.common import ROOT, markdown_table, write_file

SETS = ("val", "v2", "sketch", "a", "r")
SUFFIXES = (".pdparams", ".safetensors", ".pth", ".pt", ".bin")
_GENERIC = ("model", "pytorch_model")  # Hugging Face's files, in folders that have the name
_COLUMNS = ("weights", "file", "measure", "images", "here", "published", "difference", "explained")


def identify(path: Path) -> Weights | None:
    """The entry of the zoo that a file's name means; None: it means none."""
    names = [path.name, path.stem]
    if path.stem in _GENERIC:  # also .../models--timm--NAME/snapshots/HASH/model.safetensors
        names += [parent.name.rpartition("--")[2] for parent in path.parents]
    return next(filter(None, map(find, names)), None)


def find_files(folder: str) -> list[Path]:
    """The weight files under a folder, without those ported from one; UserError if none."""
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix in SUFFIXES and p.is_file())
    found = [path for path in found if path.with_suffix("") not in found]
    if not found:
        raise UserError(f"-weights {folder}: no weight files ({' '.join(SUFFIXES)}) in there")
    return found


def data_config(root: str, opts: list[str]):
    """The config of an evaluation on a set: its list file where it has one, else its folders."""
    config = get_config(opts=opts)
    listed = os.path.isfile(os.path.join(root, config.DATA.VAL_LIST))
    config.DATA.DATASET = "imagenet2012" if listed else "imagefolder"
    config.DATA.DATA_PATH, config.EVAL = root, True
    config.freeze()
    return config


def fingerprint(config) -> str:
    """Changes with the images of a set: their names, labels, sizes and times."""
    files, digest = build_dataset(config, "val").files, hashlib.sha256()
    for index in range(len(files)):
        path, about = files.path(index), None
        with suppress(OSError):  # the evaluation names it
            found = os.stat((archives.split(path) or [path])[0])
            about = found.st_size, found.st_mtime_ns
        digest.update(f"{files.name(index)} {files.labels[index]} {about}\n".encode())
    return digest.hexdigest()


def sha256(path: str | os.PathLike) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def evaluate_zoo(
    folder: str,
    output: str,
    data: dict[str, str],
    real: str | None = None,
    opts: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> list[str]:
    """Evaluates the weight files of a folder, and writes what is known after each of them.

    ``data`` maps a set of `SETS` to its folder; ``real`` is ``real.json``, None: without ReaL;
    ``opts`` and ``flags`` are for the main. Returns a line about each file that was not evaluated.
    """
    configs = {name: data_config(root, opts) for name, root in data.items()}
    options = [list(opts), "-amp" in flags, real and sha256(real)]
    prints = {name: f"{fingerprint(config)} {options}" for name, config in configs.items()}
    files = {p.relative_to(folder).as_posix().replace("/", "__"): p for p in find_files(folder)}
    before, problems = Path(output, "results.json"), []
    results = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
    results = {name: sets for name, sets in results.items() if name in files}
    for name, path in files.items():
        weights = identify(path)
        if weights is None:
            problems.append(f"{path}: the zoo (port_weights/zoo.py) has no such name")
            continue
        if weights.top5 is None:
            print(f"{path}: features without a head; its {weights.training} is {weights.top1} %")
            continue
        kept, digest = results.get(name, {}), sha256(path)
        keys = {s: f"{digest} {text}".encode() for s, text in prints.items()}
        keys = {s: hashlib.sha256(key).hexdigest() for s, key in keys.items()}
        results[name] = found = {s: kept[s] for s in keys if kept.get(s, {}).get("key") == keys[s]}
        for s in [s for s in keys if s not in found]:
            print(f"{name}: {s}", flush=True)
            place = Path(output, name, s)
            set_opts = [*opts, *(["EVAL_REAL_LABELS", real] if real and s == "val" else [])]
            command = [sys.executable, str(ROOT / "main_multi_gpu.py"), "-eval", *flags]
            command += [f"-cfg={ROOT / 'configs' / weights.config}.yaml", f"-pretrained={path}"]
            command += [f"-output={place}", f"-dataset={configs[s].DATA.DATASET}"]
            command += [f"-data_path={data[s]}", *(["-opts", *set_opts] if set_opts else [])]
            if code := subprocess.run(command).returncode:
                problems.append(f"{path}: its evaluation on {s} ended with exit code {code}")
                break
            scores = json.loads((place / "eval.json").read_text(encoding="utf-8"))
            found[s] = {"key": keys[s], "weights": weights.name, "scores": scores}
        write_results(output, results, problems)
    print(write_results(output, results, problems), flush=True)
    return problems


def write_results(output: str, results: dict[str, dict], problems: Sequence[str]) -> str:
    """Writes results.json, results.csv and results.md; returns the last one's text."""
    rows, table = table_rows(results), io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([_COLUMNS, *rows])
    spreads = ", ".join(f"{m.title} {m.spread}" for m in MEASURES.values())
    lines = [
        markdown_table(_COLUMNS, rows),
        "",
        "All in percent. A difference is explained, by rounding and JPEG decoders, if it",
        "is at most what timm's own results of such a file changed by between releases:",
        f"{spreads}.",
        *(f"\nNot evaluated: {problem}" for problem in problems),
    ]
    text = "\n".join(lines) + "\n"
    write_file(Path(output, "results.json"), json.dumps(results, indent=1) + "\n")
    write_file(Path(output, "results.csv"), table.getvalue())
    write_file(Path(output, "results.md"), text)
    return text


def table_rows(results: dict[str, dict]) -> list[list]:
    """A row for each file and measure, its cells as `_COLUMNS`; ``results`` by file and set."""
    rows = []
    for name, sets in results.items():
        for measure, facts in MEASURES.items():
            scores = sets[facts.data]["scores"] if facts.data in sets else {}
            if facts.key not in scores:
                continue
            weights, here = sets[facts.data]["weights"], scores[facts.key]
            images = scores["real_images" if measure == "real" else "images"]
            published, shown, difference, explained = find(weights).published(measure), "", "", ""
            if published is not None:
                shown, difference = f"{published:.3f}", f"{here - published:+.3f}"
                explained = "yes" if abs(here - published) < facts.spread + 5e-4 else "no"
            if images != facts.images:
                explained = f"other images ({facts.images} published)"
            cells = weights, name, facts.title, images, f"{here:.3f}", shown, difference
            rows.append((*cells, explained))
    return rows


def main() -> int:
    parser = Parser(__doc__)
    parser.flag("weights", "folder of weight files, with those in it", metavar="DIR", required=True)
    parser.flag("data_path", "ImageNet's validation set", metavar="DIR", dest="val")
    parser.flag("real", "ImageNet-ReaL's real.json", metavar="FILE")
    for name, title in zip(SETS[1:], ("V2", "Sketch", "A", "R")):
        parser.flag(name, f"ImageNet-{title}", metavar="DIR")
    parser.flag("output", "folder of the results", metavar="DIR", default="output/zoo")
    processes = "processes; 0: one a GPU, or one on CPU"
    parser.flag("nprocs", processes, type=int, metavar="N", default=0)
    parser.flag("batch_size", "images per process and step", type=int, metavar="N", default=64)
    parser.flag("amp", "mixed precision", action="store_true")
    parser.opts_flag("config keys of all evaluations")
    args = parser.parse_args()
    data = {name: root for name in SETS if (root := getattr(args, name))}
    if not data or (args.real and not args.val):
        raise UserError("name a set: -data_path (and with it -real), -v2, -sketch, -a or -r")
    flags = [f"-nprocs={args.nprocs}", f"-batch_size={args.batch_size}"] + ["-amp"] * args.amp
    problems = evaluate_zoo(args.weights, args.output, data, args.real, args.opts, flags)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    run_as_script(main)
