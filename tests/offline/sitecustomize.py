"""Keeps the tests off the network, with every Python that they start: it is on their path, and imported by its name.

What a test may do stands in the environment: nothing but sockets of this machine's files, or, where it is marked
`sockets`, the addresses 127.0.0.1 and ::1, too. Each refusal is written down, since the code that is tested may catch
what is raised; `refusals.py` reads that. Sockets that are not opened by Python, as gloo's and Chromium's, are not seen.
"""

import os
import sys

ALLOWED, REFUSED = "CAPTIONER_TESTS_SOCKETS", "CAPTIONER_TESTS_REFUSED"
NAMES = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0, "socket.getnameinfo": 0}
ADDRESSES = {"socket.connect": 1, "socket.bind": 1, "socket.sendto": 1, "socket.sendmsg": 1}


class SocketRefused(Exception):
    """A test opened a socket."""


def watch(event: str, arguments: tuple) -> None:
    if not event.startswith("socket."):
        return
    if event in NAMES:
        host = arguments[0]
        host = host[0] if isinstance(host, tuple) else host
    elif event in ADDRESSES:
        address = arguments[1]
        if not isinstance(address, tuple) or arguments[0].family.name not in ("AF_INET", "AF_INET6"):
            return
        host = address[0]
        if event == "socket.bind" and address == ("", 0):  # how Lightning finds a free port
            host = "127.0.0.1"
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if os.environ.get(ALLOWED) == "local" and host in (None, "127.0.0.1", "::1", "localhost"):
        return
    what = f"{event} {host}"
    if refused := os.environ.get(REFUSED):
        with open(refused, "a") as file:
            file.write(f"{what}\n")
    raise SocketRefused(f"{what}: tests open no socket, but to 127.0.0.1 where they are marked `sockets`")


if REFUSED in os.environ:
    sys.addaudithook(watch)
