"""Who is asked, and from which page: names in ``Host``, and ``Origin``.

A page of another site can make a browser ask a server on the user's own machine. Two things keep
it out where no key does: a name that was made to point here (DNS rebinding) is not one of the
server's, and a browser says from which origin a page asks.
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
    """The names of a server that listens at ``host``, beside every address, which no other site's
    page can be made to have as its name."""
    names = {host.lower(), "localhost"}
    if host in ("0.0.0.0", "::", ""):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return tuple(sorted(names))


def refusal(headers: Headers, settings: ServerSettings) -> RefusedError | None:
    """What is answered to a request of somebody else's page, or None for any other."""
    host = headers.get("host", "")
    if host and settings.hosts is not None and not _is_own(host, settings.hosts):
        return RefusedError(
            421,
            f"the server is asked for as {host[:100]!r}, which is none of its names; start it with "
            "--allowed-hosts NAME where it should be one",
        )
    origin = headers.get("origin")
    if origin is None or ANY in settings.origins or origin in settings.origins:
        return None
    if _place(origin) == _place(f"//{host}"):
        return None
    return RefusedError(
        403,
        f"a page of {origin[:100]!r} asks; the server answers pages of its own address, and of "
        "those given by --allow-origin",
    )


def _is_own(host: str, names: tuple[str, ...]) -> bool:
    if ANY in names:
        return True
    place = _place(f"//{host}")
    if place is None or not _HOST.fullmatch(host):
        return False
    name = place[0].rstrip(".")
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name in names
    return True


def _place(url: str) -> tuple[str, int | None] | None:
    """(name, port) of an origin or a host; a protocol's own port counts as none."""
    try:
        parts = urlsplit(url)
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    return None if not name else (name.lower(), None if port in _DEFAULT_PORTS else port)
