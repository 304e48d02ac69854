"""tools/processes.py: results in order, one line where processes fail, no orphans."""

import os
import signal
import subprocess
import sys

import pytest

from cli.errors import DataError, UserError
from tools import processes
from tools.processes import map_in_processes

from .helpers.runs import ROOT


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(processes, "usable_cores", lambda: 2)


@pytest.mark.parametrize(
    "tasks,workers,expected",
    [(50, None, 2), (50, 8, 8), (3, 8, 3), (50, 1, 0), (1, 8, 0), (0, None, 0)],
)
def test_results_come_in_order_from_as_many_processes_as_there_are_cores_and_tasks(
    tasks, workers, expected
):
    results = list(map_in_processes(lambda x: (x * x, os.getpid()), range(tasks), workers))
    assert [square for square, _ in results] == [x * x for x in range(tasks)]
    assert len({pid for _, pid in results} - {os.getpid()}) == expected


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(_):
    raise DataError("x.jpg: empty")


@pytest.mark.parametrize(
    "work,message",
    [(die, r"exit code -9; out of memory\?"), (lambda _: os._exit(3), "exit code 3$")]
    + [(refuse, "^x.jpg: empty$")],
)
def test_a_process_that_fails_is_one_error(work, message):
    with pytest.raises(UserError, match=message):
        list(map_in_processes(work, range(8), 2))


def test_processes_that_the_system_refuses_are_one_error_and_nothing_is_left(monkeypatch):
    fork, started = os.fork, []

    def limited():
        if len(started) == 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        pid = fork()
        started.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(UserError, match="process 4 of 8 cannot be started: Resource temporarily"):
        list(map_in_processes(str, range(50), 8))
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


ORPHANS = """
import os, time
from tools import processes
processes.usable_cores = lambda: 2
def work(_):
    os.write(1, b"x")
    time.sleep(30)
    os.write(1, b"still here")
list(processes.map_in_processes(work, range(2)))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(number):
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout.read(2) == b"xx"
    parent.send_signal(number)
    assert parent.wait() == -number
    assert parent.stdout.read() == b""  # its end: all who held it are gone
