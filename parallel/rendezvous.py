"""How the ranks of a job meet, keep others out, and learn that one of them is gone."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import paddle.distributed as dist
from paddle.base import core

from cli.errors import UserError
from parallel.address import device_of

_log = logging.getLogger("resmlp")
JOIN_TIMEOUT = 60.0  # seconds for the others to be there, when all were started together
_LOOPBACK = "lo"  # Linux's name of the network device that no other machine is on
SILENCE = 120.0  # seconds after which a machine that does not answer is given up

others: dict[int, socket.socket] = {}  # rank 0: to each other rank; another: to rank 0


def join(rank: int) -> None:
    """Joins the other ranks, as the launcher's environment describes them; UserError where they
    cannot meet.

    gloo and NCCL use the device that has this node's address, unless the user has named another;
    without one they would go by the host name. On one machine that is the loopback device, and
    Paddle's key-value store, which listens everywhere and asks for no password, is tied to it
    before the ranks meet there.
    """
    linux, environ = sys.platform == "linux", os.environ
    own = environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]
    endpoints = environ["PADDLE_TRAINER_ENDPOINTS"].split(",")
    where = environ.get("PADDLE_MASTER") or endpoints[0]
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:  # Paddle's order too
        where = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    local = linux and all(endpoint.rpartition(":")[0] == own for endpoint in endpoints)
    if local:  # a socket that is tied to the loopback device refuses even this machine's
        # connections to another of its addresses
        where = environ["PADDLE_MASTER"] = f"127.0.0.1:{where.rpartition(':')[2]}"
        environ.pop("MASTER_ADDR", None)  # or this would be taken instead
    if device := _LOOPBACK if local else linux and device_of(own):
        environ.setdefault("GLOO_SOCKET_IFNAME", device)
        environ.setdefault("NCCL_SOCKET_IFNAME", device)
    host, port = find_rank_0(rank, where)
    if local and rank == 0:
        world = environ["PADDLE_TRAINERS_NUM"]
        environ["PADDLE_TRAINERS_NUM"] = "0"  # or it would wait for the others already here
        core.create_or_get_global_tcp_store()  # which `init_parallel_env` then takes
        environ["PADDLE_TRAINERS_NUM"] = world
        shut_out_others(port)
    dist.init_parallel_env()  # takes the device that the launcher gave to this rank
    connect(rank, int(environ["PADDLE_TRAINERS_NUM"]), host)


def connect(rank: int, world: int, host: str) -> None:
    """Opens a connection between rank 0, on ``host``, and each other rank.

    Anybody who reaches the port can connect: a rank is who has the key of this job.
    """
    told: list = []
    if rank:
        dist.all_gather_object(told, None)
        port, key = told[0]
        others[0] = socket.create_connection((host, port))
        others[0].sendall(key + rank.to_bytes(4, "big"))
    else:
        key = secrets.token_bytes(16)
        with socket.create_server((host if host == "127.0.0.1" else "", 0)) as server:
            server.settimeout(JOIN_TIMEOUT)
            dist.all_gather_object(told, (server.getsockname()[1], key))
            while len(others) < world - 1:
                connection = server.accept()[0]
                connection.settimeout(5.0)
                words = b""
                with suppress(OSError):  # it says nothing, or resets the connection
                    while len(words) < 20 and (more := connection.recv(20 - len(words))):
                        words += more
                if hmac.compare_digest(words[:-4], key):
                    connection.settimeout(None)
                    others[int.from_bytes(words[-4:], "big")] = connection
    for connection in others.values() if sys.platform == "linux" else ():
        # Or a rank would ask a machine that cannot be reached any more for a quarter of an hour.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(SILENCE / 2))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(SILENCE / 10))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE * 1000))


def wait_for_all(process) -> None:
    """Returns when every rank has called it, however long that takes.

    Over connections of their own: gloo gives up on collectives after 30 seconds. Raises
    ConnectionError where a rank has ended (its connection is closed), or its machine has not
    answered for `SILENCE` seconds.
    """
    connections = others if process.world > 1 else {}
    try:
        for rank in connections:
            if not process.main:
                connections[rank].sendall(b".")
            if not connections[rank].recv(1):
                raise ConnectionResetError
        for rank in connections if process.main else ():
            connections[rank].sendall(b".")
    except OSError as error:
        raise ConnectionError(f"rank {rank} is gone or cannot be reached") from error


def find_rank_0(rank: int, where: str) -> tuple[str, int]:
    """Host and port of ``where``, if the ranks can meet there. (Paddle would abort, or try for 15
    minutes.)
    """
    host, _, port = where.rpartition(":")
    deadline = time.monotonic() + JOIN_TIMEOUT
    while True:
        try:
            if rank == 0:
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Paddle does
                    probe.bind(("", int(port)))
            else:
                socket.create_connection((host, int(port)), timeout=5).close()
            return host, int(port)
        except OSError as error:
            reason = error.strerror or error
            if rank == 0:
                raise UserError(f"rank 0 cannot listen at {where}: {reason}; choose another port")
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {rank} cannot reach rank 0 at {where}: {reason}; is it running, and "
                    "is the port open between the nodes?"
                )
            time.sleep(0.5)


def shut_out_others(port: int) -> None:
    """Ties this process's listening socket to the loopback device: it then takes connections to
    127.0.0.1 only. Logs a warning where it cannot be done.
    """
    for found in listening_sockets():
        if found.getsockname()[1] == port:
            with suppress(OSError):  # Linux before 5.7, where only root may
                found.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _LOOPBACK.encode())
                return
    _log.warning(f"warning: port {port} of this job is open to other machines")


def listening_sockets() -> Iterator[socket.socket]:
    """Second handles of this process's listening sockets, whoever opened them. Linux."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        # an OSError: closed meanwhile, or no socket
        with suppress(OSError), socket.fromfd(fd, socket.AF_INET, socket.SOCK_STREAM) as found:
            if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                yield found
