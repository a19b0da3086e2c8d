"""Where a server listens, and who has access; checked before the model is loaded."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path

from smolstack.errors import GenerationError
from smolstack.serve.listening import BACKLOG

KEY = "SMOLSTACK_API_KEY"


def keys(given: list[str]) -> tuple[str, ...]:
    """Return the API keys of the command line and the environment.

    Raises:
        GenerationError: a key is empty, which would leave the server unprotected.
    """
    origins = [("--api-key", key) for key in given]
    if KEY in os.environ:
        origins.append((KEY, os.environ[KEY]))
    for origin, key in origins:
        if not key.strip():
            raise GenerationError(
                f"{origin} is empty, expected a key; omit it to serve without keys"
            )
    return tuple(key.strip() for _, key in origins)


def hosts(
    host: str, uds: Path | None, keys: tuple[str, ...], allowed: list[str]
) -> tuple[str, ...] | None:
    """Return the accepted Host names; None if a key or a Unix socket restricts access."""
    from smolstack.serve.origins import own_names

    names = tuple(name.lower() for name in allowed)
    if names:
        return (*own_names(host), *names)
    return None if keys or uds is not None else own_names(host)


def certificate(cert: Path | None, key: Path | None) -> tuple[Path, Path | None] | None:
    """Return the certificate's files, after loading them once."""
    if cert is None:
        if key is not None:
            raise GenerationError("--ssl-keyfile was given without --ssl-certfile")
        return None
    for path in (cert, key):
        if path is not None and not path.is_file():
            raise GenerationError(f"{path} is not a file, expected a PEM file")
    try:
        # Without an explicit password, an encrypted key would ask for one on the terminal.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            cert, key, password=lambda: b""
        )
    except (ssl.SSLError, ValueError) as error:
        raise GenerationError(
            f"{cert} and its key cannot be used: {getattr(error, 'reason', None) or error}; "
            "expected a certificate and an unencrypted key in PEM"
        ) from None
    return cert, key


def listen_at(path: Path) -> socket.socket:
    """Return a Unix socket, replacing one left by a dead server but not one that answers."""
    made = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as other:
                if other.connect_ex(str(path)) == 0:
                    raise GenerationError(f"cannot listen on {path}: another server is using it")
            path.unlink()
        made.bind(str(path))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise GenerationError(f"cannot listen on {path}: {error.strerror or error}") from None
    return made


def listen(host: str, port: int) -> socket.socket:
    """Return the socket, opened before the model is loaded, so that a port in use is reported at
    once.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise GenerationError(
            f"cannot listen on {host} port {port}: {error.strerror or error}"
        ) from None
    # asyncio disables Nagle's algorithm only if the socket names its protocol; otherwise the first
    # words of an answer wait for the client's delayed acknowledgement, about 40 ms.
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, fileno=made.detach())
