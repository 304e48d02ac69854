"""cli/progress.py: a line that fits the terminal, and is cleared."""

import logging
import os
import re
import sys

import pytest

from cli import progress
from parallel.process import prepare_process


@pytest.mark.parametrize("columns", [80, 40, 20, 5])
def test_the_line_fits_the_terminal_and_is_cleared(monkeypatch, capsys, columns):
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True)
    size = os.terminal_size((columns, 24))
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: size)
    bar = progress.ProgressLine("verify")
    bar(500, 1000)
    shown = capsys.readouterr().out
    assert shown.startswith("\rverify"[: columns - 1]) and len(shown) <= columns
    assert columns < 20 or shown.endswith("] 500/1000 ")
    assert len(re.findall("#", shown)) == {80: 15, 40: 10}.get(columns, 0)
    bar.end()
    assert capsys.readouterr().out == "\r\033[K"


def test_a_line_of_the_log_clears_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    prepare_process()
    capsys.readouterr()
    logging.getLogger("resmlp").info("epoch 1/1")
    assert capsys.readouterr().out == "\r\033[Kepoch 1/1\n"
