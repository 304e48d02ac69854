"""The picture in docs/architecture.md: imports run downwards only."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("cli", "cpu", "demo", "loading", "parallel", "port_weights")
FOLDERS += ("storage", "tools", "training")
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def levels():
    """Lines of the picture, the lowest first: ``folder/ module module  # what they do``."""
    picture = re.search("```text\n(.*?)```", PAGE, re.DOTALL).group(1)
    for line in reversed(picture.splitlines()):
        names = line.partition("#")[0].split()
        folder = names.pop(0)[:-1] + "." if names[0].endswith("/") else ""
        yield [folder + name for name in names]


def parse(path):
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


LEVEL_OF = {name: level for level, names in enumerate(levels()) for name in names}
PATHS = [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))]
NODES = {  # module -> what its file holds
    ".".join(path.relative_to(ROOT).with_suffix("").parts): parse(path)
    for path in sorted(PATHS)
    if path.name != "__init__.py"
}
each_module = pytest.mark.parametrize("module", NODES)


def imports(module):
    """The modules that a file imports, dotted; of a folder of ours, what is taken from it."""
    found = set()
    for node in NODES[module]:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside if node.module in FOLDERS else {node.module}
    return found


def test_every_module_has_a_place_in_the_picture():
    assert NODES.keys() == LEVEL_OF.keys()


@each_module
def test_imports_run_downwards(module):
    found = imports(module) & LEVEL_OF.keys()
    assert not {name for name in found if LEVEL_OF[name] >= LEVEL_OF[module]}


def test_the_config_is_an_argument():
    """Only what begins something resolves one; distillation: a teacher's YAML is another config."""
    beginnings = ("main_single_gpu", "main_multi_gpu", "hubconf", "distillation")
    for module in NODES:
        if not module.startswith(("tools.", "port_weights.")) and module not in beginnings:
            assert "config" not in imports(module), module


def test_the_config_files_and_the_pipelines_of_images_need_no_paddle():
    modules = "config, cli.errors, cpu.setup, storage.weights, transforms, loading.samplers, "
    modules += "loading.classes, loading.files, loading.images"
    code = f"import sys, {modules}; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_files_of_the_page_are_there_and_hold_what_it_names():
    walks = PAGE[PAGE.index("## Four walks") :]
    assert len(re.findall(r"^1\.", walks, re.MULTILINE)) == 8
    assert not re.search(r"^11\.", walks, re.MULTILINE)  # at most ten lines each
    for line in walks.splitlines():
        paths = re.findall(r"`([a-z_/]+\.py|[a-z]+/)`", line)
        assert all((ROOT / path).exists() for path in paths), line
        text = "".join((ROOT / p).read_text(encoding="utf-8") for p in paths if p[-1] != "/")
        named = re.findall(r"(?<=`)_?[A-Za-z]\w+(?=`)", line) if text else ()
        assert all(re.search(rf"\b{name}\b", text) for name in named), line


def id_of(node):
    return getattr(node, "id", "")


@each_module
def test_nothing_breaks_under_oo(module):
    """`python -OO` leaves docstrings and assertions out: `__doc__` is None."""
    for node in NODES[module]:
        if isinstance(node, ast.Assert):
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            assert {id_of(call.func) for call in calls} <= {"len", "isinstance"}
        elif isinstance(node, (ast.Attribute, ast.Subscript)):
            assert id_of(node.value) != "__doc__"


FIRST = """
import importlib, os, runpy, sys
import multiprocessing.shared_memory, numpy.random, pickletools, concurrent.futures, PIL.ImageOps
import tarfile, urllib.request, yacs.config  # only to be quick
class Watch:
    def find_spec(name, path=None, target=None):
        if name == "paddle":
            os._exit("cpu.setup" not in sys.modules)
sys.meta_path.insert(0, Watch)
for what in sys.argv[1:]:
    if os.fork() == 0:
        script = what.endswith(".py")
        sys.path.insert(0, os.path.dirname(what) if script else os.getcwd())
        try:
            (runpy.run_path if script else importlib.import_module)(what)
        except ModuleNotFoundError as error:
            os._exit(error.name != "onnx")  # the tests' second environment has none
        os._exit(0)
    if os.wait()[1]:
        print(what)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each module")
def test_whatever_is_imported_first_prepares_the_process_before_paddle():
    """As a module, and as the script that a tool is."""
    tools = [str(p) for p in PATHS if p.parent.name == "tools" and "import _root" in p.read_text()]
    words = [sys.executable, "-c", FIRST, *NODES, *tools]
    found = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (found.returncode, found.stdout) == (0, ""), found.stderr


@pytest.mark.parametrize("name", ["datasets", ""])
def test_another_module_of_a_name_of_ours_is_told_in_one_line(tmp_path, name):
    """It was imported already or, where no name is given here, would be found first."""
    if name:
        before = (
            f"sys.modules[{name!r}] = types.ModuleType({name!r}); sys.path[:0] = [{str(ROOT)!r}]"
        )
        start, end = f"{name} ", "was imported already; run ours in a process of its own"
    else:
        (tmp_path / "datasets").mkdir()
        (tmp_path / "datasets" / "__init__.py").touch()
        before = f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]"
        start, end = f"datasets ({tmp_path}", f"begin with sys.path.insert(0, {str(ROOT)!r})"
    words = [sys.executable, "-c", f"import sys, types\n{before}\nimport resmlp"]
    said = subprocess.run(words, capture_output=True, text=True, cwd="/").stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: another module named {start}") and said.endswith(end)


OURS = {*FOLDERS, *(name for name in NODES if "." not in name)}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.name)
def test_tests_use_no_private_names_of_modules(path):
    nodes, taken = parse(path), []
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            taken += [a for a in node.names if (module or a.name).split(".")[0] in OURS]
    modules = {alias.asname or alias.name for alias in taken}
    names = [alias.name for alias in taken]
    names += [n.attr for n in nodes if isinstance(n, ast.Attribute) and id_of(n.value) in modules]
    assert not [name for name in names if re.match("_[^_]", name)]
