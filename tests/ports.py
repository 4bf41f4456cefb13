"""A port that stays ours until its server listens on it: one that is looked up and let go can be taken by another test run."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_port() -> Iterator[int]:
    """A port of this machine for a server started inside, again and again if need be; no other process is given it meanwhile.

    Linux lets two sockets have one port where both allow its reuse, as servers do, and one of them alone listens.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]
