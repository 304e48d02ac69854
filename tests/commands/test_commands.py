"""Every command of README.md and docs/*.md is run, in the order of its page, in a clone of its own
with the stand-ins of `stand_ins.py`; `tables.py` says what is made small or not run.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from tests.helpers import runs

from . import stand_ins, tables
from .pages import PAGES, Command, commands

SECONDS = 180  # at most, for one command


@pytest.fixture(scope="session")
def clone_for(tmp_path_factory):
    """Makes the clone of a page; once, so that the page's commands share it."""
    folder = tmp_path_factory.mktemp("commands")
    stand_ins.make(folder / "stand-ins")

    @functools.cache
    def clone(page: Path) -> Path:
        repository = stand_ins.copy(folder / "stand-ins", folder / page.stem)
        if not any("make_lists.py /dataset" in command.text for command in commands(page)):
            lists = tables.changed("python tools/make_lists.py /dataset/imagenet", 0)
            code, output = run(repository, lists)
            assert code == 0, output
        return repository

    yield clone
    shutil.rmtree(folder)


def run(repository: Path, shell: str) -> tuple[int, str]:
    programs = [repository.parent / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    places = {"PATH": os.pathsep.join(map(str, programs)), "PYTHON": sys.executable}
    words = ["sh", "-c", f"cd '{repository}'\n{shell}"]
    return runs.run(words, seconds=SECONDS, **stand_ins.SLURM, **places)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def shell_line(command: Command) -> str:
    """What is typed for a command. Python goes on where the page's earlier blocks ended."""
    if command.language == "sh":
        return tables.changed(command.text, free_port())
    earlier = [c.text for c in commands(command.page) if c.language == "python"]
    blocks = earlier[: earlier.index(command.text) + 1]
    return "python - <<'END'\n{}\nEND".format("\n".join(blocks))


def works_and_leaves_what_the_page_says(clone_for, command: Command) -> None:
    if reason := tables.elsewhere(command.text):
        pytest.skip(reason)
    if missing := tables.missing(command.text):
        pytest.skip(f"needs {', '.join(missing)}")
    repository, line = clone_for(command.page), shell_line(command)
    stamp = repository.parent / "stamp"
    stamp.touch()
    code, output = run(repository, line)
    assert code == 0, f"{line}\n{output}"
    for name in tables.leaves(command.text):
        found = [path.stat().st_mtime for path in repository.glob(name)]
        assert found and max(found) >= stamp.stat().st_mtime, f"{line}\nleft no {name}:\n{output}"


def of_page(page: Path) -> type:
    """The tests of a page are a class: their scope, in one process, as they share a clone."""
    found = list(commands(page))

    class Tests:
        @pytest.mark.parametrize(
            "command", found, ids=[f"{c.where} {c.text[:60]!r}" for c in found]
        )
        def test_command(self, clone_for, command):
            works_and_leaves_what_the_page_says(clone_for, command)

    return Tests


globals().update({f"Test_{page.stem}": of_page(page) for page in PAGES if list(commands(page))})
