"""The checks' side of :mod:`tests.rdma_lab.owner`: the host at the other end, whichever guest that is in."""

from __future__ import annotations

import http.client
import time
import xmlrpc.client
from typing import Any, Final

from tests.rdma_lab.owner import PORT

CALL_S: Final = 60.0
COMES_UP_S: Final = 240.0
"""An emulated machine may take this long from its first instruction to an owner that serves."""


class _Transport(xmlrpc.client.Transport):
    """With a deadline."""

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = CALL_S
        return connection


class Far:
    """Calls the owner at ``address``. Its methods are those of :class:`tests.rdma_lab.owner.Owner`."""

    def __init__(self, address: str) -> None:
        self._proxy = xmlrpc.client.ServerProxy(f"http://{address}:{PORT}", _Transport(), allow_none=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proxy, name)

    def wait(self) -> None:
        """Until it answers. Raises the last OSError when it does not come up."""
        ends = time.monotonic() + COMES_UP_S
        while True:
            try:
                self._proxy.end()
            except OSError:
                if time.monotonic() >= ends:
                    raise
                time.sleep(0.5)
            else:
                return
