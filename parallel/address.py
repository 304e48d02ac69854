"""The address by which other machines reach this one, and the network device that has it.

Paddle's launcher and gloo go by the host name, which on Debian and Ubuntu means 127.0.1.1. As a
program, for launch_multi.sh (the standard library alone; NODE_RANK and HOST by environment):

    python parallel/address.py MASTER    # prints this node's address and the launcher's --master
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from contextlib import suppress

_NAME_TIMEOUT = 60.0  # seconds for the first node's name to be known: a pod's comes with the pod
_ANYWHERE = "192.0.2.1"  # reserved for examples: where the default route leads
_SIOCGIFADDR = 0x8915  # Linux, <linux/sockios.h>: address of a device


def address_towards(host: str) -> str:
    """The IPv4 address of this machine that ``host`` sees. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]


def device_of(address: str) -> str:
    """Name of this machine's network device that has an IPv4 address; empty if none has. Linux."""
    import fcntl  # not on Windows

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                request = struct.pack("256s", name.encode())
                if socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return ""


def addresses(master: str, first: bool, own: str = "") -> tuple[str, str]:
    """This node's address (``own`` if given), and the launcher's ``host:port`` for the master."""
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("expected host:port of the first node, such as 10.0.0.1:6170")
    deadline, found = time.monotonic() + _NAME_TIMEOUT, ""
    while not found:
        try:
            found = socket.gethostbyname(host)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)
    if not own:
        own = address_towards(found)
        is_name = host not in (found, "localhost")
        if first and is_name and own.startswith("127."):  # its own name, which others know better
            own = address_towards(_ANYWHERE)
    # The launcher opens its server where the master's address is literally its own.
    return own, f"{own if first else found}:{port}"


def main(master: str) -> None:
    first, own = os.environ["NODE_RANK"] == "0", os.environ.get("HOST", "")
    if own.count(".") != 3 or not own.replace(".", "").isdigit():
        own = ""  # a host name of the shell, or conda's word for the kind of machine
    try:
        print(*addresses(master, first, own))
    except (OSError, ValueError) as error:
        sys.exit(f"error: MASTER={master}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
