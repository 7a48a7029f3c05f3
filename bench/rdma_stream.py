"""The other end of the reference stream: sends a part of a file again and again, as fast as one connection goes.

``rdma_stream.py PATH PORT``: connects to 127.0.0.1:PORT; each 24 bytes that come in (offset, length, and whether to
send a copy: by `send` and not by `sendfile`; little-endian) are answered with that range of the file. Ends with its
connection.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import sys


def main(path: str, port: int) -> None:
    """Serve until the other end hangs up."""
    fd = os.open(path, os.O_RDONLY)
    view = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while request := sock.recv(24, socket.MSG_WAITALL):
            at, length, copies = struct.unpack("<qqq", request)
            end = at + length
            while at < end:
                at += sock.send(view[at:end]) if copies else os.sendfile(sock.fileno(), fd, at, end - at)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
