"""The picture in the README, "How the code is laid out": imports run downwards only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [  # a module imports only from levels above its own line
    ["errors", "runtime", "pixel_kernels"],
    ["safe_pickle", "config_rules", "samplers", "pixels", "images", "rendezvous"],
    ["config", "weights", "dashboard", "auto_augment"],
    ["utils", "cpu_ops", "loader", "transforms"],
    ["resmlp", "checkpoint", "datasets", "mixup"],
    ["folding", "run_folder", "random_erasing", "losses", "optimizer", "model_ema"],
    ["distillation", "evaluation", "batch_augment", "step_watch"],
    ["engine"],
    ["launch"],
    ["main_single_gpu", "main_multi_gpu", "hubconf"],
]
TOP = ("tools", "port_weights", "demo")  # scripts: they may import anything but a main
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_every_module_has_a_place_in_the_picture():
    assert set(MODULES) == set(LEVEL_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    found = set(imports(ROOT / f"{module}.py"))
    wrong = {name for name in found & set(LEVEL_OF) if LEVEL_OF[name] >= LEVEL_OF[module]}
    assert not wrong
    if module not in ("launch", "main_single_gpu", "main_multi_gpu", "hubconf"):
        assert not found & {*TOP, "config"} - {module}


@pytest.mark.parametrize("folder", TOP)
def test_nobody_imports_a_main(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert not {"main_single_gpu", "main_multi_gpu"} & set(imports(path)), path


@pytest.mark.parametrize("module", ["config", "errors", "runtime", "samplers", "images", "weights"])
def test_modules_that_promise_it_import_no_paddle(module):
    assert "paddle" not in set(imports(ROOT / f"{module}.py"))
