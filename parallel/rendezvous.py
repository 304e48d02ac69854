"""How the ranks of a job meet, keep others out, and learn that one of them is gone."""

from __future__ import annotations

import logging
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import paddle.distributed as dist
from paddle.base import core

from cli.errors import UserError
from parallel.address import device_of

JOIN_TIMEOUT = 60.0  # seconds for rank 0 to be there, when all were started together
_LOOPBACK = "lo"  # Linux's name of the network device that no other machine is on
BEAT = 2.0  # seconds between two signs of life of a rank
SILENCE = 120.0  # seconds after which a rank without any is given up

_store = None  # this rank's connection to the job's key-value store
_store_lock = threading.Lock()  # one request at a time
meetings = 0


def join(rank: int) -> None:
    """Joins the other ranks, as the launcher's environment describes them; UserError where they
    cannot meet.

    gloo and NCCL use the device that has this node's address, unless the user has named another;
    without one they would go by the host name. On one machine that is the loopback device, and
    Paddle's key-value store, which listens everywhere and asks for no password, is tied to it
    before the ranks meet there.
    """
    global _store
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
    _store = core.TCPStore(host, port, False, 0)  # a connection beside that of Paddle's threads
    threading.Thread(target=_give_signs_of_life, args=[rank], daemon=True).start()
    for connection in tcp_sockets():
        # Paddle sends a request in pieces, and would wait 40 ms for the receipt of the first.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Or a rank would ask a machine that cannot be reached any more for a quarter of an hour.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(SILENCE / 2))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(SILENCE / 10))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE * 1000))


def _give_signs_of_life(rank: int) -> None:
    with suppress(ConnectionError):  # rank 0 is gone
        while True:
            time.sleep(BEAT)
            tally(f"resmlp/alive/{rank}", 1)


def wait_for_all(process) -> None:
    """Returns when every rank has called it, however long that takes.

    They ask the job's key-value store: gloo gives up on collectives after 30 seconds. Rank 0, whose
    process is the store, returns last: it may end, and the store with it.

    Raises ConnectionError after `SILENCE` seconds without a sign of life from a rank. (On one
    machine `launch` learns of its end at once; another node's launcher says nothing.)
    """
    global meetings
    if process.world == 1:
        return
    meetings += 1
    here, answered = f"resmlp/meeting/{meetings}/here", f"resmlp/meeting/{meetings}/answered"
    tally(here, 1)
    _wait_for(here, process.world, process.world)
    if process.main:
        _wait_for(answered, process.world - 1, process.world)
    else:
        tally(answered, 1)


def _wait_for(key: str, count: int, world: int) -> None:
    pause, heard = 0.0005, {}  # heard: rank -> its last sign of life, and when it was new
    next_look = time.monotonic() + BEAT
    while tally(key) < count:
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
        now = time.monotonic()
        if now < next_look:
            continue
        next_look = now + BEAT
        for rank in range(world):
            beat = tally(f"resmlp/alive/{rank}")
            if rank not in heard or heard[rank][0] != beat:
                heard[rank] = beat, now
            elif now - heard[rank][1] > SILENCE:
                raise ConnectionError(f"rank {rank} gives no sign of life for {SILENCE:.0f} s")


def tally(key: str, more: int = 0) -> int:
    """Adds to a counter of the store; returns the sum. Raises ConnectionError without rank 0."""
    with _store_lock:
        try:
            return _store.add(key, more)
        except Exception as error:  # which one depends on Paddle's version
            raise ConnectionError("rank 0 is gone or cannot be reached") from error


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
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            if rank == 0:
                raise UserError(f"rank 0 cannot listen at {where}: {reason}; choose another port")
            if time.monotonic() > deadline or not isinstance(error, OSError):
                raise UserError(
                    f"rank {rank} cannot reach rank 0 at {where}: {reason}; is it running, and "
                    "is the port open between the nodes?"
                )
            time.sleep(0.5)


def shut_out_others(port: int) -> None:
    """Ties this process's listening socket to the loopback device: it then takes connections to
    127.0.0.1 only. Logs a warning where it cannot be done.
    """
    reason = "its socket was not found"
    for found in tcp_sockets():
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens and found.getsockname()[1] == port:
            try:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _LOOPBACK.encode())
                return
            except OSError as error:  # Linux before 5.7, where only root may
                reason = error.strerror
    logging.getLogger("resmlp").warning(
        f"warning: port {port} of this job is open to other machines ({reason})"
    )


def tcp_sockets() -> Iterator[socket.socket]:
    """Second handles of this process's TCP sockets, whoever opened them; on Linux alone."""
    for fd in map(int, os.listdir("/proc/self/fd") if sys.platform == "linux" else []):
        with suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as found:
                    if (found.family, found.type) == (socket.AF_INET, socket.SOCK_STREAM):
                        yield found
