"""Where a Redis or Valkey is, and as whom to speak to it: what the setting directory_url says."""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from kvplug.errors import ConfigError

__all__ = ["Endpoint"]

DEFAULT_PORT: Final = 6379
_SCHEMES: Final = {"redis": False, "valkey": False, "rediss": True, "valkeys": True, "unix": False}


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
                database=int(database or 0),
                tls=tls,
                username=unquote(parts.username or ""),
                password=unquote(parts.password or ""),
                tls_ca=asked.pop("ca", None) if tls else None,
            )
            if asked or endpoint.database < 0 or not (endpoint.path or endpoint.host):
                raise ValueError
        except (KeyError, ValueError):
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
