"""Where a server listens, and who may ask: checked before the model is loaded."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path

from smolstack.errors import GenerationError
from smolstack.serve.listening import BACKLOG

KEY = "SMOLSTACK_API_KEY"


def keys(given: list[str]) -> tuple[str, ...]:
    """The API keys, of the command line and of the environment.

    Raises:
        GenerationError: one is empty: a server that was meant to have a key would have none.
    """
    origins = [("--api-key", key) for key in given]
    if KEY in os.environ:
        origins.append((KEY, os.environ[KEY]))
    for origin, key in origins:
        if not key.strip():
            raise GenerationError(f"{origin} is empty, expected a key; leave it out for none")
    return tuple(key.strip() for _, key in origins)


def hosts(
    host: str, uds: Path | None, keys: tuple[str, ...], allowed: list[str]
) -> tuple[str, ...] | None:
    """The names that are looked for in Host; None where a key or a Unix socket keep others out."""
    from smolstack.serve.origins import own_names

    names = tuple(name.lower() for name in allowed)
    if names:
        return (*own_names(host), *names)
    return None if keys or uds is not None else own_names(host)


def certificate(cert: Path | None, key: Path | None) -> tuple[Path, Path | None] | None:
    """The files of a certificate, tried before the model is loaded."""
    if cert is None:
        if key is not None:
            raise GenerationError("--ssl-keyfile was given without --ssl-certfile")
        return None
    for path in (cert, key):
        if path is not None and not path.is_file():
            raise GenerationError(f"{path}: found no file, expected one in PEM")
    try:
        # Without a password of its own, an encrypted key would ask for one on the terminal.
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
    """A Unix socket; what a server that ended left there is replaced, one that answers is not."""
    made = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as other:
                if other.connect_ex(str(path)) == 0:
                    raise GenerationError(f"cannot listen at {path}: a server is there already")
            path.unlink()
        made.bind(str(path))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise GenerationError(f"cannot listen at {path}: {error.strerror or error}") from None
    return made


def listen(host: str, port: int) -> socket.socket:
    """The socket, taken before the model is loaded: a port in use is told at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise GenerationError(
            f"cannot listen at {host} port {port}: {error.strerror or error}"
        ) from None
    # asyncio sends small events at once only where a socket names its protocol; without it, the
    # first words of an answer wait for the client's delayed acknowledgement, some 40 ms.
    return socket.socket(made.family, made.type, socket.IPPROTO_TCP, fileno=made.detach())
