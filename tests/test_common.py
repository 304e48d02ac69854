"""What the tools share: their flags, and what is written into a pipe."""

import os

from cli.parser import Parser
from tools.common import write_file


def test_opts_given_twice_add_up_and_leave_no_trace():
    parser = Parser("A tool.")
    parser.model_flags()
    assert parser.parse_args(["-opts", "A", "1", "-opts", "B", ""]).opts == ["A", "1", "B", ""]
    assert parser.parse_args([]).opts == []


def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file(pipe, "text")
        assert os.read(descriptor, 10) == b"text" and pipe.is_fifo()
    finally:
        os.close(descriptor)
