"""Trains with facebookresearch/deit's own main.py and with ours, seed by seed, and compares.

python tools/compare_deit.py -deit ../deit -deit_python ../torch/bin/python \
    -data_path demo/data -output output/deit

A small ResMLP on 56 pixels, on the CPU, one thread each. It fetches nothing: -deit is a clone of
facebookresearch/deit, -deit_python the Python of an environment with torch, torchvision and timm,
-data_path a folder with train/CLASS/ and val/CLASS/. Run it again to go on after an interruption,
or with more seeds: finished runs are only read. A comparison has an -output of its own.
The permutation test of two seeds and more is SciPy's.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

from cli.errors import UserError, run_as_script
from cli.parser import Parser
from loading.files import find_classes
from tools.common import ROOT, require, write_file
from training.plots import read_metrics

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


def deit_command(args, seed: int, folder: Path) -> list[str]:
    name, rate, decay, warmup = recipe(args)
    words = f"{DEIT} --opt {name} --lr {rate} --weight-decay {decay} --epochs {args.epochs} "
    words = f"{words} --warmup-epochs {warmup} --seed {seed}".split()
    words += [f"--data-path={args.data_path}", f"--output_dir={folder}"]
    if args.finetune:
        words += [f"--finetune={args.finetune}"]
    if args.teacher:
        words += ["--distillation-type=hard", "--teacher-model=resmlp_tiny"]
        words += [f"--teacher-path={args.teacher}"]
    script = str(ROOT / "tools" / "deit_main.py")
    return [args.deit_python, script, args.deit, str(args.outputs), *words]


def our_command(args, seed: int, folder: Path) -> list[str]:
    name, rate, decay, warmup = recipe(args)
    keys = (
        f"SEED {seed} TRAIN.OPTIMIZER.NAME {name} TRAIN.BASE_LR {rate} TRAIN.WEIGHT_DECAY {decay}"
    )
    keys = f"{keys} TRAIN.NUM_EPOCHS {args.epochs} TRAIN.WARMUP_EPOCHS {warmup}".split()
    if name != "lamb":
        keys += ["TRAIN.GRAD_CLIP", "null"]  # timm's LAMB clips by itself, its AdamW does not
    config, ported = f"{args.output}/config.yaml", f"{args.output}/ported.pdparams"
    if args.teacher:
        keys += ["TRAIN.DISTILLATION_TYPE", "hard", "TRAIN.TEACHER_MODEL", config]
        keys += ["TRAIN.TEACHER_PRETRAINED", ported]
    words = [f"-cfg={config}", f"-output={folder}", f"-data_path={args.output}", "-resume=auto"]
    words += [f"-pretrained={ported}"] if args.finetune else []
    return [sys.executable, "-c", OURS, str(ROOT), *words, "-opts", *keys]


def recipe(args) -> tuple:
    """Optimizer, rate for 512 images, weight decay, epochs of warmup."""
    return ("adamw", 0.002, 0.05, 0) if args.finetune else ("lamb", 0.02, 0.2, args.epochs // 5)


def run(words: list[str], folder: Path) -> list[int]:
    """Runs a command on one thread; returns its CPU time in seconds and peak memory in MB."""
    folder.mkdir(parents=True, exist_ok=True)
    print(folder, flush=True)
    with open(folder / "stdout.txt", "wb") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{folder}: the run failed; {folder / 'stdout.txt'} says why")
    return [round(usage.ru_utime + usage.ru_stime), round(usage.ru_maxrss / 1024)]


def last_epoch(folder: Path) -> tuple[float, float]:
    """Validation loss and top-1 after the last epoch of a run of either side."""
    if (folder / "metrics.jsonl").is_file():
        last = read_metrics(folder).epoch[-1]
        return last["val_loss"], last["val_top1"]
    last = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    return last["test_loss"], last["test_acc1"]


def compare(args) -> dict[str, list]:
    """DeiT or ours -> of each seed: loss, top-1, seconds, MB; trains what is not there yet."""
    output, data = Path(args.output), Path(args.data_path).resolve()
    write_file(output / "config.yaml", CONFIG.format(args.outputs))
    for split in ("train", "val"):  # DeiT's labels, for as many outputs as asked for
        folders = [data / split / name for name in find_classes(str(data))]
        lines = [f"{file} {i}\n" for i, f in enumerate(folders) for file in sorted(f.iterdir())]
        write_file(output / f"{split}_list.txt", "".join(lines))
    if weights := args.finetune or args.teacher:
        port = [sys.executable, str(ROOT / "port_weights" / "load_timm_weights.py"), "-key=model"]
        port += [f"-checkpoint={weights}", f"-output={output / 'ported.pdparams'}", "-proof=keys"]
        run(port, output)
    results: dict[str, list] = {"DeiT": [], "ours": []}
    for seed in range(args.seeds):
        for (name, runs), command in zip(results.items(), (deit_command, our_command)):
            folder = output / name / f"seed_{seed}"
            path = folder / "result.json"
            if not path.is_file():
                cost = run(command(args, seed, folder), folder)
                write_file(path, json.dumps([*last_epoch(folder), *cost]))
            runs.append(json.loads(path.read_text()))
    return results


def table(results: dict[str, list]) -> str:
    """Seed by seed; means with standard errors; what a permutation test says of the losses."""
    lines = ["| | seed | validation loss | top-1, % | CPU time, s | memory, MB |", "|---" * 6 + "|"]
    for name, runs in results.items():
        for seed, (loss, top1, *cost) in enumerate(runs):
            lines.append(f"| {name} | {seed} | {loss:.3f} | {top1:.1f} | {cost[0]} | {cost[1]} |")
        if len(runs) > 1:
            means = [(statistics.mean(x), statistics.stdev(x) / len(x) ** 0.5) for x in zip(*runs)]
            cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in means[:2]]
            lines.append(f"| {name} | mean | {cells[0]} | {cells[1]} | | |")
    if len(runs) > 1:
        from scipy.stats import permutation_test

        losses = [[loss for loss, *_ in runs] for runs in results.values()]
        test = permutation_test(losses, lambda a, b: np.mean(a) - np.mean(b), n_resamples=20_000)
        lines += ["", f"Permutation test of the two mean losses: p = {test.pvalue:.3f}"]
    return "\n".join(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.flag("deit", "clone of facebookresearch/deit", metavar="DIR", required=True)
    parser.flag("deit_python", "Python of its environment", metavar="FILE", required=True)
    parser.flag("data_path", "folder with train/ and val/", metavar="DIR", required=True)
    parser.flag("output", "folder of the runs", metavar="DIR", required=True)
    parser.flag("finetune", "checkpoint.pth of DeiT's to start from", metavar="FILE")
    parser.flag("teacher", "checkpoint.pth of DeiT's to distil from", metavar="FILE")
    parser.flag("outputs", "of the head; 1000 is what DeiT's main.py takes", type=int, default=10)
    parser.flag("epochs", "of each run", type=int, default=15)
    parser.flag("seeds", "runs of each side", type=int, default=8)
    args = parser.parse_args()
    require("the permutation test", ("scipy",))
    text = table(compare(args))
    write_file(Path(args.output, "results.md"), text + "\n")
    print(text)


if __name__ == "__main__":
    run_as_script(main)
