"""The picture in the README, "How the code is laid out": imports run downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [  # a module imports only from levels above its own line
    ["cli.errors", "cli.ppvit_defaults", "cpu.setup", "cpu.resample_kernels", "loading.imagenet"],
    ["storage.safe_pickle", "cli.config_rules", "cli.parser", "loading.samplers", "cpu.resample"],
    ["cpu.onednn", "loading.archives", "training.pictures"],
    ["loading.files", "parallel.rendezvous"],
    ["config", "storage.weights", "training.dashboard", "augment", "parallel.process"],
    [
        "training.eval_report",
        "loading.real_labels",
        "utils",
        "cpu.ops",
        "loading.loader",
        "transforms",
        "storage.adapt",
    ],
    ["resmlp", "storage.checkpoints", "datasets", "mixup"],
    ["storage.run_folder", "random_erasing", "losses", "optimizer", "model_ema"],
    [
        "distillation",
        "training.evaluation",
        "batch_augment",
        "training.progress",
        "training.ppvit_checkpoint",
    ],
    ["training.learner", "training.saving"],
    ["training.report", "training.eval_run"],
    ["engine"],
    ["launch"],
    ["main_single_gpu", "main_multi_gpu", "hubconf"],
]
TOP = ("tools", "port_weights", "demo")  # scripts: they may import anything but a main
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
FOLDERS = ("cli", "cpu", "loading", "parallel", "storage", "training")
PATHS = [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in PATHS
    if path.name != "__init__.py"
)


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def imports(path):
    """The modules that a file imports, dotted; of a folder of ours, what is taken from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if node.module in FOLDERS:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_module_has_a_place_in_the_picture():
    assert set(MODULES) == set(LEVEL_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    found = set(imports(path_of(module)))
    wrong = {name for name in found & set(LEVEL_OF) if LEVEL_OF[name] >= LEVEL_OF[module]}
    assert not wrong
    if module not in ("launch", "main_single_gpu", "main_multi_gpu", "hubconf"):
        assert not {name.split(".")[0] for name in found} & {*TOP}
        if module != "distillation":  # a teacher's YAML is another config
            assert "config" not in found


@pytest.mark.parametrize("folder", TOP)
def test_nobody_imports_a_main(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert not {"main_single_gpu", "main_multi_gpu"} & set(imports(path)), path


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "cli.errors",
        "cpu.setup",
        "loading.samplers",
        "loading.files",
        "storage.weights",
    ],
)
def test_modules_that_promise_it_import_no_paddle(module):
    assert not any(name.startswith("paddle") for name in imports(path_of(module)))


def _import_after(preparation):
    code = f"import sys, types\nROOT = {str(ROOT)!r}\n{preparation}\nimport resmlp"
    words = [sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, text=True, cwd="/").stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["datasets", "utils", "config", "storage"])
def test_another_module_of_a_name_of_ours_that_was_imported_is_told_in_one_line(name):
    said = _import_after(
        f"sys.modules[{name!r}] = types.ModuleType({name!r}); sys.path[:0] = [ROOT]"
    )
    assert said.startswith(f"ImportError: another module named {name} ")
    assert said.endswith("was imported already; run ours in a process of its own")


def test_another_module_that_would_be_found_first_is_told_in_one_line(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").touch()
    said = _import_after(f"sys.path[:0] = [{str(tmp_path)!r}, ROOT]")
    assert said.startswith(f"ImportError: another module named datasets ({tmp_path}")
    assert said.endswith(f"begin with sys.path.insert(0, {str(ROOT)!r})")
