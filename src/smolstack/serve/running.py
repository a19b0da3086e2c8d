"""Running the server: a socket, signals, and the end."""

from __future__ import annotations

import math
import socket

import uvicorn

from smolstack.serve.app import Server
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM


def run(vlm: VLM, settings: ServerSettings, listener: socket.socket, *, log_level: str) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is at work for ``settings.drain`` seconds."""
    server = Server(vlm, settings)
    config = uvicorn.Config(
        server.app,
        log_level=log_level,
        access_log=log_level == "info",
        timeout_graceful_shutdown=math.ceil(settings.drain),
        # A client that sends its headers byte by byte holds no more than this.
        h11_max_incomplete_event_size=64 * 1024,
        server_header=False,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        if server.engine.alive:
            server.close()
