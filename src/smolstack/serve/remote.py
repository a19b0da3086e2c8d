"""Fetching images from public addresses, and from nowhere else."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urljoin, urlsplit

import httpx

from smolstack.serve.error_responses import RefusedError

_REDIRECTS = 3
# Slow names keep these threads and no others.
_LOOK_UPS = ThreadPoolExecutor(8, thread_name_prefix="names")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet.

    An IPv4 address inside an IPv6 one (mapped, 6to4, Teredo, NAT64) counts as itself.
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
    return found.is_global and not (
        found.is_multicast or found.is_reserved or found.is_unspecified or found.is_loopback
    )


async def fetch(url: str, *, max_bytes: int, seconds: float) -> bytes:
    """The content of a public http(s) URL.

    Every name is resolved here and all of its addresses must be public; the connection then goes
    to the address that was checked, whatever the name resolves to later. Redirects start again.

    Raises:
        RefusedError: with status 400, naming what was wrong.
    """
    try:
        return await asyncio.wait_for(_follow(url, max_bytes), seconds)
    except asyncio.TimeoutError:
        raise RefusedError(400, f"the image did not arrive within {seconds:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
        raise RefusedError(400, f"the image cannot be fetched: {type(error).__name__}") from None


async def _follow(url: str, max_bytes: int) -> bytes:
    for _ in range(_REDIRECTS + 1):
        content, url = await _get(url, max_bytes)
        if content is not None:
            return content
    raise RefusedError(400, f"the image's address redirects more than {_REDIRECTS} times")


async def _get(url: str, max_bytes: int) -> tuple[bytes | None, str]:
    """The content, or None and the address that it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RefusedError(400, "the image's address is no http or https URL")
    if parts.username is not None or parts.password is not None:
        raise RefusedError(400, "the image's address holds a user name or password")
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
        # The environment's proxies would resolve the name anew.
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
            raise RefusedError(400, f"the image's address answered with {response.status_code}")
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > max_bytes:
                raise RefusedError(400, f"the fetched image is larger than {max_bytes:,} bytes")
        return bytes(content), url


async def _resolve(host: str, port: int) -> str:
    """One address of a name, all of which are public."""
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.get_running_loop().run_in_executor(_LOOK_UPS, look_up)
    except (OSError, UnicodeError):
        raise RefusedError(400, f"the name {host[:100]} cannot be resolved") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise RefusedError(
            400, f"{host[:100]} is not on the open internet; such addresses are refused"
        )
    return addresses[0]
