"""Checks of the ``Host`` and ``Origin`` headers.

A page of another site can make a browser send requests to a server on the user's own machine.
Without API keys, two checks prevent this: ``Host`` must contain one of the server's names (which
refuses DNS rebinding), and ``Origin``, set by the browser, must be the server's own or allowed.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from smolstack.serve.error_responses import RefusedError
from smolstack.serve.settings import ServerSettings

ANY = "*"
_DEFAULT_PORTS = (80, 443)
_HOST = re.compile(r"(\[[^\]@]*\]|[^\[\]:@/?#]*)(:\d*)?")  # of the header: no user's name, no path


def sent_key(headers: Headers) -> tuple[str, bytes]:
    """(scheme in lower case, key) that a request sends, which may be wrong."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return scheme.lower(), given.strip().encode()


def own_names(host: str) -> tuple[str, ...]:
    """Return the names of a server that listens on ``host``. IP addresses are always accepted:
    DNS rebinding needs a name."""
    names = {host.lower(), "localhost"}
    if host in ("0.0.0.0", "::", ""):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return tuple(sorted(names))


def refusal(headers: Headers, settings: ServerSettings) -> RefusedError | None:
    """Return a refusal of a request with a wrong host name or origin; None if both are valid."""
    host = headers.get("host", "")
    if host and settings.hosts is not None and not _is_own(host, settings.hosts):
        return RefusedError(
            421,
            f"the Host header is {host[:100]!r}, which is not one of this server's names; to allow "
            "it, start the server with --allowed-hosts NAME",
        )
    origin = headers.get("origin")
    if origin is None or ANY in settings.origins or origin in settings.origins:
        return None
    if _host_and_port(origin) == _host_and_port(f"//{host}"):
        return None
    return RefusedError(
        403,
        f"the request is from a page of {origin[:100]!r}; only the server's own pages and those of "
        "origins given by --allow-origin are allowed",
    )


def _is_own(host: str, names: tuple[str, ...]) -> bool:
    if ANY in names:
        return True
    place = _host_and_port(f"//{host}")
    if place is None or not _HOST.fullmatch(host):
        return False
    name = place[0].rstrip(".")
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name in names
    return True


def _host_and_port(url: str) -> tuple[str, int | None] | None:
    """Return (name, port) of an origin or host; None as the port for a protocol's default."""
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    return None if not name else (name.lower(), None if port in _DEFAULT_PORTS else port)
