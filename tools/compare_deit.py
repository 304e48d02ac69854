"""Trains with facebookresearch/deit's own main.py and with ours, seed by seed, and compares.

python tools/compare_deit.py -deit ../deit -deit_python ../torch/bin/python \
    -data_path demo/data -output output/deit

A small ResMLP on 56 pixels, on the CPU, one thread each. It fetches nothing: -deit is a clone of
facebookresearch/deit, -deit_python the Python of an environment with torch, torchvision and timm,
-data_path a folder with train/CLASS/ and val/CLASS/ (demo/prepare.py makes one). Run it again to go
on after an interruption, or with more seeds: finished runs are only read. It leaves results.md,
results.png and the folder of each run.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import itertools
import json
import os
import statistics
import subprocess
import sys
from math import comb
from pathlib import Path

import numpy as np

from cli.errors import UserError, run_as_script
from cli.parser import Parser
from loading.files import find_classes
from tools.common import write_file
from training.pictures import new_figure, render
from training.plots import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DEIT = "--device cpu --model resmlp_tiny --input-size 56 --batch-size 100 --num_workers 1 "
DEIT += "--no-repeated-aug --no-model-ema --drop-path 0.05 --cooldown-epochs 0 --data-set IMNET"
CONFIG = """
DATA: {{IMAGE_SIZE: 56, BATCH_SIZE: 100, NUM_WORKERS: 1, ALLOW_OUTSIDE_PATHS: True}}
MODEL: {{NUM_CLASSES: {}, DROPPATH: 0.05,
        MIXER: {{PATCH_SIZE: 14, EMBED_DIM: 128, DEPTH: 4, LAYER_SCALE_INIT: 0.1}}}}
TRAIN: {{LINEAR_SCALED_LR: 512, REPEATED_AUG: 1}}
"""
# DeiT's main.py moves the schedule after an epoch: the first two have the first rate.
OURS = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import optimizer
optimizer.Schedule.rate = lambda self, epoch, step: optimizer.learning_rate(
    self.config, max(epoch - 1, 0), self.samples_per_step)
runpy.run_path(sys.path[0] + "/main_single_gpu.py", run_name="__main__")
"""


class Comparison:
    """One study; ``args`` are those of the command line."""

    def __init__(self, args):
        self.args, self.folder = args, Path(args.output, f"{args.study}_{args.outputs}")
        finetune = args.study == "finetune"
        self.optimizer = ("adamw", 0.002, 0.05) if finetune else ("lamb", 0.02, 0.2)  # rate, decay
        self.warmup = 0 if finetune else args.epochs // 5  # epochs

    def run(self) -> dict[str, list[dict]]:
        """Row -> the result of each seed."""
        config, data = self.folder / "config.yaml", Path(self.args.data_path).resolve()
        write_file(config, CONFIG.format(self.args.outputs))
        for split in ("train", "val"):  # DeiT's labels, for as many outputs as asked for
            folders = [data / split / name for name in find_classes(str(data))]
            lines = [f"{file} {i}\n" for i, f in enumerate(folders) for file in sorted(f.iterdir())]
            write_file(self.folder / "lists" / f"{split}_list.txt", "".join(lines))
        rows = {"DeiT": (self._deit, read_log), "ours": (self._ours, read_run)}
        results: dict[str, list[dict]] = {name: [] for name in rows}
        for seed in range(self.args.seeds):
            for name, (command, read) in rows.items():
                folder = self.folder / name / f"seed_{seed}"
                path = folder / "result.json"
                if not path.is_file():
                    seconds, memory = run(command(seed, folder), folder, f"{name}, seed {seed}")
                    result = read(folder) | {"seconds": round(seconds), "mb": round(memory)}
                    write_file(path, json.dumps(result))
                results[name].append(json.loads(path.read_text()))
        return results

    def _deit(self, seed: int, folder: Path) -> list[str]:
        args, (name, rate, decay) = self.args, self.optimizer
        more = f"--opt {name} --lr {rate} --weight-decay {decay} --epochs {args.epochs} "
        more += f"--warmup-epochs {self.warmup} --seed {seed}"
        (folder / "log.txt").unlink(missing_ok=True)  # of a run that was broken off
        words = [args.deit_python, str(ROOT / "tools" / "deit_main.py"), args.deit]
        words += [str(args.outputs), *f"{DEIT} {more}".split(), f"--data-path={args.data_path}"]
        if args.study == "finetune":
            words += [f"--finetune={args.weights}"]
        elif args.study == "distillation":
            words += ["--distillation-type=hard", "--teacher-model=resmlp_tiny"]
            words += [f"--teacher-path={args.weights}"]
        return [*words, f"--output_dir={folder}"]

    def _ours(self, seed: int, folder: Path) -> list[str]:
        args, (name, rate, decay) = self.args, self.optimizer
        keys = f"SEED {seed} TRAIN.OPTIMIZER.NAME {name} TRAIN.BASE_LR {rate} "
        keys += f"TRAIN.WEIGHT_DECAY {decay} TRAIN.NUM_EPOCHS {args.epochs} "
        keys += f"TRAIN.WARMUP_EPOCHS {self.warmup}"
        keys += " TRAIN.GRAD_CLIP null" if name != "lamb" else ""  # timm's LAMB clips by itself
        config = str(self.folder / "config.yaml")
        words = [sys.executable, "-c", OURS, str(ROOT), f"-cfg={config}", f"-output={folder}"]
        words += [f"-data_path={self.folder / 'lists'}", "-resume=auto"]
        if args.weights:
            ported = folder / "ported.pdparams"
            port = [sys.executable, str(ROOT / "port_weights" / "load_timm_weights.py")]
            port += [f"-checkpoint={args.weights}", f"-output={ported}", "-key=model"]
            run([*port, "-proof=keys"], folder, "weights for Paddle")
            if args.study == "distillation":
                keys += f" TRAIN.DISTILLATION_TYPE hard TRAIN.TEACHER_MODEL {config}"
                keys += f" TRAIN.TEACHER_PRETRAINED {ported}"
            else:
                words += [f"-pretrained={ported}"]
        return [*words, "-opts", *keys.split()]


def run(words: list[str], folder: Path, name: str) -> tuple[float, float]:
    """Runs a command on one thread; returns its CPU time in seconds and peak memory in MB.

    Raises:
        UserError: it failed; what it printed is in ``stdout.txt``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {folder}", flush=True)
    with open(folder / "stdout.txt", "wb") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{name}: the run failed; {folder / 'stdout.txt'} says why")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def read_log(folder: Path) -> dict:
    """Validation losses and accuracies by epoch, of a run of DeiT's main.py."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return {"loss": [line["test_loss"] for line in lines], "top1": [x["test_acc1"] for x in lines]}


def read_run(folder: Path) -> dict:
    """The same of a run of ours."""
    epochs = read_metrics(folder).epoch
    return {"loss": [x["val_loss"] for x in epochs], "top1": [x["val_top1"] for x in epochs]}


def permutation_test(a: list[float], b: list[float], draws: int = 20_000) -> float:
    """How often means differ as much when the values are dealt out anew: two-sided p.

    All deals are tried where there are at most ``draws``.
    """
    values, n = np.array([*a, *b]), len(a)
    if comb(len(values), n) <= draws:
        deals = np.array(list(itertools.combinations(range(len(values)), n)))
    else:
        rng = np.random.default_rng(0)
        deals = np.array([rng.permutation(len(values))[:n] for _ in range(draws)])
    first = values[deals].sum(axis=1)
    gaps = np.abs(first / n - (values.sum() - first) / len(b))
    return float(np.mean(gaps >= abs(np.mean(a) - np.mean(b)) - 1e-12))


def table(results: dict[str, list[dict]]) -> str:
    """Seed by seed, means with standard errors, and what a permutation test says of the losses."""
    lines = ["| | seed | validation loss | top-1, % | CPU time, s | memory, MB |", "|---" * 6 + "|"]
    reference = None
    for name, runs in results.items():
        losses, top1 = ([run[key][-1] for run in runs] for key in ("loss", "top1"))
        for seed, run in enumerate(runs):
            cells = f"{losses[seed]:.3f} | {top1[seed]:.1f} | {run['seconds']} | {run['mb']}"
            lines.append(f"| {name} | {seed} | {cells} |")
        if len(runs) > 1:
            lines.append(f"| **{name}** | mean | {mean(losses, 3)} | {mean(top1, 1)} | | |")
        reference = reference or losses
        if losses is not reference:
            gap, p = np.mean(losses) - np.mean(reference), permutation_test(reference, losses)
            lines.append(f"| **{name}** | against DeiT | {gap:+.3f}, p = {p:.2f} | | | |")
    return "\n".join(lines)


def mean(values: list[float], digits: int) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def picture(results: dict[str, list[dict]]) -> bytes:
    """Validation loss by epoch, a line for each run; and after the last, a dot for each."""
    figure = new_figure(11, 4, layout="constrained")
    curves, dots = figure.subplots(1, 2, width_ratios=(3, 2))
    for row, runs in enumerate(results.values()):
        for run in runs:
            epochs = range(1, len(run["loss"]) + 1)
            curves.plot(epochs, run["loss"], color=f"C{row}", alpha=0.6)
        losses = [run["loss"][-1] for run in runs]
        dots.plot(losses, [row] * len(runs), "o", color=f"C{row}", alpha=0.6)
        dots.plot(np.mean(losses), row, "|", color="black", markersize=20)
    curves.set(xlabel="epoch", ylabel="validation loss, nats", title="Every run")
    dots.set(xlabel="validation loss, nats", title="After the last epoch, and the mean")
    dots.set_yticks(range(len(results)), list(results))
    dots.set_ylim(len(results) - 0.5, -0.5)
    return render(figure)


def main() -> None:
    parser = Parser(__doc__)
    parser.flag("deit", "clone of facebookresearch/deit", metavar="DIR", required=True)
    parser.flag("deit_python", "Python of its environment", metavar="FILE", required=True)
    parser.flag("data_path", "folder with train/ and val/", metavar="DIR", required=True)
    parser.flag("output", "folder of the runs", metavar="DIR", required=True)
    studies = ("scratch", "finetune", "distillation")
    parser.flag("study", "what is compared", choices=studies, default=studies[0])
    help = "for finetune, or the teacher: checkpoint.pth of a run of DeiT's"
    parser.flag("weights", help, metavar="FILE")
    parser.flag("outputs", "of the head; 1000 is what DeiT's main.py takes", type=int, default=10)
    parser.flag("epochs", "of each run", type=int, default=15)
    parser.flag("seeds", "runs of each row", type=int, default=8)
    args = parser.parse_args()
    if not Path(args.deit, "resmlp_models.py").is_file():
        raise UserError(
            f"-deit {args.deit}: no resmlp_models.py; clone facebookresearch/deit there"
        )
    if (args.study == "scratch") == bool(args.weights):
        raise UserError("-weights: finetune and distillation need it, and they alone")
    comparison = Comparison(args)
    results = comparison.run()
    text = table(results)
    write_file(comparison.folder / "results.md", text + "\n")
    write_file(comparison.folder / "results.png", picture(results))
    print(text)


if __name__ == "__main__":
    run_as_script(main)
