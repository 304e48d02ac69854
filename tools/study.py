"""Trains variants of a config over several seeds; prints mean and spread as a table.

python tools/study.py configs/studies/ablation.yaml -cfg configs/resmlp_12_224.yaml \
    -data_path /dataset/imagenet -output output/ablation -seeds 3

The study file maps a variant's name to the config keys that it changes. Run the command again to go
on after an interruption: finished runs are only read, and runs of other settings are refused.
Accuracies are those after the last epoch, of the EMA where there is one.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import re
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from cli.errors import ConfigError, UserError, run_as_script
from cli.parser import Parser
from config import get_arguments, get_config, update_config
from storage.checkpoints import config_changes
from storage.files import shorten
from tools.common import ROOT, markdown_table, write_file
from training.plots import is_number, read_metrics


class _Texts(yaml.BaseLoader):
    """Leaves values the texts that they are, for -opts; refuses a name that is given twice."""

    def construct_mapping(self, node, deep=False):
        names = [str(key.value) for key, _ in node.value]
        for key, _ in reversed(node.value):
            if names.count(str(key.value)) > 1:
                twice = f"{key.value} is given twice"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_study(path: str) -> dict[str, list[str]]:
    """Reads a study: name -> ``[KEY, VALUE, ...]``; the first variant is what others are held to.
    Raises ConfigError for anything else, or two variants with the same folder.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Texts)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: cannot be read as YAML: {reason}") from None
    if type(content) is not dict or {*map(type, content.values())} - {dict}:
        raise ConfigError(f"{path}: expected `variant: {{KEY: value, ...}}` lines")
    folders = {}
    for name in content:
        folder = _folder(name)
        if folder in folders:
            both = f"{folders[folder]!r} and {name!r} would share the folder {folder}"
            raise ConfigError(f"{path}: {both}; rename one of them")
        folders[folder] = name
    return {name: [str(x) for pair in keys.items() for x in pair] for name, keys in content.items()}


def _folder(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")


def run_study(
    study: dict[str, list[str]], arguments: list[str], output: str, seeds: int, main: str
) -> dict[str, list[float]]:
    """Trains every variant with every seed by a main script, into ``output/<variant>/seed_<n>``.

    Returns for each variant the top-1 of its runs after the last epoch, percent. Raises UserError:
    a run failed, left no accuracy, or was begun with other settings.
    """
    results: dict[str, list[float]] = {name: [] for name in study}
    for seed in range(seeds):  # a first column of results comes early
        for name, opts in study.items():
            folder = Path(output) / _folder(name) / f"seed_{seed}"
            words = [*arguments, f"-output={folder}", "-resume=auto", "-opts", *opts]
            words += ["SEED", str(seed)]
            if (folder / "config.yaml").is_file():
                refuse_other_settings(folder, words)
            command = [sys.executable, str(ROOT / main), *words]
            print(f"$ {' '.join(command)}", flush=True)
            if code := subprocess.run(command).returncode:
                raise UserError(f"{name}, seed {seed}: the run ended with exit code {code}")
            results[name].append(last_top1(folder))
    return results


def refuse_other_settings(folder: Path, words: list[str]) -> None:
    """Raises a `UserError` where a run was begun with other settings than those of a command."""
    config = update_config(get_config(), get_arguments(words))
    before = (folder / "config.yaml").read_text(encoding="utf-8")
    changes = config_changes(before, config.dump())
    # What the run resolved, and keys that a release added or left out, are no other settings.
    changes = [c for c in changes if not c.endswith(" -> auto") and "(none)" not in c]
    if changes:
        changed = f"{folder} was run with other settings ({shorten(changes, 3)})"
        raise UserError(f"{changed}: remove that folder, or name another -output")


def last_top1(folder: Path) -> float:
    last = (read_metrics(folder).epoch or [{}])[-1]
    top1 = last.get("ema_top1", last.get("val_top1"))
    if not is_number(top1):
        raise UserError(f"{folder}: the run has no top-1 of its last epoch in metrics.jsonl")
    return top1


def table(results: dict[str, list[float]]) -> str:
    """The results as a Markdown table: mean, sample standard deviation, difference to the first."""
    rows, baseline = [], None
    for name, values in results.items():
        mean = statistics.mean(values)
        baseline = mean if baseline is None else baseline
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        change = f"{mean - baseline:+.2f}" if rows else ""
        rows.append((name, f"{mean:.2f}{spread}", change, len(values)))
    return markdown_table(("variant", "top-1, %", "difference", "seeds"), rows)


def main() -> None:
    parser = Parser(__doc__)
    parser.paths("study", "YAML file: variant -> config keys")
    parser.flag("cfg", "YAML config of all variants", metavar="FILE", required=True)
    parser.flag("data_path", "data folder", metavar="DIR", required=True)
    parser.flag("output", "folder of the runs", metavar="DIR", required=True)
    parser.flag("seeds", "runs of each variant", type=int, default=3)
    parser.opts_flag("config keys for all variants")
    parser.flag("multi", "train with main_multi_gpu.py", action="store_true")
    args = parser.parse_args()
    if args.seeds < 1:
        raise UserError(f"-seeds is {args.seeds}; expected at least 1")
    study = {name: args.opts + opts for name, opts in read_study(args.study).items()}
    arguments = [f"-cfg={args.cfg}", f"-data_path={args.data_path}"]
    main = "main_multi_gpu.py" if args.multi else "main_single_gpu.py"
    text = table(run_study(study, arguments, args.output, args.seeds, main))
    write_file(Path(args.output) / "results.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_as_script(main)
