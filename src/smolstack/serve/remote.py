"""Downloads of images, from public addresses only."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urljoin, urlsplit

import httpx

from smolstack.serve.body_memory import CURRENT
from smolstack.serve.error_responses import RefusedError

_REDIRECTS = 3
# Slow name lookups only occupy these threads.
_LOOK_UPS = ThreadPoolExecutor(8, thread_name_prefix="names")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Not public, but Python's versions differ about them, or take them for public.
_OTHERS = [
    ipaddress.ip_network(network)
    for network in ("192.88.99.0/24", "fec0::/10", "64:ff9b:1::/48", "3fff::/20", "5f00::/16")
]
_SHARE = 0.9  # of the time for a download in which it may wait for memory


def is_public(address: str) -> bool:
    """Whether an IP address is public.

    For an IPv4 address embedded in an IPv6 address (mapped, 6to4, Teredo, NAT64), the IPv4 address
    is checked.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    inner: list[ipaddress.IPv4Address | None] = []
    if isinstance(found, ipaddress.IPv6Address):
        inner = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        if found in _NAT64:
            inner.append(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF))
        mapped = [each for each in inner if each is not None]
        if mapped:
            return all(is_public(str(each)) for each in mapped)
    if any(found in network for network in _OTHERS if network.version == found.version):
        return False
    return found.is_global and not (
        found.is_multicast or found.is_reserved or found.is_unspecified or found.is_loopback
    )


async def fetch(url: str, *, max_bytes: int, seconds: float) -> bytes:
    """Download the content of a public http(s) URL.

    All addresses of the host name must be public. The connection uses one of the checked addresses,
    even if the name resolves to another one later. Redirects are checked in the same way.

    Raises:
        RefusedError: the download is not allowed, too large, too slow, or fails (status 400); or
            other requests' bodies and downloads use all of the memory for them (429).
    """
    until = time.monotonic() + _SHARE * seconds
    try:
        return await asyncio.wait_for(_follow(url, max_bytes, until), seconds)
    except asyncio.TimeoutError:
        raise RefusedError(400, f"the file was not downloaded within {seconds:g} s") from None
    except (httpx.InvalidURL, ValueError):
        raise RefusedError(400, "the address, or one that it redirects to, is not valid") from None
    except (httpx.HTTPError, OSError) as error:
        raise RefusedError(400, f"the file cannot be downloaded: {type(error).__name__}") from None


async def _follow(url: str, max_bytes: int, until: float) -> bytes:
    for _ in range(_REDIRECTS + 1):
        content, url = await _get(url, max_bytes, until)
        if content is not None:
            return content
    raise RefusedError(400, f"the file's URL redirects more than {_REDIRECTS} times")


async def _get(url: str, max_bytes: int, until: float) -> tuple[bytes | None, str]:
    """Return the content, or None and the URL of a redirect."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RefusedError(400, "the file's address is not an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise RefusedError(400, "the file's URL contains a user name or password")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = await _resolve(parts.hostname, port)
    literal = f"[{address}]" if ":" in address else address
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    headers = {
        "Host": host if parts.port is None else f"{host}:{port}",
        "Accept-Encoding": "identity",
        "User-Agent": "smolstack",
    }
    async with (
        # A proxy from the environment would resolve the name again.
        httpx.AsyncClient(trust_env=False, follow_redirects=False) as client,
        client.stream(
            "GET",
            f"{parts.scheme}://{literal}:{port}{path}",
            headers=headers,
            extensions={"sni_hostname": parts.hostname},
        ) as response,
    ):
        if response.is_redirect and "location" in response.headers:
            return None, urljoin(url, response.headers["location"])
        if response.status_code != 200:
            raise RefusedError(
                400, f"the file's server responded with status {response.status_code}"
            )
        content, memory = bytearray(), CURRENT.get()
        length = response.headers.get("content-length", "")
        too_large = RefusedError(400, f"the downloaded file is larger than {max_bytes:,} bytes")
        if length.isdecimal() and int(length[:20]) > max_bytes:
            raise too_large
        async for chunk in response.aiter_raw():
            if len(content) + len(chunk) > max_bytes:
                raise too_large
            if memory is not None:
                await memory.take(len(chunk), until)
            content += chunk
        return bytes(content), url


async def _resolve(host: str, port: int) -> str:
    """Resolve a name; all of its addresses must be public. Return one of them."""
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.get_running_loop().run_in_executor(_LOOK_UPS, look_up)
    except (OSError, UnicodeError):
        raise RefusedError(400, f"the host name {host[:100]} cannot be resolved") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise RefusedError(
            400, f"{host[:100]} does not have a public address; only public addresses are allowed"
        )
    return addresses[0]
