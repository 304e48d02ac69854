"""How a script ends, and what its output does with a text that it cannot encode."""

import io
import logging
import sys

import pytest

from cli.errors import UserError, run_as_script


def end_of(main):
    with pytest.raises(SystemExit) as end:
        run_as_script(main)
    return end.value.code or 0


def test_what_the_output_cannot_encode_is_shown_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert end_of(lambda: print("\xfc \udce9")) == 0
    stream.flush()
    assert stream.buffer.getvalue() == rb"\xfc \udce9" + b"\n"


def test_an_output_that_is_closed_from_the_start_is_no_mistake(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after `>&-`
    assert end_of(lambda: print(sys.stdout.isatty())) == 0


@pytest.mark.parametrize("terminal, start", [(False, ""), (True, "\r\033[K")])
def test_a_users_mistake_is_one_line_behind_no_progress_bar(capsys, monkeypatch, terminal, start):
    def main():
        raise UserError("what, where, how")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert end_of(main) == 2 and capsys.readouterr().err == f"{start}error: what, where, how\n"


def test_lines_before_a_run_has_its_log_look_like_those_after(capsys, monkeypatch):
    monkeypatch.setattr(logging, "lastResort", None)
    assert end_of(lambda: logging.getLogger("resmlp").warning("shortened")) == 0
    assert capsys.readouterr().err == "shortened\n"
