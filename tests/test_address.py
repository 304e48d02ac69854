"""By which address other machines reach this one, and on which device that is."""

import socket
import subprocess
import sys
from unittest.mock import Mock

import pytest

from parallel import address

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")


@pytest.fixture
def names(monkeypatch):
    """A host whose name means 127.0.1.1 to itself, and whose address towards others is 10.0.0.1."""
    known = {"first": "127.0.1.1", "second": "10.0.0.2", "localhost": "127.0.0.1"}
    towards = {"127.0.1.1": "127.0.0.1", "127.0.0.1": "127.0.0.1"}
    monkeypatch.setattr(address.socket, "gethostbyname", lambda name: known.get(name, name))
    monkeypatch.setattr(address, "address_towards", lambda host: towards.get(host, "10.0.0.1"))


@pytest.mark.parametrize(
    "master, first, own, expected",
    [
        ("10.0.0.1:80", True, "", ("10.0.0.1", "10.0.0.1:80")),
        ("second:80", False, "", ("10.0.0.1", "10.0.0.2:80")),
        ("first:80", True, "", ("10.0.0.1", "10.0.0.1:80")),  # SLURM's recipe, on Debian
        ("10.96.0.1:80", True, "", ("10.0.0.1", "10.0.0.1:80")),  # a service's address, not its own
        ("10.0.0.2:80", False, "10.9.0.1", ("10.9.0.1", "10.0.0.2:80")),
        ("127.0.0.1:80", True, "", ("127.0.0.1", "127.0.0.1:80")),  # two nodes on one machine
        ("localhost:80", False, "", ("127.0.0.1", "127.0.0.1:80")),
    ],
)
def test_a_node_knows_its_address_and_the_master(names, master, first, own, expected):
    assert address.addresses(master, first, own) == expected
    for wrong in ("10.0.0.1", ":80", "10.0.0.1:port"):
        with pytest.raises(ValueError, match="expected host:port"):
            address.addresses(wrong, first, own)


@linux
def test_the_device_of_an_address_is_found():
    assert address.device_of("127.0.0.1") == "lo"
    assert address.device_of("192.0.2.1") == ""
    assert address.address_towards("127.0.0.1") == "127.0.0.1"


def test_the_program_prints_both_or_one_line(monkeypatch):
    def program(master):
        words = [sys.executable, address.__file__, master]
        return subprocess.run(words, capture_output=True, text=True)

    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("HOST", "x86_64-conda-linux-gnu")  # as conda's compilers set it
    assert program("127.0.0.1:6170").stdout == "127.0.0.1 127.0.0.1:6170\n"
    monkeypatch.setenv("HOST", "10.1.2.3")
    assert program("127.0.0.1:6170").stdout == "10.1.2.3 127.0.0.1:6170\n"
    wrong = program("6170")
    assert wrong.returncode != 0 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: MASTER=6170: ")


def test_a_name_that_is_known_later_is_waited_for(monkeypatch):
    answers = Mock(side_effect=[socket.gaierror("not yet"), "10.0.0.2"])
    monkeypatch.setattr(address.socket, "gethostbyname", answers)
    monkeypatch.setattr(address.time, "sleep", lambda seconds: None)
    assert address.addresses("pod-0.job:80", False, "10.0.0.1") == ("10.0.0.1", "10.0.0.2:80")
