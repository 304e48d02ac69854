"""Where the ranks of a job meet: whether they can, and that nobody else joins them."""

from __future__ import annotations

import runtime  # noqa: F401  isort: skip

import os
import socket
import stat
import sys
import time
from contextlib import suppress

import paddle.distributed as dist

from errors import UserError

_JOIN_TIMEOUT = 60.0  # seconds for rank 0 to be there, when all were started together
_LOOPBACK = "lo"  # Linux's name of the network device that no other machine is on


def join() -> str:
    """Joins the other ranks, as the launcher's environment describes them.

    Where all are on this machine, what they open for one another is open to this machine only:
    gloo and NCCL listen on the loopback device unless the user has named another, and Paddle's
    key-value store, which listens everywhere and asks for no password, is tied to it as soon as
    the ranks have met.

    Returns:
        A warning if the store had to be left open to other machines, else an empty string.

    Raises:
        UserError: rank 0 cannot be reached, or the port that it shall listen on is in use.
    """
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    port = _find_rank_0(rank)
    local = sys.platform == "linux" and _on_one_machine()
    if local:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, _LOOPBACK)
    dist.init_parallel_env()  # takes the device that the launcher gave to this rank
    return _shut_out_others(port) if local and rank == 0 else ""


def _find_rank_0(rank: int) -> int:
    """Looks whether the ranks can meet; returns the port. Paddle itself would abort, or try for 15
    minutes."""
    address = os.environ.get("PADDLE_MASTER") or os.environ["PADDLE_TRAINER_ENDPOINTS"]
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    address = address.split(",")[0]
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _JOIN_TIMEOUT
    while True:
        try:
            if rank == 0:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Paddle does
                    probe.bind(("", int(port)))
            else:
                socket.create_connection((host, int(port)), timeout=5).close()
            return int(port)
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            if rank == 0:
                raise UserError(f"rank 0 cannot listen at {address}: {reason}; choose another port")
            if time.monotonic() > deadline or not isinstance(error, OSError):
                raise UserError(
                    f"rank {rank} cannot reach rank 0 at {address}: {reason}; is it running, and "
                    f"is the port open between the nodes?"
                )
            time.sleep(0.5)


def _on_one_machine() -> bool:
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    hosts = {endpoint.rpartition(":")[0] for endpoint in endpoints}
    return len(hosts) == 1 and "" not in hosts


def _shut_out_others(port: int) -> str:
    """Ties this process's listening socket to the loopback device: it then takes connections to
    127.0.0.1 only, and what is connected stays so. Returns a warning where it cannot be done.
    """
    reason = "its socket was not found"
    found = _listening_socket(port)
    if found is not None:
        with found:
            try:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _LOOPBACK.encode())
                return ""
            except OSError as error:  # Linux before 5.7, where only root may
                reason = error.strerror
    return f"warning: port {port} of this job is open to other machines ({reason})"


def _listening_socket(port: int) -> socket.socket | None:
    """A second handle of the socket through which this process listens on a port."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                found = socket.socket(fileno=os.dup(fd))
                listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if listens and found.getsockname()[1:2] == (port,):
                    return found
                found.close()
    return None
