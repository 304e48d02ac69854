"""What the tools share: their flags, and files that are written whole or not at all."""

import errno
import os
from unittest import mock

import pytest

from cli.errors import UserError
from cli.parser import Parser
from tools.common import write_file


def test_opts_given_twice_add_up_and_leave_no_trace():
    parser = Parser("A tool.")
    parser.model_flags()
    assert parser.parse_args(["-opts", "A", "1", "-opts", "B", ""]).opts == ["A", "1", "B", ""]
    assert parser.parse_args([]).opts == []


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "curves.png", b"old")
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="curves.png: cannot be written: No space"):
        write_file(tmp_path / "curves.png", b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"curves.png": b"old"}


def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file(pipe, "text")
        assert os.read(descriptor, 10) == b"text" and pipe.is_fifo()
    finally:
        os.close(descriptor)
