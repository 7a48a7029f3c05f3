"""Where a Redis or Valkey is, and as whom to speak to it: what the setting directory_url says."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from kvplug.errors import ConfigError, DecodeError
from kvplug.outside import whole_number

__all__ = ["Endpoint", "is_host_and_port"]

DEFAULT_PORT: Final = 6379
_SCHEMES: Final = {"redis": False, "valkey": False, "rediss": True, "valkeys": True, "unix": False}


_HOST_AND_PORT: Final = re.compile(r"(?:[\w.-]+|\[[\w.:%]+\]):(\d{1,5})", re.ASCII)


def is_host_and_port(text: str) -> bool:
    """Whether this is host:port, such as 10.0.0.7:9410 or [::1]:9410."""
    known = _HOST_AND_PORT.fullmatch(text)
    return known is not None and int(known[1]) <= 65535


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """One server. Its text never shows the password."""

    host: str
    port: int
    path: str = ""
    database: int = 0
    tls: bool = False
    username: str = ""
    password: str = dataclasses.field(default="", repr=False)
    tls_ca: str | None = None

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """``redis://[[user]:password@]host[:port][/db]``, ``rediss://…[?ca=file.pem]``, ``unix:///path[?db=n]``.

        ``rediss://`` is with TLS; ``valkey://`` and ``valkeys://`` mean the same. ``ca``: what the server's certificate
        is checked against; default: what the system trusts. Raises ConfigError, which never quotes the url.
        """
        try:
            parts = urlsplit(url)
            tls = _SCHEMES[parts.scheme]
            asked = {
                name: values[-1] for name, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()
            }
            database = asked.pop("db", "") if parts.scheme == "unix" else parts.path.strip("/")
            endpoint = cls(
                host=parts.hostname or "",
                port=parts.port or DEFAULT_PORT,
                path=unquote(parts.path) if parts.scheme == "unix" else "",
                database=whole_number(database.encode() or b"0", "a database"),
                tls=tls,
                username=unquote(parts.username or ""),
                password=unquote(parts.password or ""),
                tls_ca=asked.pop("ca", None) if tls else None,
            )
            if asked or endpoint.database < 0 or not (endpoint.path or endpoint.host):
                raise ValueError
        except (KeyError, ValueError, DecodeError):
            raise ConfigError(
                "directory_url must be redis://[[user]:password@]host[:port][/db], rediss://…[?ca=file.pem] for TLS, "
                "or unix:///path/of/socket[?db=n]; what is set is none of these"
            ) from None
        return endpoint

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}/{self.database}"

    @property
    def is_local(self) -> bool:
        """Whether what is said there stays on this host: a unix socket, or a loopback address."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
