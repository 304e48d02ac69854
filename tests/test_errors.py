"""How a script ends, and what its output does with a text that it cannot encode."""

import io
import logging
import sys

import pytest

from cli.errors import UserError, run_as_script


def test_what_the_output_cannot_encode_is_shown_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        run_as_script(lambda: print("\xfc \udce9"))
    stream.flush()
    assert not end.value.code
    assert stream.buffer.getvalue() == rb"\xfc \udce9" + b"\n"


def test_an_output_that_is_closed_from_the_start_is_no_mistake(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after `>&-`
    with pytest.raises(SystemExit) as end:
        run_as_script(lambda: print(sys.stdout.isatty()))
    assert not end.value.code


def test_a_users_mistake_is_one_line_and_code_2(capsys):
    def main():
        raise UserError("what, where, how")

    with pytest.raises(SystemExit) as end:
        run_as_script(main)
    assert end.value.code == 2 and capsys.readouterr().err == "error: what, where, how\n"


def test_lines_before_a_run_has_its_log_look_like_those_after(capsys, monkeypatch):
    monkeypatch.setattr(logging, "lastResort", None)
    with pytest.raises(SystemExit):
        run_as_script(lambda: logging.getLogger("resmlp").warning("shortened"))
    assert capsys.readouterr().err == "shortened\n"


def test_an_error_clears_a_progress_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def main():
        raise UserError("what")

    with pytest.raises(SystemExit):
        run_as_script(main)
    assert capsys.readouterr().err == "\r\033[Kerror: what\n"
